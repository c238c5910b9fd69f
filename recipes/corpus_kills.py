"""Runs of the corpus engine that are killed for real, on recordings, with a codec: nothing lost, nothing there twice.

The codec is loaded once; each process of a run is a fork of this one, and is killed by SIGKILL after a random time.
After some kills a run goes to its end, and its rows are compared with those of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from audiotok.errors import OutputError
from audiotok.integrations.corpus_pipeline import Done, Pipeline
from audiotok.integrations.corpus_record import Settings
from audiotok.integrations.corpus_run import CorpusRun, Share
from audiotok.integrations.corpus_shards import DATA
from audiotok.recipes.corpus_measures import Workload

# Small shards, so that there is much to lose.
PARTITIONS, SHARD_CLIPS = 3, 4
KILLS_A_CORPUS = 4


@dataclass(frozen=True)
class KillsReport:
    """What became of corpora whose runs were killed.

    Attributes:
        kills: processes that were killed at work; those that had ended by then are not counted.
        corpora: that were made with these kills, of `rows` rows each.
        lost, repeated, changed: rows that are missing, there more than once, or other than undisturbed ones. All
            must be 0.
        redone: clips that were encoded again, a kill; at worst `worst` in the mean of a corpus.
        shard_clips: most rows of a shard.
        seconds: of all.
    """

    model: str
    kills: int
    corpora: int
    rows: int
    lost: int
    repeated: int
    changed: int
    redone: float
    worst: float
    shard_clips: int
    seconds: float

    @property
    def exact(self) -> bool:
        return self.lost == self.repeated == self.changed == 0


class Counted:
    """In place of a `Pipeline`: the same one, with a byte into a pipe for each clip that is done."""

    def __init__(self, pipeline: Pipeline, pipe: int) -> None:
        self._pipeline, self._pipe = pipeline, pipe

    def run(self, clips: Iterable[dict[str, Any]], must_stop: Callable[[], bool] = lambda: False) -> Iterator[Done]:
        for done in self._pipeline.run(clips, must_stop):
            os.write(self._pipe, b".")
            yield done


class Corpora:
    """Makes corpora of one workload in forks of this process, and counts the clips that they encode."""

    def __init__(self, load: Workload) -> None:
        torch.set_num_threads(1)  # a fork has none of the others
        self.load, self.tokenizer, self.source = load, load.tokenizer(), load.source()
        self.settings = Settings(downmix=load.downmix, partitions=PARTITIONS, shard_clips=SHARD_CLIPS)
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)

    def start(self, output: Path, share: Share) -> int:
        """Fork one process of a run; it exits with 0 when its share is done."""
        if child := os.fork():
            return child
        status = 1
        try:
            run = CorpusRun(self.source, self.tokenizer, output, self.settings, share, num_workers=1)
            run.pipeline = Counted(run.pipeline, self._write)  # ty: ignore[invalid-assignment]
            run.run()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(status)

    def finish(self, output: Path) -> float:
        """One process, undisturbed; its seconds.

        Raises:
            OutputError: it failed.
        """
        began = time.monotonic()
        if (code := _exit_code(self.start(output, Share()))) != 0:
            raise OutputError(f"A run into {output} that nobody killed ended with {code}: its error is above.")
        return time.monotonic() - began

    def encoded(self) -> int:
        """Clips that were encoded since this was asked last."""
        count = 0
        while True:
            try:
                count += len(os.read(self._read, 1 << 16))
            except BlockingIOError:
                return count


def _exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def measure_kills(name: str, load: Workload, folder: str, kills: int, seed: int = 0) -> KillsReport:
    """Kill runs of one and of two processes until `kills` were; for a process of its own.

    Args:
        name: of the model, in the report.
        folder: for the corpora.
    """
    began, rng, corpora = time.monotonic(), random.Random(seed), Corpora(load)
    place = Path(folder)
    seconds = corpora.finish(place / "undisturbed")
    expected, clips = rows_of(place / "undisturbed"), corpora.encoded()
    killed = made = lost = repeated = changed = redone = 0
    worst = 0.0
    while killed < kills:
        output = place / f"killed-{made}"
        mine = _kill_some(corpora, output, min(KILLS_A_CORPUS, kills - killed), seconds, rng)
        corpora.finish(output)
        missing, twice, other = compare_rows(expected, rows_of(output))
        again = corpora.encoded() - clips
        lost, repeated, changed, redone = lost + missing, repeated + twice, changed + other, redone + again
        killed, made, worst = killed + mine, made + 1, max(worst, again / max(mine, 1))
    return KillsReport(
        name,
        killed,
        made,
        expected.num_rows,
        lost,
        repeated,
        changed,
        redone / killed if killed else 0.0,
        worst,
        SHARD_CLIPS,
        time.monotonic() - began,
    )


def _kill_some(corpora: Corpora, output: Path, kills: int, seconds: float, rng: random.Random) -> int:
    """Start a run and kill it, again and again; how many processes died of it before their work was done.

    A run that was faster than its killer leaves nothing to kill, and the corpus is given up.
    """
    killed = 0
    while killed < kills:
        world = rng.choice([1, 2])
        children = [corpora.start(output, Share(rank, world)) for rank in range(world)]
        time.sleep(rng.uniform(0.0, seconds / world))
        for child in children[: rng.choice([1, world])]:
            os.kill(child, signal.SIGKILL)
        codes = [_exit_code(child) for child in children]
        killed += codes.count(-signal.SIGKILL)
        if -signal.SIGKILL not in codes:
            break
    return killed


def rows_of(output: Path) -> pa.Table:
    """All rows of a corpus, in the order of their ids."""
    tables = [pq.read_table(path, use_threads=False) for path in sorted((output / DATA).iterdir())]
    return pa.concat_tables(tables).replace_schema_metadata(None).sort_by("id")


def compare_rows(expected: pa.Table, found: pa.Table) -> tuple[int, int, int]:
    """Rows of `expected` that are missing in `found`, that are there more than once, and that are others."""
    wanted = {row["id"]: row for row in expected.to_pylist()}
    seen: dict[str, int] = {}
    changed = 0
    for row in found.to_pylist():
        seen[row["id"]] = seen.get(row["id"], 0) + 1
        changed += row != wanted.get(row["id"])
    return len(set(wanted) - set(seen)), sum(count - 1 for count in seen.values()), changed
