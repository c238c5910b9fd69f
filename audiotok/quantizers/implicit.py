"""QINCo2: residual quantization whose codewords are made by networks from what is already reconstructed.

QINCo (Huijben et al., arXiv 2401.14732) and QINCo2 (Vallaeys et al., arXiv 2501.03078).

Step 0 is a table; step m turns a row c of its table and the reconstruction so far xhat into a codeword f(c, xhat).
The encoder tries, for each of B beams, the A rows whose partners in a second table lie nearest to the residual.

Shapes: N vectors, D dimensions, M steps, K codes a step, A candidates, B beams, R rows (beams of all vectors),
e embedding width, h hidden width, L blocks a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.errors import ConfigError, OptionError, check_flag, check_number
from audiotok.quantizers.beam_search import MIN_ROWS, Choice, StepSearch, smallest, squared_distances
from audiotok.quantizers.successive import NumCandidates, SuccessiveQuantizer, TableStep, ranking_floats

# Share of the newest batch in the running statistics of a step's targets.
MOMENTUM = 0.1


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever its weights are held in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.float(), None if self.bias is None else self.bias.float())


class ResidualBlock(nn.Module):
    """z + W_down ReLU(W_up z), e wide outside and h inside."""

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = Float32Linear(embedding_dim, hidden_dim, bias=False)
        self.down_proj = Float32Linear(hidden_dim, embedding_dim, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.down_proj(F.relu(self.up_proj(z)))


class Conditioning(nn.Module):
    """What the embedded codeword and the reconstruction so far, side by side, add to the embedding."""

    def __init__(self, embedding_dim: int, dim: int) -> None:
        super().__init__()
        self.mlp = Float32Linear(embedding_dim + dim, embedding_dim)

    def forward(self, z: Tensor, xhat: Tensor) -> Tensor:
        return self.mlp(torch.cat([z, xhat], dim=-1))


class SelectionTable(nn.Module):
    """One vector a code, near to the residuals for which the code is worth trying."""

    def __init__(self, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, dim)


class ImplicitStep(TableStep):
    """A step m ≥ 1: a table and the network that makes codewords of its rows.

    Args:
        dim: D. codebook_size: K. num_blocks: L. embedding_dim: e, None or D for no projections. hidden_dim: h.
        selects: whether there is a second table to pre-select candidates with.
        skip: add the table's row to what the network gives (QINCo2; QINCo1 does not).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_blocks: int,
        embedding_dim: int | None,
        hidden_dim: int,
        selects: bool,
        skip: bool,
    ) -> None:
        super().__init__(dim, codebook_size)
        width = embedding_dim or dim
        self.skip = skip
        self.substep = SelectionTable(dim, codebook_size) if selects else None
        self.in_proj = Float32Linear(dim, width, bias=False) if width != dim else None
        self.out_proj = Float32Linear(width, dim, bias=False) if width != dim else None
        self.concat = Conditioning(width, dim)
        self.residual_blocks = nn.ModuleList(ResidualBlock(width, hidden_dim) for _ in range(num_blocks))

    @property
    def blocks(self) -> list[ResidualBlock]:
        """The residual blocks with their type."""
        return [block for block in self.residual_blocks if isinstance(block, ResidualBlock)]

    def forward(self, codes: Tensor, xhat: Tensor) -> Tensor:
        """Codes `[N]` and the reconstructions so far `[N, D]` → codewords `[N, D]`; gradients flow to both."""
        rows = self.codebook(codes).float()
        z = rows if self.in_proj is None else self.in_proj(rows)
        z = z + self.concat(z, xhat)
        for block in self.residual_blocks:
            z = block(z)
        y = z if self.out_proj is None else self.out_proj(z)
        return rows + y if self.skip else y

    @torch.no_grad()
    def make_plain(self, generator: torch.Generator | None = None) -> None:
        """Set the network so that codewords are the table's rows whatever came before.

        With the skip, what the blocks make is held back by the layer after them or starts from 0, so that they can
        be drawn at random, and learn from the first update on.
        """
        for block in self.blocks:
            if self.skip:
                nn.init.kaiming_uniform_(block.down_proj.weight, nonlinearity="relu", generator=generator)
                # L such blocks in a row add up to the size of their input.
                block.down_proj.weight.div_(math.sqrt(len(self.blocks)))
            else:
                nn.init.zeros_(block.down_proj.weight)
        nn.init.zeros_(self.concat.mlp.weight)
        nn.init.zeros_(self.concat.mlp.bias)
        if self.out_proj is not None and self.in_proj is not None:
            # With the skip nothing is to be added, without it the row itself is to come out.
            inverse = torch.linalg.pinv(self.in_proj.weight.float())
            self.out_proj.weight.copy_(torch.zeros_like(inverse) if self.skip else inverse)
        elif self.skip:
            self.concat.mlp.weight[:, : len(self.concat.mlp.weight)].fill_diagonal_(-1.0)

    def selected(self, codes: Tensor) -> Tensor:
        """Rows of the second table, `[N]` → `[N, D]`."""
        if self.substep is None:
            raise OptionError("This step has no second table: the quantizer was made without num_candidates.")
        return self.substep.codebook(codes).float()

    def searcher(self, num_candidates: int | None) -> StepSearch:
        """What the beam search asks this step, with the weights as they are now."""
        return ImplicitSearch(self, num_candidates)

    def floats_per_beam(self, num_candidates: int | None, keep: int) -> int:
        """Numbers of 4 bytes that one beam takes during the search."""
        codebook_size, dim = self.codebook.weight.shape
        hidden, width = self.blocks[0].up_proj.weight.shape
        candidates = min(num_candidates or codebook_size, codebook_size)
        choosing = ranking_floats(codebook_size)
        making = candidates * (width + hidden + 2 * dim + ranking_floats(1))
        return choosing + making + 3 * dim + width + hidden


class ImplicitSearch:
    """An `ImplicitStep` made ready for many candidates.

    The first layers are linear, so what they make of a table's row is computed once a row, what they make of a
    reconstruction once a beam, and the sum of both alone goes through the rest: equal to the step's `forward` but
    for rounding, with half the multiplications (D=64, e=128, h=256, L=2: 90 112 a candidate, not 172 032).
    """

    @torch.no_grad()
    def __init__(self, step: ImplicitStep, num_candidates: int | None) -> None:
        self.num_candidates = num_candidates
        self.skip, self.rows = step.skip, step.codebook.weight.detach().float()
        if num_candidates is not None:
            self.selection = step.selected(torch.arange(len(self.rows), device=self.rows.device))
            self.selection_energy = self.selection.square().sum(dim=1)
        self.ups = [block.up_proj.weight.detach().float() for block in step.blocks]
        self.downs = [block.down_proj.weight.detach().float() for block in step.blocks]
        self.out = None if step.out_proj is None else step.out_proj.weight.detach().float()
        if self.out is not None:
            # Only the projection of the last sum is wanted: cheaper where D < e, hardly dearer elsewhere.
            self.downs[-1] = self.out @ self.downs[-1]
        embedded = self.rows if step.in_proj is None else step.in_proj(self.rows)
        # Columns of the conditioning: the embedded row's first, then the reconstruction's.
        conditioning = step.concat.mlp.weight.detach().float()
        of_rows, self.of_xhat = conditioning.split([embedded.shape[1], self.rows.shape[1]], dim=1)
        self.rows_z = torch.addmm(embedded + step.concat.mlp.bias.float(), embedded, of_rows.t())
        self.rows_u = self.rows_z @ self.ups[0].t()

    def choose(self, residual: Tensor, keep: int) -> Choice:
        """The rows whose partners in the second table are nearest to the residuals `[R, D]`, or all rows."""
        if self.num_candidates is None:
            everything = torch.arange(len(self.rows), device=residual.device).expand(len(residual), -1)
            return Choice(everything, residual.new_full((len(residual),), torch.inf))
        return smallest(squared_distances(residual, self.selection, self.selection_energy), self.num_candidates)

    def codewords(self, index: Tensor, xhat: Tensor) -> Tensor:
        """f(rows[index], xhat): `[R, A]` and `[R, D]` → `[R, A, D]`."""
        num_rows, num_candidates = index.shape
        missing = max(0, MIN_ROWS - num_rows)
        index, xhat = F.pad(index, (0, 0, 0, missing)), F.pad(xhat, (0, 0, 0, missing))
        z_of_xhat = xhat @ self.of_xhat.t()
        u_of_xhat = z_of_xhat @ self.ups[0].t()
        z = self.rows_z[index].add_(z_of_xhat[:, None]).flatten(0, 1)
        u = self.rows_u[index].add_(u_of_xhat[:, None]).flatten(0, 1)
        for down, next_up in zip(self.downs[:-1], self.ups[1:], strict=True):
            z.addmm_(u.relu_(), down.t())
            torch.mm(z, next_up.t(), out=u)
        y = z if self.out is None else z @ self.out.t()
        y.addmm_(u.relu_(), self.downs[-1].t())
        del z, u
        if self.skip:
            y.add_(self.rows[index].flatten(0, 1))
        return y.view(len(index), num_candidates, -1)[:num_rows]


@dataclass
class QINCo2Losses:
    """Losses of one batch, on normalised vectors; each mean is over N and D.

    Attributes:
        reconstruction: sum over steps of mean((xhat_m - x)^2).
        selection: sum over steps m ≥ 1 of mean((sg(xhat_{m-1}) + second table's row - x)^2); 0 without such tables.
        reconstruction_per_step: `[M]`. selection_per_step: `[M - 1]`, empty without second tables.
        codes: `[N, M]` int64, the codes that the batch got.
    """

    reconstruction: Tensor
    selection: Tensor
    reconstruction_per_step: Tensor
    selection_per_step: Tensor
    codes: Tensor

    @property
    def total(self) -> Tensor:
        """What training minimises: the sum of both, without weights."""
        return self.reconstruction + self.selection


class QINCo2(SuccessiveQuantizer):
    """Quantizer with implicit codebooks; QINCo1 with `qinco1_mode`. See `SuccessiveQuantizer` for encode and decode.

    Args:
        dim: D, of the vectors.
        num_quantizers: M. A vector takes M log2(K) bits.
        codebook_size: K.
        num_blocks: L. embedding_dim: e, None for D without projections. hidden_dim: h.
        num_candidates: A, pre-selected rows a beam in encoding; None or 0 tries all K, and then there are no second
            tables. A may be changed at encoding, from 1 to K where there are second tables.
        beam_size: B in encoding, changed there at will.
        qinco1_mode: codewords are what the network gives, without the table's row added.

    Raises:
        ConfigError: a value is not legal.
    """

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int = 256,
        num_blocks: int = 2,
        embedding_dim: int | None = 128,
        hidden_dim: int = 256,
        num_candidates: int | None = 16,
        beam_size: int = 32,
        qinco1_mode: bool = False,
    ) -> None:
        sizes = {"dim": dim, "num_quantizers": num_quantizers, "num_blocks": num_blocks, "hidden_dim": hidden_dim}
        for name, value in {**sizes, "embedding_dim": embedding_dim or 1, "beam_size": beam_size}.items():
            check_number(name, value, least=1)
        check_number("codebook_size", codebook_size, least=2)
        check_number("num_candidates", num_candidates or 0, least=0)
        check_flag("qinco1_mode", qinco1_mode)
        if (num_candidates or 0) > codebook_size:
            raise ConfigError(f"num_candidates={num_candidates} is not legal: there are {codebook_size} codes a step.")
        selects = bool(num_candidates)
        network = (num_blocks, embedding_dim, hidden_dim, selects, not qinco1_mode)
        later = [ImplicitStep(dim, codebook_size, *network) for _ in range(num_quantizers - 1)]
        super().__init__(dim, [TableStep(dim, codebook_size), *later], num_candidates or None, beam_size)
        self.qinco1_mode, self.selects = qinco1_mode, selects
        for step in self.in_order:
            # Codes that nobody chose are moved to where the targets lie.
            step.track_targets()
        self.reset_networks()

    @classmethod
    def from_files(cls, weights: str | Path, config: str | Path | None = None) -> QINCo2:
        """A quantizer from published files, in eval mode.

        Args:
            weights: safetensors, or a PyTorch file read with `weights_only=True`: a training checkpoint (a dict with
                "model" and "parameters"), or a flat state dict; keys of QINCo2, or of the original QINCo1.
            config: JSON file with "parameters" and "data_dim" (QINCo1: d, K, L, M, h, db_scale); None where the
                checkpoint holds them.

        Raises:
            WeightMismatchError: a tensor is missing, extra or misshapen.
            ConfigError: the configuration has an unknown, missing or unsupported value.
            CheckpointError: a file is missing, unreadable, or would need to execute code.
        """
        from audiotok.quantizers.implicit_files import read_files

        return cls.from_tensors(*read_files(weights, config))

    @classmethod
    def from_tensors(cls, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> QINCo2:
        """As `from_files`, from published tensors by their names and a published configuration."""
        from audiotok.quantizers.implicit_files import convert

        options, state = convert(weights, config)
        with torch.device("meta"):
            quantizer = cls(**options)
        quantizer.load_state_dict(state, assign=True)
        return quantizer.eval()

    @torch.no_grad()
    def reset_networks(self, generator: torch.Generator | None = None) -> None:
        """Draw the networks anew, as published: nothing is added to the embedding at first; tables stay."""
        for module in self.modules():
            if isinstance(module, Float32Linear) and self.qinco1_mode:
                # PyTorch's own start of a linear layer.
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            elif isinstance(module, Float32Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
        for step in self.implicit_steps:
            if self.qinco1_mode:
                bound = 1 / math.sqrt(step.concat.mlp.in_features)
                nn.init.uniform_(step.concat.mlp.bias, -bound, bound, generator=generator)
                continue
            nn.init.zeros_(step.concat.mlp.weight)
            nn.init.zeros_(step.concat.mlp.bias)
            for block in step.blocks:
                nn.init.zeros_(block.down_proj.weight)

    @property
    def implicit_steps(self) -> list[ImplicitStep]:
        """Steps 1 to M - 1."""
        return [step for step in self.steps if isinstance(step, ImplicitStep)]

    # Training

    def loss(self, x: Tensor, num_candidates: NumCandidates = "default", beam_size: int | None = None) -> QINCo2Losses:
        """Losses of vectors `[N, D]` in data units: encode without gradient, decode with it.

        In training mode the running statistics of each step's targets are updated too.
        """
        targets = TargetStatistics(self.num_quantizers)
        observe = targets.add if self.training else None
        codes = torch.cat([b.codes[:, 0] for b in self._searched(x, num_candidates, beam_size, observe=observe)])
        if self.training:
            self._update_targets(targets)
        with self.full_precision():
            return self._losses(self.normalize(x), codes)

    def _losses(self, x: Tensor, codes: Tensor) -> QINCo2Losses:
        xhats = list(self.reconstructions(codes))
        reconstruction = torch.stack([F.mse_loss(xhat, x) for xhat in xhats])
        steps = self.implicit_steps if self.selects else []
        rows = [step.selected(column) for step, column in zip(steps, codes.unbind(1)[1:], strict=False)]
        terms = [F.mse_loss(before.detach() + row, x) for before, row in zip(xhats, rows, strict=False)]
        selection = torch.stack(terms) if terms else x.new_zeros(0)
        return QINCo2Losses(reconstruction.sum(), selection.sum(), reconstruction, selection, codes)

    @torch.no_grad()
    def _update_targets(self, targets: TargetStatistics) -> None:
        for step, (mean, std) in zip(self.in_order, targets.mean_and_std(), strict=True):
            step.xtarget_mean.lerp_(mean.to(step.xtarget_mean), MOMENTUM)
            step.xtarget_var.lerp_(std.to(step.xtarget_var), MOMENTUM)


class TargetStatistics:
    """Mean and standard deviation of what each step had to quantize, over blocks of vectors and beams."""

    def __init__(self, num_steps: int) -> None:
        self.counts: list[int] = [0] * num_steps
        self.sums: list[Any] = [0] * num_steps
        self.squares: list[Any] = [0] * num_steps

    def add(self, number: int, targets: Tensor) -> None:
        """Take in the targets `[n, F, D]` of step `number`."""
        rows = targets.flatten(0, 1).double()
        self.counts[number] += len(rows)
        self.sums[number] = self.sums[number] + rows.sum(dim=0)
        self.squares[number] = self.squares[number] + rows.square().sum(dim=0)

    def mean_and_std(self) -> list[tuple[Tensor, Tensor]]:
        """`[D]` each, a step; standard deviations with N - 1."""
        out = []
        for count, total, squares in zip(self.counts, self.sums, self.squares, strict=True):
            mean = total / count
            variance = (squares - count * mean.square()).clamp(min=0.0) / max(1, count - 1)
            out.append((mean, variance.sqrt()))
        return out
