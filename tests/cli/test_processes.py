"""The command line in processes of its own: pipes, signals, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiotok import AudioTokenizer
from cli.helpers import RATE, decoded, process, wave_of


@pytest.mark.slow
def test_a_shell_pipe(folder: Path, one: str, tok: AudioTokenizer) -> None:
    command = f"cat a.wav | {sys.executable} -m audiotok encode - -t {one} | {sys.executable} -m audiotok decode - -o -"
    done = subprocess.run(command, shell=True, capture_output=True)
    assert done.stderr == b""
    np.testing.assert_array_equal(wave_of(done.stdout)[0], decoded(tok, "a.wav"))


@pytest.mark.slow
@pytest.mark.parametrize("output", ["ids", "sound"])
def test_a_reader_that_goes_away_ends_it_silently(folder: Path, one: str, output: str) -> None:
    soundfile.write("long.wav", np.zeros(200 * RATE), RATE)
    args = ["encode", "long.wav", "-t", one]
    if output == "sound":
        assert process(*args, "-o", "ids.txt").returncode == 0
        args = ["decode", "ids.txt", "-o", "-"]
    with subprocess.Popen(
        [sys.executable, "-m", "audiotok", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        child.stdout.read(10)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == -signal.SIGPIPE


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["encode", "decode", "many"])
def test_ctrl_c_leaves_nothing_partial(folder: Path, one: str, command: str, number: signal.Signals) -> None:
    soundfile.write("long.wav", np.zeros(2400 * RATE, np.float32), RATE)
    args = ["encode", "long.wav", "-t", one, "-o", "codes.parquet"]
    if command != "encode":
        ids = " ".join(["1"] * 50 * 2400)
        Path("ids.txt").write_text(f"x\t\t{ids}\ny\t\t{ids}\n" if command == "many" else f"x\t\t{ids}\n")
        args = ["decode", "ids.txt", "-t", one, "-o", "back/" if command == "many" else "back.wav"]
    before = sorted(os.listdir())
    with subprocess.Popen([sys.executable, "-m", "audiotok", *args], stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 200
        while not list(folder.rglob("*.part")):
            assert child.poll() is None and time.monotonic() < deadline, child.stderr.read()
            time.sleep(0.02)
        time.sleep(0.3)
        child.send_signal(number)
        assert child.wait() == (130 if number == signal.SIGINT else 143)
        assert child.stderr.read() == b""
    assert sorted(os.listdir()) == before


@pytest.mark.slow
def test_ctrl_c_at_any_moment(folder: Path, one: str) -> None:
    """Imports and loading take seconds: it may come then."""
    code = "import sys; from audiotok.cli import main; print('started', flush=True); main()"
    before = sorted(os.listdir())
    for delay in (0.0, 0.3, 1.0, 2.0, 4.0):
        with subprocess.Popen(
            [sys.executable, "-c", code, "roundtrip", "a.wav", "-t", one, "-o", "tried"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            child.stdout.readline()
            time.sleep(delay)
            child.send_signal(signal.SIGINT)
            assert child.wait() == 130, delay
            assert child.stderr.read() == b"", delay
    assert sorted(os.listdir()) == before


@pytest.mark.slow
def test_hours_take_no_more_memory_than_minutes(folder: Path, one: str) -> None:
    peaks = []
    for name, minutes in (("short", 2), ("long", 60)):
        soundfile.write(f"{name}.wav", np.zeros(minutes * 60 * RATE, np.float32), RATE)
        for args in (
            ["encode", f"{name}.wav", "-t", one, "-o", f"{name}.txt"],
            ["decode", f"{name}.txt", "-o", f"{name}.back.wav"],
        ):
            with subprocess.Popen([sys.executable, "-m", "audiotok", *args, "-q"]) as child:
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
            assert child.returncode == 0
            peaks.append(usage.ru_maxrss / 1024)
    assert soundfile.info("long.back.wav").frames == 3600 * RATE
    assert peaks[2] - peaks[0] < 60 and peaks[3] - peaks[1] < 60, peaks  # MiB; the hour has 220 MiB of samples
