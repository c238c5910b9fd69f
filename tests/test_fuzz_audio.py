"""Thousands of broken files: each gives audio or an `AudioTokError`; never another exception, a crash, a hang, a
print, or memory that its bytes do not explain.

The files run in a process of their own, which libsndfile may crash and a watchdog may kill; it keeps the file at
hand. To look at one case: `python tests/test_fuzz_audio.py FOLDER NUMBER 1`. Mutations are seeded by the number of
the case; only the serial numbers that libsndfile gives to Ogg streams differ between runs.
"""

from __future__ import annotations

import collections
import faulthandler
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiotok.audio import load_audio
from audiotok.errors import AudioTokError

SECONDS_A_FILE = 20  # a machine may be busy; a file takes milliseconds
MEMORY_GROWTH = 100 * 2**20

ENCODINGS = [
    ("WAV", "PCM_U8", 8_000, 1),
    ("WAV", "PCM_16", 44_100, 2),
    ("WAV", "PCM_24", 16_000, 1),
    ("WAV", "FLOAT", 16_000, 2),
    ("WAV", "MS_ADPCM", 22_050, 1),
    ("RF64", "PCM_16", 16_000, 1),
    ("AIFF", "PCM_16", 16_000, 1),
    ("FLAC", "PCM_16", 16_000, 1),
    ("FLAC", "PCM_24", 48_000, 2),
    ("OGG", "VORBIS", 44_100, 2),
    ("OGG", "VORBIS", 16_000, 1),
    ("OGG", "OPUS", 48_000, 1),
    ("MP3", "MPEG_LAYER_III", 44_100, 2),
    ("MP3", "MPEG_LAYER_III", 16_000, 1),
]


def whole_files() -> list[bytes]:
    """A fifth of a second of music-like noise in each encoding, and the MP3 files without and with tags."""
    files = []
    for format, subtype, rate, channels in ENCODINGS:
        time = np.arange(rate // 5)[:, None] / rate
        phase = np.arange(channels)
        samples = 0.3 * np.sin(2 * np.pi * 300 * time + phase) + 0.05 * np.random.default_rng(0).standard_normal(
            (rate // 5, channels)
        )
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
        files.append(buffer.getvalue())
        if format == "MP3":
            without_tag = files[-1][files[-1].index(files[-1][:2], 100) :]  # from the second frame on
            files += [without_tag, b"ID3\x03\x00\x00\x00\x00\x02\x00" + bytes(256) + files[-1] + b"TAG" + bytes(125)]
    return files


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to three accidents."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        header = min(len(data), int(rng.choice([16, 64, 200])))
        match rng.choice(["flip", "flip header", "cut", "number", "erase", "repeat", "remove", "join"]):
            case "flip":
                for at in rng.integers(0, len(data), rng.integers(1, 20)):
                    data[at] ^= int(rng.integers(1, 256))
            case "flip header":
                for at in rng.integers(0, header, rng.integers(1, 5)):
                    data[at] ^= int(rng.integers(1, 256))
            case "cut":
                del data[int(rng.integers(1, len(data) + 1)) :]
            case "number":  # a length, a rate or a count becomes absurd
                at = int(rng.integers(0, header))
                number = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 10 * len(data), 0x10000]))
                width = int(rng.choice([2, 4, 8]))
                number &= (1 << 8 * width) - 1
                data[at : at + width] = number.to_bytes(width, str(rng.choice(["little", "big"])))
            case "erase":
                at = int(rng.integers(0, len(data)))
                length = int(rng.integers(1, 500))
                data[at : at + length] = bytes(len(data[at : at + length]))
            case "repeat":
                at = int(rng.integers(0, len(data)))
                data[at:at] = data[at : at + int(rng.integers(1, 2000))]
            case "remove":
                at = int(rng.integers(0, len(data)))
                del data[at : at + int(rng.integers(1, 200))]
            case "join":
                data += data[: int(rng.integers(1, len(data) + 1))]
        if not data:
            break
    return bytes(data)


def read_case(number: int, files: list[bytes], folder: Path) -> str:
    """Read the case's file; the name of what came of it."""
    rng = np.random.default_rng(number)
    content = mutated(files[number % len(files)], rng)
    path = folder / "case"
    path.write_bytes(content)  # also the evidence, should this process die
    source = path if rng.random() < 0.5 else content
    try:
        wave = load_audio(source, target_rate=16_000 if rng.random() < 0.5 else None)
    except AudioTokError as error:
        return type(error).__name__
    assert wave.samples.dtype == np.float32 and wave.samples.ndim == 2 and wave.num_samples > 0
    assert np.isfinite(wave.samples).all()
    return "audio"


def peak_memory() -> int:
    """Bytes; not by getrusage, whose peak includes that of the parent process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main(folder: str, first: str, count: str) -> None:
    files = whole_files()
    for content in files:
        load_audio(content, target_rate=24_000)
    before = peak_memory()
    outcomes = collections.Counter()
    with (Path(folder) / "hang").open("w") as log:  # not stderr, which may be muted at that moment
        for number in range(int(first), int(first) + int(count)):
            faulthandler.dump_traceback_later(SECONDS_A_FILE, exit=True, file=log)
            try:
                outcomes[read_case(number, files, Path(folder))] += 1
            except BaseException as error:
                raise AssertionError(f"case {number}") from error
            faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"outcomes": outcomes, "growth": peak_memory() - before}))


def run_cases(folder: Path, first: int, count: int) -> dict[str, int]:
    command = [sys.executable, __file__, str(folder), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\n{(folder / 'hang').read_text()}\nsee {folder / 'case'}"
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["growth"] < MEMORY_GROWTH
    assert sum(report["outcomes"].values()) == count
    return report["outcomes"]


def test_300_broken_files(tmp_path):
    outcomes = run_cases(tmp_path, 0, 300)
    assert {"audio", "NotAudioError", "TruncatedAudioError"} <= set(outcomes)


@pytest.mark.slow
def test_2000_broken_files(tmp_path):
    outcomes = run_cases(tmp_path, 1000, 2000)
    assert {"audio", "NotAudioError", "TruncatedAudioError", "SamplingRateError", "EmptyAudioError"} <= set(outcomes)


if __name__ == "__main__":
    main(*sys.argv[1:])
