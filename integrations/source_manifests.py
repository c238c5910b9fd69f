"""Manifests in text: CSV, TSV and JSON lines.

    id,path,text                                {"audio_filepath": "a.wav", "text": "one", "speaker": 7}
    0001,clips/a.wav,"one, two"                 {"audio_filepath": "b.wav", "text": "two", "speaker": 8}

Files are UTF-8; blank lines are skipped. CSV is quoted as RFC 4180 says; TSV has no quotes, as its media type and
Common Voice have it. The first row of either names the columns, and all values are strings: "007" stays "007".

JSON lines keep their types. The file is read once more beforehand to find them: a column's type is the one that all
its values fit (whole numbers beside others become float64, what is null throughout is string), and a column that
mixes text and numbers is refused.
"""

from __future__ import annotations

import csv
import json
import posixpath
from abc import abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from audiotok.errors import AudioInputError
from audiotok.integrations.source_files import extension
from audiotok.integrations.source_paths import AudioPaths, Place
from audiotok.integrations.source_storage import Files, reading
from audiotok.integrations.sources import (
    BATCH_CLIPS,
    Source,
    SourceOptions,
    choose_columns,
    clip_batch,
    described,
    find_audio_column,
    find_id_column,
    find_split_column,
    no_audio_column,
    no_clips,
)

JSON_EXTENSIONS = ("jsonl", "json-lines", "ndjson", "json")


class Rows(NamedTuple):
    """Some rows of a manifest: the line that each begins on, and the values of the columns that are needed."""

    lines: list[int]
    values: dict[str, list[Any]]


class TextManifest(Source):
    """What CSV and JSON lines share. A locator is "<line>:<path as written>"."""

    kind = "manifest"

    def __init__(self, files: Files, path: str, name: str, options: SourceOptions) -> None:
        self._files, self._path, self._name, self._options = files, path, name, options
        names = self._column_names()
        audio = find_audio_column(names, options, name)
        if audio is None:
            raise no_audio_column(names, name)
        self._audio, self._id = audio, find_id_column(names, options, name) or audio
        self._split = find_split_column(names, options, name)
        passed = choose_columns(names, options, name, (self._audio, self._id))
        self._needed = list(dict.fromkeys([self._id, self._audio, *passed, *([self._split] if self._split else [])]))
        self.schema = self._find_schema(passed)
        self._paths = AudioPaths(Place(files, posixpath.dirname(path)), options.audio_root)

    @abstractmethod
    def _column_names(self) -> list[str]:
        """Of all columns, in order."""

    @abstractmethod
    def _find_schema(self, columns: list[str]) -> pa.Schema: ...

    @abstractmethod
    def _rows(self) -> Iterator[Rows]:
        """The rows, up to `BATCH_CLIPS` at a time, with `_needed` columns."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        splits: dict[str, None] = {}
        is_empty = True
        for rows in self._rows():
            if self._split is not None:
                rows = self._of_split(rows, splits)
            if rows.lines:
                is_empty = False
                yield self._batch(rows)
        if is_empty:
            raise no_clips(self._name, self._options, splits)

    def open(self, locator: str) -> Any:
        line, colon, path = locator.partition(":")
        if not (line.isdecimal() and colon):
            raise AudioInputError(f"{locator!r} is no clip of {self._name}: only what the source lists can be opened.")
        return self._paths.open(path, self._line(int(line)))

    def where(self, locator: str) -> str:
        return self._line(int(locator.partition(":")[0]))

    def describe(self) -> dict[str, Any]:
        chosen = self._options.chosen() | {"audio_column": self._audio, "id_column": self._id}
        return {"kind": self.kind, "path": self._files.url(self._path), **chosen, "columns": described(self.schema)}

    def _line(self, line: int) -> str:
        return f"{self._name}, line {line}"

    def _of_split(self, rows: Rows, splits: dict[str, None]) -> Rows:
        """The rows of the split that was asked for; some names of splits are collected for a message."""
        found = [str(value) for value in rows.values[self._split or ""]]
        if len(splits) < 20:
            splits.update(dict.fromkeys(found))
        kept = [index for index, value in enumerate(found) if value == self._options.split]
        values = {name: [column[index] for index in kept] for name, column in rows.values.items()}
        return Rows([rows.lines[index] for index in kept], values)

    def _batch(self, rows: Rows) -> pa.RecordBatch:
        paths = self._text(rows, self._audio)
        ids = paths if self._id == self._audio else self._text(rows, self._id)
        self._paths.check(paths, lambda index: self._line(rows.lines[index]))
        locators = pc.binary_join_element_wise(pa.array(rows.lines).cast(pa.string()), paths, ":")
        columns = [self._array(rows, rows.values[field.name], field) for field in self.schema]
        return clip_batch(ids, locators, columns, self.schema)

    def _text(self, rows: Rows, column: str) -> pa.Array:
        """Ids or paths: text that is not empty; ids may be whole numbers."""
        values = rows.values[column]
        if set(map(type, values)) != {str}:
            values = [self._as_text(*pair, column) for pair in zip(rows.lines, values, strict=True)]
        texts = self._array(rows, values, pa.field(column, pa.string()))
        if (row := pc.index(texts, "").as_py()) >= 0:
            raise self._empty(rows.lines[row], column)
        return texts

    def _as_text(self, line: int, value: Any, column: str) -> str:
        if value is None:
            raise self._empty(line, column)
        if type(value) is str or (type(value) is int and column != self._audio):
            return str(value)
        raise AudioInputError(f'{self._line(line)}: the column "{column}" is {value!r}: give text.')

    def _empty(self, line: int, column: str) -> AudioInputError:
        return AudioInputError(f'{self._line(line)}: the column "{column}" is empty: every clip needs a value there.')

    def _array(self, rows: Rows, values: list[Any], field: pa.Field) -> pa.Array:
        try:
            if pa.types.is_integer(field.type) and float in map(type, values):  # which Arrow would cut off
                raise pa.ArrowInvalid("a value is no whole number")
            return pa.array(values, field.type)
        except _NO_TYPE as error:
            raise AudioInputError(
                f'{self._line(rows.lines[0])} and the following: the column "{field.name}" cannot be read as '
                f"{field.type} ({error})."
            ) from error


class CsvSource(TextManifest):
    """CSV (.csv) or tab-separated values (.tsv)."""

    def _column_names(self) -> list[str]:
        with closing(self._records()) as records:
            _, names = next(records, (0, []))
        if not names:
            raise AudioInputError(f"{self._name} is empty: its first line must name the columns.")
        doubled = [name for name in names if names.count(name) > 1]
        if doubled:
            raise AudioInputError(f'{self._name} has two columns "{doubled[0]}": give each a name of its own.')
        return names

    def _find_schema(self, columns: list[str]) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in columns])

    def _rows(self) -> Iterator[Rows]:
        records = self._records()
        _, names = next(records)
        places = {name: names.index(name) for name in self._needed}
        while True:
            lines: list[int] = []
            cells: list[str] = []  # row after row; lists of rows would keep the garbage collector busy half the time
            for line, row in islice(records, BATCH_CLIPS):
                lines.append(line)
                cells.extend(row)
            if not lines:
                return
            yield Rows(lines, {name: cells[place :: len(names)] for name, place in places.items()})

    def _records(self) -> Generator[tuple[int, list[str]]]:
        """Rows with the line that each begins on, the header first; all are as long as the header."""
        dialect = _TSV if extension(self._path) == "tsv" else _CSV
        with closing(_lines(self._files, self._path, self._name)) as lines:
            reader = csv.reader(lines, strict=True, **dialect)
            width, line = 0, 1
            try:
                for row in reader:
                    if row:
                        width = width or len(row)
                        if len(row) != width:
                            raise AudioInputError(
                                f"{self._line(line)} has {len(row)} values, the header names {width} columns: check "
                                "the commas, tabs and quotes."
                            )
                        yield line, row
                    line = reader.line_num + 1
            except csv.Error as error:
                raise AudioInputError(f"{self._line(line)}, or behind it: {error}. Check the quotes.") from error


_CSV: dict[str, Any] = {"delimiter": ","}
_TSV: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


class JsonSource(TextManifest):
    """JSON lines: one object a line."""

    def _column_names(self) -> list[str]:
        self._types: dict[str, pa.DataType] = {}
        self._mixed: dict[str, str] = {}
        for rows in self._all_columns():
            for name, values in rows.values.items():
                self._find_type(name, rows.lines, values)
        if not self._types:
            raise AudioInputError(f"{self._name} lists no clips: give one JSON object a line.")
        return list(self._types)

    def _find_schema(self, columns: list[str]) -> pa.Schema:
        for name in columns:
            if name in self._mixed:
                rest = [column for column in columns if column not in self._mixed]
                raise AudioInputError(f"{self._mixed[name]} Give a column one type, or leave it out, columns={rest!r}.")
        types = {name: self._types[name] for name in columns}
        return pa.schema([(name, pa.string() if pa.types.is_null(type) else type) for name, type in types.items()])

    def _rows(self) -> Iterator[Rows]:
        for lines, values in self._all_columns():
            nulls = [None] * len(lines)
            yield Rows(lines, {name: values.get(name, nulls) for name in self._needed})

    def _all_columns(self) -> Iterator[Rows]:
        objects = self._objects()
        while True:
            lines: list[int] = []
            columns: dict[str, list[Any]] = {}
            for line, row in islice(objects, BATCH_CLIPS):
                for name, value in row.items():
                    if name not in columns:
                        columns[name] = [None] * len(lines)
                    columns[name].append(value)
                lines.append(line)
                if len(row) < len(columns):
                    for column in columns.values():
                        column.extend([None] * (len(lines) - len(column)))
            if not lines:
                return
            yield Rows(lines, columns)

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(_lines(self._files, self._path, self._name), 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AudioInputError(f"{self._line(number)} is no JSON ({error}): give one object a line.") from error
            if not isinstance(row, dict):
                raise AudioInputError(f"{self._line(number)} is a {type(row).__name__}: give one JSON object a line.")
            yield number, row

    def _find_type(self, name: str, lines: list[int], values: list[Any]) -> None:
        """Widen the type of a column to what stands in these lines."""
        before = self._types.setdefault(name, pa.null())
        try:
            self._types[name] = _wider(before, pa.array(values).type)
        except _NO_TYPE:
            self._mixed.setdefault(name, self._where_mixed(name, before, lines, values))

    def _where_mixed(self, name: str, type: pa.DataType, lines: list[int], values: list[Any]) -> str:
        for line, value in zip(lines, values, strict=True):
            try:
                type = _wider(type, pa.array([value]).type)
            except _NO_TYPE:
                return f'{self._line(line)}: "{name}" is {value!r}, and {type} before.'
        return f'{self._line(lines[0])} and the following: "{name}" holds values of several types.'


_NO_TYPE = (pa.ArrowException, OverflowError, UnicodeEncodeError)


def _wider(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type that holds the values of both."""
    schemas = [pa.schema([("", type)]) for type in (first, second)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _lines(files: Files, path: str, name: str) -> Generator[str]:
    with files.open(path) as file, reading(name, remote=not files.is_local):
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise AudioInputError(
                    f"{name}, line {number} is not UTF-8 ({error.reason}): convert the file."
                ) from error
            yield text
