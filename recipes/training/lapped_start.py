"""A start for codecs of waveforms: the strided convolutions of encoder and decoder as lapped transforms.

A fresh codec of the kind of DAC spends its first hours on finding out what a cosine is. Here each of its strides s
begins as the modified discrete cosine transform of s bands (windows of 2 s samples that overlap by half, the sine
window; Princen, Johnson & Bradley 1987), applied to every channel that carries something, and all else begins near
zero: before the first step the decoder gives back what the latents have room for. Where a stride would need more
channels than there are, those that carry most energy stay.

The layers are those of the codec, and training moves all of them; this only sets where they begin.

Shapes: B clips, N samples, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.codecs.vrvq import VrvqModel
from audiotok.errors import ConfigError
from audiotok.nn.snake import Snake, SnakeResidualUnit
from audiotok.nn.weight_norm import WeightNormConv1d, WeightNormConvTranspose1d

ALPHA = 0.1  # of Snake, where 1 is usual: nearly linear for samples below 1
UNIT_GAIN = 0.1  # of the residual units' outputs, to their usual gain
REST_GAIN = 0.02  # norm of all other filters
# Latents are divided by their levels to this power. The books' errors, which fall on all alike, then follow the levels
# by as much: heard less than white ones, or than errors where the level is low. STOI of test speech at 10 kb/s, before
# the first step: 0.83 with 0.35, 0.81 with 0.5, 0.78 with 0.7 (books of 32 dimensions).
EVENING, MIN_LEVEL = 0.35, 1e-4
Channel = tuple[int, int]
"""(channel that comes in, band of the transform)."""


def check_lapped(codec: nn.Module) -> None:
    """Raise `ConfigError` unless `lapped_start` knows how to start this codec."""
    if not isinstance(codec, VrvqModel):
        raise ConfigError(f"codec.start=lapped is for vrvq, not for {type(codec).__name__}: choose random.")
    config = codec.config
    if list(config.upsampling_ratios) != list(reversed(config.downsampling_ratios)) or any(
        stride % 2 for stride in config.downsampling_ratios
    ):
        raise ConfigError(
            f"codec.start=lapped needs even strides, and upsampling_ratios={config.upsampling_ratios} to be "
            f"downsampling_ratios={config.downsampling_ratios} backwards."
        )
    if config.decoder_hidden_size < config.latent_channels:
        raise ConfigError(
            f"codec.start=lapped needs decoder_hidden_size={config.decoder_hidden_size} to be no less than the "
            f"{config.latent_channels} channels of the latents: the decoder begins by passing them on."
        )


def lapped_basis(bands: int) -> Tensor:
    """`[s, 2 s]`: an orthonormal lapped transform, band by band."""
    band, time = torch.arange(bands).double()[:, None], torch.arange(2 * bands).double()[None]
    window = torch.sin(math.pi / (2 * bands) * (time + 0.5))
    basis = window * math.sqrt(2 / bands) * torch.cos(math.pi / bands * (time + 0.5 + bands / 2) * (band + 0.5))
    return basis.float()


@torch.no_grad()
def lapped_start(codec: VrvqModel, audio: Tensor) -> None:
    """Set the weights of `codec`, in place; `audio` `[B, 1, N]` decides which channels are worth keeping."""
    encoder, decoder = codec.encoder, codec.decoder
    for module in codec.modules():
        if isinstance(module, Snake):
            module.alpha.fill_(ALPHA)
        elif isinstance(module, SnakeResidualUnit):
            module.conv2.weight_g.mul_(UNIT_GAIN)
            module.conv2.bias.zero_()
    _pass_on(encoder.conv_in, torch.ones(1))
    carried, width, transforms = encoder.conv_in(audio), 1, []
    for block in encoder.blocks:
        channels = _set_analysis(block.down.conv, carried, width, block.stride)
        carried, width = block.down.conv(carried), len(channels)
        transforms.append(channels)
    levels = carried[:, :width].square().mean(dim=(0, 2)).sqrt().clamp_min(MIN_LEVEL) ** EVENING
    _pass_on(encoder.conv_out.conv, 1 / levels)
    _pass_on(decoder.conv_in, levels)
    for block, channels in zip(decoder.blocks, reversed(transforms), strict=True):
        _set_synthesis(block.up, channels, block.stride)
    _pass_on(decoder.conv_out.conv, torch.ones(1))


def _set_analysis(conv: WeightNormConv1d, carried: Tensor, width: int, stride: int) -> list[Channel]:
    """Make a strided convolution transform the first `width` channels of what it gets, `[B, C, N]`; returns what its
    own channels are."""
    basis, weight = lapped_basis(stride), _rest(conv)
    bands = F.conv1d(carried[:, :width].flatten(0, 1)[:, None], basis[:, None], stride=stride, padding=conv.padding)
    energy = bands.unflatten(0, (len(carried), width)).square().mean(dim=(0, 3)).flatten()
    # In order of their energy: those that later strides would have no room for are the last.
    chosen = energy.argsort(descending=True)[: len(weight)].tolist()
    channels = [divmod(one, stride) for one in chosen]
    for out, (channel, band) in enumerate(channels):
        weight[out] = 0
        weight[out, channel] = basis[band]
    _set(conv, weight)
    return channels


def _set_synthesis(conv: WeightNormConvTranspose1d, channels: list[Channel], stride: int) -> None:
    """Make a transposed convolution undo the analysis that gave these channels."""
    basis, weight = lapped_basis(stride), _rest(conv)
    for place, (channel, band) in enumerate(channels):
        weight[place] = 0
        weight[place, channel] = basis[band]
    _set(conv, weight)


def _pass_on(conv: WeightNormConv1d, gains: Tensor) -> None:
    """Make a convolution give back its first channels, each with its gain."""
    weight = _rest(conv)
    for channel, gain in enumerate(gains.tolist()):
        weight[channel] = 0
        weight[channel, channel, weight.shape[2] // 2] = gain
    _set(conv, weight)


def _rest(conv: WeightNormConv1d | WeightNormConvTranspose1d) -> Tensor:
    """A weight of the fresh directions, each with a norm of `REST_GAIN`: what carries nothing yet can still learn."""
    return conv.weight_v * (REST_GAIN / conv.weight_v.flatten(1).norm(dim=1).view_as(conv.weight_g))


def _set(conv: WeightNormConv1d | WeightNormConvTranspose1d, weight: Tensor) -> None:
    conv.weight_v.copy_(weight)
    conv.weight_g.copy_(weight.flatten(1).norm(dim=1).view_as(conv.weight_g))
    conv.bias.zero_()
