"""Latents of training crops, to fit a book to before codes exist."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from audiotok.codec import AudioCodec
from audiotok.recipes.training.codebook import Range
from audiotok.recipes.training.data import CropDataset

CROPS_PER_BATCH = 16


@torch.no_grad()
def collect_latents(
    codec: AudioCodec,
    dataset: CropDataset,
    ranges: dict[str, Range],
    weights: dict[str, float],
    frames_per_range: int,
    accelerator: Accelerator,
    project: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Codec domain -> `[M, d]` latents on the CPU; domains that search one range share its frames.

    Args:
        ranges: codec domain -> code range.
        weights: metadata domain -> share in training; those of 0 and without clips are left out.
        project: from the encoder's latents `[B, C, T]` to those that are wanted, `[B, d, T]`.
    """
    rng = np.random.default_rng([dataset.seed, 0x0B00C])
    names = {
        dataset.config.domains[name]: name for name, weight in weights.items() if weight > 0 and dataset.clips[name]
    }
    codec.eval()  # batch norm must not move
    latents = {}
    for domain, name in names.items():
        sharing = sum(ranges[other] == ranges[domain] for other in names)
        latents[domain] = _latents_of(codec, dataset, name, frames_per_range // sharing, rng, accelerator, project)
    return latents


def _latents_of(
    codec: AudioCodec,
    dataset: CropDataset,
    name: str,
    num_frames: int,
    rng: np.random.Generator,
    accelerator: Accelerator,
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    parts: list[Tensor] = []
    while sum(map(len, parts)) < num_frames:
        crops = np.stack([dataset.augmented_crop(rng, name) for _ in range(CROPS_PER_BATCH)])[:, None]
        with accelerator.autocast():
            latents = codec.latents(torch.from_numpy(crops).to(accelerator.device))
        parts.append(project(latents.float()).transpose(1, 2).flatten(0, 1).cpu())
    return torch.cat(parts)[:num_frames]
