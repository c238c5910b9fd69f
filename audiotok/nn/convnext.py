"""ConvNeXt blocks over time (Liu et al., arXiv 2201.03545, in one dimension as in Vocos, arXiv 2306.00814).

Shapes: B clips, F frames, C channels. The receptive field is finite: `(kernel_size - 1) / 2` frames a block on
each side, so that windows of a long clip give the codes of the whole clip.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv(nn.Conv1d):
    """One filter a channel over the frames of `[B, F, C]`, with zeros beyond both ends.

    `conv1d` copies the frames to `[B, C, F]` and the next layer copies them back. Read as an image one pixel high
    whose channels come last, they stay where they are: the same sums, 2 to 10 times as fast on a CPU.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        edge = (self.kernel_size[0] - 1) // 2
        image = input.transpose(1, 2)[:, :, None]
        out = F.conv2d(image, self.weight[:, :, None], self.bias, padding=(0, edge), groups=self.groups)
        return out[:, :, 0].transpose(1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two pointwise layers, per-channel scale, residual."""

    def __init__(self, hidden_size: int, ffn_mult: int, kernel_size: int, initial_scale: float) -> None:
        super().__init__()
        self.depthwise_conv = DepthwiseConv(hidden_size, kernel_size)
        self.layer_norm = nn.LayerNorm(hidden_size)
        self.up_proj = nn.Linear(hidden_size, ffn_mult * hidden_size)
        self.down_proj = nn.Linear(ffn_mult * hidden_size, hidden_size)
        self.initial_scale = initial_scale
        self.scale = nn.Parameter(torch.full((hidden_size,), initial_scale))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """`[B, F, C]` → the same; `valid` `[B, F]` marks frames that exist (None: all)."""
        masked = x if valid is None else x * valid[..., None]  # the convolution reads across a clip's end
        h = self.layer_norm(self.depthwise_conv(masked))
        h = self.down_proj(F.gelu(self.up_proj(h)))
        return x + self.scale * h


class ConvNextStack(nn.Module):
    """Blocks, then a LayerNorm; the same calls as `ConformerStack`."""

    def __init__(self, num_layers: int, hidden_size: int, ffn_mult: int, conv_kernel_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ConvNextBlock(hidden_size, ffn_mult, conv_kernel_size, 1 / num_layers) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """`[B, F, C]` → the output, and the list [input of each layer ..., output] for taps."""
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            x = layer(x, valid)
        x = self.layer_norm(x)
        return x, [*hidden_states, x]
