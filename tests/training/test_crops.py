"""Crops: balanced batches, each a function of its index."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from audiotok.errors import ConfigError
from audiotok.recipes.training.config import TrainConfig, load_config
from audiotok.recipes.training.corpus import Clip, Corpus, open_corpus
from audiotok.recipes.training.data import CropDataset, batch_loader
from training.helpers import RATE, TINY, write_metadata

WEIGHTS = {"speech": 0.5, "music": 0.25, "sound": 0.25}


def crops(corpus: Corpus, tiny: TrainConfig, process: int = 0, **settings: object) -> CropDataset:
    for name, value in settings.items():
        setattr(tiny.data, name, value)
    return CropDataset(corpus, corpus.clips, tiny.data, lambda _: tiny.data.domain_weights, tiny.seed, process)


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
