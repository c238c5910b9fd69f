"""A run that tokenizes a corpus: exactly once, whatever happens to it.

Every process of a run lists the source, keeps the clips of its own partitions, takes away those that are rows or
failures already, and encodes the rest shard by shard. Nothing but whole shards is ever seen, so any process may be
killed at any moment; the same command goes on, with as many processes as it likes. Whoever finds all partitions done
writes the sums into audiotok.json.

Two runs in one folder: see `corpus_lock`.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from audiotok.clip_rows import ClipRows
from audiotok.errors import AudioInputError, OptionError, OutputError, OutputExistsError
from audiotok.integrations.corpus_lock import sole_run
from audiotok.integrations.corpus_pipeline import Done, Pipeline
from audiotok.integrations.corpus_plan import Census, Part, deal
from audiotok.integrations.corpus_record import RECORD, Record, Settings, Totals, describe_machine
from audiotok.integrations.corpus_shards import CodeCounter, ShardInHand, ShardName, Shards
from audiotok.integrations.corpus_storage import CorpusFiles, corpus_files
from audiotok.integrations.sources import Source

if TYPE_CHECKING:
    from audiotok.integrations.corpus_precision import Flips
    from audiotok.tokenizer import AudioTokenizer

DONE, ERRORS, TOKENIZER = ".run/done", "errors.jsonl", "tokenizer"
SAVED = ("audio_tokenizer.json", "config.json", "preprocessor_config.json", "README.md")  # of it, beside weights
FIRST_CLIPS = 50  # if so many fail and none does not, it is not the clips that are bad
FILTERS = ("min_duration", "max_duration", "min_sampling_rate", "max_silence")


@dataclass
class Share:
    """Which process of how many this one is."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise OptionError(
                f"rank {self.rank} of {self.world_size} processes is not legal: ranks go from 0 to the number of "
                "processes less one."
            )

    def partitions(self, count: int) -> range:
        return range(self.rank, count, self.world_size)


@dataclass
class Progress:
    """How far a process is.

    Attributes:
        phase: "listing", "encoding", "finishing" or "done".
        clips, seconds: encoded or failed by this process, in this run; there are `total` clips to do.
        already: clips of its partitions that were done before.
    """

    phase: str = "listing"
    listed: int = 0
    total: int = 0
    already: int = 0
    clips: int = 0
    failures: int = 0
    seconds: float = 0.0
    shards: int = 0
    reencoded: int = 0
    began: float = field(default_factory=time.time)
    padding: float = 0.0


@dataclass
class Outcome:
    """What a process did, and whether the corpus is complete."""

    progress: Progress
    finished: bool
    stopped: bool
    totals: dict[str, Any] | None = None
    precision: dict[str, Any] | None = None


class CorpusRun:
    """One process of a run.

    Args:
        source: what is tokenized.
        tokenizer: on its device.
        output: the corpus: a folder, or a URL that fsspec opens.
        settings: of the corpus; those of a corpus that exists must be the same.
        share: of the work.
        batch_seconds: of audio in a batch; None encodes clip by clip.
        num_workers: threads that decode recordings.
        max_errors: stop when more clips than this have failed in this run.
        retry_errors: try again what failed before.
        save_weights: put the codec's weights into the corpus, so that it decodes without anything else.
        precision: what a precision below float32 was measured to do to codes, for the record.
        watch: is told the progress, often.
        must_stop: asked before each clip; True finishes what is in hand and ends the run.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: AudioTokenizer,
        output: str | os.PathLike[str],
        settings: Settings,
        share: Share | None = None,
        batch_seconds: float | None = None,
        num_workers: int = 2,
        max_errors: int | None = None,
        retry_errors: bool = False,
        save_weights: bool = False,
        precision: Flips | None = None,
        watch: Callable[[Progress], None] = lambda progress: None,
        must_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source, self.tokenizer, self.settings, self.share = source, tokenizer, settings, share or Share()
        self.files = corpus_files(output)
        self.shards = Shards(self.files, settings.split)
        self.max_errors, self.retry_errors, self.save_weights = max_errors, retry_errors, save_weights
        self.precision = precision
        self.watch, self.must_stop, self.progress = watch, must_stop, Progress()
        encoder = tokenizer.encoder(certify=settings.certify, batch_size=1 if batch_seconds is None else None)
        self.pipeline = Pipeline(source, encoder, settings.filters, settings.downmix, batch_seconds, num_workers)
        self.rows = ClipRows(tokenizer)
        self.schema = pa.schema([*self.rows.schema, *source.schema])
        self.counter = CodeCounter(tokenizer)
        self.made_with = describe_machine(str(tokenizer.codec.device)) | {
            "dtype": str(tokenizer.codec.dtype).removeprefix("torch.")
        }

    def run(self) -> Outcome:
        """Encode what is left of this process's share.

        Raises:
            OutputExistsError: the corpus was made with other settings, or another run is at work in it.
            AudioInputError: the source cannot be listed, ids are double, or too many clips failed.
            OutputNotWritableError: no rights, or no space; what is written stays.
        """
        with ExitStack() as stack:
            self._refuse_foreign_files()
            stack.enter_context(sole_run(self.files, self.share.rank, self.share.world_size))
            record = self._open_record()
            census, parts = deal(self.source, self.settings.partitions, self._mine(), self._listed)
            todo = self._remaining(parts)
            self.progress.total = sum(map(len, todo))
            if self.progress.total == 0 and record.finished and self._all_done(census):
                self.progress.phase = "done"
                return Outcome(self.progress, True, False, record.totals, record.precision)
            try:
                self._encode(todo, census, {part.partition for part in parts})
            except AudioInputError:  # too many failures: where to read of them is in the message
                self._gather_errors()
                raise
            stopped = self.must_stop()
            finished = not stopped and self._all_done(census)
            totals = self._finish(record) if finished else self._gather_errors()
            self.progress.phase = "done"
            self.watch(self.progress)
            return Outcome(self.progress, finished, stopped, totals, record.precision)

    # Before the work

    def _mine(self) -> range:
        return self.share.partitions(self.settings.partitions)

    def _listed(self, count: int) -> None:
        self.progress.listed = count
        self.watch(self.progress)

    def _refuse_foreign_files(self) -> None:
        if Record.read(self.files) is not None:
            return
        foreign = [name for name in [*self.files.names(), *self.files.names("data")] if not name.startswith(".")]
        if foreign:
            raise OutputExistsError(
                f"{self.files.place} holds other files ({', '.join(foreign[:3])}) and no {RECORD}: choose an empty or "
                "new folder."
            )

    def _open_record(self) -> Record:
        """The record of the corpus and the folder `tokenizer`; of a new corpus they are written first of all."""
        mine = Record.of(self.tokenizer, self.settings, self.source.describe(), self.source.schema)
        found = Record.read(self.files)
        if found is None:
            mine.write(self.files)
        else:
            found.check_same(mine, self.files.place)
        self._save_tokenizer()
        record = found or mine
        if self.precision is not None and record.precision is None:
            record.precision = asdict(self.precision)
            record.write(self.files)
        return record

    def _save_tokenizer(self) -> None:
        """Those of its files that are not there yet; weights on request."""
        there = {name.rpartition("/")[2] for name in self.files.names(TOKENIZER)}
        has_weights = any(name.endswith(".safetensors") for name in there)
        if there.issuperset(SAVED) and (has_weights or not self.save_weights):
            return
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder, self.save_weights)
            for path in sorted(Path(folder).iterdir()):
                if path.name not in there:
                    self.files.write(f"{TOKENIZER}/{path.name}", path.read_bytes())

    def _remaining(self, parts: list[Part]) -> list[Part]:
        """What is neither a row nor, unless it is tried again, a failure."""
        found, todo = self.shards.list(), []
        failed = {} if self.retry_errors else self.shards.failures()
        for part in parts:
            left = part.without(self.shards.ids(found.get(part.partition, [])))
            left = left.without(pa.array(list(failed), pa.string()))
            self.progress.already += len(part) - len(left)
            if len(left):
                todo.append(left)
        return todo

    # The work

    def _encode(self, todo: list[Part], census: Census, mine: set[int]) -> None:
        self.progress.phase = "encoding"
        self.watch(self.progress)
        numbers = self.shards.numbers()
        left = {part.partition: len(part) for part in todo}
        with ShardWriter(self._write) as writer:
            for partition in sorted(mine - set(left)):
                writer.put(lambda p=partition: self._mark_done(p, census))
            hands = {p: ShardInHand(ShardName(self.settings.split, p, numbers.get(p, 0))) for p in left}
            try:
                for done in self.pipeline.run(iter_with_partition(todo), self.must_stop):
                    partition = done.clip["__partition"]
                    hand = hands[partition]
                    self._add(hand, done)
                    left[partition] -= 1
                    if self._is_full(hand):
                        writer.put(lambda hand=hand: self._write(hand))
                        hands[partition] = hand.next()
                    if not left[partition]:
                        last = hands.pop(partition)
                        writer.put(lambda hand=last: self._write(hand))
                        writer.put(lambda p=partition: self._mark_done(p, census))
                    self.watch(self.progress)
            finally:
                for hand in hands.values():  # where the run ends before them, what they hold is kept
                    writer.put(lambda hand=hand: self._write(hand))

    def _is_full(self, hand: ShardInHand) -> bool:
        count = len(hand.rows) + len(hand.failures)
        return count >= self.settings.shard_clips or hand.seconds >= self.settings.shard_seconds

    def _add(self, hand: ShardInHand, done: Done) -> None:
        clip = {name: done.clip[name] for name in self.source.schema.names}
        self.progress.clips += 1
        if done.failure is not None:
            hand.failures.append(done.failure)
            self._count_failure(done.failure)
            return
        assert done.codes is not None and done.certified is not None
        row = self.rows.row(done.clip["id"], done.codes)
        hand.rows.append({**row, **clip})
        hand.certified.add(done.certified)
        hand.seconds += row["duration"]
        self.progress.seconds += row["duration"]
        self.progress.reencoded += done.certified.reencoded

    def _count_failure(self, failure: Any) -> None:
        if failure.error in FILTERS:
            return
        self.progress.failures += 1
        if self.progress.failures == self.progress.clips == FIRST_CLIPS:
            raise AudioInputError(
                f"Each of the first {FIRST_CLIPS} clips failed, the last one so: {failure.source}: {failure.reason} "
                "Nothing but these failures was written; mend the source, and run the same command with --retry-errors."
            )
        if self.max_errors is not None and self.progress.failures > self.max_errors:
            raise AudioInputError(
                f"{self.progress.failures} clips failed, more than --max-errors {self.max_errors}, the last one so: "
                f"{failure.source}: {failure.reason} What is encoded stays; see {self.files.path(ERRORS)}."
            )

    def _write(self, hand: ShardInHand) -> None:
        if hand:
            hand.write(self.files, self.schema, self.counter, self.made_with)
            self.progress.shards += 1

    def _mark_done(self, partition: int, census: Census) -> None:
        """All of its clips, as they are listed now, are rows or failures."""
        name, data = _done_name(self.settings.split, partition), json.dumps(census.of(partition)).encode()
        if self.files.read(name) != data:
            self.files.write(name, data)

    # After the work

    def _all_done(self, census: Census) -> bool:
        marks = (self.files.read(_done_name(self.settings.split, p)) for p in range(self.settings.partitions))
        return all(
            mark is not None and json.loads(mark) == census.of(p) for p, mark in enumerate(marks) if census.counts[p]
        )

    def _finish(self, record: Record) -> dict[str, Any]:
        """The sums of all shards, and all failures in one file. Every process that comes here writes the same."""
        self.progress.phase = "finishing"
        self.watch(self.progress)
        names = list(chain.from_iterable(self.shards.list().values()))
        totals = Totals()
        totals.sum_up([self.shards.totals(name) for name in names])
        self._gather_errors(totals)
        values = json.loads(json.dumps(totals, default=vars))
        if not record.finished or record.totals != values:
            record.finished, record.totals = True, values
            record.write(self.files)
        return values

    def _gather_errors(self, totals: Totals | None = None) -> dict[str, Any] | None:
        """errors.jsonl: the failures that no later try has mended."""
        failures = self.shards.failures()
        if failures:
            found = self.shards.list()
            rows = set(chain.from_iterable(self.shards.ids(names).to_pylist() for names in found.values()))
            failures = {key: failure for key, failure in failures.items() if key not in rows}
        data = "".join(failures[key].line() for key in sorted(failures)).encode()
        if self.files.read(ERRORS) != data:
            self.files.write(ERRORS, data)
        if totals is not None:
            totals.filtered = sum(failure.error in FILTERS for failure in failures.values())
            totals.failures = len(failures) - totals.filtered
        return None


class ShardWriter:
    """A thread that writes while the model works. What it raises is raised by the next `put`, or at the end."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=4)
        self._failed: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, name="audiotok-write")

    def put(self, task: Callable[[], None]) -> None:
        self._raise()
        self._tasks.put(task)

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._tasks.put(None)
        self._thread.join()
        if error[0] is None:
            self._raise()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._failed.done():
                continue  # nothing after a write that failed: a partition must not be marked done
            try:
                task()
            except BaseException as problem:
                self._failed.set_exception(problem)

    def _raise(self) -> None:
        if self._failed.done():
            self._failed.result()


def iter_with_partition(parts: list[Part]) -> Iterator[dict[str, Any]]:
    """The clips of all parts, each with the partition that it belongs to."""
    for part in parts:
        for clip in part.rows():
            yield clip | {"__partition": part.partition}


def remove_corpus(output: str | os.PathLike[str]) -> None:
    """For --overwrite: remove the files of a corpus, and nothing else; its record goes last.

    Raises:
        OutputError: the folder is no corpus.
    """
    files = corpus_files(output)
    if Record.read(files) is None:
        if files.names() or files.names("data"):
            raise OutputError(f"{files.place} is no corpus (it has no {RECORD}): it is left as it is.")
        return
    for folder in ("data", ".run/failures", DONE, TOKENIZER):
        for name in files.names(folder):
            files.remove(name)
    for name in (ERRORS, RECORD):
        files.remove(name)


def _done_name(split: str, partition: int) -> str:
    return f"{DONE}/{split}-{partition:05d}.json"


__all__ = ["CorpusFiles", "CorpusRun", "Outcome", "Progress", "Share", "remove_corpus"]
