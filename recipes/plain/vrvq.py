"""The rival of the benchmark: VRVQ as a careful user runs the published code, without audiotok.

Careful: float32, `torch.no_grad`, and right: one clip after the other, since the published graph has no masks (padding
changes codes and depths near a clip's end); each clip is padded with silence to whole frames, so that nothing of it is
lost; depths are kept with the codes, which the published code leaves to its user, and codes decode by them. Plain:
eager layers in the published structure, weight norm in every call, the whole matrix of distances to a codebook that is
normalised in every call, all books on every frame.

Nothing is shared with the package's model but the weights, so equal codes also mean two implementations that agree.
Shapes: N samples, L positions, F frames, C channels, D latent channels, Q codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok import VrvqModel

DILATIONS = (1, 3, 9)


class PlainVrvq:
    """Codes of waveforms and back.

    Args:
        codec: gives configuration and weights, which are not copied.
        level: scales the importance of every frame; nothing where the rate is constant.
    """

    def __init__(self, codec: VrvqModel, level: float = 1.0) -> None:
        self.config = codec.config
        self.weights = codec.state_dict()
        self.level = level

    @torch.no_grad()
    def encode(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms `[N_i]`, one after the other → codes `[Q, F_i]` of each, -1 where a frame keeps fewer books."""
        return [self._encode(clip) for clip in clips]

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes `[Q, F_i]`, one after the other → waveforms, everything that the frames decode to."""
        return [self._decode(rows) for rows in codes]

    def _encode(self, clip: Tensor) -> Tensor:
        frames = -(-(len(clip) + self._shortfall) // self.config.hop_length)
        whole = F.pad(clip, (0, frames * self.config.hop_length - len(clip)))
        features = self._features(whole[None, None])
        latents = self._snake_conv("encoder.conv_out", features, padding=1)
        codes = self._quantize(latents[0].transpose(0, 1))
        order = torch.arange(len(codes), device=codes.device)[:, None]
        return codes.masked_fill(order >= self._depths(features), -1)

    def _decode(self, codes: Tensor) -> Tensor:
        kept = (codes >= 0).float()[..., None]
        rows = torch.stack([self._lookup(q, row.clamp(min=0)) for q, row in enumerate(codes)])
        quantized = (kept * rows).sum(dim=0)
        x = self._conv("decoder.conv_in", quantized.transpose(0, 1)[None], padding=3)
        for i, stride in enumerate(self.config.upsampling_ratios):
            x = self._upsampling(f"decoder.blocks.{i}", x, stride)
            x = self._units(f"decoder.blocks.{i}", x)
        return self._snake_conv("decoder.conv_out", x, padding=3).tanh()[0, 0]

    @property
    def _shortfall(self) -> int:
        """Samples that decoding returns fewer than whole frames: a stage of an odd stride loses one of its own."""
        missing = 0
        for stride in self.config.upsampling_ratios:
            missing = missing * stride + stride % 2
        return missing

    # Layers

    def _normed(self, name: str) -> Tensor:
        """A weight of which direction and gain are stored, `[slices, ...]`."""
        direction = self.weights[f"{name}.weight_v"]
        norm = direction.norm(dim=tuple(range(1, direction.ndim)), keepdim=True)
        return direction * (self.weights[f"{name}.weight_g"] / norm)

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
        return F.conv1d(x, self._normed(name), self.weights[f"{name}.bias"], stride, padding, dilation)

    def _snake(self, name: str, x: Tensor) -> Tensor:
        alpha = self.weights[f"{name}.alpha"]
        return x + (alpha + 1e-9).reciprocal() * (alpha * x).sin().square()

    def _snake_conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return self._conv(f"{name}.conv", self._snake(f"{name}.snake", x), stride, padding)

    def _units(self, block: str, x: Tensor) -> Tensor:
        """The residual units of a block, `[1, C, L]` → the same shape."""
        for j, dilation in enumerate(DILATIONS):
            name = f"{block}.units.{j}"
            h = self._conv(f"{name}.conv1", self._snake(f"{name}.snake1", x), 1, 3 * dilation, dilation)
            x = x + self._conv(f"{name}.conv2", self._snake(f"{name}.snake2", h))
        return x

    def _features(self, waveform: Tensor) -> Tensor:
        """`[1, 1, N]` of whole frames → `[1, C, F]`, what importance and latents are made of."""
        x = self._conv("encoder.conv_in", waveform, padding=3)
        for i, stride in enumerate(self.config.downsampling_ratios):
            x = self._units(f"encoder.blocks.{i}", x)
            x = self._snake_conv(f"encoder.blocks.{i}.down", x, stride, (stride + 1) // 2)
        return x

    def _upsampling(self, name: str, x: Tensor, stride: int) -> Tensor:
        weight, bias = self._normed(f"{name}.up"), self.weights[f"{name}.up.bias"]
        return F.conv_transpose1d(self._snake(f"{name}.snake", x), weight, bias, stride, (stride + 1) // 2)

    # Depth

    def _depths(self, features: Tensor) -> Tensor:
        """Books of each frame `[F]`."""
        config = self.config
        if not config.variable_depth:
            return torch.full(features.shape[2:], config.num_codes, device=features.device)
        for j in range(len(config.importance_channels) + 2):
            features = self._snake_conv(f"importance.stages.{j}", features, padding=1)
        scaled = features[0, 0].sigmoid() * self.level * config.num_codebooks
        return (scaled.floor() + 1).clamp(max=config.num_codebooks)

    # Codebooks

    def _projected(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._normed(name), self.weights[f"{name}.bias"])

    def _quantize(self, residual: Tensor) -> Tensor:
        """`[F, D]` → `[Q, F]`."""
        codes = []
        for q in range(self.config.num_codes):
            z = self._projected(f"quantizer.stages.{q}.in_proj", residual)
            book = self.weights[f"quantizer.stages.{q}.codebook.weight"]
            found, rows = F.normalize(z, dim=-1), F.normalize(book, dim=-1)
            distances = found.square().sum(1, keepdim=True) - 2 * found @ rows.t() + rows.square().sum(1)
            codes.append(distances.argmin(dim=1))
            taken = z + (book[codes[-1]] - z)  # as the straight-through step rounds it
            residual = residual - self._projected(f"quantizer.stages.{q}.out_proj", taken)
        return torch.stack(codes)

    def _lookup(self, q: int, codes: Tensor) -> Tensor:
        rows = F.embedding(codes, self.weights[f"quantizer.stages.{q}.codebook.weight"])
        return self._projected(f"quantizer.stages.{q}.out_proj", rows)
