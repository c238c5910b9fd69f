"""Audio files → blocks of samples, through libsndfile, without its surprises.

What soundfile alone gets wrong for a corpus tool, measured with libsndfile 1.2.2, and what is done here:

- soundfile seeks after every read. In MP3 that restarts the decoder: a 24 kHz clip read in blocks came out up to
  0.3 of full scale away from the same clip read at once. This decoder only ever reads forward.
- A cut WAV, AIFF, AU or NIST file is silently shortened to what is there: see `audio_headers`.
- A WAV that was written to a pipe says 0 bytes of audio, or 2^31 or 2^32 less a little. These placeholders are no
  promise: such a file is legal and read to its end (chunks after the audio, if any, cannot be told from audio).
- An MP3 without a Xing/Info header gets its length guessed from its first frame and is cut there: a variable
  rate file kept 23 % of its samples. Its length is left unknown and it is read to its end.
- libmpg123 prints remarks about odd tags and damaged frames on stderr: see `_muted_stderr`.

Not detected: a cut Ogg file (a stream of pages that promises no length), cut files of rarer formats, and what is
chained behind the first stream of an Ogg or FLAC file, which libsndfile does not read.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, TypeVar

import soundfile

from audiotok.audio_headers import find_audio_chunk, has_mp3_length, read_fully
from audiotok.errors import (
    AudioNotReadableError,
    EmptyFileError,
    NotAudioError,
    SamplingRateError,
    TruncatedAudioError,
)
from audiotok.waveforms import MAX_SAMPLING_RATE, MIN_SAMPLING_RATE, FloatArray


_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class AudioInfo:
    """What is known of a recording without decoding it.

    Attributes:
        sampling_rate: Hz.
        channels: 1 mono, 2 stereo, ...
        num_samples: of each channel; None where only decoding can tell (MP3 without a Xing/Info header).
        format: container as libsndfile names it ("WAV", "FLAC", "OGG", "MP3", ...); "ARRAY" for arrays.
        subtype: encoding as libsndfile names it ("PCM_16", "VORBIS", ...); "FLOAT" for arrays.
    """

    sampling_rate: int
    channels: int
    num_samples: int | None
    format: str
    subtype: str

    @property
    def duration(self) -> float | None:
        """Seconds, None where `num_samples` is."""
        return None if self.num_samples is None else self.num_samples / self.sampling_rate


# Bytes of one sample in the encodings whose length follows from their size.
_SAMPLE_BYTES = {"PCM_U8": 1, "PCM_S8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4}
_SAMPLE_BYTES |= {"FLOAT": 4, "DOUBLE": 8}

# Encoders differ by up to two MP3 frames in what they count as the length (the tag's own frame, the delay).
_MP3_SLACK = 2 * 1152

# libsndfile reports SF_COUNT_MAX for "unknown", and estimates near `_ENDLESS` for an MP3 of pretended size.
_UNKNOWN_LENGTH = 1 << 36


class DecodedFile:
    """The samples of one audio file, forward only, in blocks; `info` holds what its header says.

    Args:
        file: seekable binary file, read from its beginning, whatever its position.
        name: what error messages call it.
        owns_file: `close` closes `file` too.

    Raises:
        EmptyFileError, NotAudioError, TruncatedAudioError, SamplingRateError, AudioNotReadableError.
    """

    def __init__(self, file: BinaryIO, name: str, *, owns_file: bool) -> None:
        self._file, self._name, self._position = file, name, 0
        self._resources = contextlib.ExitStack()
        if owns_file:
            self._resources.callback(file.close)
        try:
            self._input, self._decoder = self._open()
            self._resources.callback(self._decoder.close)
            self.info = self._read_info()
        except BaseException:
            self.close()
            raise

    def read(self, num_samples: int) -> FloatArray:
        """The next block `[<= num_samples, C]`; empty at the end.

        Raises:
            TruncatedAudioError: the file ends, or cannot be decoded further, before its promised length.
            NotAudioError: it cannot be decoded further, and had not promised a length.
        """
        promised = self.info.num_samples
        if promised is not None:  # what lies behind the audio (tags, other streams) is not decoded
            num_samples = min(num_samples, promised - self._position)
        try:
            with _muted_stderr(self.info.subtype.startswith("MPEG")):
                block = self._decoder.read(num_samples, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            self._fail(num_samples, error)
        self._input.raise_pending(self._name)
        self._position += len(block)
        if len(block) == 0:
            self._check_complete()
        return block

    def close(self) -> None:
        """Close the decoder, and the file if it is owned."""
        self._resources.close()

    def _open(self) -> tuple[_DecoderInput, _ForwardFile]:
        size = self._inspect(lambda file: file.seek(0, os.SEEK_END))
        if size == 0:
            raise EmptyFileError(f"{self._name} is empty (0 bytes): there is no audio in it.")
        self._chunk = self._inspect(lambda file: find_audio_chunk(file, size))
        overlay = (0, b"")
        if self._chunk is not None and self._chunk.size == 0 and self._chunk.is_streamed:
            # libsndfile takes 0 at its word; the other placeholder makes it read to the end.
            overlay = (self._chunk.offset - 4, b"\xff\xff\xff\xff")
        source = _DecoderInput(self._file, size, overlay=overlay)
        decoder = self._start(source)
        if decoder.format == "MP3" and not self._inspect(has_mp3_length):
            decoder.close()
            source = _DecoderInput(self._file, size, pretended_size=_ENDLESS)
            decoder = self._start(source)
        return source, decoder

    def _inspect(self, question: Callable[[BinaryIO], _Answer]) -> _Answer:
        """Ask something of the file itself, before libsndfile gets it."""
        try:
            return question(self._file)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise AudioNotReadableError(f"{self._name} cannot be read ({error}).") from error

    def _start(self, source: _DecoderInput) -> _ForwardFile:
        try:
            with _muted_stderr(True):
                decoder = _ForwardFile(source)
        except soundfile.LibsndfileError as error:
            source.raise_pending(self._name)
            raise NotAudioError(
                f"{self._name} is no audio that libsndfile {soundfile.__libsndfile_version__} understands "
                f"({_reason(error)}): give WAV, FLAC, Ogg, MP3, AIFF or the like, whole."
            ) from error
        source.raise_pending(self._name)
        return decoder

    def _read_info(self) -> AudioInfo:
        decoder = self._decoder
        self._check_size(decoder)
        if not MIN_SAMPLING_RATE <= decoder.samplerate <= MAX_SAMPLING_RATE:
            raise SamplingRateError(
                f"The header of {self._name} says {decoder.samplerate} Hz; legal are {MIN_SAMPLING_RATE} to "
                f"{MAX_SAMPLING_RATE} Hz: correct the header."
            )
        # MPEG audio inside WAV: an estimate that no header backs.
        estimated = decoder.subtype.startswith("MPEG") and decoder.format != "MP3"
        known = decoder.frames < _UNKNOWN_LENGTH and not estimated
        frames = decoder.frames if known else None
        return AudioInfo(decoder.samplerate, decoder.channels, frames, decoder.format, decoder.subtype)

    def _check_size(self, decoder: _ForwardFile) -> None:
        """Raise `TruncatedAudioError` if the audio chunk of a WAV or AIFF file would end behind the file's end."""
        chunk = self._chunk
        if chunk is None or chunk.is_streamed or chunk.size <= chunk.available:
            return
        width = decoder.channels * _SAMPLE_BYTES.get(decoder.subtype, 0)
        samples = f" ({chunk.size // width} against {chunk.available // width} samples)" if width else ""
        raise TruncatedAudioError(
            f"{self._name} is cut off: its header promises {chunk.size} bytes of audio, the file holds "
            f"{chunk.available}{samples}. Fetch it again, or rewrite it with the length that is there."
        )

    def _fail(self, num_samples: int, error: soundfile.LibsndfileError) -> NoReturn:
        self._input.raise_pending(self._name)
        reason = _reason(error)
        where = f"between sample {self._position} and {self._position + num_samples}"
        if self.info.num_samples is None:
            raise NotAudioError(f"{self._name} is damaged: decoding fails {where} ({reason}).") from error
        raise TruncatedAudioError(
            f"{self._name} is cut off or damaged: its header promises {self.info.num_samples} samples, decoding "
            f"fails {where} ({reason}). Fetch it again."
        ) from error

    def _check_complete(self) -> None:
        promised = self.info.num_samples
        slack = _MP3_SLACK if self.info.format == "MP3" else 0
        # An Ogg stream promises nothing: its "length" is the time stamp of its last page.
        if promised is None or self.info.format == "OGG" or self._position + slack >= promised:
            return
        raise TruncatedAudioError(
            f"{self._name} is cut off: its header promises {promised} samples, the file holds {self._position}. "
            "Fetch it again, or rewrite it with the length that is there."
        )


class _ForwardFile(soundfile.SoundFile):
    """A `SoundFile` that never seeks: soundfile asks `seekable` before it does."""

    def seekable(self) -> bool:
        return False


# Larger than any file, small enough that libmpg123's estimate of the length stays in 64 bits.
_ENDLESS = 1 << 40


class _DecoderInput:
    """A binary file as libsndfile's callbacks see it.

    No exception can pass through C, so none leaves these methods: the first is kept for `raise_pending`, and
    libsndfile sees the end of the file.

    Args:
        file: seekable, `size` bytes long.
        overlay: offset and bytes to show instead of what the file holds there.
        pretended_size: show a file of this size, zeros behind the real end where a tag is looked for there.
    """

    def __init__(
        self, file: BinaryIO, size: int, *, overlay: tuple[int, bytes] = (0, b""), pretended_size: int | None = None
    ) -> None:
        self._file, self._size, self._overlay = file, size, overlay
        self._shown_size = size if pretended_size is None else pretended_size
        self._position = 0
        self._error: Exception | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._shown_size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position > self._size and self._shown_size > self._size:
            data = bytes(min(len(buffer), max(0, self._shown_size - self._position)))
        else:
            data = self._read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def raise_pending(self, name: str) -> None:
        """Raise what reading the file raised inside a callback, if anything did."""
        if self._error is not None:
            raise AudioNotReadableError(f"{name} cannot be read ({self._error}).") from self._error

    def _read(self, count: int) -> bytes:
        if self._error is not None:
            return b""
        try:
            self._file.seek(self._position)
            data = read_fully(self._file, count)
        except Exception as error:
            self._error = error
            return b""
        at, patch = self._overlay
        for index in range(max(at, self._position), min(at + len(patch), self._position + len(data))):
            data[index - self._position] = patch[index - at]
        return bytes(data)


def _reason(error: soundfile.LibsndfileError) -> str:
    return error.error_string.removeprefix("Error : ").strip(" .")


@contextlib.contextmanager
def _muted_stderr(muted: bool) -> Iterator[None]:
    """Send the process's stderr to nowhere while a C library prints there.

    Only with a single Python thread: the descriptor belongs to the whole process, so another thread could lose
    its messages, or start a child that inherits the mute. With more threads the remarks are let through.
    """
    if not muted or threading.active_count() > 1:
        yield
        return
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed: nothing to mute
        yield
        return
    try:
        with open(os.devnull, "wb", buffering=0) as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
