"""Weight-normalised layers (Salimans & Kingma, arXiv 1602.07868), each kept as plain parameters.

torch's parametrization makes a module that cannot be pickled, hence not hashed by `datasets` nor sent to a worker
process; two parameters and one line of arithmetic do the same. Each slice `weight_v[i]` is divided by its norm and
multiplied by `weight_g[i]`: one slice an output channel, of a transposed convolution one an input channel, as torch
has it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class _WeightNorm(nn.Module):
    """Parameters: `weight_v` of a given shape, `weight_g` one number a slice, `bias`."""

    def __init__(self, shape: tuple[int, ...], out_channels: int, fan_in: int) -> None:
        super().__init__()
        self.fan_in = fan_in
        self.weight_v = nn.Parameter(torch.empty(shape))
        self.weight_g = nn.Parameter(torch.empty(shape[0], *[1] * (len(shape) - 1)))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch starts the plain layer, with the gain equal to the norm of each slice."""
        bound = 1 / math.sqrt(self.fan_in)
        init.uniform_(self.weight_v, -bound, bound)
        init.uniform_(self.bias, -bound, bound)
        init.copy_(self.weight_g, self._norm())

    def _norm(self) -> Tensor:
        return self.weight_v.norm(dim=tuple(range(1, self.weight_v.ndim)), keepdim=True)

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self._norm())


class WeightNormLinear(_WeightNorm):
    """`y = x W^T + b`. Parameters: `weight_g` `[out, 1]`, `weight_v` `[out, in]`, `bias` `[out]`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__((out_features, in_features), out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class WeightNormConv1d(_WeightNorm):
    """`conv1d` with zeros beyond both ends. Parameters: `weight_g` `[out, 1, 1]`, `weight_v` `[out, in, k]`, `bias`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
    ) -> None:
        super().__init__((out_channels, in_channels, kernel_size), out_channels, in_channels * kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, F]` → `[B, out, F']`."""
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class WeightNormConvTranspose1d(_WeightNorm):
    """`conv_transpose1d`. Parameters: `weight_g` `[in, 1, 1]`, `weight_v` `[in, out, k]`, `bias` `[out]`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        output_padding: int = 0,
    ) -> None:
        super().__init__((in_channels, out_channels, kernel_size), out_channels, out_channels * kernel_size)
        self.stride, self.padding, self.output_padding = stride, padding, output_padding

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in, F]` → `[B, out, (F - 1) * stride - 2 * padding + k + output_padding]`."""
        return F.conv_transpose1d(x, self.weight, self.bias, self.stride, self.padding, self.output_padding)
