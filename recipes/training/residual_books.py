"""The books of a factorised residual quantizer, fitted to latents before gradients move them.

A fresh quantizer sends back noise, and an encoder that gradients pull through noise learns little. So each stage in
turn is given the leading principal axes of what the stages before left over, as its projections, and spherical
k-means in them, as its book.

Shapes: M latents, C channels, d code dimensions, K entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.errors import ConfigError
from audiotok.nn.weight_norm import WeightNormLinear
from audiotok.quantizers.vector import FactorizedVectorQuantizer, ResidualVectorQuantizer
from audiotok.recipes.training.codebook import nearest_rows, spherical_kmeans


def check_fittable(quantizer: nn.Module) -> None:
    """Raise `ConfigError` where the books are not of the kind that `fit_residual_books` fits."""
    fits = isinstance(quantizer, ResidualVectorQuantizer) and all(
        stage.cosine and not stage.normalize_latents for stage in quantizer.in_order
    )
    if not fits:
        raise ConfigError(
            f"fit_codebook=true does not fit this {type(quantizer).__name__}: with codebook.update=gradient it starts "
            "residual quantizers that search by direction and do not normalise latents; leave it out, or take "
            "codebook.update=ema."
        )


@torch.no_grad()
def fit_residual_books(quantizer: ResidualVectorQuantizer, latents: Tensor, iterations: int, seed: int) -> list[float]:
    """Fit all stages to `latents` `[M, C]`, in place.

    Returns:
        Share of the latents' energy that is left behind each stage.
    """
    generator = torch.Generator().manual_seed(seed)
    residual, energy, left = latents.float(), latents.float().square().sum(), []
    for stage in quantizer.in_order:
        _fit_stage(stage, residual, iterations, generator)
        residual = residual - stage(residual[None]).output[0]
        left.append(float(residual.square().sum() / energy))
    return left


def _fit_stage(stage: FactorizedVectorQuantizer, residual: Tensor, iterations: int, generator: torch.Generator) -> None:
    rows = stage.codebook.weight
    if isinstance(stage.in_proj, WeightNormLinear) and isinstance(stage.out_proj, WeightNormLinear):
        _fit_projections(stage.in_proj, stage.out_proj, residual)
    z = stage.project_in(residual)
    directions = spherical_kmeans(F.normalize(z, dim=1), len(rows), iterations, generator)
    index, _ = nearest_rows(F.normalize(z, dim=1), directions)
    rows.copy_(_mean_of_each(index, z, directions))


def _fit_projections(in_proj: WeightNormLinear, out_proj: WeightNormLinear, residual: Tensor) -> None:
    """All dimensions but one: the leading axes. The last holds a constant of the length that residuals usually have
    there, and gives nothing back: a search by direction is then one for the length as well."""
    width = in_proj.weight_v.shape[0] - 1
    # Eigenvectors of the second moments, the largest last; not of the covariance: no bias would carry a mean.
    axes = torch.linalg.eigh(residual.T @ residual)[1][:, -width:].flip(1)
    usual = (residual @ axes).norm(dim=1).median()
    _set(in_proj, F.pad(axes.T, (0, 0, 0, 1)))
    _set(out_proj, F.pad(axes, (0, 1)))
    in_proj.bias[-1] = usual


def _mean_of_each(index: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """Means `[K, d]` of the values `[M, d]` of each index; of those that none has, the row of `otherwise` with the
    length that values have."""
    sums = torch.zeros_like(otherwise).index_add_(0, index, values)
    counts = torch.bincount(index, minlength=len(otherwise))[:, None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), otherwise * values.norm(dim=1).mean())


def _set(layer: WeightNormLinear, weight: Tensor) -> None:
    """A row of zeros keeps its direction, with a gain of zero, from which it can still learn."""
    lengths = weight.norm(dim=1, keepdim=True)
    layer.weight_v.copy_(torch.where(lengths > 0, weight, layer.weight_v))
    layer.weight_g.copy_(lengths)
    layer.bias.zero_()
