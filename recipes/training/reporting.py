"""What a run shows: lines on the terminal, two CSV files, curves, and samples with their spectrograms."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
from rich.console import Console
from torch import Tensor

from audiotok.recipes.training.config import StageSection
from audiotok.recipes.training.losses import LogMelScale

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_columns(stages: list[StageSection]) -> list[str]:
    """The losses that a run's log has columns for."""
    names = {name for stage in stages for name, weight in stage.loss_weights.items() if weight}
    judged = bool(names & {"adversarial", "feature_matching"})
    return ["total", *sorted(names), *(["discriminator"] if judged else [])]


class Table:
    """A CSV file with fixed columns that grows by rows; rows after `step` are cut when a run resumes."""

    def __init__(self, path: Path, columns: list[str], step: int) -> None:
        self.path, self.columns = path, columns
        kept = [row for row in self.read() if int(row["step"]) <= step] if path.is_file() else []
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({k: _rounded(v) for k, v in row.items()})

    def read(self) -> list[dict[str, str]]:
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def series(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the rows that have a value."""
        pairs = [(int(row["step"]), float(row[column])) for row in self.read() if row.get(column)]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(steps), np.array(values)


class RunReport:
    """Everything written for people; only the main process has one.

    Args:
        losses, figures: columns of `log.csv` and `validation.csv`, beside step, stage and time.
        step: what is done already; later rows of an earlier attempt are cut.
    """

    def __init__(
        self,
        folder: Path,
        losses: list[str],
        figures: list[str],
        sampling_rate: int,
        step: int,
        total_steps: int,
        console: Console,
    ) -> None:
        self.folder, self.sampling_rate, self.total_steps, self.console = folder, sampling_rate, total_steps, console
        self.losses, self.figures = losses, figures
        columns = ["step", "stage", "seconds", "learning_rate", "audio_seconds_per_second", "gradient_norm"]
        self.training = Table(folder / "log.csv", [*columns, *losses], step)
        self.validation = Table(folder / "validation.csv", ["step", "stage", "seconds", *figures], step)

    def training_row(self, row: dict[str, object]) -> None:
        self.training.add(row)
        shown = "  ".join(f"{name} {row[name]:.4f}" for name in self.losses if name in row)
        speed = f"{row['audio_seconds_per_second']:.1f} audio-s/s"
        self._say(f"{self._where(row)}  {shown}  {speed}")

    def validation_row(self, row: dict[str, object]) -> None:
        self.validation.add(row)
        shown = "  ".join(f"{name} {row[name]:.4g}" for name in self.figures if name in row)
        self._say(f"{self._where(row)}  validation: {shown}")

    def _where(self, row: dict[str, object]) -> str:
        return f"[{row['stage']}] step {row['step']}/{self.total_steps}"

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def draw_curves(self) -> None:
        """`curves.png`: each loss and each figure over the steps."""
        series = [(name, *self.training.series(name)) for name in self.losses]
        series += [(f"validation {name}", *self.validation.series(name)) for name in self.figures]
        series = [item for item in series if len(item[1])]
        columns = 4
        figure, axes = _figure(-(-len(series) // columns) or 1, columns)
        for axis, (name, steps, values) in zip(axes.flat, series, strict=False):
            axis.plot(steps, values, linewidth=1)
            axis.set_title(name, fontsize=8)
            axis.locator_params(axis="x", nbins=4)  # more step numbers run into each other
        for axis in axes.flat[len(series) :]:
            axis.set_axis_off()
        figure.savefig(self.folder / "curves.png", dpi=100)

    def samples(self, step: int, clips: list[tuple[Tensor, str, str]], outputs: list[Tensor], count: int) -> None:
        """`count` of the clips, spread over all: original and reconstruction as FLAC, and one picture of them.

        Args:
            clips: triples (`[1, 1, N]`, domain, codec domain).
            outputs: what the codec made of them.
        """
        folder = self.folder / "samples" / f"step_{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        chosen = np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int)
        pairs = [(clips[i][0], outputs[i], clips[i][1]) for i in chosen]
        for number, (target, output, domain) in enumerate(pairs):
            for kind, audio in (("original", target), ("decoded", output)):
                samples = audio.flatten().clamp(-1, 1).numpy()
                soundfile.write(folder / f"{number}_{domain}_{kind}.flac", samples, self.sampling_rate)
        self._draw_spectrograms(folder / "spectrograms.png", pairs)

    def _draw_spectrograms(self, path: Path, pairs: list[tuple[Tensor, Tensor, str]]) -> None:
        mel = LogMelScale(self.sampling_rate, 1024, 80, floor=1e-5)
        figure, axes = _figure(len(pairs), 2)
        for (target, output, domain), row in zip(pairs, axes, strict=True):
            images = [mel(audio[0])[0].numpy() for audio in (target, output)]
            for axis, image, kind in zip(row, images, ("original", "decoded"), strict=True):
                axis.imshow(image, origin="lower", aspect="auto", vmin=images[0].min(), vmax=images[0].max())
                axis.set_title(f"{domain}, {kind}", fontsize=8)
        figure.savefig(path, dpi=100)


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _figure(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """(figure, axes `[rows, columns]`) that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * columns, 2.2 * rows))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.05, 0.05, 0.98, 0.95, wspace=0.25, hspace=0.45)
    return figure, figure.subplots(rows, columns, squeeze=False)


class RunningMeans:
    """Means of scalars since the last `take`, kept on their device until then."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means
