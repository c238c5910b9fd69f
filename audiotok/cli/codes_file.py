"""codes.parquet, one row a clip; `audiotok.cli.clip_files` describes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiotok.cli.clip_files import StoredClip, unreadable
from audiotok.cli.loading import Origin
from audiotok.clip_rows import ClipRows, FrameOrder
from audiotok.errors import CodesError

if TYPE_CHECKING:
    from audiotok.encoding import ClipCodes
    from audiotok.tokenizer import AudioTokenizer

METADATA_KEY = b"audiotok"
# Codes held before they are written as a row group, and rows read at a time.
_CODES_A_GROUP = 1 << 22
_ROWS_A_READ = 64


class CodesWriter:
    """Writes codes.parquet; `close` writes what is left, the file itself stays open."""

    def __init__(self, file: BinaryIO, tokenizer: AudioTokenizer) -> None:
        self._clips = ClipRows(tokenizer)
        self._schema = self._clips.schema.with_metadata({METADATA_KEY: Origin.of(tokenizer).to_json().encode()})
        self._parquet = pq.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._num_codes = 0

    def write(self, clip_id: str, clip: ClipCodes) -> None:
        self._rows.append(self._clips.row(clip_id, clip))
        self._num_codes += len(self._rows[-1]["codes"])
        if self._num_codes >= _CODES_A_GROUP:
            self._write_group()

    def close(self) -> None:
        self._write_group()
        self._parquet.close()

    def _write_group(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._num_codes = [], 0


class CodesReader:
    """Reads codes.parquet, or any Parquet file with its columns (one without our metadata has no `origin`)."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        try:
            self._parquet = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(name, error) from error
        schema = self._parquet.schema_arrow
        needed = ("id", "codes", "num_frames", "audio_length")
        if missing := [column for column in needed if column not in schema.names]:
            raise CodesError(
                f"{name} has no column {', '.join(missing)}: give a file that `audiotok encode` wrote (its columns: "
                f"{', '.join(schema.names)})."
            )
        record = (schema.metadata or {}).get(METADATA_KEY)
        self.origin = None if record is None else Origin.from_json(record, name)
        self._columns = [column for column in (*needed, "depths") if column in schema.names]

    def __iter__(self) -> Iterator[StoredClip]:
        try:
            for batch in self._parquet.iter_batches(_ROWS_A_READ, columns=self._columns):
                for i in range(batch.num_rows):
                    yield _stored_row({column: batch.column(column)[i] for column in self._columns})
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.name, error) from error


def _stored_row(row: dict[str, Any]) -> StoredClip:
    """A row of pyarrow scalars; its codes are turned into an array only when they are asked for."""

    clip_id = str(row["id"].as_py())

    def ids(tokenizer: AudioTokenizer) -> np.ndarray:
        if missing := [name for name, cell in row.items() if not cell.is_valid and name != "audio_length"]:
            raise CodesError(f"The clip {clip_id!r} has no {', '.join(missing)}: encode it again.")
        codes = np.asarray(row["codes"].values).astype(np.int64)
        depths = np.asarray(row["depths"].values).astype(np.int64) if "depths" in row else None
        return tokenizer.codes_to_ids(*FrameOrder(tokenizer).restore(codes, row["num_frames"].as_py(), depths))

    return StoredClip(clip_id, row["audio_length"].as_py(), ids)
