"""The networks of VRVQ: encoder and decoder of the Descript Audio Codec, and the subnet that reads importance.

Shapes: B clips, N samples, C channels, F frames, D latent channels. Every clip of a batch is computed as it is alone:
all layers give zeros beyond the length that the clip has there, as the zero padding of the clip alone has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from audiotok.codecs.vrvq.configuration_vrvq import DILATIONS, VrvqConfig, downsampled, upsampled
from audiotok.nn.masks import valid_frames
from audiotok.nn.snake import (
    InterleavedConv1d,
    InterleavedConvTranspose1d,
    Snake,
    SnakeConv,
    SnakeResidualUnit,
    zero_beyond,
)


def residual_units(channels: int) -> nn.ModuleList:
    return nn.ModuleList(SnakeResidualUnit(channels, dilation) for dilation in DILATIONS)


class EncoderBlock(nn.Module):
    """Residual units, then Snake and a strided convolution that doubles the channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.units = residual_units(channels)
        self.down = SnakeConv(channels, 2 * channels, 2 * stride, stride, -(-stride // 2))

    def forward(self, x: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """`[B, C, L]` of these lengths → `[B, 2C, L']` and theirs."""
        valid = valid_frames(lengths, x.device)
        for unit in self.units:
            x = unit(x, valid)
        lengths = [downsampled(length, self.stride) for length in lengths]
        return self.down(x, valid_frames(lengths, x.device)), lengths


class VrvqEncoder(nn.Module):
    def __init__(self, config: VrvqConfig) -> None:
        super().__init__()
        self.conv_in = InterleavedConv1d(1, config.encoder_hidden_size, 7, padding=3)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.encoder_hidden_size << i, stride) for i, stride in enumerate(config.downsampling_ratios)
        )
        self.conv_out = SnakeConv(config.feature_channels, config.latent_channels, 3, padding=1)

    def forward(self, waveform: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """`[B, 1, N]` of these lengths → features `[B, F, C]`, latents `[B, F, D]` and the frames of each.

        Turned as hidden states are shown, and the features before they are used: so gradients pass what is shown.
        """
        x = self.conv_in(waveform.to(self.conv_in.bias.dtype))
        x = zero_beyond(x, valid_frames(lengths, x.device))
        for block in self.blocks:
            x, lengths = block(x, lengths)
        features = x.transpose(1, 2)
        latents = self.conv_out(features.transpose(1, 2), valid_frames(lengths, x.device))
        return features, latents.transpose(1, 2), lengths


class DecoderBlock(nn.Module):
    """Snake and a transposed convolution that halves the channels, then residual units."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.snake = Snake(channels)
        self.up = InterleavedConvTranspose1d(channels, channels // 2, 2 * stride, stride, -(-stride // 2))
        self.units = residual_units(channels // 2)

    def forward(self, x: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """`[B, C, L]` of these lengths → `[B, C / 2, L']` and theirs."""
        lengths = [upsampled(length, self.stride) for length in lengths]
        valid = valid_frames(lengths, x.device)
        x = zero_beyond(self.up(self.snake(x)), valid)
        for unit in self.units:
            x = unit(x, valid)
        return x, lengths


class VrvqDecoder(nn.Module):
    def __init__(self, config: VrvqConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.conv_in = InterleavedConv1d(config.latent_channels, width, 7, padding=3)
        self.blocks = nn.ModuleList(
            DecoderBlock(width >> i, stride) for i, stride in enumerate(config.upsampling_ratios)
        )
        self.conv_out = SnakeConv(width >> len(config.upsampling_ratios), 1, 7, padding=3)

    def forward(self, quantized: Tensor, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Quantized latents `[B, D, F]`, `frames[i]` of row i → waveforms `[B, 1, N]`, and the states `[B, F, C]`
        behind the first convolution."""
        valid = valid_frames(frames, quantized.device)
        x = states = zero_beyond(self.conv_in(zero_beyond(quantized, valid)), valid)
        lengths = list(frames)
        for block in self.blocks:
            x, lengths = block(x, lengths)
        return self.conv_out(x).tanh(), states.transpose(1, 2)


class ImportanceSubnet(nn.Module):
    """Features of a frame and its neighbours → its importance in (0, 1)."""

    def __init__(self, config: VrvqConfig) -> None:
        super().__init__()
        widths = [config.feature_channels, config.latent_channels, *config.importance_channels, 1]
        self.stages = nn.ModuleList(SnakeConv(a, b, 3, padding=1) for a, b in pairwise(widths))

    def forward(self, features: Tensor, frames: Sequence[int]) -> Tensor:
        """`[B, C, F]`, `frames[i]` of row i → `[B, F]` float32."""
        valid = valid_frames(frames, features.device)
        for stage in self.stages:
            features = stage(features, valid)
        return torch.sigmoid(features[:, 0].float())
