"""Curves of a score over the rate, of a depth that varies and of constant ones, and who is better where.

Shapes: S settings, N clips.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audiotok.codecs.vrvq.rate_vrvq import DepthRate
from audiotok.metrics import METRICS, Metric, Metrics
from audiotok.recipes.evaluation_report import Table

CONSTANT, VARIABLE = "constant", "variable"
COLUMNS = ("score", "depth", "setting", "clips", "mean_depth", "bits_per_second", "code_bits_per_second", "value")
BLUE, RED = "#1f4e79", "#b3541e"


@dataclass(frozen=True)
class Setting:
    """What decides the depth: an option of `encode` (level, bitrate or num_quantizers) and its value."""

    option: str
    value: float

    @property
    def depth(self) -> str:
        return CONSTANT if self.option == "num_quantizers" else VARIABLE

    def __str__(self) -> str:
        return f"{self.option}={self.value:g}"


@dataclass(frozen=True)
class Trial:
    """One clip at one setting: its mean depth and its scores."""

    clip: str
    setting: Setting
    mean_depth: float
    scores: Metrics


@dataclass(frozen=True)
class Curve:
    """A score over the rate.

    Attributes:
        settings: in order of rate.
        mean_depths: `[S]`, codes a frame.
        rates, code_rates: `[S]`, bits a second, with the depths where they vary, and of the codes alone.
        values: `[S, N]`.
    """

    settings: list[Setting]
    mean_depths: np.ndarray
    rates: np.ndarray
    code_rates: np.ndarray
    values: np.ndarray

    @property
    def means(self) -> np.ndarray:
        return self.values.mean(axis=1)

    def at(self, rate: float, counted: bool) -> np.ndarray | None:
        """The score of each clip `[N]` at a rate, interpolated linearly; None where the curve does not go.

        Args:
            counted: `rate` counts the depths, too.
        """
        rates, first = np.unique(self.rates if counted else self.code_rates, return_index=True)
        if not rates[0] - 1e-6 <= rate <= rates[-1] + 1e-6:
            return None
        place = np.interp(rate, rates, np.arange(len(rates)))
        below, above = math.floor(place), math.ceil(place)
        low, high = (self.values[first[i]] for i in (below, above))
        return low + (place - below) * (high - low)


@dataclass(frozen=True)
class Pair:
    """Both curves of a score, over the same clips."""

    score: str
    constant: Curve
    variable: Curve

    @property
    def metric(self) -> Metric:
        return METRICS[self.score]

    @property
    def num_clips(self) -> int:
        return self.constant.values.shape[1]


def pair_of(trials: Sequence[Trial], score: str, rate: DepthRate) -> Pair | None:
    """The curves of a score over the clips that have it at every setting; None if none has."""
    lacking = {trial.clip for trial in trials if score not in trial.scores}
    scored = [trial for trial in trials if trial.clip not in lacking]
    return Pair(score, *(_curve(scored, depth, score, rate) for depth in (CONSTANT, VARIABLE))) if scored else None


def _curve(trials: Sequence[Trial], depth: str, score: str, rate: DepthRate) -> Curve:
    by_setting: dict[Setting, list[Trial]] = {}
    for trial in trials:
        if trial.setting.depth == depth:
            by_setting.setdefault(trial.setting, []).append(trial)
    depths = {setting: float(np.mean([t.mean_depth for t in found])) for setting, found in by_setting.items()}
    order = sorted(depths, key=lambda setting: depths[setting])
    mean_depths = np.array([depths[setting] for setting in order])
    code_rates = mean_depths * rate.code_bits * rate.frame_rate
    side = rate.side_bits * rate.frame_rate if depth == VARIABLE else 0.0
    values = np.array([[t.scores[score] for t in by_setting[setting]] for setting in order])
    return Curve(order, mean_depths, code_rates + side, code_rates, values)


@dataclass(frozen=True)
class Verdict:
    """Variable against constant depth at one rate.

    Attributes:
        constant, variable: means over clips; `variable` None where its curve does not go so far.
        error: standard error of their difference.
    """

    score: str
    constant: float
    variable: float | None
    error: float

    @property
    def winner(self) -> str:
        """Who is better, with "?" under two standard errors; "–" where only one of them has the rate."""
        if self.variable is None:
            return "–"
        if self.variable == self.constant:
            return "equal"
        is_higher = self.variable > self.constant
        name = VARIABLE if is_higher == METRICS[self.score].higher_is_better else CONSTANT
        return name if abs(self.variable - self.constant) >= 2 * self.error else f"{name}?"


def verdicts(pair: Pair, counted: bool) -> list[Verdict]:
    """One for each constant depth, at its rate; `counted`: variable depth pays for its depths, too."""
    found = []
    for rate, ours in zip(pair.constant.rates, pair.constant.values, strict=True):
        theirs = pair.variable.at(rate, counted)
        if theirs is None:
            found.append(Verdict(pair.score, float(ours.mean()), None, 0.0))
            continue
        error = float(np.std(theirs - ours, ddof=1) / math.sqrt(len(ours))) if len(ours) > 1 else math.inf
        found.append(Verdict(pair.score, float(ours.mean()), float(theirs.mean()), error))
    return found


# For people


def verdict_table(pair: Pair) -> Table:
    """Who is better at the rate of each constant depth, with the depths counted and with the codes alone."""
    rows = []
    both = zip(verdicts(pair, counted=True), verdicts(pair, counted=False), strict=True)
    for i, (counted, free) in enumerate(both):
        place = [f"{pair.constant.rates[i] / 1000:.2f}", f"{pair.constant.mean_depths[i]:.0f}"]
        rows.append([*place, pair.metric.format(counted.constant), *_cells(counted), *_cells(free)])
    header = "kb/s|codebooks|constant depth|variable depth|better|variable, depths free|better"
    title = f"{pair.metric.label} at equal bits: {pair.num_clips} clips (±: standard error of the difference)"
    return Table(title, header.split("|"), rows)


def _cells(verdict: Verdict) -> list[str]:
    if verdict.variable is None:
        return ["–", "–"]
    return [f"{METRICS[verdict.score].format(verdict.variable)} ±{verdict.error:.3f}", verdict.winner]


def summary(pair: Pair) -> str:
    """One sentence: at how many rates variable depth is better."""
    parts = []
    for counted, words in ((True, "with its depths counted"), (False, "by the bits of its codes alone")):
        winners = [verdict.winner for verdict in verdicts(pair, counted) if verdict.variable is not None]
        won, lost = (sum(winner == name for winner in winners) for name in (VARIABLE, CONSTANT))
        unsure = len(winners) - won - lost
        parts.append(f"better at {won}, worse at {lost}, unsure or equal at {unsure} of {len(winners)} rates {words}")
    return f"{pair.metric.label}: variable depth is {'; '.join(parts)}."


def as_csv(pairs: Iterable[Pair]) -> str:
    """One row a point, with `COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for pair in pairs:
        for curve in (pair.constant, pair.variable):
            numbers = np.stack([curve.mean_depths, curve.rates, curve.code_rates, curve.means], axis=1)
            for setting, row in zip(curve.settings, numbers, strict=True):
                cells = (f"{number:.6g}" for number in row)
                writer.writerow([pair.score, setting.depth, setting, pair.num_clips, *cells])
    return text.getvalue()


def draw(pairs: Sequence[Pair], path: Path) -> None:
    """Each score over the rate: constant depth, variable depth, and variable depth if depths were free."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(pairs), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, pair in zip(figure.subplots(1, len(pairs), squeeze=False).flat, pairs, strict=True):
        means = pair.variable.means
        axis.plot(pair.constant.rates / 1000, pair.constant.means, marker="o", color=BLUE, label="constant depth")
        axis.plot(pair.variable.rates / 1000, means, marker=".", color=RED, label="variable depth")
        axis.plot(pair.variable.code_rates / 1000, means, ":", color=RED, label="variable, if depths were free")
        better = "higher" if pair.metric.higher_is_better else "lower"
        axis.set(xlabel="kb/s", ylabel=f"{pair.metric.label} ({better} is better)")
        axis.set_title(f"{pair.num_clips} held-out clips", fontsize=10)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def skipped(trials: Sequence[Trial]) -> list[str]:
    """What was not scored and why, a line a score."""
    reasons: dict[str, dict[str, str]] = {}
    for trial in trials:
        for score, reason in trial.scores.skipped.items():
            reasons.setdefault(score, {}).setdefault(trial.clip, reason)
    return [
        f"{METRICS[score].label} leaves out {len(clips)} clips; the first: {next(iter(clips.values()))}"
        for score, clips in reasons.items()
    ]
