"""The picture's autoencoder: a two-dimensional convolutional encoder and decoder with attention.

Shapes: B pictures, C channels, H mel bins (row 0 the lowest), T mel frames, R rows and W columns of the grid. Group
norms and attention see the whole picture, so a picture must not be padded; and nothing here knows about time, so it
must not be cut either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from audiotok.codecs.melcap.configuration_melcap import NUM_HALVINGS, PATCH, MelCapConfig

NORM_EPS = 1e-6
# Of a patch (a b / c d): mean, difference along frequency, along time, along the diagonal. Its own inverse but for 4.
HAAR = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


def haar_patches(picture: Tensor) -> Tensor:
    """`[B, 1, H, T]` → `[B, 4, H / 2, ceil(T / 2)]`; an odd T is continued by its second-last frame."""
    if picture.shape[-1] % PATCH:
        picture = torch.cat([picture, picture[..., -2:-1]], dim=-1)
    return torch.einsum("oc,bchw->bohw", _haar(picture) / 4, F.pixel_unshuffle(picture, PATCH))


def haar_pictures(patches: Tensor) -> Tensor:
    """The inverse: `[B, 4, H, T]` → `[B, 1, 2 H, 2 T]`."""
    return F.pixel_shuffle(torch.einsum("oc,bchw->bohw", _haar(patches), patches), PATCH)


def _haar(like: Tensor) -> Tensor:
    return torch.tensor(HAAR, dtype=like.dtype, device=like.device)


class Convolution(nn.Conv2d):
    """3 x 3, with zeros around the picture."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)


class ResidualBlock(nn.Module):
    """Twice group norm, activation and convolution, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, config: MelCapConfig) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.norm1 = nn.GroupNorm(config.num_norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = Convolution(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(config.num_norm_groups, out_channels, eps=NORM_EPS)
        self.conv2 = Convolution(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.activation(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.activation(self.norm2(h)))


class PictureAttention(nn.Module):
    """One head over all places of the picture, without positions; residual."""

    def __init__(self, channels: int, config: MelCapConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.num_norm_groups, channels, eps=NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, 1, H * W, C], contiguous: only such rows are attended to in blocks. Otherwise the matrix of all pairs of
        # places is held, gigabytes for a minute.
        q, k, v = (layer(h).flatten(2).mT.contiguous()[:, None] for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(attended.mT.unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """Residual blocks of one size of picture, each followed by attention where the level attends."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attends: bool, config: MelCapConfig
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, config) for i in range(num_blocks)
        )
        self.attentions = nn.ModuleList(
            PictureAttention(out_channels, config) if attends else nn.Identity() for _ in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return x


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, channels: int, config: MelCapConfig) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels, config)
        self.attention = PictureAttention(channels, config)
        self.block2 = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


class Halving(nn.Conv2d):
    """Height and width to floor(n / 2): one row and one column of zeros at the bottom and on the right, stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Doubling(Convolution):
    """Every value twice in both directions, then a convolution.

    Of large pictures the one of doubled values is not made: of the nine that the convolution would see, equal ones are
    one, times the sum of their weights. Four are left, other ones for even and odd rows and columns of the output; so
    are four of nine products.
    """

    # Places from which on that saves more than the sums of weights take.
    LARGE = 256

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2] * input.shape[-1] < self.LARGE:
            return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))
        quarters = [
            F.conv2d(F.pad(input, (1 - right, right, 1 - below, below)), kernel, self.bias)
            for below, rows in enumerate(_even_and_odd(self.weight, 2))
            for right, kernel in enumerate(_even_and_odd(rows, 3))
        ]
        return F.pixel_shuffle(torch.stack(quarters, dim=2).flatten(1, 2), 2)


def _even_and_odd(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along `dim` → the two of even outputs (value before, own value), and of odd ones (own, after)."""
    before, own, after = kernel.unbind(dim)
    return torch.stack([before, own + after], dim), torch.stack([before + own, after], dim)


class PictureEncoder(nn.Module):
    """`[B, 1, H, T]` → what it ends in `[B, C, R, W]`, and latents `[B, d, R, W]`; W = floor((T + 1) / 8)."""

    def __init__(self, config: MelCapConfig) -> None:
        super().__init__()
        widths = config.level_channels
        self.activation = ACT2FN[config.hidden_act]
        self.conv_in = Convolution(PATCH**2, config.base_channels)
        self.levels = nn.ModuleList(
            Level(before, width, config.num_res_blocks, i in config.attention_levels, config)
            for i, (before, width) in enumerate(zip([config.base_channels, *widths], widths, strict=False))
        )
        self.halvings = nn.ModuleList(
            Halving(width) if i < NUM_HALVINGS else nn.Identity() for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.num_norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = Convolution(widths[-1], config.bottleneck_channels)
        self.latent_proj = nn.Conv2d(config.bottleneck_channels, config.codebook_dim, 1)

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv_in(haar_patches(picture))
        for level, halving in zip(self.levels, self.halvings, strict=True):
            x = halving(level(x))
        x = self.conv_out(self.activation(self.norm_out(self.middle(x))))
        return x, self.latent_proj(x)


class PictureDecoder(nn.Module):
    """Latents `[B, d, R, W]` → `[B, 1, 8 R, 8 W]`; levels are numbered as the encoder's and run backwards."""

    def __init__(self, config: MelCapConfig) -> None:
        super().__init__()
        widths = config.level_channels
        self.activation = ACT2FN[config.hidden_act]
        self.latent_proj = nn.Conv2d(config.codebook_dim, config.bottleneck_channels, 1)
        self.conv_in = Convolution(config.bottleneck_channels, widths[-1])
        self.middle = Middle(widths[-1], config)
        self.levels = nn.ModuleList(
            Level(before, width, config.num_res_blocks + 1, i in config.attention_levels, config)
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        # Those of the last levels, which need not be the levels that were halved.
        self.doublings = nn.ModuleList(
            Doubling(width) if i >= len(widths) - NUM_HALVINGS else nn.Identity() for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(config.num_norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = Convolution(widths[0], PATCH**2)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(self.latent_proj(latents)))
        for level, doubling in zip(reversed(self.levels), reversed(self.doublings), strict=True):
            x = doubling(level(x))
        return haar_pictures(self.conv_out(self.activation(self.norm_out(x))))
