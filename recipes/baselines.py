"""Codecs of the telephone world that every codec is measured against: Codec 2 and Opus.

Both turn mono waveforms into mono waveforms of the same length and rate, aligned in time, and say what they spent.
A baseline that cannot run here says why (`why_unavailable`); nothing stands in for it.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from audiotok.errors import MissingDependencyError, NotAudioError, check_choice

Waveform = NDArray[np.float32]


@dataclass(frozen=True)
class Reconstruction:
    """`waveform` `[samples]`, as long as the input, and the bits per second that it took (None: nothing was coded)."""

    waveform: Waveform
    bits_per_second: float | None


class Baseline(ABC):
    """A reference codec.

    Attributes:
        name: for tables.
        speech_only: it models a voice, and its figures for other sounds mean nothing.
    """

    name: str
    speech_only: bool

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """What is missing and how to get it; None where the baseline runs."""

    def reconstruct(self, waveform: Waveform, sampling_rate: int) -> Reconstruction:
        """Encode and decode `[samples]`.

        Raises:
            MissingDependencyError: the baseline is not available here.
        """
        if reason := self.why_unavailable():
            raise MissingDependencyError(f"{self.name}: {reason}")
        return self._reconstruct(waveform, sampling_rate)

    @abstractmethod
    def _reconstruct(self, waveform: Waveform, sampling_rate: int) -> Reconstruction: ...


class Codec2(Baseline):
    """Codec 2 by its programs `c2enc` and `c2dec` (8 kHz, 16-bit), its delay removed.

    The bit rate is the mode's own: the programs pad each frame to whole bytes, so files are larger (700C: 800 b/s).
    """

    RATE: ClassVar[int] = 8000
    # Mode → (bits per second, samples of delay at 8 kHz). The delays are those at which the STOI of speech peaks
    # (to 20 samples); log envelopes correlate best within 2 to 7 ms of them.
    MODES: ClassVar[dict[str, tuple[int, int]]] = {"3200": (3200, 160), "1300": (1300, 160), "700C": (700, 240)}
    LONGEST_FRAME: ClassVar[int] = 320

    speech_only = True

    def __init__(self, mode: str) -> None:
        check_choice("mode", mode, self.MODES)
        self.mode, self.name = mode, f"Codec 2 {mode}"
        self.bits_per_second, self.delay = self.MODES[mode]

    def why_unavailable(self) -> str | None:
        missing = [program for program in ("c2enc", "c2dec") if shutil.which(program) is None]
        return f"{' and '.join(missing)} not found; on Debian: apt-get install codec2" if missing else None

    def _reconstruct(self, waveform: Waveform, sampling_rate: int) -> Reconstruction:
        speech = _to_pcm16(soxr.resample(waveform, sampling_rate, self.RATE))
        # Zeros behind the end: c2enc drops a partial frame, and the last samples leave `delay` later.
        padded = np.pad(speech, (0, self.delay + self.LONGEST_FRAME))
        decoded = np.frombuffer(self._run("c2dec", self._run("c2enc", padded.tobytes())), dtype="<i2")
        aligned = decoded[self.delay : self.delay + len(speech)].astype(np.float32) / 32768
        resampled = soxr.resample(aligned, self.RATE, sampling_rate)
        return Reconstruction(_fit(resampled, len(waveform)), self.bits_per_second)

    def _run(self, program: str, given: bytes) -> bytes:
        return subprocess.run([program, self.mode, "-", "-"], input=given, capture_output=True, check=True).stdout


class Opus(Baseline):
    """Opus at its lowest rate, 6 kb/s (variable rate, frames of 20 ms), by libsndfile's Ogg Opus writer at 16 kHz.

    The bit rate is measured: packets of audio without the Ogg pages around them. Decoded samples stay floats, and
    what the codec leaves out is silent. `opusdec` instead dithers to 16 bits, which fills the empty upper bands
    with noise near the floor of the log-mels: PESQ and STOI the same, mel distance 1.05 in place of 1.26.
    """

    RATE: ClassVar[int] = 16000
    name = "Opus 6"
    speech_only = False

    def why_unavailable(self) -> str | None:
        if "OPUS" in soundfile.available_subtypes("OGG"):
            return None
        return f"libsndfile {soundfile.__libsndfile_version__} cannot write Opus; 1.0.29 and later can"

    def _reconstruct(self, waveform: Waveform, sampling_rate: int) -> Reconstruction:
        given = soxr.resample(waveform, sampling_rate, self.RATE)
        file = io.BytesIO()
        # Level 1 is the strongest compression: 6 kb/s a channel.
        soundfile.write(file, given, self.RATE, format="OGG", subtype="OPUS", compression_level=1.0)
        packets = ogg_packet_sizes(file.getvalue())[2:]  # the first two are headers
        file.seek(0)
        decoded, _ = soundfile.read(file, dtype="float32")
        resampled = soxr.resample(decoded, self.RATE, sampling_rate)
        return Reconstruction(_fit(resampled, len(waveform)), 8 * sum(packets) * sampling_rate / len(waveform))


BASELINES: tuple[Baseline, ...] = (Codec2("700C"), Codec2("1300"), Opus())


def ogg_packet_sizes(data: bytes) -> list[int]:
    """Bytes of each packet of an Ogg file with one stream (RFC 3533).

    A page is "OggS", 22 more bytes of header, the number of segments, their sizes, their content. A packet goes on
    until a segment is shorter than 255 bytes, over pages if need be.
    """
    sizes, size, position = [], 0, 0
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            raise NotAudioError(f"No Ogg page at byte {position} of {len(data)}: the file is no Ogg stream.")
        segments = data[position + 27 : position + 27 + data[position + 26]]
        for segment in segments:
            size += segment
            if segment < 255:
                sizes.append(size)
                size = 0
        position += 27 + len(segments) + sum(segments)
    return sizes


def _to_pcm16(waveform: Waveform) -> NDArray[np.int16]:
    return np.round(np.clip(waveform, -1.0, 32767 / 32768) * 32768).astype("<i2")


def _fit(waveform: Waveform, length: int) -> Waveform:
    """Resampling there and back may end a sample early or late."""
    return np.pad(waveform, (0, max(0, length - len(waveform))))[:length]
