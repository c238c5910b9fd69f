"""Audio files → blocks of samples, through libsndfile, without its surprises.

What soundfile alone gets wrong for a corpus tool, measured with libsndfile 1.2.2, and what is done here:

- soundfile seeks after every read. In MP3 that restarts the decoder: a 24 kHz clip read in blocks came out up to
  0.3 of full scale away from the same clip read at once. This decoder only ever reads forward.
- A cut WAV, AIFF, AU or NIST file is silently shortened to what is there: see `audio_headers`.
- A WAV that was written to a pipe says 0 bytes of audio, or 2^31 or 2^32 less a little. These placeholders are no
  promise: such a file is legal and read to its end (chunks after the audio, if any, cannot be told from audio).
- An MP3 without a Xing/Info header gets its length guessed from its first frame and is cut there: a variable
  rate file kept 23 % of its samples. It is read as the stream that it is, see `_Pipe`.
- libmpg123 prints remarks about odd tags and damaged frames on stderr: see `_muted_stderr`.
- Python file objects are read through callbacks, in which Ctrl-C is lost and looks like the end of the file.
  libsndfile gets real files only.

Not detected: a cut Ogg file (a stream of pages that promises no length), cut files of rarer formats, and what is
chained behind the first stream of an Ogg or FLAC file, which libsndfile does not read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, cast

import soundfile

from audiotok.audio_headers import find_audio_chunk, has_mp3_length, mp3_start
from audiotok.errors import (
    AudioNotReadableError,
    EmptyFileError,
    NotAudioError,
    SamplingRateError,
    TruncatedAudioError,
)
from audiotok.waveforms import MAX_SAMPLING_RATE, MIN_SAMPLING_RATE, FloatArray


@dataclass(frozen=True)
class AudioInfo:
    """What is known of a recording without decoding it.

    Attributes:
        sampling_rate: Hz.
        channels: 1 mono, 2 stereo, ...
        num_samples: of each channel; None where only decoding can tell (MP3 without a Xing/Info header, FLAC
            written to a pipe). In Ogg it is the time stamp of the last page, in MP3 two frames may be missing.
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

# libsndfile's number for a length that it does not know is 2^63 - 1; the longest that a FLAC header holds is this.
_LONGEST = (1 << 36) - 1


class DecodedFile:
    """The samples of one audio file, forward only, in blocks; `info` holds what its header says.

    Args:
        file: a regular file of the operating system, which is closed by `close`.
        name: what error messages call it.

    Raises:
        EmptyFileError, NotAudioError, TruncatedAudioError, SamplingRateError, AudioNotReadableError.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name, self._position = name, 0
        self._resources = contextlib.ExitStack()
        self._resources.callback(file.close)
        try:
            self._open(file.fileno())
        except OSError as error:
            self.close()
            raise AudioNotReadableError(f"{name} cannot be read ({error}).") from error
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
            with _muted_stderr(self.info.subtype.startswith("MPEG"), self._pipe):
                block = self._decoder.read(num_samples, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            self._fail(num_samples, error)
        self._position += len(block)
        if len(block) == 0:
            self._check_complete()
        return cast(FloatArray, block)

    def close(self) -> None:
        """Close the decoder and the file."""
        self._resources.close()

    def _open(self, file: int) -> None:
        if os.fstat(file).st_size == 0:
            raise EmptyFileError(f"{self._name} is empty (0 bytes): there is no audio in it.")
        self._chunk = find_audio_chunk(file)
        self._pipe: _Pipe | None = None
        if self._chunk is not None and self._chunk.size == 0 and self._chunk.is_streamed:
            # libsndfile takes a length of 0 at its word, and reads on to the end with the other placeholder.
            head = os.pread(file, self._chunk.offset - 4, 0) + b"\xff\xff\xff\xff"
            self._decoder = self._start_stream(file, head, self._chunk.offset)
        else:
            self._decoder = self._start(file)
        if self._decoder.format == "MP3" and not has_mp3_length(file):
            self._decoder.close()
            self._decoder = self._start_stream(file, b"", mp3_start(file))
            if self._decoder.frames <= _LONGEST:  # by a guess at which libsndfile would stop
                raise NotAudioError(
                    f"{self._name} has a Xing tag without the number of frames, with which libsndfile cannot read it "
                    "to its end: write it anew (ffmpeg -i old.mp3 -c copy new.mp3)."
                )
        self._resources.callback(self._decoder.close)
        self.info = self._read_info()

    def _start_stream(self, file: int, head: bytes, start: int) -> _ForwardFile:
        self._pipe = _Pipe(file, head, start)
        self._resources.callback(self._pipe.close)
        return self._start(self._pipe.read_end)

    def _start(self, file: int) -> _ForwardFile:
        try:
            with _muted_stderr(True, self._pipe):
                return _ForwardFile(file, closefd=False)
        except soundfile.LibsndfileError as error:
            raise NotAudioError(
                f"{self._name} is no audio that libsndfile {soundfile.__libsndfile_version__} understands "
                f"({_reason(error)}): give WAV, FLAC, Ogg, MP3, AIFF or the like, whole."
            ) from error

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
        known = self._pipe is None and decoder.frames <= _LONGEST and not estimated
        frames = decoder.frames if known else None
        return AudioInfo(decoder.samplerate, decoder.channels, frames, decoder.format, decoder.subtype)

    def _check_size(self, decoder: _ForwardFile) -> None:
        """Raise `TruncatedAudioError` if the audio would end behind the file's end."""
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
        where = f"between sample {self._position} and {self._position + num_samples}"
        if error.code == _SYSTEM_ERROR:
            raise AudioNotReadableError(f"{self._name} cannot be read {where}: check the disk.") from error
        if self.info.num_samples is None:
            raise NotAudioError(f"{self._name} is damaged: decoding fails {where} ({_reason(error)}).") from error
        raise TruncatedAudioError(
            f"{self._name} is cut off or damaged: its header promises {self.info.num_samples} samples, decoding "
            f"fails {where} ({_reason(error)}). Fetch it again."
        ) from error

    def _check_complete(self) -> None:
        if self._pipe is not None and self._pipe.error is not None:
            raise AudioNotReadableError(f"{self._name} cannot be read ({self._pipe.error}).") from self._pipe.error
        promised = self.info.num_samples
        slack = _MP3_SLACK if self.info.format == "MP3" else 0
        # An Ogg stream promises nothing: its "length" is the time stamp of its last page.
        if promised is None or self.info.format == "OGG" or self._position + slack >= promised:
            return
        raise TruncatedAudioError(
            f"{self._name} is cut off: its header promises {promised} samples, the file holds {self._position}. "
            "Fetch it again, or rewrite it with the length that is there."
        )


_SYSTEM_ERROR = 2  # libsndfile's SF_ERR_SYSTEM: the operating system refused


class _ForwardFile(soundfile.SoundFile):
    """A `SoundFile` that never seeks: soundfile asks `seekable` before it does."""

    def seekable(self) -> bool:
        return False


class _Pipe:
    """Shows a file to libsndfile as a stream: it then makes no guess at the length, and reads to the end.

    A thread copies `head`, and the file from `start` on, into the pipe `read_end`. `error` is what went wrong with
    reading the file.
    """

    def __init__(self, file: int, head: bytes, start: int) -> None:
        self.error: OSError | None = None
        self.read_end, write_end = os.pipe()
        self._thread = threading.Thread(target=self._copy, args=(file, write_end, head, start), daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        os.close(self.read_end)  # a copy that is still going on fails with EPIPE and ends
        self._thread.join()

    def _copy(self, file: int, write_end: int, head: bytes, position: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})  # where an application has made it deadly
        try:
            with contextlib.suppress(BrokenPipeError), open(write_end, "wb") as pipe:
                pipe.write(head)
                while piece := os.pread(file, 1 << 16, position):
                    pipe.write(piece)
                    position += len(piece)
        except OSError as error:
            self.error = error


def _reason(error: soundfile.LibsndfileError) -> str:
    return error.error_string.removeprefix("Error : ").strip(" .")


@contextlib.contextmanager
def _muted_stderr(muted: bool, pipe: _Pipe | None) -> Generator[None]:
    """Send the process's stderr to nowhere while a C library prints there.

    Only without other Python threads than that of `pipe`: the descriptor belongs to the whole process, so another
    thread could lose its messages, or start a child that inherits the mute. With more threads the remarks are let
    through.
    """
    own_threads = 1 + (pipe is not None and pipe.is_alive)
    if not muted or threading.active_count() > own_threads:
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
