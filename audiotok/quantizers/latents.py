"""Vectors and latents on their way to a quantizer: what is refused, and noise in the place of codes.

Shapes: N vectors, B clips, D dimensions, F frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from audiotok.errors import LatentsError


def check_vectors(x: object, dim: int) -> None:
    """Raise `LatentsError` unless `x` is a float tensor `[N, dim]`, all of it finite; N may be 0."""
    _check("x", x, "vectors", dim)


def check_latents(latents: object, dim: int) -> None:
    """Raise `LatentsError` unless `latents` is a float tensor `[B, dim, F]`, all of it finite, of a frame at least."""
    values = _check("latents", latents, "clips", dim, "frames")
    if not values.numel():
        raise LatentsError(f"latents has the shape {list(values.shape)}: give at least one clip of one frame.")


def _check(name: str, value: object, *axes: str | int) -> Tensor:
    """The value; `axes` are its numbers of entries, or the names of those that are free."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not _has_shape(value, axes):
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LatentsError(f"{name} is {found}: it must be a float tensor [{', '.join(map(str, axes))}].")
    if not bool(torch.isfinite(value).all()):
        raise LatentsError(f"{name} holds NaN or infinity: every number must be finite.")
    return value


def _has_shape(value: Tensor, axes: tuple[str | int, ...]) -> bool:
    free_or_equal = (isinstance(axis, str) or axis == size for axis, size in zip(axes, value.shape, strict=False))
    return value.ndim == len(axes) and all(free_or_equal)


def with_noise(latents: Tensor, shares: Tensor) -> Tensor:
    """Latents `[B, D, T]` with Gaussian noise in the place of a quantizer, of `shares` `[B]` of each clip's own root
    mean square."""
    scale = latents.detach().square().mean(dim=(1, 2), keepdim=True).sqrt()
    return latents + shares[:, None, None] * scale * torch.randn_like(latents)
