"""The id space of a codec's language model, and the base of the rules by which its ids follow each other.

Codes come first, special tokens follow. For codebooks of 4 and 2 entries:

    id      0         1         2         3         4         5         6              7                8
    token  <|a0_0|>  <|a0_1|>  <|a0_2|>  <|a0_3|>  <|a1_0|>  <|a1_1|>  <|audio_pad|>  <|audio_start|>  <|audio_end|>

With one codebook, or one that all streams share, the id is the code. Where audio ids live behind text ids, the
caller adds the text vocabulary's size; here every id counts from 0. `AudioVocabulary` names the ids,
`IdGrammar` says which may come next; the layouts are its subclasses.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from audiotok.errors import (
    CodesError,
    ConfigError,
    InvalidIdError,
    TokenError,
    did_you_mean,
)

PAD_TOKEN = "<|audio_pad|>"
BOS_TOKEN = "<|audio_start|>"
EOS_TOKEN = "<|audio_end|>"

_CODE_TOKEN = re.compile(r"<\|a(0|[1-9][0-9]*)_(0|[1-9][0-9]*)\|>")


@dataclass(frozen=True)
class AudioVocabulary:
    """Which id stands for which code.

    Attributes:
        codebook_sizes: entries of each stream of codes (as in `CodecFacts`).
        shared_codebook: all streams index one book, so they share one range of ids and a code's place in the
            sequence names its stream.

    Raises:
        ConfigError: no codebook, a size that is no whole number of at least 1, or a shared codebook with
            unequal sizes.
    """

    codebook_sizes: tuple[int, ...]
    shared_codebook: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", _checked_sizes(self.codebook_sizes))
        if not isinstance(self.shared_codebook, bool):
            raise ConfigError(f"shared_codebook={self.shared_codebook!r} is not legal: give True or False.")
        if self.shared_codebook and len(set(self.codebook_sizes)) > 1:
            raise ConfigError(
                f"codebook_sizes={self.codebook_sizes} differ, but a shared codebook has one size: give equal "
                "sizes or set shared_codebook=False."
            )

    @property
    def num_codebooks(self) -> int:
        """Streams of codes, Q."""
        return len(self.codebook_sizes)

    @cached_property
    def offsets(self) -> np.ndarray:
        """`[Q]` int64, read-only: code `c` of codebook `q` has the id `offsets[q] + c`."""
        starts = [0] * self.num_codebooks
        if not self.shared_codebook:
            starts = [0, *accumulate(self.codebook_sizes[:-1])]
        offsets = np.array(starts, dtype=np.int64)
        offsets.setflags(write=False)
        return offsets

    @property
    def num_audio_ids(self) -> int:
        """Ids that stand for codes: 0 to `num_audio_ids - 1`."""
        return self.codebook_sizes[0] if self.shared_codebook else sum(self.codebook_sizes)

    @property
    def size(self) -> int:
        """All ids, special tokens included."""
        return self.num_audio_ids + len(self.special_tokens)

    def __len__(self) -> int:
        return self.size

    @property
    def pad_token_id(self) -> int:
        return self.num_audio_ids

    @property
    def bos_token_id(self) -> int:
        return self.num_audio_ids + 1

    @property
    def eos_token_id(self) -> int:
        return self.num_audio_ids + 2

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids of pad, start, end."""
        return self.pad_token_id, self.bos_token_id, self.eos_token_id

    @property
    def special_tokens(self) -> tuple[str, str, str]:
        """Token strings of pad, start, end, in the order of `special_ids`."""
        return PAD_TOKEN, BOS_TOKEN, EOS_TOKEN

    def codebook_of(self, ids: ArrayLike) -> np.ndarray:
        """Codebook of each audio id, int64 in the shape of `ids`; 0 for all ids of a shared codebook.

        Raises:
            InvalidIdError: an id that stands for no code; special tokens have no codebook.
        """
        ids = self._checked(ids, self.num_audio_ids, f"audio ids are 0 to {self.num_audio_ids - 1}")
        return np.searchsorted(self._book_ends, ids, side="right")

    def id_to_token(self, id: int) -> str:
        """Token string of an id, `<|a0_17|>` for code 17 of codebook 0.

        Raises:
            InvalidIdError: an id outside the vocabulary.
        """
        return self.convert_ids_to_tokens([id])[0]

    def token_to_id(self, token: str) -> int:
        """Id of a token string; the inverse of `id_to_token`.

        Raises:
            InvalidIdError: a string that is no token of this vocabulary.
        """
        if token in self.special_tokens:
            return self.special_ids[self.special_tokens.index(token)]
        match = _CODE_TOKEN.fullmatch(token)
        if match:
            codebook, code = int(match[1]), int(match[2])
            if codebook < len(self._book_ends) and code < self.codebook_sizes[codebook]:
                return int(self.offsets[codebook]) + code
        books = ", ".join(f"<|a{q}_0|> to <|a{q}_{k - 1}|>" for q, k in enumerate(self._book_sizes))
        raise InvalidIdError(
            f"{token!r} is no token of this vocabulary. Its tokens are {books} and "
            f"{', '.join(self.special_tokens)}: check that the text was made with this codec's tokenizer."
        )

    def convert_ids_to_tokens(self, ids: ArrayLike) -> list[str]:
        """Token strings of a one-dimensional sequence of ids, special tokens included.

        Raises:
            InvalidIdError: an id outside the vocabulary, or ids in another shape.
        """
        legal = (
            f"legal ids are 0 to {self.size - 1} (audio ids to {self.num_audio_ids - 1}, then "
            f"{', '.join(self.special_tokens)})"
        )
        ids = self._checked(ids, self.size, legal)
        if ids.ndim != 1:
            raise InvalidIdError(f"ids have shape {ids.shape}: pass one sequence of ids at a time.")
        books = np.searchsorted(self._book_ends, ids, side="right")
        starts = np.append(self.offsets[: len(self._book_ends)], self.num_audio_ids)
        places = zip(books.tolist(), (ids - starts[books]).tolist(), strict=True)
        specials, num_books = self.special_tokens, len(self._book_ends)
        return [f"<|a{q}_{c}|>" if q < num_books else specials[c] for q, c in places]

    def check_codes(self, codes: ArrayLike) -> np.ndarray:
        """`codes` as an array of integers `[Q, T]`; their range is not looked at.

        Raises:
            CodesError: another dtype or shape.
        """
        array = as_integers(codes, "codes", CodesError)
        if array.ndim != 2 or len(array) != self.num_codebooks:
            raise CodesError(
                f"codes have shape {list(array.shape)}: [{self.num_codebooks}, T] is legal; pass one row a codebook, "
                "one clip at a time."
            )
        return array

    def code_error(self, rows: np.ndarray | Sequence[np.ndarray]) -> CodesError:
        """The error, to be raised, for the first code in `rows` `[Q, T_q]` that its codebook does not have."""
        illegal = [(row < 0) | (row >= size) for row, size in zip(rows, self.codebook_sizes, strict=True)]
        codebook = next(q for q, mask in enumerate(illegal) if mask.any())
        place = int(illegal[codebook].argmax())
        return CodesError(
            f"Code {rows[codebook][place]} at place {place} of codebook {codebook} is outside 0 to "
            f"{self.codebook_sizes[codebook] - 1}: check that the codes come from this codec."
        )

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values, from which `from_dict` makes an equal vocabulary."""
        return {"codebook_sizes": list(self.codebook_sizes), "shared_codebook": self.shared_codebook}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AudioVocabulary:
        """The vocabulary that `to_dict` described.

        Raises:
            ConfigError: an unknown key, a missing `codebook_sizes`, or values that are not legal.
        """
        legal = [field.name for field in fields(cls)]
        for key in data:
            if key not in legal:
                raise ConfigError(
                    f'A vocabulary knows no key "{key}".{did_you_mean(key, legal)} Legal keys: {", ".join(legal)}.'
                )
        return cls(data.get("codebook_sizes", ()), data.get("shared_codebook", False))

    @property
    def _book_sizes(self) -> tuple[int, ...]:
        """Sizes of the distinct books: one entry where the codebook is shared."""
        return self.codebook_sizes[:1] if self.shared_codebook else self.codebook_sizes

    @cached_property
    def _book_ends(self) -> np.ndarray:
        return np.cumsum(self._book_sizes)

    def _checked(self, ids: ArrayLike, end: int, legal: str) -> np.ndarray:
        """`ids` as int64, all of them in `[0, end)`."""
        array = as_integers(ids, "ids", InvalidIdError)
        illegal = (array < 0) | (array >= end)
        if illegal.any():
            raise InvalidIdError(
                f"Id {array[illegal][0]} is not legal here: {legal}. Check that the ids come from this codec's "
                "tokenizer; where text ids share the vocabulary, subtract the offset of the audio ids first."
            )
        return array.astype(np.int64, copy=False)


def as_integers(value: ArrayLike, what: str, error: type[TokenError]) -> np.ndarray:
    """`value` as an array of integers of its own width; an empty one as int64.

    Raises:
        error: numbers of another kind, or rows of unequal length; the sentence begins with `what`.
    """
    try:
        array = np.asarray(value)
    except ValueError as cause:
        raise error(f"{what} are rows of unequal length: pass a rectangular array, one clip at a time.") from cause
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise error(f"{what} have dtype {array.dtype}: whole numbers are legal; pass an integer array.")
    return array


def _checked_sizes(value: Iterable[Any]) -> tuple[int, ...]:
    """`value` as a tuple of one whole number of at least 1 a codebook."""
    message = f"codebook_sizes={value!r} is not legal: give a list of whole numbers of at least 1, one a codebook."
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError as error:
        raise ConfigError(message) from error
    if not sizes or min(sizes) < 1:
        raise ConfigError(message)
    return sizes


def first_true(mask: np.ndarray) -> int | None:
    """Index of the first True, if there is any."""
    return int(mask.argmax()) if mask.any() else None


def within(codes: np.ndarray, size: int) -> bool:
    """Whether int64 `codes` are all in `[0, size)`: as unsigned numbers, negative ones are huge."""
    return bool(codes.view(np.uint64).max(initial=0) < size)
