"""What the codec is trained to make small: named terms, of which each stage weighs some."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.codec import AudioCodec, CodecTrainingOutput
from audiotok.recipes.training.losses import (
    BandCorrelation,
    MultiResolutionSTFT,
    MultiScaleMel,
    spread_loss,
    waveform_error,
)

SPREAD_LATENTS = 512  # of a batch; the loss compares all pairs


class Objective(nn.Module):
    """The terms that need no other trained network: reconstruction, quantizer, spread."""

    def __init__(self, sampling_rate: int) -> None:
        super().__init__()
        self.mel = MultiScaleMel(sampling_rate)
        self.stft = MultiResolutionSTFT()
        self.correlation = BandCorrelation(sampling_rate)

    def forward(
        self, out: CodecTrainingOutput, target: Tensor, z: Tensor | None, weights: dict[str, float]
    ) -> dict[str, Tensor]:
        """The terms that `weights` names.

        Args:
            out: what the codec made of `target` `[B, 1, N]`.
            z: `[B, d, T]` what the quantizer searches with; needed for `spread`.
        """
        terms = {name: value for name, value in (out.losses or {}).items() if weights.get(name)}
        if weights.get("mel") or weights.get("mel_convergence"):
            mel = self.mel.terms(out.audio_values, target)
            terms |= {name: value for name, value in mel.items() if weights.get(name)}
        if weights.get("stft"):
            terms["stft"] = self.stft(out.audio_values, target)
        if weights.get("waveform"):
            terms["waveform"] = waveform_error(out.audio_values, target)
        if weights.get("correlation"):
            terms["correlation"] = self.correlation(out.audio_values, target)
        if z is not None and weights.get("spread"):
            terms["spread"] = spread_loss(F.normalize(_some(z), dim=1))  # searched by direction
        return terms


def takes_noise(codec: AudioCodec) -> bool:
    """Whether the codec can be trained with noise in place of a search."""
    return "latent_noise" in inspect.signature(codec.forward).parameters


def forward_options(codec: AudioCodec, domains: Sequence[str], noise: Tensor | None) -> dict[str, Any]:
    """Keywords of `codec.forward` for clips of these domains; `noise` `[B]` stands for a search."""
    options: dict[str, Any] = {} if noise is None else {"latent_noise": noise}
    return options | ({"domain": list(domains)} if "domain" in codec.encode_options else {})


def _some(z: Tensor) -> Tensor:
    """`[B, d, T]` -> up to 512 latents `[M, d]`, drawn evenly over clips and time."""
    flat = z.transpose(1, 2).flatten(0, 1)
    chosen = torch.randperm(len(flat), device=flat.device)[:SPREAD_LATENTS]
    return flat[chosen]


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The total that is minimised."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
