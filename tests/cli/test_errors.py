"""What goes wrong is one line on stderr and an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from audiotok import AudioTokenizer, AutoAudioTokenizer
from audiotok.errors import CheckpointNotFoundError
from cli.helpers import Result

ERRORS: list[tuple[list[str], int, str]] = [
    (["encode", "none.wav"], 3, "does not exist"),
    (["encode", "."], 3, "is a folder"),
    (["encode", "bad.wav"], 3, "bad.wav"),
    (["encode", "a.wav", "--domain", "speach"], 5, 'Did you mean "speech"?'),
    (["encode", "a.wav", "--option", "domian=speech"], 5, 'Did you mean "domain"?'),
    (["encode", "a.wav", "--option", "domain"], 5, "key=value"),
    (["encode", "a.wav", "--option", "layout=delay"], 5, "--layout delay"),
    (["encode", "a.wav", "--option", "domain=speech", "--domain", "speech"], 5, "twice"),
    (["encode", "a.wav", "--layout", "delayed"], 5, 'Did you mean "delay"?'),
    (["encode", "a.wav", "--device", "cuda:99"], 5, "device='cuda:99'"),
    (["encode", "a.wav", "--device", "gpu"], 5, "device='gpu'"),
    (["encode", "a.wav", "--batch-size", "0"], 5, "batch_size=0"),
    (["encode", "a.wav", "--chunk-length-s", "-1"], 5, "chunk_length_s=-1"),
    (["encode", "a.wav", "--downmix", "left"], 5, "downmix='left'"),
    (["encode", "a.wav", "-o", "codes.csv"], 5, ".parquet"),
    (["encode", "a.wav", "-o", "taken.txt"], 6, "--overwrite"),
    (["encode", "a.wav", "-o", "no/codes.parquet"], 6, "is no folder"),
    (["encode", "a.wav", "--batch-size", "many"], 2, "--batch-size"),
    (["encode", "a.wav", "./a.wav"], 2, "2 times"),
    (["encode", "a.wav", "-"], 2, "stdin"),
    (["encode"], 2, "FILE"),
    (["roundtrip", "a.wav", "-o", "taken.txt"], 6, "taken.txt"),
    (["decode", "a.wav", "-o", "b.wav"], 4, "a.wav"),
    (["decode", "none.txt", "-o", "b.wav"], 4, "No such file"),
    (["decode", "empty.txt", "-o", "b.wav"], 4, "is empty"),
    (["decode", "ids.txt", "-o", "b.mp3"], 5, ".flac"),
    (["decode", "ids.txt", "-o", "taken.wav"], 6, "--overwrite"),
    (["decode", "ids.txt", "-o", "back", "--format", "mp3"], 5, "--format='mp3'"),
    (["decode", "ids.txt", "-o", "-", "--json"], 2, "--json"),
    (["convert", "auvv", "x.pt", "-o", "out"], 5, 'Did you mean "auv"?'),
    (["convert", "auv", "none.pt", "-o", "out"], 5, "none.pt"),
    (["convert", "auv"], 2, "--list"),
    (["info", "audiotok/auv-minni"], 5, "Did you mean"),
    (["info", "."], 5, "config.json"),
]


@pytest.mark.parametrize(
    ("args", "code", "words"), ERRORS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_errors_are_one_line_and_an_exit_code(
    cli: Callable[..., Result], folder: Path, one: str, args: list[str], code: int, words: str
) -> None:
    Path("taken.txt").write_text("mine")
    Path("taken.wav").write_text("mine")
    Path("empty.txt").touch()
    Path("ids.txt").write_text("1 2 3\n")
    before = sorted(os.listdir())
    tokenizer = [] if args[0] in ("info", "convert") else ["-t", one]
    done = cli(*args, *tokenizer)
    assert done.code == code, done.err
    assert words in done.err and "Traceback" not in done.err
    if code != 2:  # a command typed wrongly also shows how it is typed
        assert done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
    assert sorted(os.listdir()) == before and Path("taken.txt").read_text() == "mine"


def test_bugs_are_one_line_too(cli: Callable[..., Result], one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(AutoAudioTokenizer, "from_pretrained", fail)
    monkeypatch.setattr("audiotok.cli.loading._check_device", lambda device: None)
    done = cli("info", one)
    assert done.code == 1
    assert done.err.startswith("error: unexpected RuntimeError: out of memory (AUDIOTOK_TRACEBACK=1")


def test_traceback_on_request(
    cli: Callable[..., Result], folder: Path, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIOTOK_TRACEBACK", "1")
    with pytest.raises(CheckpointNotFoundError):
        cli("encode", "a.wav", "-t", "none")
    among_others = cli("encode", "a.wav", "bad.wav", "-t", one)
    assert among_others.code == 3 and "Traceback" in among_others.err


def test_warnings_are_one_line(
    cli: Callable[..., Result], folder: Path, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AudioTokenizer, "decode_blocks", lambda *args, **windows: iter([torch.full((1, 500), 2.0)]))
    done = cli("decode", "-", "-o", "loud.flac", "-t", one, "--quiet", stdin=b"1 2\n")
    assert done.code == 0
    assert done.err.startswith("warning: 500 of 500") and done.err.count("\n") == 1


def test_quiet_says_nothing(cli: Callable[..., Result], folder: Path, one: str) -> None:
    assert cli("encode", "a.wav", "-t", one, "-o", "codes.parquet", "-q") == Result(0, b"", "")
    assert cli("decode", "codes.parquet", "-o", "back.wav", "-q") == Result(0, b"", "")
