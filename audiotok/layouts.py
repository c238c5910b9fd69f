"""Layouts: codes ↔ ids, one class a layout, each a bijection between code arrays and its legal sequences.

Shapes: Q codebooks, T frames, T_q codes of codebook q, N coarse frames (N = T unless codebooks have different
rates), L ids, S steps of a 2-D layout. The drawings have codebooks of 10 entries, so that ids 0-9 belong to
codebook 0, 10-19 to codebook 1, 20-29 to codebook 2, and 30 is the pad id.

A layout is also a grammar for sampling (`audiotok.grammar`); `ids_to_codes` accepts exactly the sequences that it does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from audiotok.errors import CodesError, OptionError, check_choice
from audiotok.grammar import FixedGrammar, IdGrammar, VariableGrammar
from audiotok.vocabulary import AudioVocabulary, as_integers, first_true, within

# Codes moved at once: half a MiB each way stays in the L2 cache between checking and moving, which takes nearly
# half the time of whole arrays where those exceed the last cache (measured: 8 codebooks of 10^7 frames).
_BLOCK_CODES = 1 << 16

Rows = np.ndarray | Sequence[np.ndarray]  # codes, one array a codebook


class LayoutCodes(NamedTuple):
    """What ids stand for.

    Attributes:
        codes: `[Q, T]` int64; a list of Q arrays `[T_q]` where codebooks have different rates. 0 beyond the
            depth of a frame.
        depths: `[T]` int64, codes in each frame; None unless the layout is `variable`.
    """

    codes: np.ndarray | list[np.ndarray]
    depths: np.ndarray | None = None


class Layout(IdGrammar):
    """Base of layouts; `get_layout` makes them and checks that they fit the codec."""

    @abstractmethod
    def codes_to_ids(self, codes: Any, depths: ArrayLike | None = None) -> np.ndarray:
        """Ids of a clip's codes.

        Args:
            codes: `[Q, T]` integers; a list of Q arrays `[T_q]` where codebooks have different rates.
            depths: `[T]` integers from 1 to Q, codes in each frame; for `variable` only, where codes beyond
                the depth are 0.

        Returns:
            int64 `[L]`, or `[Q, S]` for a 2-D layout; without start, end or padding.

        Raises:
            CodesError: wrong dtype, shape or range.
        """

    @abstractmethod
    def ids_to_codes(self, ids: ArrayLike) -> LayoutCodes:
        """Codes of a sequence of ids: the exact inverse of `codes_to_ids`.

        Args:
            ids: integers `[L]`, or `[Q, S]` for a 2-D layout; without start, end or padding.

        Raises:
            InvalidIdError: an id that the layout does not allow where it stands.
            SpecialTokenError: a special token among the ids.
            IncompleteFrameError: every id is legal, but the last frame is not whole.
        """


class FixedLayout(FixedGrammar, Layout):
    """A layout in which the number of frames alone says where each code goes.

    A subclass moves checked codes to ids and back (`_write`, `_read`), and says which codebook owns a position
    (`_kinds_at`), from which the grammar follows.
    """

    @abstractmethod
    def _write(self, rows: Rows, ids: np.ndarray) -> None:
        """Fill `ids` with those of the codes, or raise for a code outside its codebook."""

    @abstractmethod
    def _read(self, ids: np.ndarray, rows: Rows) -> None:
        """Fill `rows` with the codes of whole frames of ids, or refuse the ids."""

    def codes_to_ids(self, codes: Any, depths: ArrayLike | None = None) -> np.ndarray:
        if depths is not None:
            raise CodesError(f'Layout "{self.name}" takes no depths, its frames are all whole: leave depths out.')
        rows = self._check_rows(codes)
        length = len(rows[0]) * self._period + self._tail
        ids = np.empty((self.num_streams, length) if self.is_2d else length, dtype=np.int64)
        self._write(rows, ids)
        return ids

    def ids_to_codes(self, ids: ArrayLike) -> LayoutCodes:
        array = self._check_ids(ids)
        num_coarse, rest = divmod(array.shape[-1] - self._tail, self._period)
        if rest or num_coarse < 0:
            self._refuse(array)
        rows: np.ndarray | list[np.ndarray] = np.empty((len(self._sizes), num_coarse), dtype=np.int64)
        if self.codebook_strides[0] > 1:
            rows = [np.empty(num_coarse * repeats, dtype=np.int64) for repeats in self._repeats]
        self._read(array, rows)
        return LayoutCodes(rows)

    def _check_rows(self, codes: Any) -> Rows:
        """`codes` as one array of integers a codebook, with lengths that fit each other."""
        if self.codebook_strides[0] == 1:
            return self.vocabulary.check_codes(codes)
        rows = [as_integers(row, "codes", CodesError) for row in codes]
        shapes = [row.shape for row in rows]
        num_coarse = shapes[0][0] if shapes and shapes[0] else 0
        if shapes != [(num_coarse * repeats,) for repeats in self._repeats]:
            raise CodesError(
                f'codes have shapes {shapes}: layout "{self.name}" takes one array [T_q] a codebook with lengths in '
                f"the ratio {':'.join(map(str, self._repeats))}, one clip at a time."
            )
        return rows


class InterleavedLayout(FixedLayout):
    """Frame by frame, coarse to fine.

    codes   1  2  3        ids   1 14 27   2 15 28   3 16 29
            4  5  6
            7  8  9
    """

    name = "interleaved"

    def __init__(self, vocabulary: AudioVocabulary, codebook_strides: tuple[int, ...]) -> None:
        super().__init__(vocabulary, codebook_strides)
        # `(codebook, nth)` of the codes in a coarse frame, by the time at which each begins.
        codes = [(codebook, nth) for codebook, repeats in enumerate(self._repeats) for nth in range(repeats)]
        self._order = sorted(codes, key=lambda code: (code[1] * codebook_strides[code[0]], code[0]))
        self._frame_kinds = np.array([codebook for codebook, _ in self._order])
        self._frame_offsets = vocabulary.offsets[self._frame_kinds, None]
        self._frame_sizes = np.array(self._sizes)[self._frame_kinds, None]

    def _block(self, rows: Any, part: slice) -> np.ndarray:
        """`[places in a coarse frame, n]` int64 codes of some coarse frames."""
        return rows[:, part].astype(np.int64, copy=False)

    def _store(self, block: np.ndarray, rows: Any, part: slice) -> None:
        """The inverse of `_block`."""
        rows[:, part] = block

    def _write(self, rows: Rows, ids: np.ndarray) -> None:
        frames = ids.reshape(-1, self._period)
        for part in _blocks(len(frames), self._period):
            block = self._block(rows, part)
            if not _all_within(block, self._frame_sizes):
                raise self.vocabulary.code_error(rows)
            # Adding first and transposing then takes two thirds of the time of writing sums place by place.
            frames[part] = (block + self._frame_offsets).T

    def _read(self, ids: np.ndarray, rows: Rows) -> None:
        frames = ids.reshape(-1, self._period)
        for part in _blocks(len(frames), self._period):
            block = np.subtract(frames[part].T, self._frame_offsets, dtype=np.int64, order="C")
            if not _all_within(block, self._frame_sizes):
                self._refuse(ids)
            self._store(block, rows, part)

    def _kinds_at(self, positions: np.ndarray, num_coarse: int) -> np.ndarray:
        return self._frame_kinds[None, positions % self._period]


class MultirateLayout(InterleavedLayout):
    """Coarse frame by coarse frame where codebooks have different rates, each code before those that refine it.

    The codes of a coarse frame are a tree, written depth first. For strides (4, 2, 1), the order of SNAC:

        codes   1              ids   1 12 24 25 13 26 27
                2     3
                4  5  6  7
    """

    name = "multirate"

    def _block(self, rows: Any, part: slice) -> np.ndarray:
        return np.stack([lane[part] for lane in self._lanes(rows)], dtype=np.int64)

    def _store(self, block: np.ndarray, rows: Any, part: slice) -> None:
        for lane, codes in zip(self._lanes(rows), block, strict=True):
            lane[part] = codes

    def _lanes(self, rows: Rows) -> list[np.ndarray]:
        """Views `[N]` of the codes, one for each place in a coarse frame."""
        return [rows[codebook][nth :: self._repeats[codebook]] for codebook, nth in self._order]


class RunsLayout(FixedLayout):
    """A layout in which the codes of a codebook become one run of ids, in their order."""

    @abstractmethod
    def _runs(self, ids: np.ndarray, num_coarse: int) -> Sequence[np.ndarray]:
        """Views of `ids`, one for the codes of each codebook."""

    def _parts(self, rows: Rows, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """`(codebook, some of its codes, the ids of those)`."""
        for codebook, (row, run) in enumerate(zip(rows, self._runs(ids, len(rows[0])), strict=True)):
            for part in _blocks(len(row), 1):
                yield codebook, row[part], run[part]

    def _write(self, rows: Rows, ids: np.ndarray) -> None:
        for codebook, codes, run in self._parts(rows, ids):
            block = codes.astype(np.int64, copy=False)
            if not within(block, self._sizes[codebook]):
                raise self.vocabulary.code_error(rows)
            np.add(block, self._offsets[codebook], out=run)

    def _read(self, ids: np.ndarray, rows: Rows) -> None:
        for codebook, codes, run in self._parts(rows, ids):
            np.subtract(run, self._offsets[codebook], out=codes, dtype=np.int64)
            if not within(codes, self._sizes[codebook]):
                self._refuse(ids)


class CoarseFirstLayout(RunsLayout):
    """All codes of codebook 0, then all of codebook 1, and so on.

        codes   1  2  3        ids   1 2 3   14 15 16   27 28 29
                4  5  6
                7  8  9

    The first id of codebook 1 shows how long every part is; where the codebook is shared, only the length of
    the whole sequence does.
    """

    name = "coarse_first"

    def __init__(self, vocabulary: AudioVocabulary, codebook_strides: tuple[int, ...]) -> None:
        super().__init__(vocabulary, codebook_strides)
        self._part_ends = np.cumsum(self._repeats)
        self._shows_end = len(self._sizes) > 1 and not vocabulary.shared_codebook

    def _runs(self, ids: np.ndarray, num_coarse: int) -> Sequence[np.ndarray]:
        return np.split(ids, num_coarse * self._part_ends[:-1])

    def _kinds_at(self, positions: np.ndarray, num_coarse: int) -> np.ndarray:
        if not self._shows_end:
            return np.zeros((1, len(positions)), dtype=np.int64)
        # Past the last part this gives Q, the kind "no id".
        return np.searchsorted(num_coarse * self._part_ends, positions, side="right")[None]


class ParallelLayout(RunsLayout):
    """One stream a codebook, all in step: S = T.

    codes   1  2  3        ids    1  2  3
            4  5  6              14 15 16
            7  8  9              27 28 29
    """

    name = "parallel"
    is_2d = True
    _delay = 0  # steps by which a stream is behind the one before it

    def __init__(self, vocabulary: AudioVocabulary, codebook_strides: tuple[int, ...]) -> None:
        super().__init__(vocabulary, codebook_strides)
        self._late = self._delay * np.arange(len(self._sizes))
        self._tail = int(self._late[-1])
        self._shows_end = self._tail > 0

    def _write(self, rows: Rows, ids: np.ndarray) -> None:
        super()._write(rows, ids)
        for corner in self._corners(ids):
            corner[:] = self.vocabulary.pad_token_id

    def _read(self, ids: np.ndarray, rows: Rows) -> None:
        if any((corner != self.vocabulary.pad_token_id).any() for corner in self._corners(ids)):
            self._refuse(ids)
        super()._read(ids, rows)

    def _corners(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        for row, late in zip(ids, self._late, strict=True):
            yield row[:late]
            yield row[len(row) - self._tail + late :]

    def _runs(self, ids: np.ndarray, num_coarse: int) -> Sequence[np.ndarray]:
        return [row[late : late + num_coarse] for row, late in zip(ids, self._late, strict=True)]

    def _kinds_at(self, positions: np.ndarray, num_coarse: int) -> np.ndarray:
        codebooks = np.arange(len(self._sizes))[:, None]
        frames = positions - self._late[:, None]
        kinds = np.where((frames >= 0) & (frames < num_coarse), codebooks, self._pad)
        return np.where(positions < num_coarse + self._tail, kinds, self._nothing)


class DelayLayout(ParallelLayout):
    """One stream a codebook, codebook q late by q steps: S = T + Q - 1, with pad ids in the corners.

        codes   1  2  3        ids    1  2  3 30 30
                4  5  6              30 14 15 16 30
                7  8  9              30 30 27 28 29

    So a step knows the coarser codes of each frame that it refines. The first pad id of stream 0 shows how many
    frames there are; no frames are Q - 1 steps of pads.
    """

    name = "delay"
    _delay = 1


class VariableLayout(VariableGrammar, Layout):
    """Frame by frame, coarse to fine, each only as deep as it is: an id of codebook 0 begins the next frame.

    codes   1  2  3        depths   1 3 2        ids   1   2 15 28   3 16
            0  5  6
            0  8  0
    """

    name = "variable"

    def codes_to_ids(self, codes: Any, depths: ArrayLike | None = None) -> np.ndarray:
        rows = self.vocabulary.check_codes(codes)
        lengths = self._check_depths(depths, rows.shape[1])
        num_ids, end = int(lengths.sum()), 0
        ids = np.empty(num_ids + len(rows), dtype=np.int64)
        for part in _blocks(len(lengths), len(rows)):
            ends = end + np.cumsum(lengths[part], dtype=np.int64)
            starts, end = ends - lengths[part], int(ends[-1])
            # Finest codebook first, all frames whole: what a shallow frame writes beyond its depth lands on
            # coarser ids of later frames, and those are written later. So no mask is needed.
            for codebook in reversed(range(len(rows))):
                block = rows[codebook, part].astype(np.int64, copy=False)
                if not within(block, self._sizes[codebook]):
                    raise self.vocabulary.code_error(rows)
                hidden = first_true((block != 0) & (lengths[part] <= codebook))
                if hidden is not None:
                    raise CodesError(
                        f"Code {block[hidden]} of codebook {codebook} at frame {part.start + hidden} lies beyond the "
                        "depth of its frame and would be lost: set it to 0, or give the right depths."
                    )
                ids[codebook:][starts] = block + self._offsets[codebook]
        return ids[:num_ids]

    def ids_to_codes(self, ids: ArrayLike) -> LayoutCodes:
        array = self._check_ids(ids)
        bounds = np.flatnonzero(np.append(array < self._sizes[0], True))  # where frames begin, and the end
        starts, depths = bounds[:-1], np.diff(bounds)
        if bounds[0] > 0 or depths.max(initial=0) > len(self._sizes):
            self._refuse(array)
        source = array.astype(np.int64, copy=False)
        codes = np.empty((len(self._sizes), len(starts)), dtype=np.int64)
        missing = len(depths) - np.cumsum(np.bincount(depths, minlength=len(codes) + 1))  # frames deeper than that
        for part in _blocks(len(starts), len(codes)):
            for codebook, block in enumerate(codes[:, part]):
                # Beyond a frame's depth this takes an id of a later frame, which stands less deep there: a legal one
                # gives a negative difference. So from codebook 0 on, as many differences as frames are this deep
                # are codes only if every id is legal in its place.
                np.take(source[min(codebook, len(source) - 1) :], starts[part], out=block, mode="clip")
                np.subtract(block, self._offsets[codebook], out=block)
                missing[codebook] -= np.count_nonzero(block.view(np.uint64) < self._sizes[codebook])
                np.maximum(block, 0, out=block)
        if missing.any():
            self._refuse(array)
        return LayoutCodes(codes, depths)

    def _check_depths(self, depths: ArrayLike | None, num_frames: int) -> np.ndarray:
        """`depths` in the narrowest type that holds them."""
        if depths is None:
            raise CodesError('Layout "variable" needs the number of codes in each frame: give depths, [T] integers.')
        array = as_integers(depths, "depths", CodesError)
        if array.shape != (num_frames,):
            raise CodesError(f"depths have shape {list(array.shape)}: give one for each of {num_frames} frames.")
        deepest = len(self._sizes)
        if array.min(initial=1) < 1 or array.max(initial=1) > deepest:
            frame = first_true((array < 1) | (array > deepest))
            raise CodesError(
                f"Depth {array[frame]} of frame {frame} is outside 1 to {deepest}: every frame has a code "
                "of codebook 0, and at most one of each."
            )
        return array.astype(np.min_scalar_type(deepest))


_CLASSES = (InterleavedLayout, CoarseFirstLayout, ParallelLayout, DelayLayout, VariableLayout, MultirateLayout)
_LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in _CLASSES}


def layout_names(
    vocabulary: AudioVocabulary, codebook_strides: Sequence[int] | None = None, variable_depth: bool = False
) -> tuple[str, ...]:
    """Names of the layouts that fit a codec (arguments as in its `CodecFacts`), the default one first.

    Raises:
        OptionError: strides that do not fit the codebooks or make no tree, or a codec that no layout fits.
    """
    strides = _check_strides(codebook_strides, vocabulary)
    if not variable_depth:
        if max(strides) > 1:
            return "multirate", "coarse_first"
        return "interleaved", "coarse_first", "parallel", "delay"
    if max(strides) > 1 or len(set(vocabulary.offsets.tolist())) < vocabulary.num_codebooks:
        raise OptionError(
            "variable_depth=True fits no codec with a shared codebook or codebooks of different rates: ids would "
            "not show where a frame ends. Use distinct codebooks of one rate, or variable_depth=False."
        )
    return ("variable",)


def get_layout(
    name: str, vocabulary: AudioVocabulary, codebook_strides: Sequence[int] | None = None, variable_depth: bool = False
) -> Layout:
    """The layout of that name for a codec.

    Args:
        name: one of `layout_names(...)`.
        vocabulary: the codec's id space.
        codebook_strides: frames per code of each codebook, each a divisor of the one before; all 1 if left out.
        variable_depth: frames may use fewer than all codebooks.

    Raises:
        OptionError: a name that is unknown or does not fit the codec, or strides that make no tree.
    """
    check_choice("layout", name, _LAYOUTS)
    strides = _check_strides(codebook_strides, vocabulary)
    fitting = layout_names(vocabulary, strides, variable_depth)
    if name not in fitting:
        raise OptionError(
            f'layout="{name}" does not fit a codec with codebook_strides={strides} and variable_depth='
            f"{variable_depth}: choose {' or '.join(fitting)}."
        )
    return _LAYOUTS[name](vocabulary, strides)


def default_layout(
    vocabulary: AudioVocabulary, codebook_strides: Sequence[int] | None = None, variable_depth: bool = False
) -> Layout:
    """The layout that a codec has unless another is asked for: `interleaved`, `variable` or `multirate`."""
    name = layout_names(vocabulary, codebook_strides, variable_depth)[0]
    return get_layout(name, vocabulary, codebook_strides, variable_depth)


def _check_strides(strides: Sequence[int] | None, vocabulary: AudioVocabulary) -> tuple[int, ...]:
    if strides is None:
        return (1,) * vocabulary.num_codebooks
    legal = len(strides) == vocabulary.num_codebooks and min(strides) >= 1
    if not legal or any(coarse % fine for coarse, fine in pairwise(strides)):
        raise OptionError(
            f"codebook_strides={tuple(strides)} is not legal: give {vocabulary.num_codebooks} numbers from 1 on, each "
            "a divisor of the one before (coarse to fine)."
        )
    return tuple(strides)


def _all_within(block: np.ndarray, sizes: np.ndarray) -> bool:
    """`within` for codes `[lanes, n]` and the sizes `[lanes, 1]` of their codebooks."""
    return bool((block.view(np.uint64).max(axis=1, keepdims=True, initial=0) < sizes).all())


def _blocks(length: int, num_lanes: int) -> Iterator[slice]:
    """Slices of `[0, length)` such that the same slice of all lanes together stays in the cache."""
    size = max(1, _BLOCK_CODES // num_lanes)
    for start in range(0, length, size):
        yield slice(start, start + size)
