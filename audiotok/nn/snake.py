"""Snake activations and the layers of the Descript Audio Codec that are built on them.

Snake: Ziyin et al., arXiv 2006.08195; the residual unit: Kumar et al., arXiv 2306.06546.

Shapes: B clips, C channels, L positions. `valid` `[B, L]` bool marks the positions that exist, None where all do:
whatever these layers give is zero beyond a clip's end, where the clip alone would be padded with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from audiotok.nn.weight_norm import WeightNormConv1d


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
        return torch.addcmul(x, (self.alpha * x).sin().square(), (self.alpha + 1e-9).reciprocal())


class SnakeConv(nn.Module):
    """Snake, then a convolution; arguments as in `WeightNormConv1d`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.snake = Snake(in_channels)
        self.conv = WeightNormConv1d(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[B, in, L]` → `[B, out, L']`; `valid` marks positions of the output."""
        return zero_beyond(self.conv(self.snake(x)), valid)


class SnakeResidualUnit(nn.Module):
    """x plus: Snake, a dilated convolution over 7 positions, Snake, a convolution over 1."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = WeightNormConv1d(channels, channels, 7, padding=3 * dilation, dilation=dilation)
        self.snake2 = Snake(channels)
        self.conv2 = WeightNormConv1d(channels, channels, 1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[B, C, L]` → the same shape."""
        # Only the sum needs the mask: the second convolution looks at one position alone.
        return zero_beyond(x + self.conv2(self.snake2(self.conv1(self.snake1(x)))), valid)
