"""`audiotok roundtrip`, `demo` and `convert`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audiotok import AudioTokenizer, AutoAudioTokenizer
from audiotok.auto import bundled
from cli.helpers import Result, decoded, wave_of


def test_roundtrip_writes_three_files(cli: Callable[..., Result], folder: Path, one: str, tok: AudioTokenizer) -> None:
    os.rename("a.wav", "a [b] $x$.wav")  # neither markup nor mathematics
    done = cli("roundtrip", "a [b] $x$.wav", "-t", one, "-o", "tried", "--json")
    assert done.code == 0, done.err
    data = done.json
    assert sorted(os.listdir("tried")) == [
        f"a [b] $x$.{end}" for end in ("decoded.wav", "metrics.json", "roundtrip.png")
    ]
    np.testing.assert_array_equal(wave_of(Path(data["files"]["audio"]))[0], decoded(tok, "a [b] $x$.wav"))
    assert Path(data["files"]["picture"]).read_bytes().startswith(b"\x89PNG")
    assert (
        data["num_ids"] == 16 and data["metrics"] == json.loads(Path(data["files"]["metrics"]).read_text())["metrics"]
    )
    assert {"mel_distance", "si_sdr"} <= set(data["metrics"])
    assert cli("roundtrip", "a [b] $x$.wav", "-t", one, "-o", "tried").code == 6
    table = cli("roundtrip", "a [b] $x$.wav", "-t", one, "-o", "tried", "--overwrite", "--no-picture").out.decode()
    assert "SI-SDR" in table and "a [b] $x$: 0.31 s" in table


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["random", "bundled"])
def test_demo(cli: Callable[..., Result], tmp_path: Path, one: str, tokenizer: str) -> None:
    if tokenizer == "bundled" and "audiotok/auv-mini" not in bundled():
        pytest.skip("the checkpoint audiotok/auv-mini is not bundled yet")
    choice = ["-t", one] if tokenizer == "random" else []
    done = cli("demo", "-o", tmp_path / "demo", "--json", *choice)
    assert done.code == 0, done.err
    clips = done.json["clips"]
    assert [clip["input"].split("_")[0] for clip in clips] == ["speech", "sound", "music"]
    assert [clip["audio_length"] for clip in clips] == [90951, 80016, 128000]
    assert "stoi" in clips[0]["metrics"] and "stoi" not in clips[1]["metrics"]
    assert len(os.listdir(tmp_path / "demo")) == 9
    table = cli("demo", "-o", tmp_path / "demo", "--overwrite", *choice).out.decode()
    assert "music_brahms.flac" in table and "PESQ-WB" in table


def test_demo_without_the_checkpoint_says_so(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audiotok.auto.CHECKPOINTS", tmp_path / "none")
    done = cli("demo", "-o", tmp_path / "demo")
    assert done.code == 5 and "auv-mini" in done.err and not (tmp_path / "demo").exists()


def test_convert_reads_published_weights(cli: Callable[..., Result], folder: Path, shared: Path) -> None:
    case = shared / "golden" / "auv" / "tiny"
    args = ("convert", "auv", case / "weights.safetensors", "--config", case / "config.json", "--output")
    done = cli(*args, "mine", "--json")
    assert done.code == 0, done.err
    tok = AutoAudioTokenizer.from_pretrained("mine")
    assert tok.fingerprint == done.json["fingerprint"]
    assert cli(*args, "mine").code == 6
    assert cli(*args, "mine", "--overwrite").code == 0
    wrong = shared / "golden" / "auv" / "tiny_noproj" / "config.json"
    refused = cli("convert", "auv", case / "weights.safetensors", "--config", wrong, "-o", "wrong")
    assert refused.code == 5 and "misshapen" in refused.err
    assert not Path("wrong").exists() and not [name for name in os.listdir() if name.startswith(".")]


def test_convert_lists_what_it_understands(cli: Callable[..., Result]) -> None:
    (auv,) = [family for family in cli("convert", "--list", "--json").json["families"] if family["codec"] == "auv"]
    assert auv["published"]["SWivid/AUV"] == ["auv.pt"]
    assert "SWivid/AUV: auv.pt" in cli("convert", "--list").out.decode()
