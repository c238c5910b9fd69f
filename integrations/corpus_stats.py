"""What is in a tokenized corpus, in one pass: how long, how much of the codebooks, how many bits and ids a second.

Entropies are those of single codes (`-sum p log2 p` over a codebook's entries), not of sequences: what a language model
would need that knows nothing but how often each code comes. With few codes a codebook they come out too small.
Shapes: Q codebooks, K entries, T frames.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from audiotok.errors import CodesError
from audiotok.integrations.corpus_reading import ClipBlock, Corpus, numbers_of
from audiotok.integrations.export_ids import BlockLayout, Watch, unwatched

CONTEXTS = (4096, 8192, 32768)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
HISTOGRAM_BINS = 48


@dataclass(frozen=True)
class BookStats:
    """One codebook; of a shared one, all streams together.

    Attributes:
        size: entries.
        used: those that occur.
        codes: how many codes.
        entropy: bits of a code.
        perplexity: `2 ** entropy`, as if so many entries were used equally.
        most_common: share of the most common entry.
    """

    size: int
    used: int
    codes: int
    entropy: float
    perplexity: float
    most_common: float


@dataclass(frozen=True)
class LayoutStats:
    """What the corpus costs a language model in one layout, without start and end tokens.

    Attributes:
        streams: ids a position.
        positions: of all clips.
        positions_per_second: of audio.
        seconds_in: audio that fits a context of so many positions.
    """

    layout: str
    streams: int
    positions: int
    positions_per_second: float
    seconds_in: dict[int, float]


@dataclass(frozen=True)
class LengthStats:
    """How long clips are, in seconds; quantiles to the length of a frame.

    Attributes:
        edges: `[bins + 1]` of the histogram, evenly spaced in the logarithm.
        clips: `[bins]` clips between two edges.
        hours: `[bins]` of audio in those.
    """

    mean: float
    shortest: float
    longest: float
    quantiles: dict[float, float]
    edges: list[float]
    clips: list[int]
    hours: list[float]


@dataclass(frozen=True)
class CorpusStats:
    """What is in a corpus.

    Attributes:
        bits_per_second: the choices that the codec's default layout leaves, each id counted as log2 of the ids that
            the layout allows in its place. Where the depth of frames varies, that counts what tells their ends.
        entropy_per_second: the same by the entropies of codes, and of depths where they vary.
        depths: `[Q]` frames that have 1 to Q codes; None unless the depth varies.
        failures, filtered: clips that are no rows; None until the run has ended.
        counts: of each codebook how often its entries occur, `[K]`; left out of `to_json`.
    """

    corpus: str
    tokenizer: str
    fingerprint: str
    splits: list[str]
    finished: bool
    failures: int | None
    filtered: int | None
    shards: int
    clips: int
    hours: float
    sampling_rate: int
    frame_rate: float
    frames: int
    codes: int
    bits_per_second: float
    entropy_per_second: float
    codebooks: list[BookStats]
    depths: list[int] | None
    layouts: list[LayoutStats]
    lengths: LengthStats
    counts: list[np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        del values["counts"]
        return values


def stats(
    corpus: str | os.PathLike[str] | Corpus,
    *,
    split: str | None = None,
    allow_unfinished: bool = False,
    watch: Watch = unwatched,
) -> CorpusStats:
    """Count a corpus.

    Args:
        corpus: a folder, or a URL that fsspec opens; or one that is open, then the next two are its own.
        split: None for all.
        allow_unfinished: count what is there of a corpus whose run has not ended.
        watch: is told how many clips of how many are done.

    Raises:
        CodesError: no corpus, without clips, or damaged.
        OptionError: no such split, or not finished.
    """
    opened = corpus if isinstance(corpus, Corpus) else Corpus(corpus, split, allow_unfinished)
    tally = _Tally(opened)
    for block in opened.blocks(["audio_length"]):
        tally.add(block)
        watch(tally.clips, opened.num_clips)
    if not tally.clips:
        raise CodesError(f"{opened.place} has no clips: there is nothing to count.")
    return tally.stats()


class _Tally:
    """Sums over blocks."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.facts = corpus, corpus.facts
        vocabulary = corpus.vocabulary
        dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)
        self._ids = BlockLayout(corpus.order, corpus.layout(), dtype)
        self.clips = self.codes = self.samples = 0
        self.shortest, self.longest = math.inf, 0
        self.of_id = np.zeros(vocabulary.num_audio_ids, np.int64)
        self.of_length = np.zeros(1, np.int64)  # clips by their number of frames
        self.of_depth = np.zeros(self.facts.num_codebooks + 1, np.int64)
        self.of_last_depth = self.of_depth.copy()  # of the last frames of clips

    def add(self, block: ClipBlock) -> None:
        if not len(block):
            return
        samples = numbers_of(block.columns["audio_length"])
        self.clips, self.codes = self.clips + len(block), self.codes + len(block.codes)
        self.samples += int(samples.sum())
        self.shortest = min(self.shortest, int(samples.min()))
        self.longest = max(self.longest, int(samples.max()))
        self.of_id += np.bincount(self._ids(block)[0], minlength=len(self.of_id))
        lengths = np.bincount(block.num_frames, minlength=len(self.of_length))
        lengths[: len(self.of_length)] += self.of_length
        self.of_length = lengths
        if block.depths is not None:
            self.of_depth += np.bincount(block.depths, minlength=len(self.of_depth))
            self.of_last_depth += np.bincount(block.depths[block.frame_bounds[1:] - 1], minlength=len(self.of_depth))

    @property
    def seconds(self) -> float:
        return self.samples / self.facts.sampling_rate

    @property
    def frames(self) -> int:
        return int(self.of_length @ np.arange(len(self.of_length)))

    def stats(self) -> CorpusStats:
        corpus, record = self.corpus, self.corpus.record
        sizes = self.facts.codebook_sizes[:1] if self.facts.shared_codebook else self.facts.codebook_sizes
        counts = np.split(self.of_id, np.cumsum(sizes)[:-1])
        books = [_book(book) for book in counts]
        entropy = sum(book.codes * book.entropy for book in books) + self.frames * _entropy(self.of_depth)
        return CorpusStats(
            corpus=corpus.place,
            tokenizer=record.tokenizer["name"],
            fingerprint=record.tokenizer["fingerprint"],
            splits=sorted({name.split for name in corpus.shards}),
            finished=record.finished,
            failures=record.totals and record.totals["failures"],
            filtered=record.totals and record.totals["filtered"],
            shards=len(corpus.shards),
            clips=self.clips,
            hours=self.seconds / 3600,
            sampling_rate=self.facts.sampling_rate,
            frame_rate=float(self.facts.frame_rate),
            frames=self.frames,
            codes=self.codes,
            bits_per_second=self._bits() / self.seconds,
            entropy_per_second=entropy / self.seconds,
            codebooks=books,
            depths=self.of_depth[1:].tolist() if self.facts.variable_depth else None,
            layouts=[self._layout(name) for name in corpus.layout_names],
            lengths=self._lengths(),
            counts=counts,
        )

    def _bits(self) -> float:
        """log2 of the ids that may stand in each place, summed."""
        sizes, frames = self.facts.codebook_sizes, self.frames
        if not self.facts.variable_depth:
            strides = self.facts.codebook_strides
            return sum(frames / stride * math.log2(size) for size, stride in zip(sizes, strides, strict=True))
        # After d codes of a frame either the next frame begins or, below Q codes, another code follows.
        after = np.array([math.log2(sizes[0] + size) for size in sizes[1:]] + [math.log2(sizes[0])])  # d = 1 to Q
        whole = self.of_depth[1:] @ np.cumsum(after)
        return float(whole - self.of_last_depth[1:] @ after + self.clips * math.log2(sizes[0]))

    def _layout(self, name: str) -> LayoutStats:
        layout, positions = self.corpus.layout(name), self.codes
        if name != "variable":
            stride, tail = self.facts.codebook_strides[0], layout.num_ids(0)
            positions = self.frames // stride * (layout.num_ids(stride) - tail) + self.clips * tail
        rate = positions / self.seconds
        seconds_in = {context: context / rate for context in CONTEXTS}
        return LayoutStats(name, layout.num_streams, positions, rate, seconds_in)

    def _lengths(self) -> LengthStats:
        hop, rate = self.facts.hop_length, self.facts.sampling_rate
        shortest, longest, until = self.shortest / rate, self.longest / rate, np.cumsum(self.of_length)
        found = {q: int(np.searchsorted(until, q * self.clips)) * hop / rate for q in QUANTILES}
        frames = np.flatnonzero(self.of_length)
        clips, seconds = self.of_length[frames], frames * hop / rate
        edges = np.geomspace(seconds[0] * 0.999, seconds[-1] * 1.001, HISTOGRAM_BINS + 1)
        return LengthStats(
            mean=self.seconds / self.clips,
            shortest=shortest,
            longest=longest,
            quantiles={q: min(max(value, shortest), longest) for q, value in found.items()},
            edges=edges.tolist(),
            clips=np.histogram(seconds, edges, weights=clips)[0].astype(int).tolist(),
            hours=np.histogram(seconds, edges, weights=clips * seconds / 3600)[0].tolist(),
        )


def _book(counts: np.ndarray) -> BookStats:
    codes, entropy = int(counts.sum()), _entropy(counts)
    most = float(counts.max()) / codes if codes else 0.0
    return BookStats(len(counts), int(np.count_nonzero(counts)), codes, entropy, 2**entropy, most)


def _entropy(counts: np.ndarray) -> float:
    """Bits, of what occurs so often."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0
