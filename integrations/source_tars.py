"""WebDataset tars: files of one name with several extensions are a sample.

    shard-000000.tar:   0001.flac  0001.json  0001.txt  0002.flac  0002.json  0002.txt ...

The key of a sample is the name up to the first dot behind the last slash; its files stand next to each other. One
pass over the headers of a tar (and over the texts in it) lists it: nothing is unpacked, and a clip is opened by
reading its bytes at their place. A tar with anything in it that could lead elsewhere is refused: links, devices,
absolute names, `..`.

Columns: each top-level text, number or truth value of a .json file is a column of its name, a .txt file (text) and a
.cls file (a whole number) are columns of their extension, which is "speaker.txt" for 0001.speaker.txt. What else
stands in a sample is left alone, pickles above all. **The first tar decides** which columns there are and of which
types: a whole number beside others makes float64. Later samples may lack a column (null); a column that is new, or
a value that does not fit, is refused, and `columns=` says which are wanted.
"""

from __future__ import annotations

import builtins
import json
import tarfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain, groupby, islice
from types import NoneType
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from audiotok.errors import AudioInputError, OptionError
from audiotok.integrations.source_files import AUDIO_EXTENSIONS, FileList, extension, place
from audiotok.integrations.source_storage import reading
from audiotok.integrations.sources import (
    BATCH_CLIPS,
    Source,
    SourceOptions,
    choose_columns,
    clip_batch,
    described,
    no_clips,
)

# A text beside a recording; more is no transcript, and would be held in memory.
LARGEST_TEXT = 16 << 20
_TEXTS = ("json", "txt", "cls")
# A column's type, and the Python types that it takes.
_KINDS = {
    pa.bool_(): {bool},
    pa.int64(): {int},
    pa.float64(): {int, float},
    pa.string(): {str},
}


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        key: its name up to the first dot behind the last slash.
        extension: behind that dot, lower case.
        text: what stands in it, if that is to become columns.
    """

    name: str
    key: str
    extension: str
    offset: int
    size: int
    text: bytes | None


class Sample(NamedTuple):
    """A clip of a tar."""

    tar: str
    audio: Member
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.tar}/{self.audio.key}"

    @property
    def locator(self) -> str:
        return json.dumps([self.tar, self.audio.name, self.audio.offset, self.audio.size], ensure_ascii=False)


class TarSource(Source):
    """Samples of WebDataset tars; a locator is `[tar, name, offset, size]` as JSON."""

    kind = "tar"

    def __init__(self, files: FileList, options: SourceOptions) -> None:
        options.refuse(
            "tars",
            id_column="the id is the name of the tar and the key in it",
            split="name the tars of the split by a glob",
            audio_root="the audio is in the tars",
        )
        self._files, self._options = files, options
        self._tars = [name for name in files if extension(name) == "tar"]
        self.schema = pa.schema([]) if options.columns == () else self._find_schema()

    def batches(self) -> Iterator[pa.RecordBatch]:
        samples = chain.from_iterable(self._samples(tar) for tar in self._tars)
        is_empty = True
        while chunk := list(islice(samples, BATCH_CLIPS)):
            is_empty = False
            yield self._batch(chunk)
        if is_empty:
            raise no_clips(self._files.name, self._options, ())

    def open(self, locator: str) -> Any:
        tar, _, offset, size = self._parsed(locator)
        recording = self._files.files.part(self._files.path(tar), offset, size)
        if isinstance(recording, bytes) and len(recording) < size:
            raise AudioInputError(f"{self.where(locator)} is cut off: the tar has changed since it was listed.")
        return recording

    def where(self, locator: str) -> str:
        tar, name, _, _ = self._parsed(locator)
        return self._where(tar, name)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, **place(self._files), **self._options.chosen(), "columns": described(self.schema)}

    def _parsed(self, locator: str) -> tuple[str, str, int, int]:
        try:
            tar, name, offset, size = json.loads(locator)
        except (TypeError, ValueError) as error:
            raise self._foreign(locator) from error
        kinds = [type(part) for part in (tar, name, offset, size)]
        if kinds != [str, str, int, int] or min(offset, size) < 0 or extension(tar) != "tar":
            raise self._foreign(locator)
        return tar, name, offset, size

    def _foreign(self, locator: object) -> AudioInputError:
        return AudioInputError(
            f"{locator!r} is no clip of {self._files.name}: only what the source lists can be opened."
        )

    def _where(self, tar: str, member: str) -> str:
        return f"{self._files.shown(tar)}: {member}"

    # Columns

    def _find_schema(self) -> pa.Schema:
        """From the first tar."""
        found: dict[str, set[type]] = {}
        for sample in self._samples(self._tars[0]):
            for name, value in sample.fields.items():
                found.setdefault(name, set()).add(type(value))
        where = self._files.shown(self._tars[0])
        passed = choose_columns(list(found), self._options, where, ())
        return pa.schema([(name, self._type(name, found[name], passed)) for name in passed])

    def _type(self, name: str, kinds: set[type], passed: list[str]) -> pa.DataType:
        for type, legal in _KINDS.items():
            if kinds <= legal:
                return type
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        rest = [other for other in passed if other != name]
        raise AudioInputError(
            f'"{name}" is {found} in {self._files.shown(self._tars[0])}: give a column one type, or leave it out, '
            f"columns={rest!r}."
        )

    def _batch(self, samples: list[Sample]) -> pa.RecordBatch:
        if self._options.columns is None:
            self._check_fields(samples)
        ids, locators = (
            pa.array(values, pa.string()) for values in zip(*((s.id, s.locator) for s in samples), strict=True)
        )
        return clip_batch(ids, locators, [self._column(samples, field) for field in self.schema], self.schema)

    def _check_fields(self, samples: list[Sample]) -> None:
        known = set(self.schema.names)
        for sample in samples:
            if new := sample.fields.keys() - known:
                raise OptionError(
                    f'{self._where(sample.tar, sample.audio.name)}: the column "{min(new)}" is not in '
                    f"{self._files.shown(self._tars[0])}, the first tar, which decides: say which columns are wanted, "
                    f"columns={self.schema.names!r}."
                )

    def _column(self, samples: list[Sample], field: pa.Field) -> pa.Array:
        values = [sample.fields.get(field.name) for sample in samples]
        try:
            return _as_array(values, field.type)
        except _MISFIT as error:
            bad = next(index for index, value in enumerate(values) if not _fits(value, field.type))
            raise AudioInputError(
                f'{self._where(samples[bad].tar, samples[bad].audio.name)}: "{field.name}" is {values[bad]!r}, and '
                f"{field.type} in the first tar, which decides: give a column one type, or leave it out, columns=[...]."
            ) from error

    # Reading tars

    def _samples(self, tar: str) -> Iterator[Sample]:
        with closing(self._members(tar)) as members:
            for key, group in groupby(members, lambda member: member.key):
                yield self._sample(tar, key, list(group))

    def _sample(self, tar: str, key: str, members: list[Member]) -> Sample:
        audio = [member for member in members if self._is_audio(member)]
        if len(audio) != 1:
            raise self._not_one_recording(tar, key, audio, members)
        fields: dict[str, Any] = {}
        for member in members:
            if member.text is None:
                continue
            new = _fields(member, member.text, lambda: self._where(tar, key))
            if doubled := new.keys() & fields.keys():
                raise AudioInputError(
                    f'{self._where(tar, key)}: the column "{min(doubled)}" is there twice: rename one.'
                )
            fields |= new
        return Sample(tar, audio[0], fields)

    def _not_one_recording(self, tar: str, key: str, audio: list[Member], members: list[Member]) -> AudioInputError:
        names = ", ".join(f".{member.extension}" for member in audio or members)
        if audio:
            return AudioInputError(
                f"{self._where(tar, key)} is a sample with several recordings ({names}): name the extension of the one "
                "that is meant, audio_column=..."
            )
        return AudioInputError(
            f"{self._where(tar, key)} is a sample without a recording ({names}): each needs one, and the files of a "
            "sample must stand next to each other in the tar."
        )

    def _is_audio(self, member: Member) -> bool:
        if self._options.audio_column is not None:
            return member.extension == self._options.audio_column.lower().removeprefix(".")
        return _last_part(member.extension) in AUDIO_EXTENSIONS

    def _is_wanted(self, suffix: str) -> bool:
        """Whether a file of this extension is a text that becomes columns."""
        kind, columns = _last_part(suffix), self._options.columns
        if kind not in _TEXTS or columns == ():
            return False
        return columns is None or kind == "json" or suffix in columns

    def _members(self, tar: str) -> Generator[Member]:
        """The visible files of a tar."""
        with self._opened(tar) as (file, archive):
            last = -1
            while (info := archive.next()) is not None:
                archive.members.clear()  # which would grow with the tar
                self._check_member(tar, info, is_ahead=archive.offset > last)
                last = archive.offset
                name = info.name.removeprefix("./")
                folder, slash, base = name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if info.isdir() or not suffix or name.startswith(".") or "/." in name:
                    continue
                wanted = self._is_wanted(suffix.lower())
                text = self._read_text(file, self._where(tar, name), info) if wanted else None
                yield Member(name, folder + slash + stem, suffix.lower(), info.offset_data, info.size, text)
            self._check_end(file, tar, archive.offset)

    def _check_member(self, tar: str, info: tarfile.TarInfo, is_ahead: bool) -> None:
        """Raise `AudioInputError` for what could lead elsewhere, or nowhere."""
        name = info.name
        if not name.isascii() and name.encode(errors="replace") != name.encode(errors="surrogateescape"):
            raise AudioInputError(f"{self._where(tar, repr(name))} is not UTF-8, so it can be no id: rename it.")
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise AudioInputError(f"{self._where(tar, name)} leads out of the tar: pack it with relative names.")
        if not (info.isdir() or (info.isreg() and not info.issparse())):
            raise AudioInputError(
                f"{self._where(tar, name)} is a link, device or sparse file: pack it as a plain file."
            )
        if not is_ahead or info.size < 0:
            raise self._damaged(tar, f"{name} ends before it begins")

    def _read_text(self, file: BinaryIO, where: str, info: tarfile.TarInfo) -> bytes:
        if info.size > LARGEST_TEXT:
            raise AudioInputError(
                f"{where} has {info.size} bytes; texts of up to {LARGEST_TEXT} are read: leave it out, columns=[...]."
            )
        file.seek(info.offset_data)
        return file.read(info.size)

    @contextmanager
    def _opened(self, tar: str) -> Generator[tuple[BinaryIO, tarfile.TarFile]]:
        files, shown = self._files.files, self._files.shown(tar)
        with reading(shown, remote=not files.is_local), files.open(self._files.path(tar)) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
                    yield file, archive
            except tarfile.TarError as error:
                raise self._damaged(tar, str(error)) from error

    def _check_end(self, file: BinaryIO, tar: str, offset: int) -> None:
        """Raise `AudioInputError` unless the tar ends as it should: `tarfile` takes any end for the end."""
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise self._damaged(tar, "the mark of its end is missing")
        while block:
            if block.strip(b"\0"):
                raise self._damaged(tar, f"behind byte {offset} there is more, which no reader would see")
            block = file.read(1 << 20)

    def _damaged(self, tar: str, reason: str) -> AudioInputError:
        return AudioInputError(
            f"{self._files.shown(tar)} is no whole, uncompressed tar ({reason}): fetch or pack it again."
        )


def _last_part(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _fields(member: Member, text: bytes, where: Callable[[], str]) -> dict[str, Any]:
    """The columns in a text of a sample."""
    kind = _last_part(member.extension)
    try:
        if kind == "txt":
            return {member.extension: text.decode()}
        if kind == "cls":
            return {member.extension: int(text)}
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AudioInputError(f"{where()}: the .{member.extension} file cannot be read ({error}).") from error
    if not isinstance(fields, dict):
        raise AudioInputError(f"{where()}: the .{member.extension} file is no JSON object but {type(fields).__name__}.")
    return {name: value for name, value in fields.items() if isinstance(value, str | int | float)}


_MISFIT = (pa.ArrowException, TypeError, OverflowError, UnicodeEncodeError)


def _as_array(values: list[Any], type: pa.DataType) -> pa.Array:
    """
    Raises:
        any of `_MISFIT`: a value does not fit.
    """
    if not set(map(builtins.type, values)) <= {*_KINDS[type], NoneType}:  # Arrow would make 2.5 the whole number 2
        raise TypeError(f"not {type}")
    return pa.array(values, type)


def _fits(value: Any, type: pa.DataType) -> bool:
    try:
        _as_array([value], type)
    except _MISFIT:
        return False
    return True
