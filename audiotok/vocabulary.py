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
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from audiotok.errors import (
    CodesError,
    ConfigError,
    IncompleteFrameError,
    InvalidIdError,
    SpecialTokenError,
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


class LayoutState(NamedTuple):
    """How far a sequence of ids has come; a plain immutable value.

    Attributes:
        position: ids (1-D) or steps (2-D) so far.
        num_frames: coarse frames, once the ids have shown how many there are (`coarse_first`, `delay`).
        depth: codes so far in the last frame (`variable`).
    """

    position: int = 0
    num_frames: int | None = None
    depth: int = 0


class IdGrammar(ABC):
    """Which ids may follow which: the half of a layout that constrained sampling needs.

    From `start()`, `legal_ranges(state)` says which ids may come next, `advance(state, id)` takes one, and
    `can_end(state)` says where a sequence may stop.

    Attributes:
        name: what users call the layout.
        is_2d: ids are `[Q, S]`, one stream a codebook, rather than `[L]`.
        vocabulary: the id space.
    """

    name: ClassVar[str]
    is_2d: ClassVar[bool] = False

    def __init__(self, vocabulary: AudioVocabulary) -> None:
        self.vocabulary = vocabulary
        # A place takes kinds of ids: kind q is codebook q, after the codebooks come "no id" and the pad id.
        num_codebooks, pad = vocabulary.num_codebooks, vocabulary.pad_token_id
        self._nothing, self._pad = num_codebooks, num_codebooks + 1
        self._sizes, self._offsets = vocabulary.codebook_sizes, vocabulary.offsets.tolist()
        books = [(first, first + size) for first, size in zip(self._offsets, self._sizes, strict=True)]
        self._ranges = [*books, (0, 0), (pad, pad + 1)]

    @property
    def num_streams(self) -> int:
        """Ids a step: 1, or Q for a 2-D layout."""
        return self.vocabulary.num_codebooks if self.is_2d else 1

    def start(self) -> LayoutState:
        """The state before the first id."""
        return LayoutState()

    def legal_ranges(self, state: LayoutState) -> tuple[Any, ...]:
        """Ids that may come next, as half-open ranges `((first, end), ...)`; for a 2-D layout one such tuple a
        stream. No ranges where the sequence is over."""
        streams = tuple(tuple(self._ranges[kind] for kind in kinds) for kinds in self._legal_kinds(state))
        return streams if self.is_2d else streams[0]

    def advance(self, state: LayoutState, id: Any) -> LayoutState:
        """The state after one more id, or after one step of Q ids for a 2-D layout.

        Raises:
            InvalidIdError, SpecialTokenError: an id outside `legal_ranges(state)`.
        """
        step = [operator.index(one) for one in (id if self.is_2d else [id])]
        legal = self._legal_kinds(state)
        if len(step) != len(legal):
            raise InvalidIdError(f'A step of layout "{self.name}" has {len(legal)} ids, one a stream; got {len(step)}.')
        kinds = []
        for stream, (one, allowed) in enumerate(zip(step, legal, strict=True)):
            kind = next((k for k in allowed if self._ranges[k][0] <= one < self._ranges[k][1]), None)
            if kind is None:
                place = f"position {state.position}" + (f" of stream {stream}" if self.is_2d else "")
                raise self._refusal(one, place, allowed)
            kinds.append(kind)
        return self._next_state(state, kinds)

    @abstractmethod
    def can_end(self, state: LayoutState) -> bool:
        """Whether the ids so far are a whole sequence. No ids at all are one of no frames (but see `delay`)."""

    @abstractmethod
    def _legal_kinds(self, state: LayoutState) -> Sequence[Sequence[int]]:
        """Kinds of ids that may come next, for each stream."""

    @abstractmethod
    def _next_state(self, state: LayoutState, kinds: Sequence[int]) -> LayoutState:
        """The state after a step of ids of these legal kinds, one a stream."""

    # The same for whole arrays, to say in one pass what is wrong with ids that were found not to decode.

    @abstractmethod
    def _state_after(self, ids: np.ndarray) -> LayoutState:
        """The state after `ids`, all of them legal."""

    @abstractmethod
    def _expected_kinds(self, ids: np.ndarray) -> np.ndarray:
        """In the shape of `ids`: the kind legal at each place after the ids before it. Where two are, the one
        that the id there has, if it has one of them."""

    def _check_ids(self, ids: ArrayLike) -> np.ndarray:
        array = as_integers(ids, "ids", InvalidIdError)
        if array.ndim != 1 + self.is_2d or (self.is_2d and len(array) != self.num_streams):
            legal = f"[{self.num_streams}, S], one row a codebook" if self.is_2d else "[L], one clip at a time"
            raise InvalidIdError(f'ids have shape {list(array.shape)}: layout "{self.name}" takes {legal}.')
        return array

    def _refuse(self, ids: np.ndarray) -> NoReturn:
        """Raise for `ids` that do not decode: name the first illegal one, or else what is missing at the end."""
        bounds = np.array(self._ranges)[self._expected_kinds(ids)]
        illegal = (ids < bounds[..., 0]) | (ids >= bounds[..., 1])
        position = first_true(np.logical_or.reduce(np.atleast_2d(illegal), axis=0))
        state = self._state_after(ids[..., :position])
        if position is not None:
            self.advance(state, ids[..., position])
        wanted = " and ".join(dict.fromkeys(map(self._describe, self._legal_kinds(state))))
        raise IncompleteFrameError(
            f'The ids end at position {state.position}, before a frame is whole: layout "{self.name}" takes '
            f"{wanted} next. Give the missing ids, or cut the sequence where it was whole."
        )

    def _refusal(self, id: int, place: str, allowed: Sequence[int]) -> TokenError:
        """The error for an id that is not of the `allowed` kinds."""
        wanted = f'layout "{self.name}" takes {self._describe(allowed)} here'
        if not 0 <= id < self.vocabulary.size:
            return InvalidIdError(
                f"Id {id} at {place} is outside the vocabulary of {self.vocabulary.size} ids: {wanted}. Check that "
                "the ids come from this codec; where text ids share the vocabulary, subtract the audio offset first."
            )
        token = self.vocabulary.id_to_token(id)
        if id in self.vocabulary.special_ids:
            return SpecialTokenError(
                f"Special token {token} (id {id}) at {place} stands among audio ids: {wanted}. Cut special tokens "
                "off both ends, and decode the clips of a longer sequence one by one."
            )
        return InvalidIdError(
            f"Id {id} ({token}) at {place} is not legal: {wanted}. Check that the ids were made with this layout "
            "and that none was lost or added before this place."
        )

    def _describe(self, kinds: Sequence[int]) -> str:
        books = [f"codebook {k} (ids {first} to {end - 1})" for k, (first, end) in enumerate(self._ranges)]
        names = [*books[: self._nothing], "", f"the pad id {self.vocabulary.pad_token_id}"]
        return " or ".join(names[kind] for kind in kinds) or "no more ids"


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
