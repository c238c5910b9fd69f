"""Beam search over successive code books: which codes bring a reconstruction nearest to a vector.

Every step offers candidate codewords for each partial reconstruction, the sums nearest to the vector are kept. What
a step offers is its own affair (`StepSearch`): a table's rows, or what a network makes of them.

Shapes: n vectors, F beams (R = n F of them together), A candidates a beam, D dimensions, K codes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Below this distance (normalised units) margins count as if it were this distance, as in a plain search.
MARGIN_FLOOR = 1e-6
# Matrix products of fewer rows take other CPU kernels, which round differently (measured: up to 15 rows). Rows are
# added up to this number, so that a vector's codes do not depend on how many others come with it.
MIN_ROWS = 16

Observer = Callable[[int, Tensor], None]
"""Told, before each step, its number and what is left to quantize, `[n, F, D]`."""


class Choice(NamedTuple):
    """Entries chosen from rows of distances.

    Attributes:
        index: `[R, k]` int64, nearest first, the first of equals first.
        margin: `[R]` float32, (smallest distance left out - largest chosen) / largest chosen; infinite where
            nothing was left out.
    """

    index: Tensor
    margin: Tensor


class StepSearch(Protocol):
    """One step as the search sees it."""

    def choose(self, residual: Tensor, keep: int) -> Choice:
        """Candidates `[R, A]` for residuals `[R, D]`, of which at most `keep` will survive."""
        ...

    def codewords(self, index: Tensor, xhat: Tensor) -> Tensor:
        """Candidates `[R, A]` given reconstructions `[R, D]` → new codewords `[R, A, D]`."""
        ...


@dataclass
class Beams:
    """Partial codes of n vectors, best first.

    Attributes:
        codes: `[n, F, m]` int64.
        xhat: `[n, F, D]`, their reconstructions.
        margins: `[n, m]`, at each step the relative gap between the last beam kept and the first rejected.
        choice_margins: `[n, m]`, the same for the candidates chosen before, the smallest over the beams.
    """

    codes: Tensor
    xhat: Tensor
    margins: Tensor
    choice_margins: Tensor

    @classmethod
    def start(cls, x: Tensor) -> Beams:
        """One beam a vector of x `[n, D]`: no codes, reconstruction 0."""
        empty = x.new_zeros(len(x), 0)
        codes = torch.zeros(len(x), 1, 0, dtype=torch.long, device=x.device)
        return cls(codes, torch.zeros_like(x)[:, None], empty, empty)


def squared_distances(x: Tensor, rows: Tensor, rows_energy: Tensor) -> Tensor:
    """`[R, D]` and `[K, D]` with its `[K]` squared lengths → `[R, K]`, by one matrix product."""
    padded = F.pad(x, (0, 0, 0, max(0, MIN_ROWS - len(x))))
    distances = torch.addmm(rows_energy, padded, rows.t(), alpha=-2.0)[: len(x)]
    return distances.add_(x.square().sum(dim=1, keepdim=True)).clamp_(min=0.0)


def smallest(distances: Tensor, count: int) -> Choice:
    """The `count` smallest of each row of distances `[R, K]`, float32 and not negative."""
    columns = distances.shape[1]
    count = min(count, columns)
    # Floats that are not negative sort as their bits do; with the column in the lower half there are no ties, and
    # the order is the same on every device.
    keys = distances.to(torch.float32).view(torch.int32).long()
    keys.bitwise_left_shift_(32).bitwise_or_(torch.arange(columns, device=distances.device))
    best = _sorted_smallest(keys, min(count + 1, columns))
    index, values = best & 0xFFFFFFFF, (best >> 32).int().view(torch.float32)
    if count == columns:
        return Choice(index, torch.full_like(values[:, 0], torch.inf))
    margin = (values[:, count] - values[:, count - 1]) / values[:, count - 1].clamp(min=MARGIN_FLOOR)
    return Choice(index[:, :count], margin)


def _sorted_smallest(keys: Tensor, count: int) -> Tensor:
    """The `count` smallest of each row, in order; NumPy's partition is 3 times as fast as topk on a CPU."""
    if keys.device.type == "cpu":
        return torch.from_numpy(np.sort(np.partition(keys.numpy(), count - 1, axis=1)[:, :count], axis=1))
    return keys.topk(count, largest=False).values


def extend(step: StepSearch, x: Tensor, beams: Beams, keep: int) -> Beams:
    """Beams one code longer: the `keep` nearest to x `[n, D]` (all, where there are fewer)."""
    n, num_beams, dim = beams.xhat.shape
    residual = (x[:, None] - beams.xhat).flatten(0, 1)
    index, choice_margin = step.choose(residual, keep)
    num_tried = num_beams * index.shape[1]
    before = beams.xhat.flatten(0, 1)
    reconstructions = step.codewords(index, before).add_(before[:, None]).view(n, num_tried, dim)
    distances = (reconstructions - x[:, None]).square_().sum(dim=-1)
    kept, margin = smallest(distances, keep)
    parents = kept // index.shape[1]
    new_codes = index.reshape(n, num_tried).gather(1, kept)[:, :, None]
    old_codes = beams.codes.gather(1, parents[:, :, None].expand(-1, -1, beams.codes.shape[2]))
    return Beams(
        codes=torch.cat([old_codes, new_codes], dim=2),
        xhat=reconstructions.gather(1, kept[:, :, None].expand(-1, -1, dim)),
        margins=torch.cat([beams.margins, margin[:, None]], dim=1),
        choice_margins=torch.cat([beams.choice_margins, choice_margin.view(n, num_beams).amin(dim=1)[:, None]], dim=1),
    )


def search(steps: Sequence[StepSearch], x: Tensor, beam_size: int, observe: Observer | None = None) -> Beams:
    """Codes of x `[n, D]` by all steps given; the last one keeps the best beam alone."""
    beams = Beams.start(x)
    for number, step in enumerate(steps):
        if observe is not None:
            observe(number, x[:, None] - beams.xhat)
        beams = extend(step, x, beams, keep=1 if number == len(steps) - 1 else beam_size)
    return beams
