"""Layouts are bijections and grammars: against a slow reference, exhaustively on tiny books, and by property.

`Case` is a codec with one of its layouts. The reference sorts codes one by one by where they stand, so it shares
nothing with the lanes and blocks of the implementation.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import CODES, TENS, Case, all_layouts_of, assert_same, each_case

from audiotok import layouts
from audiotok.errors import (
    AudioTokError,
    IncompleteFrameError,
    InvalidIdError,
    SpecialTokenError,
    TokenError,
)
from audiotok.grammar import LayoutState
from audiotok.layouts import Layout, get_layout
from audiotok.vocabulary import AudioVocabulary


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


# Sequences written by hand (the drawings of the docstrings; books of 10, pad id 30)

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
