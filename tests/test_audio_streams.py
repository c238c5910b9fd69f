"""Recordings in pieces: equal to the whole, bit for bit, and in bounded memory for hours."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiotok.audio import load_audio, open_audio, probe
from audiotok.errors import OptionError


def noise(channels: int, samples: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal((channels, samples))).astype(np.float32)


class TestStream:
    @given(data=st.data())
    def test_pieces_equal_the_whole(self, data):
        rates = data.draw(
            st.sampled_from([(16_000, None), (44_100, 16_000), (8_000, 24_000), (48_000, 44_100), (11_025, 48_000)])
        )
        channels = data.draw(st.integers(1, 2))
        samples = noise(channels, data.draw(st.sampled_from([1, 2, 7, 1000, 33_333])))
        source = {"array": samples, "sampling_rate": rates[0]}
        if channels == 2 and samples.shape[1] <= 2:
            options = {"channels": 2}
        else:
            options = {"downmix": data.draw(st.sampled_from([None, "mean"]))}
        options |= {"target_rate": rates[1]}
        whole = load_audio(source, **options)
        pieces = []
        with open_audio(source, **options) as stream:
            assert stream.num_samples == whole.num_samples
            while (piece := stream.read(data.draw(st.integers(1, 9999)))).shape[1]:
                pieces.append(piece)
            assert stream.read(5).shape == (whole.channels, 0)
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.samples)

    @pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
    def test_pieces_of_files(self, write_audio, name):
        path = write_audio(name, noise(2, 300_001), 44_100)
        whole = load_audio(path, target_rate=16_000, downmix="mean")
        for size in (999, 100_000, 10**9):
            with open_audio(path, target_rate=16_000, downmix="mean") as stream:
                pieces = list(stream.blocks(size))
            assert all(piece.shape[1] == size for piece in pieces[:-1])
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.samples)

    def test_piece_size_one(self):
        samples = noise(1, 500)
        with open_audio(samples, sampling_rate=48_000, target_rate=16_000) as stream:
            pieces = list(stream.blocks(1))
        np.testing.assert_array_equal(
            np.concatenate(pieces, axis=1), load_audio(samples, sampling_rate=48_000, target_rate=16_000).samples
        )

    def test_array_and_file_are_resampled_alike(self, write_audio):
        samples = noise(2, 50_000)
        path = write_audio("a.wav", samples, 44_100, "FLOAT")
        from_file = load_audio(path, target_rate=24_000).samples
        np.testing.assert_array_equal(from_file, load_audio(samples, sampling_rate=44_100, target_rate=24_000).samples)

    def test_facts(self, write_audio):
        path = write_audio("a.flac", noise(2, 44_100), 44_100)
        with open_audio(path, target_rate=16_000, channels=1, downmix=0) as stream:
            assert (stream.sampling_rate, stream.channels, stream.num_samples) == (16_000, 1, 16_000)
            assert stream.duration == 1.0
            assert (stream.info.format, stream.info.subtype, stream.info.channels) == ("FLAC", "PCM_16", 2)

    def test_illegal_size_and_closed_stream(self):
        stream = open_audio([0.1, 0.2], sampling_rate=8000)
        with pytest.raises(OptionError, match="num_samples=0 is not legal"):
            stream.read(0)
        stream.close()
        with pytest.raises(ValueError, match="stream is closed"):
            stream.read(1)


# Hours


def sparse_wav(path: Path, hours: int, rate: int = 44_100) -> None:
    """A 16-bit mono WAV of silence that takes no room on the disk."""
    size = hours * 3600 * rate * 2
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16, b"data", size
    )
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def memory_growth(script: str, *arguments: object) -> int:
    """Bytes by which running `script` (a function `run`) raises the peak memory of a process with its imports."""
    code = (
        "import re, sys\n"
        "from audiotok.audio import AudioWriter, load_audio, open_audio\n"
        "def peak():  # not getrusage, whose peak includes that of the parent process\n"
        "    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "load_audio([0.0] * 100_000, sampling_rate=44_100, target_rate=16_000)\n"
        f"{script}\n"
        "before = peak()\n"
        "run(*sys.argv[1:])\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_three_hours_in_bounded_memory(tmp_path):
    sparse_wav(tmp_path / "day.wav", hours=3)
    script = """
def run(path):
    with open_audio(path, target_rate=16_000, channels=1) as stream:
        assert stream.duration == 3 * 3600
        assert sum(block.shape[1] for block in stream.blocks(160_000)) == stream.num_samples == 3 * 3600 * 16_000
"""
    assert memory_growth(script, tmp_path / "day.wav") < 30 * 2**20  # 952 MB of file, 691 MB of samples


@pytest.mark.slow
def test_hours_are_written_in_bounded_memory(tmp_path):
    script = """
def run(path):
    with AudioWriter(path, 16_000) as writer:
        for _ in range(3 * 3600):
            writer.write([0.0] * 16_000)
"""
    assert memory_growth(script, tmp_path / "day.flac") < 30 * 2**20
    assert probe(tmp_path / "day.flac").duration == 3 * 3600


@pytest.mark.slow
def test_whole_file_takes_its_own_size(tmp_path):
    """`load_audio` holds no second copy of a long recording."""
    sparse_wav(tmp_path / "hour.wav", hours=1)
    growth = memory_growth("def run(path): load_audio(path)", tmp_path / "hour.wav")
    assert growth < 1.2 * 3600 * 44_100 * 4 + 30 * 2**20
