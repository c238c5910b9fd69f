"""Configurations, their overrides, and the schedule that they describe."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from audiotok.errors import ConfigError, OptionError
from audiotok.recipes.training.config import StageSection, TrainConfig, load_config
from audiotok.recipes.training.schedule import Moment, Schedule
from training.helpers import CONFIGS, TINY

# Configuration


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_bundled_configs_load_and_say_where_a_loss_imitates_a_metric(path: Path):
    config = load_config(path)
    if any(stage.loss_weights.get("correlation") for stage in config.stages):
        assert "as STOI does" in path.read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=1", 'Unknown key "sead". Did you mean "seed"?'),
        ("data.bach_size=1", 'Unknown key "data.bach_size". Did you mean "batch_size"?'),
        ("stages.joint.step=1", 'Unknown key "stages.1.step". Did you mean "steps"?'),
        ("stages.join.steps=1", 'no item "join".* Did you mean "joint"?'),
        ("stages.joint.loss_weights.mell=1", 'Did you mean "mel"?'),
        ("data.domain_weights.speach=1", 'Did you mean "speech"?'),
        ("data.batch_size=many", "data.batch_size='many' is not legal: a value of type int"),
        ("data.batch_size=true", "a value of type int"),
        ("data.batch_size=0", "above 0"),
        ("stages.0.learning_rate=fast", "int or float"),
        ("seed.more=1", "inside a plain value"),
        ("seed.more.still=1", "inside a plain value"),
        ("seed", "has no value"),
        ("seed=[1", "no YAML value"),
        ("optimizer.betas=3", "type list"),
        ("mixed_precision=fp8", "choose one of no, bf16, fp16"),
        ("stages.continuous.loss_weights.commitment=1", "no code is searched"),
        ("stages.joint.loss_weights.distillation=1", "distillation.teachers"),
        ("codec.start=laped", 'Did you mean "lapped"?'),
        ("stages.finish.name=joint", "a name of its own"),
        ("validation.best_by=pesq", "choose one of mel_distance, stoi, estoi"),
        ("validation.best_by=stoi", "needs validation.intelligibility=true"),
    ],
)
def test_config_refuses_what_it_does_not_know(override: str, message: str):
    with pytest.raises((ConfigError, OptionError), match=message.replace("?", r"\?")):
        load_config(TINY, [override])


def test_overrides_reach_sections_lists_and_numbers_without_a_dot():
    config = load_config(TINY, ["stages.joint.learning_rate=1e-4", "stages.0.steps=7", "data.gain_db=3"])
    assert config.stages[1].learning_rate == 1e-4
    assert config.stages[0].steps == 7
    assert config.data.gain_db == 3.0


def test_a_config_that_is_no_yaml_says_so(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("stages: [")
    (tmp_path / "b.yaml").write_text("- 1")
    for name in ("a.yaml", "b.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_config(tmp_path / name)


# Schedule


def test_learning_rate_warms_up_stays_and_falls():
    stage = StageSection("s", steps=100, learning_rate=1.0, warmup_steps=10, flat_fraction=0.3, final_fraction=0.1)
    rates = [Moment(stage, step).learning_rate for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[30] == 1.0
    assert rates[65] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=0.02)
    assert all(a >= b for a, b in pairwise(rates[30:]))


def test_stages_follow_each_other_and_may_weigh_domains_their_own_way(tiny: TrainConfig):
    tiny.stages[0].domain_weights = {"music": 1.0}
    tiny.gradient_accumulation = 2
    schedule = Schedule(tiny)
    assert [schedule.at(step).stage.name for step in (0, 2, 3, 6, 7, 9)] == [
        "continuous", "continuous", "joint", "joint", "finish", "finish",
    ]  # fmt: skip
    assert schedule.at(6).is_last
    assert schedule.batch_weights(5) == {"music": 1.0}  # the second micro-batch of step 2
    assert schedule.batch_weights(6) == tiny.data.domain_weights
    with pytest.raises(IndexError):
        schedule.at(10)
