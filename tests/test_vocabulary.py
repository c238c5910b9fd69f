"""The id space (ranges, token strings, JSON), its grammar with answers written by hand, and which layouts fit it."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiotok.errors import (
    ConfigError,
    IncompleteFrameError,
    InvalidIdError,
    OptionError,
    SpecialTokenError,
    TokenError,
)
from audiotok.layouts import default_layout, get_layout, layout_names
from audiotok.vocabulary import AudioVocabulary

TENS = AudioVocabulary((10, 10, 10))
VOCABULARIES = [
    AudioVocabulary((4,)),
    AudioVocabulary((1,)),
    AudioVocabulary((4, 2, 7)),
    AudioVocabulary((5, 5, 5)),
    AudioVocabulary((6,) * 3, shared_codebook=True),
    AudioVocabulary((6,), shared_codebook=True),
]
each_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=repr)

sizes = st.lists(st.integers(1, 70_000), min_size=1, max_size=12).map(tuple)
vocabularies = st.one_of(
    sizes.map(AudioVocabulary),
    st.builds(lambda size, count: AudioVocabulary((size,) * count, True), st.integers(1, 5000), st.integers(1, 12)),
)


def test_codes_first_then_specials() -> None:
    vocabulary = AudioVocabulary((4, 2))
    tokens = ["<|a0_0|>", "<|a0_1|>", "<|a0_2|>", "<|a0_3|>", "<|a1_0|>", "<|a1_1|>"]
    tokens += ["<|audio_pad|>", "<|audio_start|>", "<|audio_end|>"]
    assert vocabulary.convert_ids_to_tokens(range(9)) == tokens
    assert vocabulary.offsets.tolist() == [0, 4]
    assert vocabulary.offsets.dtype == np.int64
    assert (vocabulary.num_audio_ids, vocabulary.size, len(vocabulary)) == (6, 9, 9)
    assert (vocabulary.pad_token_id, vocabulary.bos_token_id, vocabulary.eos_token_id) == (6, 7, 8)
    assert vocabulary.special_ids == (6, 7, 8)
    assert vocabulary.special_tokens == ("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")


def test_a_shared_codebook_is_one_range() -> None:
    vocabulary = AudioVocabulary((4, 4, 4), shared_codebook=True)
    assert vocabulary.offsets.tolist() == [0, 0, 0]
    assert (vocabulary.num_audio_ids, vocabulary.size) == (4, 7)
    assert vocabulary.convert_ids_to_tokens([3, 4]) == ["<|a0_3|>", "<|audio_pad|>"]
    assert vocabulary.codebook_of([0, 3]).tolist() == [0, 0]


@each_vocabulary
def test_every_id_has_its_own_token(vocabulary: AudioVocabulary) -> None:
    tokens = vocabulary.convert_ids_to_tokens(np.arange(vocabulary.size))
    assert len(set(tokens)) == vocabulary.size
    assert [vocabulary.token_to_id(token) for token in tokens] == list(range(vocabulary.size))
    assert [vocabulary.id_to_token(i) for i in range(vocabulary.size)] == tokens
    assert [vocabulary.id_to_token(i) for i in vocabulary.special_ids] == list(vocabulary.special_tokens)


@given(vocabularies, st.data())
def test_id_is_offset_plus_code(vocabulary: AudioVocabulary, data: st.DataObject) -> None:
    codebook = data.draw(st.integers(0, vocabulary.num_codebooks - 1))
    code = data.draw(st.integers(0, vocabulary.codebook_sizes[codebook] - 1))
    id = int(vocabulary.offsets[codebook]) + code
    book = 0 if vocabulary.shared_codebook else codebook
    assert vocabulary.id_to_token(id) == f"<|a{book}_{code}|>"
    assert vocabulary.token_to_id(f"<|a{book}_{code}|>") == id
    found = vocabulary.codebook_of([[id, id]])
    assert found.tolist() == [[book, book]]
    assert found.dtype == np.int64


@given(vocabularies)
def test_json_round_trip(vocabulary: AudioVocabulary) -> None:
    loaded = AudioVocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert loaded == vocabulary
    assert hash(loaded) == hash(vocabulary)
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def test_from_dict_has_a_default() -> None:
    assert AudioVocabulary.from_dict({"codebook_sizes": [3]}) == AudioVocabulary((3,))


def test_it_is_immutable() -> None:
    vocabulary = AudioVocabulary((4, 2))
    with pytest.raises(FrozenInstanceError):
        vocabulary.shared_codebook = True
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.offsets[0] = 1


def test_no_ids_are_fine() -> None:
    vocabulary = AudioVocabulary((4, 2))
    assert vocabulary.convert_ids_to_tokens([]) == []
    assert vocabulary.codebook_of([]).shape == (0,)
    assert vocabulary.codebook_of(np.zeros((2, 0), dtype=np.int32)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64])
def test_ids_of_every_integer_dtype(dtype: type) -> None:
    vocabulary = AudioVocabulary((4, 2))
    assert vocabulary.convert_ids_to_tokens(np.array([3, 5, 8], dtype=dtype)) == [
        "<|a0_3|>",
        "<|a1_1|>",
        "<|audio_end|>",
    ]
    assert vocabulary.codebook_of(np.array([3, 5], dtype=dtype)).tolist() == [0, 1]


@pytest.mark.parametrize("id", [-1, 9, 10**12, np.uint64(2**64 - 1)])
def test_ids_outside_are_refused(id: int) -> None:
    vocabulary = AudioVocabulary((4, 2))
    with pytest.raises(InvalidIdError, match=rf"Id {id} is not legal here: legal ids are 0 to 8 .*subtract"):
        vocabulary.id_to_token(id)
    with pytest.raises(InvalidIdError, match=rf"Id {id} is not legal here: audio ids are 0 to 5\. Check"):
        vocabulary.codebook_of([id])


def test_specials_have_no_codebook() -> None:
    with pytest.raises(InvalidIdError, match=r"Id 6 is not legal here: audio ids are 0 to 5"):
        AudioVocabulary((4, 2)).codebook_of([6])


def test_other_kinds_of_ids_are_refused() -> None:
    vocabulary = AudioVocabulary((4, 2))
    with pytest.raises(InvalidIdError, match=r"ids have dtype float64: whole numbers"):
        vocabulary.convert_ids_to_tokens([1.0])
    with pytest.raises(InvalidIdError, match=r"ids have shape \(1, 2\): pass one sequence"):
        vocabulary.convert_ids_to_tokens([[1, 2]])
    with pytest.raises(InvalidIdError, match=r"ids are rows of unequal length"):
        vocabulary.codebook_of([[1], [1, 2]])


@pytest.mark.parametrize(
    "token",
    ["", "a0_1", "<|a0_4|>", "<|a2_0|>", "<|a0_01|>", "<|a00_1|>", "<|a0_-1|>", "<|a0_1|>\n", "<|a0_١|>", "<|audio|>"],
)
def test_strings_that_are_no_tokens_are_refused(token: str) -> None:
    with pytest.raises(InvalidIdError) as caught:
        AudioVocabulary((4, 2)).token_to_id(token)
    message = str(caught.value)
    assert message.startswith(f"{token!r} is no token of this vocabulary.")
    assert "<|a0_0|> to <|a0_3|>, <|a1_0|> to <|a1_1|> and <|audio_pad|>" in message


def test_a_shared_codebook_has_tokens_of_book_0_only() -> None:
    with pytest.raises(InvalidIdError, match=r"Its tokens are <\|a0_0\|> to <\|a0_3\|> and"):
        AudioVocabulary((4, 4), shared_codebook=True).token_to_id("<|a1_0|>")


@pytest.mark.parametrize("sizes", [(), (0,), (4, -1), (4.0,), "44", None, 4])
def test_impossible_sizes_are_refused(sizes: object) -> None:
    with pytest.raises(ConfigError, match=r"codebook_sizes=.* is not legal: give a list of whole numbers"):
        AudioVocabulary(sizes)


def test_impossible_sharing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"codebook_sizes=\(4, 2\) differ, but a shared codebook has one size"):
        AudioVocabulary((4, 2), shared_codebook=True)
    with pytest.raises(ConfigError, match=r"shared_codebook='no' is not legal: give True or False"):
        AudioVocabulary((4, 4), shared_codebook="no")


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'knows no key "codebook_size"\. Did you mean "codebook_sizes"\?'):
        AudioVocabulary.from_dict({"codebook_size": [4]})
    with pytest.raises(ConfigError, match=r"codebook_sizes=\(\) is not legal"):
        AudioVocabulary.from_dict({"shared_codebook": False})


def test_it_imports_without_torch() -> None:
    program = "import sys, audiotok.layouts; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# The grammar's answers by hand


def test_legal_ranges_of_interleaved() -> None:
    layout = get_layout("interleaved", TENS)
    state = layout.start()
    assert layout.legal_ranges(state) == ((0, 10),)
    assert layout.can_end(state)
    state = layout.advance(state, 3)
    assert layout.legal_ranges(state) == ((10, 20),)
    assert not layout.can_end(state)
    assert layout.can_end(layout.advance(layout.advance(state, 10), 29))


def test_legal_ranges_of_coarse_first() -> None:
    layout = get_layout("coarse_first", AudioVocabulary((10, 10)))
    state = layout.start()
    assert layout.legal_ranges(state) == ((0, 10),)
    assert layout.can_end(state)
    for id in (3, 4):
        state = layout.advance(state, id)
        assert layout.legal_ranges(state) == ((0, 10), (10, 20))
        assert not layout.can_end(state)
    state = layout.advance(state, 13)
    assert layout.legal_ranges(state) == ((10, 20),)
    state = layout.advance(state, 14)
    assert layout.legal_ranges(state) == ()
    assert layout.can_end(state)
    with pytest.raises(InvalidIdError, match=r"Id 15 .* at position 4 is not legal: .* takes no more ids here\."):
        layout.advance(state, 15)


def test_legal_ranges_of_variable() -> None:
    layout = get_layout("variable", TENS, variable_depth=True)
    expected = {None: ((0, 10),), 3: ((0, 10), (10, 20)), 13: ((0, 10), (20, 30)), 23: ((0, 10),)}
    state = layout.start()
    for id, ranges in expected.items():
        state = state if id is None else layout.advance(state, id)
        assert layout.legal_ranges(state) == ranges
        assert layout.can_end(state)


def test_legal_ranges_of_delay() -> None:
    layout = get_layout("delay", AudioVocabulary((10, 10)))
    pad, first, second = (20, 21), (0, 10), (10, 20)
    state = layout.start()
    assert layout.legal_ranges(state) == ((first, pad), (pad,))
    assert not layout.can_end(state)
    state = layout.advance(state, [3, 20])
    assert layout.legal_ranges(state) == ((first, pad), (second,))
    state = layout.advance(state, (20, 13))
    assert layout.legal_ranges(state) == ((), ())
    assert layout.can_end(state)
    assert layout.legal_ranges(layout.advance(layout.start(), [20, 20])) == ((), ())


def test_legal_ranges_of_parallel() -> None:
    layout = get_layout("parallel", TENS)
    state = layout.advance(layout.start(), np.array([3, 13, 23]))
    assert layout.legal_ranges(state) == (((0, 10),), ((10, 20),), ((20, 30),))
    assert layout.can_end(state)


def test_a_state_is_not_changed_by_advancing() -> None:
    layout = get_layout("interleaved", TENS)
    state = layout.start()
    assert layout.advance(state, 3) == layout.advance(state, 4)
    assert state == layout.start()


def test_a_step_of_another_width_is_refused() -> None:
    layout = get_layout("parallel", TENS)
    with pytest.raises(InvalidIdError, match=r'A step of layout "parallel" has 3 ids, one a stream; got 2\.'):
        layout.advance(layout.start(), [3, 13])


# Refused ids: what the sentence says

WHERE = 'at position 2 is not legal: layout "{}" takes codebook 2 (ids 20 to 29) here. Check that the ids were made '
CUT = 'The ids end at position {}, before a frame is whole: layout "{}" takes {}. Give the missing ids, or cut'
FIRST, SECOND, THIRD = "codebook 0 (ids 0 to 9)", "codebook 1 (ids 10 to 19)", "codebook 2 (ids 20 to 29)"


@pytest.mark.parametrize(
    ("name", "ids", "error", "sentence"),
    [
        ("interleaved", [1, 14, 7], InvalidIdError, "Id 7 (<|a0_7|>) " + WHERE.format("interleaved")),
        ("interleaved", [1, 99, 27], InvalidIdError, "Id 99 at position 1 is outside the vocabulary of 33 ids: lay"),
        ("interleaved", [1, 99, 27], InvalidIdError, "where text ids share the vocabulary, subtract the audio offset"),
        ("interleaved", [1, 14, 27, 32], SpecialTokenError, "Special token <|audio_end|> (id 32) at position 3 stands"),
        ("interleaved", [1, 14, 27, 32], SpecialTokenError, f"takes {FIRST} here. Cut special tokens off both ends"),
        ("interleaved", [1, 14], IncompleteFrameError, CUT.format(2, "interleaved", THIRD + " next")),
        ("coarse_first", [1, 2, 14], IncompleteFrameError, CUT.format(3, "coarse_first", SECOND + " next")),
        ("coarse_first", [1, 2, 14, 15, 27], IncompleteFrameError, f"takes {THIRD} next"),
        ("coarse_first", [1, 2], IncompleteFrameError, f"takes {FIRST} or {SECOND} next"),
        ("coarse_first", [1, 14, 15], InvalidIdError, "Id 15 (<|a1_5|>) " + WHERE.format("coarse_first")),
        ("coarse_first", [14], InvalidIdError, f'at position 0 is not legal: layout "coarse_first" takes {FIRST} here'),
        ("variable", [1, 14, 14], InvalidIdError, f"takes {FIRST} or {THIRD} here"),
        ("variable", [14, 1], InvalidIdError, f'at position 0 is not legal: layout "variable" takes {FIRST} here'),
        ("variable", [1, 14, 27, 28], InvalidIdError, f'at position 3 is not legal: layout "variable" takes {FIRST} h'),
        ("variable", [1, -5, 14], InvalidIdError, "Id -5 at position 1 is outside the vocabulary"),
        ("parallel", [[1, 2], [14, 15], [27, 8]], InvalidIdError, "Id 8 (<|a0_8|>) at position 1 of stream 2 is not"),
        ("delay", [[1, 30, 30], [30, 14, 30], [30, 30, 7]], InvalidIdError, "at position 2 of stream 2 is not legal"),
        ("delay", [[1, 30, 30], [14, 14, 30], [30, 30, 27]], InvalidIdError, "takes the pad id 30 here"),
        ("delay", [[1, 31, 30], [30, 14, 30], [30, 30, 27]], SpecialTokenError, f"{FIRST} or the pad id 30 here"),
        ("delay", [[1, 30, 2], [30, 14, 30], [30, 30, 27]], InvalidIdError, "(<|a0_2|>) at position 2 of stream 0"),
        ("delay", [[1, 30], [30, 14], [30, 30]], IncompleteFrameError, f"takes the pad id 30 and {THIRD} next"),
        ("delay", [[], [], []], IncompleteFrameError, "The ids end at position 0"),
    ],
)
def test_refused_ids(name: str, ids: list[Any], error: type[TokenError], sentence: str) -> None:
    layout = get_layout(name, TENS, variable_depth=name == "variable")
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        layout.ids_to_codes(ids)
    assert caught.type is error


@pytest.mark.parametrize(
    ("name", "ids", "sentence"),
    [
        ("interleaved", [1.0, 14.0, 27.0], "ids have dtype float64: whole numbers are legal; pass an integer array."),
        ("interleaved", [True, False, True], "ids have dtype bool"),
        ("interleaved", [[1, 14, 27]], 'ids have shape [1, 3]: layout "interleaved" takes [L], one clip at a time.'),
        ("interleaved", 1, "ids have shape []"),
        ("parallel", [1, 14, 27], 'ids have shape [3]: layout "parallel" takes [3, S], one row a codebook.'),
        ("delay", [[1, 14], [27, 28]], "ids have shape [2, 2]"),
        ("parallel", [[1, 2], [14], [27]], "ids are rows of unequal length: pass a rectangular array"),
    ],
)
def test_ids_of_another_kind(name: str, ids: Any, sentence: str) -> None:
    with pytest.raises(InvalidIdError, match=re.escape(sentence)):
        get_layout(name, TENS).ids_to_codes(ids)


def test_a_huge_unsigned_id_is_named_as_it_is() -> None:
    for name in ("interleaved", "coarse_first", "variable"):
        layout = get_layout(name, AudioVocabulary((10,)), variable_depth=name == "variable")
        with pytest.raises(InvalidIdError, match=r"Id 18446744073709551615 at position 1 is outside"):
            layout.ids_to_codes(np.array([3, 2**64 - 1], dtype=np.uint64))


# Which layouts fit a vocabulary and its codec


def test_layouts_that_fit() -> None:
    shared = AudioVocabulary((5, 5), shared_codebook=True)
    fixed = ("interleaved", "coarse_first", "parallel", "delay")
    assert layout_names(TENS) == layout_names(shared) == layout_names(TENS, (1, 1, 1)) == fixed
    assert layout_names(TENS, (4, 2, 1)) == ("multirate", "coarse_first")
    assert layout_names(TENS, variable_depth=True) == ("variable",)
    assert layout_names(AudioVocabulary((5,), shared_codebook=True), variable_depth=True) == ("variable",)


def test_default_layouts() -> None:
    assert default_layout(TENS).name == "interleaved"
    assert default_layout(TENS, (4, 2, 1)).name == "multirate"
    assert default_layout(TENS, variable_depth=True).name == "variable"


@pytest.mark.parametrize(
    ("name", "strides", "variable_depth", "sentence"),
    [
        ("interleave", None, False, 'Did you mean "interleaved"?'),
        ("flat", None, False, "layout='flat' is not legal: choose one of interleaved, coarse_first, parallel, delay"),
        ("variable", None, False, "does not fit a codec with codebook_strides=(1, 1, 1) and variable_depth=False"),
        ("multirate", None, False, "choose interleaved or coarse_first or parallel or delay."),
        ("delay", (4, 2, 1), False, 'layout="delay" does not fit a codec with codebook_strides=(4, 2, 1) and'),
        ("delay", (4, 2, 1), False, "choose multirate or coarse_first."),
        ("interleaved", None, True, "and variable_depth=True: choose variable."),
        ("variable", (2, 1, 1), True, "variable_depth=True fits no codec with a shared codebook or codebooks of diff"),
        ("multirate", (1, 2, 4), False, "codebook_strides=(1, 2, 4) is not legal: give 3 numbers from 1 on"),
        ("multirate", (6, 4, 1), False, "each a divisor of the one before (coarse to fine)."),
        ("multirate", (2, 1), False, "codebook_strides=(2, 1) is not legal"),
        ("multirate", (2, 0, 0), False, "codebook_strides=(2, 0, 0) is not legal"),
    ],
)
def test_layouts_that_do_not_fit(name: str, strides: Any, variable_depth: bool, sentence: str) -> None:
    with pytest.raises(OptionError, match=re.escape(sentence)):
        get_layout(name, TENS, strides, variable_depth)


def test_variable_needs_distinct_books() -> None:
    shared = AudioVocabulary((5, 5), shared_codebook=True)
    with pytest.raises(OptionError, match=r"fits no codec with a shared codebook .* Use distinct codebooks"):
        default_layout(shared, variable_depth=True)
