"""Parquet: one file, or a folder or glob of them, with recordings inside or beside.

Listing reads only the columns that it gives (of recordings inside, at most their paths). Opening a clip reads the
audio column of its row group, which each thread keeps until it needs another one: clips in the order of the list cost
one reading each, and a thread holds one row group. Files of recordings are best written with small row groups, as
`datasets` does.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from audiotok.errors import AudioInputError
from audiotok.integrations.source_columns import (
    AudioColumn,
    as_ids,
    has_path,
    media_columns,
    split_mask,
)
from audiotok.integrations.source_files import FileList, extension, place
from audiotok.integrations.source_paths import AudioPaths, Place
from audiotok.integrations.source_storage import reading
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


class ParquetSource(Source):
    """Rows of Parquet files with equal columns; a locator is "<row>:<file>", rows counted from 0 in each file.

    Without a column for ids, a clip's id is its path as written; where recordings are inside and the first one has
    no path, "<file>/<row>".
    """

    kind = "manifest"

    def __init__(self, files: FileList, options: SourceOptions) -> None:
        self._files, self._options = files, options
        self._names = [name for name in files if extension(name) == "parquet"]
        with self._opened(self._names[0]) as file:
            self._first = file.schema_arrow
            self._audio = self._find_audio(files.shown(self._names[0]))
            self._id = self._find_id(file)
        names, where = self._first.names, files.shown(self._names[0])
        self._split = find_split_column(names, options, where)
        passed = choose_columns(names, options, where, (self._id, self._audio.name), media_columns(self._first))
        self.schema = pa.schema([(name, self._first.field(name).type) for name in passed])
        self._paths = AudioPaths(Place(files.files, files.root), options.audio_root)
        self._last = _LastRead()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=_LastRead())

    def batches(self) -> Iterator[pa.RecordBatch]:
        splits: dict[str, None] = {}
        is_empty = True
        for name in self._names:
            for batch in self._file_batches(name, splits):
                is_empty = False
                yield batch
        if is_empty:
            raise no_clips(self._files.name, self._options, splits)

    def open(self, locator: str) -> Any:
        row, name = self._parsed(locator)
        last = self._last
        if last.name != name:
            with self._opened(name) as file:
                last.start(name, file.metadata)
        if not row < last.starts[-1]:
            raise AudioInputError(f"{self.where(locator)} does not exist: the file has {last.starts[-1]} rows.")
        group = bisect_right(last.starts, row) - 1
        if last.group != group:
            last.forget()  # before another one takes its room
            with self._opened(name, last.metadata) as file:
                last.table, last.group = file.read_row_group(group, columns=self._audio.columns), group
        return self._audio.open(last.table, row - last.starts[group], self._paths, self.where(locator))

    def where(self, locator: str) -> str:
        row, name = self._parsed(locator)
        return f"{self._files.shown(name)}, row {row}"

    def describe(self) -> dict[str, Any]:
        chosen = self._options.chosen() | {"audio_column": self._audio.name, "id_column": self._id}
        return {"kind": self.kind, **place(self._files), **chosen, "columns": described(self.schema)}

    def _find_audio(self, where: str) -> AudioColumn:
        names, media = self._first.names, media_columns(self._first)
        name = find_audio_column(names, self._options, where) or (media[0] if len(media) == 1 else None)
        if name is None:
            raise no_audio_column(names, where)
        return AudioColumn.find(name, self._first, where)

    def _find_id(self, file: pq.ParquetFile) -> str | None:
        """The column of ids, or of structs with paths; None for row numbers."""
        column = find_id_column(self._first.names, self._options, self._files.shown(self._names[0]))
        if column is not None or self._audio.form == "path":
            return column or self._audio.name
        if not has_path(self._first.field(self._audio.name).type):
            return None
        head = next(file.iter_batches(1, columns=[f"{self._audio.name}.path"]), None)
        has_name = head is not None and pc.struct_field(head.column(0), "path")[0].as_py()
        return self._audio.name if has_name else None

    def _file_batches(self, name: str, splits: dict[str, None]) -> Iterator[pa.RecordBatch]:
        paths = self._audio.name if self._audio.form == "path" else None
        inside = self._id == self._audio.name and has_path(self._first.field(self._id).type)
        id_leaf = f"{self._id}.path" if inside else self._id
        needed = dict.fromkeys(name for name in (id_leaf, paths, self._split, *self.schema.names) if name is not None)
        with self._opened(name) as file:
            self._check_schema(name, file.schema_arrow)
            first = 0
            for batch in file.iter_batches(BATCH_CLIPS, columns=list(needed)):
                rows = pa.array(range(first, first + batch.num_rows), pa.int64())
                first += batch.num_rows
                if self._split is not None:
                    mask = split_mask(batch.column(self._split), self._options.split or "", splits)
                    batch, rows = batch.filter(mask), rows.filter(mask)
                if len(rows):
                    yield self._clips(name, batch, rows)

    def _clips(self, name: str, batch: pa.RecordBatch, rows: pa.Array) -> pa.RecordBatch:
        def where(index: int) -> str:
            return f"{self._files.shown(name)}, row {rows[index]}"

        numbers = rows.cast(pa.string())
        if self._audio.form == "path":
            paths = as_ids(batch.column(self._audio.name), self._audio.name, where)
            self._paths.check(paths, where)
        if self._id is None:
            ids = pc.binary_join_element_wise(name, numbers, "/")
        else:
            ids = batch.column(self._id)
            ids = as_ids(pc.struct_field(ids, "path") if pa.types.is_struct(ids.type) else ids, self._id, where)
        locators = pc.binary_join_element_wise(numbers, name, ":")
        return clip_batch(ids, locators, [batch.column(field.name) for field in self.schema], self.schema)

    def _check_schema(self, name: str, schema: pa.Schema) -> None:
        """Raise `AudioInputError` if a column that is needed is missing or of another type than in the first file."""
        needed = dict.fromkeys([self._id, *self._audio.columns, self._split, *self.schema.names])
        for column in needed:
            if column is None:
                continue
            first = self._first.field(column).type
            found = schema.field(column).type if column in schema.names else None
            if found != first:
                raise AudioInputError(
                    f'The column "{column}" is {first} in {self._files.shown(self._names[0])}, and '
                    f"{found or 'missing'} in {self._files.shown(name)}: write all files with the same columns, or "
                    "leave the column out by columns=[...]."
                )

    @contextmanager
    def _opened(self, name: str, metadata: pq.FileMetaData | None = None) -> Generator[pq.ParquetFile]:
        files = self._files.files
        try:
            with reading(self._files.shown(name), remote=not files.is_local), files.open(self._files.path(name)) as raw:
                with pq.ParquetFile(raw, metadata=metadata) as file:
                    yield file
        except pa.ArrowException as error:
            raise AudioInputError(f"{self._files.shown(name)} is no whole Parquet file ({error}).") from error

    def _parsed(self, locator: str) -> tuple[int, str]:
        row, _, name = locator.partition(":")
        if not row.isdecimal() or extension(name) != "parquet":
            raise AudioInputError(f"{locator!r} is no clip of {self._files.name}.")
        return int(row), name


class _LastRead(threading.local):
    """The row group that this thread read last."""

    name: str | None = None

    def start(self, name: str, metadata: pq.FileMetaData) -> None:
        """Begin with another file."""
        sizes = (metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
        self.name, self.metadata, self.starts = name, metadata, [0, *accumulate(sizes)]
        self.forget()

    def forget(self) -> None:
        self.group, self.table = -1, None
