"""`audiotok decode`: whose ids it takes, and which it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from audiotok import AudioTokenizer, AutoAudioTokenizer, AuvAudioTokenizer, AuvModel
from cli.helpers import Result, wave_of


def test_codes_of_another_tokenizer_are_refused(
    cli: Callable[..., Result], folder: Path, checkpoints: Path, one: str, two: str
) -> None:
    for file in ("codes.parquet", "ids.txt"):
        assert cli("encode", "a.wav", "-t", one, "-o", file).code == 0
        refused = cli("decode", file, "-o", "b.wav", "-t", two)
        assert refused.code == 4 and not Path("b.wav").exists()
        for name in (one, two):
            assert AutoAudioTokenizer.from_pretrained(name).fingerprint[:12] in refused.err
    # A twin of the same shape, but with other weights: only --force makes it decode.
    torch.manual_seed(1)
    twin = AuvModel(AutoAudioTokenizer.from_pretrained(one).codec.config)
    AuvAudioTokenizer(twin).save_pretrained("twin")
    assert cli("decode", "ids.txt", "-o", "b.wav", "-t", "twin").code == 4
    assert cli("decode", "ids.txt", "-o", "b.wav", "-t", "twin", "--force").code == 0


def test_a_checkpoint_that_moved_is_named_anew(cli: Callable[..., Result], folder: Path, one: str) -> None:
    AutoAudioTokenizer.from_pretrained(one).save_pretrained("old")
    assert cli("encode", "a.wav", "-t", "old", "-o", "ids.txt").code == 0
    os.rename("old", "new")
    assert cli("decode", "ids.txt", "-o", "b.wav").code == 5
    assert cli("decode", "ids.txt", "-o", "b.wav", "-t", "new").code == 0


def test_ids_of_a_language_model_need_no_header(
    cli: Callable[..., Result], folder: Path, one: str, tok: AudioTokenizer
) -> None:
    nameless = cli("decode", "-", "-o", "b.wav", stdin=b"7 8 9\n")
    assert nameless.code == 5 and "--tokenizer" in nameless.err
    assert cli("decode", "-", "-o", "b.wav", "-t", one, stdin=b"7 8 9\n").code == 0
    np.testing.assert_array_equal(wave_of(Path("b.wav"))[0], tok.decode([7, 8, 9])[0].numpy())
    assert cli("decode", "-", "-o", "many", "-t", one, stdin=b"7 8 9\n\n# two\n1 2\n").code == 0
    assert sorted(os.listdir("many")) == ["clip1.wav", "clip4.wav"]


def test_bad_ids_do_not_stop_the_others(cli: Callable[..., Result], folder: Path, one: str) -> None:
    lines = [
        "good\t\t1 2 3",
        "word\t\t1 two 3",
        "large\t\t1 9999999 3",
        "huge\t\t99999999999999999999999",
        "fields\t1 2",
        "length\tlong\t1 2",
        "short\t5000\t1 2",
        "../out\t\t1 2",
        "/out\t\t1 2",
        "good\t\t4 5",
        "none\t0\t",
        "streams\t\t1 2 | 3",
        "last\t\t4 5",
    ]
    done = cli("decode", "-", "-o", "back", "-t", one, stdin="\n".join(lines).encode())
    assert done.code == 4
    assert sorted(os.listdir("back")) == ["good.wav", "last.wav"]
    assert done.err.count("error: ") == len(lines) - 2
    for words in (
        "'two'",
        "9999999",
        "2 fields",
        "'long'",
        "'../out'",
        "'/out'",
        "Two clips",
        "no ids",
    ):
        assert words in done.err, words
    assert "2 clips decoded" in done.err


def test_joined_files_must_agree(cli: Callable[..., Result], folder: Path, one: str, two: str) -> None:
    ids = [cli("encode", name, "-t", one).out for name in ("a.wav", "b.flac")]
    assert cli("decode", "-", "-o", "both", stdin=b"".join(ids)).code == 0
    assert sorted(os.listdir("both")) == ["a.wav", "b.wav"]
    other = cli("encode", "b.flac", "-t", two).out
    assert cli("decode", "-", "-o", "mixed", stdin=ids[0] + other).code == 4


@pytest.mark.parametrize("output", ["back/", "back.wav"])
def test_a_length_that_its_ids_do_not_have_is_an_error_of_the_ids(
    cli: Callable[..., Result], folder: Path, one: str, output: str
) -> None:
    done = cli("decode", "-", "-t", one, "-o", output, stdin=b"short\t5000\t1 2\n")
    assert done.code == 4 and "length=5000 does not fit 2 frames" in done.err
    assert not Path(output).exists()


def test_windows_may_be_asked_for(cli: Callable[..., Result], folder: Path, one: str) -> None:
    """They keep the length."""
    assert cli("encode", "a.wav", "-o", "codes.parquet", "-t", one).code == 0
    for name, options in (("whole", []), ("windows", ["--chunk-length-s", "0.1", "--context-s", "0.02"])):
        done = cli("decode", "codes.parquet", "-o", f"{name}.wav", *options)
        assert done.code == 0, done.err
    assert wave_of(Path("whole.wav"))[0].shape == wave_of(Path("windows.wav"))[0].shape
    refused = cli("decode", "codes.parquet", "-o", "x.wav", "--chunk-length-s", "0")
    assert refused.code != 0 and "chunk_length_s=0" in refused.err and not Path("x.wav").exists()
