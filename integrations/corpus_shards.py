"""The shards of a corpus: Parquet files of some hundred clips, each whole or not there, and what failed beside them.

    data/train-00007-00003.parquet              split, partition, number
    .run/failures/train-00007-00003.jsonl       clips that failed while that shard was made, and why

A shard's number says nothing but when it was written; which clips are done is read from the ids in it. So a run that
was killed loses the shard in hand and nothing else, and a clip that is in a shard is never encoded again.
"""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiotok.errors import AudioTokError, CodesError, OutputError
from audiotok.integrations.corpus_storage import CorpusFiles

DATA, FAILURES = "data", ".run/failures"
METADATA_KEY = b"audiotok_shard"  # not that of codes.parquet, which says what made it
_NAME = re.compile(r"(?P<split>.+)-(?P<partition>\d{5,})-(?P<number>\d{5,})\.(parquet|jsonl)")


@dataclass(frozen=True)
class Failure:
    """A clip that is no row, and why: `error` names the class of the error, or of the filter."""

    id: str
    error: str
    reason: str
    source: str

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass
class Certified:
    """How the codes of some clips were made sure of; see `audiotok.certified`."""

    clips: int = 0
    reencoded: int = 0
    smallest_margin: float | None = None

    def add(self, other: Certified) -> None:
        margins = [m for m in (self.smallest_margin, other.smallest_margin) if m is not None]
        self.clips += other.clips
        self.reencoded += other.reencoded
        self.smallest_margin = min(margins, default=None)


@dataclass
class ShardTotals:
    """What a shard holds, in its own footer, so that a corpus of any size is summed up without reading codes.

    Attributes:
        used: of each codebook a bitmap of the entries that occur, `[K]` bool.
        made_with: dtype, device and versions of the process that encoded it.
    """

    rows: int = 0
    frames: int = 0
    codes: int = 0
    seconds: float = 0.0
    certified: Certified = field(default_factory=Certified)
    used: list[np.ndarray] = field(default_factory=list)
    made_with: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        packed = [base64.b64encode(zlib.compress(np.packbits(book).tobytes())).decode() for book in self.used]
        sizes = [len(book) for book in self.used]
        return json.dumps(asdict(self) | {"used": packed, "codebook_sizes": sizes}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ShardTotals:
        values = json.loads(data)
        sizes = values.pop("codebook_sizes")
        packed = [np.frombuffer(zlib.decompress(base64.b64decode(book)), np.uint8) for book in values["used"]]
        used = [np.unpackbits(book)[:size].astype(bool) for book, size in zip(packed, sizes, strict=True)]
        return cls(**values | {"used": used, "certified": Certified(**values["certified"])})


@dataclass(frozen=True)
class ShardName:
    split: str
    partition: int
    number: int

    @classmethod
    def parse(cls, file: str) -> ShardName | None:
        found = _NAME.fullmatch(file.rpartition("/")[2])
        return found and cls(found["split"], int(found["partition"]), int(found["number"]))

    @property
    def stem(self) -> str:
        return f"{self.split}-{self.partition:05d}-{self.number:05d}"

    @property
    def data(self) -> str:
        return f"{DATA}/{self.stem}.parquet"

    @property
    def failures(self) -> str:
        return f"{FAILURES}/{self.stem}.jsonl"


class Shards:
    """The shards of one split of a corpus, as they are on the disk."""

    def __init__(self, files: CorpusFiles, split: str) -> None:
        self.files, self.split = files, split

    def list(self) -> dict[int, list[ShardName]]:
        """Partition → its shards with rows, in order."""
        return self._found(DATA)

    def numbers(self) -> dict[int, int]:
        """Partition → the number of its next shard."""
        found = (self._found(folder) for folder in (DATA, FAILURES))
        numbers: dict[int, int] = defaultdict(int)
        for names in found:
            for partition, shards in names.items():
                numbers[partition] = max(numbers[partition], shards[-1].number + 1)
        return numbers

    def ids(self, names: Iterable[ShardName]) -> pa.ChunkedArray:
        """Ids of the clips that are rows of these shards."""
        columns = [self._read(name, ["id"])["id"] for name in names]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())

    def failures(self, partition: int | None = None) -> dict[str, Failure]:
        """Clip id → its failure, the latest; of one partition, or of all."""
        found: dict[str, Failure] = {}
        for place, names in sorted(self._found(FAILURES).items()):
            if partition is None or place == partition:
                for name in names:
                    found |= {failure.id: failure for failure in self._failures_of(name)}
        return found

    def totals(self, name: ShardName) -> ShardTotals:
        """From the footer alone."""
        with self.files.open(name.data) as file, reading(self.files.path(name.data)):
            metadata = pq.ParquetFile(file).schema_arrow.metadata or {}
            return ShardTotals.from_json(metadata[METADATA_KEY])

    def _found(self, folder: str) -> dict[int, list[ShardName]]:
        names = (ShardName.parse(file) for file in self.files.names(folder))
        found: dict[int, list[ShardName]] = defaultdict(list)
        for name in sorted((n for n in names if n and n.split == self.split), key=lambda n: (n.partition, n.number)):
            found[name.partition].append(name)
        return found

    def _read(self, name: ShardName, columns: list[str]) -> pa.Table:
        with self.files.open(name.data) as file, reading(self.files.path(name.data)):
            return pq.read_table(file, columns=columns)

    def _failures_of(self, name: ShardName) -> Iterator[Failure]:
        for line in (self.files.read(name.failures) or b"").decode().splitlines():
            yield Failure(**json.loads(line))


class ShardInHand:
    """Rows and failures that are not on the disk yet."""

    def __init__(self, name: ShardName) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.failures: list[Failure] = []
        self.certified = Certified()
        self.seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self.rows or self.failures)

    def next(self) -> ShardInHand:
        return ShardInHand(ShardName(self.name.split, self.name.partition, self.name.number + 1))

    def write(self, files: CorpusFiles, schema: pa.Schema, codes: CodeCounter, made_with: dict[str, str]) -> None:
        """Failures first: a clip that is in neither file is encoded again, and one in both is a row."""
        if self.failures:
            files.write(self.name.failures, "".join(failure.line() for failure in self.failures).encode())
        if not self.rows:
            return
        totals = ShardTotals(
            rows=len(self.rows),
            frames=sum(row["num_frames"] for row in self.rows),
            codes=sum(len(row["codes"]) for row in self.rows),
            seconds=sum(row["duration"] for row in self.rows),
            certified=self.certified,
            used=codes.used(self.rows),
            made_with=made_with,
        )
        table = pa.Table.from_pylist(self.rows, schema.with_metadata({METADATA_KEY: totals.to_json()}))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        files.write(self.name.data, buffer.getvalue())


class CodeCounter:
    """Which entries of each codebook occur in rows."""

    def __init__(self, tokenizer: Any) -> None:
        from audiotok.clip_rows import FrameOrder

        self._order, self._facts = FrameOrder(tokenizer), tokenizer.codec.facts

    def used(self, rows: list[dict[str, Any]]) -> list[np.ndarray]:
        sizes = self._facts.codebook_sizes[:1] if self._facts.shared_codebook else self._facts.codebook_sizes
        used = [np.zeros(size, bool) for size in sizes]
        for row in rows:
            for book, codes in self._streams(row):
                used[book][codes] = True
        return used

    def _streams(self, row: dict[str, Any]) -> Iterator[tuple[int, np.ndarray]]:
        flat = np.asarray(row["codes"], np.int64)
        if self._facts.shared_codebook or self._facts.num_codebooks == 1:
            yield 0, flat
            return
        depths = None if row.get("depths") is None else np.asarray(row["depths"], np.int64)
        codes, depths = self._order.restore(flat, row["num_frames"], depths)
        for book, stream in enumerate(codes):
            yield book, stream if depths is None else stream[depths > book]


@contextmanager
def reading(path: str) -> Generator[None]:
    """Turn what is wrong with a shard into an error that names it."""
    try:
        yield
    except (pa.ArrowException, CodesError, KeyError, ValueError, TypeError, zlib.error) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if isinstance(error, AudioTokError):
            raise
        if error.errno is None:  # Arrow's: a checksum, or what is no Parquet
            raise _damaged(path, error) from error
        raise OutputError(f"{path} cannot be read ({error.strerror}): check its rights.") from error


def _damaged(path: str, error: Exception) -> CodesError:
    reason = " ".join(str(error).split())
    return CodesError(
        f"{path} is damaged or no shard of this corpus ({reason}): remove it, and run the same `audiotok tokenize` "
        "command again; its clips are then encoded anew."
    )
