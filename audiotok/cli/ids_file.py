"""ids.txt, one line a clip; `audiotok.cli.clip_files` describes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from audiotok.cli.clip_files import StoredClip
from audiotok.cli.loading import Origin
from audiotok.errors import CodesError, InvalidIdError

if TYPE_CHECKING:
    from audiotok.encoding import ClipCodes
    from audiotok.tokenizer import AudioTokenizer

IDS_HEADER = "# audiotok ids "
# What fits in 64 bits; whether it is legal is for the layout to say.
_ID, _LENGTH = re.compile(r"-?[0-9]{1,18}"), re.compile(r"[0-9]{1,18}")
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "#": "\\#"}


class IdsWriter:
    """Writes ids.txt, each line at once: a pipe's reader need not wait for the last clip."""

    def __init__(self, file: BinaryIO, tokenizer: AudioTokenizer) -> None:
        self._file, self._tokenizer = file, tokenizer
        self._write_line(IDS_HEADER + Origin.of(tokenizer).to_json())

    def write(self, clip_id: str, clip: ClipCodes) -> None:
        ids = np.atleast_2d(self._tokenizer.codes_to_ids(clip.codes, clip.depths))
        name = "".join(_ESCAPES.get(letter, letter) for letter in clip_id)
        text = " | ".join(" ".join(map(str, stream)) for stream in ids.tolist())
        self._write_line(f"{name}\t{clip.audio_length}\t{text}")

    def close(self) -> None:
        self._file.flush()

    def _write_line(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()


class IdsReader:
    """Reads ids.txt from a binary file, line by line; `origin` is what a header in its first line says."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self._file = name, file
        self._number = 0
        self._line = self._next_line()
        if self._line is None:
            raise CodesError(f"{name} is empty: give codes.parquet or ids.txt as `audiotok encode` writes them.")
        self.origin = self._header()

    def __iter__(self) -> Iterator[StoredClip]:
        while self._line is not None:
            if self._line.startswith(IDS_HEADER):  # files joined by `cat`
                self._check_header()
            elif self._line and not self._line.startswith("#"):
                yield self._stored_line(self._line)
            self._line = self._next_line()

    def _next_line(self) -> str | None:
        raw = self._file.readline()
        self._number += 1
        try:
            return raw.decode().rstrip("\r\n") if raw else None
        except UnicodeDecodeError as error:
            raise InvalidIdError(
                f"{self.name} is no text at line {self._number}: give ids.txt or codes.parquet as `audiotok encode` "
                "writes them."
            ) from error

    def _header(self) -> Origin | None:
        if self._line is None or not self._line.startswith(IDS_HEADER):
            return None
        return Origin.from_json(self._line.removeprefix(IDS_HEADER), self.name)

    def _check_header(self) -> None:
        if self._header() != self.origin:
            raise CodesError(
                f"Line {self._number} of {self.name} starts ids of another tokenizer, layout or options than those "
                "before it: decode them as files of their own."
            )

    def _stored_line(self, line: str) -> StoredClip:
        """What is wrong with the line is said when its ids are asked for: the lines after it are still good."""
        where = f"Line {self._number} of {self.name}"
        parts = line.split("\t")
        name, length, text = ("", "", line) if len(parts) == 1 else [*parts, "", ""][:3]
        problem = ""
        if len(parts) not in (1, 3):
            problem = (
                f"{where} has {len(parts)} fields: write name, audio length and ids, with tabs between, or ids alone."
            )
        elif length and not _LENGTH.fullmatch(length):
            problem = f"{where} has the audio length {length!r}: write a number of samples, or nothing."

        def ids(tokenizer: AudioTokenizer) -> np.ndarray:
            if problem:
                raise InvalidIdError(problem)
            return _parse_ids(text, where, tokenizer)

        known = int(length) if length and not problem else None
        return StoredClip(_unescape(name) or f"clip{self._number}", known, ids)


def _parse_ids(text: str, where: str, tokenizer: AudioTokenizer) -> np.ndarray:
    streams = [stream.split() for stream in text.split("|")]
    if wrong := next((word for words in streams for word in words if not _ID.fullmatch(word)), None):
        raise InvalidIdError(
            f"{where} holds {wrong[:40]!r}, which is no id: ids are whole numbers, with spaces between."
        )
    rows = [np.array(words, dtype=np.int64) for words in streams]
    if len({len(row) for row in rows}) > 1:
        raise InvalidIdError(
            f"{where} has streams of {', '.join(str(len(row)) for row in rows)} ids: all must have the same number."
        )
    return np.stack(rows) if tokenizer.layout.is_2d or len(rows) > 1 else rows[0]


def _unescape(name: str) -> str:
    letters = {escape: letter for letter, escape in _ESCAPES.items()}
    return re.sub(r"\\[\\tnr#]", lambda match: letters[match[0]], name)
