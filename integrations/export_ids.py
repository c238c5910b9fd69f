"""Ids of all clips of a block at once: what layouts make of one clip, without a step in Python for each.

    for block in Documents(corpus, layout="interleaved", bos=True, eos=True):
        block.document(i)

Equal to `Layout.codes_to_ids`, clip by clip. A document is a clip, or a piece of one where a window was asked for.
Shapes: n documents, Q codebooks, T frames, N coarse frames, P codes in one, L ids, S steps of a 2-D layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from audiotok.errors import OptionError, check_number
from audiotok.integrations.corpus_reading import ClipBlock, Corpus, StoredOrder, bounds_of, numbers_of
from audiotok.layouts import Layout

# Is told `(clips done, clips in all)`.
Watch = Callable[[int, int], None]


def unwatched(done: int, total: int) -> None:
    """A `Watch` that looks away."""


@dataclass(frozen=True)
class IdBlock:
    """Ids of some documents, one after another.

    Attributes:
        ids: `[L]`, or `[S, Q]` for a 2-D layout, in the smallest unsigned type that holds the vocabulary.
        bounds: `[n + 1]` int64, document i has `ids[bounds[i]:bounds[i + 1]]`.
        pieces: `[n]` int64, the place of each document in its clip: all 0 where no window cuts clips.
        audio_lengths: `[n]` int64, samples that each document stands for.
        columns: of the documents' clips.
    """

    ids: np.ndarray
    bounds: np.ndarray
    pieces: np.ndarray
    audio_lengths: np.ndarray
    columns: pa.Table

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def starts_clip(self) -> np.ndarray:
        """`[n]` bool, False for a document that goes on with the clip of the one before."""
        return self.pieces == 0

    def document(self, i: int) -> np.ndarray:
        """Ids of one document as layouts give them, `[L]` or `[Q, S]`."""
        return self.ids[self.bounds[i] : self.bounds[i + 1]].T


@dataclass
class Counts:
    """What went into an export."""

    documents: int = 0
    clips: int = 0
    ids: int = 0
    audio_samples: int = 0

    def add(self, block: IdBlock) -> None:
        self.documents += len(block)
        self.clips += int(block.starts_clip.sum())
        self.ids += block.ids.size
        self.audio_samples += int(block.audio_lengths.sum())


class Documents:
    """The clips of a corpus as ids, block by block.

    Args:
        corpus: where they come from.
        layout: its name; None for the codec's default.
        bos, eos: `<|audio_start|>` before, `<|audio_end|>` behind each clip (1-D layouts).
        window: clips of more ids (steps, for a 2-D layout) than this, specials included, are cut into documents on
            the edges of frames; None keeps clips whole.
        shuffle: a seed, as for `read`.
        columns: of the clips, that pass along.
        watch: is told the progress, after each block.

    Raises:
        OptionError: a layout that does not fit, specials for a 2-D layout, or a window that holds no frame.
    """

    def __init__(
        self,
        corpus: Corpus,
        layout: str | None = None,
        bos: bool = False,
        eos: bool = False,
        window: int | None = None,
        shuffle: int | None = None,
        columns: Sequence[str] = (),
        watch: Watch = unwatched,
    ) -> None:
        if shuffle is not None:
            check_number("shuffle", shuffle, 0)
        self.corpus, self.shuffle, self.columns, self.watch = corpus, shuffle, tuple(columns), watch
        self.layout, self.bos, self.eos, self.window = corpus.layout(layout), bool(bos), bool(eos), window
        self.dtype = np.dtype(np.uint16 if corpus.vocabulary.size <= 1 << 16 else np.uint32)
        self._lay_out = BlockLayout(corpus.order, self.layout, self.dtype)
        if self.layout.is_2d and (bos or eos):
            raise OptionError(
                f'Start and end tokens do not fit layout="{self.layout.name}", whose streams are parallel: leave them '
                "out, or choose a 1-D layout."
            )
        least = self._frame + self._around
        if window is not None and window < least:
            raise OptionError(
                f"window={window} is not legal: a frame in layout {self.layout.name}, with what goes around it, takes "
                f"up to {least}; give at least that."
            )

    @property
    def _tail(self) -> int:
        """Steps over those of the frames (`delay`)."""
        return self.layout.num_ids(0) if self.layout.is_2d else 0

    @property
    def _frame(self) -> int:
        """Ids of a coarse frame, the deepest one where the depth varies; steps, for a 2-D layout."""
        return 1 if self.layout.is_2d else self.corpus.order.period

    @property
    def frame_ids(self) -> int:
        """Ids of a whole frame where frames stand one behind another; 1 where they do not (`coarse_first`, 2-D)."""
        return 1 if self.layout.name == "coarse_first" else self._frame

    @property
    def _around(self) -> int:
        """Ids of a document beside those of its frames."""
        return self._tail + self.bos + self.eos

    def __iter__(self) -> Iterator[IdBlock]:
        total, done = self.corpus.num_clips, 0
        columns = tuple(dict.fromkeys((*self.columns, "audio_length")))
        for block in self.corpus.blocks(columns, shuffle=self.shuffle):
            yield self._documents(block)
            done += len(block)
            self.watch(done, total)

    def _documents(self, block: ClipBlock) -> IdBlock:
        first_frames = np.zeros(len(block), np.int64)
        if self.window is not None:
            block, first_frames = self._cut(block)
        ids, bounds = self._lay_out(block)
        starts, nth = first_frames == 0, np.arange(len(block))
        if self.bos or self.eos:
            ids, bounds = self._with_specials(ids, bounds, starts)
        pieces = nth - np.maximum.accumulate(np.where(starts, nth, 0))
        lengths = self._samples(block, first_frames)
        return IdBlock(ids, bounds, pieces, lengths, block.columns.select(list(self.columns)))

    def _samples(self, block: ClipBlock, first_frames: np.ndarray) -> np.ndarray:
        """Of each document: those of its frames, as far as the clip has them."""
        facts, clips = self.corpus.facts, numbers_of(block.columns["audio_length"])
        held = np.maximum(block.num_frames * facts.hop_length - facts.tail_samples, 0)
        return np.minimum(held, np.maximum(clips - first_frames * facts.hop_length, 0))

    def _with_specials(self, ids: np.ndarray, bounds: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A start token before the first document of each clip, an end token behind its last."""
        wanted, vocabulary, ends = [self.bos, self.eos], self.corpus.vocabulary, np.append(starts[1:], True)
        places = np.stack([bounds[:-1][starts], bounds[1:][ends]])[wanted]  # clip by clip once transposed
        tokens = np.array([vocabulary.bos_token_id, vocabulary.eos_token_id], ids.dtype)[wanted]
        ids = np.insert(ids, places.T.reshape(-1), np.tile(tokens, places.shape[1]))
        return ids, bounds + bounds_of(np.add(starts & self.bos, ends & self.eos, dtype=np.int64))

    # Windows

    def _cut(self, block: ClipBlock) -> tuple[ClipBlock, np.ndarray]:
        """The block in pieces that fit the window, and the place of each in its clip, in frames."""
        room = (self.window or 0) - self._around
        starts = self._even_cuts(block, room) if block.depths is None else _greedy_cuts(block, room)
        clips = np.searchsorted(block.frame_bounds, starts, side="right") - 1
        frame_bounds = np.append(starts, block.frame_bounds[-1])
        if block.depths is None:
            bounds = frame_bounds // self.corpus.facts.codebook_strides[0] * self.corpus.order.period
        else:
            bounds = bounds_of(block.depths)[frame_bounds]
        columns = block.columns.take(pa.array(clips))
        pieces = replace(block, columns=columns, bounds=bounds, num_frames=np.diff(frame_bounds))
        return pieces, starts - block.frame_bounds[clips]

    def _even_cuts(self, block: ClipBlock, room: int) -> np.ndarray:
        """Frames of the block at which pieces of at most `room` ids begin, where all frames take as many."""
        per_piece = room // self._frame * self.corpus.facts.codebook_strides[0]
        counts = -(-block.num_frames // per_piece)
        nth = np.arange(counts.sum()) - np.repeat(bounds_of(counts)[:-1], counts)
        return np.repeat(block.frame_bounds[:-1], counts) + nth * per_piece


def _greedy_cuts(block: ClipBlock, room: int) -> np.ndarray:
    """Frames of the block at which pieces of at most `room` ids begin, as many frames in each as fit."""
    assert block.depths is not None
    ids_before, cuts = bounds_of(block.depths), []
    for first, end in zip(block.frame_bounds[:-1].tolist(), block.frame_bounds[1:].tolist(), strict=True):
        while first < end:
            cuts.append(first)
            first = int(np.searchsorted(ids_before, ids_before[first] + room, side="right")) - 1
    return np.array(cuts, np.int64)


class BlockLayout:
    """A layout of all clips of a block at once: `block` → ids and where documents begin among them."""

    def __init__(self, order: StoredOrder, layout: Layout, dtype: np.dtype) -> None:
        self.order, self.layout, self.dtype = order, layout, dtype
        self._offsets = layout.vocabulary.offsets[order.books].astype(dtype)
        others = {"coarse_first": self._coarse_first, "parallel": self._parallel, "delay": self._delay}
        self._make = others.get(layout.name, self._as_stored)

    def __call__(self, block: ClipBlock) -> tuple[np.ndarray, np.ndarray]:
        return self._make(block)

    def _as_stored(self, block: ClipBlock) -> tuple[np.ndarray, np.ndarray]:
        """`interleaved`, `multirate`, `variable`: the order on the disk, with offsets."""
        if not self._offsets.any():
            return block.codes.astype(self.dtype, copy=False), block.bounds
        if block.depths is not None:
            books = self.order.books_of(block.depths)
            return block.codes.astype(self.dtype) + self._offsets[books], block.bounds
        return self._frames(block).reshape(-1), block.bounds

    def _frames(self, block: ClipBlock) -> np.ndarray:
        """`[N, P]` ids."""
        codes = block.codes.astype(self.dtype, copy=False)
        # Added as one long row: rows of a few codes would cost a loop each.
        return (codes + np.resize(self._offsets, len(codes))).reshape(-1, self.order.period)

    def _parallel(self, block: ClipBlock) -> tuple[np.ndarray, np.ndarray]:
        return self._frames(block), block.frame_bounds

    def _delay(self, block: ClipBlock) -> tuple[np.ndarray, np.ndarray]:
        """Codebook q stands q steps late, so each document has Q - 1 steps more than frames."""
        frames, tail = self._frames(block), self.order.period - 1
        bounds = bounds_of(block.num_frames + tail)
        ids = np.full((bounds[-1], self.order.period), self.layout.vocabulary.pad_token_id, self.dtype)
        steps = np.arange(len(frames)) + np.repeat(np.arange(len(block)) * tail, block.num_frames)
        for book in range(self.order.period):
            ids[steps + book, book] = frames[:, book]
        return ids, bounds

    def _coarse_first(self, block: ClipBlock) -> tuple[np.ndarray, np.ndarray]:
        """All codes of a codebook, then those of the next: a code's place follows from its clip's length."""
        frames, order = self._frames(block), self.order
        counts = block.num_frames // order.facts.codebook_strides[0]
        firsts = np.repeat(block.bounds[:-1], counts)  # of each coarse frame: where its clip begins,
        sizes = np.repeat(counts, counts)  # how many coarse frames that has,
        nth = np.arange(len(frames)) - np.repeat(bounds_of(counts)[:-1], counts)  # and which of them this is
        ids = np.empty(frames.size, self.dtype)
        before = bounds_of(order.repeats)[:-1]  # codes of a coarse frame in the codebooks before each
        for column, (book, place) in enumerate(zip(order.books, order.places, strict=True)):
            inside = place - before[book]
            ids[firsts + sizes * before[book] + nth * order.repeats[book] + inside] = frames[:, column]
        return ids, block.bounds
