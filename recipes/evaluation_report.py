"""What an evaluation found: scores of clips, their means, and the tables and JSON that show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table as RichTable

from audiotok.metrics import METRICS, CodebookUse, band_bias, codebook_use, compare
from audiotok.recipes.baselines import Reconstruction, Waveform

SPEECH_SCORES = ("pesq_wb", "pesq_nb", "stoi", "estoi", "mel_distance", "level_ratio_db")
GENERAL_SCORES = ("mel_distance", "si_sdr", "level_ratio_db")
RIVAL = "Codec 2 700C"
RIVAL_SCORES = ("pesq_wb", "pesq_nb", "stoi", "estoi", "mel_distance")


@dataclass(frozen=True)
class Group:
    """Clips that share a table: the domain that a codec is told for them, and the scores that mean something."""

    codec_domain: str
    scores: tuple[str, ...]


GROUPS: dict[str, Group] = {
    "speech": Group("speech", SPEECH_SCORES),
    "narrow-band speech": Group("speech", SPEECH_SCORES),
    "music": Group("music", GENERAL_SCORES),
    "sound": Group("audio", GENERAL_SCORES),
}
ALL = "all"
# Marks a mean over some of the clips.
SOME = "†"


@dataclass(frozen=True)
class Clip:
    """A recording of the test set; `name` is its path below the folder, `group` a key of `GROUPS`."""

    path: Path
    name: str
    group: str
    source: str


@dataclass(frozen=True)
class Score:
    """One clip through one system.

    Attributes:
        bits_per_second: None where nothing was coded.
        scores: metric → value.
        skipped: metric → why there is none.
        bands: nominal centre in Hz (as text: keys of JSON) → dB, see `audiotok.metrics.band_bias`.
    """

    clip: str
    group: str
    source: str
    system: str
    bits_per_second: float | None
    scores: dict[str, float]
    skipped: dict[str, str]
    bands: dict[str, float]


def score(clip: Clip, system: str, reference: Waveform, result: Reconstruction, sampling_rate: int) -> Score:
    """Score `result` against `reference`, both `[samples]` at `sampling_rate`, by the metrics of the clip's group."""
    found = compare(reference, result.waveform, sampling_rate, GROUPS[clip.group].scores)
    bands = {f"{hz:g}": db for hz, db in band_bias(reference, result.waveform, sampling_rate).items()}
    bits = result.bits_per_second
    return Score(clip.name, clip.group, clip.source, system, bits, dict(found), found.skipped, bands)


@dataclass
class Evaluation:
    """Every score, and every code that the codec chose.

    Attributes:
        model: the codec's name in tables.
        clips: all that were scored.
        min_rate: speech recorded below this, Hz, is in the group of its own.
        scores: of all clips and systems.
        codes: group → for each clip, the codes of each codebook.
        code_ranges: group (or "all") → for each codebook, the half-open range of codes that its clips may use.
        not_run: system → why.
    """

    model: str
    clips: list[Clip]
    min_rate: int
    scores: list[Score] = field(default_factory=list)
    codes: dict[str, list[list[np.ndarray]]] = field(default_factory=dict)
    code_ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def of(self, group: str, system: str) -> list[Score]:
        return [s for s in self.scores if (s.group, s.system) == (group, system)]

    def systems(self, group: str) -> list[str]:
        """Those that were run on the group, in order."""
        return list(dict.fromkeys(s.system for s in self.scores if s.group == group))

    def count(self, group: str) -> int:
        return sum(clip.group == group for clip in self.clips)


# Summaries


def means(scores: Sequence[Score]) -> dict[str, Any]:
    """Metric → mean, and the number of clips that have it; `bands` and `bits_per_second` → mean."""
    names = dict.fromkeys(name for s in scores for name in s.scores)
    values = {name: [s.scores[name] for s in scores if name in s.scores] for name in names}
    summary: dict[str, Any] = {name: {"mean": _mean(found), "clips": len(found)} for name, found in values.items()}
    centres = dict.fromkeys(hz for s in scores for hz in s.bands)
    summary["bands"] = {hz: _mean([s.bands[hz] for s in scores if hz in s.bands]) for hz in centres}
    rates = [s.bits_per_second for s in scores if s.bits_per_second is not None]
    summary["bits_per_second"] = _mean(rates) if rates else None
    return summary


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def by_source(evaluation: Evaluation, group: str) -> dict[str, dict[str, Any]]:
    """Source → means of the codec's own scores."""
    scores = evaluation.of(group, evaluation.model)
    return {source: means([s for s in scores if s.source == source]) for source in sorted({s.source for s in scores})}


def wins(evaluation: Evaluation, rival: str = RIVAL) -> dict[str, tuple[int, int]]:
    """Metric → (speech clips on which the codec beats `rival`, speech clips on which both have the score)."""
    theirs = {s.clip: s.scores for s in evaluation.of("speech", rival)}
    pairs = [(s.scores, theirs[s.clip]) for s in evaluation.of("speech", evaluation.model) if s.clip in theirs]
    found = {}
    for name in RIVAL_SCORES:
        sign = 1 if METRICS[name].higher_is_better else -1
        leads = [sign * (ours[name] - other[name]) > 0 for ours, other in pairs if name in ours and name in other]
        if leads:
            found[name] = (sum(leads), len(leads))
    return found


def codebook_uses(evaluation: Evaluation) -> dict[str, list[CodebookUse]]:
    """Group → use of each codebook within the range of the group's domain; "all" → of the whole books."""
    clips = {**evaluation.codes, ALL: [books for group in evaluation.codes.values() for books in group]}
    return {group: _use_of(clips[group], evaluation.code_ranges[group]) for group in clips}


def _use_of(clips: list[list[np.ndarray]], ranges: list[tuple[int, int]]) -> list[CodebookUse]:
    books = [np.concatenate(book) for book in zip(*clips, strict=True)]
    used = [(codes, span) for codes, span in zip(books, ranges, strict=False) if len(codes)]
    return [codebook_use(codes - start, stop - start) for codes, (start, stop) in used]


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything: summaries first, then the scores of every clip (their bands only as means: 20 numbers a clip)."""
    groups = [group for group in GROUPS if evaluation.count(group)]
    return {
        "min_rate": evaluation.min_rate,
        "clips": {g: evaluation.count(g) for g in groups},
        "not_run": evaluation.not_run,
        "groups": {g: {s: means(evaluation.of(g, s)) for s in evaluation.systems(g)} for g in groups},
        "sources": {g: by_source(evaluation, g) for g in groups},
        "wins": {RIVAL: {name: {"wins": won, "clips": of} for name, (won, of) in wins(evaluation).items()}},
        "codebooks": {group: [asdict(use) for use in uses] for group, uses in codebook_uses(evaluation).items()},
        "scores": [{key: value for key, value in asdict(s).items() if key != "bands"} for s in evaluation.scores],
    }


# Tables


@dataclass(frozen=True)
class Table:
    """Cells of text, for the terminal and for Markdown; `numbers`: columns behind the first are aligned right."""

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: bool = True

    def rich(self) -> RichTable:
        # As narrow as can be, and no number is ever cut: nine columns fit into 80 characters.
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for i, name in enumerate(self.header):
            if self.numbers and i > 0:
                table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
            else:
                table.add_column(name)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:" if self.numbers else "---"] * (len(self.header) - 1), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"


def tables(evaluation: Evaluation) -> list[Table]:
    """What a reader wants to see, most important first; none is empty."""
    found = [group_table(evaluation, group) for group in GROUPS]
    found += [source_table(evaluation), codebook_table(evaluation), wins_table(evaluation), gaps_table(evaluation)]
    return [table for table in found if table.rows]


def group_table(evaluation: Evaluation, group: str) -> Table:
    """One row a system."""
    names, count, rate = GROUPS[group].scores, evaluation.count(group), evaluation.min_rate
    recorded = {"speech": f" recorded at {rate} Hz or more", "narrow-band speech": f" recorded below {rate} Hz"}
    rows = []
    for system in evaluation.systems(group):
        summary = means(evaluation.of(group, system))
        bits = summary["bits_per_second"]
        kilobits = "–" if bits is None else f"{bits / 1000:.2f}"
        rows.append([system, kilobits, *_cells(summary, names, count), _worst_band(summary["bands"])])
    header = ["codec", "kb/s", *map(_heading, names), "worst band"]
    return Table(f"{group.capitalize()}: {count} clips{recorded.get(group, '')}", header, rows)


def source_table(evaluation: Evaluation) -> Table:
    """Speech, one row a source: the mean hides a wide spread."""
    rows = []
    for source, summary in by_source(evaluation, "speech").items():
        count = sum((clip.group, clip.source) == ("speech", source) for clip in evaluation.clips)
        rows.append([source or "–", str(count), *_cells(summary, SPEECH_SCORES, count)])
    header = ["source", "clips", *map(_heading, SPEECH_SCORES)]
    return Table(f"Speech by source: {evaluation.model}", header, rows)


def codebook_table(evaluation: Evaluation) -> Table:
    """Each group within the range of its domain, then all clips in the whole book."""
    rows = []
    for group, uses in codebook_uses(evaluation).items():
        for q, use in enumerate(uses):
            counts = [str(n) for n in (q, use.num_codes, use.distinct, use.size)]
            entropy = f"{use.entropy_bits:.2f} of {math.log2(use.size):.2f}"
            rows.append([group, *counts, f"{100 * use.share:.1f} %", entropy, f"{use.perplexity:.0f}"])
    header = ["clips", "codebook", "codes", "distinct", "entries", "in use", "entropy, bits", "perplexity"]
    return Table(f"Use of the codebooks: {evaluation.model}", header, rows)


def wins_table(evaluation: Evaluation) -> Table:
    rows = [[METRICS[name].label, f"{won} of {of}"] for name, (won, of) in wins(evaluation).items()]
    return Table(f"Speech clips on which {evaluation.model} beats {RIVAL}", ["score", "clips"], rows)


def gaps_table(evaluation: Evaluation) -> Table:
    """What was not scored and why, so that nothing is left out in silence."""
    gaps: dict[tuple[str, str], list[str]] = {("all", reason): [name] for name, reason in evaluation.not_run.items()}
    for group in GROUPS:
        for system in evaluation.systems(group):
            scores = evaluation.of(group, system)
            for name in dict.fromkeys(name for s in scores for name in s.skipped):
                reasons = [s.skipped[name] for s in scores if name in s.skipped]
                what = f"{METRICS[name].label} of {len(reasons)} clips: {group}"
                gaps.setdefault((what, reasons[0]), []).append(system)
    rows = [[what, ", ".join(systems), reason] for (what, reason), systems in gaps.items()]
    return Table(
        f"Not scored ({SOME}: mean of the other clips)", ["what", "codec", "why (first clip)"], rows, numbers=False
    )


def _heading(name: str) -> str:
    metric = METRICS[name]
    return f"{metric.label}, {metric.unit}" if metric.unit else metric.label


def _cells(summary: dict[str, Any], names: Sequence[str], count: int) -> list[str]:
    return [_cell(name, summary[name], count) if name in summary else "–" for name in names]


def _cell(name: str, found: dict[str, Any], count: int) -> str:
    text = METRICS[name].format(found["mean"])
    return text if found["clips"] == count else text + SOME


def _worst_band(bands: dict[str, float]) -> str:
    if not bands:
        return "–"
    centre = max(bands, key=lambda hz: abs(bands[hz]))
    return f"{bands[centre]:+.1f} at {centre} Hz"
