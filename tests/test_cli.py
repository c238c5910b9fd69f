"""The command line: what it writes, what it says, and how it ends.

Most commands run inside this process (`cli`), where torch is loaded once; what needs a process of its own (pipes,
signals, imports) runs in one (`process`).
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from audiotok import AudioTokenizer, AutoAudioTokenizer, AuvAudioTokenizer, AuvConfig, AuvModel
from audiotok.auto import bundled
from audiotok.cli import app
from audiotok.cli.codes_file import FrameOrder
from audiotok.cli.ids_file import IdsReader, IdsWriter
from audiotok.cli.outputs import ClipNames, whole_file
from audiotok.encoding import ClipCodes
from audiotok.errors import CheckpointNotFoundError, CodesError, OutputExistsError
from audiotok.vocabulary import AudioVocabulary

COMMANDS = ("list", "info", "encode", "decode", "roundtrip", "convert", "demo")
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "matplotlib", "rich", "soundfile", "huggingface_hub")
RATE = 16_000


class Result(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small random tokenizers: "one" with one codebook, "two" with two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, sizes in (("one", 512), ("two", [48, 32])):
        torch.manual_seed(0)
        stack = {"block_type": "convnext", "num_layers": 1, "conv_kernel_size": 3}
        config = AuvConfig(
            hidden_size=32,
            codebook_size=sizes,
            domain_ranges={"speech": [0, 16]},
            encoder_config=stack,
            decoder_config=stack,
        )
        AuvAudioTokenizer(AuvModel(config)).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def one(checkpoints: Path) -> str:
    return str(checkpoints / "one")


@pytest.fixture(scope="session")
def two(checkpoints: Path) -> str:
    return str(checkpoints / "two")


@pytest.fixture(scope="session")
def tok(one: str) -> AudioTokenizer:
    return AutoAudioTokenizer.from_pretrained(one)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with recordings in it: a.wav, b.flac and stereo.wav; bad.wav is none."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    soundfile.write("a.wav", 0.1 * rng.standard_normal(5000), RATE, subtype="FLOAT")
    soundfile.write("b.flac", 0.1 * rng.standard_normal(9000), 24_000)
    soundfile.write("stereo.wav", 0.1 * rng.standard_normal((4000, 2)), RATE)
    Path("bad.wav").write_bytes(b"this is no audio")
    return tmp_path


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """`cli("encode", "a.wav", ..., stdin=b"")` runs the command in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGPIPE)}

    def run(*args: object, stdin: bytes = b"") -> Result:
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("default")
            patch.setattr(sys, "argv", ["audiotok", *map(str, args)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                app.run()
        return Result(int(ended.value.code or 0), out.buffer.getvalue(), err.buffer.getvalue().decode())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def process(*args: object, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "audiotok", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=300, **options)


def wave_of(data: bytes | Path) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data) if isinstance(data, bytes) else data, dtype="float32")


def decoded(tok: AudioTokenizer, path: str) -> np.ndarray:
    """What a file must come back as."""
    (clip,) = tok.encode_audio([path])
    return tok.decode(tok.codes_to_ids(clip.codes), clip.audio_length)[0].numpy()


# Help, names, facts


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    """CPU time, since the clock of a busy machine says little."""
    code = (
        "import sys\n"
        "from audiotok.cli import main\n"
        "sys.argv[:] = ['audiotok', *sys.argv[1:]]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as error:\n"
        "    assert not error.code, error.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    for args in (["--help"], *([command, "--help"] for command in COMMANDS)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr.splitlines()[-1] == "[]", args
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0, args


def test_help_has_examples_and_exit_codes(cli: Callable[..., Result]) -> None:
    main = cli("--help").out.decode()
    assert all(re.search(rf"^  {command} ", main, re.MULTILINE) for command in COMMANDS)
    assert "Exit codes" in main and "130" in main
    for command in COMMANDS:
        text = cli(command, "--help").out.decode()
        assert f"Examples:\n    audiotok {command}" in text, command
        assert "--json" in text, command


def test_shell_completes_names() -> None:
    environment = os.environ | {"_AUDIOTOK_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    done = process(env=environment | {"COMP_WORDS": "audiotok info SWiv"})
    assert done.stdout.split() == [b"SWivid/AUV"], done.stderr


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
    for words in ("not stated", "exact: a frame depends on", "encoded again alone", "in 32,768"):
        assert words in text


def test_info_of_attention_says_that_windows_are_not_exact(cli: Callable[..., Result], tmp_path: Path) -> None:
    stack = {"num_layers": 1, "head_dim": 16}
    config = AuvConfig(hidden_size=32, codebook_size=64, encoder_config=stack, decoder_config=stack, domain_ranges={})
    AuvAudioTokenizer(AuvModel(config)).save_pretrained(tmp_path / "whole")
    assert cli("info", tmp_path / "whole", "--json").json["windows_equal_whole"].startswith("no: attends")


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


# Encode and decode


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


# Errors

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
    monkeypatch.setattr(AudioTokenizer, "decode_blocks", lambda *args: iter([torch.full((1, 500), 2.0)]))
    done = cli("decode", "-", "-o", "loud.flac", "-t", one, "--quiet", stdin=b"1 2\n")
    assert done.code == 0
    assert done.err.startswith("warning: 500 of 500") and done.err.count("\n") == 1


def test_quiet_says_nothing(cli: Callable[..., Result], folder: Path, one: str) -> None:
    assert cli("encode", "a.wav", "-t", one, "-o", "codes.parquet", "-q") == Result(0, b"", "")
    assert cli("decode", "codes.parquet", "-o", "back.wav", "-q") == Result(0, b"", "")


# Whose ids


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


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example("# audiotok ids {}.wav")
@example("tab\tline\nreturn\r back\\slash \\t")
def test_any_name_survives_a_line(tok: AudioTokenizer, name: str) -> None:
    file = io.BytesIO()
    IdsWriter(file, tok).write(name, ClipCodes(np.array([[1, 2]]), 12))
    file.seek(0)
    (clip,) = IdsReader(file, "test")
    assert (clip.id, clip.audio_length, clip.ids(tok).tolist()) == (name, 12, [1, 2])


@given(st.data())
def test_frame_order_is_a_bijection(data: st.DataObject) -> None:
    """Fixed, multi-rate and variable-depth codecs."""
    sizes = tuple(data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4)))
    kind = data.draw(st.sampled_from(["fixed", "multirate", "variable"]))
    strides = tuple(2 ** (len(sizes) - 1 - q) for q in range(len(sizes))) if kind == "multirate" else (1,) * len(sizes)
    facts = SimpleNamespace(codebook_strides=strides, num_codebooks=len(sizes), variable_depth=kind == "variable")
    order = FrameOrder(SimpleNamespace(codec=SimpleNamespace(facts=facts), vocabulary=AudioVocabulary(sizes)))
    num_frames = data.draw(st.integers(0, 5)) * strides[0]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = [rng.integers(0, size, num_frames // stride) for size, stride in zip(sizes, strides, strict=True)]
    depths = rng.integers(1, len(sizes) + 1, num_frames) if kind == "variable" else None
    codes: Any = rows if max(strides) > 1 else np.stack(rows)
    if depths is not None:
        codes *= np.arange(len(sizes))[:, None] < depths
    flat, found_frames = order.flatten(codes, depths)
    assert found_frames == num_frames and (flat >= 0).all() and (flat < max(sizes)).all()
    restored, found_depths = order.restore(flat, num_frames, depths)
    assert all(np.array_equal(a, b) for a, b in zip(restored, codes, strict=True))
    assert found_depths is depths
    if num_frames:
        with pytest.raises(CodesError):
            order.restore(flat[1:], num_frames, depths)


# Files appear whole or not at all


def test_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with pytest.raises(KeyboardInterrupt), whole_file(path, overwrite=False) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with whole_file(path, overwrite=False) as file:
        file.write(b"whole")
        assert not path.exists()
    with pytest.raises(OutputExistsError), whole_file(path, overwrite=False):
        pytest.fail("the file is there")
    with pytest.raises(KeyboardInterrupt), whole_file(path, overwrite=True) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"whole"]


def test_clip_names() -> None:
    names = ClipNames(Path("out"), "wav")
    given_names = ["talk.mp3", "talk.flac", "v1.5", "a/b.WAV"]
    assert [str(names.path_for(n)) for n in given_names] == [
        "out/talk.wav",
        "out/talk.flac.wav",
        "out/v1.5.wav",
        "out/a/b.wav",
    ]
    for wrong in ("../up", "/root", "a/../../up", "", "v1.5"):
        with pytest.raises(CodesError):
            names.path_for(wrong)


# Round trip, demo, convert


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
    assert auv["published"]["SWivid/AUV"] == "auv.pt"
    assert "SWivid/AUV: auv.pt" in cli("convert", "--list").out.decode()


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


# Processes of their own


def test_both_names_start_it() -> None:
    assert process("--version").stdout.startswith(b"audiotok ")
    script = Path(sys.executable).with_name("audiotok")
    if not script.exists():
        pytest.skip("the package is not installed, only importable")
    assert subprocess.run([script, "--version"], capture_output=True).stdout.startswith(b"audiotok ")


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
    assert text.count(b"\x1b[?25l") == text.count(b"\x1b[?25h") == 1  # the cursor is given back
