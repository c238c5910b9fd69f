"""What APCodec is trained on besides its quantizer: spectra of the decoder against those of the recording, a teacher.

Section III of Ai et al., arXiv 2402.10533. Shapes: B clips, N samples, K bins, T transform frames, F code frames;
`valid` `[B, T]` bool marks the frames that count, None for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from audiotok.codecs.apcodec.blocks_apcodec import Decoded, Encoded
from audiotok.codecs.apcodec.configuration_apcodec import ApCodecConfig
from audiotok.codecs.apcodec.front_end_apcodec import AMPLITUDE_FLOOR, ApCodecFrontEnd

MIN_POWER, MIN_MEL = 1e-9, 1e-5


def first_frames(counts: Sequence[int], total: int, device: torch.device) -> Tensor | None:
    """`[B, total]` bool, the first `counts[i]` of row i; None where that is all of them."""
    if min(counts) == total:
        return None
    return torch.arange(total, device=device) < torch.tensor(counts, device=device)[:, None]


def mean_over(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of `[B, channels, T]` over the frames that count."""
    return values.mean() if valid is None else values.transpose(1, 2)[valid].mean()


def phase_losses(found: Tensor, wanted: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
    """`phase`, `group_delay` (along frequency) and `phase_difference` (along time) of phases `[B, K, T]`.

    The first bin and the first frame enter their differences as they are, as published.
    """
    error = found - wanted
    along_frequency = error.diff(dim=1, prepend=torch.zeros_like(error[:, :1]))
    along_time = error.diff(dim=2, prepend=torch.zeros_like(error[:, :, :1]))
    return {
        "phase": mean_over(_unwrapped(error), valid),
        "group_delay": mean_over(_unwrapped(along_frequency), valid),
        "phase_difference": mean_over(_unwrapped(along_time), valid),
    }


def _unwrapped(angle: Tensor) -> Tensor:
    """How far an angle is from the nearest multiple of 2 pi."""
    return (angle - 2 * math.pi * (angle / (2 * math.pi)).round()).abs()


def spectrum_losses(decoded: Tensor, wanted: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
    """`real` and `imaginary` parts of the decoder's complex spectrum `[B, K, T]` against the recording's."""
    return {
        "real": mean_over((decoded.real - wanted.real).abs(), valid),
        "imaginary": mean_over((decoded.imag - wanted.imag).abs(), valid),
    }


def consistency_loss(decoded: Tensor, heard: Tensor, valid: Tensor | None) -> Tensor:
    """Squared distance of the decoder's complex spectrum `[B, K, T]` from that of its own waveform."""
    unheard = decoded - heard
    return mean_over(unheard.real.square() + unheard.imag.square(), valid)


class LogMel(nn.Module):
    """Complex spectra `[B, K, T]` → `[B, bands, T]`: Slaney bands from 0 to half the rate."""

    def __init__(self, config: ApCodecConfig) -> None:
        super().__init__()
        # A NumPy array, not a buffer: nothing to lose on the meta device or in a cast.
        self.bank = mel_filter_bank(
            config.num_bins, config.num_mels, 0.0, config.sampling_rate / 2, config.sampling_rate,
            norm="slaney", mel_scale="slaney",
        ).T.astype(np.float32)  # fmt: skip

    def forward(self, spectrum: Tensor) -> Tensor:
        power = spectrum.real.square() + spectrum.imag.square()
        mel = torch.from_numpy(self.bank).to(power.device) @ (power + MIN_POWER).sqrt()
        return mel.clamp_min(MIN_MEL).log()


class ReconstructionLosses(nn.Module):
    """All terms that compare the decoder with the recording, by name; no parameters."""

    def __init__(self, config: ApCodecConfig) -> None:
        super().__init__()
        self.causal, self.facts = config.causal, config.facts
        self.front_end, self.log_mel = ApCodecFrontEnd(config), LogMel(config)

    def forward(
        self, features: tuple[Tensor, Tensor], decoded: Decoded, audio: Tensor, lengths: Sequence[int]
    ) -> dict[str, Tensor]:
        """Scalars.

        Args:
            features: log amplitude and phase of the recording, `[B, K, T]`.
            decoded: of at least T frames. audio: its waveform `[B, N]`.
            lengths: samples of each recording.
        """
        counts = [self.front_end.num_frames(n) for n in lengths]
        held = [self.facts.held_samples(-(-count // self.front_end.ratio)) for count in counts]
        total = max(counts)
        valid = first_frames(counts, total, audio.device)
        audible = first_frames(self._audible(counts, held), total, audio.device)
        log_amplitude, angle = features
        amplitude = log_amplitude.exp() - AMPLITUDE_FLOOR
        wanted = torch.complex(amplitude * angle.cos(), amplitude * angle.sin())
        found, heard = decoded.spectrum[..., :total], self._spectrum_of(audio, held, total)
        mel_error = self.log_mel(heard) - self.log_mel(wanted)
        return {
            "amplitude": mean_over((decoded.log_amplitude[..., :total] - log_amplitude).square(), valid),
            **phase_losses(decoded.phase[..., :total], angle, valid),
            **spectrum_losses(found, wanted, valid),
            "consistency": consistency_loss(found, heard, audible),
            "log_mel": mean_over(mel_error.abs(), audible),
            "log_mel_squared": mean_over(mel_error.square(), audible),
        }

    def _audible(self, counts: Sequence[int], held: Sequence[int]) -> list[int]:
        """Frames whose windows lie within what is decoded; the last causal ones go on behind its end."""
        if not self.causal:
            return list(counts)
        return [min(n, max(1, samples // self.front_end.hop)) for n, samples in zip(counts, held, strict=True)]

    def _spectrum_of(self, audio: Tensor, held: Sequence[int], frames: int) -> Tensor:
        """Complex `[B, K, frames]` of decoded waveforms, each to its own end."""
        inside = first_frames(held, audio.shape[1], audio.device)
        return self.front_end.spectrum(audio if inside is None else audio * inside, held, frames)


# A teacher


def compared_features(encoded: Encoded, quantized: Tensor, decoded: Decoded) -> list[Tensor]:
    """What a student learns of its teacher, `[B, T or F, channels]` each.

    The states of all four trunks (what enters each block, what leaves the last), the latents, their quantized form
    `[B, D, F]`, and the three maps that the decoder ends in.
    """
    flat = [encoded.latents, quantized, decoded.log_amplitude, decoded.real, decoded.imaginary]
    states = [encoded.amplitude_states, encoded.phase_states, decoded.amplitude_states, decoded.phase_states]
    return [state for trunk in states for state in trunk] + [feature.transpose(1, 2) for feature in flat]


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
    """Mean squared difference, averaged over the features of `compared_features`.

    Args:
        frames: F of each clip; what lies behind counts nothing.
    """
    terms = []
    for mine, theirs in zip(student, teacher, strict=True):
        ratio = mine.shape[1] // max(frames)
        valid = first_frames([count * ratio for count in frames], mine.shape[1], mine.device)
        terms.append(mean_over((mine - theirs.detach()).float().square().transpose(1, 2), valid))
    return torch.stack(terms).mean()
