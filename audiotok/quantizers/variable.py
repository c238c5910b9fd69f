"""Residual quantization whose depth varies from frame to frame, after an importance map.

Variable Bitrate Residual Vector Quantization (Chae et al., arXiv 2410.06016). A frame's scaled importance x says how
many of Q books it keeps: book k (from 0) where x >= k. So x in [0, 1) keeps one, [1, 2) two, and Q - 1 or more all.
The chain of residuals itself runs over all books: what is kept never changes the codes.

Shapes: B clips, Q books, T frames, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok.quantizers.vector import Quantized, Range, ResidualVectorQuantizer, StageOutput


def depths_of(scaled: Tensor, num_codebooks: int) -> Tensor:
    """Scaled importance `[..., T]`, not negative → books kept `[..., T]` int64: min(Q, floor(x) + 1)."""
    return scaled.floor().clamp(max=num_codebooks - 1).long() + 1


def depth_mask(depths: Tensor, num_codebooks: int) -> Tensor:
    """Books kept `[B, T]` → `[B, Q, T]` bool, True for those of each frame."""
    return torch.arange(num_codebooks, device=depths.device)[:, None] < depths[:, None]


def depth_margins(scaled: Tensor, num_codebooks: int) -> Tensor:
    """How far each frame is from another depth: min over k = 1 ... Q - 1 of |x - k| / k; infinite where Q = 1.

    Relative to the boundary, so that it says by what share the importance would have to change, at any level.
    """
    if num_codebooks == 1:
        return torch.full_like(scaled, math.inf)
    boundary = torch.stack([scaled.floor(), scaled.floor() + 1]).clamp(1, num_codebooks - 1)
    return ((scaled - boundary).abs() / boundary).amin(dim=0)


def smooth_mask(scaled: Tensor, num_codebooks: int, alpha: float) -> Tensor:
    """The mask `[B, Q, T]` that training differentiates, of x `[B, T]`: 1/2 where x = k, from 0 to 1 around it.

    1/2 + [ln cosh(a(u + 1/2)) - ln cosh(a(u - 1/2))] / 2a with u = x - k; the larger a (alpha), the nearer to a ramp
    of slope 1.
    """
    u = scaled[:, None] - torch.arange(num_codebooks, device=scaled.device)[:, None]
    return 0.5 + (_log_cosh(alpha * (u + 0.5)) - _log_cosh(alpha * (u - 0.5))) / (2 * alpha)


def _log_cosh(t: Tensor) -> Tensor:
    """ln cosh t without overflow."""
    return t.abs() + torch.log1p(torch.exp(-2 * t.abs())) - math.log(2)


def straight_through_mask(scaled: Tensor, num_codebooks: int, alpha: float) -> Tensor:
    """The hard mask `[B, Q, T]`, exactly 0.0 or 1.0, with the gradient of `smooth_mask`."""
    hard = depth_mask(depths_of(scaled, num_codebooks), num_codebooks)
    smooth = smooth_mask(scaled, num_codebooks, alpha)
    return hard + (smooth - smooth.detach())


class VariableResidualQuantizer(ResidualVectorQuantizer):
    """`ResidualVectorQuantizer` of which each frame keeps as many stages as its mask says."""

    def forward(
        self,
        latents: Tensor,
        ranges: Sequence[Range] | None = None,
        return_margins: bool = False,
        num_stages: int | None = None,
        *,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Quantized:
        """Quantize latents `[B, C, T]`, in float32 even under autocast.

        Args:
            ranges, return_margins, num_stages: as in `ResidualVectorQuantizer`.
            mask: `[B, Q, T]`, what is kept of each stage; gradients flow to it. None keeps all.
            valid: `[B, T]` bool, the frames that count in the losses; None for all.

        Returns:
            Codes and margins of all stages, whatever is kept of them. The losses are those of the stages kept, summed
            over stages, averaged over frames.
        """
        with torch.autocast(latents.device.type, enabled=False):
            residual = latents.transpose(1, 2).to(self.dtype)
            stages, total = self._run(residual, ranges, return_margins, num_stages, mask)
        margins = [stage.margins for stage in stages if stage.margins is not None]
        return Quantized(
            quantized=total.transpose(1, 2),
            codes=torch.stack([stage.codes for stage in stages], dim=1),
            margins=torch.stack(margins, dim=1) if margins else None,
            commitment=_mean_loss([stage.commitment for stage in stages], mask, valid),
            codebook=_mean_loss([stage.codebook for stage in stages], mask, valid),
        )

    def _run(
        self,
        residual: Tensor,
        ranges: Sequence[Range] | None,
        return_margins: bool,
        num_stages: int | None,
        mask: Tensor | None,
    ) -> tuple[list[StageOutput], Tensor]:
        """The stages of the chain that starts from `[B, T, C]`, and the sum of what is kept of them."""
        stages, total = [], torch.zeros_like(residual)
        for k, stage in enumerate(self.in_order[:num_stages]):
            stages.append(stage(residual, ranges, return_margins))
            output = stages[-1].output
            residual = residual - output
            total = total + (output if mask is None else mask[:, k, :, None].to(output.dtype) * output)
        return stages, total

    def project_in(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T]` → the directions that the first stage compares, unit vectors `[B, d, T]`."""
        return F.normalize(super().project_in(latents), dim=1, eps=1e-12)

    def decode(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes `[B, Q', T]` of the first Q' stages, of which `mask` `[B, Q', T]` are kept → `[B, C, T]`."""
        rows = [stage.lookup(codes[:, k]) for k, stage in enumerate(self.in_order[: codes.shape[1]])]
        if mask is not None:
            rows = [row * mask[:, k, :, None].to(row.dtype) for k, row in enumerate(rows)]
        return sum(rows[1:], start=rows[0]).transpose(1, 2)


def _mean_loss(maps: list[Tensor], mask: Tensor | None, valid: Tensor | None) -> Tensor:
    """Losses `[B, T]` of each stage → the mean over frames of their sum over the stages kept."""
    kept = torch.stack(maps, dim=1)
    if mask is not None:
        kept = kept * mask[:, : len(maps)].detach()
    total = kept.sum(dim=1)
    return total.mean() if valid is None else total[valid].mean()
