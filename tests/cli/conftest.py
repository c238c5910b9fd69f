"""Small tokenizers, a folder of recordings, and the command line in this process."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiotok import AudioTokenizer, AutoAudioTokenizer, AuvAudioTokenizer, AuvConfig, AuvModel
from audiotok.cli import app
from cli.helpers import RATE, Result


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
