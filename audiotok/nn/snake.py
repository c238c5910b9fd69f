"""Snake activations and the layers of the Descript Audio Codec that are built on them.

Snake: Ziyin et al., arXiv 2006.08195; the residual unit: Kumar et al., arXiv 2306.06546.

Shapes: B clips, C channels, L positions. `valid` `[B, L]` bool marks the positions that exist, None where all do:
whatever these layers give is zero beyond a clip's end, where the clip alone would be padded with zeros.

Layout. Convolutions along a waveform take 1.2 to 2.4 times as long on a CPU where a channel's positions are neighbours
in memory. So those here put out `[B, C, L]` with the channels of a position side by side, which all other layers keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from audiotok.nn.weight_norm import WeightNormConv1d, WeightNormConvTranspose1d

# Convolutions to more channels run over so few positions that laying out their weights costs more than it saves.
MAX_CHANNELS = 512
# Activations worked on at once on a CPU: 512 KB, so that they are still in the cache for the next step.
BLOCK = 1 << 17


def zero_beyond(x: Tensor, valid: Tensor | None) -> Tensor:
    """`[B, C, L]` with zeros where `valid` is False."""
    return x if valid is None else x.masked_fill(~valid[:, None], 0)


class Snake(nn.Module):
    """x + sin²(αx) / (α + 1e-9), with one α a channel that starts at 1; 0 stays 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def reset_parameters(self) -> None:
        init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        inverse = (self.alpha + 1e-9).reciprocal()
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != self.alpha.dtype:
            return torch.addcmul(x, (self.alpha * x).sin().square(), inverse)
        out, positions = torch.empty_like(x), max(1, BLOCK // (x.shape[0] * x.shape[1]))
        for block, result in zip(x.split(positions, dim=-1), out.split(positions, dim=-1), strict=True):
            torch.addcmul(block, (self.alpha * block).sin_().square_(), inverse, out=result)
        return out


class InterleavedConv1d(WeightNormConv1d):
    """`WeightNormConv1d` that lays out its result as the module says."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or len(self.bias) > MAX_CHANNELS:
            return super().forward(x)
        weight, padding = _interleaved(self.weight[:, :, None]), (0, self.padding)
        out = F.conv2d(x[:, :, None], weight, self.bias, (1, self.stride), padding, (1, self.dilation))
        return _interleaved(out)[:, :, 0]  # as it is already, but where one channel came in


class InterleavedConvTranspose1d(WeightNormConvTranspose1d):
    """`WeightNormConvTranspose1d` that lays out its result as the module says."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or len(self.bias) > MAX_CHANNELS:
            return super().forward(x)
        weight, stride = _interleaved(self.weight[:, :, None]), (1, self.stride)
        padding, extra = (0, self.padding), (0, self.output_padding)
        return F.conv_transpose2d(x[:, :, None], weight, self.bias, stride, padding, extra)[:, :, 0]


def _interleaved(x: Tensor) -> Tensor:
    """`[B, C, 1, L]` with channels that are neighbours in memory."""
    return x.contiguous(memory_format=torch.channels_last)


class SnakeConv(nn.Module):
    """Snake, then a convolution; arguments as in `InterleavedConv1d`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.snake = Snake(in_channels)
        self.conv = InterleavedConv1d(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[B, in, L]` → `[B, out, L']`; `valid` marks positions of the output."""
        return zero_beyond(self.conv(self.snake(x)), valid)


class SnakeResidualUnit(nn.Module):
    """x plus: Snake, a dilated convolution over 7 positions, Snake, a convolution over 1."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = InterleavedConv1d(channels, channels, 7, padding=3 * dilation, dilation=dilation)
        self.snake2 = Snake(channels)
        self.conv2 = InterleavedConv1d(channels, channels, 1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[B, C, L]` → the same shape."""
        # Only the sum needs the mask: the second convolution looks at one position alone.
        return zero_beyond(x + self.conv2(self.snake2(self.conv1(self.snake1(x)))), valid)
