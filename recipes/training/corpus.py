"""Recordings for training: an audiofolder, resampled once into a cache, split by speaker or recording.

The cache is one flat file of int16 samples and an index beside it; its name is a hash of everything that its
content depends on.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soxr

from audiotok.audio import load_audio
from audiotok.errors import AudioFileNotFoundError, AudioInputError

CACHE_FORMAT = 1
FULL_SCALE = 32767


@dataclass(frozen=True)
class Clip:
    """A stretch of the flat file: `samples[offset : offset + length]`; `speed` 1 is the recording itself."""

    file_name: str
    domain: str
    group: str
    offset: int
    length: int
    speed: float


class Corpus:
    """All clips of a folder at one rate, mono int16, memory-mapped from the cache folder `path`."""

    def __init__(self, path: Path, sampling_rate: int) -> None:
        self.path, self.sampling_rate = path, sampling_rate
        self.clips = [Clip(**clip) for clip in json.loads((path / "index.json").read_text(encoding="utf-8"))]
        self.samples = np.memmap(path / "samples.int16", dtype=np.int16, mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.path, self.sampling_rate)  # worker processes map the file themselves

    def audio(self, clip: Clip, start: int = 0, length: int | None = None) -> np.ndarray:
        """Float32 samples of (a part of) a clip."""
        stop = clip.length if length is None else min(start + length, clip.length)
        return self.samples[clip.offset + start : clip.offset + stop].astype(np.float32) / FULL_SCALE


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/audiotok/corpora` or `~/.cache/audiotok/corpora`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "audiotok" / "corpora"


def open_corpus(
    folder: Path,
    cache: Path,
    sampling_rate: int,
    speed_copies: dict[str, list[float]],
    progress: Callable[[list[Any], str], Iterator[Any]] | None = None,
) -> Corpus:
    """The folder's clips at `sampling_rate`, from the cache or (the first time) resampled into it.

    Args:
        folder: holds `metadata.csv` or `metadata.jsonl` with `file_name` and `domain` (and, for the held-out
            set, `speaker` and `recording`), or a subfolder `train` that does.
        progress: wraps the list of rows while the cache is built.

    Raises:
        AudioInputError: no metadata, a missing column, or a file that cannot be decoded.
    """
    folder = _metadata_folder(folder)
    rows = read_metadata(folder)
    path = cache / corpus_key(folder, rows, sampling_rate, speed_copies)
    if not (path / "index.json").is_file():
        _build_corpus(folder, rows, path, sampling_rate, speed_copies, progress or (lambda items, _: iter(items)))
    return Corpus(path, sampling_rate)


def read_metadata(folder: Path) -> list[dict[str, Any]]:
    """Rows of `metadata.csv` or `metadata.jsonl`, in file order."""
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if lines.is_file():
        rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    for column in ("file_name", "domain"):
        if not rows or column not in rows[0]:
            raise AudioInputError(f'The metadata in {folder} needs a column "{column}" and at least one row.')
    return rows


def corpus_key(
    folder: Path, rows: list[dict[str, Any]], sampling_rate: int, speed_copies: dict[str, list[float]]
) -> str:
    """Name of the cache: a hash of the metadata, the files' sizes, the rate and the copies."""
    content = [CACHE_FORMAT, sampling_rate, speed_copies, rows]
    content.append([_file_size(folder / row["file_name"]) for row in rows])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise AudioFileNotFoundError(f"The metadata names {path}, which does not exist.") from error


def _metadata_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "train"):
        if any((candidate / name).is_file() for name in ("metadata.csv", "metadata.jsonl")):
            return candidate
    raise AudioInputError(f"{folder} holds no metadata.csv or metadata.jsonl, nor does its subfolder train.")


def _build_corpus(
    folder: Path,
    rows: list[dict[str, Any]],
    path: Path,
    sampling_rate: int,
    speed_copies: dict[str, list[float]],
    progress: Callable[[list[Any], str], Iterator[Any]],
) -> None:
    """Resample every clip (and its copies) into a temporary folder, then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".unfinished") as temporary:
        unfinished = Path(temporary) / path.name
        unfinished.mkdir()
        clips: list[Clip] = []
        with (unfinished / "samples.int16").open("wb") as file:
            for row in progress(rows, "resampling"):
                _append_clips(file, clips, folder, row, sampling_rate, speed_copies.get(row["domain"], []))
        index = json.dumps([dataclasses.asdict(clip) for clip in clips])
        (unfinished / "index.json").write_text(index, encoding="utf-8")
        if not path.exists():  # else another process finished the same cache first
            unfinished.rename(path)


def _append_clips(
    file: BinaryIO, clips: list[Clip], folder: Path, row: dict[str, Any], sampling_rate: int, speeds: list[float]
) -> None:
    """Write a recording and its copies to the end of the flat file and of the index."""
    wave = load_audio(folder / row["file_name"], channels=1, downmix="mean")
    for speed in (1.0, *speeds):
        samples = _to_int16(soxr.resample(wave.samples[0], wave.sampling_rate * speed, sampling_rate))
        clips.append(Clip(row["file_name"], row["domain"], clip_group(row), file.tell() // 2, len(samples), speed))
        file.write(samples.tobytes())


def _to_int16(audio: np.ndarray) -> np.ndarray:
    """What is louder than full scale is scaled down to it, never clipped."""
    return np.round(audio * (FULL_SCALE / np.abs(audio).max(initial=1.0))).astype(np.int16)


def clip_group(row: dict[str, Any]) -> str:
    """What may not lie on both sides of the split: the speaker, else the recording, else the file."""
    column = next((name for name in ("speaker", "recording") if row.get(name)), "file_name")
    return f"{column}:{row[column]}"


def hold_out(clips: list[Clip], fraction: float) -> tuple[list[Clip], list[Clip]]:
    """(training clips, validation clips): groups whose hash falls under `fraction` are held out, per domain.

    A domain whose groups all escape gives its group with the smallest hash; a domain of one group gives none.
    Copies at other speeds never validate.
    """
    held = set()
    for domain in {clip.domain for clip in clips}:
        groups = sorted({clip.group for clip in clips if clip.domain == domain}, key=unit_hash)
        chosen = [group for group in groups if unit_hash(group) < fraction] or groups[:1]
        held |= {(domain, group) for group in chosen if len(groups) > 1 and fraction > 0}
    training = [clip for clip in clips if (clip.domain, clip.group) not in held]
    validation = [clip for clip in clips if (clip.domain, clip.group) in held and clip.speed == 1.0]
    return training, validation


def unit_hash(text: str) -> float:
    """A stable number in [0, 1) for a string."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
