"""`audiotok tokenize`: processes that are led, stopped, killed; plans, refusals, and what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus.corpora import errors_of, files_of, record_of, rows_as_bytes, rows_of

from audiotok import AudioTokenizer
from cli.helpers import RATE, Result, process

Cli = Callable[..., Result]


@pytest.fixture
def corpus(folder: Path) -> Path:
    """`in`: seven recordings, one that is none, one below another folder."""
    (folder / "in" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(7):
        name = f"deep/{i}.flac" if i == 6 else f"{i}.wav"
        soundfile.write(folder / "in" / name, 0.1 * rng.standard_normal(4000 + 900 * i), RATE)
    (folder / "in" / "bad.wav").write_bytes(b"this is no audio")
    return folder / "in"


def add_minutes(corpus: Path) -> None:
    """Work for some seconds, on any machine: 40 clips of two minutes."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(120 * RATE)
    for i in range(40):
        soundfile.write(corpus / f"more-{i}.wav", noise, RATE)


def test_a_folder_becomes_a_corpus(cli: Cli, corpus: Path, one: str, tok: AudioTokenizer) -> None:
    done = cli("tokenize", "in", "-m", one, "-o", "out", "--num-processes", 1)
    assert done.code == 0, done.err
    rows = rows_of(Path("out"))
    assert sorted(rows) == ["0.wav", "1.wav", "2.wav", "3.wav", "4.wav", "5.wav", "deep/6.flac"]
    (clip,) = tok.encode_audio(["in/deep/6.flac"])
    assert rows["deep/6.flac"]["codes"] == clip.codes[0].tolist()
    (failure,) = errors_of(Path("out"))
    assert failure["id"] == "bad.wav"
    said = done.out.decode()
    assert "7 clips" in said and "1 failure: see errors.jsonl" in said


def test_two_processes_are_led(cli: Cli, corpus: Path, one: str) -> None:
    cli("tokenize", "in", "-m", one, "-o", "alone", "--num-processes", 1)
    done = process("tokenize", "in", "-m", one, "-o", "out", "--num-processes", 2, "--json", cwd=corpus.parent)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["finished"] and said["totals"]["rows"] == 7 and said["output"] == "out"
    assert rows_as_bytes(Path("out")) == rows_as_bytes(Path("alone"))
    before = files_of(Path("out"))
    assert process("tokenize", "in", "-m", one, "-o", "out", "--num-processes", 1, cwd=corpus.parent).returncode == 0
    assert files_of(Path("out")) == before


@pytest.mark.slow  # as the other tests of Ctrl-C, which a job in the background may ignore
def test_ctrl_c_keeps_what_is_encoded_and_says_how_to_go_on(cli: Cli, corpus: Path, one: str) -> None:
    add_minutes(corpus)
    command = [sys.executable, "-m", "audiotok", "tokenize", "in", "-m", one, "-o", "out", "--num-processes", "2"]
    running = subprocess.Popen(command, cwd=corpus.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _wait_for(lambda: bool(list(Path("out/.run").glob("rank-*.json"))) and _is_at_work(), running)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert b"stopped; what is encoded stays" in said and b"audiotok tokenize in -m" in said
    kept = rows_of(Path("out"))
    assert len(kept) < 47 and not record_of(Path("out"))["finished"]
    assert cli("tokenize", "in", "-m", one, "-o", "out", "--num-processes", 1).code == 0
    assert len(rows := rows_of(Path("out"))) == 47 and kept.items() <= rows.items()


def test_led_processes_end_with_their_leader(corpus: Path, one: str) -> None:
    """kill -9 of the leader, and the same command at once: it waits for them and goes on."""
    add_minutes(corpus)
    command = [sys.executable, "-m", "audiotok", "tokenize", "in", "-m", one, "-o", "out", "--num-processes"]
    running = subprocess.Popen([*command, "2"], cwd=corpus.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _wait_for(lambda: bool(list(Path("out/.run").glob("rank-*.json"))) and _is_at_work(), running)
    led = [json.loads(path.read_text())["pid"] for path in Path("out/.run").glob("rank-*.json")]
    running.kill()
    running.communicate()
    again = subprocess.run([*command, "1", "--json"], cwd=corpus.parent, capture_output=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["totals"]["rows"] == 47 == len(rows_of(Path("out")))
    for pid in led:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _is_at_work() -> bool:
    try:
        return bool(record_of(Path("out"))) and len(list(Path("out/tokenizer").iterdir())) == 4
    except FileNotFoundError:
        return False


def _wait_for(happened: Callable[[], bool], running: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert running.poll() is None and time.monotonic() < end, running.communicate()[1]
        time.sleep(0.02)


def test_a_plan_loads_no_model_and_writes_nothing(cli: Cli, corpus: Path) -> None:
    done = cli("tokenize", "in", "-m", "no-such-model", "-o", "out", "--dry-run", "--num-processes", 3, "--json")
    assert done.code == 0, done.err
    assert done.json["clips"] == 8 and sum(done.json["clips_of_a_process"]) == 8 and done.json["processes"] == 3
    assert done.json["hours_about"] * 3600 == pytest.approx(8 * (7 * 4000 + 900 * 21) / 7 / RATE, rel=0.2)
    assert not Path("out").exists()


def test_other_settings_are_refused(cli: Cli, corpus: Path, one: str, two: str) -> None:
    run = ("tokenize", "in", "-o", "out", "--num-processes", 1)
    assert cli(*run, "-m", one).code == 0
    before = files_of(Path("out"))
    for change in (["-m", two], ["-m", one, "--min-duration", 1], ["-m", one, "--chunk-length-s", 1]):
        refused = cli(*run, *change)
        assert refused.code == 6 and "was made with other settings" in refused.err and "--overwrite" in refused.err
    assert files_of(Path("out")) == before
    assert cli(*run, "-m", two, "--overwrite").code == 0
    assert record_of(Path("out"))["tokenizer"]["name"] == two


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["nowhere"], 3, "nowhere"),
        (["in", "--limit", 0], 5, "limit=0"),
        (["in", "--max-silence", 2], 5, "max_silence=2"),
        (["in", "--id-column", "name"], 5, "id_column='name'"),
        (["in", "--split", "a/b"], 5, "split="),
    ],
)
def test_what_cannot_be_is_refused(cli: Cli, corpus: Path, one: str, arguments: list, code: int, said: str) -> None:
    done = cli("tokenize", *arguments, "-m", one, "-o", "out", "--num-processes", 1)
    assert done.code == code and said in done.err, done
    assert not Path("out/data").exists()


def test_a_half_said_world_is_refused(corpus: Path, one: str) -> None:
    done = process("tokenize", "in", "-m", one, "-o", "out", cwd=corpus.parent, env=os.environ | {"RANK": "1"})
    assert done.returncode == 5 and b"WORLD_SIZE=None" in done.stderr


def test_an_early_failure_of_all_processes_is_said_once(corpus: Path, one: str) -> None:
    done = process("tokenize", "in", "-m", "no-such-model", "-o", "out", "--num-processes", 2, cwd=corpus.parent)
    assert done.returncode == 5 and done.stderr.count(b"no-such-model") == 1, done.stderr


def test_a_lower_precision_says_what_it_changes(cli: Cli, corpus: Path, one: str) -> None:
    run = ("tokenize", "in", "-m", one, "--num-processes", 1)
    done = cli(*run, "-o", "half", "--dtype", "bfloat16")
    assert done.code == 0 and "are others than in float32" in done.out.decode()
    cli(*run, "-o", "out")
    half, full, said = rows_of(Path("half")), rows_of(Path("out")), record_of(Path("half"))["precision"]
    pairs = [(a, b) for name in full for a, b in zip(half[name]["codes"], full[name]["codes"], strict=True)]
    assert said["flipped"] == sum(a != b for a, b in pairs) > 0 and said["codes"] == len(pairs) and said["clips"] == 7
    assert cli(*run, "-o", "out", "--dtype", "float16").code == 6
    assert cli(*run, "-o", "other", "--dtype", "float8").code == 5
