"""codes.parquet, one row a clip; `audiotok.cli.clip_files` describes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from audiotok.cli.clip_files import StoredClip, unreadable
from audiotok.cli.loading import Origin
from audiotok.errors import CodesError
from audiotok.layouts import Layout, default_layout

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
        self._order, self._rate = FrameOrder(tokenizer), tokenizer.sampling_rate
        self._schema = _schema(tokenizer)
        self._parquet = pq.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._num_codes = 0

    def write(self, clip_id: str, clip: ClipCodes) -> None:
        codes, num_frames = self._order.flatten(clip.codes, clip.depths)
        row = {
            "id": clip_id,
            "codes": codes.astype(self._schema.field("codes").type.value_type.to_pandas_dtype()),
            "depths": clip.depths,
            "num_frames": num_frames,
            "audio_length": clip.audio_length,
            "duration": clip.audio_length / self._rate,
        }
        self._rows.append({name: row[name] for name in self._schema.names})
        self._num_codes += len(codes)
        if self._num_codes >= _CODES_A_GROUP:
            self._write_group()

    def close(self) -> None:
        self._write_group()
        self._parquet.close()

    def _write_group(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._num_codes = [], 0


def _schema(tokenizer: AudioTokenizer) -> pa.Schema:
    facts = tokenizer.codec.facts
    code = pa.uint16() if max(facts.codebook_sizes) <= 1 << 16 else pa.uint32()
    fields = [("id", pa.string()), ("codes", pa.list_(code))]
    if facts.variable_depth:
        fields.append(("depths", pa.list_(pa.uint8())))
    fields += [("num_frames", pa.int64()), ("audio_length", pa.int64()), ("duration", pa.float64())]
    return pa.schema(fields, metadata={METADATA_KEY: Origin.of(tokenizer).to_json().encode()})


class FrameOrder:
    """Codes of a clip as one run, frame by frame: the order of the codec's default layout, without its id offsets."""

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        facts = tokenizer.codec.facts
        self._strides = facts.codebook_strides
        self._layout: Layout = default_layout(tokenizer.vocabulary, facts.codebook_strides, facts.variable_depth)

    def flatten(self, codes: Any, depths: np.ndarray | None) -> tuple[np.ndarray, int]:
        """Codes `[Q, T]` (a list of `[T_q]` where codebooks have different rates) → `[L]`, and T."""
        num_frames = codes[0].shape[-1] * self._strides[0]
        return self._layout.codes_to_ids(codes, depths) - self._offsets(num_frames, depths), num_frames

    def restore(self, flat: np.ndarray, num_frames: int, depths: np.ndarray | None) -> tuple[Any, np.ndarray | None]:
        """Codes and depths: the inverse of `flatten`.

        Raises:
            TokenError: the run is no clip of so many frames, or of another codec.
        """
        if num_frames < 0:
            raise CodesError(f"num_frames={num_frames} is not legal: 0 or more.")
        offsets = self._offsets(num_frames, depths)
        if len(flat) != len(offsets):
            raise CodesError(
                f"{len(flat)} codes are not {num_frames} frames of this codec, which have {len(offsets)}: were they "
                "made by another one?"
            )
        return self._layout.ids_to_codes(flat + offsets).codes, depths

    def _offsets(self, num_frames: int, depths: np.ndarray | None) -> np.ndarray:
        """What stands between code and id at each place: the ids of a clip of zeros."""
        zeros = [np.zeros(num_frames // stride, np.int64) for stride in self._strides]
        return self._layout.codes_to_ids(zeros if max(self._strides) > 1 else np.stack(zeros), depths)


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
