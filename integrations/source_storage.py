"""Files of this machine, or behind an fsspec URL, through one small interface."""

from __future__ import annotations

import io
import os
import posixpath
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from audiotok.errors import (
    AudioFileNotFoundError,
    AudioIsDirectoryError,
    AudioNotReadableError,
    AudioTokError,
    MissingDependencyError,
    OptionError,
)

# A recording of more bytes than this is handed on as a file object that reads them in pieces: long recordings take
# no more memory than short ones.
LARGEST_WHOLE = 64 << 20
_PIECE = 8 << 20


class Entry(NamedTuple):
    name: str
    is_folder: bool


class Files(ABC):
    """What sources need of a file system. Two of them are equal if their paths mean the same files."""

    is_local: ClassVar[bool]

    @abstractmethod
    def is_folder(self, path: str) -> bool: ...

    @abstractmethod
    def is_file(self, path: str) -> bool: ...

    @abstractmethod
    def entries(self, folder: str) -> list[Entry]:
        """Visible files and folders, unsorted; no pipes, sockets and devices. Broken links are files."""

    @abstractmethod
    def identity(self, folder: str) -> object:
        """Equal for two paths of one folder."""

    @abstractmethod
    def real(self, path: str) -> str:
        """The path without links, `..` and doubled slashes."""

    @abstractmethod
    def url(self, path: str) -> str:
        """What `locate` leads back to the path."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """The file for reading, seekable."""

    @abstractmethod
    def read(self, path: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer only at the end of the file."""

    @abstractmethod
    def recording(self, path: str) -> Any:
        """A whole file, as `open_audio` takes it."""

    def part(self, path: str, offset: int, size: int) -> Any:
        """A part of a file, as `open_audio` takes it."""
        if size <= LARGEST_WHOLE:
            return self.read(path, offset, size)
        return io.BufferedReader(_Part(lambda start, count: self.read(path, start, count), offset, size), _PIECE)


@dataclass(frozen=True)
class LocalFiles(Files):
    """The machine's own files."""

    is_local: ClassVar[bool] = True

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def is_file(self, path: str) -> bool:
        return os.path.isfile(path)

    def entries(self, folder: str) -> list[Entry]:
        with reading(folder), os.scandir(folder) as scan:
            return [Entry(entry.name, _is_folder(entry)) for entry in scan if _is_listed(entry)]

    def identity(self, folder: str) -> object:
        with reading(folder):
            status = os.stat(folder)
        return status.st_dev, status.st_ino

    def real(self, path: str) -> str:
        return os.path.realpath(path)

    def url(self, path: str) -> str:
        return path

    def open(self, path: str) -> BinaryIO:
        with reading(path):
            return open(path, "rb")

    def read(self, path: str, offset: int, size: int) -> bytes:
        with reading(path), open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def recording(self, path: str) -> str:
        with reading(path):
            mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioIsDirectoryError(f"{path} is a folder: give the path of one audio file in it.")
        if not stat.S_ISREG(mode):  # a named pipe would keep its reader waiting for ever
            raise AudioNotReadableError(f"{path} is a pipe, socket or device: give the path of an audio file.")
        return path


@dataclass(frozen=True)
class RemoteFiles(Files):
    """Files behind an fsspec file system; they have no links."""

    fs: AbstractFileSystem
    is_local: ClassVar[bool] = False

    def is_folder(self, path: str) -> bool:
        with reading(path, remote=True):
            return self.fs.isdir(path)

    def is_file(self, path: str) -> bool:
        with reading(path, remote=True):
            return self.fs.isfile(path)

    def entries(self, folder: str) -> list[Entry]:
        with reading(folder, remote=True):
            infos = self.fs.ls(folder, detail=True)
        found = [(info["name"].rstrip("/"), info["type"] == "directory") for info in infos]
        # Object stores may list the folder itself, as an empty object.
        entries = [
            Entry(posixpath.basename(path), is_folder) for path, is_folder in found if path != folder.rstrip("/")
        ]
        return [entry for entry in entries if not entry.name.startswith(".")]

    def identity(self, folder: str) -> object:
        return folder

    def real(self, path: str) -> str:
        return path if "://" in path else posixpath.normpath(path)

    def url(self, path: str) -> str:
        return self.fs.unstrip_protocol(path)

    def open(self, path: str) -> BinaryIO:
        with reading(path, remote=True):
            return io.BufferedReader(self.fs.open(path, "rb"), 1 << 16)  # stores' own files are slow to give lines

    def read(self, path: str, offset: int, size: int) -> bytes:
        with reading(path, remote=True):
            return self.fs.cat_file(path, start=offset, end=offset + size)

    def recording(self, path: str) -> Any:
        data = self.read(path, 0, LARGEST_WHOLE)
        if len(data) < LARGEST_WHOLE:
            return data
        with reading(path, remote=True):
            return self.part(path, 0, self.fs.size(path))


def locate(name: str) -> tuple[Files, str]:
    """The file system of a path, glob or URL, and its absolute path there.

    Raises:
        OptionError: no such protocol.
        MissingDependencyError: the protocol needs a package.
    """
    if "://" not in name:
        return LocalFiles(), os.path.abspath(name)
    try:
        fs, path = url_to_fs(name)
    except ImportError as error:
        raise MissingDependencyError(f"{name} cannot be opened: {error}.") from error
    except ValueError as error:
        raise OptionError(f"{name} is no URL that can be opened ({error}).") from error
    return (LocalFiles(), os.path.abspath(path)) if isinstance(fs, LocalFileSystem) else (RemoteFiles(fs), path)


@contextmanager
def reading(name: str, remote: bool = False) -> Generator[None]:
    """Turn what the operating system or a store raises into errors that name the file."""
    try:
        yield
    except AudioTokError:
        raise
    except FileNotFoundError as error:
        raise AudioFileNotFoundError(f"{name} does not exist: check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AudioNotReadableError(f"{name} cannot be read ({error}): check the path and its rights.") from error
    except Exception as error:  # each store's package has errors of its own, without a common base
        if not remote:
            raise
        raise AudioNotReadableError(f"{name} cannot be read ({type(error).__name__}: {error}).") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: no folder, and an error when it is opened
        return False


def _is_listed(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    return entry.is_symlink() or entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)


class _Part(io.RawIOBase):
    """`size` bytes of a file from `offset` on; it holds nothing open, so that nobody needs to close it."""

    def __init__(self, read: Callable[[int, int], bytes], offset: int, size: int) -> None:
        self._read, self._offset, self._size, self._position = read, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        data = self._read(self._offset + self._position, count) if count else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
