"""APCodec's networks: two branches that analyse amplitude and phase, two that make them again.

Shapes: B clips, N samples, K bins, T transform frames, F code frames, C trunk channels, D latent channels. `valid`
marks the frames that exist, None where all do; with it every clip of a batch is computed as it is alone. `history` is
that of a stream; see `audiotok.nn.history`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.codecs.apcodec.configuration_apcodec import ApCodecConfig
from audiotok.codecs.apcodec.front_end_apcodec import ApCodecFrontEnd
from audiotok.nn.convnext import VocosBackbone
from audiotok.nn.history import History, extend_left, weight_of
from audiotok.nn.masks import valid_frames
from audiotok.nn.stft import istft, overlap_add
from audiotok.nn.weight_norm import WeightNormConv1d, WeightNormConvTranspose1d


class Convolution(WeightNormConv1d):
    """Over time with zeros beyond both ends; causal: each output sees frames up to the last one of its stride."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, causal: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, 0 if causal else (kernel_size - 1) // 2)
        self.look_back = kernel_size - stride if causal else 0

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """`[B, in, T]` → `[B, out, T / stride]`."""
        x = extend_left(x, self.look_back, history, self)
        return F.conv1d(x, weight_of(self, history), self.bias, self.stride, self.padding)


class Upsampling(WeightNormConvTranspose1d):
    """`ratio` frames a code frame; causal: they hang on this code frame and those before it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, ratio: int, causal: bool) -> None:
        surplus = kernel_size - ratio  # frames that two code frames share
        super().__init__(in_channels, out_channels, kernel_size, ratio, 0 if causal else surplus // 2)
        self.look_back = -(-surplus // ratio) if causal else 0
        self.cut = surplus if causal else 0

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        """`[B, in, F]` → `[B, out, ratio * F]`."""
        x, weight = extend_left(x, self.look_back, history, self), weight_of(self, history)
        if history is None:
            frames = F.conv_transpose1d(x, weight, self.bias, self.stride, self.padding)
        else:  # a piece of some frames, for which one product of matrices is several times as fast
            shares = (x.transpose(1, 2) @ weight.flatten(1)).unflatten(-1, weight.shape[1:])
            frames = overlap_add(shares.transpose(1, 2).flatten(0, 1), self.stride)
            frames = frames.unflatten(0, (len(x), -1)) + self.bias[:, None]
        return frames[..., self.look_back * self.stride : frames.shape[-1] - self.cut]


def build_trunk(config: ApCodecConfig, in_channels: int) -> VocosBackbone:
    return VocosBackbone(
        in_channels,
        config.trunk_size,
        config.intermediate_size,
        config.num_hidden_layers,
        causal=config.causal,
        layer_scale=not config.response_norm,
        response_norm=config.response_norm,
    )


def existing(x: Tensor, valid: Tensor | None) -> Tensor:
    """`[B, channels, T]` with zeros where no frame exists."""
    return x if valid is None else x * valid[:, None]


class AnalysisBranch(nn.Module):
    """One feature `[B, K, T]` → half of what the latents are made of, `[B, size / 2, F]`, and the trunk's states."""

    def __init__(self, config: ApCodecConfig, size: int) -> None:
        super().__init__()
        self.trunk = build_trunk(config, config.num_bins)
        self.out_proj = nn.Linear(config.trunk_size, size)
        self.downsample = Convolution(
            size, size // 2, config.downsample_kernel_size, config.downsampling_ratio, config.causal
        )

    def forward(self, x: Tensor, valid: Tensor | None, history: History | None) -> tuple[Tensor, list[Tensor]]:
        x, states = self.trunk.states(x.to(self.out_proj.weight.dtype), valid, history)
        return self.downsample(existing(self.out_proj(x).transpose(1, 2), valid), history), states


class SynthesisBranch(nn.Module):
    """Decoder input `[B, channels, F]` → `[B, size, T]` for the convolutions that end in bins, and the states."""

    def __init__(self, config: ApCodecConfig, in_channels: int, size: int) -> None:
        super().__init__()
        self.upsample = Upsampling(
            in_channels, size, config.upsample_kernel_size, config.downsampling_ratio, config.causal
        )
        self.trunk = build_trunk(config, size)
        self.out_proj = nn.Linear(config.trunk_size, size)

    def forward(self, z: Tensor, valid: Tensor | None, history: History | None) -> tuple[Tensor, list[Tensor]]:
        x, states = self.trunk.states(self.upsample(z, history), valid, history)
        return existing(self.out_proj(x).transpose(1, 2), valid), states


@dataclass
class Encoded:
    """`latents` `[B, D, F]`; `states` `[B, T, C]` of each trunk: what enters each block, what leaves the last."""

    latents: Tensor
    amplitude_states: list[Tensor]
    phase_states: list[Tensor]


class ApCodecEncoder(nn.Module):
    def __init__(self, config: ApCodecConfig) -> None:
        super().__init__()
        self.ratio = config.downsampling_ratio
        self.front_end = ApCodecFrontEnd(config)
        self.amplitude = AnalysisBranch(config, config.amplitude_size)
        self.phase = AnalysisBranch(config, config.phase_size)
        self.latent_conv = Convolution(
            config.amplitude_size // 2 + config.phase_size // 2,
            config.hidden_size,
            config.latent_kernel_size,
            causal=config.causal,
        )

    def num_frames(self, num_samples: int) -> int:
        """F of a clip that is encoded as it is."""
        return -(-self.front_end.num_frames(num_samples) // self.ratio)

    def forward(self, waveform: Tensor, lengths: Sequence[int], phases: Sequence[str]) -> Encoded:
        """`[B, N]`, with the samples and the kind of phase of each clip."""
        features = self.features(waveform, lengths, phases)
        return self.encode(*features, [self.front_end.num_frames(n) for n in lengths])

    def features(self, waveform: Tensor, lengths: Sequence[int], phases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What `encode` takes, in float32 even under autocast."""
        with torch.autocast(waveform.device.type, enabled=False):
            return self.front_end(waveform, lengths, phases)

    def encode(
        self, log_amplitude: Tensor, angle: Tensor, frames: Sequence[int], history: History | None = None
    ) -> Encoded:
        """Features `[B, K, T]`, of which `frames[i]` of row i exist."""
        valid = valid_frames(frames, log_amplitude.device)
        amplitude, amplitude_states = self.amplitude(log_amplitude, valid, history)
        phase, phase_states = self.phase(angle, valid, history)
        valid = valid_frames([-(-count // self.ratio) for count in frames], phase.device)
        merged = existing(torch.cat([amplitude, phase], dim=1), valid)
        return Encoded(self.latent_conv(merged, history), amplitude_states, phase_states)


@dataclass
class Decoded:
    """What the decoder makes of latents.

    Attributes:
        log_amplitude, phase: `[B, K, T]`.
        real, imaginary: `[B, K, T]`, the two maps whose angle is the phase.
        amplitude_states, phase_states: as in `Encoded`.
    """

    log_amplitude: Tensor
    phase: Tensor
    real: Tensor
    imaginary: Tensor
    amplitude_states: list[Tensor]
    phase_states: list[Tensor]

    @property
    def spectrum(self) -> Tensor:
        """Complex `[B, K, T]`."""
        amplitude = self.log_amplitude.exp()
        return torch.complex(amplitude * self.phase.cos(), amplitude * self.phase.sin())


class ApCodecDecoder(nn.Module):
    def __init__(self, config: ApCodecConfig) -> None:
        super().__init__()
        self.hop, self.win_length, self.delay = config.stft_hop_length, config.win_length, config.delay
        self.ratio = config.downsampling_ratio
        channels = config.amplitude_size // 2 + config.phase_size // 2
        kernel, bins, causal = config.output_kernel_size, config.num_bins, config.causal
        self.latent_conv = Convolution(config.hidden_size, channels, config.latent_kernel_size, causal=causal)
        self.amplitude = SynthesisBranch(config, channels, config.amplitude_size)
        self.phase = SynthesisBranch(config, channels, config.phase_size)
        self.log_amplitude_conv = Convolution(config.amplitude_size, bins, kernel, causal=causal)
        self.real_conv = Convolution(config.phase_size, bins, kernel, causal=causal)
        self.imaginary_conv = Convolution(config.phase_size, bins, kernel, causal=causal)

    def forward(self, quantized: Tensor, frames: Sequence[int], history: History | None = None) -> Decoded:
        """Quantized latents `[B, D, F]`, of which `frames[i]` of row i exist."""
        valid = valid_frames(frames, quantized.device)
        z = existing(self.latent_conv(existing(quantized, valid), history), valid)
        valid = valid_frames([count * self.ratio for count in frames], quantized.device)
        amplitude, amplitude_states = self.amplitude(z, valid, history)
        phase, phase_states = self.phase(z, valid, history)
        real, imaginary = self.real_conv(phase, history).float(), self.imaginary_conv(phase, history).float()
        return Decoded(
            log_amplitude=self.log_amplitude_conv(amplitude, history).float(),
            phase=torch.atan2(imaginary, real),
            real=real,
            imaginary=imaginary,
            amplitude_states=amplitude_states,
            phase_states=phase_states,
        )

    def waveform(self, spectrum: Tensor, frames: Sequence[int]) -> Tensor:
        """`[B, K, T]` → `[B, N]`, as many samples as the longest clip's frames hold."""
        valid = valid_frames([count * self.ratio for count in frames], spectrum.device)
        centred = istft(spectrum.transpose(1, 2), self.hop, valid, self.win_length, center=True)
        return centred[:, self.delay :]
