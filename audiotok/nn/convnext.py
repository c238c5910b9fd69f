"""ConvNeXt blocks over time (Liu et al., arXiv 2201.03545, in one dimension as in Vocos, arXiv 2306.00814).

Shapes: B clips, F frames, C channels. The receptive field is finite: `(kernel_size - 1) / 2` frames a block on
each side, so that windows of a long clip give the codes of the whole clip. Causal blocks look back
`kernel_size - 1` frames and never ahead; with a `History` they go on where the piece before them ended.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.errors import ConfigError
from audiotok.nn.history import History, extend_left


class DepthwiseConv(nn.Conv1d):
    """One filter a channel over the frames of `[B, F, C]`, with zeros beyond both ends (causal: before the start).

    `conv1d` copies the frames to `[B, C, F]` and the next layer copies them back. Read as an image one pixel high
    whose channels come last, they stay where they are: the same sums, 2 to 10 times as fast on a CPU.
    """

    def __init__(self, channels: int, kernel_size: int, causal: bool = False) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)
        self.causal = causal

    def forward(self, input: Tensor, history: History | None = None) -> Tensor:
        edge = (self.kernel_size[0] - 1) // 2
        if self.causal:
            input, edge = extend_left(input, self.kernel_size[0] - 1, history, self, dim=1), 0
        if history is not None:  # a piece of some frames, where calling a convolution costs more than its sums
            sums = (input.unfold(1, self.kernel_size[0], 1) * self.weight[:, 0]).sum(-1)
            return sums if self.bias is None else sums + self.bias
        image = input.transpose(1, 2)[:, :, None]
        out = F.conv2d(image, self.weight[:, :, None], self.bias, padding=(0, edge), groups=self.groups)
        return out[:, :, 0].transpose(1, 2)


class GlobalResponseNorm(nn.Module):
    """Channels compete over a whole clip (Woo et al., arXiv 2301.00808, with time in place of the picture).

    `z * S * gamma + beta + z`, S the l2 norm over time of each channel by the mean of these norms over channels.
    Every frame depends on the whole clip: the receptive field is not finite.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, z: Tensor, valid: Tensor | None) -> Tensor:
        present = z if valid is None else z * valid[..., None]
        norm = self._norm(present)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, z, self.gamma * response + 1)

    @staticmethod
    def _norm(z: Tensor) -> Tensor:
        """l2 norm over time, `[B, 1, C]`."""
        if z.requires_grad:  # its gradient is zero, not NaN, where a channel is silent
            return z.norm(dim=1, keepdim=True)
        return torch.linalg.vecdot(z, z, dim=1)[:, None].sqrt()  # across frames 5 times as fast on a CPU, as exact


class ConvNextBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two pointwise layers, per-channel scale, residual.

    Args:
        intermediate_size: channels between the two pointwise layers.
        initial_scale: what the per-channel scale starts with; None leaves the scale out.
        response_norm: `GlobalResponseNorm` between the two pointwise layers (ConvNeXt v2).
        eps: of the LayerNorm.
        causal: the convolution looks back only.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        kernel_size: int,
        initial_scale: float | None,
        response_norm: bool = False,
        eps: float = 1e-5,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if causal and response_norm:
            raise ConfigError(
                "response_norm=true is not legal in causal blocks: it pools over the whole clip, the future included. "
                "Take layer_scale=true."
            )
        self.depthwise_conv = DepthwiseConv(hidden_size, kernel_size, causal)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.response_norm = GlobalResponseNorm(intermediate_size) if response_norm else None
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        self.initial_scale = initial_scale
        self.scale = None if initial_scale is None else nn.Parameter(torch.full((hidden_size,), initial_scale))

    def reset_parameters(self) -> None:
        if self.scale is not None and self.initial_scale is not None:
            nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, x: Tensor, valid: Tensor | None, history: History | None = None) -> Tensor:
        """`[B, F, C]` → the same; `valid` `[B, F]` marks frames that exist (None: all)."""
        masked = x if valid is None else x * valid[..., None]  # the convolution reads across a clip's end
        h = F.gelu(self.up_proj(self.layer_norm(self.depthwise_conv(masked, history))))
        h = self.down_proj(h if self.response_norm is None else self.response_norm(h, valid))
        return x + (h if self.scale is None else self.scale * h)


class ConvNextStack(nn.Module):
    """Blocks, then a LayerNorm; the same calls as `ConformerStack`."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        intermediate_size: int,
        kernel_size: int,
        layer_scale: bool = True,
        response_norm: bool = False,
        eps: float = 1e-5,
        causal: bool = False,
    ) -> None:
        super().__init__()
        scale = 1 / num_layers if layer_scale else None
        self.layers = nn.ModuleList(
            ConvNextBlock(hidden_size, intermediate_size, kernel_size, scale, response_norm, eps, causal)
            for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, history: History | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """`[B, F, C]` → the output, and the list [input of each layer ..., output] for taps."""
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            x = layer(x, valid, history)
        x = self.layer_norm(x)
        return x, [*hidden_states, x]


class VocosBackbone(nn.Module):
    """Vocos' trunk (Siuzdak, arXiv 2306.00814): convolution, LayerNorm, `ConvNextStack`. LayerNorms have eps 1e-6.

    Args:
        in_channels: of what comes in; `hidden_size` channels come out.
        causal: every convolution looks back only.
        options: of `ConvNextStack`.
    """

    EPS, KERNEL = 1e-6, 7

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        kernel = self.KERNEL
        self.causal = causal
        self.embed = nn.Conv1d(in_channels, hidden_size, kernel, padding=0 if causal else kernel // 2)
        self.norm = nn.LayerNorm(hidden_size, eps=self.EPS)
        self.stack = ConvNextStack(
            num_layers, hidden_size, intermediate_size, kernel, eps=self.EPS, causal=causal, **options
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[B, in_channels, F]` → `[B, F, hidden_size]`; frames that do not exist are as zeros to all others."""
        return self.states(x, valid)[0]

    def states(
        self, x: Tensor, valid: Tensor | None = None, history: History | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The output, and the list [input of each block ..., output] for taps."""
        if valid is not None:
            x = x * valid[:, None]
        if self.causal:
            x = extend_left(x, self.KERNEL - 1, history, self)
        x = self.norm(self.embed(x).transpose(1, 2))
        return self.stack(x, valid, history)
