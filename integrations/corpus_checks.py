"""Whether a corpus is what it says: each shard whole, each row consistent, each id there once, and codes those that
its tokenizer gives.

Every byte of every shard is read (Parquet pages have checksums), but no recording, except those of a sample that is
encoded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audiotok.clip_rows import FrameOrder
from audiotok.errors import AudioInputError, AudioTokError, CodesError
from audiotok.integrations.corpus_plan import id_hashes
from audiotok.integrations.corpus_reading import ClipBlock, Corpus
from audiotok.integrations.corpus_shards import ShardName, Shards, ShardTotals
from audiotok.integrations.sources import Source, open_source

if TYPE_CHECKING:
    from audiotok.tokenizer import AudioTokenizer

REOPENED = ("audio_column", "id_column", "split", "audio_root")  # what `Source.describe` says of `open_source`


@dataclass
class Findings:
    """What a check saw.

    Attributes:
        problems: sentences; none where the corpus is what it says.
        sample: ids of some clips, chosen by a hash: the same for the same corpus and seed.
    """

    shards: int = 0
    clips: int = 0
    codes: int = 0
    problems: list[str] = field(default_factory=list)
    sample: list[str] = field(default_factory=list)


def check_shards(
    corpus: Corpus, sample: int = 0, seed: int = 0, watch: Callable[[int, int], None] = lambda done, total: None
) -> Findings:
    """Read all shards of a corpus.

    Args:
        sample: clips to choose for `encode_again`.
        watch: is told the shards that were read, and how many there are.
    """
    findings, chosen = Findings(), Sample(sample, seed)
    files, settings = corpus.files, corpus.record.settings
    seen: set[str] = set()
    place = None
    for name in corpus.shards:
        if (name.split, name.partition) != place:  # ids of one partition at a time are held
            place, seen = (name.split, name.partition), set()
        try:
            totals, found = Shards(files, name.split).totals(name), ShardTotals()
            for block in corpus.blocks_of(name, ("id", "audio_length", "duration")):
                ids = block.ids
                findings.problems += [f"{name.data}: {text}" for text in _row_problems(corpus, name, block, ids, seen)]
                seen.update(ids)
                chosen.offer(ids)
                found.rows += len(block)
                found.frames += int(block.num_frames.sum())
                found.codes += len(block.codes)
                found.seconds += float(pc.sum(block.columns["duration"]).as_py() or 0)
            findings.problems += [f"{name.data}: {text}" for text in _sum_problems(totals, found)]
            findings.clips, findings.codes = findings.clips + found.rows, findings.codes + found.codes
        except AudioTokError as error:
            findings.problems.append(str(error))
        findings.shards += 1
        watch(findings.shards, len(corpus.shards))
    findings.problems += _record_problems(corpus, findings, settings)
    findings.sample = chosen.ids
    return findings


def _row_problems(corpus: Corpus, name: ShardName, block: ClipBlock, ids: list[str], seen: set[str]) -> Iterator[str]:
    """Codes and frames were compared when the block was read."""
    facts, partitions = corpus.facts, corpus.record.settings["partitions"]
    lengths = block.columns["audio_length"].to_pylist()
    for one, length, frames in zip(ids, lengths, block.num_frames.tolist(), strict=True):
        if facts.num_frames(length) != frames:
            yield f"{one!r} has {frames} frames where its {length} samples give {facts.num_frames(length)}"
        if one in seen:
            yield f"{one!r} is there twice"
    if len(set(ids)) < len(ids):
        yield "an id is there twice"
    strangers = np.flatnonzero(id_hashes(ids) % np.uint64(partitions) != name.partition)
    if len(strangers):
        yield f"{ids[strangers[0]]!r} does not belong to partition {name.partition}"


def _sum_problems(stated: ShardTotals, found: ShardTotals) -> Iterator[str]:
    for key in ("rows", "frames", "codes"):
        if getattr(stated, key) != getattr(found, key):
            yield f"it has {getattr(found, key):,} {key} and says {getattr(stated, key):,}"
    if abs(stated.seconds - found.seconds) > 1e-6 * max(1.0, found.seconds):
        yield f"it lasts {found.seconds:.3f} s and says {stated.seconds:.3f}"


def _record_problems(corpus: Corpus, findings: Findings, settings: dict[str, Any]) -> Iterator[str]:
    totals = corpus.record.totals
    if totals is None or findings.problems:
        return
    for key, found in (("shards", findings.shards), ("rows", findings.clips), ("codes", findings.codes)):
        if totals[key] != found:
            yield f"audiotok.json counts {totals[key]:,} {key}, and there are {found:,}"


class Sample:
    """The clips with the least hashes, whatever the order in which they are offered."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._kept: list[tuple[bytes, str]] = []

    def offer(self, ids: list[str]) -> None:
        key = self._seed.to_bytes(8, "little", signed=True)
        hashed = [(hashlib.blake2b(one.encode(), digest_size=8, key=key).digest(), one) for one in ids]
        self._kept = sorted(self._kept + hashed)[: self._size] if self._size else []

    @property
    def ids(self) -> list[str]:
        return [one for _, one in self._kept]


@dataclass(frozen=True)
class Again:
    """A clip that was encoded again. `differing` counts its codes that are others now; -1 where their number is."""

    id: str
    codes: int
    differing: int


def source_of(corpus: Corpus) -> Source:
    """The source that the corpus was made from, opened again.

    Raises:
        AudioInputError: it was an object in memory, or is no longer there.
    """
    said = corpus.record.source
    place = said.get("path") or said.get("name")
    if place is None:
        raise AudioInputError("The source of this corpus was no file: name one with --source.")
    options = {key: said[key] for key in REOPENED if said.get(key) is not None}
    return open_source(place, columns=list(corpus.record.columns), **options)


def encode_again(corpus: Corpus, tokenizer: AudioTokenizer, source: Source, ids: list[str]) -> Iterator[Again]:
    """Encode some clips anew, and compare.

    Raises:
        CodesError: the tokenizer has another fingerprint.
        AudioInputError: a clip is not in the source, or cannot be decoded.
    """
    corpus.check_decodes(tokenizer)
    encoder, order = tokenizer.encoder(**corpus.record.tokenizer["options"]), FrameOrder(tokenizer)
    stored, downmix = _stored(corpus, ids), corpus.record.settings["downmix"]
    for one, locator in _located(source, ids):
        (clip,) = encoder.encode([source.open(locator)], downmix=downmix)
        flat, _ = order.flatten(clip.codes, clip.depths)
        mine = stored[one]
        yield Again(one, len(mine), int((flat != mine).sum()) if len(flat) == len(mine) else -1)


def _located(source: Source, ids: list[str]) -> Iterator[tuple[str, Any]]:
    wanted, left = pa.array(ids, pa.string()), set(ids)
    for batch in source.batches():
        for row in batch.filter(pc.is_in(batch["id"], value_set=wanted)).select(["id", "locator"]).to_pylist():
            left.discard(row["id"])
            yield row["id"], row["locator"]
    if left:
        raise AudioInputError(
            f"{source.describe().get('path', 'The source')} no longer has the clip {min(left)!r}: name the place where "
            "the recordings are now with --source."
        )


def _stored(corpus: Corpus, ids: list[str]) -> dict[str, np.ndarray]:
    """Codes of these clips, `[L]` each."""
    found = {
        block.ids[row]: block.codes[block.bounds[row] : block.bounds[row + 1]].astype(np.int64)
        for block, row in corpus.find(ids)
    }
    if missing := set(ids) - set(found):
        raise CodesError(f"{corpus.place} has no clip {min(missing)!r}.")
    return found
