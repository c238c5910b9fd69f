"""Conformer: feed-forward, attention, convolution, feed-forward (Gulati et al., arXiv 2005.08100), macaron style.

Shapes: B clips, F frames, C channels, H heads, d channels a head. `valid` `[B, F]` bool marks the frames that
exist, None where all do; with it, a clip in a padded batch is computed as it is alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_table(num_frames: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin `[F, d]` of the angles position * 10000^(-2i/d), the d/2 angles written twice (two halves)."""
    inverse_frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.arange(num_frames, device=device).float()[:, None] * inverse_frequency
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of `[B, H, F, d]`, by halves."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, ffn_mult: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, hidden_size * ffn_mult)
        self.down_proj = nn.Linear(hidden_size * ffn_mult, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class HeadNorm(nn.Module):
    """l2 normalisation of each head's vectors, times a learned gain."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_heads, 1, head_dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-12) * self.gamma


class Attention(nn.Module):
    """Full softmax attention with rotary positions; optionally with normalised queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, qk_norm_scale: float | None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = qk_norm_scale  # None: 1 / sqrt(head_dim)
        self.to_qkv = nn.Linear(hidden_size, 3 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, hidden_size)
        if qk_norm_scale is not None:
            self.q_norm = HeadNorm(num_heads, head_dim)
            self.k_norm = HeadNorm(num_heads, head_dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], valid: Tensor | None) -> Tensor:
        batch, num_frames, _ = x.shape
        qkv = self.to_qkv(x).view(batch, num_frames, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.scale is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype)
        # Keys only: a query row without any key would be NaN in some kernels.
        mask = None if valid is None else valid[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.to_out(out.transpose(1, 2).reshape(batch, num_frames, -1))


class ConvModule(nn.Module):
    """Gated pointwise convolution, depthwise convolution over time, batch norm, pointwise convolution."""

    def __init__(self, hidden_size: int, kernel_size: int, causal: bool) -> None:
        super().__init__()
        self.padding = (kernel_size - 1, 0) if causal else ((kernel_size - 1) // 2,) * 2
        self.layer_norm = nn.LayerNorm(hidden_size)
        self.pointwise_conv1 = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.depthwise_conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=False)
        self.conv_norm = nn.BatchNorm1d(hidden_size)
        self.pointwise_conv2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = F.glu(self.pointwise_conv1(self.layer_norm(x)), dim=-1)
        if valid is not None:
            x = x * valid[..., None]  # the depthwise convolution reads across a clip's end
        x = self.depthwise_conv(F.pad(x.transpose(1, 2), self.padding))
        x = F.gelu(self.conv_norm(x), approximate="tanh")
        return self.pointwise_conv2(x.transpose(1, 2))


class ConformerLayer(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        ffn_mult: int,
        num_heads: int,
        head_dim: int,
        qk_norm_scale: float | None,
        conv_kernel_size: int,
        causal_conv: bool,
    ) -> None:
        super().__init__()
        self.ffn1_layer_norm = nn.LayerNorm(hidden_size)
        self.ffn1 = FeedForward(hidden_size, ffn_mult)
        self.attn_layer_norm = nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, head_dim, qk_norm_scale)
        self.conv_module = ConvModule(hidden_size, conv_kernel_size, causal_conv)
        self.ffn2_layer_norm = nn.LayerNorm(hidden_size)
        self.ffn2 = FeedForward(hidden_size, ffn_mult)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], valid: Tensor | None) -> Tensor:
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        x = x + self.attn(self.attn_layer_norm(x), rotary, valid)
        x = x + self.conv_module(x, valid)
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        return self.final_layer_norm(x)


class ConformerStack(nn.Module):
    """Layers, then one more LayerNorm (the last layer's output is normalised twice)."""

    def __init__(self, num_layers: int, hidden_size: int, head_dim: int, **layer_options: Any) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.layers = nn.ModuleList(
            ConformerLayer(hidden_size=hidden_size, head_dim=head_dim, **layer_options) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """`[B, F, C]` → the output, and the list [input of each layer ..., output] for taps."""
        rotary = rotary_table(x.shape[1], self.head_dim, x.device)
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            x = layer(x, rotary, valid)
        x = self.layer_norm(x)
        return x, [*hidden_states, x]
