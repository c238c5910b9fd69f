"""Batches for training: crops of a corpus, balanced over domains and augmented; and the clips that validate.

Crops are a pure function of (seed, process, batch index), so a resumed run, another number of workers or a slow
disk never change what step 1234 sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from audiotok.errors import ConfigError, did_you_mean
from audiotok.recipes.training.config import DataSection
from audiotok.recipes.training.corpus import Clip, Corpus, unit_hash


class CropDataset(Dataset):
    """Item i is batch i: `{"input_values": [B, 1, N] float32, "domain": list of the codec's domain names}`.

    Args:
        clips: the training clips.
        weights: batch index -> share of each metadata domain (stages may differ).
        process: which of several training processes this is; each cuts its own crops.
    """

    MAX_REDRAWS = 5

    def __init__(
        self,
        corpus: Corpus,
        clips: list[Clip],
        config: DataSection,
        weights: Callable[[int], dict[str, float]],
        seed: int,
        process: int = 0,
    ) -> None:
        self.corpus, self.config, self.weights, self.seed, self.process = corpus, config, weights, seed, process
        self.crop_length = round(config.crop_seconds * corpus.sampling_rate)
        self.clips = {name: [clip for clip in clips if clip.domain == name] for name in config.domains}
        self.cumulative = {name: np.cumsum([c.length for c in group]) for name, group in self.clips.items()}
        unknown = sorted({clip.domain for clip in clips} - set(config.domains))
        if unknown:
            hint = did_you_mean(unknown[0], config.domains)
            raise ConfigError(f'The metadata has the domain "{unknown[0]}", which data.domains does not map.{hint}')

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, self.process, index])
        names = self.draw_domains(rng, self.weights(index), self.config.batch_size)
        crops = np.stack([self.augmented_crop(rng, name) for name in names])
        return {
            "input_values": torch.from_numpy(crops[:, None]),
            "domain": [self.config.domains[name] for name in names],
        }

    def draw_domains(self, rng: np.random.Generator, weights: dict[str, float], count: int) -> list[str]:
        """`count` metadata domains, each within one of its exact share (systematic sampling)."""
        available = {name: weight for name, weight in weights.items() if weight > 0 and self.clips[name]}
        if not available:
            raise ConfigError(f"No clip has one of the weighted domains {', '.join(weights) or '(none)'}.")
        edges = np.cumsum(list(available.values())) / sum(available.values())
        points = (np.arange(count) + rng.random()) / count
        names = list(available)
        return [names[i] for i in np.minimum(np.searchsorted(edges, points, side="right"), len(names) - 1)]

    def augmented_crop(self, rng: np.random.Generator, name: str) -> np.ndarray:
        """`[N]` float32: a crop of the domain, perhaps mixed with a second one, scaled and flipped."""
        config = self.config
        crop = self.crop(rng, name)
        if rng.random() < config.mix_probability:
            crop = crop + self.crop(rng, name) * _db(rng.uniform(*config.mix_level_db))
        gain = _db(rng.uniform(-config.gain_db, config.gain_db))
        sign = -1.0 if config.flip_polarity and rng.random() < 0.5 else 1.0
        peak = max(1.0, float(np.abs(crop).max()) * gain)
        return (crop * (sign * gain / peak)).astype(np.float32)

    def crop(self, rng: np.random.Generator, name: str) -> np.ndarray:
        """`[N]` float32 from a clip drawn by duration; silent draws are repeated, short clips zero-padded."""
        crop = np.zeros(self.crop_length, np.float32)
        for _ in range(self.MAX_REDRAWS):
            crop = self._any_crop(rng, name)
            if np.abs(crop).max() >= self.config.min_peak:
                break
        return crop

    def _any_crop(self, rng: np.random.Generator, name: str) -> np.ndarray:
        edges = self.cumulative[name]
        clip = self.clips[name][int(np.searchsorted(edges, rng.integers(edges[-1]), side="right"))]
        spare = clip.length - self.crop_length
        if spare >= 0:
            return self.corpus.audio(clip, int(rng.integers(spare + 1)), self.crop_length)
        before = int(rng.integers(-spare + 1))
        return np.pad(self.corpus.audio(clip), (before, -spare - before))


def _db(decibels: float) -> float:
    return float(10 ** (decibels / 20))


def batch_loader(dataset: CropDataset, start: int, stop: int, num_workers: int) -> DataLoader:
    """Batches `start` to `stop - 1`, in order."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        generator=torch.Generator(),  # the loader draws a seed; the training generator must not notice
    )


def validation_set(
    corpus: Corpus, clips: list[Clip], config: DataSection, count: int, seconds: float
) -> list[tuple[Tensor, str, str]]:
    """Up to `count` triples (`[1, 1, N]`, domain, codec domain): the domains by their weight, groups in turn."""
    chosen: list[tuple[Tensor, str, str]] = []
    total = sum(config.domain_weights.values())
    for name, weight in config.domain_weights.items():
        group = _round_robin([c for c in clips if c.domain == name and c.length >= corpus.sampling_rate // 2])
        for clip in group[: max(1, round(count * weight / total))]:
            audio = corpus.audio(clip, 0, round(seconds * corpus.sampling_rate))
            chosen.append((torch.from_numpy(audio)[None, None], name, config.domains[name]))
    return chosen


def _round_robin(clips: list[Clip]) -> list[Clip]:
    """Clips ordered so that every group gives one before any gives its second; order by hash, not by name."""
    turns: dict[str, int] = {}
    ordered = []
    for clip in sorted(clips, key=lambda c: unit_hash(c.file_name)):
        turns[clip.group] = turns.get(clip.group, 0) + 1
        ordered.append((turns[clip.group], unit_hash(clip.group), clip))
    return [clip for *_, clip in sorted(ordered, key=lambda item: item[:2])]
