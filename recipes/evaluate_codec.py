"""Score a codec on held-out audio: beside Codec 2 and Opus, and beside itself without its quantizer.

    python -m audiotok.recipes.evaluate_codec audiotok/auv-mini --data corpus/test --output report.json

`--data` is an audiofolder: `metadata.csv` (or `.jsonl`) with `file_name` and `domain` (speech, music or sound), and
`source` for the breakdown by source. Clips are mixed to mono and resampled to the codec's rate; all that is decoded
is as long as its reference. Speech recorded below `--min-rate` is scored apart: it has no upper band to lose.

Scores that a codec can be trained to exploit (PESQ) stand beside those that show it: mel distance, level, and the
third-octave band whose level is furthest off.
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
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from audiotok import AudioTokenizer, AutoAudioTokenizer, AuvModel, metrics
from audiotok.audio import load_audio, probe
from audiotok.errors import AudioInputError, check_choice
from audiotok.recipes import baselines as baselines_module
from audiotok.recipes import command_line as cli
from audiotok.recipes.baselines import BASELINES, Baseline, Reconstruction, Waveform
from audiotok.recipes.evaluation_report import ALL, GROUPS, Clip, Evaluation, Score, as_json, score, tables
from audiotok.recipes.training.corpus import read_metadata

DOMAINS = ("speech", "music", "sound")


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


def evaluate(
    tokenizer: AudioTokenizer,
    clips: Sequence[Clip],
    model: str,
    min_rate: int = 16000,
    baselines: Sequence[Baseline] = BASELINES,
    cache_folder: Path | None = None,
    progress: Callable[[Sequence[Clip]], Iterable[Clip]] = iter,
) -> Evaluation:
    """Score `tokenizer`, its codec without the quantizer (where it decodes latents) and the baselines on `clips`.

    Args:
        tokenizer: of a mono codec.
        model: its name in tables.
        min_rate: by which the clips were grouped.
        baselines: those that cannot run here are named in `Evaluation.not_run`.
        cache_folder: keeps the baselines' scores between runs.
        progress: wraps the clips.

    Raises:
        AudioInputError: the codec is not mono, or a clip cannot be read.
    """
    facts = tokenizer.codec.facts
    if facts.channels != 1:
        raise AudioInputError(f"{model} has {facts.channels} channels: only mono codecs are scored here.")
    evaluation = Evaluation(model, list(clips), min_rate)
    evaluation.code_ranges = {group: code_ranges(tokenizer, GROUPS[group].codec_domain) for group in GROUPS}
    evaluation.code_ranges[ALL] = code_ranges(tokenizer)
    evaluation.not_run = {b.name: reason for b in baselines if (reason := b.why_unavailable())}
    if not hasattr(tokenizer.codec, "decode_latents"):
        evaluation.not_run[_continuous(model)] = f"{type(tokenizer.codec).__name__} decodes nothing but codes"
    present = [b for b in baselines if b.name not in evaluation.not_run]
    for clip in progress(evaluation.clips):
        recording = load_audio(clip.path, target_rate=facts.sampling_rate, channels=1, downmix="mean")
        reference = load_audio(recording, target_rate=facts.output_sampling_rate).samples[0]
        _score_model(evaluation, tokenizer, clip, recording.samples[0], reference)
        _score_baselines(evaluation, present, clip, reference, facts.output_sampling_rate, cache_folder)
    return evaluation


# The codec


def _score_model(
    evaluation: Evaluation, tokenizer: AudioTokenizer, clip: Clip, waveform: Waveform, reference: Waveform
) -> None:
    rate, model = tokenizer.codec.facts.output_sampling_rate, evaluation.model
    result, books = through_ids(tokenizer, waveform, GROUPS[clip.group].codec_domain)
    evaluation.scores.append(score(clip, model, reference, result, rate))
    evaluation.codes.setdefault(clip.group, []).append(books)
    if hasattr(tokenizer.codec, "decode_latents"):
        result = through_latents(tokenizer, waveform)
        evaluation.scores.append(score(clip, _continuous(model), reference, result, rate))


def _continuous(model: str) -> str:
    return f"{model} (continuous)"


def through_ids(tokenizer: AudioTokenizer, waveform: Waveform, domain: str) -> tuple[Reconstruction, list[np.ndarray]]:
    """`[samples]` at the codec's rate → ids → `[samples]` at its output rate, and the codes of each codebook."""
    options: dict[str, Any] = {"domain": domain} if "domain" in tokenizer.codec.encode_options else {}
    (clip,) = tokenizer.encode_audio([waveform], tokenizer.sampling_rate, **options)
    audio = tokenizer.decode(tokenizer.codes_to_ids(clip.codes, clip.depths), length=clip.audio_length)
    books = [np.asarray(row) for row in clip.codes]
    if clip.depths is not None:
        books = [row[clip.depths > q] for q, row in enumerate(books)]
    spans = code_ranges(tokenizer, domain)
    bits = sum(len(codes) * math.log2(stop - start) for codes, (start, stop) in zip(books, spans, strict=False))
    if clip.depths is not None:  # who decodes must be told them
        bits += len(clip.depths) * math.log2(len(books))
    return Reconstruction(audio[0].cpu().numpy(), bits * tokenizer.sampling_rate / len(waveform)), books


def through_latents(tokenizer: AudioTokenizer, waveform: Waveform) -> Reconstruction:
    """The same codec without a choice of codes: what no codebook can pass with this encoder and decoder."""
    features = tokenizer.feature_extractor(waveform, sampling_rate=tokenizer.sampling_rate, return_tensors="pt")
    features = features.to(tokenizer.codec.device)
    with torch.inference_mode():
        latents = tokenizer.codec.latents(features["input_values"], features["padding_mask"])
        audio = tokenizer.codec.decode_latents(latents, [len(waveform)])
    return Reconstruction(audio[0, 0].cpu().numpy(), None)


def code_ranges(tokenizer: AudioTokenizer, domain: str | None = None) -> list[tuple[int, int]]:
    """The half-open range of codes of each codebook; for AUV the part that clips of `domain` may use."""
    sizes = tokenizer.codec.facts.codebook_sizes
    if isinstance(tokenizer.codec, AuvModel) and domain in tokenizer.codec.config.domain_ranges:
        start, stop = tokenizer.codec.config.domain_ranges[domain]
        return [(start, min(stop, size)) for size in sizes]
    return [(0, size) for size in sizes]


# The baselines


def _score_baselines(
    evaluation: Evaluation,
    baselines: Sequence[Baseline],
    clip: Clip,
    reference: Waveform,
    sampling_rate: int,
    cache_folder: Path | None,
) -> None:
    for baseline in baselines:
        if not baseline.speech_only or GROUPS[clip.group].codec_domain == "speech":
            evaluation.scores.append(_score_baseline(baseline, clip, reference, sampling_rate, cache_folder))


def _score_baseline(
    baseline: Baseline, clip: Clip, reference: Waveform, sampling_rate: int, cache_folder: Path | None
) -> Score:
    if cache_folder is None:
        return score(clip, baseline.name, reference, baseline.reconstruct(reference, sampling_rate), sampling_rate)
    path = cache_folder / f"{_cache_key(baseline, clip, reference, sampling_rate)}.json"
    if path.is_file():
        return Score(**json.loads(path.read_text(encoding="utf-8")))
    found = _score_baseline(baseline, clip, reference, sampling_rate, None)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(found)), encoding="utf-8")
    unfinished.replace(path)
    return found


def _cache_key(baseline: Baseline, clip: Clip, reference: Waveform, sampling_rate: int) -> str:
    """A hash of all that the score depends on: the samples, and the code and packages that make it."""
    digest = hashlib.sha256(reference.tobytes())
    about = (baseline.name, clip.name, clip.group, clip.source, sampling_rate, versions(), _scoring_code())
    digest.update(repr(about).encode())
    return digest.hexdigest()[:24]


@cache
def _scoring_code() -> str:
    sources = [Path(module.__file__).read_bytes() for module in (metrics, baselines_module)]
    return hashlib.sha256(b"".join(sources)).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Of the packages that decide a figure, where installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    names = ("audiotok", "torch", "numpy", "soundfile", "soxr", "pesq", "pystoi")
    return {name: installed[name] for name in names if name in installed}


# Command line


def run(
    model: Annotated[str, typer.Argument(help="Name or folder of a tokenizer.")],
    data: Annotated[Path, typer.Option(help="Audiofolder of held-out clips.")],
    output: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
    markdown: cli.MarkdownFile = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many clips of each group.")] = None,
    baselines: Annotated[bool, typer.Option(help="Also score Codec 2 and Opus.")] = True,
    min_rate: Annotated[int, typer.Option(help="Speech recorded below this rate (Hz) is scored apart.")] = 16000,
    cache_folder: Annotated[
        Path | None, typer.Option("--cache", help="Folder that keeps the baselines' scores.")
    ] = None,
    device: cli.Device = "cpu",
    overwrite: cli.Overwrite = False,
) -> None:
    """Score a codec on held-out audio, beside Codec 2 and Opus and beside itself without its quantizer."""
    cli.check_outputs([output, markdown], overwrite)
    if cache_folder is not None:
        cache_folder.mkdir(parents=True, exist_ok=True)
    clips = read_clips(data, min_rate, limit)
    tokenizer = AutoAudioTokenizer.from_pretrained(model, device=device)
    console = Console()
    evaluation = evaluate(
        tokenizer,
        clips,
        Path(model).name,
        min_rate,
        BASELINES if baselines else (),
        cache_folder,
        lambda items: track(items, "scoring", console=console),
    )
    found = tables(evaluation)
    for table in found:
        console.print(table.rich())
    cli.write_text(markdown, "\n".join(table.markdown() for table in found))
    cli.write_json(output, {**_about(tokenizer, model, data), **as_json(evaluation)})


def _about(tokenizer: AudioTokenizer, model: str, data: Path) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "model": Path(model).name,
        "fingerprint": tokenizer.fingerprint,
        "data": data.resolve().name,
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "device": str(tokenizer.codec.device),
        "dtype": str(tokenizer.codec.dtype),
        "versions": versions(),
    }


if __name__ == "__main__":
    cli.run_command(run)
