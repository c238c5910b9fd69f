"""The training recipe: configuration, data, code books, state, and whole runs of a tiny codec."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from audiotok import AuvModel
from audiotok.errors import (
    AudioFileNotFoundError,
    AudioInputError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    OptionError,
    OutputExistsError,
)
from audiotok.recipes import train_codec
from audiotok.recipes.train_codec import CodecTrainer
from audiotok.recipes.training import corpus as corpus_module
from audiotok.recipes.training.codebook import MovingAverageBook, fit_nested_book, nearest_rows, spherical_kmeans
from audiotok.recipes.training.config import StageSection, TrainConfig, load_config
from audiotok.recipes.training.corpus import Clip, Corpus, hold_out, open_corpus
from audiotok.recipes.training.data import CropDataset, batch_loader, validation_set
from audiotok.recipes.training.latents import collect_latents
from audiotok.recipes.training.reporting import Table
from audiotok.recipes.training.schedule import Moment, Schedule
from audiotok.recipes.training.state import WeightAverage, replace_folder

CONFIGS = Path(__file__).resolve().parents[1] / "recipes" / "configs"
TINY = CONFIGS / "auv_tiny_test.yaml"
RATE = 16_000
Tensors = dict[str, Tensor]
WEIGHTS = {"speech": 0.5, "music": 0.25, "sound": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audiofolder: 4 speakers, 3 pieces of music, 3 sounds; several rates, one stereo, one very short clip."""
    root = tmp_path_factory.mktemp("audiofolder")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(14):
        domain = ("speech", "music", "sound")[number % 3]
        rate = (16_000, 22_050, 8_000)[number % 3]
        samples = 0.2 * rng.standard_normal((round((0.1 if number == 13 else 1.2) * rate), 1 + number % 2))
        samples *= np.sin(np.arange(len(samples)) * 8 / rate)[:, None] ** 2
        soundfile.write(root / f"{number}.wav", samples, rate)
        speaker = f"s{number % 4}" if domain == "speech" else ""
        rows.append({"file_name": f"{number}.wav", "domain": domain, "speaker": speaker, "recording": f"r{number}"})
    write_metadata(root, rows)
    return root


def write_metadata(root: Path, rows: list[dict[str, str]]) -> None:
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(folder: Path, cache: Path) -> Corpus:
    return open_corpus(folder, cache, RATE, {"speech": [0.89]})


@pytest.fixture
def tiny() -> TrainConfig:
    return load_config(TINY)


def crops(corpus: Corpus, tiny: TrainConfig, process: int = 0, **settings: object) -> CropDataset:
    for name, value in settings.items():
        setattr(tiny.data, name, value)
    return CropDataset(corpus, corpus.clips, tiny.data, lambda _: tiny.data.domain_weights, tiny.seed, process)


# Configuration


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_bundled_configs_load_and_use_no_loss_that_imitates_a_metric(path: Path):
    config = load_config(path)
    assert all("correlation" not in stage.loss_weights for stage in config.stages)


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
        ("codebook.update=gradient", "needs codebook.update=ema"),
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


# Corpus


def test_corpus_is_mono_at_the_rate_with_copies_of_speech_only(corpus: Corpus):
    by_name = {(clip.file_name, clip.speed): clip for clip in corpus.clips}
    assert by_name["1.wav", 1.0].length == pytest.approx(1.2 * RATE, abs=2)  # stereo, 22 050 Hz
    assert by_name["0.wav", 0.89].length == pytest.approx(1.2 * RATE / 0.89, abs=2)
    assert {clip.domain for clip in corpus.clips if clip.speed != 1.0} == {"speech"}
    assert len(corpus.samples) == sum(clip.length for clip in corpus.clips)


def test_corpus_holds_the_recording_itself(corpus: Corpus, folder: Path):
    samples, _ = soundfile.read(folder / "0.wav")
    clip = next(clip for clip in corpus.clips if clip.file_name == "0.wav" and clip.speed == 1.0)
    assert np.abs(corpus.audio(clip) - samples).max() <= 1 / 32767


def test_cache_is_reused_and_named_after_what_it_depends_on(folder: Path, cache: Path, corpus: Corpus, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the cache was built again")

    monkeypatch.setattr(corpus_module, "load_audio", refuse)
    assert open_corpus(folder, cache, RATE, {"speech": [0.89]}).path == corpus.path
    for rate, copies in ((8_000, {"speech": [0.89]}), (RATE, {}), (RATE, {"speech": [0.9]})):
        with pytest.raises(AssertionError, match="built again"):
            open_corpus(folder, cache, rate, copies)


def test_cache_notices_changed_metadata_and_changed_files(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), RATE)
    keys = []
    for domain, samples in (("speech", 100), ("music", 100), ("music", 101)):
        soundfile.write(tmp_path / "a.wav", np.zeros(samples), RATE)
        rows = [{"file_name": "a.wav", "domain": domain}]
        keys.append(corpus_module.corpus_key(tmp_path, rows, RATE, {}))
    assert len(set(keys)) == 3


def test_a_cache_that_was_never_finished_is_not_used(folder: Path, tmp_path: Path, monkeypatch):
    calls = []

    def fail_at_third(path: Path, **options: object) -> object:
        calls.append(path)
        if len(calls) == 3:
            raise AudioInputError("broken")
        return load(path, **options)

    load = corpus_module.load_audio
    monkeypatch.setattr(corpus_module, "load_audio", fail_at_third)
    with pytest.raises(AudioInputError, match="broken"):
        open_corpus(folder, tmp_path, RATE, {})
    assert not list(tmp_path.iterdir())
    assert len(open_corpus(folder, tmp_path, RATE, {}).clips) == 14


def test_loud_recordings_are_scaled_not_clipped(tmp_path: Path):
    wave = 2.5 * np.sin(np.arange(4000) * 0.05)
    soundfile.write(tmp_path / "loud.wav", wave, RATE, subtype="FLOAT")
    write_metadata(tmp_path, [{"file_name": "loud.wav", "domain": "sound"}])
    corpus = open_corpus(tmp_path, tmp_path / "cache", RATE, {})
    assert np.abs(corpus.audio(corpus.clips[0]) - wave / np.abs(wave).max()).max() < 1e-3


def test_metadata_that_cannot_be_used_is_refused(tmp_path: Path):
    with pytest.raises(AudioInputError, match=r"no metadata\.csv"):
        open_corpus(tmp_path, tmp_path, RATE, {})
    write_metadata(tmp_path, [{"file_name": "a.wav", "label": "x"}])
    with pytest.raises(AudioInputError, match='column "domain"'):
        open_corpus(tmp_path, tmp_path, RATE, {})
    write_metadata(tmp_path, [{"file_name": "a.wav", "domain": "speech"}])
    with pytest.raises(AudioFileNotFoundError, match=r"a\.wav"):
        open_corpus(tmp_path, tmp_path, RATE, {})


def test_metadata_may_be_json_lines_in_a_train_folder(tmp_path: Path):
    (tmp_path / "train").mkdir()
    soundfile.write(tmp_path / "train" / "a.wav", np.zeros(100), RATE)
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "a.wav", "domain": "speech"}\n\n')
    assert len(open_corpus(tmp_path, tmp_path / "cache", RATE, {}).clips) == 1


# Held-out clips


def clips_of(groups: list[str], domain: str = "speech") -> list[Clip]:
    return [Clip(f"{g}_{i}", domain, g, 0, 100, s) for g in groups for i, s in enumerate((1.0, 0.9))]


def test_held_out_groups_are_whole_stable_and_about_the_share_asked_for():
    clips = clips_of([f"speaker:{i}" for i in range(400)])
    training, validation = hold_out(clips, 0.05)
    held = {clip.group for clip in validation}
    assert held.isdisjoint(clip.group for clip in training)
    assert 8 <= len(held) <= 35
    assert all(clip.speed == 1.0 for clip in validation)
    fewer = hold_out([c for c in clips if c.group != "speaker:7"], 0.05)[1]
    assert {clip.group for clip in fewer} == held - {"speaker:7"}


def test_each_domain_holds_something_out_unless_it_has_one_group():
    clips = clips_of(["a", "b"], "music") + clips_of(["only"], "sound") + clips_of(["x", "y"], "speech")
    training, validation = hold_out(clips, 1e-9)
    assert Counter(clip.domain for clip in validation) == {"music": 1, "speech": 1}
    assert "sound" in {clip.domain for clip in training}
    assert hold_out(clips, 0.0)[1] == []


def test_validation_set_takes_turns_between_groups(corpus: Corpus, tiny: TrainConfig):
    chosen = validation_set(corpus, [c for c in corpus.clips if c.speed == 1.0], tiny.data, 8, 0.5)
    assert Counter(domain for _, domain in chosen) == {"speech": 4, "music": 2, "audio": 2}
    assert all(audio.shape == (1, 1, 8000) for audio, _ in chosen)


# Crops


def test_a_batch_is_a_function_of_its_index(corpus: Corpus, tiny: TrainConfig):
    first, second = crops(corpus, tiny), crops(corpus, tiny)
    second[0], second[1]
    assert torch.equal(first[7]["input_values"], second[7]["input_values"])
    assert first[7]["domain"] == second[7]["domain"]
    assert not torch.equal(first[7]["input_values"], first[8]["input_values"])
    assert not torch.equal(first[7]["input_values"], crops(corpus, tiny, process=1)[7]["input_values"])


def test_workers_cut_the_same_batches_and_leave_the_generator_alone(corpus: Corpus, tiny: TrainConfig):
    dataset = crops(corpus, tiny)
    before = torch.get_rng_state()
    here, there = (list(batch_loader(dataset, 3, 6, workers)) for workers in (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a["input_values"], dataset[i]["input_values"]) for i, a in zip((3, 4, 5), here, strict=True))
    assert all(torch.equal(a["input_values"], b["input_values"]) for a, b in zip(here, there, strict=True))


@pytest.fixture(scope="module")
def dataset(corpus: Corpus) -> CropDataset:
    return crops(corpus, load_config(TINY))


@given(st.integers(1, 40), st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3), st.integers(0, 2**31))
def test_every_batch_is_balanced_to_within_one_crop(dataset: CropDataset, count: int, weights: list[float], seed: int):
    shares = dict(zip(WEIGHTS, weights, strict=True))
    drawn = Counter(dataset.draw_domains(np.random.default_rng(seed), shares, count))
    for name, weight in shares.items():
        assert abs(drawn[name] - count * weight / sum(weights)) <= 1 + 1e-9


def test_over_many_batches_the_shares_are_exact(corpus: Corpus, tiny: TrainConfig):
    dataset = crops(corpus, tiny, batch_size=2)
    drawn = Counter(name for i in range(300) for name in dataset[i]["domain"])
    assert {name: drawn[name] / 600 for name in drawn} == pytest.approx(
        {"speech": 0.5, "music": 0.25, "audio": 0.25}, abs=0.03
    )


def test_clips_are_drawn_by_duration(corpus: Corpus, tiny: TrainConfig, monkeypatch):
    corpus_clips = [Clip("long", "speech", "a", 0, 9000, 1.0), Clip("short", "speech", "b", 9000, 1000, 1.0)]
    dataset = CropDataset(corpus, corpus_clips, tiny.data, lambda _: WEIGHTS, 0)
    drawn: Counter[str] = Counter()

    def count(clip: Clip, *_: int) -> np.ndarray:
        drawn[clip.file_name] += 1
        return np.ones(min(clip.length, dataset.crop_length), np.float32)

    monkeypatch.setattr(corpus, "audio", count)
    for seed in range(1000):
        dataset.crop(np.random.default_rng(seed), "speech")
    assert drawn["long"] / 1000 == pytest.approx(0.9, abs=0.03)


def test_crops_stay_within_full_scale_and_short_clips_are_padded(corpus: Corpus, tiny: TrainConfig):
    dataset = crops(corpus, tiny, gain_db=30.0, mix_probability=1.0, batch_size=16)
    audio = torch.cat([dataset[i]["input_values"] for i in range(4)])
    assert audio.shape == (64, 1, 4000)
    assert audio.abs().max() <= 1
    short = next(clip for clip in corpus.clips if clip.file_name == "13.wav" and clip.speed == 1.0)
    only_short = CropDataset(corpus, [short], tiny.data, lambda _: {"music": 1.0}, 0)
    crop = only_short.crop(np.random.default_rng(0), "music")
    assert np.array_equal(np.trim_zeros(crop), np.trim_zeros(corpus.audio(short)))


def test_augmentation_off_returns_the_recording(corpus: Corpus, tiny: TrainConfig):
    dataset = crops(corpus, tiny, gain_db=0.0, flip_polarity=False, mix_probability=0.0)
    rng = np.random.default_rng(5)
    crop = dataset.augmented_crop(rng, "music")
    assert any(_contains(corpus.audio(clip), crop) for clip in dataset.clips["music"])


def _contains(audio: np.ndarray, crop: np.ndarray) -> bool:
    crop = np.trim_zeros(crop)
    places = np.flatnonzero(audio[: len(audio) - len(crop) + 1] == crop[0])
    return any(np.array_equal(audio[p : p + len(crop)], crop) for p in places)


def test_silent_stretches_are_drawn_again(tmp_path: Path, tiny: TrainConfig):
    samples = np.concatenate([np.zeros(16_000), 0.1 * np.ones(16_000)])
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    write_metadata(tmp_path, [{"file_name": "a.wav", "domain": "speech"}])
    dataset = crops(open_corpus(tmp_path, tmp_path / "cache", RATE, {}), tiny, domain_weights={"speech": 1.0})
    silent = sum(not dataset.crop(np.random.default_rng(i), "speech").any() for i in range(200))
    assert silent < 10  # 86 without a second draw


def test_a_domain_that_is_not_mapped_is_named(corpus: Corpus, tiny: TrainConfig):
    tiny.data.domains = {"speech": "speech", "music": "music", "sounds": "audio"}
    with pytest.raises(ConfigError, match=r'domain "sound".* Did you mean "sounds"\?'):
        crops(corpus, tiny)


# Code books


def around(direction: int, count: int, seed: int = 0, width: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 4, generator=generator) * width
    return F.normalize(noise + torch.eye(4)[direction], dim=1)


def test_nearest_rows_agree_with_all_pairs():
    latents, rows = around(0, 300, width=1.0), around(0, 50, seed=1, width=1.0)
    index, similarity = nearest_rows(latents, rows)
    assert torch.equal(index, (latents @ rows.T).argmax(dim=1))
    assert torch.allclose(similarity, (latents * rows[index]).sum(1), atol=1e-6)


def test_kmeans_finds_well_separated_directions_and_keeps_fixed_rows():
    latents = torch.cat([around(d, 100, seed=d, width=0.05) for d in range(4)])
    fixed = torch.eye(4)[:1].clone()
    rows = spherical_kmeans(latents, 3, 10, torch.Generator().manual_seed(0), fixed)
    assert torch.equal(fixed, torch.eye(4)[:1])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert set((rows @ torch.eye(4)).argmax(dim=1).tolist()) == {1, 2, 3}
    assert nearest_rows(latents, torch.cat([fixed, rows]))[1].mean() > 0.99


def test_kmeans_with_fewer_latents_than_rows_gives_distinct_unit_rows():
    rows = spherical_kmeans(around(0, 5), 12, 2, torch.Generator().manual_seed(0))
    assert rows.shape == (12, 4)
    assert torch.isfinite(rows).all()
    assert torch.allclose(rows.norm(dim=1), torch.ones(12), atol=1e-5)


def test_nested_fit_respects_ranges():
    """Speech rows see speech only; the rest of the book serves what speech rows do not cover."""
    ranges = {"speech": (0, 8), "vocal": (0, 12), "music": (0, 24), "audio": (0, 24), "other": (12, 24)}
    latents = {"speech": around(0, 400), "music": around(1, 300, 1), "audio": around(2, 300, 2)}
    book = fit_nested_book(latents, ranges, 24, 5, seed=0)
    assert torch.allclose(book.norm(dim=1), torch.ones(24), atol=1e-5)
    assert (book[:8] @ torch.eye(4)).argmax(dim=1).eq(0).all()
    assert {1, 2} == set((book[8:] @ torch.eye(4)).argmax(dim=1).tolist())
    alone = fit_nested_book({"speech": latents["speech"]}, ranges, 24, 5, seed=0)
    assert torch.equal(book[:8], alone[:8])


RANGES = {"speech": (0, 4), "music": (0, 8), "all": (0, 8)}


def moving_book(**options: object) -> MovingAverageBook:
    rows = around(3, 8, seed=9, width=1.0)
    return MovingAverageBook(rows.clone(), RANGES, **options)


def test_rows_move_to_the_latents_that_chose_them_and_others_stay():
    book = moving_book(decay=0.5)
    before = book.weight.clone()
    target = F.normalize(torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0)
    for _ in range(20):
        book.update(target.expand(1, 2, 4).transpose(1, 2), torch.tensor([[2, 2]]), ["speech"])
    assert torch.allclose(book.weight[2], target, atol=1e-4)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(book.weight[others], before[others])
    assert torch.allclose(book.weight.norm(dim=1), torch.ones(8), atol=1e-5)


def test_dead_rows_are_revived_with_latents_of_the_narrowest_domain_that_may_use_them():
    book = moving_book(revive_after=2)
    speech, music = around(0, 4, 1, 0.01), around(1, 4, 2, 0.01)
    latents = torch.stack([speech, music]).transpose(1, 2)
    codes = torch.tensor([[0, 0, 0, 0], [5, 5, 5, 5]])
    for _ in range(3):
        book.update(latents, codes, ["speech", "music"])
    closest = (book.weight @ torch.eye(4)).argmax(dim=1).tolist()
    assert closest[1:4] == [0, 0, 0]  # rows of speech, from speech
    assert [closest[i] for i in (4, 6, 7)] == [1, 1, 1]  # the rest, from music
    assert book.num_revived == 6
    assert book.unseen.max() == 0


def test_rows_in_use_and_runs_past_the_limit_are_not_revived():
    book = moving_book(revive_after=2)
    latents = around(0, 8, 1).T[None]
    before = book.weight.clone()
    for _ in range(5):
        book.update(latents, torch.zeros(1, 8, dtype=torch.long), ["music"], revive=False)
    assert book.num_revived == 0
    assert torch.equal(book.weight[1:], before[1:])
    everything = moving_book(revive_after=2)
    for _ in range(5):
        everything.update(latents, torch.arange(8)[None], ["music"])
    assert everything.num_revived == 0


def test_two_processes_hold_the_book_of_one():
    """Half a batch each, sums added up and latents joined, gives the same book, revived rows included."""
    whole = moving_book(revive_after=1)
    latents, codes = around(0, 12, 3, 1.0).view(4, 3, 4).transpose(1, 2), torch.randint(0, 3, (4, 3))
    domains = ["speech", "music", "speech", "music"]
    other: list[torch.Tensor] = []
    half = moving_book(revive_after=1, reduce=lambda t: t + other.pop(0), gather=lambda t: torch.cat([t, other.pop(0)]))
    for _ in range(4):
        reviving = bool((whole.unseen + 1 > 1)[3:].any())
        whole.update(latents, codes, domains)
        counted = F.pad(latents[2:].transpose(1, 2).reshape(-1, 4), (0, 1), value=1.0)
        other[:] = [torch.zeros(8, 5).index_add_(0, codes[2:].flatten(), counted)]
        if reviving:
            names = sorted(RANGES, key=lambda n: (RANGES[n][1] - RANGES[n][0], n))
            owners = torch.tensor([names.index(d) for d in domains[2:]]).repeat_interleave(3)
            other += [latents[2:].transpose(1, 2).reshape(-1, 4), owners]
        half.update(latents[:2], codes[:2], domains[:2])
        other.clear()
    assert whole.num_revived > 0
    assert half.num_revived == whole.num_revived
    assert torch.allclose(half.weight, whole.weight, atol=1e-6)


# Averages and folders


def test_average_starts_as_a_mean_copies_what_no_gradient_trains_and_keeps_eval_mode():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1), torch.nn.Embedding(2, 1))
    model[2].weight.requires_grad_(False)
    average = WeightAverage(model, decay=0.99)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(5.0)
        model[1].running_mean.fill_(7.0)
    start = average.module[0].weight.item()
    average.update(model)
    assert average.module[0].weight.item() == pytest.approx(0.1 * start + 0.9)
    assert average.module[2].weight.tolist() == [[5.0], [5.0]]
    assert average.module[1].running_mean.item() == 7.0
    assert not average.module.training


def test_replaced_folder_is_the_new_one_and_nothing_else_is_left(tmp_path: Path):
    for text in ("one", "two"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(text)
        replace_folder(tmp_path / "new", tmp_path / "last")
        assert (tmp_path / "last" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_table_forgets_the_rows_after_the_step_it_resumes_from(tmp_path: Path):
    table = Table(tmp_path / "log.csv", ["step", "mel"], 0)
    for step in (2, 4, 6):
        table.add({"step": step, "mel": step / 2})
    steps, values = Table(tmp_path / "log.csv", ["step", "mel"], 4).series("mel")
    assert steps.tolist() == [2, 4]
    assert values.tolist() == [1.0, 2.0]


# Whole runs


def run(
    folder: Path, cache: Path, output: Path, *overrides: str, resume: bool = False, max_steps: int | None = None
) -> CodecTrainer:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()  # accelerate remembers the precision of the process's first run
    config = load_config(TINY, ["validation.samples_every=0", *overrides])  # pictures take longer than the training
    trainer = CodecTrainer(config, folder, output, cache, resume, max_steps)
    keep = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert trainer.train() == 0
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), keep, strict=True):
            signal.signal(number, handler)
    return trainer


@pytest.fixture(scope="module")
def finished(folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CodecTrainer, Tensors]:
    trainer = run(folder, cache, tmp_path_factory.mktemp("undisturbed"), "validation.samples_every=10")
    return trainer, {key: value.clone() for key, value in everything(trainer).items()}


@pytest.fixture(scope="module")
def undisturbed(finished: tuple[CodecTrainer, Tensors]) -> CodecTrainer:
    return finished[0]


def everything(trainer: CodecTrainer) -> Tensors:
    """All tensors that a run ends with, and the state of the generator."""
    parts = {
        "random": {"state": torch.get_rng_state()},
        "codec": trainer.codec.state_dict(),
        "average": trainer.average.module.state_dict(),
        "book": {"sums": trainer.book.sums, "unseen": trainer.book.unseen},
        "discriminators": trainer.adversary.discriminators.state_dict(),
    }
    for name, optimizer in (("optimizer", trainer.optimizer), ("judge", trainer.adversary.optimizer)):
        parts[name] = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}


@pytest.mark.parametrize("stop", [2, 5, 8])  # inside each stage: before the fit, after it, with discriminators
def test_ten_steps_are_the_same_in_one_go_and_in_two(
    folder: Path, cache: Path, tmp_path: Path, finished: tuple[CodecTrainer, Tensors], stop: int
):
    undisturbed, outcome = finished
    run(folder, cache, tmp_path, max_steps=stop)
    torch.manual_seed(99)
    resumed = run(folder, cache, tmp_path, resume=True)
    found = everything(resumed)
    assert found.keys() == outcome.keys()
    assert not [key for key in outcome if not torch.equal(outcome[key], found[key])]
    assert resumed.progress.best_score == undisturbed.progress.best_score


def test_a_run_leaves_weights_tables_curves_and_samples(undisturbed: CodecTrainer):
    output = undisturbed.output
    for name in ("best", "ema"):
        model = AuvModel.from_pretrained(output / name)
        assert torch.allclose(model.codebook_embeddings()[0].norm(dim=1), torch.ones(64), atol=1e-5)
    saved = AuvModel.from_pretrained(output / "ema").state_dict()
    assert all(torch.equal(saved[k], v) for k, v in undisturbed.average.module.state_dict().items())
    with (output / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "5", "7", "10"]
    assert rows[0]["distinct_codes"] == "" and int(rows[1]["distinct_codes"]) > 1
    assert all(np.isfinite(float(row["mel_distance"])) and row["level_ratio_db"] for row in rows)
    assert (output / "curves.png").stat().st_size > 1000
    assert (output / "samples" / "step_0000010" / "spectrograms.png").is_file()
    assert list((output / "samples" / "step_0000010").glob("*_decoded.flac"))
    assert not list(output.glob("*.unfinished")) and not list(output.glob("*.old"))


def test_training_moves_every_part_of_the_codec(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(folder, cache, tmp_path, max_steps=1)
    torch.manual_seed(0)
    fresh = AuvModel(trainer.codec.config).state_dict()
    trained = {name for name, p in trainer.codec.named_parameters() if p.requires_grad}
    still = [k for k in trained if torch.equal(fresh[k], trainer.codec.state_dict()[k])]
    assert not still


def test_the_book_is_fitted_once(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(train_codec, "collect_latents", lambda *given: calls.append(given) or collect_latents(*given))
    run(folder, cache, tmp_path, max_steps=5)
    run(folder, cache, tmp_path, resume=True, max_steps=7)
    assert len(calls) == 1


def test_the_mel_loss_falls(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(folder, cache, tmp_path, "stages.continuous.steps=24", "log_every=6", max_steps=24)
    _, mel = trainer.report.training.series("mel")
    assert mel[-1] < 0.9 * mel[0]


def test_domain_labels_drive_the_search(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In training, speech teaches the first 32 rows only, and other domains the rest too."""
    codes: dict[str, list[int]] = {"speech": [], "music": [], "audio": []}
    update = MovingAverageBook.update

    def watch(book: MovingAverageBook, latents: Tensor, found: Tensor, domains: list[str], revive: bool) -> None:
        for domain, row in zip(domains, found, strict=True):
            codes[domain] += row.tolist()
        update(book, latents, found, domains, revive)

    monkeypatch.setattr(MovingAverageBook, "update", watch)
    run(folder, cache, tmp_path, max_steps=7)
    assert max(codes["speech"]) < 32
    assert max(codes["music"] + codes["audio"]) >= 32


def test_accumulated_gradients_and_a_gradient_trained_book(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(
        folder, cache, tmp_path,
        "gradient_accumulation=2", "codebook.update=gradient", "stages.joint.fit_codebook=false",
        "stages.joint.loss_weights={mel: 1.0, commitment: 0.25, codebook: 1.0}", max_steps=5,
    )  # fmt: skip
    assert trainer.book is None
    assert trainer.progress.audio_seconds == 5 * 2 * 4 * 0.25
    assert trainer.codec.quantizer.stages[0].codebook.weight.requires_grad


def test_bfloat16_runs(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(folder, cache, tmp_path, "mixed_precision=bf16", max_steps=9)  # into the adversarial stage
    assert trainer.progress.step == 9
    assert all(p.dtype == torch.float32 for p in trainer.codec.parameters())


def test_runs_are_not_overwritten_nor_resumed_from_nothing_nor_with_another_codec(
    folder: Path, cache: Path, tmp_path: Path, undisturbed: CodecTrainer
):
    with pytest.raises(OutputExistsError, match="--resume"):
        run(folder, cache, undisturbed.output)
    with pytest.raises(CheckpointNotFoundError, match="without --resume"):
        run(folder, cache, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="hidden_size"):
        run(folder, cache, undisturbed.output, "codec.config.hidden_size=24", resume=True)


def test_a_run_that_died_between_two_renames_resumes(folder: Path, cache: Path, tmp_path: Path):
    run(folder, cache, tmp_path, max_steps=2)
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert run(folder, cache, tmp_path, resume=True, max_steps=3).progress.step == 3


def test_unknown_domains_of_the_codec_are_refused(folder: Path, cache: Path, tmp_path: Path):
    with pytest.raises(OptionError, match='Did you mean "music"'):
        run(folder, cache, tmp_path, "data.domains.music=musik")


# Distillation


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


# Processes


def start(
    folder: Path, cache: Path, output: Path, *arguments: str, launcher: tuple[str, ...] = ("-m",)
) -> subprocess.Popen[str]:
    command = [
        sys.executable, *launcher, "audiotok.recipes.train_codec", str(TINY), "--data", str(folder),
        "--cache", str(cache), "--output", str(output), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_resumes(folder: Path, cache: Path, tmp_path: Path, number: signal.Signals):
    process = start(folder, cache, tmp_path, "--set", "stages.continuous.steps=100000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.csv").is_file() or len((tmp_path / "log.csv").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, text
    resumed = run(folder, cache, tmp_path, resume=True, max_steps=1)  # loads it; there are no steps left to do
    assert resumed.progress.step >= 4
    with (tmp_path / "log.csv").open() as file:
        assert all(int(row["step"]) <= resumed.progress.step for row in csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_train_one_codec(folder: Path, cache: Path, tmp_path: Path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    process = start(folder, cache, tmp_path, "--set", "validation.samples_every=0", launcher=launcher)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {path.name for path in (tmp_path / "last").iterdir()}
    rows = AuvModel.from_pretrained(tmp_path / "best").codebook_embeddings()[0]
    assert torch.allclose(rows.norm(dim=1), torch.ones(64), atol=1e-5)


@pytest.mark.slow
def test_the_command_refuses_with_one_line(folder: Path, cache: Path, tmp_path: Path):
    process = start(folder, cache, tmp_path, "--set", "sead=1")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 5
    assert text.strip().splitlines() == [text.strip()]
    assert 'Did you mean "seed"?' in text
