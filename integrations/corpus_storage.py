"""Where a corpus is written: files that appear under their names whole or not at all.

On a disk that is: written under another name, flushed to the disk, renamed, and the folder flushed. An object store
(`s3://`, `gs://`, ...) cannot rename, and need not: an upload becomes visible when it is complete, or never.
"""

from __future__ import annotations

import errno
import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from audiotok.errors import AudioTokError, MissingDependencyError, OptionError, OutputError, OutputNotWritableError

# What a run needs and a reader does not. Unfinished are files on their way to their names; a process that was killed
# leaves some, and the next run removes them.
RUN = ".run"
UNFINISHED = f"{RUN}/unfinished"


class CorpusFiles(ABC):
    """The files of one corpus. Names are relative to it, with slashes."""

    place: str

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Whole and durable, or not at all; what had the name is replaced.

        Raises:
            OutputNotWritableError: no rights, no space, or the store refuses.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """For reading.

        Raises:
            FileNotFoundError: there is none.
            OutputError: it may not be read.
        """

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Files right in a folder, sorted; none where there is no such folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Also where there is none."""

    @abstractmethod
    def path(self, name: str) -> str:
        """The file for people, and for other programs."""

    def read(self, name: str) -> bytes | None:
        """All of a file; None where there is none."""
        try:
            with self.open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None


class LocalFiles(CorpusFiles):
    """A folder of this machine, or of a file system that it shares."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, str(folder)
        self.writer = "any"  # a prefix of unfinished files, by which those of a dead process are known

    def write(self, name: str, data: bytes) -> None:
        target = self.folder / name
        hidden = self.folder / UNFINISHED / f"{self.writer}-{os.getpid()}-{os.urandom(4).hex()}"
        with writing(target):
            hidden.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(hidden, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(hidden, target)
            except BaseException:
                hidden.unlink(missing_ok=True)
                raise
            _flush_folder(target.parent)

    def open(self, name: str) -> BinaryIO:
        try:
            return open(self.folder / name, "rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{self.folder / name} cannot be read ({reason}): check its rights.") from error

    def names(self, folder: str = "") -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                found = sorted(entry.name for entry in entries if entry.is_file())
        except FileNotFoundError:
            return []
        return [posixpath.join(folder, name) for name in found]

    def remove(self, name: str) -> None:
        with writing(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def path(self, name: str) -> str:
        return str(self.folder / name)


class RemoteFiles(CorpusFiles):
    """A prefix of an object store."""

    def __init__(self, fs: Any, prefix: str) -> None:
        self.fs, self.prefix, self.place = fs, prefix.rstrip("/"), fs.unstrip_protocol(prefix)

    def write(self, name: str, data: bytes) -> None:
        with writing(self.path(name)):
            self.fs.pipe_file(self._full(name), data)
        self.fs.invalidate_cache()

    def open(self, name: str) -> BinaryIO:
        return self.fs.open(self._full(name), "rb")  # fetches the ranges that are read: of Parquet, a column

    def names(self, folder: str = "") -> list[str]:
        self.fs.invalidate_cache()
        try:
            infos = self.fs.ls(self._full(folder), detail=True)
        except FileNotFoundError:
            return []
        found = (info["name"].rstrip("/") for info in infos if info["type"] == "file")
        return sorted(posixpath.join(folder, posixpath.basename(path)) for path in found)

    def remove(self, name: str) -> None:
        with writing(self.path(name)):
            if self.fs.exists(self._full(name)):
                self.fs.rm_file(self._full(name))

    def path(self, name: str) -> str:
        return self.fs.unstrip_protocol(self._full(name))

    def _full(self, name: str) -> str:
        return posixpath.join(self.prefix, name) if name else self.prefix


def corpus_files(output: str | os.PathLike[str]) -> CorpusFiles:
    """The files of a corpus in a folder, or behind a URL that fsspec opens.

    Raises:
        OptionError: no such protocol.
        MissingDependencyError: the protocol needs a package.
    """
    name = os.fspath(output)
    if "://" not in name:
        return LocalFiles(Path(name).absolute())
    try:
        fs, path = url_to_fs(name)
    except ImportError as error:
        raise MissingDependencyError(f"{name} cannot be opened: {error}.") from error
    except ValueError as error:
        raise OptionError(f"{name} is no URL that can be opened ({error}).") from error
    return LocalFiles(Path(path)) if "file" in _protocols(fs) else RemoteFiles(fs, path)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextmanager
def writing(target: object) -> Generator[None]:
    """Turn what the operating system or a store raises into an error that says what to do."""
    try:
        yield
    except AudioTokError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full: make room, and run the same command again; what is written stays"
        else:
            reason = f"{error.strerror or error}: check the folder and its rights"
        raise OutputNotWritableError(f"{target} cannot be written ({reason}).") from error


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
