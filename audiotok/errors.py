"""Every error that audiotok raises on purpose.

Each sentence names the value found, what is legal and what to do. All derive from `AudioTokError`, and from
the built-in error that a caller would expect (`ValueError`, `OSError`, ...), so that `except ValueError` keeps
working. The command line turns an `AudioTokError` into one line on stderr and the exit code in `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AudioTokError(Exception):
    """Base of all errors raised by audiotok."""

    exit_code = 1


# Audio that comes in (exit code 3)


class AudioInputError(AudioTokError, ValueError):
    """A recording or waveform that cannot be used as it is."""

    exit_code = 3


class AudioFileNotFoundError(AudioInputError, FileNotFoundError):
    """The path names no file."""


class AudioIsDirectoryError(AudioInputError, IsADirectoryError):
    """The path names a folder where one file is needed."""


class AudioNotReadableError(AudioInputError, PermissionError):
    """The file exists but may not be read."""


class NotAudioError(AudioInputError):
    """The bytes are no audio that libsndfile understands."""


class EmptyFileError(NotAudioError):
    """The file has no bytes."""


class TruncatedAudioError(AudioInputError):
    """The header promises more samples than the file holds."""


class EmptyAudioError(AudioInputError):
    """There are no samples."""


class NonFiniteAudioError(AudioInputError):
    """The waveform holds NaN or infinity."""


class IntegerAudioError(AudioInputError):
    """An integer array: its full scale is unknown."""


class AudioShapeError(AudioInputError):
    """The array's shape is not a waveform, or could be read in two ways."""


class ChannelError(AudioInputError):
    """The recording has other channels than the codec, and no downmix was asked for."""


class SamplingRateError(AudioInputError):
    """The sampling rate is missing, wrong or absurd."""


class MissingSamplingRateError(SamplingRateError):
    """An array came without its sampling rate."""


class AudioTooLongError(AudioInputError):
    """The recording is longer than can be encoded whole; windows must be asked for."""


# Ids, codes, latents (exit code 4)


class TokenError(AudioTokError, ValueError):
    """Ids or codes that no recording can have produced."""

    exit_code = 4


class InvalidIdError(TokenError):
    """An id outside the vocabulary, or in a place where the layout does not allow it."""


class IncompleteFrameError(TokenError):
    """The ids end in the middle of a frame."""


class SpecialTokenError(TokenError):
    """A special token stands between audio ids."""


class CodesError(TokenError):
    """Codes with a wrong dtype, shape or range."""


class LatentsError(AudioTokError, ValueError):
    """Latents or vectors with a wrong dtype or shape, that are not finite, or of which nothing can be made."""

    exit_code = 4


# Options, configurations, checkpoints (exit code 5)


class OptionError(AudioTokError, ValueError):
    """An option that does not exist, or a value that is not legal for it."""

    exit_code = 5


class ConfigError(OptionError):
    """A configuration with an unknown key or an impossible value."""


class CheckpointError(AudioTokError, ValueError):
    """A checkpoint that does not fit, is incomplete or unsafe."""

    exit_code = 5


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint of that name, here or in the hub cache."""


class WeightMismatchError(CheckpointError):
    """Tensors are missing, unexpected or misshapen; each is named."""


class UnsafeCheckpointError(CheckpointError):
    """Loading would need to execute code from the checkpoint."""


class MissingDependencyError(AudioTokError, ImportError):
    """An optional package or program is needed for this and not installed."""

    exit_code = 5


# Where results go (exit code 6)


class OutputError(AudioTokError, OSError):
    """A result could not be written."""

    exit_code = 6


class OutputExistsError(OutputError, FileExistsError):
    """The output exists and overwriting was not asked for."""


class OutputNotWritableError(OutputError):
    """The output's folder is missing, read-only, or the disk is full."""


def did_you_mean(name: str, legal: Iterable[str]) -> str:
    """` Did you mean "x"?` for the legal name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(legal), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def check_number(name: str, value: object, least: float, kind: type = int) -> None:
    """Raise `ConfigError` unless `value` is a number of that kind (int, or float for any), finite, from `least` on."""
    legal = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not legal or not least <= value < float("inf"):
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name}={value!r} is not legal: give {what} of at least {least}.")


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not legal: give true or false.")


def check_choice(option: str, value: object, legal: Iterable[str]) -> None:
    """Raise `OptionError` unless `value` is one of the `legal` strings."""
    names = list(legal)
    if value not in names:
        hint = did_you_mean(value, names) if isinstance(value, str) else ""
        raise OptionError(f"{option}={value!r} is not legal: choose one of {', '.join(names)}.{hint}")
