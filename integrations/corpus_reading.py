"""Reading a tokenized corpus, row group by row group, without the codec's weights.

    for clip in read("codes/", layout="interleaved"):
        clip["id"], clip["codes"], clip["input_ids"], clip["text"]

Shapes: Q codebooks, T frames, L codes. Codes lie frame by frame, coarse to fine. Clips are dealt out by a hash of
their id (`audiotok.integrations.corpus_plan`), so the order of shards and rows is a mixed one already.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiotok.clip_rows import clip_schema
from audiotok.errors import CodesError, OptionError, check_choice, check_number
from audiotok.facts import CodecFacts
from audiotok.integrations.corpus_plan import id_hashes
from audiotok.integrations.corpus_record import RECORD, Record
from audiotok.integrations.corpus_shards import DATA, ShardName, reading
from audiotok.integrations.corpus_storage import corpus_files
from audiotok.layouts import Layout, default_layout, get_layout, layout_names
from audiotok.vocabulary import AudioVocabulary

if TYPE_CHECKING:
    from audiotok.tokenizer import AudioTokenizer

CODES = ("codes", "depths")  # columns that become arrays; all others pass as they are
IDS = "input_ids"


def read(
    output: str | os.PathLike[str],
    tokenizer: AudioTokenizer | None = None,
    *,
    split: str | None = None,
    columns: Sequence[str] | None = None,
    layout: str | None = None,
    shuffle: int | None = None,
    allow_unfinished: bool = False,
) -> Clips:
    """The clips of a corpus, one dict a clip, in constant memory.

    Args:
        output: the corpus: a folder, or a URL that fsspec opens.
        tokenizer: refused unless it has the codec that made the codes; its layout is the default of `layout`.
        split: as in the names of shards; None for all.
        columns: what the dicts hold; None for every column of the corpus, and `input_ids` where there is a layout.
        layout: gives `input_ids` in this layout, int64 `[L]` (`[Q, S]` for 2-D layouts).
        shuffle: a seed: shards in another order, and the clips of a row group among themselves.
        allow_unfinished: read what is there of a corpus whose run has not ended.

    Returns:
        An iterable that may be gone through many times, and has a length. Each dict holds `id`, `codes` (int64
        `[Q, T]`; a list of `[T_q]` for codebooks of different rates), `depths` (int64 `[T]`, codecs of variable depth
        only; codes beyond are 0), `num_frames`, `audio_length` (samples at the codec's rate), `duration` (seconds)
        and the columns that the source had.

    Raises:
        CodesError: no corpus, damaged, or made by another codec than the tokenizer's.
        OptionError: an unknown split, column or layout, or the corpus is not finished.
    """
    corpus = Corpus(output, split, allow_unfinished)
    if tokenizer is not None:
        corpus.check_decodes(tokenizer)
        layout = layout or tokenizer.layout.name
    return Clips(corpus, columns, layout, shuffle)


@dataclass(frozen=True)
class ClipBlock:
    """Clips of one row group, one after another.

    Attributes:
        columns: of the clips, without codes and depths.
        codes: `[L]` unsigned, as stored; empty where they were not asked for.
        bounds: `[n + 1]` int64, clip i has `codes[bounds[i]:bounds[i + 1]]`.
        num_frames: `[n]` int64.
        depths: `[T]` uint8 of all frames; None unless the codec's depth varies.
    """

    columns: pa.Table
    codes: np.ndarray
    bounds: np.ndarray
    num_frames: np.ndarray
    depths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.num_frames)

    @property
    def ids(self) -> list[str]:
        """Where the column was asked for."""
        return self.columns["id"].to_pylist()

    @property
    def frame_bounds(self) -> np.ndarray:
        """`[n + 1]` int64, where clips begin among the frames."""
        return bounds_of(self.num_frames)

    def take(self, order: np.ndarray) -> ClipBlock:
        """The clips in another order."""
        lengths, frames = np.diff(self.bounds)[order], self.num_frames[order]
        depths = None if self.depths is None else self.depths[_runs(self.frame_bounds[order], frames)]
        codes = self.codes[_runs(self.bounds[order], lengths)] if len(self.codes) else self.codes
        return ClipBlock(self.columns.take(pa.array(order)), codes, bounds_of(lengths), frames, depths)


def bounds_of(lengths: np.ndarray) -> np.ndarray:
    """`[n + 1]` int64: where parts of these lengths begin, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of stretches, one behind another."""
    bounds = bounds_of(lengths)
    return np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)


class StoredOrder:
    """Which codebook each stored code belongs to.

    Attributes:
        books: `[P]` the codebook of each place in a coarse frame.
        places: `[P]` where the code at each place stands in a coarse frame sorted by codebook, then time.
        repeats: `[Q]` codes of each codebook in a coarse frame.
    """

    def __init__(self, facts: CodecFacts) -> None:
        self.facts, strides = facts, facts.codebook_strides
        self.repeats = np.array([strides[0] // stride for stride in strides])
        # In a vocabulary of as many entries as codes, the ids of one coarse frame are those places.
        small = AudioVocabulary(tuple(self.repeats.tolist()))
        self.places = default_layout(small, strides).codes_to_ids([np.arange(count) for count in self.repeats])
        self.books = np.searchsorted(np.cumsum(self.repeats), self.places, side="right")

    @property
    def period(self) -> int:
        """P, codes in a coarse frame."""
        return len(self.places)

    def frames(self, block: ClipBlock) -> np.ndarray:
        """`[N, P]` view of the codes, coarse frame by coarse frame, where the depth does not vary."""
        return block.codes.reshape(-1, self.period)

    def books_of(self, depths: np.ndarray) -> np.ndarray:
        """`[L]` the codebook of each code of frames of these depths."""
        return np.arange(depths.sum(dtype=np.int64)) - np.repeat(bounds_of(depths)[:-1], depths)

    def check(self, block: ClipBlock) -> None:
        """Raise `CodesError` unless these are whole frames of this codec."""
        if block.num_frames.min(initial=1) < 1:
            raise CodesError(f"row {block.num_frames.argmin()} has {block.num_frames.min()} frames")
        per_clip = block.num_frames // self.facts.codebook_strides[0] * self.period
        if block.depths is not None:
            if block.depths.min(initial=1) < 1 or block.depths.max(initial=1) > self.facts.num_codebooks:
                raise CodesError(f"a depth is outside 1 to {self.facts.num_codebooks}")
            per_clip = np.diff(bounds_of(block.depths)[block.frame_bounds])
        wrong = np.flatnonzero(per_clip != np.diff(block.bounds))
        if len(wrong):
            row = int(wrong[0])
            raise CodesError(
                f"row {row} has {np.diff(block.bounds)[row]} codes where its {block.num_frames[row]} frames have "
                f"{per_clip[row]}"
            )
        self._check_range(block)

    def _check_range(self, block: ClipBlock) -> None:
        sizes = np.array(self.facts.codebook_sizes)
        if block.codes.max(initial=0) < sizes.min():
            return
        books = np.resize(self.books, len(block.codes)) if block.depths is None else self.books_of(block.depths)
        wrong = np.flatnonzero(block.codes >= sizes[books])
        if len(wrong):
            book = books[wrong[0]]
            raise CodesError(f"code {block.codes[wrong[0]]} is outside the {sizes[book]} entries of codebook {book}")

    def clip(self, block: ClipBlock, row: int) -> tuple[Any, np.ndarray | None]:
        """Codes and depths of one clip, as the codec has them."""
        flat = block.codes[block.bounds[row] : block.bounds[row + 1]].astype(np.int64)
        if block.depths is not None:
            depths = block.depths[block.frame_bounds[row] : block.frame_bounds[row + 1]].astype(np.int64)
            codes = np.zeros((len(depths), self.period), np.int64)
            codes[np.arange(self.period) < depths[:, None]] = flat
            return np.ascontiguousarray(codes.T), depths
        streams = np.split(flat.reshape(-1, self.period)[:, np.argsort(self.places)], np.cumsum(self.repeats)[:-1], 1)
        if self.period == len(self.repeats):
            return np.concatenate([stream.T for stream in streams]), None
        return [stream.reshape(-1) for stream in streams], None


class Corpus:
    """A tokenized corpus, opened for reading.

    Args:
        output: a folder, or a URL that fsspec opens.
        split: as in the names of shards; None for all.
        allow_unfinished: take what is there of a corpus whose run has not ended.

    Attributes:
        record: audiotok.json.
        facts, vocabulary: of the codec that made the codes.
        shards: names of those of the split, in order.
        place: for people.
    """

    def __init__(
        self, output: str | os.PathLike[str], split: str | None = None, allow_unfinished: bool = False
    ) -> None:
        self.files = corpus_files(output)
        self.place = self.files.place
        self.record = self._read_record(allow_unfinished)
        self.facts = facts_of(self.record.tokenizer)
        self.vocabulary = AudioVocabulary(self.facts.codebook_sizes, self.facts.shared_codebook)
        self.order = StoredOrder(self.facts)
        found = [name for name in map(ShardName.parse, self.files.names(DATA)) if name]
        self.splits = tuple(sorted({name.split for name in found}))
        if split is not None:
            check_choice("split", split, self.splits)
        wanted = (name for name in found if split in (None, name.split))
        self.shards = sorted(wanted, key=lambda name: (name.split, name.partition, name.number))

    def _read_record(self, allow_unfinished: bool) -> Record:
        record = Record.read(self.files)
        if record is None:
            raise CodesError(
                f"{self.place} is no corpus (it has no {RECORD}): give the folder that `audiotok tokenize` wrote."
            )
        if not record.finished and not allow_unfinished:
            raise OptionError(
                f"{self.place} is not finished: run the same `audiotok tokenize` command again, or take what is there "
                "with allow_unfinished=True (--allow-unfinished)."
            )
        return record

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns on the disk."""
        return (*clip_schema(self.facts).names, *self.record.columns)

    @property
    def layout_names(self) -> tuple[str, ...]:
        """Layouts that fit, the codec's default first."""
        return layout_names(self.vocabulary, self.facts.codebook_strides, self.facts.variable_depth)

    def layout(self, name: str | None = None) -> Layout:
        """A layout for these codes; None for the codec's default."""
        fit = (self.vocabulary, self.facts.codebook_strides, self.facts.variable_depth)
        return default_layout(*fit) if name is None else get_layout(name, *fit)

    def check_decodes(self, tokenizer: AudioTokenizer) -> None:
        """Raise `CodesError` unless the tokenizer has the codec that made these codes, in whatever layout."""
        self.record.check_decodes(tokenizer, self.place)

    @cached_property
    def num_clips(self) -> int:
        """Rows, from the footers of the shards."""
        return sum(self._num_rows(name) for name in self.shards)

    def _num_rows(self, name: ShardName) -> int:
        with reading(self.files.path(name.data)), self.files.open(name.data) as file:
            return pq.read_metadata(file).num_rows

    def blocks(
        self, columns: Sequence[str] = (), codes: bool = True, shuffle: int | None = None
    ) -> Iterator[ClipBlock]:
        """The clips, row group by row group.

        Args:
            columns: beside the codes.
            codes: whether they are read.
            shuffle: a seed, as for `read`.

        Raises:
            CodesError: a shard is damaged, or no shard of this codec; it is named.
        """
        rng = None if shuffle is None else np.random.default_rng(shuffle)
        shards = self.shards if rng is None else [self.shards[i] for i in rng.permutation(len(self.shards))]
        for name in shards:
            for block in self.blocks_of(name, columns, codes):
                yield block if rng is None else block.take(rng.permutation(len(block)))

    def find(self, ids: Collection[str], columns: Sequence[str] = ()) -> Iterator[tuple[ClipBlock, int]]:
        """The clips with these ids, each as a row of a block: those that are there, in the order of the shards.

        A clip's partition is told by its id. Of its shards all ids are read, and codes of those that hold a clip.
        """
        wanted, partitions = set(ids), self.record.settings["partitions"]
        places = set((id_hashes(wanted) % np.uint64(partitions)).tolist())
        for name in self.shards:
            if name.partition in places and not wanted.isdisjoint(self.ids_of(name)):
                for block in self.blocks_of(name, tuple(dict.fromkeys(("id", *columns)))):
                    yield from ((block, row) for row, one in enumerate(block.ids) if one in wanted)

    def ids_of(self, name: ShardName) -> list[str]:
        return [one for block in self.blocks_of(name, ("id",), codes=False) for one in block.ids]

    def blocks_of(self, name: ShardName, columns: Sequence[str], codes: bool = True) -> Iterator[ClipBlock]:
        with reading(self.files.path(name.data)), self.files.open(name.data) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                yield self._block(parquet, group, columns, codes)

    def _block(self, parquet: pq.ParquetFile, group: int, columns: Sequence[str], codes: bool) -> ClipBlock:
        stored = [name for name in CODES if codes and name in self.columns]
        # One column takes nearly all of the time, so threads would only be started in vain.
        table = parquet.read_row_group(group, [*{*columns, *stored, "num_frames"}], use_threads=False)
        num_frames = numbers_of(table["num_frames"])
        block = ClipBlock(table.select(list(columns)), np.empty(0, np.uint16), bounds_of(0 * num_frames), num_frames)
        if not codes:
            return block
        flat, bounds = _lists(table["codes"])
        depths = _lists(table["depths"])[0] if "depths" in stored else None
        block = replace(block, codes=flat, bounds=bounds, depths=depths)
        self.order.check(block)
        return block


def facts_of(tokenizer: Mapping[str, Any]) -> CodecFacts:
    """Facts of the codec that made a corpus, from what audiotok.json says of its tokenizer.

    Raises:
        CodesError: it does not say them, or not all.
    """
    try:
        facts: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in tokenizer["facts"].items()}
        return CodecFacts(**facts)
    except (KeyError, TypeError, AttributeError) as error:
        raise CodesError(f"{RECORD} does not say the facts of the codec ({error}): restore it.") from error


class Clips:
    """What `read` returns: an iterable of dicts with a length."""

    def __init__(
        self,
        corpus: Corpus,
        columns: Sequence[str] | None = None,
        layout: str | None = None,
        shuffle: int | None = None,
    ) -> None:
        if shuffle is not None:
            check_number("shuffle", shuffle, 0)
        self.corpus, self.shuffle = corpus, shuffle
        self._layout = None if layout is None else corpus.layout(layout)
        legal = (*corpus.columns, *([IDS] if layout else []))
        self.columns = legal if columns is None else tuple(columns)
        for name in self.columns:
            if name == IDS and layout is None:
                raise OptionError(f'The column "{IDS}" needs a layout: choose {" or ".join(corpus.layout_names)}.')
            check_choice("columns", name, legal)

    def __len__(self) -> int:
        return self.corpus.num_clips

    def __iter__(self) -> Iterator[dict[str, Any]]:
        plain = [name for name in self.columns if name not in (*CODES, IDS)]
        needs_codes = len(plain) < len(self.columns)
        for block in self.corpus.blocks(plain, needs_codes, self.shuffle):
            rows = block.columns.to_pylist() if plain else [{} for _ in range(len(block))]
            for row, values in enumerate(rows):
                if needs_codes:
                    values |= self._codes(block, row)
                yield {name: values[name] for name in self.columns}

    def _codes(self, block: ClipBlock, row: int) -> dict[str, Any]:
        codes, depths = self.corpus.order.clip(block, row)
        values = {"codes": codes, "depths": depths}
        return values if self._layout is None else values | {IDS: self._layout.codes_to_ids(codes, depths)}


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """All values of a column of lists `[L]`, and where each list begins `[n + 1]`."""
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
    if lists.null_count or lists.values.null_count:
        raise CodesError("a row has no codes")
    offsets = np.from_dlpack(lists.offsets).astype(np.int64)
    return np.from_dlpack(lists.flatten()), offsets - offsets[0]


def numbers_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers; not through `to_numpy`, which would load pandas."""
    if column.null_count:
        raise CodesError("a row lacks a number")
    return np.from_dlpack(column.combine_chunks())
