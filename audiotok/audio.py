"""Recordings in, waveforms out: files, bytes, arrays, tensors, rows of `datasets`, at the rate and channels wanted.

    wave = load_audio("talk.flac", target_rate=16_000, channels=1, downmix="mean")      # whole
    with open_audio("day.wav", target_rate=16_000, channels=1) as stream:               # hours, in bounded memory
        for block in stream.blocks(160_000): ...
    probe("talk.flac").duration                                                         # the header only
    save_audio("out.wav", wave.samples, wave.sampling_rate)

One law holds by construction, since `load_audio` reads the stream to its end: the pieces of a stream, of whatever
sizes, are bit for bit the samples that `load_audio` returns.

Resampling is soxr's HQ: up to 90 % of the lower band a tone keeps its gain within 0.01 dB and gets noise under
-130 dB (VHQ reaches -150 dB for up to three times the time; 16-bit recordings carry noise at -98 dB). A clip of N
samples becomes exactly ceil(N * target_rate / sampling_rate) samples, so that none becomes empty.
"""

from __future__ import annotations

import io
import numbers
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
import soxr

from audiotok.audio_decoding import AudioInfo, DecodedFile
from audiotok.audio_writing import AudioClippingWarning, AudioWriter, save_audio
from audiotok.errors import (
    AudioFileNotFoundError,
    AudioInputError,
    AudioIsDirectoryError,
    AudioNotReadableError,
    EmptyAudioError,
    OptionError,
    SamplingRateError,
)
from audiotok.waveforms import (
    Downmix,
    FloatArray,
    Waveform,
    as_samples,
    channel_map,
    check_finite,
    check_sampling_rate,
)

__all__ = [
    "AudioClippingWarning",
    "AudioInfo",
    "AudioStream",
    "AudioWriter",
    "Downmix",
    "Waveform",
    "as_samples",
    "check_sampling_rate",
    "load_audio",
    "open_audio",
    "probe",
    "save_audio",
]


def load_audio(
    source: Any,
    *,
    sampling_rate: int | None = None,
    target_rate: int | None = None,
    channels: int | None = None,
    downmix: Downmix = None,
) -> Waveform:
    """Read a whole recording.

    Args:
        source: one of
            - path (str, PathLike) of a file that libsndfile reads: WAV, FLAC, Ogg Vorbis/Opus, MP3, AIFF, ...;
            - bytes, or a binary file object, of such a file (it is copied to a temporary file, from its start if
              it can seek; it stays open);
            - NumPy array, torch tensor, list of floats: `[N]` or `[C, N]`, with `sampling_rate`;
            - row of `datasets`: {"array", "sampling_rate"} or {"bytes", "path"};
            - torchcodec decoder (what newer `datasets` give); `Waveform`.
        sampling_rate: of an array, Hz. Files know theirs; saying another one is refused.
        target_rate: resample to this rate; None keeps the recording's.
        channels: refuse other counts, unless `downmix` leads to this one.
        downmix: None, "mean", the index of one channel, or "repeat" (mono into every channel).

    Returns:
        Samples float32 `[C, N]`; values beyond ±1 are kept. They never share memory with `source`.

    Raises:
        AudioInputError: a subclass that names what is wrong with the recording.
        OptionError: an argument is not legal.
    """
    with open_audio(
        source, sampling_rate=sampling_rate, target_rate=target_rate, channels=channels, downmix=downmix
    ) as stream:
        return Waveform(stream.read(), stream.sampling_rate)


def open_audio(
    source: Any,
    *,
    sampling_rate: int | None = None,
    target_rate: int | None = None,
    channels: int | None = None,
    downmix: Downmix = None,
) -> AudioStream:
    """Open a recording to read it in pieces; arguments and errors are those of `load_audio`."""
    reader = _open_source(source, sampling_rate, channels)
    try:
        return AudioStream(reader, target_rate=target_rate, channels=channels, downmix=downmix)
    except BaseException:
        reader.close()
        raise


def probe(source: Any, *, sampling_rate: int | None = None) -> AudioInfo:
    """What the header of a recording says, without decoding it (arrays are checked whole).

    Raises:
        AudioInputError: a subclass; a recording of 0 samples is *not* refused here.
    """
    reader = _open_source(source, sampling_rate, None)
    reader.close()
    return reader.info


# Samples of all channels that are decoded at a time: 1 MiB of float32. Blocks are fixed, so that what a stream
# returns cannot depend on how it is read.
_BLOCK_VALUES = 1 << 18


class AudioStream:
    """A recording read forward in pieces, at the rate and channels wanted; a context manager.

    Memory is bounded by the piece asked for. Errors inside the recording (NaN, a cut file) are raised by the read
    that meets them.

    Attributes:
        sampling_rate: of the samples returned, Hz.
        channels: of the samples returned.
        num_samples: that the stream will return, by the header; None where only decoding can tell.
        info: header facts of the recording itself.
    """

    def __init__(
        self, reader: Reader, *, target_rate: int | None, channels: int | None, downmix: Downmix = None
    ) -> None:
        self.info = reader.info
        rate = self.info.sampling_rate
        self.sampling_rate = rate if target_rate is None else check_sampling_rate(target_rate, "target_rate")
        self._map = channel_map(self.info.channels, channels, downmix)
        self.channels = self._map.channels
        self.num_samples = None if self.info.num_samples is None else self._resampled(self.info.num_samples)
        if self.info.num_samples == 0:
            raise EmptyAudioError("The recording holds 0 samples: give at least one.")
        self._reader: Reader | None = reader
        self._ended = False
        self._num_read = self._num_resampled = 0
        self._pending: deque[FloatArray] = deque()  # blocks [N, C], ready to be returned
        expansion = -(-self.sampling_rate // rate)
        self._block = max(1, _BLOCK_VALUES // (self.info.channels * expansion))
        self._resampler: soxr.ResampleStream | None = None
        if rate != self.sampling_rate:
            self._resampler = soxr.ResampleStream(
                rate, self.sampling_rate, self.channels, dtype="float32", quality="HQ"
            )

    @property
    def duration(self) -> float | None:
        """Seconds, None where `num_samples` is."""
        return self.info.duration

    def read(self, num_samples: int | None = None) -> FloatArray:
        """The next samples `[C, <= num_samples]`, all that are left without a number; fewer only at the end.

        Raises:
            AudioInputError: a subclass, for what is wrong with the recording.
        """
        if num_samples is not None and (not isinstance(num_samples, numbers.Integral) or num_samples < 1):
            raise OptionError(f"num_samples={num_samples!r} is not legal: ask for 1 or more, or None for the rest.")
        ready = sum(map(len, self._pending))
        while not self._ended and (num_samples is None or ready < num_samples):
            block = self._next_block()
            self._pending.append(block)
            ready += len(block)
        return self._take(ready if num_samples is None else min(num_samples, ready))

    def blocks(self, num_samples: int) -> Iterator[FloatArray]:
        """Pieces `[C, num_samples]` to the end; the last may be shorter, none is empty."""
        while (block := self.read(num_samples)).shape[1]:
            yield block

    def close(self) -> None:
        """Close the recording; reading on is refused."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> AudioStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_block(self) -> FloatArray:
        """One block of the recording, `[N, C]` as it will be returned; the last one sets `_ended`."""
        if self._reader is None:
            raise AudioInputError("This stream is closed: open the recording again.")
        block = self._reader.read(self._block)
        if len(block) == 0:
            return self._finish()
        check_finite(block.T, start=self._num_read)
        self._num_read += len(block)
        block = self._map.apply(block)
        if self._resampler is not None:
            block = self._resampler.resample_chunk(np.ascontiguousarray(block))
        self._num_resampled += len(block)
        return block

    def _finish(self) -> FloatArray:
        self._ended = True
        if self._num_read == 0:
            raise EmptyAudioError("The recording holds 0 samples: give at least one.")
        if self._resampler is None:
            return np.empty((0, self.channels), np.float32)
        # soxr would end at round(N * ratio); silence behind the end carries it to the ceil.
        silence = np.zeros((2 * -(-self.info.sampling_rate // self.sampling_rate), self.channels), np.float32)
        left = self._resampled(self._num_read) - self._num_resampled
        return self._resampler.resample_chunk(silence, last=True)[:left]

    def _resampled(self, num_samples: int) -> int:
        return -(-num_samples * self.sampling_rate // self.info.sampling_rate)

    def _take(self, count: int) -> FloatArray:
        """Remove `count` samples from the pending blocks; blocks go as they are copied, to keep the peak low."""
        samples = np.empty((self.channels, count), np.float32)
        filled = 0
        while filled < count:
            block = self._pending.popleft()
            if len(block) > count - filled:
                self._pending.appendleft(block[count - filled :])
                block = block[: count - filled]
            samples[:, filled : filled + len(block)] = block.T
            filled += len(block)
        return samples


# What a source is


class Reader(Protocol):
    """Where a stream gets its blocks from: `DecodedFile`, or an array in memory."""

    info: AudioInfo

    def read(self, num_samples: int) -> FloatArray:
        """The next block `[<= num_samples, C]`; empty at the end."""
        ...

    def close(self) -> None: ...


class _ArrayReader:
    """Blocks of a waveform in memory."""

    def __init__(self, samples: FloatArray, sampling_rate: int) -> None:
        channels, count = samples.shape
        self.info = AudioInfo(sampling_rate, channels, count, "ARRAY", "FLOAT")
        self._frames, self._position = samples.T, 0

    def read(self, num_samples: int) -> FloatArray:
        block = self._frames[self._position : self._position + num_samples]
        self._position += len(block)
        return block

    def close(self) -> None:
        self._frames = self._frames[:0]


def _open_source(source: Any, sampling_rate: int | None, channels: int | None) -> Reader:
    if isinstance(source, str | os.PathLike):
        return _decode(_open_path(source), repr(os.fspath(source)), sampling_rate)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(_copied(io.BytesIO(source)), "The bytes object", sampling_rate)
    if isinstance(source, Mapping):
        return _open_row(source, sampling_rate, channels)
    if isinstance(source, Waveform):
        return _open_array(source.samples, source.sampling_rate, sampling_rate, channels)
    if hasattr(source, "get_all_samples"):  # a torchcodec AudioDecoder
        decoded = source.get_all_samples()
        return _open_array(decoded.data, decoded.sample_rate, sampling_rate, channels)
    if hasattr(source, "read"):
        return _decode(_copied(source), "The file object", sampling_rate)
    return _ArrayReader(as_samples(source, channels=channels), check_sampling_rate(sampling_rate))


def _open_array(audio: Any, rate: Any, stated_rate: int | None, channels: int | None) -> Reader:
    """An array that brings its rate with it."""
    rate = check_sampling_rate(rate)
    _check_stated_rate(rate, stated_rate)
    return _ArrayReader(as_samples(audio, channels=channels), rate)


def _open_row(row: Mapping[str, Any], sampling_rate: int | None, channels: int | None) -> Reader:
    """A row of `datasets`, decoded or not; bytes go before the path, which may be that of another machine."""
    if row.get("array") is not None:
        rate = row.get("sampling_rate")
        return _open_array(row["array"], sampling_rate if rate is None else rate, sampling_rate, channels)
    for key in ("bytes", "path"):
        if row.get(key) is not None:
            return _open_source(row[key], sampling_rate, channels)
    raise AudioInputError(
        f"A dict with the keys {sorted(map(str, row))} holds no audio: it needs an array with its sampling_rate, or "
        "bytes, or a path."
    )


def _decode(file: BinaryIO, name: str, stated_rate: int | None) -> Reader:
    reader = DecodedFile(file, name)
    try:
        _check_stated_rate(reader.info.sampling_rate, stated_rate)
    except SamplingRateError:
        reader.close()
        raise
    return reader


def _check_stated_rate(rate: int, stated: int | None) -> None:
    if stated is not None and check_sampling_rate(stated) != rate:
        raise SamplingRateError(
            f"sampling_rate={stated} was given for a recording that says {rate} Hz: leave sampling_rate out; to "
            "resample, give target_rate."
        )


def _open_path(path: str | os.PathLike[str]) -> BinaryIO:
    name = repr(os.fspath(path))
    try:
        file: BinaryIO = open(path, "rb")
    except FileNotFoundError as error:
        raise AudioFileNotFoundError(f"{name} does not exist: give the path of an audio file.") from error
    except IsADirectoryError as error:
        raise AudioIsDirectoryError(f"{name} is a folder: give the path of one audio file in it.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AudioNotReadableError(f"{name} cannot be opened ({error}): check the path and its rights.") from error
    if file.seekable():
        return file
    with file:  # a named pipe, or the like
        return _copied(file)


def _copied(file: Any) -> BinaryIO:
    """The bytes of any file object in an unnamed temporary file: libsndfile gets real files only."""
    if isinstance(file, io.TextIOBase):
        raise AudioInputError('The file object is open for text: open it for bytes, open(path, "rb").')
    copy = tempfile.TemporaryFile()
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        shutil.copyfileobj(file, copy)
        copy.seek(0)
    except BaseException as error:
        copy.close()
        if isinstance(error, OSError | ValueError):  # ValueError: it is closed
            raise AudioNotReadableError(f"The audio cannot be read from the file object ({error}).") from error
        raise
    return copy
