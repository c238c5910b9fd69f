"""Who encodes what: clips are dealt out by a hash of their id, so neither the order of a source nor its growth, nor
the number of processes, moves a clip to another part of the corpus.

A corpus has P partitions for life. Process r of W works on the partitions p with p % W == r, and keeps the clips of
those alone in memory; of the others it keeps a count and a checksum, by which any process can tell when all is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from audiotok.errors import AudioInputError, OptionError
from audiotok.integrations.sources import Source

# Told how many clips were listed so far.
Watch = Callable[[int], None]


def id_hashes(ids: Iterable[str]) -> np.ndarray:
    """`[N]` uint64: the first 8 bytes of the BLAKE2b of each id."""
    blake2b = hashlib.blake2b
    digests = b"".join(blake2b(one.encode("utf-8", "surrogatepass"), digest_size=8).digest() for one in ids)
    return np.frombuffer(digests, "<u8")


@dataclass(frozen=True)
class Census:
    """What a source lists, partition by partition.

    Attributes:
        counts: `[P]` int64, clips.
        checksums: `[P]` uint64, their ids' hashes added up, modulo 2^64: equal for the same set in any order.
    """

    counts: np.ndarray
    checksums: np.ndarray

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def of(self, partition: int) -> dict[str, int]:
        """For JSON."""
        return {"clips": int(self.counts[partition]), "checksum": int(self.checksums[partition])}


@dataclass(frozen=True)
class Part:
    """The clips of one partition, in the order of their hashes: the same however the source lists them.

    Attributes:
        clips: columns `id`, `locator`, then the source's.
    """

    partition: int
    clips: pa.Table

    def without(self, ids: pa.Array | pa.ChunkedArray) -> Part:
        """Those clips whose ids are not among `ids`."""
        import pyarrow.compute as pc

        if not len(ids):
            return self
        return Part(self.partition, self.clips.filter(pc.invert(pc.is_in(self.clips["id"], value_set=ids))))

    def __len__(self) -> int:
        return self.clips.num_rows

    def rows(self) -> Iterator[dict]:
        for batch in self.clips.to_batches(max_chunksize=256):
            yield from batch.to_pylist()


def deal(
    source: Source, partitions: int, mine: Iterable[int], watch: Watch = lambda count: None
) -> tuple[Census, list[Part]]:
    """List a source once.

    Args:
        partitions: P.
        mine: the partitions whose clips are wanted.

    Raises:
        AudioInputError: two clips of one partition that is mine have the same id; both places are named.
    """
    wanted = np.zeros(partitions, bool)
    wanted[list(mine)] = True
    counts, checksums = np.zeros(partitions, np.int64), np.zeros(partitions, np.uint64)
    kept: list[pa.RecordBatch] = []
    hashes: list[np.ndarray] = []
    for batch in source.batches():
        found = id_hashes(batch.column("id").to_pylist())
        places = found % np.uint64(partitions)
        counts += np.bincount(places, minlength=partitions)
        np.add.at(checksums, places, found)
        own = np.flatnonzero(wanted[places])
        if len(own):
            kept.append(batch.take(pa.array(own)))
            hashes.append(found[own])
        watch(int(counts.sum()))
    return Census(counts, checksums), _parts(source, kept, hashes, np.flatnonzero(wanted), partitions)


def _parts(
    source: Source, kept: list[pa.RecordBatch], hashes: list[np.ndarray], mine: np.ndarray, partitions: int
) -> list[Part]:
    if not kept:
        return []
    clips, order_of = pa.Table.from_batches(kept), np.concatenate(hashes)
    places = order_of % np.uint64(partitions)
    order = np.lexsort((order_of, places))
    clips, order_of, places = clips.take(pa.array(order)), order_of[order], places[order]
    _refuse_twins(source, clips, order_of)
    ends = np.searchsorted(places, mine.astype(np.uint64), side="right")
    starts = np.searchsorted(places, mine.astype(np.uint64), side="left")
    ranges = zip(mine.tolist(), starts.tolist(), ends.tolist(), strict=True)
    return [Part(p, clips.slice(start, end - start)) for p, start, end in ranges if end > start]


def _refuse_twins(source: Source, clips: pa.Table, hashes: np.ndarray) -> None:
    """Clips with the same id have the same hash, so they lie side by side."""
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
        first, second = (clips.slice(place + i, 1).to_pylist()[0] for i in (0, 1))
        if first["id"] == second["id"]:
            raise AudioInputError(
                f"Two clips have the id {first['id']!r}: {source.where(first['locator'])} and "
                f"{source.where(second['locator'])}. A corpus needs ids of their own: name another column with "
                "--id-column, or rename one of them."
            )


class FirstClips(Source):
    """The first clips of another source, for a trial; a run without the limit goes on from there."""

    def __init__(self, source: Source, count: int) -> None:
        if count < 1:
            raise OptionError(f"limit={count} is not legal: a whole number from 1 on.")
        self._source, self._count = source, count
        self.kind, self.schema = source.kind, source.schema  # ty: ignore[invalid-attribute-access]

    def batches(self) -> Iterator[pa.RecordBatch]:
        left = self._count
        for batch in self._source.batches():
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return

    def open(self, locator: Any) -> Any:
        return self._source.open(locator)

    def where(self, locator: Any) -> str:
        return self._source.where(locator)

    def describe(self) -> dict[str, Any]:
        return self._source.describe()
