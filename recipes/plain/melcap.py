"""The rival of the benchmark: MelCap as a careful user runs the published code, without audiotok.

Careful: float32, eval mode, `torch.no_grad`, no CUDA needed; and right: the picture has no masks, so clips are
encoded and decoded one after the other, each zero-padded to whole columns that hold all of it. Plain: eager layers in
the published structure (Haar by strided slices, attention as two batched products with the whole matrix of weights,
pointwise layers and depthwise convolutions on transposed frames), the whole matrix of distances, and the library's
inverse STFT where the head is centred.

Nothing is shared with the package's model but configuration and weights, so equal codes also mean two implementations
that agree. Shapes: N samples, M mel bins, T mel frames, R rows and W columns of codes, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok import MelCapModel

BINS_A_ROW = FRAMES_A_COLUMN = 8


class PlainMelCap:
    """Codes of waveforms and back.

    Args:
        codec: gives configuration and weights, which are not copied.
    """

    def __init__(self, codec: MelCapModel) -> None:
        self.config = codec.config
        self.weights = codec.state_dict()
        self.device = codec.device
        self.act = {"silu": F.silu, "tanh": torch.tanh}[self.config.hidden_act]
        self.filters = self._mel_filters().to(self.device)

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms `[N_i]` → codes `[R, W_i]` of each."""
        return [self._nearest(self._latents(self._log_mel(self._whole(clip)))) for clip in clips]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes `[R, W_i]` → waveforms `[samples]`, all that the columns decode to."""
        return [self._vocode(self._mel(grid)) for grid in codes]

    def _whole(self, clip: Tensor) -> Tensor:
        """Zeros behind a clip, so that its columns hold all of it."""
        config = self.config
        hop, column = config.mel_hop_length, FRAMES_A_COLUMN * config.mel_hop_length
        tail = hop if config.head_padding == "center" else 0
        columns = math.ceil((len(clip) + tail) / column)
        length = columns * column - tail
        if config.front_end_padding == "none":
            length = columns * column + config.n_fft - hop
        shortest = 6 * hop + (config.n_fft if config.front_end_padding == "none" else 0)
        shortest = max(shortest, config.n_fft // 2 + 1)  # the reflection needs one sample more than it takes
        return F.pad(clip, (0, max(length, shortest) - len(clip)))

    # Front end

    def _mel_filters(self) -> Tensor:
        """HTK triangles of height 1, `[n_fft / 2 + 1, M]`."""
        config = self.config
        top = config.sampling_rate // 2
        highest = 2595 * math.log10(1 + top / 700)
        corners = 700 * (10 ** (torch.linspace(0, highest, config.num_mel_bins + 2) / 2595) - 1)
        slopes = corners[None] - torch.linspace(0, top, config.n_fft // 2 + 1)[:, None]
        widths = corners.diff()
        return torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp(min=0)

    def _log_mel(self, clip: Tensor) -> Tensor:
        """`[N]` → `[M, T]`."""
        n_fft, center = self.config.n_fft, self.config.front_end_padding == "center"
        window = torch.hann_window(n_fft, device=self.device)
        spectrum = torch.stft(
            clip, n_fft, self.config.mel_hop_length, window=window, center=center, return_complex=True
        )
        return torch.log(torch.clamp(self.filters.t() @ spectrum.abs(), min=1e-7))

    # The picture's autoencoder

    def _latents(self, log_mel: Tensor) -> Tensor:
        """`[M, T]` → `[d, R, W]`."""
        x = self._conv("encoder.conv_in", _haar((log_mel / 5)[None, None]), 1)
        levels = len(self.config.channel_multipliers)
        for i in range(levels):
            x = self._level(f"encoder.levels.{i}", i, self.config.num_res_blocks, x)
            if i < 2:
                x = self._conv(f"encoder.halvings.{i}", F.pad(x, (0, 1, 0, 1)), 0, stride=2)
        x = self._middle("encoder.middle", x)
        x = self._conv("encoder.conv_out", self.act(self._group_norm("encoder.norm_out", x)), 1)
        return self._conv("encoder.latent_proj", x, 0)[0]

    def _mel(self, codes: Tensor) -> Tensor:
        """`[R, W]` → log-mel `[M, 8 W]`."""
        rows = F.embedding(codes, self.weights["quantizer.stages.0.codebook.weight"])
        x = self._conv("decoder.latent_proj", rows.permute(2, 0, 1)[None], 0)
        x = self._middle("decoder.middle", self._conv("decoder.conv_in", x, 1))
        levels = len(self.config.channel_multipliers)
        for i in reversed(range(levels)):
            x = self._level(f"decoder.levels.{i}", i, self.config.num_res_blocks + 1, x)
            if i >= levels - 2:
                x = self._conv(f"decoder.doublings.{i}", F.interpolate(x, scale_factor=2.0), 1)
        x = self._conv("decoder.conv_out", self.act(self._group_norm("decoder.norm_out", x)), 1)
        return (5 * _unhaar(x)[0, 0]).clamp(min=-16.1181)

    def _level(self, name: str, i: int, blocks: int, x: Tensor) -> Tensor:
        for j in range(blocks):
            x = self._res_block(f"{name}.blocks.{j}", x)
            if i in self.config.attention_levels:
                x = self._attention(f"{name}.attentions.{j}", x)
        return x

    def _middle(self, name: str, x: Tensor) -> Tensor:
        x = self._attention(f"{name}.attention", self._res_block(f"{name}.block1", x))
        return self._res_block(f"{name}.block2", x)

    def _res_block(self, name: str, x: Tensor) -> Tensor:
        h = self._conv(f"{name}.conv1", self.act(self._group_norm(f"{name}.norm1", x)), 1)
        h = self._conv(f"{name}.conv2", self.act(self._group_norm(f"{name}.norm2", h)), 1)
        return (self._conv(f"{name}.shortcut", x, 0) if f"{name}.shortcut.weight" in self.weights else x) + h

    def _attention(self, name: str, x: Tensor) -> Tensor:
        h = self._group_norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", h, 0).flatten(2) for part in "qkv")
        weights = (torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5).softmax(dim=-1)
        out = torch.bmm(v, weights.transpose(1, 2)).view_as(x)
        return x + self._conv(f"{name}.proj_out", out, 0)

    def _conv(self, name: str, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride, padding)

    def _group_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.group_norm(x, self.config.num_norm_groups, weight, bias, eps=1e-6)

    def _nearest(self, latents: Tensor) -> Tensor:
        """`[d, R, W]` → `[R, W]`."""
        z, rows = latents.flatten(1).t(), self.weights["quantizer.stages.0.codebook.weight"]
        if self.config.normalize_latents:
            z, rows = F.normalize(z, dim=-1), F.normalize(rows, dim=-1)
        distances = z.square().sum(1, keepdim=True) + rows.square().sum(1) - 2 * z @ rows.t()
        return distances.argmin(dim=1).view(latents.shape[1:])

    # Vocoder

    def _vocode(self, log_mel: Tensor) -> Tensor:
        """`[M, T]` → `[samples]`."""
        name = "vocoder.backbone"
        x = F.conv1d(log_mel[None], *self._pair(f"{name}.embed"), padding=3)
        x = self._layer_norm(f"{name}.norm", x.transpose(1, 2))
        for i in range(self.config.vocoder_num_layers):
            x = self._convnext(f"{name}.stack.layers.{i}", x)
        x = self._linear("vocoder.head", self._layer_norm(f"{name}.stack.layer_norm", x))
        log_magnitude, phase = x.transpose(1, 2).chunk(2, dim=1)
        spectrum = log_magnitude.exp().clamp(max=100.0) * (phase.cos() + 1j * phase.sin())
        window = torch.hann_window(self.config.n_fft, device=self.device)
        if self.config.head_padding == "center":
            return torch.istft(spectrum, self.config.n_fft, self.config.mel_hop_length, window=window)[0]
        return self._istft_same(spectrum[0], window)

    def _convnext(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._pair(f"{name}.depthwise_conv")
        h = F.conv1d(x.transpose(1, 2), weight, bias, padding=3, groups=len(weight)).transpose(1, 2)
        h = F.gelu(self._linear(f"{name}.up_proj", self._layer_norm(f"{name}.layer_norm", h)))
        return x + self.weights[f"{name}.scale"] * self._linear(f"{name}.down_proj", h)

    def _istft_same(self, spectrum: Tensor, window: Tensor) -> Tensor:
        """`[n_fft / 2 + 1, T]` → `[T * hop]`."""
        n_fft, hop, frames = self.config.n_fft, self.config.mel_hop_length, spectrum.shape[1]
        total, cut = (frames - 1) * hop + n_fft, (n_fft - hop) // 2
        parts = torch.fft.irfft(spectrum, dim=0) * window[:, None], window.square()[:, None].expand(-1, frames)
        signal, envelope = (
            F.fold(part[None], (1, total), (1, n_fft), stride=(1, hop))[0, 0, 0, cut : total - cut] for part in parts
        )
        return signal / envelope

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self._pair(name))

    def _layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._pair(name), eps=1e-6)


def _haar(picture: Tensor) -> Tensor:
    """`[1, 1, M, T]` → `[1, 4, M / 2, ceil(T / 2)]`; an odd T is continued by its second-last frame."""
    if picture.shape[-1] % 2:
        picture = F.pad(picture, (0, 1), mode="reflect")
    a, b, c, d = (picture[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return torch.cat([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], dim=1) / 4


def _unhaar(bands: Tensor) -> Tensor:
    """`[1, 4, H, T]` → `[1, 1, 2 H, 2 T]`."""
    s0, s1, s2, s3 = bands.split(1, dim=1)
    out = bands.new_empty(1, 1, 2 * bands.shape[2], 2 * bands.shape[3])
    out[..., 0::2, 0::2], out[..., 0::2, 1::2] = s0 + s1 + s2 + s3, s0 + s1 - s2 - s3
    out[..., 1::2, 0::2], out[..., 1::2, 1::2] = s0 - s1 + s2 - s3, s0 - s1 - s2 + s3
    return out
