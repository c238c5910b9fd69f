"""`audiotok encode`, and its codes and ids there and back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from audiotok import AudioTokenizer, AutoAudioTokenizer
from cli.helpers import RATE, Result, decoded, wave_of


def test_codes_file_holds_the_codes(cli: Callable[..., Result], folder: Path, one: str, tok: AudioTokenizer) -> None:
    done = cli("encode", "a.wav", "b.flac", "-t", one, "-o", "codes.parquet")
    assert (done.code, done.out) == (0, b"") and "2 of 2 recordings" in done.err
    table = pq.read_table("codes.parquet")
    assert table.column_names == ["id", "codes", "num_frames", "audio_length", "duration"]
    assert str(table.schema.field("codes").type) == "list<element: uint16>"
    assert table["id"].to_pylist() == ["a.wav", "b.flac"]
    assert table["audio_length"].to_pylist() == [5000, 6000]
    assert table["duration"].to_pylist() == [0.3125, 0.375]
    for row, clip in zip(table.to_pylist(), tok.encode_audio(["a.wav", "b.flac"]), strict=True):
        assert row["codes"] == clip.codes[0].tolist()
        assert row["num_frames"] == clip.codes.shape[1]
    record = json.loads(table.schema.metadata[b"audiotok"])
    assert record["fingerprint"] == tok.fingerprint and record["codebook_sizes"] == [512]


@pytest.mark.parametrize(
    ("file", "layout"),
    [("codes.parquet", "interleaved"), ("codes.parquet", "delay"), ("ids.txt", "coarse_first"), ("ids.txt", "delay")],
)
def test_there_and_back_in_every_layout(
    cli: Callable[..., Result], folder: Path, two: str, file: str, layout: str
) -> None:
    assert cli("encode", "a.wav", "b.flac", "-t", two, "--layout", layout, "-o", file).code == 0
    assert cli("decode", file, "-o", "back").code == 0
    tok = AutoAudioTokenizer.from_pretrained(two)
    for name in ("a.wav", "b.flac"):
        samples, rate = wave_of(folder / "back" / Path(name).with_suffix(".wav"))
        assert rate == RATE
        np.testing.assert_array_equal(samples, decoded(tok, name))


def test_pipes_carry_ids_and_sound(cli: Callable[..., Result], folder: Path, one: str, tok: AudioTokenizer) -> None:
    ids = cli("encode", "-", "-t", one, stdin=Path("a.wav").read_bytes())
    header, line = ids.out.decode().splitlines()
    assert header.startswith("# audiotok ids {") and ids.err == ""
    name, length, numbers = line.split("\t")
    assert (name, length) == ("stdin", "5000")
    assert list(map(int, numbers.split())) == tok("a.wav").input_ids
    sound = cli("decode", "-", "-o", "-", stdin=ids.out)
    assert sound.code == 0, sound.err
    np.testing.assert_array_equal(wave_of(sound.out)[0], decoded(tok, "a.wav"))


def test_json_of_encode_and_decode(cli: Callable[..., Result], folder: Path, one: str, tok: AudioTokenizer) -> None:
    encoded = cli("encode", "a.wav", "-t", one, "--json").json
    assert encoded["clips"][0]["ids"] == tok("a.wav").input_ids and encoded["fingerprint"] == tok.fingerprint
    listed = cli("encode", "a.wav", "bad.wav", "-t", one, "-o", "codes.parquet", "--json")
    assert listed.code == 3 and listed.json["failed"][0]["error"] == "NotAudioError"
    done = cli("decode", "codes.parquet", "-o", "a.ogg", "--json").json
    assert done["clips"][0]["num_samples"] == 5000 and Path(done["clips"][0]["file"]).is_file()


def test_options_change_ids_and_are_remembered(cli: Callable[..., Result], folder: Path, one: str) -> None:
    speech = cli("encode", "a.wav", "-t", one, "--domain", "speech")
    generic = cli("encode", "a.wav", "-t", one, "--option", "domain=speech")
    assert speech.out == generic.out
    ids = [int(word) for word in speech.out.decode().splitlines()[1].split("\t")[2].split()]
    assert max(ids) < 16
    assert '"options": {"domain": "speech"}' in speech.out.decode()
    assert cli("decode", "-", "-o", "a2.wav", stdin=speech.out).code == 0  # the fingerprint fits without options


def test_windows_change_nothing_where_the_receptive_field_is_finite(
    cli: Callable[..., Result], folder: Path, one: str
) -> None:
    whole = cli("encode", "a.wav", "-t", one).out.splitlines()
    windows = cli("encode", "a.wav", "-t", one, "--chunk-length-s", "0.1", "--context-s", "0.1").out.splitlines()
    assert whole[1] == windows[1] and b'"chunk_length_s": 0.1' in windows[0]


def test_formats_in_and_out(cli: Callable[..., Result], folder: Path, one: str) -> None:
    for name in ("c.mp3", "c.ogg"):
        soundfile.write(name, 0.1 * np.sin(np.arange(8000)), RATE)
    assert cli("encode", "c.mp3", "-t", one, "-o", "ids.txt").code == 0
    assert cli("encode", "c.ogg", "-t", one, "-o", "ids.txt", "--overwrite").code == 0
    for format in ("wav", "flac", "ogg"):
        assert cli("decode", "ids.txt", "-o", "out", "--format", format).code == 0
        assert soundfile.info(f"out/c.{format}").frames == 8000
    taken = cli("decode", "ids.txt", "-o", "out")
    assert taken.code == 6 and "--overwrite" in taken.err
    sound = cli("decode", "ids.txt", "-o", "-", "--format", "flac")
    assert sound.out.startswith(b"fLaC")


def test_batches_give_the_same_file_and_find_the_bad_one(cli: Callable[..., Result], folder: Path, one: str) -> None:
    alone = cli("encode", "a.wav", "bad.wav", "b.flac", "-t", one)
    batched = cli("encode", "a.wav", "bad.wav", "b.flac", "-t", one, "--batch-size", "2")
    assert alone == batched
    assert alone.code == 3 and len(alone.out.splitlines()) == 3


def test_a_bad_recording_does_not_stop_the_others(cli: Callable[..., Result], folder: Path, one: str) -> None:
    done = cli("encode", "a.wav", "bad.wav", "none.wav", "b.flac", "-t", one, "-o", "codes.parquet")
    errors = done.err.splitlines()
    assert done.code == 3
    assert [line.split(":")[0] for line in errors[:2]] == ["error", "error"]
    assert "bad.wav" in errors[0] and "none.wav" in errors[1]
    assert errors[2].startswith("2 of 4 recordings encoded")
    assert pq.read_table("codes.parquet")["id"].to_pylist() == ["a.wav", "b.flac"]


def test_nothing_is_written_when_all_are_bad(cli: Callable[..., Result], folder: Path, one: str) -> None:
    before = sorted(os.listdir())
    assert cli("encode", "bad.wav", "stereo.wav", "-t", one, "-o", "codes.parquet").code == 3
    assert sorted(os.listdir()) == before


def test_names_keep_clips_apart(cli: Callable[..., Result], folder: Path, one: str) -> None:
    Path("x").mkdir()
    for name in ("x/a.wav", "a.flac"):
        soundfile.write(name, np.full(500, 0.1), RATE)
    assert cli("encode", "a.wav", "a.flac", "x/a.wav", "-t", one, "-o", "codes.parquet").code == 0
    assert cli("decode", "codes.parquet", "-o", "back/", "--format", "flac").code == 0
    found = sorted(str(path.relative_to("back")) for path in Path("back").rglob("*.*"))
    assert found == ["a.flac", "a.flac.flac", "x/a.flac"]


def test_downmix(cli: Callable[..., Result], folder: Path, one: str) -> None:
    refused = cli("encode", "stereo.wav", "-t", one)
    assert refused.code == 3 and refused.err.startswith("error: stereo.wav: The recording has 2 channels")
    left, mean = (cli("encode", "stereo.wav", "-t", one, "--downmix", how) for how in ("0", "mean"))
    assert left.code == mean.code == 0 and left.out != mean.out
