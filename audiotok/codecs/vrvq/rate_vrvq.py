"""What decides the depth of VRVQ's frames: the options, the bits a second they cost, the level that gives a bitrate.

A frame of importance p keeps min(Q, floor(p * level * Q) + 1) books. Counted are the bits of the codes kept, and the
depth of each frame, without which the codes cannot be told apart: both of fixed width, as a plain bit packer spends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from audiotok.errors import OptionError

# What decides the depth; at most one of them for a clip.
DEPTH_OPTIONS = ("level", "bitrate", "num_quantizers")
DEFAULT_LEVEL = 1.0
# Training goes to level 6, and at 64 a frame of importance 1/64 is whole: beyond it stands a bitrate, or a mistake.
MAX_LEVEL = 64.0
# How far the bitrate that is met may be from the one asked for.
TOLERANCE = 0.02
# Levels at which two frames get deeper are one level if they differ by less: float32 does not tell them apart.
SAME_LEVEL = 1e-6


@dataclass(frozen=True)
class DepthRate:
    """Bits a second of a codec with `num_codebooks` books of `codebook_size` entries, from its mean depth."""

    frame_rate: float
    num_codebooks: int
    codebook_size: int

    @property
    def side_bits(self) -> int:
        """Of each frame, for its depth."""
        return (self.num_codebooks - 1).bit_length()

    @property
    def code_bits(self) -> int:
        return (self.codebook_size - 1).bit_length()

    @property
    def limits(self) -> tuple[float, float]:
        """One book in every frame, and all books."""
        return float(self.bits_per_second(1)), float(self.bits_per_second(self.num_codebooks))

    def bits_per_second(self, mean_depth: Any) -> Any:
        return self.frame_rate * (mean_depth * self.code_bits + self.side_bits)

    def check(self, bitrate: object) -> float:
        """`bitrate`, if some clip could have it."""
        low, high = self.limits
        if not _is_number(bitrate) or not low <= bitrate * (1 + TOLERANCE) or not bitrate * (1 - TOLERANCE) <= high:
            raise OptionError(
                f"bitrate={bitrate!r} is not legal: give {low:.0f} to {high:.0f} bits per second, which depths of 1 to "
                f"{self.num_codebooks} take ({self.side_bits} bits a frame for the depth itself)."
            )
        return float(bitrate)


@dataclass(frozen=True)
class DepthChoice:
    """What decides the depth of one clip: exactly one of these, checked."""

    level: float | None = None
    bitrate: float | None = None
    num_quantizers: int | None = None


def depth_choices(options: dict[str, Any], batch: int, rate: DepthRate) -> list[DepthChoice]:
    """The choice of each clip, from options that hold one value for all clips or a list of one a clip.

    Raises:
        OptionError: a value is not legal, several are given for a clip, or a list has another length.
    """
    values = {name: _per_clip(name, options.get(name), batch) for name in DEPTH_OPTIONS}
    return [_choice({name: values[name][i] for name in DEPTH_OPTIONS}, rate) for i in range(batch)]


def _per_clip(name: str, value: Any, batch: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * batch
    if len(values) != batch:
        raise OptionError(f"{name} holds {len(values)} values for {batch} clips: give one for all, or one each.")
    return values


def _choice(values: dict[str, Any], rate: DepthRate) -> DepthChoice:
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) > 1:
        named = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise OptionError(f"{named} exclude each other: give one of them for a clip, and None for the others.")
    if "level" in given:
        return DepthChoice(level=_check_level(given["level"]))
    if "bitrate" in given:
        return DepthChoice(bitrate=rate.check(given["bitrate"]))
    if "num_quantizers" in given:
        return DepthChoice(num_quantizers=_check_count(given["num_quantizers"], rate.num_codebooks))
    return DepthChoice(level=DEFAULT_LEVEL)


def _check_level(level: object) -> float:
    if not _is_number(level) or not 0 <= level <= MAX_LEVEL:
        raise OptionError(
            f"level={level!r} is not legal: give a number from 0 (one book a frame) to {MAX_LEVEL:g}; models are "
            "trained for 0.125 to 6."
        )
    return float(level)


def _check_count(count: object, books: int) -> int:
    if not _is_number(count) or not isinstance(count, int) or not 1 <= count <= books:
        raise OptionError(f"num_quantizers={count!r} is not legal: give a whole number from 1 to {books}.")
    return count


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class FoundLevel:
    """A level, what it costs, and whether no other number of codes is nearer to the target."""

    level: float
    bits_per_second: float
    is_nearest: bool


def find_level(importance: np.ndarray, bitrate: float, rate: DepthRate) -> FoundLevel:
    """The level at which frames of importance `[T]` in (0, 1) take `bitrate` bits per second, within 2 %.

    A frame gains its next book at the levels k / (p * Q). Between two such levels nothing changes, so the level found
    is the middle of the gap in which the number of codes is right: as far from any other answer as can be.

    Raises:
        OptionError: no level does; the message says what can be reached.
    """
    thresholds = _thresholds(importance, rate.num_codebooks)
    edges = np.concatenate([thresholds[:1] / 4, thresholds, np.minimum(4 * thresholds[-1:], MAX_LEVEL)])
    if not len(thresholds):
        edges = np.array([0.25, 4.0])
    rates = np.asarray(rate.bits_per_second(1 + np.arange(len(thresholds) + 1) / len(importance)))
    reachable = np.flatnonzero(edges[1:] > edges[:-1] * (1 + SAME_LEVEL))
    distances = np.abs(rates - bitrate)
    best = reachable[distances[reachable].argmin()]
    if distances[best] > TOLERANCE * bitrate:
        raise OptionError(_unreachable(rates[reachable], bitrate, len(importance)))
    level = math.sqrt(edges[best] * edges[best + 1])
    return FoundLevel(level, float(rates[best]), bool(distances.argmin() == best))


def _thresholds(importance: np.ndarray, num_codebooks: int) -> np.ndarray:
    """Levels at which some frame gains a book, in order."""
    steps = np.arange(1, num_codebooks) / num_codebooks
    with np.errstate(divide="ignore"):  # a frame of importance 0 never gains one
        levels = np.sort((steps[:, None] / importance.astype(np.float64)).ravel())
    return levels[levels <= MAX_LEVEL]


def _unreachable(rates: np.ndarray, bitrate: float, num_frames: int) -> str:
    near = [f"{rates[rates < bitrate].max():.0f}"] if rates[0] < bitrate else []
    near += [f"{rates[rates > bitrate].min():.0f}"] if rates[-1] > bitrate else []
    return (
        f"bitrate={bitrate:g} is out of reach of {num_frames} frames of this importance: levels up to {MAX_LEVEL:g} "
        f"give {rates[0]:.0f} to {rates[-1]:.0f} bits per second, the nearest {' and '.join(near)}. Choose one of "
        "these, give the level itself, or num_quantizers for a constant depth."
    )
