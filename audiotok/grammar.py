"""The grammar of ids: which may follow which. The half of a layout that constrained sampling needs.

From `start()`, `legal_ranges(state)` says which ids may come next, `advance(state, id)` takes one, and
`can_end(state)` says where a sequence may stop. Ids that do not decode are refused here, with one sentence each.
What may follow is a matter of the position (`FixedGrammar`) or of the ids before (`VariableGrammar`).
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from audiotok.errors import (
    CodesError,
    IncompleteFrameError,
    InvalidIdError,
    OptionError,
    SpecialTokenError,
    TokenError,
)
from audiotok.vocabulary import AudioVocabulary, as_integers, first_true


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
        codebook_strides: frames per code of each codebook.
    """

    name: ClassVar[str]
    is_2d: ClassVar[bool] = False

    def __init__(self, vocabulary: AudioVocabulary, codebook_strides: tuple[int, ...]) -> None:
        self.vocabulary = vocabulary
        self.codebook_strides = codebook_strides
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

    @abstractmethod
    def num_ids(self, num_frames: int) -> int:
        """Length of the sequence of `num_frames` frames: ids, or steps for a 2-D layout. OptionError if not fixed."""

    @abstractmethod
    def num_frames(self, num_ids: int) -> int:
        """Frames in a sequence of this length; the inverse of `num_ids`."""

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


class FixedGrammar(IdGrammar):
    """Grammar of ids whose number alone says where each code goes: what may follow is a matter of the position.

    A subclass says which kinds stand where (`_kinds_at`).
    """

    def __init__(self, vocabulary: AudioVocabulary, codebook_strides: tuple[int, ...]) -> None:
        super().__init__(vocabulary, codebook_strides)
        self._repeats = [codebook_strides[0] // stride for stride in codebook_strides]  # codes a coarse frame
        self._period = 1 if self.is_2d else sum(self._repeats)  # positions a coarse frame
        self._tail = 0  # positions over those
        self._shows_end = False  # an id of another kind than codebook 0 shows how many frames there are

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

    def can_end(self, state: LayoutState) -> bool:
        if not self._shows_end:
            return state.position % self._period == 0
        if state.num_frames is None:
            return state.position == 0 and self._tail == 0
        return state.position == state.num_frames * self._period + self._tail

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


class VariableGrammar(IdGrammar):
    """Grammar of frames of one to Q ids, coarse to fine: each id deepens the frame, or begins the next one."""

    def num_ids(self, num_frames: int) -> int:
        raise OptionError(f'Layout "{self.name}" has no fixed number of ids a frame: sum the depths of the clip.')

    def num_frames(self, num_ids: int) -> int:
        raise OptionError(f'Layout "{self.name}" has no fixed number of ids a frame: decode the ids to know.')

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
