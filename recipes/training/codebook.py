"""The book of a nested vector quantizer: spherical k-means to start it, moving averages to train it.

Rows and latents have unit length. The code ranges of the domains nest (speech inside vocal inside the whole
book), so rows are fitted from the narrowest range outwards, and a dead row is revived with a latent of the
narrowest domain that may use it.

Shapes: K rows, M latents, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[int, int]
SEARCH_BLOCK = 128  # latents compared at once: 128 x 20,480 similarities stay in the cache, twice as fast as 2048


def nearest_rows(latents: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(`[M]` index, `[M]` cosine) of the most similar of the unit `rows` `[K, D]` for unit `latents` `[M, D]`."""
    indices, similarities = [], []
    for block in latents.split(SEARCH_BLOCK):
        similarity, index = (block @ rows.T).max(dim=1)
        indices.append(index)
        similarities.append(similarity)
    return torch.cat(indices), torch.cat(similarities)


def spherical_kmeans(
    latents: Tensor, num_rows: int, iterations: int, generator: torch.Generator, fixed: Tensor | None = None
) -> Tensor:
    """Fit unit rows to unit latents by cosine; `fixed` rows take part in the search and never move.

    Args:
        latents: `[M, D]`, unit length.
        num_rows: rows to fit, besides the fixed ones. With fewer latents than rows the latents repeat with a
            little noise.
        fixed: `[F, D]` or None.

    Returns:
        `[num_rows, D]`, unit length.
    """
    fixed = latents.new_empty(0, latents.shape[1]) if fixed is None else fixed
    rows = _distant_latents(latents, num_rows, generator, fixed)
    for _ in range(iterations):
        index, similarity = nearest_rows(latents, torch.cat([fixed, rows]))
        sums = torch.zeros(len(fixed) + num_rows, latents.shape[1]).index_add_(0, index, latents)[len(fixed) :]
        hit = sums.norm(dim=1) > 1e-6
        rows = torch.where(hit[:, None], F.normalize(sums, dim=1), rows)
        empty = (~hit).nonzero().flatten()
        worst = similarity.argsort()[: len(empty)]  # the worst represented latents become the empty rows
        rows[empty[: len(worst)]] = latents[worst]
    return rows


def _distant_latents(latents: Tensor, count: int, generator: torch.Generator, fixed: Tensor) -> Tensor:
    """Starting rows: latents drawn at random, those that the fixed rows represent badly more often."""
    weight = torch.ones(len(latents))
    if len(fixed):
        weight = (1 - nearest_rows(latents, fixed)[1]).clamp_min(1e-6)
    # Exponential race = weighted draw without replacement (torch.multinomial stops at 2^24 categories).
    race = torch.empty(len(latents)).exponential_(generator=generator) / weight
    chosen = latents[race.argsort()[:count]]
    repeats = -(-count // len(chosen))
    noise = torch.randn(repeats * len(chosen), latents.shape[1], generator=generator) * 0.01
    noise[: len(chosen)] = 0
    return F.normalize(chosen.repeat(repeats, 1) + noise, dim=1)[:count]


def fit_nested_book(
    latents: dict[str, Tensor], ranges: dict[str, Range], num_rows: int, iterations: int, seed: int
) -> Tensor:
    """`[K, D]` unit rows: each code range is fitted on the latents of the domains that may use it, narrowest first.

    Rows of a range that an inner one has already fitted stay as they are. Rows that no present domain can use
    get directions of the latents at large.

    Args:
        latents: domain -> `[M, D]` unit latents; a domain without latents may be absent.
        ranges: domain -> half-open row range.
    """
    generator = torch.Generator().manual_seed(seed)
    everything = torch.cat(list(latents.values()))
    book = everything.new_zeros(num_rows, everything.shape[1])
    done = torch.zeros(num_rows, dtype=torch.bool)
    for start, stop in sorted({ranges[name] for name in latents}, key=lambda r: r[1] - r[0]):
        inside = torch.zeros(num_rows, dtype=torch.bool)
        inside[start:stop] = True
        todo, fixed = inside & ~done, book[inside & done]
        users = torch.cat([latents[name] for name in latents if ranges[name] == (start, stop)])
        if todo.any():
            book[todo] = spherical_kmeans(users, int(todo.sum()), iterations, generator, fixed)
        done |= inside
    if not done.all():
        book[~done] = _distant_latents(everything, int((~done).sum()), generator, everything[:0])
    return book


class MovingAverageBook:
    """Keeps the rows of a book at the normalised moving sums of the latents that chose them, and revives rows.

    Works on `weight` in place, outside autograd. In a run of several processes `reduce` adds up tensors over
    all of them and `gather` joins them, so that every process holds the same book.
    """

    def __init__(
        self,
        weight: Tensor,
        ranges: dict[str, Range],
        decay: float = 0.99,
        revive_after: int = 800,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.weight, self.ranges = weight, ranges
        self.decay, self.revive_after = decay, revive_after
        self.reduce, self.gather = reduce, gather
        self.num_updates = 0
        self.num_revived = 0
        self.restart(weight.detach())

    @torch.no_grad()
    def restart(self, rows: Tensor) -> None:
        """Take new rows `[K, D]` and forget all statistics."""
        self.weight.copy_(F.normalize(rows.to(self.weight), dim=1))
        self.sums = self.weight.detach().clone()
        self.unseen = torch.zeros(len(rows), dtype=torch.long, device=self.weight.device)

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor, domains: list[str], revive: bool = True) -> None:
        """One step.

        Args:
            latents: `[B, D, T]` unit latents.
            codes: `[B, T]` the rows they chose.
            domains: of each clip.
        """
        flat = latents.transpose(1, 2).reshape(-1, latents.shape[1]).to(self.sums)
        batch = self._batch_sums(flat, codes.flatten())
        seen = batch[:, -1] > 0
        self.sums.mul_(self.decay).add_(batch[:, :-1], alpha=1 - self.decay)
        # Rows without a hit keep their direction exactly; scaling their sums alone would not change it anyway.
        self.weight[seen] = F.normalize(self.sums[seen], dim=1)
        self.unseen = torch.where(seen, 0, self.unseen + 1)
        self.num_updates += 1
        if revive and self.revive_after and bool((self.unseen > self.revive_after).any()):
            self._revive(latents, domains)

    def _batch_sums(self, latents: Tensor, codes: Tensor) -> Tensor:
        """`[K, D + 1]`: the sum of the latents of each row and, last, their number, over all processes."""
        counted = F.pad(latents, (0, 1), value=1.0)
        sums = torch.zeros(len(self.sums), counted.shape[1], device=counted.device)
        return self.reduce(sums.index_add_(0, codes, counted))

    def _revive(self, latents: Tensor, domains: list[str]) -> None:
        """Dead rows become latents of the batch, drawn alike in every process."""
        names = sorted(self.ranges, key=lambda name: (self.ranges[name][1] - self.ranges[name][0], name))
        owners = torch.tensor([names.index(name) for name in domains], device=latents.device)
        flat = self.gather(latents.transpose(1, 2).reshape(-1, latents.shape[1]).to(self.sums).contiguous())
        owner = self.gather(owners.repeat_interleave(latents.shape[2]))
        generator = torch.Generator().manual_seed(self.num_updates)
        for number, name in enumerate(names):
            candidates = flat[owner == number]
            start, stop = self.ranges[name]
            dead = start + (self.unseen[start:stop] > self.revive_after).nonzero().flatten()
            count = min(len(dead), len(candidates))
            order = torch.randperm(len(candidates), generator=generator)[:count].to(flat.device)
            self._replace(dead[:count], candidates[order])

    def _replace(self, rows: Tensor, latents: Tensor) -> None:
        # The weight of one hit: a latent that chooses the row next counts as much as the one it came from.
        self.weight[rows] = F.normalize(latents, dim=1)
        self.sums[rows] = self.weight[rows] * (1 - self.decay)
        self.unseen[rows] = 0
        self.num_revived += len(rows)

    def state_dict(self) -> dict[str, Any]:
        """Statistics (the rows themselves are weights of the model)."""
        return {
            "sums": self.sums,
            "unseen": self.unseen,
            "num_updates": self.num_updates,
            "num_revived": self.num_revived,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = state["sums"].to(self.weight.device)
        self.unseen = state["unseen"].to(self.weight.device)
        self.num_updates, self.num_revived = state["num_updates"], state["num_revived"]
