"""Distillation: a teacher's states guide the codec's, and the teacher stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.codecs_table import APCODEC, APCODEC_CAUSAL

from audiotok import ApCodecAudioTokenizer, ApCodecConfig, ApCodecModel
from audiotok.errors import ConfigError
from training.helpers import run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random HuBERT of a few thousand parameters, saved as a hub folder."""
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8, 8),
        conv_stride=(5, 8, 8), conv_kernel=(10, 8, 8), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    HubertModel(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(path)
    return path


def distil(teacher: Path) -> list[str]:
    weights = "{mel: 1.0, distillation: 1.0}"
    return [
        f"distillation={{teachers: {{speech: {{model: '{teacher}', layer: 1}}}}}}",
        f"stages.joint.loss_weights={weights}",
        "stages.continuous.steps=1",
    ]


def test_distillation_teaches_and_keeps_the_teacher_frozen(folder: Path, cache: Path, tmp_path: Path, teacher: Path):
    trainer = run(folder, cache, tmp_path, *distil(teacher), max_steps=4)
    comparison = trainer.distillation.comparison
    frozen = comparison.teachers["speech"]
    assert not frozen.model.training
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert [name for name, _ in comparison.named_parameters()] == ["maps.speech.weight", "maps.speech.bias"]
    state = torch.randn(2, 12, 16, requires_grad=True)
    audio = 0.1 * torch.randn(2, 1, 4000)
    comparison(state, audio, ["speech", "music"]).backward()
    assert state.grad[0].abs().sum() > 0
    assert state.grad[1].abs().sum() == 0  # a domain without a teacher
    assert comparison(state, audio, ["music", "music"]) == 0
    assert len(trainer.report.training.series("distillation")[1]) > 0


def test_distillation_resumes(folder: Path, cache: Path, tmp_path: Path, teacher: Path):
    whole = run(folder, cache, tmp_path / "whole", *distil(teacher), max_steps=4)
    run(folder, cache, tmp_path / "parts", *distil(teacher), max_steps=2)
    parts = run(folder, cache, tmp_path / "parts", *distil(teacher), resume=True, max_steps=4)
    for name in ("codec", "distillation"):
        modules = [getattr(t, name) if name == "codec" else t.distillation.comparison for t in (whole, parts)]
        states = [m.state_dict() for m in modules]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# A codec that teaches another one

CAUSAL = {**APCODEC, **APCODEC_CAUSAL}
# What a centred teacher of the causal one must share.
CENTRED = {**APCODEC, "response_norm": False, "num_hidden_layers": 1}


def learn_from(teacher: str) -> list[str]:
    return [
        "codec.family=apcodec",
        f"codec.config={CAUSAL}".replace("True", "true").replace("False", "false"),
        "data.domains={speech: all, music: all, sound: all}",
        "codebook.update=gradient",
        f"distillation.codec='{teacher}'",
        "stages=[{name: joint, steps: 4, loss_weights: {mel: 1.0, commitment: 0.1, codebook: 0.1, distillation: 1.0}}]",
    ]


def test_a_causal_codec_learns_from_a_centred_one(folder: Path, cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = ApCodecAudioTokenizer(ApCodecModel(ApCodecConfig(**CENTRED)))
    teacher.save_pretrained(tmp_path / "teacher")
    options = learn_from(str(tmp_path / "teacher"))
    whole = run(folder, cache, tmp_path / "whole", *options, max_steps=4)
    assert not any(p.requires_grad for p in whole.codec_teacher.parameters())
    before, after = teacher.codec.state_dict(), whole.codec_teacher.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(whole.report.training.series("distillation")[1]) > 0
    run(folder, cache, tmp_path / "parts", *options, max_steps=2)
    parts = run(folder, cache, tmp_path / "parts", *options, resume=True, max_steps=4)
    one, two = whole.codec.state_dict(), parts.codec.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    alone = run(folder, cache, tmp_path / "alone", *options, "stages.joint.loss_weights.distillation=0", max_steps=4)
    assert not all(torch.equal(one[key], value) for key, value in alone.codec.state_dict().items())


def test_teachers_that_cannot_teach_are_refused(folder: Path, cache: Path, tmp_path: Path, teacher: Path) -> None:
    weights = "stages.joint.loss_weights={mel: 1.0, distillation: 1.0}"
    with pytest.raises(ConfigError, match=r"AuvModel learns from distillation\.teachers alone"):
        run(folder, cache, tmp_path / "a", weights, "distillation.codec=audiotok/auv-mini")
    with pytest.raises(ConfigError, match="one of the two"):
        run(folder, cache, tmp_path / "b", *distil(teacher), "distillation.codec=audiotok/auv-mini")
    with pytest.raises(ConfigError, match="AuvModel: it must be a ApCodecModel"):
        run(folder, cache, tmp_path / "c", *learn_from("audiotok/auv-mini"))
    ApCodecAudioTokenizer(ApCodecModel(ApCodecConfig(**{**CENTRED, "trunk_size": 20}))).save_pretrained(tmp_path / "d")
    with pytest.raises(ConfigError, match="trunk_size"):
        run(folder, cache, tmp_path / "e", *learn_from(str(tmp_path / "d")))
