"""Fitting a QINCo2 to vectors: tables by residual k-means, then training as published (arXiv 2501.03078).

An epoch goes through a window of the vectors that slides on; at its end the quantizer is judged on held-out vectors,
codes that nobody chose are moved to where they may be of use, and the state is written, so that a run which is
stopped goes on as if it had not been.

Shapes: N vectors, D dimensions, M steps, K codes a step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from audiotok.conversion import read_checkpoint
from audiotok.errors import LatentsError, OptionError, OutputNotWritableError, check_choice, check_number
from audiotok.quantizers.implicit import ImplicitStep, QINCo2
from audiotok.quantizers.latents import check_vectors
from audiotok.quantizers.residual_kmeans import ResidualQuantizer, fit_residual_quantizer
from audiotok.quantizers.successive import NumCandidates

Latents = Tensor | np.ndarray | Iterable[Tensor | np.ndarray]

# Published constants: lowest factor of the learning rate; spread of the noise on a fresh network's tables (QINCo1
# mode has its own) and on the second table's row of a replaced code, in standard deviations of the table.
LOWEST_FACTOR = 8e-7
TABLE_NOISE, QINCO1_TABLE_NOISE, REPLACED_NOISE = 0.1, 1.0, 0.025
# Settings that only say when to end, which a resumed run may change.
ENDINGS = ("num_epochs", "patience")


@dataclass(frozen=True)
class FitSettings:
    """How to train; the defaults are the published values, but for the start.

    Attributes:
        num_epochs: the most there are. patience: epochs without a better validation error before the end.
        vectors_per_epoch: None for all (published: 10 million of more). batch_size: vectors an update.
        learning_rate, weight_decay: of AdamW. The published rate is for long trainings; after 250 updates on log-mel
            frames 3e-3 was 0.24 dB ahead of it. gradient_clip: largest magnitude of an entry of a gradient.
        warmup_epochs: the learning rate rises in a line. decay_epochs: then falls as a quarter of a cosine.
        num_candidates, beam_size: of the search in training and validation; None for the quantizer's own.
        validation_vectors: held out from the end, at most a tenth, where no others are given.
        kmeans_iterations: a table. kmeans_vectors: the most to use.
        start: "residual" begins as the plain residual quantizer, its networks behind a layer that is still 0;
            "published" with noise on its tables and with untrained networks' codewords, far from it (measured on
            log-mel frames: 12.6 dB where the residual quantizer had 18.7), which a long training makes up for.
        seed: of everything random.
    """

    num_epochs: int = 70
    patience: int = 10
    vectors_per_epoch: int | None = None
    batch_size: int = 1024
    learning_rate: float = 8e-4
    weight_decay: float = 0.1
    gradient_clip: float = 0.1
    warmup_epochs: float = 3.0
    decay_epochs: float = 60.0
    num_candidates: int | None = None
    beam_size: int | None = None
    validation_vectors: int = 10_000
    kmeans_iterations: int = 10
    kmeans_vectors: int = 1_000_000
    start: Literal["residual", "published"] = "residual"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_epochs", "patience", "batch_size", "validation_vectors"):
            check_number(name, getattr(self, name), least=1)
        for name in ("kmeans_iterations", "kmeans_vectors"):
            check_number(name, getattr(self, name), least=1)
        for name in ("vectors_per_epoch", "num_candidates", "beam_size"):
            check_number(name, 1 if getattr(self, name) is None else getattr(self, name), least=1)
        for name in ("learning_rate", "weight_decay", "gradient_clip", "warmup_epochs", "decay_epochs"):
            check_number(name, getattr(self, name), least=0, kind=float)
        check_choice("start", self.start, ("residual", "published"))

    def learning_rate_factor(self, epoch: float) -> float:
        """Factor of the learning rate at a (fractional) epoch."""
        if epoch < self.warmup_epochs:
            return max(LOWEST_FACTOR, epoch / self.warmup_epochs)
        decayed = (epoch - self.warmup_epochs) / self.decay_epochs if self.decay_epochs else 1.0
        return max(LOWEST_FACTOR, math.cos(math.pi / 2 * min(decayed, 1.0)))


@dataclass(frozen=True)
class EpochReport:
    """One finished epoch.

    Attributes:
        epoch: counted from 1; 0 is the state before training.
        loss: mean over the epoch's batches, NaN for epoch 0.
        validation_mse: mean squared error of held-out vectors, normalised, all steps.
        replaced_codes: codes that nobody chose, of all M K.
    """

    epoch: int
    loss: float
    validation_mse: float
    replaced_codes: int


@dataclass(frozen=True)
class FitProgress:
    """Where a fit stands: `done` of `total` tables or updates, and the report at the end of an epoch."""

    stage: Literal["tables", "training"]
    done: int
    total: int
    loss: float | None = None
    report: EpochReport | None = None


@dataclass
class FitResult:
    """What a fit gave: the reports of all epochs, and which of them the quantizer is now."""

    history: list[EpochReport] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def best_mse(self) -> float:
        """Validation error of the quantizer as it is now, normalised."""
        return self.history[self.best_epoch].validation_mse


Progress = Callable[[FitProgress], None]


def fit(
    quantizer: QINCo2,
    latents: Latents,
    *,
    validation: Latents | None = None,
    residual: ResidualQuantizer | None = None,
    settings: FitSettings | None = None,
    state_file: str | Path | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Fit a quantizer to vectors, on the device where it is; it ends as the best epoch's, in eval mode.

    Args:
        quantizer: whatever it held before is drawn anew.
        latents: vectors `[N, D]` in data units (a NumPy memory map is read as it is needed), or blocks `[n, D]`,
            which are gathered in memory.
        validation: held-out vectors; None takes the last ones of `latents`. Better from other recordings than from
            neighbouring frames.
        residual: a fitted residual quantizer of the same sizes to begin with; None fits one by k-means.
        state_file: where the state is kept after the tables and after every epoch. If the file exists, the run goes
            on from there, with the very result of an undisturbed run where kernels are deterministic (a CPU); it
            must be given the same vectors and settings (`num_epochs` and `patience` may differ).
        progress: called after every table and every update.

    Raises:
        LatentsError: the vectors have a wrong shape, are not finite, or too few.
        OptionError: settings, sizes or the state file do not fit.
        MissingDependencyError: scikit-learn is needed for k-means.
    """
    settings = settings or FitSettings()
    train, held_out = _split(gather(latents), None if validation is None else gather(validation), settings)
    for vectors in (rows(train, slice(1)), held_out):
        check_vectors(vectors, quantizer.dim)
    run = _Run(quantizer, train, held_out, settings, progress)
    path = None if state_file is None else Path(state_file)
    if path is not None and path.is_file():
        run.load(path)
    else:
        start(quantizer, residual or _fit_tables(quantizer, train, settings, progress), settings)
        run.judge(EpochReport(0, math.nan, run.validate(), 0))
        run.save(path)
    while not run.finished:
        run.epoch()
        run.save(path)
    quantizer.load_state_dict(run.best)
    quantizer.eval()
    return run.result


# Vectors


def gather(latents: Latents) -> Tensor | np.ndarray:
    """Vectors `[N, D]`: a tensor or array as it is, blocks in one float32 array."""
    if isinstance(latents, Tensor | np.ndarray):
        return latents
    blocks = [np.asarray(block, dtype=np.float32) for block in latents]
    if not blocks:
        raise LatentsError("latents holds no blocks: give at least one of shape [vectors, dimensions].")
    return np.concatenate(blocks)


def rows(vectors: Tensor | np.ndarray, index: Tensor | slice) -> Tensor:
    """Some of the vectors as a float32 tensor."""
    if isinstance(vectors, Tensor):
        return vectors[index.to(vectors.device) if isinstance(index, Tensor) else index].float()
    part = vectors[index.numpy() if isinstance(index, Tensor) else index]
    return torch.from_numpy(np.array(part, dtype=np.float32))


def _split(
    vectors: Tensor | np.ndarray, validation: Tensor | np.ndarray | None, settings: FitSettings
) -> tuple[Tensor | np.ndarray, Tensor]:
    if validation is not None:
        return vectors, rows(validation, slice(None))
    held_out = min(settings.validation_vectors, len(vectors) // 10)
    if held_out == 0:
        raise LatentsError(f"{len(vectors)} vectors are too few to hold a tenth out: give validation vectors too.")
    return vectors[:-held_out], rows(vectors, slice(-held_out, None))


# The start


def _fit_tables(
    quantizer: QINCo2, vectors: Tensor | np.ndarray, settings: FitSettings, progress: Progress | None
) -> ResidualQuantizer:
    tables = ResidualQuantizer(quantizer.dim, quantizer.num_quantizers, quantizer.codebook_size)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(FitProgress("tables", done, total))

    return fit_residual_quantizer(
        tables,
        rows(vectors, slice(settings.kmeans_vectors)).cpu(),
        iterations=settings.kmeans_iterations,
        seed=settings.seed,
        progress=report,
    )


@torch.no_grad()
def start(quantizer: QINCo2, residual: ResidualQuantizer, settings: FitSettings) -> None:
    """Draw a network on the tables of a residual quantizer; see `FitSettings.start`."""
    sizes = (residual.dim, residual.num_quantizers, residual.codebook_size)
    if sizes != (quantizer.dim, quantizer.num_quantizers, quantizer.codebook_size):
        raise OptionError(
            f"The residual quantizer has D, M, K = {sizes}: QINCo2 needs "
            f"{(quantizer.dim, quantizer.num_quantizers, quantizer.codebook_size)}."
        )
    device = quantizer.device
    generator = torch.Generator().manual_seed(settings.seed)
    # Drawn on the CPU, so that every device starts alike.
    quantizer.cpu().reset_networks(generator)
    quantizer.set_normalization(residual.data_mean, residual.data_std)
    noise = QINCO1_TABLE_NOISE if quantizer.qinco1_mode else TABLE_NOISE
    for step, source in zip(quantizer.in_order, residual.in_order, strict=True):
        table = source.codebook.weight.cpu()
        if settings.start == "published":
            table = noisy_table(table, torch.randn(table.shape, generator=generator), noise)
        step.codebook.weight.copy_(table)
    for step in quantizer.implicit_steps:
        if step.substep is not None:
            step.substep.codebook.weight.copy_(step.codebook.weight)
        if settings.start == "residual":
            step.make_plain(generator)
    quantizer.to(device)


def noisy_table(table: Tensor, noise: Tensor, factor: float) -> Tensor:
    """A table `[K, D]` with unit noise `[K, D]` on it, scaled by `factor` standard deviations of all its entries."""
    return table + factor * table.std() * noise


# Epochs


class _Run:
    """A training run: what changes from epoch to epoch, and how it is kept."""

    def __init__(
        self,
        quantizer: QINCo2,
        vectors: Tensor | np.ndarray,
        held_out: Tensor,
        settings: FitSettings,
        progress: Progress | None,
    ) -> None:
        self.quantizer, self.vectors, self.held_out = quantizer, vectors, held_out
        self.settings, self.progress = settings, progress
        self.candidates: NumCandidates = "default" if settings.num_candidates is None else settings.num_candidates
        self.optimizer = torch.optim.AdamW(
            quantizer.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.result = FitResult()
        self.best: dict[str, Tensor] = {}

    @property
    def epochs_done(self) -> int:
        return len(self.result.history) - 1

    @property
    def finished(self) -> bool:
        waited = self.epochs_done - self.result.best_epoch
        return self.epochs_done >= self.settings.num_epochs or waited >= self.settings.patience

    @property
    def window(self) -> int:
        """Vectors of one epoch."""
        return min(self.settings.vectors_per_epoch or len(self.vectors), len(self.vectors))

    def epoch(self) -> None:
        """Train one epoch, judge it, move dead codes."""
        generator = torch.Generator().manual_seed(self.settings.seed + 1 + self.epochs_done)
        first = self.epochs_done * self.window
        order = (first + torch.randperm(self.window, generator=generator)) % len(self.vectors)
        batches = order.split(self.settings.batch_size)
        used = torch.zeros(self.quantizer.num_quantizers, self.quantizer.codebook_size, dtype=torch.bool)
        losses = []
        for number, batch in enumerate(batches):
            loss, codes = self.update(rows(self.vectors, batch), self.epochs_done + number / len(batches))
            used.scatter_(1, codes.t().cpu(), True)
            losses.append(loss)
            if number + 1 < len(batches):
                self.tell(number + 1, len(batches), loss)
        mse = self.validate()
        dead = ~used if not self.quantizer.qinco1_mode else torch.zeros_like(used)
        report = EpochReport(self.epochs_done + 1, math.fsum(losses) / len(losses), mse, int(dead.sum()))
        self.judge(report)
        replace_codes(self.quantizer, dead, generator)
        self.tell(0, len(batches), losses[-1], report)

    def update(self, x: Tensor, epoch: float) -> tuple[float, Tensor]:
        """One step of the optimizer on a batch: its loss and codes `[n, M]`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.learning_rate_factor(epoch)
        self.quantizer.train()
        losses = self.quantizer.loss(x, self.candidates, self.settings.beam_size)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_value_(self.quantizer.parameters(), self.settings.gradient_clip)
        self.optimizer.step()
        return losses.total.item(), losses.codes

    @torch.no_grad()
    def validate(self) -> float:
        """Mean squared error of the held-out vectors, normalised."""
        self.quantizer.eval()
        codes = self.quantizer.encode(self.held_out, self.candidates, self.settings.beam_size)
        difference = self.quantizer.decode(codes).cpu() - self.held_out.cpu()
        return float((difference / self.quantizer.data_std.cpu()).double().square().mean())

    def judge(self, report: EpochReport) -> None:
        """Remember the report, and the quantizer if it is the best so far."""
        self.result.history.append(report)
        if len(self.result.history) == 1 or report.validation_mse < self.result.best_mse:
            self.result.best_epoch = report.epoch
            self.best = {key: value.detach().clone() for key, value in self.quantizer.state_dict().items()}

    def tell(self, done: int, num_batches: int, loss: float, report: EpochReport | None = None) -> None:
        if self.progress is not None:
            total = self.settings.num_epochs * num_batches
            self.progress(FitProgress("training", self.epochs_done * num_batches + done, total, loss, report))

    # State on disk

    def save(self, path: Path | None) -> None:
        """Write the state, whole or not at all, if it is to be kept."""
        if path is None:
            return
        state = {
            "settings": dataclasses.asdict(self.settings),
            "vectors": self.identity(),
            "history": [dataclasses.asdict(report) for report in self.result.history],
            "best_epoch": self.result.best_epoch,
            "best": self.best,
            "model": self.quantizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_name(path.name + ".partial")
        try:
            torch.save(state, partial)
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            raise OutputNotWritableError(f"The state of the fit cannot be written to {path}: {error}.") from error

    def load(self, path: Path) -> None:
        """Go on from a state that `save` wrote."""
        state = read_checkpoint(path)
        self.check_state(state, path)
        self.result.history = [EpochReport(**report) for report in state["history"]]
        self.result.best_epoch, self.best = state["best_epoch"], state["best"]
        self.quantizer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def identity(self) -> list[float]:
        """Numbers that tell these vectors from others: count, width, sums of the first and of the held-out ones."""
        sums = [float(part.double().sum()) for part in (rows(self.vectors, slice(1000)), self.held_out)]
        return [float(len(self.vectors)), float(self.held_out.shape[1]), *sums]

    def check_state(self, state: dict[str, Any], path: Path) -> None:
        if "settings" not in state or "vectors" not in state:
            raise OptionError(f"{path} is no state of a fit: give another state_file, or remove it.")
        ours = dataclasses.asdict(self.settings)
        differing = [
            f"{name} was {state['settings'].get(name)!r} and is {value!r}"
            for name, value in ours.items()
            if name not in ENDINGS and state["settings"].get(name) != value
        ]
        if state["vectors"] != self.identity():
            differing.append("the vectors are others")
        if differing:
            raise OptionError(f"{path} was begun differently: {'; '.join(differing)}. Give it what it was begun with.")


@torch.no_grad()
def replace_codes(quantizer: QINCo2, dead: Tensor, generator: torch.Generator) -> None:
    """Move the codes marked in `dead` `[M, K]` to random places where the step's targets lie."""
    for step, marked in zip(quantizer.in_order, dead, strict=True):
        shape = step.codebook.weight.shape
        uniform = torch.rand(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        spread = ((uniform - uniform.mean()) / uniform.std()).to(quantizer.device)
        table = spread * step.xtarget_var + step.xtarget_mean
        marked = marked.to(quantizer.device)[:, None]
        step.codebook.weight.copy_(torch.where(marked, table, step.codebook.weight))
        if isinstance(step, ImplicitStep) and step.substep is not None:
            near = noisy_table(table, noise.to(quantizer.device), REPLACED_NOISE)
            step.substep.codebook.weight.copy_(torch.where(marked, near, step.substep.codebook.weight))
