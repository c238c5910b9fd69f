"""Bars: what they show, where, and that they go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audiotok.cli import reporting
from audiotok.cli.reporting import Meter, seconds_done
from cli.helpers import RATE, Result

Shown = list[tuple[str, float, float | None]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What the line said, each time that it changed: step, done, total."""
    seen: Shown = []

    def remember(meter: Meter) -> None:
        (task,) = meter._bar.tasks
        if not seen or seen[-1] != (task.description, task.completed, task.total):
            seen.append((task.description, task.completed, task.total))

    def watched(name: str) -> Callable[..., None]:
        real = getattr(Meter, name)

        def call(meter: Meter, *args: Any) -> None:
            real(meter, *args)
            remember(meter)

        return call

    for name in ("begin", "update"):
        monkeypatch.setattr(Meter, name, watched(name))
    return seen


@pytest.fixture
def long(folder: Path) -> str:
    """Ten seconds; windows of three are asked for in these tests."""
    soundfile.write("long.wav", 0.1 * np.random.default_rng(0).standard_normal(10 * RATE), RATE)
    return "long.wav"


WINDOWS = ("--chunk-length-s", "3")


def test_seconds_done() -> None:
    assert seconds_done("talk.wav", 0, 10_800) == "talk.wav"
    assert seconds_done("talk.wav", 95.4, 10_800.2) == "talk.wav: 95 of 10,800 s"
    assert seconds_done("stdin", 95.4, None) == "stdin: 95 s"


def test_encoding_one_recording_shows_its_seconds(
    cli: Callable[..., Result], long: str, one: str, shown: Shown
) -> None:
    assert cli("encode", long, "-t", one, *WINDOWS, "-o", "ids.txt").code == 0
    texts, shares, totals = zip(*shown, strict=True)
    assert texts[:2] == ("encoding", "long.wav")
    assert texts[2:] == tuple(f"long.wav: {n} of 10 s" for n in (3, 6, 9, 10))
    assert shares == (0, 0, 0.3, 0.6, 0.9, 1)
    assert totals == (None, None, 1, 1, 1, 1)


def test_a_recording_counts_by_its_share_among_others(
    cli: Callable[..., Result], long: str, one: str, shown: Shown
) -> None:
    assert cli("encode", "a.wav", "bad.wav", long, "b.flac", "-t", one, *WINDOWS, "-o", "ids.txt").code == 3
    assert [share for text, share, _ in shown if " of 10 s" in text] == [2.3, 2.6, 2.9, 3]
    assert {total for *_, total in shown} == {4}
    assert shown[-1] == ("b.flac", 4, 4)


def test_a_pipe_of_unknown_length_shows_seconds(cli: Callable[..., Result], long: str, one: str, shown: Shown) -> None:
    streamed = bytearray(Path(long).read_bytes())
    at = streamed.index(b"data")
    streamed[4:8] = streamed[at + 4 : at + 8] = bytes(4)  # as a program writes it that cannot go back
    assert cli("encode", "-", "-t", one, *WINDOWS, stdin=bytes(streamed)).code == 0
    assert [text for text, *_ in shown[1:6]] == ["stdin", *(f"stdin: {n} s" for n in (3, 6, 9, 10))]
    assert all(total is None for *_, total in shown)


def test_roundtrip_shows_both_ways(
    cli: Callable[..., Result], long: str, one: str, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audiotok.encoding.DEFAULT_WINDOW_S", 4.0)
    done = cli("roundtrip", long, "-t", one, *WINDOWS, "-o", "tried", "--no-picture")
    assert done.code == 0, done.err
    steps = ["reading long", "encoding long", *(f"encoding long: {n} of 10 s" for n in (3, 6, 9, 10))]
    steps += ["decoding long", *(f"decoding long: {n} of 10 s" for n in (4, 8, 10)), "scoring long", "writing"]
    assert [text for text, *_ in shown] == steps
    assert [(done, total) for text, done, total in shown if " of " in text] == [
        (n, 10) for n in (3, 6, 9, 10, 4, 8, 10)
    ]


def test_decoding_forgets_the_length_of_the_clip_before(
    cli: Callable[..., Result], folder: Path, one: str, shown: Shown
) -> None:
    lines = f"known\t{2 * 320}\t1 2\nunknown\t\t1 2\n"
    assert cli("decode", "-", "-t", one, "-o", "back/", stdin=lines.encode()).code == 0
    assert [(text, total) for text, _, total in shown if ":" not in text] == [("known", 0.04), ("unknown", None)]
    assert [(text, total) for text, _, total in shown if ":" in text] == [
        ("known: 0 of 0 s", 0.04),
        ("unknown: 0 s", None),
    ]


@pytest.mark.parametrize("how", [["--json"], ["-o", "codes.parquet"], []])
def test_off_a_terminal_there_is_no_bar(
    cli: Callable[..., Result], long: str, one: str, how: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for work that takes long enough for one."""
    monkeypatch.setattr(reporting, "PATIENCE_S", 0.0)
    done = cli("encode", long, "-t", one, *WINDOWS, *how)
    assert done.code == 0 and "\x1b" not in done.out.decode() + done.err
    assert done.err == ("" if how[:1] != ["-o"] else "1 of 1 recording encoded, 10.0 s of audio, to codes.parquet\n")


@pytest.mark.slow
def test_a_bar_appears_on_a_terminal_and_goes(folder: Path, one: str) -> None:
    import pty

    soundfile.write("long.wav", np.zeros(1200 * RATE, np.float32), RATE)
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "audiotok", "encode", "long.wav", "-t", one, "-o", "ids.txt"], stderr=slave
    ) as child:
        os.close(slave)
        text = b""
        while True:
            try:
                text += os.read(master, 65536)
            except OSError:  # the other end is closed
                break
        assert child.wait() == 0
    os.close(master)
    assert b"loading" in text and b"1 of 1 recording encoded" in text.splitlines()[-1]
    assert b" of 1,200 s" in text and b"%" in text
    assert text.count(b"\x1b[?25l") == text.count(b"\x1b[?25h") == 1  # the cursor is given back
