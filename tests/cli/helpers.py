"""What the tests of the command line share."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from audiotok import AudioTokenizer

COMMANDS = (
    "list",
    "info",
    "encode",
    "decode",
    "tokenize",
    "verify",
    "stats",
    "export",
    "push",
    "roundtrip",
    "convert",
    "demo",
)
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "matplotlib", "rich", "soundfile", "huggingface_hub")
RATE = 16_000


class Result(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


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
