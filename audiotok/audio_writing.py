"""Waveforms → audio files: WAV, FLAC, Ogg Vorbis, whole or in pieces.

A file appears under its name only when it is whole: it is written beside its place under a hidden name, flushed
to the disk, and renamed. Whatever goes wrong, nothing partial is left behind.

WAV is written as 32-bit float unless asked otherwise: what a codec returned is kept bit for bit, beyond ±1 too.
FLAC is 16-bit. Integer encodings are rounded to the nearest step; samples beyond ±1 are clipped, counted
(`AudioWriter.num_clipped`), and reported by an `AudioClippingWarning`. Equal samples give equal files, but for two
things that libsndfile adds: the time of writing in a float WAV, and a random stream number in Ogg.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import soundfile
from numpy.typing import NDArray

from audiotok.errors import (
    ChannelError,
    EmptyAudioError,
    OptionError,
    OutputError,
    OutputExistsError,
    OutputNotWritableError,
    check_choice,
)
from audiotok.waveforms import FloatArray, as_samples, check_sampling_rate


class AudioClippingWarning(UserWarning):
    """Samples beyond ±1 were clipped, because the file's encoding cannot hold them."""


class _Format(NamedTuple):
    """A container: its name in libsndfile, its encodings (the default first), and the limits of its encoder."""

    container: str
    subtypes: tuple[str, ...]
    max_channels: int
    max_rate: int


# Vorbis: libvorbis has no settings above 200 kHz or 255 channels, and libsndfile 1.2.2 crashes there.
_FORMATS = {
    "wav": _Format("WAV", ("FLOAT", "PCM_16", "PCM_24"), 1024, 768_000),
    "flac": _Format("FLAC", ("PCM_16", "PCM_24"), 8, 655_350),
    "ogg": _Format("OGG", ("VORBIS",), 255, 192_000),
}
_PCM_BITS = {"PCM_16": 16, "PCM_24": 24}
_SAMPLE_BYTES = {"FLOAT": 4, "PCM_16": 2, "PCM_24": 3}
_MAX_WAV_BYTES = 0xFFFFFFFF - 4096  # the sizes in a WAV header have 32 bits; the header takes its share
_BLOCK = 1 << 15  # samples per call: the Vorbis encoder puts a whole call on the stack


def save_audio(
    target: str | os.PathLike[str] | BinaryIO,
    samples: Any,
    sampling_rate: int,
    *,
    channels: int | None = None,
    format: str | None = None,
    subtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a whole waveform.

    Args:
        samples: `[N]` or `[C, N]` floats: array, tensor or list.
        channels: of `samples`, which settles shapes that could be read in two ways, such as `[2, 1]`.

    The other arguments, the errors and the `AudioClippingWarning` are those of `AudioWriter`; what is wrong with the
    samples is an `AudioInputError`.
    """
    waveform = as_samples(samples, channels=channels)
    with AudioWriter(
        target, sampling_rate, channels=len(waveform), format=format, subtype=subtype, overwrite=overwrite
    ) as writer:
        writer.write(waveform)


class AudioWriter:
    """Write a recording in pieces, in bounded memory; a context manager.

    Leaving the block puts the file in its place; leaving it by an exception removes what was written.

    Args:
        target: a path, or a binary file object, which gets the whole file at the end and stays open (pipes too).
        sampling_rate: Hz.
        channels: of every piece.
        format: "wav", "flac" or "ogg" (Vorbis); None takes it from the suffix of the path.
        subtype: "FLOAT" (default), "PCM_16", "PCM_24" for WAV; "PCM_16" (default), "PCM_24" for FLAC.
        overwrite: replace a file that exists.

    Attributes:
        num_samples: written so far, of each channel.
        num_clipped: values beyond ±1 that were clipped.

    Raises:
        OutputExistsError: the file exists and `overwrite` is False.
        OutputNotWritableError: the folder is missing or read-only, or the disk is full.
        OptionError: a format, subtype, rate or channel count that does not go together.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        sampling_rate: int,
        *,
        channels: int = 1,
        format: str | None = None,
        subtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self._format = _format_of(target, format)
        self.sampling_rate = check_sampling_rate(sampling_rate)
        self.channels = channels
        self._subtype = _check_encoding(self._format, subtype, self.sampling_rate, channels)
        self.num_samples = self.num_clipped = 0
        self._place: _Place = (
            _FilePlace(target, overwrite) if isinstance(target, str | os.PathLike) else _ObjectPlace(target)
        )
        self._encoder: soundfile.SoundFile | None = None
        with self._errors():
            # A real file, not a Python object: in the callbacks of those, Ctrl-C is lost and leaves a hole.
            self._encoder = soundfile.SoundFile(
                self._place.file.fileno(),
                "w",
                self.sampling_rate,
                channels,
                self._subtype,
                format=_FORMATS[self._format].container,
                closefd=False,
            )

    def write(self, samples: Any) -> None:
        """Append a piece, `[N]` or `[C, N]` floats.

        Raises:
            AudioInputError: a subclass, for what is wrong with the samples; other channels than said.
            OutputNotWritableError: the disk is full, or the like; what was written is removed.
        """
        if self._encoder is None:
            raise OptionError("This writer is closed: open another one.")
        waveform = as_samples(samples, channels=self.channels)
        channels, count = waveform.shape
        if channels != self.channels:
            raise ChannelError(f"A piece has {channels} channels where {self.channels} were announced.")
        with self._errors():
            self._check_size(count)
            for start in range(0, count, _BLOCK):
                self._encoder.write(self._encoded(waveform[:, start : start + _BLOCK]))
        self.num_samples += count

    def close(self) -> None:
        """Put the file in its place.

        Raises:
            EmptyAudioError: nothing was written.
            OutputError: a subclass; what was written is removed.
        """
        if self._encoder is None:
            return
        if self.num_samples == 0:
            self.discard()
            raise EmptyAudioError(f"Nothing was written to {self._place.name}: give at least one sample.")
        with self._errors():
            encoder, self._encoder = self._encoder, None
            encoder.close()  # writes what was held back, and the header
            if not _is_whole(self._place.file, self.num_samples):
                raise self._failure("the end is missing")
            self._place.commit()
        if self.num_clipped:
            warnings.warn(
                f"{self.num_clipped} of {self.num_samples * self.channels} values written to {self._place.name} were "
                f"beyond ±1 and are clipped, since {self._subtype} holds no more: scale the audio, or write WAV "
                "with the subtype FLOAT.",
                AudioClippingWarning,
                stacklevel=3,
            )

    def discard(self) -> None:
        """Close without a result: what was written is removed."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            with contextlib.suppress(soundfile.SoundFileError):  # the file goes anyway
                encoder.close()
        self._place.discard()

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    @contextlib.contextmanager
    def _errors(self) -> Generator[None]:
        """Remove what was written if anything fails, and say why in our own errors."""
        try:
            yield
        except (soundfile.SoundFileError, AssertionError) as error:  # soundfile asserts that all was written
            raise self._failure(error) from error
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError) and not isinstance(error, OutputError):
                raise _not_writable(self._place.name, error) from error
            raise

    def _failure(self, reason: object) -> OutputError:
        """Remove what was written; the error to raise because libsndfile failed."""
        cause = _write_error(self._place.file)
        self.discard()
        if cause is not None:
            return _not_writable(self._place.name, cause)
        return OutputError(f"{self._place.name} could not be encoded as {self._subtype} ({reason}).")

    def _check_size(self, count: int) -> None:
        size = (self.num_samples + count) * self.channels * _SAMPLE_BYTES.get(self._subtype, 0)
        if self._format == "wav" and size > _MAX_WAV_BYTES:
            raise OutputError(
                f"{self._place.name} would hold {size} bytes of audio, a WAV file at most {_MAX_WAV_BYTES}: write "
                "FLAC, or several files."
            )

    def _encoded(self, block: FloatArray) -> NDArray[Any]:
        """`[C, N]` floats as the `[N, C]` values that libsndfile stores unchanged."""
        bits = _PCM_BITS.get(self._subtype)
        if bits is None:
            return np.ascontiguousarray(block.T)
        # libsndfile rounds floats down for 16-bit WAV, which adds an offset of half a step: round here.
        full_scale = 1 << (bits - 1)
        steps = np.rint(block.T.astype(np.float64) * full_scale)
        self.num_clipped += int(np.count_nonzero(np.abs(block) > 1))
        steps = np.clip(steps, -full_scale, full_scale - 1).astype(np.int32)
        return np.ascontiguousarray(steps.astype(np.int16) if bits == 16 else steps << (32 - bits))


def _format_of(target: Any, format: str | None) -> str:
    if format is not None:
        check_choice("format", format, _FORMATS)
        return format
    if not isinstance(target, str | os.PathLike):
        raise OptionError(f"A file object has no suffix: say format=, one of {', '.join(_FORMATS)}.")
    suffix = Path(target).suffix.lower()
    name = suffix.removeprefix(".")
    if name not in _FORMATS:
        raise OptionError(
            f"The suffix {suffix!r} of {os.fspath(target)!r} names no format that can be written: use "
            f".{', .'.join(_FORMATS)}, or say format=."
        )
    return name


def _check_encoding(format: str, subtype: str | None, rate: int, channels: int) -> str:
    limits = _FORMATS[format]
    if subtype is None:
        subtype = limits.subtypes[0]
    check_choice("subtype", subtype, limits.subtypes)
    if not isinstance(channels, int) or not 1 <= channels <= limits.max_channels or rate > limits.max_rate:
        raise OptionError(
            f"{format} cannot hold {channels!r} channels at {rate} Hz: it takes 1 to {limits.max_channels} channels "
            f"and up to {limits.max_rate} Hz."
        )
    return subtype


# Where the bytes go


class _Place(Protocol):
    """Bytes are written to `file`, a real one; `commit` makes them the result, `discard` removes them."""

    name: str
    file: BinaryIO

    def commit(self) -> None: ...

    def discard(self) -> None: ...


class _FilePlace:
    """A path: a hidden file in the same folder, renamed at the end."""

    def __init__(self, target: str | os.PathLike[str], overwrite: bool) -> None:
        self._path, self._overwrite = Path(target), overwrite
        self.name = repr(os.fspath(target))
        self._check_free()
        self._hidden = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.part")
        try:
            self.file: BinaryIO = open(self._hidden, "x+b", buffering=0)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise _not_writable(self.name, error) from error

    def commit(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()
        self._check_free()
        os.replace(self._hidden, self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        self.file.close()
        self._hidden.unlink(missing_ok=True)

    def _check_free(self) -> None:
        if os.path.isdir(self._path):
            raise OutputNotWritableError(f"{self.name} is a folder: give the path of a file.")
        if not self._overwrite and os.path.lexists(self._path):
            raise OutputExistsError(f"{self.name} exists: give another path, or ask to overwrite it (overwrite=True).")


class _ObjectPlace:
    """A file object: an unnamed temporary file, copied at the end, since headers are filled in last."""

    name = "the file object"

    def __init__(self, target: BinaryIO) -> None:
        if isinstance(target, io.TextIOBase) or not hasattr(target, "write"):
            raise OptionError(
                f'A {type(target).__name__} takes no audio: give a path, or a file object open for bytes (mode "wb").'
            )
        self._target = target
        self.file: BinaryIO = tempfile.TemporaryFile(buffering=0)

    def commit(self) -> None:
        self.file.seek(0)
        shutil.copyfileobj(self.file, self._target)
        self.file.close()

    def discard(self) -> None:
        self.file.close()


def _is_whole(file: BinaryIO, num_samples: int) -> bool:
    """True if the end of the file can be read: libsndfile does not report what fails while it closes a file."""
    file.seek(0)
    tail = min(num_samples, _BLOCK)
    try:
        with soundfile.SoundFile(file.fileno(), closefd=False) as written:
            written.seek(num_samples - tail)
            return written.frames == num_samples and len(written.read(tail)) == tail
    except soundfile.SoundFileError:
        return False


def _write_error(file: BinaryIO) -> OSError | None:
    """Why libsndfile could not write: it does not say, so the operating system is asked once more."""
    try:
        file.seek(0, os.SEEK_END)
        file.write(bytes(1 << 16))
    except OSError as error:
        return error
    return None


def _not_writable(name: str, error: OSError | ValueError) -> OutputNotWritableError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputNotWritableError(f"{name} cannot be written ({reason}): check the folder, its rights and its space.")
