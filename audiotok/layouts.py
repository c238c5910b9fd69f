"""Layouts: codes ↔ ids, one class a layout, each a bijection between code arrays and its legal sequences.

Shapes: Q codebooks, T frames, T_q codes of codebook q, N coarse frames (N = T unless codebooks have different
rates), L ids, S steps of a 2-D layout. The drawings have codebooks of 10 entries, so that ids 0-9 belong to
codebook 0, 10-19 to codebook 1, 20-29 to codebook 2, and 30 is the pad id.

A layout is also a grammar for sampling (`IdGrammar`); `ids_to_codes` accepts exactly the sequences that it does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from audiotok.errors import CodesError, IncompleteFrameError, OptionError, check_choice
from audiotok.grammar import IdGrammar, LayoutState
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
    """Base of layouts; `get_layout` makes them and checks that they fit the codec.

    Attributes:
        codebook_strides: frames per code of each codebook.
    """

    def __init__(self, vocabulary: AudioVocabulary, codebook_strides: tuple[int, ...]) -> None:
        super().__init__(vocabulary)
        self.codebook_strides = codebook_strides

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

    def num_ids(self, num_frames: int) -> int:
        """Length of the sequence of `num_frames` frames: ids, or steps for a 2-D layout. OptionError if not fixed."""
        raise OptionError(f'Layout "{self.name}" has no fixed number of ids a frame: sum the depths of the clip.')

    def num_frames(self, num_ids: int) -> int:
        """Frames in a sequence of this length; the inverse of `num_ids`."""
        raise OptionError(f'Layout "{self.name}" has no fixed number of ids a frame: decode the ids to know.')


class FixedLayout(Layout):
    """A layout in which the number of frames alone says where each code goes.

    It is a list of lanes: a lane is a strided run of a codebook's codes and the equally long strided run of ids
    that they become. A subclass says where the lanes of ids run (`_id_lanes`) and, what is the same, which
    codebook owns a position (`_kinds_at`); moving, checking and the grammar follow from these two.
    """

    def __init__(self, vocabulary: AudioVocabulary, codebook_strides: tuple[int, ...]) -> None:
        super().__init__(vocabulary, codebook_strides)
        self._is_multirate = max(codebook_strides) > 1
        self._repeats = [codebook_strides[0] // stride for stride in codebook_strides]  # codes a coarse frame
        self._order = list(_depth_first(self._repeats))
        self._frame_kinds = np.array([codebook for codebook, _ in self._order])
        self._period = 1 if self.is_2d else len(self._order)  # positions a coarse frame
        self._tail = 0  # positions over those
        self._shows_end = False  # an id of another kind than codebook 0 shows how many frames there are

    @abstractmethod
    def _id_lanes(self, ids: np.ndarray, num_coarse: int) -> list[np.ndarray]:
        """Views `[N]` of `ids`, one for each `(codebook, nth)` of `_order`."""

    @abstractmethod
    def _kinds_at(self, positions: np.ndarray, num_coarse: int) -> np.ndarray:
        """`[streams, len(positions)]` kinds of the ids there, in a clip of N coarse frames."""

    def num_ids(self, num_frames: int) -> int:
        stride = self.codebook_strides[0]
        if num_frames < 0 or num_frames % stride:
            raise CodesError(f"num_frames={num_frames} is not legal: frames come in multiples of {stride}, from 0 on.")
        return num_frames // stride * self._period + self._tail

    def num_frames(self, num_ids: int) -> int:
        num_coarse, rest = divmod(num_ids - self._tail, self._period)
        if rest or num_coarse < 0:
            legal = f"{self._tail} and a multiple of {self._period}"
            raise IncompleteFrameError(f'{num_ids} ids are no whole frames: layout "{self.name}" has {legal}.')
        return num_coarse * self.codebook_strides[0]

    def codes_to_ids(self, codes: Any, depths: ArrayLike | None = None) -> np.ndarray:
        if depths is not None:
            raise CodesError(f'Layout "{self.name}" takes no depths, its frames are all whole: leave depths out.')
        rows = self._check_rows(codes)
        num_coarse = len(rows[0])
        length = num_coarse * self._period + self._tail
        ids = np.empty((self.num_streams, length) if self.is_2d else length, dtype=np.int64)
        for codebook, codes_part, ids_part in self._moves(rows, ids, num_coarse):
            block = codes_part.astype(np.int64, copy=False)
            if not within(block, self._sizes[codebook]):
                raise self.vocabulary.code_error(rows)
            np.add(block, self._offsets[codebook], out=ids_part)
        return ids

    def ids_to_codes(self, ids: ArrayLike) -> LayoutCodes:
        array = self._check_ids(ids)
        num_coarse, rest = divmod(array.shape[-1] - self._tail, self._period)
        if rest or num_coarse < 0:
            self._refuse(array)
        rows: np.ndarray | list[np.ndarray] = np.empty((len(self._sizes), num_coarse), dtype=np.int64)
        if self._is_multirate:
            rows = [np.empty(num_coarse * repeats, dtype=np.int64) for repeats in self._repeats]
        for codebook, codes_part, ids_part in self._moves(rows, array, num_coarse):
            np.subtract(ids_part, self._offsets[codebook], out=codes_part, dtype=np.int64)
            if not within(codes_part, self._sizes[codebook]):
                self._refuse(array)
        return LayoutCodes(rows)

    def can_end(self, state: LayoutState) -> bool:
        if not self._shows_end:
            return state.position % self._period == 0
        if state.num_frames is None:
            return state.position == 0 and self._tail == 0
        return state.position == state.num_frames * self._period + self._tail

    def _moves(self, rows: Rows, ids: np.ndarray, num_coarse: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """`(codebook, part of its codes, the ids of that part)`, block by block over all lanes."""
        code_lanes = self._code_lanes(rows)
        id_lanes = self._id_lanes(ids, num_coarse)
        for part in _blocks(num_coarse, len(self._order)):
            for (codebook, _), code_lane, id_lane in zip(self._order, code_lanes, id_lanes, strict=True):
                yield codebook, code_lane[part], id_lane[part]

    def _code_lanes(self, rows: Rows) -> list[np.ndarray]:
        return [rows[codebook][nth :: self._repeats[codebook]] for codebook, nth in self._order]

    def _check_rows(self, codes: Any) -> Rows:
        """`codes` as one array of integers a codebook, with lengths that fit each other."""
        if not self._is_multirate:
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

    def _legal_kinds(self, state: LayoutState) -> Sequence[Sequence[int]]:
        # While the number of frames is open, either a frame more follows or those so far were all.
        known = state.num_frames if self._shows_end else state.position + 1
        ends = (state.position + 1, state.position) if known is None else (known,)
        choices = [self._kinds_at(np.array([state.position]), end)[:, 0].tolist() for end in ends]
        return [[k for k in dict.fromkeys(kinds) if k != self._nothing] for kinds in zip(*choices, strict=True)]

    def _next_state(self, state: LayoutState, kinds: Sequence[int]) -> LayoutState:
        ends_here = self._shows_end and state.num_frames is None and kinds[0] != 0
        return LayoutState(state.position + 1, state.position if ends_here else state.num_frames)

    def _state_after(self, ids: np.ndarray) -> LayoutState:
        if not self._shows_end:
            return LayoutState(ids.shape[-1])
        first = ids[0] if self.is_2d else ids
        return LayoutState(ids.shape[-1], first_true(first >= self._sizes[0]))

    def _expected_kinds(self, ids: np.ndarray) -> np.ndarray:
        length = ids.shape[-1]
        end = self._state_after(ids).num_frames
        return self._kinds_at(np.arange(length), length if end is None else end).reshape(ids.shape)


class InterleavedLayout(FixedLayout):
    """Frame by frame, coarse to fine.

    codes   1  2  3        ids   1 14 27   2 15 28   3 16 29
            4  5  6
            7  8  9
    """

    name = "interleaved"

    def _id_lanes(self, ids: np.ndarray, num_coarse: int) -> list[np.ndarray]:
        return list(ids.reshape(num_coarse, self._period).T)

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


class CoarseFirstLayout(FixedLayout):
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

    def _id_lanes(self, ids: np.ndarray, num_coarse: int) -> list[np.ndarray]:
        return self._code_lanes(np.split(ids, num_coarse * self._part_ends[:-1]))

    def _kinds_at(self, positions: np.ndarray, num_coarse: int) -> np.ndarray:
        if not self._shows_end:
            return np.zeros((1, len(positions)), dtype=np.int64)
        # Past the last part this gives Q, the kind "no id".
        return np.searchsorted(num_coarse * self._part_ends, positions, side="right")[None]


class ParallelLayout(FixedLayout):
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

    def codes_to_ids(self, codes: Any, depths: ArrayLike | None = None) -> np.ndarray:
        ids = super().codes_to_ids(codes, depths)
        for corner in self._corners(ids):
            corner[:] = self.vocabulary.pad_token_id
        return ids

    def ids_to_codes(self, ids: ArrayLike) -> LayoutCodes:
        array = self._check_ids(ids)
        decoded = super().ids_to_codes(array)
        if any((corner != self.vocabulary.pad_token_id).any() for corner in self._corners(array)):
            self._refuse(array)
        return decoded

    def _corners(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        for row, late in zip(ids, self._late, strict=True):
            yield row[:late]
            yield row[len(row) - self._tail + late :]

    def _id_lanes(self, ids: np.ndarray, num_coarse: int) -> list[np.ndarray]:
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


class VariableLayout(Layout):
    """Frame by frame, coarse to fine, each only as deep as it is: an id of codebook 0 begins the next frame.

    codes   1  2  3        depths   1 3 2        ids   1   2 15 28   3 16
            0  5  6
            0  8  0
    """

    name = "variable"

    def codes_to_ids(self, codes: Any, depths: ArrayLike | None = None) -> np.ndarray:
        rows = self.vocabulary.check_codes(codes)
        lengths = self._check_depths(depths, rows.shape[1])
        ends, num_ids = np.cumsum(lengths), int(lengths.sum())
        ids = np.empty(num_ids + len(rows), dtype=np.int64)
        for part in _blocks(len(lengths), len(rows)):
            starts = ends[part] - lengths[part]
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
                ids[starts + codebook] = block + self._offsets[codebook]
        return ids[:num_ids]

    def ids_to_codes(self, ids: ArrayLike) -> LayoutCodes:
        array = self._check_ids(ids)
        starts = np.flatnonzero(array < self._sizes[0])
        depths = np.diff(starts, append=len(array))
        if len(array) and (len(starts) == 0 or starts[0] > 0 or depths.max() > len(self._sizes)):
            self._refuse(array)
        source = array.astype(np.int64, copy=False)
        codes = np.empty((len(self._sizes), len(starts)), dtype=np.int64)
        for part in _blocks(len(starts), len(codes)):
            for codebook, block in enumerate(codes[:, part]):
                # Beyond a frame's depth this takes an id of a later frame, and the product makes it 0.
                np.take(source, starts[part] + codebook, out=block, mode="clip")
                np.subtract(block, self._offsets[codebook], out=block)
                np.multiply(block, depths[part] > codebook, out=block)
                if not within(block, self._sizes[codebook]):
                    self._refuse(array)
        return LayoutCodes(codes, depths)

    def _check_depths(self, depths: ArrayLike | None, num_frames: int) -> np.ndarray:
        if depths is None:
            raise CodesError('Layout "variable" needs the number of codes in each frame: give depths, [T] integers.')
        array = as_integers(depths, "depths", CodesError)
        if array.shape != (num_frames,):
            raise CodesError(f"depths have shape {list(array.shape)}: give one for each of {num_frames} frames.")
        frame = first_true((array < 1) | (array > len(self._sizes)))
        if frame is not None:
            raise CodesError(
                f"Depth {array[frame]} of frame {frame} is outside 1 to {len(self._sizes)}: every frame has a code "
                "of codebook 0, and at most one of each."
            )
        return array.astype(np.int64, copy=False)

    def can_end(self, state: LayoutState) -> bool:
        return True

    def _legal_kinds(self, state: LayoutState) -> Sequence[Sequence[int]]:
        return [[0, state.depth] if 0 < state.depth < len(self._sizes) else [0]]

    def _next_state(self, state: LayoutState, kinds: Sequence[int]) -> LayoutState:
        return LayoutState(state.position + 1, depth=kinds[0] + 1)

    def _state_after(self, ids: np.ndarray) -> LayoutState:
        return LayoutState(len(ids), depth=int(self._next_codebooks(ids)[-1]))

    def _expected_kinds(self, ids: np.ndarray) -> np.ndarray:
        return np.where(ids < self._sizes[0], 0, self._next_codebooks(ids)[:-1])

    def _next_codebooks(self, ids: np.ndarray) -> np.ndarray:
        """`[L + 1]` the codebook that deepens the frame at each place; Q, "no id", where it is full."""
        return np.concatenate([[0], np.searchsorted(self._offsets, ids, side="right")])


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


def _depth_first(repeats: Sequence[int], codebook: int = 0, nth: int = 0) -> Iterator[tuple[int, int]]:
    """`(codebook, nth)` of the codes in a coarse frame, each before those that refine it."""
    yield codebook, nth
    if codebook + 1 < len(repeats):
        ratio = repeats[codebook + 1] // repeats[codebook]
        for child in range(nth * ratio, (nth + 1) * ratio):
            yield from _depth_first(repeats, codebook + 1, child)


def _blocks(length: int, num_lanes: int) -> Iterator[slice]:
    """Slices of `[0, length)` such that the same slice of all lanes together stays in the cache."""
    size = max(1, _BLOCK_CODES // num_lanes)
    for start in range(0, length, size):
        yield slice(start, start + size)
