"""Factorised vector quantization: a low-dimensional projection, cosine search, raw row taken, projection back.

VQ-VAE (van den Oord et al., arXiv 1711.00937), factorised and l2-normalised search as in ViT-VQGAN
(Yu et al., arXiv 2110.04627) and DAC (Kumar et al., arXiv 2306.06546), nested code ranges by domain as in AUV
(Chen et al., arXiv 2509.21968).

Shapes: B clips, T frames, C channels, d code dimensions, K entries, Q stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.nn.weight_norm import WeightNormLinear

Range = tuple[int, int]
"""Half-open range of codes that a search may return."""

# Entries of the distance matrix held at once: on a CPU 2 MB, so that they are still in the cache when the smallest is
# looked for (3 to 6 times as fast as all at once); elsewhere 42 MB, whatever the length of the clip.
CPU_BLOCK, BLOCK = 1 << 19, 512 * 20480


@dataclass
class Quantized:
    """What a quantizer returns.

    Attributes:
        quantized: `[B, C, T]`, straight-through: gradients pass to the latents.
        codes: `[B, Q, T]` int64; None where noise stood for the search.
        margins: `[B, Q, T]` float32, only if asked for.
        commitment, codebook: scalars, mean((z - sg(E))^2) and mean((E - sg(z))^2), summed over stages.
    """

    quantized: Tensor
    codes: Tensor | None
    margins: Tensor | None
    commitment: Tensor
    codebook: Tensor


def nearest(
    z: Tensor, codebook: Tensor, return_margins: bool = False, cosine: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Index of the row nearest to each `z` `[M, d]` in `codebook` `[K, d]`, in float32.

    Distances are Euclidean, between vectors scaled to unit length if `cosine`. Ties go to the lowest index.
    Margins `[M]`: (second smallest squared distance - smallest) / max(smallest, 1e-6).
    """
    z, rows = z.float(), codebook.float()
    if cosine:
        z, rows = F.normalize(z, dim=-1, eps=1e-12), F.normalize(rows, dim=-1, eps=1e-12)
    rows_energy = rows.square().sum(-1)
    rows_transposed = rows.t().contiguous()
    codes, margins = [], []
    for block in z.split(max(2, (CPU_BLOCK if z.device.type == "cpu" else BLOCK) // len(rows))):
        # One frame alone would take another kernel (matrix times vector), which rounds differently; two do not.
        pair = block.expand(2, -1) if len(block) == 1 else block
        distance = torch.addmm(rows_energy, pair, rows_transposed, alpha=-2.0)[: len(block)]
        best = _argmin(distance)
        codes.append(best)
        if return_margins:
            energy = block.square().sum(-1)
            smallest = distance.gather(1, best[:, None])[:, 0] + energy
            distance.scatter_(1, best[:, None], torch.inf)
            runner_up = distance.amin(dim=1) + energy
            margins.append((runner_up - smallest) / smallest.clamp(min=1e-6))
    return torch.cat(codes), torch.cat(margins) if return_margins else None


def _argmin(distance: Tensor) -> Tensor:
    """Column of the smallest entry of each row, the first of equals; NumPy's is 5 times as fast on a CPU."""
    if distance.device.type == "cpu":
        return torch.from_numpy(distance.detach().numpy().argmin(axis=1))
    return distance.argmin(dim=1)


@dataclass
class StageOutput:
    """What one stage makes of a residual.

    Attributes:
        output: `[B, T, C]`, straight-through.
        codes: `[B, T]` int64. margins: `[B, T]` float32 or None.
        commitment, codebook: `[B, T]`, mean over dimensions of (z - sg(E))^2 and (E - sg(z))^2.
    """

    output: Tensor
    codes: Tensor
    margins: Tensor | None
    commitment: Tensor
    codebook: Tensor


class FactorizedVectorQuantizer(nn.Module):
    """One stage: project to d dimensions, search, take the raw row, project back.

    Args:
        dim: channels C outside. codebook_size: K. codebook_dim: d.
        project: whether there are projections; None for only where `codebook_dim` is not `dim`.
        cosine: search by direction alone.
        normalize_latents: z / |z| before the straight-through step; with rows of unit length the row taken is then
            the normalised one, and nothing but the direction of z matters.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        normalize_latents: bool = False,
        project: bool | None = None,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        self.normalize_latents, self.cosine = normalize_latents, cosine
        projected = codebook_dim != dim if project is None else project
        self.in_proj = WeightNormLinear(dim, codebook_dim) if projected else nn.Identity()
        self.out_proj = WeightNormLinear(codebook_dim, dim) if projected else nn.Identity()
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def project_in(self, x: Tensor) -> Tensor:
        """`[..., C]` → z `[..., d]` in float32."""
        z = self.in_proj(x.to(self.codebook.weight.dtype)).float()
        return F.normalize(z, dim=-1, eps=1e-12) if self.normalize_latents else z

    def search(self, z: Tensor, ranges: Sequence[Range] | None, return_margins: bool) -> tuple[Tensor, Tensor | None]:
        """Codes `[B, T]` of z `[B, T, d]`, each clip within its own range (None: the whole book)."""
        book = self.codebook.weight.detach()
        whole = (0, book.shape[0])
        per_clip = [whole] * z.shape[0] if ranges is None else [(a, min(b, whole[1])) for a, b in ranges]
        codes = torch.zeros(z.shape[:2], dtype=torch.long, device=z.device)
        margins = torch.zeros(z.shape[:2], device=z.device) if return_margins else None
        for start, end in sorted(set(per_clip)):
            # A search in the slice equals the search with the rest of the distances at infinity.
            clips = [i for i, clip_range in enumerate(per_clip) if clip_range == (start, end)]
            found, gap = nearest(z[clips].flatten(0, 1), book[start:end], return_margins, self.cosine)
            codes[clips] = found.view(len(clips), -1) + start
            if margins is not None and gap is not None:
                margins[clips] = gap.view(len(clips), -1)
        return codes, margins

    def forward(
        self, residual: Tensor, ranges: Sequence[Range] | None = None, return_margins: bool = False
    ) -> StageOutput:
        """Quantize `[B, T, C]`, each clip within its own range of codes."""
        z = self.project_in(residual)
        codes, margins = self.search(z.detach(), ranges, return_margins)
        rows = self.codebook(codes).to(z.dtype)
        commitment = (z - rows.detach()).square().mean(dim=-1)
        codebook = (rows - z.detach()).square().mean(dim=-1)
        output = self.out_proj((z + (rows - z).detach()).to(self.codebook.weight.dtype))
        return StageOutput(output, codes, margins, commitment, codebook)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `[...]` → `[..., C]`."""
        return self.out_proj(self.codebook(codes))


class ResidualVectorQuantizer(nn.Module):
    """Stages in a row, each quantizing what the earlier ones left over (in the C-dimensional space).

    Args:
        codebook_sizes: K of each stage.
        codebook_dim: d of all stages, or of each. The others, and `options`, as in `FactorizedVectorQuantizer`.
    """

    def __init__(
        self, dim: int, codebook_sizes: Sequence[int], codebook_dim: int | Sequence[int], **options: Any
    ) -> None:
        super().__init__()
        dims = [codebook_dim] * len(codebook_sizes) if isinstance(codebook_dim, int) else codebook_dim
        self.stages = nn.ModuleList(
            FactorizedVectorQuantizer(dim, size, width, **options)
            for size, width in zip(codebook_sizes, dims, strict=True)
        )

    @property
    def in_order(self) -> list[FactorizedVectorQuantizer]:
        """The stages, coarse to fine, with their type."""
        return [stage for stage in self.stages if isinstance(stage, FactorizedVectorQuantizer)]

    @property
    def dtype(self) -> torch.dtype:
        return self.in_order[0].codebook.weight.dtype

    def forward(
        self,
        latents: Tensor,
        ranges: Sequence[Range] | None = None,
        return_margins: bool = False,
        num_stages: int | None = None,
        *,
        valid: Tensor | None = None,
    ) -> Quantized:
        """Quantize latents `[B, C, T]` with the first `num_stages` stages (None: all).

        `ranges` holds one range of codes a clip; `valid` `[B, T]` bool marks the frames that count in the losses (None:
        all). Runs in float32 even under autocast: the nearest row must not depend on the precision of the rest.
        """
        found: list[StageOutput] = []
        with torch.autocast(latents.device.type, enabled=False):
            residual = latents.transpose(1, 2).to(self.dtype)
            total = torch.zeros_like(residual)
            for stage in self.in_order[:num_stages]:
                found.append(stage(residual, ranges, return_margins))
                residual, total = residual - found[-1].output, total + found[-1].output
        margins = [stage.margins for stage in found if stage.margins is not None]
        return Quantized(
            quantized=total.transpose(1, 2),
            codes=torch.stack([stage.codes for stage in found], dim=1),
            margins=torch.stack(margins, dim=1) if margins else None,
            commitment=torch.stack([_mean(stage.commitment, valid) for stage in found]).sum(),
            codebook=torch.stack([_mean(stage.codebook, valid) for stage in found]).sum(),
        )

    def project_in(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, T]` → what the first stage searches with, z `[B, d, T]`."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.in_order[0].project_in(latents.transpose(1, 2)).transpose(1, 2)

    def bypass(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """The first stage without a search: `[B, C, T]` → `[B, C, T]`, the ceiling of any code book.

        Args:
            noise: `[B]` standard deviations of Gaussian noise added to z, which is then renormalised.
        """
        with torch.autocast(latents.device.type, enabled=False):
            stage = self.in_order[0]
            z = stage.project_in(latents.transpose(1, 2))
            if noise is not None:
                z = F.normalize(z + torch.randn_like(z) * noise[:, None, None], dim=-1)
            return stage.out_proj(z.to(self.dtype)).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, Q, T]` (the first Q stages) → `[B, C, T]`."""
        rows = [self.in_order[q].lookup(codes[:, q]) for q in range(codes.shape[1])]
        return sum(rows[1:], start=rows[0]).transpose(1, 2)


def _mean(losses: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of `[B, T]` over the frames that count."""
    return losses.mean() if valid is None else losses[valid].mean()
