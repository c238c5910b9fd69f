"""What the benchmark of the corpus engine measures without a codec: planning, writing, resuming and reading windows.

The clips are numbers and their codes are drawn beforehand, so that only the engine's own work is timed; everything
but the source and the encoding is `CorpusRun` as it comes. Stages run in processes of their own, whose memory at its
peak is theirs alone.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiotok import AudioTokenizer
from audiotok.clip_rows import ClipRows
from audiotok.encoding import ClipCodes
from audiotok.integrations.corpus_pipeline import Done
from audiotok.integrations.corpus_plan import deal
from audiotok.integrations.corpus_record import Settings
from audiotok.integrations.corpus_run import CorpusRun
from audiotok.integrations.corpus_shards import Certified, CodeCounter, ShardInHand, ShardName
from audiotok.integrations.corpus_storage import corpus_files
from audiotok.integrations.export_formats import export
from audiotok.integrations.export_memmap import IDS_FILE
from audiotok.integrations.sources import BATCH_CLIPS, Source, clip_batch
from audiotok.integrations.training_windows import TrainingWindows
from audiotok.recipes.benchmark_measures import Timing, measure_in_turn, peak_memory
from audiotok.recipes.benchmark_models import MINI, load_tokenizer
from audiotok.recipes.corpus_measures import in_fresh_processes

# Of clips of 1 s and of 10 s, in frames of auv-mini.
SHORT_FRAMES, LONG_FRAMES = 50, 500
DRAWN = 1 << 20


class NumberedClips(Source):
    """Clips that are not there: ids and nothing else."""

    kind, schema = "numbers", pa.schema([])

    def __init__(self, count: int) -> None:
        self.count = count

    def batches(self) -> Iterator[pa.RecordBatch]:
        for first in range(0, self.count, BATCH_CLIPS):
            numbers = range(first, min(first + BATCH_CLIPS, self.count))
            ids = pa.array([f"speaker-{i % 1000:03d}/clip-{i:09d}.flac" for i in numbers], pa.string())
            yield clip_batch(ids, pa.array(numbers, pa.int64()), [], self.schema)

    def open(self, locator: int) -> bytes:
        return b""

    def where(self, locator: int) -> str:
        return f"clip {locator}"

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": None, "columns": {}}


class DrawnCodes:
    """In place of a `Pipeline`: codes from a table, at no cost.

    Args:
        frames: of each clip.
    """

    def __init__(self, tokenizer: AudioTokenizer, frames: int, seed: int = 0) -> None:
        facts, rng = tokenizer.codec.facts, np.random.default_rng(seed)
        self.codes = np.stack([rng.integers(size, size=DRAWN) for size in facts.codebook_sizes])
        self.frames, self.samples = frames, facts.held_samples(frames)

    def clip(self, number: int) -> ClipCodes:
        start = number * 7919 % (DRAWN - self.frames)
        return ClipCodes(self.codes[:, start : start + self.frames], self.samples)

    def run(self, clips: Iterable[dict[str, Any]], must_stop: Callable[[], bool] = lambda: False) -> Iterator[Done]:
        for clip in clips:
            yield Done(clip, self.clip(clip["locator"]), certified=Certified(1))


def drawn_run(tokenizer: AudioTokenizer, count: int, frames: int, output: Path) -> CorpusRun:
    """A run as it comes, but for the source and the codec."""
    run = CorpusRun(NumberedClips(count), tokenizer, output, Settings())
    run.pipeline = DrawnCodes(tokenizer, frames)  # ty: ignore[invalid-assignment]
    return run


# Rows


@dataclass(frozen=True)
class Stage:
    """Seconds of one stage, and MiB of its process: before it, and at its peak."""

    seconds: float
    loaded: float
    peak: float


@dataclass(frozen=True)
class RowsReport:
    """A corpus of `rows` short rows: listing and dealing them, writing all, and the same command once more."""

    rows: int
    codes: int
    planning: Stage
    writing: Stage
    resuming: Stage


def measure_rows(count: int) -> RowsReport:
    """Each stage in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="audiotok-benchmark-") as folder:
        stages = [in_fresh_processes(stage, [(count, folder)])[0] for stage in (plan_rows, write_rows, write_rows)]
    return RowsReport(count, count * SHORT_FRAMES, *stages)


def plan_rows(count: int, folder: str) -> Stage:
    """List and deal all clips, and keep them."""
    source, loaded, began = NumberedClips(count), peak_memory(), time.perf_counter()
    census, parts = deal(source, Settings().partitions, range(Settings().partitions))
    seconds = time.perf_counter() - began
    assert census.total == sum(map(len, parts)) == count
    return Stage(seconds, loaded, peak_memory())


def write_rows(count: int, folder: str) -> Stage:
    """A whole run; over a finished corpus, one that finds nothing to do."""
    run = drawn_run(load_tokenizer(MINI), count, SHORT_FRAMES, Path(folder) / "corpus")
    loaded, began = peak_memory(), time.perf_counter()
    outcome = run.run()
    seconds = time.perf_counter() - began
    assert outcome.finished and outcome.totals is not None and outcome.totals["rows"] == count
    return Stage(seconds, loaded, peak_memory())


# Writing


@dataclass(frozen=True)
class WritingRow:
    """Seconds of a thread that writes a shard of `rows` rows of so many codes.

    Attributes:
        shard: from rows to a file that is on the disk.
        parquet: Arrow's part of it, from a table to bytes in memory.
        size: bytes of the file for each code.
    """

    codes_per_row: int
    rows: int
    shard: Timing
    parquet: Timing
    size: float

    @property
    def codes(self) -> int:
        return self.rows * self.codes_per_row


def measure_writing(rows: int, repeats: int) -> list[WritingRow]:
    """Shards of `rows` rows, short and long ones."""
    tokenizer = load_tokenizer(MINI)
    return [_writing_row(tokenizer, rows, frames, repeats) for frames in (SHORT_FRAMES, LONG_FRAMES)]


def _writing_row(tokenizer: AudioTokenizer, rows: int, frames: int, repeats: int) -> WritingRow:
    drawn, maker, counter = DrawnCodes(tokenizer, frames), ClipRows(tokenizer), CodeCounter(tokenizer)
    hand = ShardInHand(ShardName("train", 0, 0))
    hand.rows = [maker.row(f"clip-{i:09d}.flac", drawn.clip(i)) for i in range(rows)]
    with tempfile.TemporaryDirectory(prefix="audiotok-benchmark-") as folder:
        files = corpus_files(folder)
        hand.write(files, maker.schema, counter, {})
        path = Path(files.path(hand.name.data))
        table, size = pq.read_table(path), path.stat().st_size
        times = measure_in_turn(
            {
                "shard": lambda: hand.write(files, maker.schema, counter, {}),
                "parquet": lambda: pq.write_table(table, io.BytesIO(), compression="zstd", write_page_checksum=True),
            },
            repeats,
        )
    codes = len(hand.rows[0]["codes"])
    return WritingRow(codes, rows, times["shard"], times["parquet"], size / (codes * rows))


# Windows


@dataclass(frozen=True)
class WindowsReport:
    """Reading training windows out of a memmap export, and making it.

    Attributes:
        ids: of the export.
        window, batch: ids of a window, windows of a batch.
        read: ids that are read in each of the passes below.
        exporting: from the corpus into the file, once.
        batches: shuffled windows through `TrainingWindows.batch`.
        items: through `__getitems__`, as a loader of torch asks for them.
        copy: the same windows as slices of the file turned into int64, and nothing else: what memory allows.
    """

    ids: int
    window: int
    batch: int
    read: int
    exporting: Timing
    batches: Timing
    items: Timing
    copy: Timing


def measure_windows(clips: int, repeats: int, window: int = 4096, batch: int = 32) -> WindowsReport:
    """Windows of a corpus of so many drawn clips of 10 s."""
    with tempfile.TemporaryDirectory(prefix="audiotok-benchmark-") as name:
        folder = Path(name)
        drawn_run(load_tokenizer(MINI), clips, LONG_FRAMES, folder / "corpus").run()
        made = measure_in_turn({"export": lambda: export(folder / "corpus", "memmap", folder / "ids")}, 1, warm=True)
        windows = TrainingWindows(folder / "ids", window, seed=1)
        groups = [range(i, min(i + batch, len(windows))) for i in range(0, len(windows), batch)]
        times = measure_in_turn(
            {
                "batches": lambda: [windows.batch(group) for group in groups],
                "items": lambda: [windows.__getitems__(group) for group in groups],
                "copy": _copier(folder / "ids", windows, groups),
            },
            repeats,
        )
        return WindowsReport(windows.sidecar["ids"], window, batch, len(windows) * window, made["export"], **times)


def _copier(folder: Path, windows: TrainingWindows, groups: Sequence[range]) -> Callable[[], Any]:
    """Reads as many windows in another order, and does nothing else."""
    flat = np.memmap(folder / IDS_FILE, np.dtype(windows.sidecar["dtype"]), "r")
    starts = np.random.default_rng(0).permutation(len(windows)) * windows.stride

    def batch(group: range) -> np.ndarray:
        return np.stack([flat[first : first + windows.window] for first in starts[group]]).astype(np.int64)

    return lambda: [batch(group) for group in groups]
