"""What layouts refuse, every integer type that they take, lengths, and that no loop runs over ids."""

from __future__ import annotations

import re
import time
import timeit
from typing import Any

import numpy as np
import pytest
from layout_cases import CODES, TENS, Case, all_layouts_of, assert_same, each_case

from audiotok import layouts
from audiotok.errors import CodesError, IncompleteFrameError, InvalidIdError, OptionError
from audiotok.layouts import get_layout
from audiotok.vocabulary import AudioVocabulary

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
    fixed = [get_layout(name, TENS) for name in ("interleaved", "coarse_first", "parallel", "delay")]
    assert [layout.num_ids(5) for layout in fixed] == [15, 15, 5, 7]
    assert [layout.num_ids(0) for layout in fixed] == [0, 0, 0, 2]
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
