"""Score a codec on held-out audio: beside Codec 2 and Opus, and beside itself without its quantizer.

    python -m audiotok.recipes.evaluate_codec audiotok/auv-mini --data corpus/test --output report.json

`--data` is an audiofolder: `metadata.csv` (or `.jsonl`) with `file_name` and `domain` (speech, music or sound), and
`source` for the breakdown by source. Clips are mixed to mono and resampled to the codec's rate; everything that is
decoded is as long as its reference. Speech recorded below `--min-rate` is scored apart: it has no upper band to
lose, and PESQ and STOI would flatter the codec.

Scores that a codec can be trained to exploit (PESQ) stand beside those that show it: level, and how much too loud
the third-octave band is that is furthest off.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table as RichTable

from audiotok import AudioTokenizer, AuvModel, metrics
from audiotok.audio import load_audio, probe
from audiotok.errors import AudioInputError, AudioTokError, OutputExistsError, OutputNotWritableError, check_choice
from audiotok.metrics import METRICS, CodebookUse, band_bias, codebook_use, compare
from audiotok.recipes import baselines as baselines_module
from audiotok.recipes.baselines import BASELINES, Baseline, Reconstruction, Waveform
from audiotok.recipes.training.data import read_metadata

SPEECH_SCORES = ("pesq_wb", "pesq_nb", "stoi", "estoi", "mel_distance", "level_ratio_db")
GENERAL_SCORES = ("mel_distance", "si_sdr", "level_ratio_db")
RIVAL = "Codec 2 700C"
RIVAL_SCORES = ("pesq_wb", "pesq_nb", "stoi", "estoi", "mel_distance")


@dataclass(frozen=True)
class Group:
    """Clips that share a table: the codec's domain for them, and the scores that mean something."""

    codec_domain: str
    scores: tuple[str, ...]


GROUPS: dict[str, Group] = {
    "speech": Group("speech", SPEECH_SCORES),
    "narrow-band speech": Group("speech", SPEECH_SCORES),
    "music": Group("music", GENERAL_SCORES),
    "sound": Group("audio", GENERAL_SCORES),
}
DOMAINS = ("speech", "music", "sound")


# Clips


@dataclass(frozen=True)
class Clip:
    """A recording of the test set; `name` is its path below the folder, `group` a key of `GROUPS`."""

    path: Path
    name: str
    group: str
    source: str


def read_clips(folder: Path, min_rate: int = 16000, limit: int | None = None) -> list[Clip]:
    """The clips of an audiofolder by group, then name; at most `limit` of each group.

    Raises:
        AudioInputError: no metadata, a missing column, or a file that cannot be read.
        OptionError: a domain other than speech, music and sound.
    """
    if not any((folder / name).is_file() for name in ("metadata.csv", "metadata.jsonl")):
        raise AudioInputError(f"{folder} holds no metadata.csv or metadata.jsonl: give the folder of a test set.")
    clips = [_clip(folder, row, min_rate) for row in read_metadata(folder)]
    kept: list[Clip] = []
    for group in GROUPS:
        kept += sorted((clip for clip in clips if clip.group == group), key=lambda clip: clip.name)[:limit]
    return kept


def _clip(folder: Path, row: dict[str, Any], min_rate: int) -> Clip:
    check_choice(f"domain of {row['file_name']}", row["domain"], DOMAINS)
    path, group = folder / row["file_name"], row["domain"]
    if group == "speech" and probe(path).sampling_rate < min_rate:
        group = "narrow-band speech"
    return Clip(path, row["file_name"], group, row.get("source") or "")


# Scores


@dataclass(frozen=True)
class Score:
    """One clip through one system.

    Attributes:
        scores: metric → value.
        skipped: metric → why there is none.
        bands: nominal centre in Hz (as text, for JSON) → dB, see `audiotok.metrics.band_bias`.
        bits_per_second: None for the codec without its quantizer.
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
    found = compare(reference, result.waveform, sampling_rate, GROUPS[clip.group].scores)
    bands = {f"{hz:g}": db for hz, db in band_bias(reference, result.waveform, sampling_rate).items()}
    bits = result.bits_per_second
    return Score(clip.name, clip.group, clip.source, system, bits, dict(found), found.skipped, bands)


@dataclass
class Evaluation:
    """Every score, and every code that the codec chose.

    Attributes:
        model: the codec's name in tables.
        codes: group → one list a clip of the codes of each codebook.
        missing: system → why it was not run.
    """

    model: str
    clips: list[Clip]
    scores: list[Score] = field(default_factory=list)
    codes: dict[str, list[list[np.ndarray]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def continuous(self) -> str:
        return f"{self.model}, continuous"

    def of(self, group: str, system: str) -> list[Score]:
        return [s for s in self.scores if (s.group, s.system) == (group, system)]

    def systems(self, group: str) -> list[str]:
        """In the order in which they were run."""
        return list(dict.fromkeys(s.system for s in self.scores if s.group == group))


def evaluate(
    tokenizer: AudioTokenizer,
    clips: Sequence[Clip],
    model: str,
    baselines: Iterable[Baseline] = BASELINES,
    cache: Path | None = None,
    progress: Callable[[Sequence[Clip]], Iterable[Clip]] = iter,
) -> Evaluation:
    """Score `tokenizer` and the baselines on `clips`.

    Args:
        tokenizer: of a mono codec.
        model: its name in tables.
        baselines: those that cannot run here are named in `Evaluation.missing`.
        cache: folder that keeps the baselines' scores between runs.
        progress: wraps the clips.

    Raises:
        AudioInputError: the codec is not mono, or a clip cannot be read.
    """
    facts = tokenizer.codec.facts
    if facts.channels != 1:
        raise AudioInputError(f"{model} has {facts.channels} channels: only mono codecs are scored here.")
    evaluation = Evaluation(model, list(clips))
    if not isinstance(tokenizer.codec, AuvModel):
        evaluation.missing[evaluation.continuous] = "only AUV codecs decode latents that were never quantized"
    evaluation.missing.update({b.name: reason for b in baselines if (reason := b.why_unavailable())})
    present = [b for b in baselines if b.name not in evaluation.missing]
    for clip in progress(evaluation.clips):
        waveform = load_audio(clip.path, target_rate=facts.sampling_rate, channels=1, downmix="mean")
        reference = load_audio(waveform, target_rate=facts.output_sampling_rate).samples[0]
        _score_model(evaluation, tokenizer, clip, waveform.samples[0], reference)
        for baseline in present:
            if clip.group in ("speech", "narrow-band speech") or not baseline.speech_only:
                evaluation.scores.append(_score_baseline(baseline, clip, reference, facts.output_sampling_rate, cache))
    return evaluation


def _score_model(
    evaluation: Evaluation, tokenizer: AudioTokenizer, clip: Clip, waveform: Waveform, reference: Waveform
) -> None:
    rate, domain = tokenizer.codec.facts.output_sampling_rate, GROUPS[clip.group].codec_domain
    result, streams = through_ids(tokenizer, waveform, domain)
    evaluation.scores.append(score(clip, evaluation.model, reference, result, rate))
    evaluation.codes.setdefault(clip.group, []).append(streams)
    if isinstance(tokenizer.codec, AuvModel):
        result = through_latents(tokenizer, waveform)
        evaluation.scores.append(score(clip, evaluation.continuous, reference, result, rate))


def through_ids(tokenizer: AudioTokenizer, waveform: Waveform, domain: str) -> tuple[Reconstruction, list[np.ndarray]]:
    """`[samples]` at the codec's rate → ids → `[samples]`, and the codes of each codebook."""
    options = {"domain": domain} if "domain" in tokenizer.codec.encode_options else {}
    (clip,) = tokenizer.encode_audio([waveform], tokenizer.sampling_rate, **options)
    audio = tokenizer.decode(tokenizer.codes_to_ids(clip.codes, clip.depths), length=clip.audio_length)
    if clip.depths is None:
        streams = [np.asarray(row) for row in clip.codes]
    else:
        streams = [row[clip.depths > q] for q, row in enumerate(clip.codes)]
    ranges = code_ranges(tokenizer, domain)
    bits = sum(len(s) * math.log2(stop - start) for s, (start, stop) in zip(streams, ranges, strict=False))
    return Reconstruction(audio[0].cpu().numpy(), bits * tokenizer.sampling_rate / len(waveform)), streams


def through_latents(tokenizer: AudioTokenizer, waveform: Waveform) -> Reconstruction:
    """The same codec without choosing codes: what the best possible codebook could reach with this decoder."""
    features = tokenizer.feature_extractor(waveform, sampling_rate=tokenizer.sampling_rate, return_tensors="pt")
    features = features.to(tokenizer.codec.device)
    with torch.inference_mode():
        latents = tokenizer.codec.latents(features["input_values"], features["padding_mask"])
        audio = tokenizer.codec.decode_latents(latents, [len(waveform)])
    return Reconstruction(audio[0, 0].cpu().numpy(), None)


def code_ranges(tokenizer: AudioTokenizer, domain: str | None = None) -> list[tuple[int, int]]:
    """The half-open range of codes of each codebook, for AUV the part that clips of `domain` may use."""
    sizes = tokenizer.codec.facts.codebook_sizes
    if isinstance(tokenizer.codec, AuvModel) and domain in tokenizer.codec.config.domain_ranges:
        start, stop = tokenizer.codec.config.domain_ranges[domain]
        return [(start, min(stop, size)) for size in sizes]
    return [(0, size) for size in sizes]


def _score_baseline(
    baseline: Baseline, clip: Clip, reference: Waveform, sampling_rate: int, cache: Path | None
) -> Score:
    if cache is None:
        return score(clip, baseline.name, reference, baseline.reconstruct(reference, sampling_rate), sampling_rate)
    path = cache / f"{_cache_key(baseline, clip, reference, sampling_rate)}.json"
    if path.is_file():
        return Score(**json.loads(path.read_text(encoding="utf-8")))
    result = _score_baseline(baseline, clip, reference, sampling_rate, None)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(result)), encoding="utf-8")
    unfinished.replace(path)
    return result


def _cache_key(baseline: Baseline, clip: Clip, reference: Waveform, sampling_rate: int) -> str:
    """Of everything that a baseline's score depends on, the code that makes it included."""
    digest = hashlib.sha256(reference.tobytes())
    digest.update(repr((baseline.name, asdict(clip), sampling_rate, _versions())).encode())
    for module in (metrics, baselines_module):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:24]


# Summaries


def means(scores: Sequence[Score]) -> dict[str, Any]:
    """Metric → mean and number of clips that have it; the mean band bias and bit rate."""
    names = dict.fromkeys(name for s in scores for name in s.scores)
    summary: dict[str, Any] = {name: _mean([s.scores[name] for s in scores if name in s.scores]) for name in names}
    bands = dict.fromkeys(hz for s in scores for hz in s.bands)
    summary["bands"] = {hz: _mean([s.bands[hz] for s in scores if hz in s.bands])["mean"] for hz in bands}
    rates = [s.bits_per_second for s in scores if s.bits_per_second is not None]
    summary["bits_per_second"] = _mean(rates)["mean"] if rates else None
    return summary


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "clips": len(values)}


def wins(evaluation: Evaluation, rival: str = RIVAL) -> dict[str, tuple[int, int]]:
    """Metric → (speech clips on which the codec beats `rival`, clips on which both have a score)."""
    theirs = {s.clip: s.scores for s in evaluation.of("speech", rival)}
    pairs = [(s.scores, theirs[s.clip]) for s in evaluation.of("speech", evaluation.model) if s.clip in theirs]
    found = {}
    for name in RIVAL_SCORES:
        sign = 1 if METRICS[name].higher_is_better else -1
        leads = [sign * (a[name] - b[name]) > 0 for a, b in pairs if name in a and name in b]
        if leads:
            found[name] = (sum(leads), len(leads))
    return found


def codebook_report(evaluation: Evaluation, tokenizer: AudioTokenizer) -> dict[str, list[CodebookUse]]:
    """Set of clips → use of each codebook: each group within its domain's range, and all clips in the whole book."""
    sets = {group: (clips, GROUPS[group].codec_domain) for group, clips in evaluation.codes.items()}
    sets["all"] = ([streams for clips in evaluation.codes.values() for streams in clips], None)
    return {name: _use(clips, code_ranges(tokenizer, domain)) for name, (clips, domain) in sets.items()}


def _use(clips: list[list[np.ndarray]], ranges: list[tuple[int, int]]) -> list[CodebookUse]:
    books = [np.concatenate(book) for book in zip(*clips, strict=True)]
    return [
        codebook_use(codes - start, stop - start)
        for codes, (start, stop) in zip(books, ranges, strict=False)
        if len(codes)
    ]


def report(evaluation: Evaluation, tokenizer: AudioTokenizer, data: Path, min_rate: int) -> dict[str, Any]:
    """Everything as JSON."""
    groups = {g: {s: means(evaluation.of(g, s)) for s in evaluation.systems(g)} for g in GROUPS}
    return {
        "model": evaluation.model,
        "fingerprint": tokenizer.fingerprint,
        "data": data.resolve().name,
        "min_rate": min_rate,
        "clips": {g: sum(clip.group == g for clip in evaluation.clips) for g in GROUPS},
        "made": {
            "date": datetime.date.today().isoformat(),
            "machine": platform.machine(),
            "device": str(tokenizer.codec.device),
            "dtype": str(tokenizer.codec.dtype),
            "versions": _versions(),
        },
        "not_run": evaluation.missing,
        "groups": groups,
        "sources": {g: by_source(evaluation, g) for g in GROUPS},
        "wins": {RIVAL: {name: {"wins": n, "clips": of} for name, (n, of) in wins(evaluation).items()}},
        "codebooks": {n: [asdict(use) for use in u] for n, u in codebook_report(evaluation, tokenizer).items()},
        "scores": [asdict(s) for s in evaluation.scores],
    }


def by_source(evaluation: Evaluation, group: str) -> dict[str, dict[str, Any]]:
    """Source → means of the codec's scores."""
    scores = evaluation.of(group, evaluation.model)
    return {source: means([s for s in scores if s.source == source]) for source in sorted({s.source for s in scores})}


def _versions() -> dict[str, str]:
    packages = ("audiotok", "torch", "numpy", "soxr", "pesq", "pystoi")
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in packages if name in installed}


# Tables


@dataclass(frozen=True)
class Table:
    """Rows of text, for the terminal and for Markdown."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"


def tables(evaluation: Evaluation, tokenizer: AudioTokenizer, min_rate: int) -> list[Table]:
    """What a reader wants to see, most important first."""
    found = [_group_table(evaluation, group, min_rate) for group in GROUPS if evaluation.systems(group)]
    found.append(_source_table(evaluation))
    found.append(_codebook_table(codebook_report(evaluation, tokenizer)))
    found.append(_wins_table(evaluation))
    found.append(_gaps_table(evaluation))
    return [table for table in found if table.rows]


def _group_table(evaluation: Evaluation, group: str, min_rate: int) -> Table:
    names = GROUPS[group].scores
    count = sum(clip.group == group for clip in evaluation.clips)
    rates = {"speech": f", recorded at {min_rate} Hz or more", "narrow-band speech": f", recorded below {min_rate} Hz"}
    rows = []
    for system in evaluation.systems(group):
        summary = means(evaluation.of(group, system))
        rate = summary["bits_per_second"]
        cells = [_cell(summary, name, count) for name in names]
        rows.append([system, "–" if rate is None else f"{rate / 1000:.2f}", *cells, _worst_band(summary["bands"])])
    header = ["codec", "kb/s", *map(_heading, names), "band furthest off"]
    return Table(f"{group.capitalize()}: {count} clips{rates.get(group, '')}", header, rows)


def _source_table(evaluation: Evaluation) -> Table:
    rows = []
    for source, summary in by_source(evaluation, "speech").items():
        count = sum((clip.group, clip.source) == ("speech", source) for clip in evaluation.clips)
        rows.append([source or "–", str(count), *(_cell(summary, name, count) for name in SPEECH_SCORES)])
    header = ["source", "clips", *map(_heading, SPEECH_SCORES)]
    return Table(f"Speech by source, {evaluation.model}", header, rows)


def _codebook_table(uses: dict[str, list[CodebookUse]]) -> Table:
    rows = [
        [name, str(q), str(use.num_codes), str(use.distinct), str(use.size), f"{100 * use.share:.1f} %"]
        + [f"{use.entropy_bits:.2f} of {math.log2(use.size):.2f}", f"{use.perplexity:.0f}"]
        for name, books in uses.items()
        for q, use in enumerate(books)
    ]
    header = ["clips", "codebook", "codes", "distinct", "entries", "in use", "entropy, bits", "perplexity"]
    return Table("Use of the codebooks", header, rows)


def _wins_table(evaluation: Evaluation) -> Table:
    rows = [[METRICS[name].label, f"{won} of {of}"] for name, (won, of) in wins(evaluation).items()]
    return Table(f"Speech clips on which {evaluation.model} beats {RIVAL}", ["score", "clips"], rows)


def _gaps_table(evaluation: Evaluation) -> Table:
    """Nothing is left out in silence."""
    rows = [[system, "all", reason] for system, reason in evaluation.missing.items()]
    for group in GROUPS:
        for system in evaluation.systems(group):
            skipped = [(name, why) for s in evaluation.of(group, system) for name, why in s.skipped.items()]
            for name in dict.fromkeys(name for name, _ in skipped):
                reasons = [why for n, why in skipped if n == name]
                rows.append([system, f"{METRICS[name].label}, {len(reasons)} clips of {group}", reasons[0]])
    return Table("Not scored", ["codec", "what", "why (first clip)"], rows)


def _heading(name: str) -> str:
    metric = METRICS[name]
    return f"{metric.label}, {metric.unit}" if metric.unit else metric.label


def _cell(summary: dict[str, Any], name: str, count: int) -> str:
    if name not in summary:
        return "–"
    text = METRICS[name].format(summary[name]["mean"])
    return text if summary[name]["clips"] == count else f"{text} ({summary[name]['clips']} clips)"


def _worst_band(bands: dict[str, float]) -> str:
    if not bands:
        return "–"
    centre = max(bands, key=lambda hz: abs(bands[hz]))
    return f"{bands[centre]:+.1f} dB at {centre} Hz"


# Command line


def run(
    model: str = typer.Argument(help="Name or folder of a tokenizer."),
    data: Path = typer.Option(help="Audiofolder of held-out clips."),
    output: Path | None = typer.Option(None, help="Write everything as JSON here."),
    markdown: Path | None = typer.Option(None, help="Write the tables here."),
    limit: int | None = typer.Option(None, min=1, help="At most so many clips of each group."),
    baselines: bool = typer.Option(True, help="Also score Codec 2 and Opus."),
    min_rate: int = typer.Option(16000, help="Speech recorded below this rate, Hz, is scored apart."),
    cache: Path | None = typer.Option(None, help="Folder that keeps the baselines' scores between runs."),
    device: str = typer.Option("cpu", help="Where the codec runs."),
    overwrite: bool = typer.Option(False, help="Replace files that exist."),
) -> None:
    """Score a codec on held-out audio, beside Codec 2 and Opus and beside itself without its quantizer."""
    from audiotok import AutoAudioTokenizer

    for path in (output, markdown):
        _check_output(path, overwrite)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    clips = read_clips(data, min_rate, limit)
    tokenizer = AutoAudioTokenizer.from_pretrained(model, device=device)
    chosen = BASELINES if baselines else ()
    evaluation = evaluate(tokenizer, clips, Path(model).name, chosen, cache, lambda c: track(c, "scoring"))
    found = tables(evaluation, tokenizer, min_rate)
    for table in found:
        Console().print(table.rich())
    if output is not None:
        text = json.dumps(report(evaluation, tokenizer, data, min_rate), indent=1, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text("\n".join(table.markdown() for table in found), encoding="utf-8")


def _check_output(path: Path | None, overwrite: bool) -> None:
    """Before the work, not after it."""
    if path is None:
        return
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists: choose another name, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise OutputNotWritableError(f"{path.parent} is no folder: make it first.")


def main() -> None:
    try:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(run)
        app()
    except AudioTokError as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
