"""Where results go: files that appear whole or not at all, folders of recordings, and stdout."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from audiotok.errors import AudioTokError, CodesError, OptionError, OutputExistsError, OutputNotWritableError

AUDIO_FORMATS = ("wav", "flac", "ogg")
# What a clip's name may end in because it was a file's name.
_AUDIO_SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .m4a .w64 .rf64".split())


def check_free(path: Path, overwrite: bool) -> None:
    """Before the work, not after it.

    Raises:
        OutputExistsError: the file is there and may not be replaced.
        OutputNotWritableError: its folder is missing.
    """
    if path.is_dir():
        raise OutputNotWritableError(f"{path} is a folder: give the name of a file.")
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(f"{path} exists: choose another name, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise OutputNotWritableError(f"{path.parent} is no folder: make it first, or choose another place.")


@contextmanager
def whole_file(path: Path, overwrite: bool) -> Generator[BinaryIO]:
    """A file to write, which takes its name when the block ends well and is removed when it does not.

    Raises:
        OutputExistsError, OutputNotWritableError: as `check_free`, or the disk is full.
    """
    check_free(path, overwrite)
    hidden = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(hidden, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_free(path, overwrite)
        os.replace(hidden, path)
    except OSError as error:
        if isinstance(error, AudioTokError):
            raise
        raise OutputNotWritableError(
            f"{path} cannot be written ({error.strerror or error}): check the folder, its rights and its space."
        ) from error
    finally:
        hidden.unlink(missing_ok=True)


def standard_output(binary: str = "") -> BinaryIO:
    """stdout for bytes. A reader that goes away (`| head`) ends us silently, by SIGPIPE, as it ends any filter.

    Args:
        binary: what would be written, where it is nothing for a terminal.

    Raises:
        OptionError: stdout is a terminal, and the bytes are nothing for it.
    """
    if binary and sys.stdout.isatty():
        raise OptionError(f"{binary} is nothing for a terminal: send it to a file (> FILE) or into a pipe.")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # from here on only the result is written, nothing is fetched
    return sys.stdout.buffer


def is_folder_name(output: str) -> bool:
    """Whether `--output` names a folder: one that exists, one with a slash at its end, or a name without a suffix."""
    return os.path.isdir(output) or output.endswith("/") or not Path(output).suffix


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder, made if it is missing; removed again if it was made here and nothing came into it."""
    existed = path.is_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputNotWritableError(f"The folder {path} cannot be made ({error.strerror}).") from error
    try:
        yield path
    finally:
        if not existed and not any(path.iterdir()):
            path.rmdir()


class ClipNames:
    """Files for clips in a folder: `talk.mp3` becomes `talk.wav`, and `talk.mp3.wav` where that is taken."""

    def __init__(self, folder: Path, format: str) -> None:
        self._folder, self._format = folder, format
        self._used: set[Path] = set()

    def path_for(self, clip_id: str) -> Path:
        """
        Raises:
            CodesError: the name leads out of the folder, or came before.
        """
        name = PurePosixPath(clip_id)
        if name.is_absolute() or ".." in name.parts or not name.name or "\0" in clip_id:
            raise CodesError(f"The clip name {clip_id!r} is no place in a folder: rename the clip.")
        whole = self._folder / f"{name}.{self._format}"
        short = (
            whole if name.suffix.lower() not in _AUDIO_SUFFIXES else self._folder / name.with_suffix(f".{self._format}")
        )
        path = whole if short in self._used else short
        if path in self._used:
            raise CodesError(f"Two clips are called {clip_id!r}: rename one of them.")
        self._used.add(path)
        return path
