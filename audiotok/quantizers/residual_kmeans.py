"""Residual quantization with tables by k-means: the plain form, and what QINCo2 starts from.

Each step's table is fitted by k-means to what the earlier steps leave over. scikit-learn does the k-means.

Shapes: N vectors, D dimensions, M steps, K codes a step, B beams.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from audiotok.errors import LatentsError, MissingDependencyError, check_number
from audiotok.quantizers.beam_search import Beams, extend
from audiotok.quantizers.latents import check_vectors
from audiotok.quantizers.successive import SuccessiveQuantizer, TableSearch, TableStep

# Vectors from which the first centroids are drawn, per centroid: k-means++ over all of them takes longer than the
# iterations after it.
SEEDS_PER_CENTROID = 64
# Vectors whose beams are extended at once.
BLOCK = 1024


class ResidualQuantizer(SuccessiveQuantizer):
    """Residual quantizer: a reconstruction is a sum of table rows. See `SuccessiveQuantizer` for encode and decode.

    All K codes are tried at every step, so `num_candidates` is no option here. With one beam the codes are those of
    the greedy search of residual VQ.

    Args:
        dim: D. num_quantizers: M. codebook_size: K. beam_size: B in encoding, changed there at will.
    """

    def __init__(self, dim: int, num_quantizers: int, codebook_size: int = 256, beam_size: int = 1) -> None:
        for name, value in {"dim": dim, "num_quantizers": num_quantizers, "beam_size": beam_size}.items():
            check_number(name, value, least=1)
        check_number("codebook_size", codebook_size, least=2)
        super().__init__(dim, [TableStep(dim, codebook_size) for _ in range(num_quantizers)], None, beam_size)

    @torch.no_grad()
    def set_tables(self, tables: list[Tensor]) -> None:
        """Take over normalised tables, one `[K, D]` a step."""
        for step, table in zip(self.in_order, tables, strict=True):
            step.codebook.weight.copy_(table)


def fit_residual_quantizer(
    quantizer: ResidualQuantizer,
    x: Tensor,
    *,
    iterations: int = 10,
    training_beam_size: int = 1,
    max_vectors: int = 1_000_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ResidualQuantizer:
    """Fit normalisation and tables to vectors `[N, D]` in data units, and return the quantizer in eval mode.

    The arguments are those of `residual_kmeans`; tables fitted with `training_beam_size` above 1 suit an encoding
    with several beams better (as in Faiss's residual quantizer) and a greedy one worse.

    Raises:
        LatentsError: the vectors have a wrong dtype or shape, are not finite, all equal, or fewer than codes.
        MissingDependencyError: scikit-learn is not installed.
    """
    check_vectors(x, quantizer.dim)
    quantizer.set_normalization(*data_statistics(x))
    tables = residual_kmeans(
        quantizer.normalize(x),
        quantizer.num_quantizers,
        quantizer.codebook_size,
        iterations=iterations,
        beam_size=training_beam_size,
        max_vectors=max_vectors,
        seed=seed,
        progress=progress,
    )
    quantizer.set_tables(tables)
    return quantizer.eval()


def data_statistics(x: Tensor, max_vectors: int = 100_000) -> tuple[Tensor, Tensor]:
    """Mean `[D]`, and the standard deviation of all entries about their grand mean, of the first `max_vectors`."""
    first = x[:max_vectors].double()
    std = first.std(correction=0)
    if not float(std) > 0:
        raise LatentsError(f"All {len(first)} vectors are equal or not finite: there is nothing to fit.")
    return first.mean(dim=0).float(), std.float()


@torch.no_grad()
def residual_kmeans(
    x: Tensor,
    num_quantizers: int,
    codebook_size: int,
    *,
    iterations: int = 10,
    beam_size: int = 1,
    max_vectors: int = 1_000_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Tables `[K, D]`, each fitted to what the earlier ones leave over of vectors x `[N, D]`.

    Args:
        x: float32, about centred (normalised vectors).
        iterations: of Lloyd's algorithm a table.
        beam_size: reconstructions of each vector whose residuals the next table is fitted to.
        max_vectors: no more are used, the first ones of x.
        progress: called with the tables done and their number.

    Raises:
        LatentsError: there are fewer vectors than codes.
        MissingDependencyError: scikit-learn is not installed.
    """
    parts = x[:max_vectors].split(BLOCK)
    beams = [Beams.start(part) for part in parts]
    tables: list[Tensor] = []
    for number in range(num_quantizers):
        residual = torch.cat([(p[:, None] - b.xhat).flatten(0, 1) for p, b in zip(parts, beams, strict=True)])
        tables.append(kmeans_table(residual, codebook_size, iterations=iterations, seed=seed + number))
        step = TableSearch(tables[-1])
        beams = [extend(step, part, b, beam_size) for part, b in zip(parts, beams, strict=True)]
        if progress is not None:
            progress(number + 1, num_quantizers)
    return tables


def kmeans_table(
    x: Tensor, codebook_size: int, *, iterations: int = 10, seed: int = 0, start: Tensor | None = None
) -> Tensor:
    """Centroids `[K, D]` of vectors `[N, D]` by Lloyd's algorithm on the CPU, returned on x's device.

    Starts from `start` `[K, D]`, or from k-means++ on a share of the vectors. A cluster that loses all its vectors is
    moved to the vector farthest from its own centroid.
    """
    try:
        from sklearn.cluster import KMeans, kmeans_plusplus
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise MissingDependencyError(
            'k-means needs scikit-learn: install it with pip install "audiotok[train]".'
        ) from error
    if len(x) < codebook_size:
        raise LatentsError(f"{len(x)} vectors are too few to fit {codebook_size} codes: give at least as many.")
    vectors = x.detach().cpu().float().numpy()
    if start is None:
        rng = np.random.default_rng(seed)
        share = rng.permutation(len(vectors))[: SEEDS_PER_CENTROID * codebook_size]
        centroids, _ = kmeans_plusplus(vectors[share], codebook_size, random_state=seed)
    else:
        centroids = start.cpu().numpy()
    kmeans = KMeans(codebook_size, init=centroids, n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd")
    with warnings.catch_warnings():
        # Fewer different vectors than codes (silence) are legal: some codes are never used.
        warnings.simplefilter("ignore", ConvergenceWarning)
        kmeans.fit(vectors)
    return torch.from_numpy(kmeans.cluster_centers_).to(x.device, torch.float32)
