"""Folders and globs: which files they hold, of which kind, and the source of plain audio files.

Files come sorted by their path below the folder, with one folder's listing in memory at a time. Names that begin
with a dot are left out. Links to folders are followed, except to a folder that the link stands in.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
from fsspec.utils import glob_translate

from audiotok.errors import AudioFileNotFoundError, AudioInputError, OptionError
from audiotok.integrations.source_storage import Files
from audiotok.integrations.sources import BATCH_CLIPS, LEGAL_KINDS, Source, SourceOptions, clip_batch

# What recordings are called that libsndfile reads. It also reads .raw (without a header: not without being told the
# rate) and .mat, .htk, .xi and the like, which are rarely recordings.
AUDIO_EXTENSIONS = frozenset(
    "aif aifc aiff au avr bwf caf flac mp1 mp2 mp3 nist oga ogg opus paf pvf rf64 snd sph voc w64 wav wave".split()
)


def extension(path: str) -> str:
    """Behind the last dot of the name, lower case; empty if there is no dot."""
    stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return suffix.lower() if dot and stem else ""


def walk(files: Files, root: str, enters: Callable[[str], bool] = lambda folder: True) -> Iterator[str]:
    """Paths of the files below `root`, relative to it, in the order of `sorted`; `enters` prunes folders.

    Raises:
        AudioInputError: a folder cannot be listed.
    """
    trail = [files.identity(root)]
    levels = [iter(_sorted_entries(files, root, ""))]
    while levels:
        path = next(levels[-1], None)
        if path is None:
            levels.pop()
            trail.pop()
        elif not path.endswith("/"):
            yield path
        elif enters(path[:-1]) and (identity := files.identity(posixpath.join(root, path[:-1]))) not in trail:
            trail.append(identity)
            levels.append(iter(_sorted_entries(files, root, path)))


def _sorted_entries(files: Files, root: str, folder: str) -> list[str]:
    """Paths below `root` of what stands in `folder`; those of folders end in a slash, which puts them where the
    paths below them belong."""
    entries = files.entries(posixpath.join(root, folder.rstrip("/")) if folder else root)
    return sorted(f"{folder}{entry.name}{'/' if entry.is_folder else ''}" for entry in entries)


@dataclass(frozen=True)
class FileList:
    """The files of a folder, of a glob, or just one, each known by its path relative to `root`.

    Attributes:
        root: absolute path of the folder, or of the fixed part of the glob.
        name: what the user calls all this.
        shown_root: what the user calls `root`.
        pattern: of the relative paths; None takes all.
        only: the one file.
    """

    files: Files
    root: str
    name: str
    shown_root: str
    pattern: str | None = None
    only: str | None = None

    @classmethod
    def of_folder(cls, files: Files, path: str, name: str) -> FileList:
        return cls(files, path, name, name)

    @classmethod
    def of_file(cls, files: Files, path: str, name: str) -> FileList:
        root, only = posixpath.split(path)
        return cls(files, root, name, posixpath.dirname(name), only=only)

    @classmethod
    def of_glob(cls, files: Files, path: str, name: str) -> FileList:
        """
        Raises:
            OptionError: the pattern is not legal.
            AudioFileNotFoundError: its fixed part does not exist.
        """
        root, pattern = _split_glob(path)
        try:
            glob_translate(pattern)
        except ValueError as error:
            raise OptionError(f"{name} is no legal pattern ({error}): write ** only between slashes.") from error
        if not files.is_folder(root):
            raise AudioFileNotFoundError(f"{name} matches nothing: the folder {root} does not exist.")
        return cls(files, root, name, _split_glob(name)[0], pattern=pattern)

    def __iter__(self) -> Iterator[str]:
        if self.only is not None:
            return iter((self.only,))
        return (path for path in walk(self.files, self.root, self._enters) if self._matches(path))

    def path(self, relative: str) -> str:
        """Absolute path of one of the files.

        Raises:
            AudioInputError: it cannot be one of them.
        """
        visible = all(part and not part.startswith(".") for part in relative.split("/"))
        legal = relative == self.only if self.only is not None else visible and self._matches(relative)
        if not legal or "\0" in relative:
            raise AudioInputError(f"{relative!r} is no file of {self.name}: only what the source lists can be opened.")
        return posixpath.join(self.root, relative)

    def shown(self, relative: str) -> str:
        """The file's path for messages."""
        return posixpath.join(self.shown_root, relative)

    def _matches(self, path: str) -> bool:
        return self._regex is None or self._regex.match(path) is not None

    @cached_property
    def _regex(self) -> re.Pattern[str] | None:
        return None if self.pattern is None else re.compile(glob_translate(self.pattern))

    def _enters(self, folder: str) -> bool:
        """Whether a folder may hold files that match."""
        if self.pattern is None:
            return True
        parts, names = self.pattern.split("/"), folder.split("/")
        for part, name in zip(parts, names, strict=False):
            if part == "**":
                return True
            if not fnmatchcase(name, part):
                return False
        return len(names) < len(parts)


def _split_glob(path: str) -> tuple[str, str]:
    """The fixed part, and the pattern behind it."""
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if re.search(r"[*?[]", part))
    return "/".join(parts[:first]) or ("/" if first else ""), "/".join(parts[first:])


Content = Literal["audio", "parquet", "tar"]


def kind_of(files: FileList) -> Content:
    """What the files are; audio beside Parquet is audio.

    Raises:
        AudioInputError: none of them can be used, or some are tars and some are not.
    """
    found: dict[Content, str] = {}
    others: Counter[str] = Counter()
    for path in files:
        content = _content(path)
        if content is None:
            others[extension(path)] += 1
            continue
        found.setdefault(content, path)
        if "tar" in found and len(found) > 1:
            raise _mixed(files, *found.values())
        if content == "audio":
            return "audio"
    if not found:
        raise AudioInputError(f"{files.name} leads to {_counted(others)}. {LEGAL_KINDS}")
    return next(iter(found))


def _content(path: str) -> Content | None:
    suffix = extension(path)
    if suffix in AUDIO_EXTENSIONS:
        return "audio"
    return suffix if suffix in ("parquet", "tar") else None


def _mixed(files: FileList, first: str, second: str) -> AudioInputError:
    return AudioInputError(
        f"{files.name} holds both {first} and {second}, and tars cannot be mixed with other files: name the ones that "
        f'are meant by a glob, such as "{files.shown_root}/**/*.tar".'
    )


def _counted(others: Counter[str]) -> str:
    """`12 files, none of them audio (8 .txt, 4 without an extension)`."""
    if not others:
        return "no files"
    counts = [
        f"{count} .{suffix}" if suffix else f"{count} without an extension" for suffix, count in others.most_common(8)
    ]
    more = ", ..." if len(others) > 8 else ""
    return f"{others.total()} files, none of them audio ({', '.join(counts)}{more})"


class FolderSource(Source):
    """Audio files. A file's id and its locator are its path below the folder, or below the fixed part of the glob."""

    kind = "folder"

    def __init__(self, files: FileList, options: SourceOptions) -> None:
        options.refuse(
            "audio files",
            audio_column="there are no columns",
            id_column="the id is the path below the folder",
            split="name the part by its path or by a glob",
            audio_root="files lie where they lie",
        )
        if options.columns:
            raise OptionError(
                f"columns={list(options.columns)} is not legal for a source of audio files, which has no columns: give "
                "a manifest that names the files."
            )
        self._files = files
        self.schema = pa.schema([])

    def batches(self) -> Iterator[pa.RecordBatch]:
        paths = self._audio_files()
        while chunk := list(islice(paths, BATCH_CLIPS)):
            ids = _utf8(chunk, self._files)
            yield clip_batch(ids, ids, [], self.schema)

    def open(self, locator: str) -> Any:
        path = self._files.path(locator)
        if _content(path) != "audio":
            raise AudioInputError(f"{locator!r} is no audio file of {self._files.name}.")
        return self._files.files.recording(path)

    def where(self, locator: str) -> str:
        return self._files.shown(locator)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, **place(self._files), "columns": {}}

    def _audio_files(self) -> Iterator[str]:
        for path in self._files:
            content = _content(path)
            if content == "tar":
                raise _mixed(self._files, path, "audio files")
            if content == "audio":
                yield path


def place(files: FileList) -> dict[str, Any]:
    """Where a list of files is, for `Source.describe`."""
    below = files.pattern or files.only
    return {"path": files.files.url(posixpath.join(files.root, below) if below else files.root)}


def _utf8(paths: list[str], files: FileList) -> pa.Array:
    try:
        return pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        bad = next(path for path in paths if path != path.encode(errors="replace").decode())
        name = os.fsencode(files.shown(bad))
        raise AudioInputError(f"The name of the file {name!r} is not UTF-8, so it can be no id: rename it.") from error
