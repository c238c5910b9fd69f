"""Quantizers of single vectors that add up codewords step by step: normalisation, encoding, decoding.

`ResidualQuantizer` (residual_kmeans.py) adds rows of tables, `QINCo2` (implicit.py) what networks make of rows.

Shapes: N vectors, D dimensions, M steps, m steps in use, K codes a step, A candidates, B beams.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor, nn

from audiotok.errors import CheckpointError, CodesError, OptionError
from audiotok.quantizers.beam_search import Beams, Choice, Observer, StepSearch, search, smallest, squared_distances
from audiotok.quantizers.latents import check_vectors

# Working memory of one encoding, bytes. On a CPU small, so that a block stays near the cores; see `encode`.
CPU_MEMORY_BUDGET, MEMORY_BUDGET = 16 << 20, 2 << 30
# Vectors decoded at once, so that decoding holds no more than this many rows of each layer.
DECODED_AT_ONCE = 8192

NumCandidates = int | Literal["default"] | None


class TableStep(nn.Module):
    """A step whose codewords are the rows of a table, whatever came before.

    Args:
        dim: D. codebook_size: K.

    Attributes:
        xtarget_mean, xtarget_var: `[D]`, if asked for with `track_targets`: running mean and standard deviation
            (so published, whatever the name says) of what the step had to quantize.
    """

    xtarget_mean: Tensor
    xtarget_var: Tensor

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, dim)

    def track_targets(self) -> None:
        """Keep running statistics of the targets, from mean 0 and spread 1 on."""
        dim = self.codebook.embedding_dim
        self.register_buffer("xtarget_mean", torch.zeros(dim))
        self.register_buffer("xtarget_var", torch.ones(dim))

    def forward(self, codes: Tensor, xhat: Tensor) -> Tensor:
        """Codes `[N]` and the reconstructions so far `[N, D]` → codewords `[N, D]`, float32."""
        return self.codebook(codes).float()

    def searcher(self, num_candidates: int | None) -> StepSearch:
        """What the beam search asks this step, with the weights as they are now; no candidates are cut off."""
        return TableSearch(self.codebook.weight.detach().float())

    def floats_per_beam(self, num_candidates: int | None, keep: int) -> int:
        """Numbers of 4 bytes that one beam takes during the search."""
        codebook_size, dim = self.codebook.weight.shape
        return ranking_floats(codebook_size) + min(keep + 1, codebook_size) * (3 * dim + ranking_floats(1))


def ranking_floats(width: int) -> int:
    """Numbers of 4 bytes to find the smallest of `width` distances: themselves, their bits, keys, a partition."""
    return 8 * width


class TableSearch:
    """Candidates are the rows nearest to the residual; no more than survive are worth a look, and a runner-up."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.energy = table, table.square().sum(dim=1)

    def choose(self, residual: Tensor, keep: int) -> Choice:
        nearest = smallest(squared_distances(residual, self.table, self.energy), keep + 1)
        return nearest._replace(margin=torch.full_like(nearest.margin, torch.inf))

    def codewords(self, index: Tensor, xhat: Tensor) -> Tensor:
        return self.table[index]


class SuccessiveQuantizer(nn.Module):
    """Reconstruction = sum of one codeword a step, in units where the training vectors have mean 0 and spread 1.

    Works in float32 whatever the weights are held in, also under autocast: the nearest codeword must not depend on
    the precision of the rest. Vectors are independent of each other.

    With several beams the first m codes of an encoding are not those of an encoding that ends after m steps: the
    last step keeps the nearest alone, and earlier ones keep what promises most. To spend m codes a vector, encode
    with `num_quantizers=m`; decoding takes any prefix of any encoding, truncated ones are merely less near.

    Args:
        dim: D. steps: M of them, coarse to fine. num_candidates: A, None for all K. beam_size: B.

    Attributes:
        selects: whether the steps can pre-select candidates.
    """

    selects = False
    data_mean: Tensor
    data_std: Tensor

    def __init__(self, dim: int, steps: list[TableStep], num_candidates: int | None, beam_size: int) -> None:
        super().__init__()
        self.dim, self.num_candidates, self.beam_size = dim, num_candidates, beam_size
        self.register_buffer("data_mean", torch.zeros(dim))
        # 0 says that the quantizer was never fitted.
        self.register_buffer("data_std", torch.zeros(()))
        self.steps = nn.ModuleList(steps)

    @property
    def in_order(self) -> list[TableStep]:
        """The steps, coarse to fine, with their type."""
        return [step for step in self.steps if isinstance(step, TableStep)]

    @property
    def num_quantizers(self) -> int:
        return len(self.steps)

    @property
    def codebook_size(self) -> int:
        return self.in_order[0].codebook.num_embeddings

    @property
    def device(self) -> torch.device:
        return self.data_mean.device

    def full_precision(self) -> torch.autocast:
        """A scope without autocast."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def set_normalization(self, mean: Tensor, std: Tensor | float) -> None:
        """Vectors are worked on as (x - mean) / std, mean `[D]` and std one number."""
        self.data_mean.copy_(mean)
        self.data_std.fill_(float(std))

    def normalize(self, x: Tensor) -> Tensor:
        """Vectors `[N, D]` in data units → normalised, float32, on the quantizer's device."""
        return (x.to(self.device, torch.float32) - self.data_mean.float()) / self.data_std.float()

    def denormalize(self, x: Tensor) -> Tensor:
        """Normalised vectors `[..., D]` → data units."""
        return x * self.data_std.float() + self.data_mean.float()

    # Encoding

    @overload
    def encode(
        self,
        x: Tensor,
        num_candidates: NumCandidates = ...,
        beam_size: int | None = ...,
        num_quantizers: int | None = ...,
        *,
        return_margins: Literal[False] = ...,
        memory_budget: int | None = ...,
    ) -> Tensor: ...
    @overload
    def encode(
        self,
        x: Tensor,
        num_candidates: NumCandidates = ...,
        beam_size: int | None = ...,
        num_quantizers: int | None = ...,
        *,
        return_margins: Literal[True],
        memory_budget: int | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    def encode(
        self,
        x: Tensor,
        num_candidates: NumCandidates = "default",
        beam_size: int | None = None,
        num_quantizers: int | None = None,
        *,
        return_margins: bool = False,
        memory_budget: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Codes of vectors by beam search; no gradient.

        Args:
            x: `[N, D]` in data units, on any device; N may be 0.
            num_candidates: A, codewords that each beam tries a step, at most K; 0 or None tries all K; "default" is
                the quantizer's own number.
            beam_size: B, partial codes kept a step (fewer where there are fewer); None is the quantizer's own number.
            num_quantizers: m, steps to encode with; None is all M.
            return_margins: return `(codes, margins)`.
            memory_budget: bytes that the work may hold, however many vectors there are, beside x, the result and
                one row a code of each step's hidden layers; None is 16 MiB on a CPU and 2 GiB elsewhere, or what
                one vector takes, if that is more.

        Returns:
            codes `[N, m]` int64 and, if asked for, margins `[N, m]` float32, both on x's device. A margin is the
            smallest relative gap (rejected - kept) / kept of squared distances, between the last thing kept and the
            first rejected, at the step's pre-selections and its choice of beams; infinite where nothing was
            rejected. Where all m margins of a vector exceed what rounding moves, its codes are the same on every
            device; where one does not, they may still be: most losers never matter.

        Raises:
            LatentsError: x has a wrong dtype or shape, or is not finite.
            OptionError: an option is not legal, or the budget too small for one vector.
            CheckpointError: the quantizer was never fitted.
        """
        codes, margins = [], []
        for beams in self._searched(x, num_candidates, beam_size, num_quantizers, memory_budget):
            codes.append(beams.codes[:, 0].to(x.device))
            if return_margins:
                margins.append(torch.minimum(beams.margins, beams.choice_margins).to(x.device))
        return (torch.cat(codes), torch.cat(margins)) if return_margins else torch.cat(codes)

    @torch.no_grad()
    def _searched(
        self,
        x: Tensor,
        num_candidates: NumCandidates = "default",
        beam_size: int | None = None,
        num_quantizers: int | None = None,
        memory_budget: int | None = None,
        observe: Observer | None = None,
    ) -> Iterator[Beams]:
        """The best beam of each vector, a block of vectors after the other."""
        self._check_fitted()
        check_vectors(x, self.dim)
        depth = self._depth(num_quantizers)
        candidates, beam_size = self._candidates(num_candidates), self._beams(beam_size)
        block = self._block_size(depth, candidates, beam_size, memory_budget)
        with self.full_precision():
            steps = [step.searcher(candidates) for step in self.in_order[:depth]]
        for part in x.split(block):
            with self.full_precision():
                beams = search(steps, self.normalize(part), beam_size, observe)
            yield beams

    def _candidates(self, asked: NumCandidates) -> int | None:
        value = self.num_candidates if asked == "default" else asked
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise OptionError(
                f"num_candidates={value!r} is not legal: give a whole number from 1 to {self.codebook_size}, 0 or None "
                'for all, or "default".'
            )
        if value and not self.selects:
            raise OptionError(
                f"num_candidates={value} is not legal: this {type(self).__name__} has no second tables to pre-select "
                "with. Give 0 or None to try all codes."
            )
        # As many candidates as there are codes need no selection.
        return value if value and value < self.codebook_size else None

    def _beams(self, asked: int | None) -> int:
        value = self.beam_size if asked is None else asked
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"beam_size={value!r} is not legal: give a whole number of at least 1.")
        return value

    def _depth(self, asked: int | None) -> int:
        value = self.num_quantizers if asked is None else asked
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= self.num_quantizers:
            raise OptionError(f"num_quantizers={value!r} is not legal: this quantizer has 1 to {self.num_quantizers}.")
        return value

    def _block_size(self, depth: int, candidates: int | None, beam_size: int, memory_budget: int | None) -> int:
        """Vectors that can be searched at once within the budget."""
        beams, floats = 1, 0
        for number, step in enumerate(self.in_order[:depth]):
            keep = 1 if number == depth - 1 else beam_size
            floats = max(floats, beams * step.floats_per_beam(candidates, keep))
            beams = min(beam_size, beams * self.codebook_size)
        vector = 4 * floats
        if memory_budget is None:
            return max(1, (CPU_MEMORY_BUDGET if self.device.type == "cpu" else MEMORY_BUDGET) // vector)
        if memory_budget < vector:
            raise OptionError(
                f"memory_budget={memory_budget} bytes is too small: one vector with beam_size={beam_size} and "
                f"num_candidates={candidates} takes {vector}. Give more, or search less."
            )
        return memory_budget // vector

    def _check_fitted(self) -> None:
        if not float(self.data_std) > 0:
            raise CheckpointError(
                f"This {type(self).__name__} was never fitted: its data_std is {float(self.data_std)} and must be "
                "above 0. Load weights, or fit it to vectors."
            )

    # Decoding

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[N, m]`, the first m of any encoding → vectors `[N, D]` in data units, float32.

        Raises:
            CodesError: dtype, shape or range of the codes are wrong.
            CheckpointError: the quantizer was never fitted.
        """
        self._check_codes(codes)
        parts = codes.to(self.device).long().split(DECODED_AT_ONCE)
        with self.full_precision():
            return torch.cat([self.denormalize(self._last_reconstruction(part)) for part in parts])

    def decode_steps(self, codes: Tensor) -> Tensor:
        """Codes `[N, m]` → the reconstructions after 1 to m steps `[m, N, D]` in data units, float32."""
        self._check_codes(codes)
        parts = codes.to(self.device).long().split(DECODED_AT_ONCE)
        with self.full_precision():
            return self.denormalize(torch.cat([torch.stack(list(self.reconstructions(p))) for p in parts], dim=1))

    def reconstructions(self, codes: Tensor) -> Iterator[Tensor]:
        """Codes `[N, m]` → after each step the reconstruction so far `[N, D]`, normalised; gradients flow."""
        xhat = self.data_mean.new_zeros(len(codes), self.dim, dtype=torch.float32)
        for step, column in zip(self.in_order, codes.unbind(1), strict=False):
            xhat = xhat + step(column, xhat)
            yield xhat

    def _last_reconstruction(self, codes: Tensor) -> Tensor:
        for xhat in self.reconstructions(codes):
            last = xhat
        return last

    def _check_codes(self, codes: Tensor) -> None:
        self._check_fitted()
        if not isinstance(codes, Tensor) or codes.ndim != 2 or not 1 <= codes.shape[1] <= self.num_quantizers:
            found = list(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise CodesError(f"codes are {found}: they must be [vectors, steps] with 1 to {self.num_quantizers} steps.")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise CodesError(f"codes are {codes.dtype}: they must be integers.")
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise CodesError(
                f"codes lie in [{int(codes.min())}, {int(codes.max())}]: legal are 0 to {self.codebook_size - 1}."
            )
