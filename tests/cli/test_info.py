"""`audiotok list` and `audiotok info`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audiotok import AutoAudioTokenizer, AuvAudioTokenizer, AuvConfig, AuvModel
from audiotok.auto import bundled
from audiotok.windows import WindowFlips
from cli.helpers import Result


def test_list(cli: Callable[..., Result]) -> None:
    listed = cli("list", "--json").json
    assert {entry["name"] for entry in listed["published"]} >= {"SWivid/AUV", "voidful/llm-codec"}
    assert [entry["name"] for entry in listed["bundled"]] == list(bundled())
    assert "SWivid/AUV" in cli("list").out.decode()


def test_info_says_the_facts(cli: Callable[..., Result], two: str) -> None:
    tok = AutoAudioTokenizer.from_pretrained(two, layout="delay")
    data = cli("info", two, "--layout", "delay", "--json").json
    assert data["fingerprint"] == tok.fingerprint
    assert data["parameters"] == tok.codec.num_parameters()
    assert data["ids_per_second"] == 100 and data["layout"] == "delay"
    assert data["bits_per_second"] == pytest.approx(50 * np.log2(48 * 32))
    seconds = {row["layout"]: row["seconds"]["8192"] for row in data["layouts"]}
    assert seconds == {"interleaved": 81.92, "coarse_first": 81.92, "parallel": 163.84, "delay": 8191 / 50}
    text = cli("info", two).out.decode()
    for words in (
        "not stated",
        "exact up to rounding: a frame depends on",
        "not certified",
        "encoded again alone",
        "in 32,768",
    ):
        assert words in text


@pytest.fixture(scope="module")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec that attends over the whole clip."""
    stack = {"num_layers": 1, "head_dim": 16}
    config = AuvConfig(hidden_size=32, codebook_size=64, encoder_config=stack, decoder_config=stack, domain_ranges={})
    folder = tmp_path_factory.mktemp("attentive")
    AuvAudioTokenizer(AuvModel(config)).save_pretrained(folder)
    return folder


def test_info_of_attention_says_how_many_codes_windows_change(
    cli: Callable[..., Result], attentive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flips = (WindowFlips(30.0, 5.0, 0.1234, "of a test"), WindowFlips(60.0, 7.5, 0.02, "of another"))
    monkeypatch.setattr(AuvModel, "window_flips", flips)
    data = cli("info", attentive, "--json").json
    assert data["windows_equal_whole"].startswith("no: attends") and "not certified" in data["windows_equal_whole"]
    assert data["window_flips"][0] == {
        "chunk_length_s": 30.0,
        "context_s": 5.0,
        "share": 0.1234,
        "measured": "of a test",
    }
    text = " ".join(cli("info", attentive).out.decode().split())
    for words in (
        "30 s + 5 s a side 12.3 % of the codes differ (of a test)",
        "60 s + 7.5 s a side 2 % of the codes differ (of another)",
    ):
        assert words in text


def test_info_says_where_nothing_was_measured(
    cli: Callable[..., Result], attentive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AuvModel, "window_flips", ())
    data = cli("info", attentive, "--json").json
    assert data["window_flips"] == [] and "not measured" in data["windows_equal_whole"]
    assert "measure_windows" in cli("info", attentive).out.decode()


def test_windows_that_change_nothing_have_no_rate(cli: Callable[..., Result], one: str) -> None:
    assert cli("info", one, "--json").json["window_flips"] is None
    text = cli("info", one).out.decode()
    assert "of the codes differ" not in text and "measure_windows" not in text


def test_licence_comes_from_the_card(
    cli: Callable[..., Result], one: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoAudioTokenizer.from_pretrained(one).save_pretrained(tmp_path / "mine")
    card = tmp_path / "mine" / "README.md"
    card.write_text(card.read_text().replace("library_name:", "license: cc0-1.0\nlibrary_name:", 1))
    assert cli("info", tmp_path / "mine", "--json").json["licence"] == "cc0-1.0"
    monkeypatch.setattr("audiotok.auto.CHECKPOINTS", tmp_path)
    assert cli("info", "mine", "--json").json["licence"] == "cc0-1.0"
    assert cli("info", "audiotok/mine", "--json").json["licence"] == "cc0-1.0"
