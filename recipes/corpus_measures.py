"""What the benchmark of the corpus engine measures on recordings: its speed beside what it replaces.

Each side of a comparison is a process of its own (the engine: a command and those that it starts), so that none finds
another's caches warm and each has the threads that its user would give it. Sides take turns, and medians are kept.

The work proper of a process lasts from its first clip to its last row; of several processes the longest counts. For
`audiotok tokenize` that is read off its files: from the lock that it takes once its model is loaded (so listing the
source and hashing the weights is in it) to its last shard.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from audiotok import AudioTokenizer, AutoAudioTokenizer
from audiotok.audio import open_audio
from audiotok.errors import OutputError
from audiotok.integrations.corpus_plan import deal
from audiotok.integrations.corpus_reading import read
from audiotok.integrations.corpus_run import Share
from audiotok.integrations.corpus_shards import DATA, ShardName
from audiotok.integrations.corpus_storage import RUN
from audiotok.integrations.sources import Source, open_source
from audiotok.recipes.plain import plain_rival

THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Workload:
    """Recordings, and what encodes them.

    Attributes:
        model: folder of a saved tokenizer.
        manifest: a .jsonl with the id and path of each recording.
        processes: of the engine, one thread each.
        downmix: as in `load_audio`.
    """

    model: str
    manifest: str
    processes: int
    downmix: str | None

    @property
    def partitions(self) -> int:
        """As `audiotok tokenize` would choose."""
        return max(16, 4 * self.processes)

    def source(self) -> Source:
        return open_source(self.manifest, columns=[], audio_root="/")

    def tokenizer(self) -> AudioTokenizer:
        return AutoAudioTokenizer.from_pretrained(self.model)

    def paths(self) -> list[str]:
        return [json.loads(line)["path"] for line in Path(self.manifest).read_text(encoding="utf-8").splitlines()]


@contextmanager
def workload(tokenizer: AudioTokenizer, recordings: Sequence[Path], processes: int) -> Iterator[tuple[Workload, Path]]:
    """The tokenizer and the list of recordings in a temporary folder, and that folder."""
    with tempfile.TemporaryDirectory(prefix="audiotok-benchmark-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder / "model")
        lines = [{"id": str(i), "path": str(path.resolve())} for i, path in enumerate(recordings)]
        manifest = folder / "recordings.jsonl"
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        downmix = "mean" if tokenizer.codec.facts.channels == 1 else None
        yield Workload(str(folder / "model"), str(manifest), processes, downmix), folder


# Processes


@contextmanager
def threads_of_children(count: int | None) -> Iterator[None]:
    """Processes started in the block have so many threads in PyTorch's kernels; None leaves it to PyTorch."""
    before = os.environ.pop(THREADS_VARIABLE, None)
    if count is not None:
        os.environ[THREADS_VARIABLE] = str(count)
    try:
        yield
    finally:
        os.environ.pop(THREADS_VARIABLE, None)
        if before is not None:
            os.environ[THREADS_VARIABLE] = before


def in_fresh_processes(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], threads: int | None = 1) -> list:
    """`function(*call)` of each call, all at once, each in a new process."""
    with threads_of_children(threads):
        pools = [ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) for _ in calls]
        try:
            futures = [pool.submit(function, *call) for pool, call in zip(pools, calls, strict=True)]
            return [future.result() for future in futures]
        finally:
            for pool in pools:
                pool.shutdown()


# Speed


@dataclass(frozen=True)
class CodesBeside:
    """Codes of a corpus beside those of the plain recipe.

    Attributes:
        total: of the corpus.
        differing: of clips that have as many samples in both: these should be 0.
        cut_clips: clips that have another number of samples there: `soxr.resample` rounds N * rate, so that a clip may
            lose its last sample, where audiotok keeps all.
        cut_codes: of those clips, codes that differ.
    """

    total: int = 0
    differing: int = 0
    cut_clips: int = 0
    cut_codes: int = 0


@dataclass(frozen=True)
class SideTimes:
    """Seconds of one side of the comparison.

    Attributes:
        work: from the first clip to the last row.
        command: from the start of Python to its end: imports and the loading of the model, too.
        cpu: of all its processes, over the whole command.
    """

    work: float
    command: float
    cpu: float

    @property
    def around(self) -> float:
        """Imports, the loading of the model, and the end."""
        return self.command - self.work


@dataclass(frozen=True)
class SpeedReport:
    """The engine beside its rivals.

    Attributes:
        audio_seconds, clips: of the corpus.
        failed: recordings that the engine could not read.
        sides: name → medians.
        codes: of the corpus, beside those of the plain recipe.
    """

    model: str
    processes: int
    clips: int
    failed: int
    audio_seconds: float
    sides: dict[str, SideTimes]
    codes: CodesBeside

    def rate(self, side: str) -> float:
        """Audio seconds per second of the work proper."""
        return self.audio_seconds / self.sides[side].work

    def ratio(self, side: str) -> float:
        """How many times as fast as this side the engine is."""
        return self.sides[side].work / self.sides[ENGINE].work


# Names of the sides.
ENGINE, PLAIN, WHOLE = "tokenize", "plain map", "plain map, whole model"
MODEL_ONLY, READING = "model only", "reading only"


def measure_speed(name: str, load: Workload, folder: Path, repeats: int) -> SpeedReport:
    """Run all sides in turn.

    Args:
        name: of the model, in the report.
        folder: for what the sides write.
    """
    tokenizer = load.tokenizer()
    plain_rival(tokenizer.codec)  # refuses a family without one before the work
    sides: dict[str, Callable[[Path], float]] = {
        ENGINE: lambda out: engine_work(load, out),
        PLAIN: lambda out: _longest(in_fresh_processes(plain_recipe, [(load, out, False)], threads=None)),
        WHOLE: lambda out: _longest(in_fresh_processes(plain_recipe, [(load, out, True)], threads=None)),
        MODEL_ONLY: lambda out: _longest(in_fresh_processes(encode_held, _shares(load))),
        READING: lambda out: _longest(in_fresh_processes(read_share, _shares(load))),
    }
    seen: dict[str, list[SideTimes]] = {side: [] for side in sides}
    for turn in range(repeats):
        for side in sides if turn % 2 == 0 else reversed(sides):
            seen[side].append(_timed(sides[side], folder / f"{side}-{turn}"))
    corpus = folder / f"{ENGINE}-0"
    seconds = [clip["duration"] for clip in read(corpus, columns=["duration"])]
    codes = compare_codes(corpus, folder / f"{PLAIN}-0", tokenizer.codec.facts.variable_depth)
    return SpeedReport(
        model=name,
        processes=load.processes,
        clips=len(seconds),
        failed=len(load.paths()) - len(seconds),
        audio_seconds=sum(seconds),
        sides={side: _medians(times) for side, times in seen.items()},
        codes=codes,
    )


def _shares(load: Workload) -> list[tuple[Workload, int]]:
    return [(load, rank) for rank in range(load.processes)]


def _longest(spans: Sequence[tuple[float, float]]) -> float:
    return max(end - begin for begin, end in spans)


def _timed(side: Callable[[Path], float], output: Path) -> SideTimes:
    began, cpu = time.perf_counter(), _cpu_of_children()
    work = side(output)
    return SideTimes(work, time.perf_counter() - began, _cpu_of_children() - cpu)


def _cpu_of_children() -> float:
    """Seconds of processes that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _medians(times: Sequence[SideTimes]) -> SideTimes:
    columns = ("work", "command", "cpu")
    return SideTimes(*(statistics.median(getattr(one, column) for one in times) for column in columns))


def engine_work(load: Workload, output: Path) -> float:
    """Seconds of the work proper of `audiotok tokenize`.

    Raises:
        OutputError: the command failed.
    """
    words = ["tokenize", load.manifest, "--model", load.model, "--output-dir", str(output), "--audio-root", "/"]
    words += ["--num-processes", str(load.processes), "--partitions", str(load.partitions), "--columns", "", "--quiet"]
    words += [] if load.downmix is None else ["--downmix", load.downmix]
    with threads_of_children(None):
        done = subprocess.run([sys.executable, "-m", "audiotok", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OutputError(f"audiotok {' '.join(words)} ended with exit code {done.returncode}: {done.stderr.strip()}")
    return _longest(engine_spans(output, load.processes))


def engine_spans(output: Path, processes: int) -> list[tuple[float, float]]:
    """When each process of a run into a new folder took its lock and wrote its last shard, by the files' times."""
    ends: dict[int, float] = {}
    for path in (output / DATA).iterdir():
        name = ShardName.parse(path.name)
        assert name is not None
        rank = name.partition % processes
        ends[rank] = max(ends.get(rank, 0.0), path.stat().st_mtime)
    return [(_lock(output, rank, processes).stat().st_mtime, end) for rank, end in sorted(ends.items())]


def _lock(output: Path, rank: int, processes: int) -> Path:
    """What the owner of a lock says of itself: written once."""
    return output / RUN / f"rank-{rank:05d}-of-{processes:05d}.json"


def plain_recipe(load: Workload, output: Path, decodes: bool) -> tuple[float, float]:
    """What users of `datasets` write today: one clip at a time through the model. When it began and ended.

    Args:
        decodes: call the whole model, as many do, and throw the audio away.
    """
    import soundfile
    import soxr
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    tokenizer, began = load.tokenizer(), []
    model, extractor, rate = plain_rival(tokenizer.codec), tokenizer.feature_extractor, tokenizer.sampling_rate

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        began.append(time.time())
        samples, recorded_rate = soundfile.read(row["path"], dtype="float32", always_2d=True)
        mono = soxr.resample(samples.mean(axis=1), recorded_rate, rate)
        values = extractor(mono, sampling_rate=rate, return_tensors="pt")["input_values"][0, 0]
        with torch.no_grad():
            (codes,) = model.encode([values[: len(mono)]])
            if decodes:
                model.decode([codes])
        return {"codes": codes.tolist(), "num_samples": len(mono)}

    paths = load.paths()
    rows = Dataset.from_dict({"id": [str(i) for i in range(len(paths))], "path": paths})
    rows.map(tokenize).to_parquet(str(output))
    return began[0], time.time()


def encode_held(load: Workload, rank: int) -> tuple[float, float]:
    """The ceiling: a process's share of clips, decoded already, through the same calls of the encoder."""
    torch.set_num_threads(1)
    encoder = load.tokenizer().encoder()
    clips = list(decoded_share(load, rank, encoder.codec.facts.sampling_rate))
    began = time.time()
    for clip in clips:
        encoder.encode_batch([clip])
    return began, time.time()


def read_share(load: Workload, rank: int) -> tuple[float, float]:
    """Decoding and resampling alone, in one thread."""
    rate = load.tokenizer().sampling_rate
    began = time.time()
    for _ in decoded_share(load, rank, rate):
        pass
    return began, time.time()


def decoded_share(load: Workload, rank: int, rate: int) -> Iterator[np.ndarray]:
    """The clips of one process, in the order in which the engine takes them."""
    source, channels = load.source(), 1 if load.downmix else None
    share = Share(rank, load.processes)
    _, parts = deal(source, load.partitions, share.partitions(load.partitions))
    for part in parts:
        for clip in part.rows():
            with open_audio(
                source.open(clip["locator"]), target_rate=rate, channels=channels, downmix=load.downmix
            ) as stream:
                yield stream.read()


def compare_codes(corpus: Path, plain: Path, variable_depth: bool) -> CodesBeside:
    """A corpus beside the Parquet file of the plain recipe.

    A clip of another number of frames, or that only one of them has, differs in all of its codes.
    """
    others = {row["id"]: row for row in pq.read_table(plain).to_pylist()}
    total = differing = cut_clips = cut_codes = 0
    for clip in read(corpus):
        mine, other = clip["codes"], others.pop(clip["id"], None)
        if variable_depth:
            mine = np.where(np.arange(len(mine))[:, None] < clip["depths"], mine, -1)
        count = count_differing(mine, None if other is None else np.array(other["codes"]))
        total += mine.size
        if other is not None and other["num_samples"] != clip["audio_length"]:
            cut_clips, cut_codes = cut_clips + 1, cut_codes + count
        else:
            differing += count
    differing += sum(np.size(row["codes"]) for row in others.values())
    return CodesBeside(total, differing, cut_clips, cut_codes)


def count_differing(mine: np.ndarray, other: np.ndarray | None) -> int:
    if other is None:
        return mine.size
    if mine.shape != other.shape:
        return max(mine.size, other.size)
    return int(np.count_nonzero(mine != other))
