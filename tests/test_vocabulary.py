"""The id space: ranges, token strings, JSON, refusals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiotok.errors import ConfigError, InvalidIdError
from audiotok.vocabulary import AudioVocabulary

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
    assert vocabulary.convert_ids_to_tokens(np.array([3, 5, 8], dtype=dtype)) == ["<|a0_3|>", "<|a1_1|>", "<|audio_end|>"]
    assert vocabulary.codebook_of(np.array([3, 5], dtype=dtype)).tolist() == [0, 1]


@pytest.mark.parametrize("id", [-1, 9, 10**12, np.uint64(2**64 - 1)])
def test_ids_outside_are_refused(id: int) -> None:
    vocabulary = AudioVocabulary((4, 2))
    with pytest.raises(InvalidIdError, match=rf"Id {id} is not legal here: legal ids are 0 to 8 .*subtract"):
        vocabulary.id_to_token(id)
    with pytest.raises(InvalidIdError, match=rf"Id {id} is not legal here: audio ids are 0 to 5\. Check"):
        vocabulary.codebook_of([0, id])


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
