"""Layouts are bijections and grammars: against a slow reference, exhaustively on tiny books, and by property.

`Case` is a codec with one of its layouts. The reference sorts codes one by one by where they stand, so it shares
nothing with the lanes and blocks of the implementation.
"""

from __future__ import annotations

import itertools
import re
import time
import timeit
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotok import layouts
from audiotok.errors import (
    AudioTokError,
    CodesError,
    IncompleteFrameError,
    InvalidIdError,
    OptionError,
    SpecialTokenError,
    TokenError,
)
from audiotok.grammar import LayoutState
from audiotok.layouts import Layout, get_layout, layout_names
from audiotok.vocabulary import AudioVocabulary


class Case(NamedTuple):
    """A codec and one of the layouts that fit it."""

    name: str
    sizes: tuple[int, ...]
    shared: bool = False
    strides: tuple[int, ...] | None = None
    variable_depth: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.sizes}" + " shared" * self.shared + (f" {self.strides}" if self.strides else "")

    @property
    def vocabulary(self) -> AudioVocabulary:
        return AudioVocabulary(self.sizes, self.shared)

    @property
    def layout(self) -> Layout:
        return get_layout(self.name, self.vocabulary, self.strides, self.variable_depth)

    def random_codes(self, num_coarse: int, rng: np.random.Generator) -> tuple[Any, np.ndarray | None]:
        """Codes (and depths) of `num_coarse` coarse frames."""
        strides = self.strides or (1,) * len(self.sizes)
        rows = [rng.integers(0, k, num_coarse * strides[0] // s) for k, s in zip(self.sizes, strides, strict=True)]
        if self.strides:
            return rows, None
        if not self.variable_depth:
            return np.stack(rows), None
        depths = rng.integers(1, len(rows) + 1, num_coarse)
        return np.stack(rows) * (np.arange(len(rows))[:, None] < depths), depths


def all_layouts_of(sizes: tuple[int, ...], shared: bool = False, strides: tuple[int, ...] | None = None) -> list[Case]:
    """A case for each layout that fits, those of a variable-depth codec with the same books included."""
    names = layout_names(AudioVocabulary(sizes, shared), strides)
    cases = [Case(name, sizes, shared, strides) for name in names]
    if not strides and (not shared or len(sizes) == 1):
        cases.append(Case("variable", sizes, shared, variable_depth=True))
    return cases


CASES = [
    *all_layouts_of((10, 10, 10)),
    *all_layouts_of((7,)),
    *all_layouts_of((1, 1)),
    *all_layouts_of((3, 300, 2, 70_000)),
    *all_layouts_of((5, 5, 5, 5), shared=True),
    *all_layouts_of((5,), shared=True),
    *all_layouts_of((4, 4, 4), strides=(4, 2, 1)),
    *all_layouts_of((4, 3, 2), strides=(6, 2, 2)),
    *all_layouts_of((9, 9), shared=True, strides=(3, 1)),
    *all_layouts_of((9,), strides=(2,)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def reference_ids(case: Case, codes: Any, depths: np.ndarray | None) -> np.ndarray:
    """Ids of codes, from the place of each code in the sequence."""
    vocabulary = case.vocabulary
    strides = case.strides or (1,) * len(case.sizes)
    placed = [
        (n * strides[q], q, int(vocabulary.offsets[q]) + int(code))
        for q, row in enumerate(codes)
        for n, code in enumerate(row)
        if depths is None or q < depths[n]
    ]
    if case.name in ("parallel", "delay"):
        late = [q if case.name == "delay" else 0 for q in range(len(codes))]
        ids = np.full((len(codes), len(codes[0]) + late[-1]), vocabulary.pad_token_id)
        for frame, q, id in placed:
            ids[q, frame + late[q]] = id
        return ids
    by_place = sorted(placed, key=lambda p: (p[1], p[0]) if case.name == "coarse_first" else (p[0], p[1]))
    return np.array([id for _, _, id in by_place], dtype=np.int64)


def steps_of(ids: np.ndarray) -> list[Any]:
    """What `advance` takes, one after another."""
    return list(ids.T) if ids.ndim == 2 else list(ids)


def is_legal(layout: Layout, state: LayoutState, step: Any) -> bool:
    ranges = layout.legal_ranges(state)
    pairs = zip(step, ranges, strict=True) if layout.is_2d else [(step, ranges)]
    return all(any(first <= id < end for first, end in legal) for id, legal in pairs)


def walk(layout: Layout, ids: np.ndarray) -> AudioTokError | type[AudioTokError] | None:
    """What the grammar says of `ids`: the error of the first illegal step, incomplete, or None for legal."""
    state = layout.start()
    for step in steps_of(ids):
        legal = is_legal(layout, state, step)
        try:
            state = layout.advance(state, step)
        except TokenError as error:
            assert not legal
            return error
        assert legal
    return None if layout.can_end(state) else IncompleteFrameError


def assert_same(decoded: layouts.LayoutCodes, codes: Any, depths: np.ndarray | None) -> None:
    assert len(decoded.codes) == len(codes)
    for row, expected in zip(decoded.codes, codes, strict=True):
        assert row.dtype == np.int64
        np.testing.assert_array_equal(row, expected)
    assert (decoded.depths is None) == (depths is None)
    if depths is not None:
        np.testing.assert_array_equal(decoded.depths, depths)


# Sequences written by hand (the drawings of the docstrings; books of 10, pad id 30)

CODES = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
TENS = AudioVocabulary((10, 10, 10))
DRAWN = {
    "interleaved": [1, 14, 27, 2, 15, 28, 3, 16, 29],
    "coarse_first": [1, 2, 3, 14, 15, 16, 27, 28, 29],
    "parallel": [[1, 2, 3], [14, 15, 16], [27, 28, 29]],
    "delay": [[1, 2, 3, 30, 30], [30, 14, 15, 16, 30], [30, 30, 27, 28, 29]],
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn(name: str) -> None:
    layout = get_layout(name, TENS)
    ids = layout.codes_to_ids(CODES)
    assert ids.tolist() == DRAWN[name]
    assert ids.dtype == np.int64
    assert_same(layout.ids_to_codes(DRAWN[name]), CODES, None)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("interleaved", [1, 4, 7, 2, 5, 8, 3, 6, 9]),
        ("coarse_first", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("parallel", [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        ("delay", [[1, 2, 3, 10, 10], [10, 4, 5, 6, 10], [10, 10, 7, 8, 9]]),
    ],
)
def test_drawn_with_a_shared_book(name: str, ids: list[Any]) -> None:
    layout = get_layout(name, AudioVocabulary((10, 10, 10), shared_codebook=True))
    assert layout.codes_to_ids(CODES).tolist() == ids
    assert_same(layout.ids_to_codes(ids), CODES, None)


def test_drawn_variable() -> None:
    layout = get_layout("variable", TENS, variable_depth=True)
    codes, depths = np.array([[1, 2, 3], [0, 5, 6], [0, 8, 0]]), np.array([1, 3, 2])
    assert layout.codes_to_ids(codes, depths).tolist() == [1, 2, 15, 28, 3, 16]
    assert_same(layout.ids_to_codes([1, 2, 15, 28, 3, 16]), codes, depths)


def test_drawn_multirate() -> None:
    codes = [[1], [2, 3], [4, 5, 6, 7]]
    layout = get_layout("multirate", TENS, (4, 2, 1))
    assert layout.codes_to_ids(codes).tolist() == [1, 12, 24, 25, 13, 26, 27]
    assert_same(layout.ids_to_codes([1, 12, 24, 25, 13, 26, 27]), codes, None)
    coarse_first = get_layout("coarse_first", TENS, (4, 2, 1))
    assert coarse_first.codes_to_ids(codes).tolist() == [1, 12, 13, 24, 25, 26, 27]


# Law 1: the bijection


@each_case
@pytest.mark.parametrize("num_coarse", [0, 1, 2, 3, 17])
def test_equals_the_reference_both_ways(case: Case, num_coarse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, depths = case.random_codes(num_coarse, np.random.default_rng(num_coarse))
    expected = reference_ids(case, codes, depths)
    for block_codes in (1, 12, 1 << 16):  # edges of blocks fall everywhere
        monkeypatch.setattr(layouts, "_BLOCK_CODES", block_codes)
        ids = case.layout.codes_to_ids(codes, depths)
        np.testing.assert_array_equal(ids, expected)
        assert ids.dtype == np.int64
        assert_same(case.layout.ids_to_codes(ids), codes, depths)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """A codec of up to 5 books and one of its layouts."""
    shared = draw(st.booleans())
    count = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 1100), min_size=count, max_size=count))
    ratios = draw(st.lists(st.integers(1, draw(st.integers(1, 3))), min_size=count, max_size=count))
    strides = tuple(np.cumprod(ratios)[::-1].tolist())
    books = tuple(sizes[:1] * count if shared else sizes)
    return draw(st.sampled_from(all_layouts_of(books, shared, strides if max(strides) > 1 else None)))


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=200, deadline=None)
@given(any_case(), st.integers(0, 6), seeds)
def test_codes_survive(case: Case, num_coarse: int, seed: int) -> None:
    codes, depths = case.random_codes(num_coarse, np.random.default_rng(seed))
    layout = case.layout
    ids = layout.codes_to_ids(codes, depths)
    np.testing.assert_array_equal(ids, reference_ids(case, codes, depths))
    assert_same(layout.ids_to_codes(ids), codes, depths)
    assert_same(layout.ids_to_codes(ids.tolist() if ids.size else ids), codes, depths)
    assert walk(layout, ids) is None
    if case.name != "variable":
        num_frames = num_coarse * (case.strides or (1,))[0]
        assert layout.num_ids(num_frames) == ids.shape[-1]
        assert layout.num_frames(ids.shape[-1]) == num_frames


@settings(max_examples=200, deadline=None)
@given(any_case(), st.integers(0, 12), seeds)
def test_sampled_ids_decode(case: Case, min_steps: int, seed: int) -> None:
    layout, rng = case.layout, np.random.default_rng(seed)
    state, steps = layout.start(), []
    while len(steps) < min_steps or not layout.can_end(state):
        ranges = layout.legal_ranges(state)
        streams = ranges if layout.is_2d else (ranges,)
        if not all(streams):
            break
        # Late in the walk the last range is taken: it is the one that closes an open sequence.
        chosen = [legal[-1] if len(steps) >= min_steps else legal[rng.integers(len(legal))] for legal in streams]
        step = [int(rng.integers(*one)) for one in chosen]
        steps.append(step if layout.is_2d else step[0])
        state = layout.advance(state, steps[-1])
        assert state.position == len(steps)
        assert hash(state) is not None
    assert layout.can_end(state)
    ids = np.array(steps, dtype=np.int64).T if layout.is_2d else np.array(steps, dtype=np.int64)
    if layout.is_2d and not steps:
        ids = np.zeros((layout.num_streams, 0), dtype=np.int64)
    np.testing.assert_array_equal(layout.codes_to_ids(*layout.ids_to_codes(ids)), ids)


@settings(max_examples=300, deadline=None)
@given(any_case(), st.integers(1, 5), seeds)
def test_an_illegal_id_is_refused_where_it_stands(case: Case, num_coarse: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout, vocabulary = case.layout, case.vocabulary
    ids = layout.codes_to_ids(*case.random_codes(num_coarse, rng))
    place = tuple(int(rng.integers(n)) for n in ids.shape)
    state = layout.start()
    for step in steps_of(ids)[: place[-1]]:
        state = layout.advance(state, step)
    legal = layout.legal_ranges(state)[place[0]] if layout.is_2d else layout.legal_ranges(state)
    everything = {*range(-2, vocabulary.size + 2), -(2**63), 2**63 - 1}
    illegal = sorted(everything.difference(*(range(*one) for one in legal)))
    ids[place] = illegal[rng.integers(len(illegal))]
    with pytest.raises((InvalidIdError, SpecialTokenError)) as caught:
        layout.ids_to_codes(ids)
    stream = f" of stream {place[0]}" if layout.is_2d else ""
    assert re.search(rf"[Ii]d {ids[place]}\b.* at position {place[-1]}{stream} ", str(caught.value))
    assert isinstance(caught.value, SpecialTokenError) == (ids[place] in vocabulary.special_ids)
    assert str(walk(layout, ids)) == str(caught.value)


TINY = [
    *all_layouts_of((2, 1)),
    *all_layouts_of((2,)),
    *all_layouts_of((1, 1, 1)),
    *all_layouts_of((2, 2), shared=True),
    Case("delay", (1, 1, 1), shared=True),
    *all_layouts_of((1, 1), strides=(2, 1)),
    *all_layouts_of((1, 1), shared=True, strides=(2, 1)),
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_every_short_sequence(case: Case) -> None:
    """Decoding, the grammar and the image of encoding agree on every sequence that there is."""
    layout = case.layout
    symbols = range(case.vocabulary.size if not layout.is_2d else case.vocabulary.pad_token_id + 1)
    steps = list(itertools.product(symbols, repeat=layout.num_streams))
    most = 5000 if case.name == "delay" else 1500
    length = next(n for n in itertools.count() if len(steps) ** (n + 1) > most)
    found = set()
    for one in itertools.chain.from_iterable(itertools.product(steps, repeat=n) for n in range(length + 1)):
        ids = np.array(one, dtype=np.int64).reshape(-1, layout.num_streams).T
        ids = ids if layout.is_2d else ids[0]
        verdict = walk(layout, ids)
        if verdict is None:
            decoded = layout.ids_to_codes(ids)
            np.testing.assert_array_equal(layout.codes_to_ids(*decoded), ids)
            key = (str([row.tolist() for row in decoded.codes]), str(decoded.depths))
            assert key not in found
            found.add(key)
        elif isinstance(verdict, TokenError):
            with pytest.raises(type(verdict), match=re.escape(str(verdict))):
                layout.ids_to_codes(ids)
        else:
            with pytest.raises(IncompleteFrameError):
                layout.ids_to_codes(ids)
    assert found


# Refused codes


@each_case
def test_a_code_outside_its_book_is_refused(case: Case) -> None:
    for codebook, size in enumerate(case.sizes):
        for code in (-1, size, 2**63 - 1, -(2**63)):
            codes, depths = case.random_codes(3, np.random.default_rng(0))
            if depths is not None:
                depths[:] = len(case.sizes)
            codes[codebook][2] = code
            message = rf"Code {code} at place 2 of codebook {codebook} is outside 0 to {size - 1}: check"
            with pytest.raises(CodesError, match=message):
                case.layout.codes_to_ids(codes, depths)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint64, ">i4"])
@each_case
def test_codes_and_ids_of_every_integer_dtype(case: Case, dtype: Any) -> None:
    codes, depths = case.random_codes(5, np.random.default_rng(0))
    small = [np.minimum(row, 100) for row in codes]
    narrow = [row.astype(dtype) for row in small]
    layout = case.layout
    ids = layout.codes_to_ids(narrow, None if depths is None else depths.astype(dtype))
    np.testing.assert_array_equal(ids, layout.codes_to_ids(small, depths))
    assert ids.dtype == np.int64
    if ids.max() <= np.iinfo(dtype).max:
        assert_same(layout.ids_to_codes(ids.astype(dtype)), small, depths)


def test_a_negative_code_of_a_narrow_dtype_is_refused() -> None:
    layout = get_layout("interleaved", AudioVocabulary((1024,)))
    with pytest.raises(CodesError, match="Code -1 at place 0"):
        layout.codes_to_ids(np.array([[-1]], dtype=np.int8))
    with pytest.raises(CodesError, match="Code 18446744073709551615 at place 0"):
        layout.codes_to_ids(np.array([[2**64 - 1]], dtype=np.uint64))


@each_case
def test_any_memory_order_and_no_input_is_changed(case: Case) -> None:
    codes, depths = case.random_codes(6, np.random.default_rng(0))
    layout = case.layout
    ids = layout.codes_to_ids(codes, depths)
    strided = [np.repeat(row, 2)[::2] for row in codes] if case.strides else np.asfortranarray(codes)
    wide = np.repeat(ids, 2, axis=-1)[..., ::2]
    for array in [*strided, wide]:
        array.setflags(write=False)
    np.testing.assert_array_equal(layout.codes_to_ids(strided, depths), ids)
    decoded = layout.ids_to_codes(wide)
    assert_same(decoded, codes, depths)
    assert not any(np.shares_memory(row, wide) for row in decoded.codes)


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        ([[0.5], [0], [0]], "codes have dtype float64: whole numbers are legal; pass an integer array."),
        ([[True], [True], [True]], "codes have dtype bool"),
        ([1, 2, 3], "codes have shape [3]: [3, T] is legal; pass one row a codebook, one clip at a time."),
        ([[1, 2], [3, 4]], "codes have shape [2, 2]"),
        ([[[1], [2], [3]]], "codes have shape [1, 3, 1]"),
        ([[1, 2], [3], [4]], "codes are rows of unequal length: pass a rectangular array, one clip at a time."),
        (None, "codes have dtype object"),
    ],
)
@pytest.mark.parametrize("case", all_layouts_of((10, 10, 10)), ids=str)
def test_codes_of_another_kind(case: Case, codes: Any, sentence: str) -> None:
    with pytest.raises(CodesError, match=re.escape(sentence)):
        case.layout.codes_to_ids(codes, [1] if case.variable_depth else None)


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        ([[1], [2, 3], [4, 5, 6]], 'codes have shapes [(1,), (2,), (3,)]: layout "multirate" takes one array [T_q]'),
        ([[1], [2, 3]], "with lengths in the ratio 1:2:4, one clip at a time."),
        (np.zeros((3, 4), dtype=int), "codes have shapes [(4,), (4,), (4,)]"),
        (np.zeros((3, 1, 1), dtype=int), "codes have shapes [(1, 1), (1, 1), (1, 1)]"),
        ([1, 2, 3], "codes have shapes [(), (), ()]"),
        ([], "codes have shapes []"),
        ([[0.5], [2, 3], [4, 5, 6, 7]], "codes have dtype float64"),
    ],
)
def test_multirate_codes_of_another_kind(codes: Any, sentence: str) -> None:
    with pytest.raises(CodesError, match=re.escape(sentence)):
        get_layout("multirate", TENS, (4, 2, 1)).codes_to_ids(codes)


@pytest.mark.parametrize(
    ("depths", "sentence"),
    [
        (None, 'Layout "variable" needs the number of codes in each frame: give depths, [T] integers.'),
        ([1, 2], "depths have shape [2]: give one for each of 3 frames."),
        ([1.0, 1.0, 1.0], "depths have dtype float64"),
        ([1, 0, 2], "Depth 0 of frame 1 is outside 1 to 3: every frame has a code of codebook 0, and at most one"),
        ([1, 1, 4], "Depth 4 of frame 2 is outside 1 to 3"),
        ([3, 1, 3], "lies beyond the depth of its frame and would be lost: set it to 0, or give the right depths."),
        ([3, 2, 3], "Code 8 of codebook 2 at frame 1 lies beyond the depth of its frame"),
    ],
)
def test_depths_that_do_not_fit(depths: Any, sentence: str) -> None:
    with pytest.raises(CodesError, match=re.escape(sentence)):
        get_layout("variable", TENS, variable_depth=True).codes_to_ids(CODES, depths)


def test_a_hidden_code_is_named_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_BLOCK_CODES", 6)  # two frames a block
    codes = np.zeros((3, 9), dtype=int)
    codes[1, 7] = 5
    with pytest.raises(CodesError, match="Code 5 of codebook 1 at frame 7 lies beyond"):
        get_layout("variable", TENS, variable_depth=True).codes_to_ids(codes, np.ones(9, dtype=int))


def test_depths_are_only_for_variable() -> None:
    with pytest.raises(CodesError, match=r'Layout "interleaved" takes no depths, its frames are all whole'):
        get_layout("interleaved", TENS).codes_to_ids(CODES, [3, 3, 3])


# Lengths


def test_lengths() -> None:
    assert [get_layout(name, TENS).num_ids(5) for name in DRAWN] == [15, 15, 5, 7]
    assert [get_layout(name, TENS).num_ids(0) for name in DRAWN] == [0, 0, 0, 2]
    assert get_layout("multirate", TENS, (4, 2, 1)).num_ids(8) == 14
    assert get_layout("multirate", TENS, (4, 2, 1)).num_frames(14) == 8


def test_lengths_that_are_none() -> None:
    interleaved, delay = get_layout("interleaved", TENS), get_layout("delay", TENS)
    with pytest.raises(IncompleteFrameError, match=r'14 ids are no whole frames: layout "interleaved" has 0 and a'):
        interleaved.num_frames(14)
    with pytest.raises(IncompleteFrameError, match=r'layout "delay" has 2 and a multiple of 1'):
        delay.num_frames(1)
    with pytest.raises(CodesError, match=r"num_frames=6 is not legal: frames come in multiples of 4, from 0 on"):
        get_layout("multirate", TENS, (4, 2, 1)).num_ids(6)
    with pytest.raises(CodesError, match=r"num_frames=-1 is not legal"):
        interleaved.num_ids(-1)
    layout = get_layout("variable", TENS, variable_depth=True)
    with pytest.raises(OptionError, match=r'"variable" has no fixed number of ids a frame: sum the depths'):
        layout.num_ids(3)
    with pytest.raises(OptionError, match=r'"variable" has no fixed number of ids a frame: decode the ids'):
        layout.num_frames(3)


@each_case
def test_attributes(case: Case) -> None:
    layout = case.layout
    assert layout.name == case.name
    assert layout.is_2d == (case.name in ("parallel", "delay"))
    assert layout.num_streams == (len(case.sizes) if layout.is_2d else 1)
    assert layout.vocabulary == case.vocabulary
    assert layout.codebook_strides == (case.strides or (1,) * len(case.sizes))


# Speed: no loop over ids. The bound is far above what is measured and far below what such a loop takes.


@pytest.mark.parametrize("case", all_layouts_of((64,) * 8), ids=str)
def test_it_takes_no_loop_over_ids(case: Case) -> None:
    layout = case.layout
    codes, depths = case.random_codes(100_000, np.random.default_rng(0))
    ids = layout.codes_to_ids(codes, depths)
    broken = ids.copy()
    broken[..., -1] = -1

    def refuse() -> None:
        with pytest.raises(InvalidIdError, match=f"at position {ids.shape[-1] - 1}"):
            layout.ids_to_codes(broken)

    for work in (lambda: layout.codes_to_ids(codes, depths), lambda: layout.ids_to_codes(ids), refuse):
        assert min(timeit.repeat(work, timer=time.process_time, number=1, repeat=3)) < 0.2
