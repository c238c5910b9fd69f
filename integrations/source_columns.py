"""Columns of Arrow tables: how they hold recordings, and which can be ids. For Parquet and datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from audiotok.errors import AudioInputError, AudioShapeError, MissingSamplingRateError, OptionError
from audiotok.integrations.source_paths import AudioPaths

RATE_COLUMNS = ("sampling_rate", "sample_rate")
Form = Literal["path", "bytes", "file", "array", "waveform"]


@dataclass(frozen=True)
class AudioColumn:
    """A column of recordings.

    Attributes:
        form: "path" (string), "bytes" (of a whole file), "file" (struct of `bytes` and `path`, either of which may be
            null; as `datasets` writes), "array" (numbers `[N]` or `[C, N]`), "waveform" (struct of `array` and
            `sampling_rate`).
        rate_column: of an array.
    """

    name: str
    form: Form
    rate_column: str | None = None

    @classmethod
    def find(cls, name: str, schema: pa.Schema, where: str) -> AudioColumn:
        """
        Raises:
            OptionError: the column's type holds no recordings.
            MissingSamplingRateError: arrays without a rate.
        """
        type = schema.field(name).type
        form = _form(type)
        if form is None:
            raise OptionError(
                f'The column "{name}" of {where} is {type}, which holds no recordings: legal are paths (string), bytes '
                "of files (binary), structs {bytes, path} or {array, sampling_rate}, and lists of numbers. Name "
                "another one, audio_column=..."
            )
        if form != "array":
            return cls(name, form)
        rate = next((column for column in RATE_COLUMNS if column in schema.names), None)
        if rate is None:
            raise MissingSamplingRateError(
                f'The column "{name}" of {where} holds arrays, whose rate must stand in a column "sampling_rate".'
            )
        return cls(name, form, rate)

    @property
    def columns(self) -> list[str]:
        """Those that `open` needs."""
        return [self.name] if self.rate_column is None else [self.name, self.rate_column]

    def open(self, table: pa.Table, row: int, paths: AudioPaths, where: str) -> Any:
        """The recording of a row of a table with `columns`, as `open_audio` takes it."""
        cell = table.column(self.name)[row]
        if not cell.is_valid:
            raise AudioInputError(f'{where}: the column "{self.name}" is null: there is no audio.')
        if self.form == "path":
            return paths.open(str(cell.as_py()), where)
        if self.form == "bytes":
            return cell.as_py()
        if self.form == "file":
            return self._open_file(cell.as_py(), paths, where)
        if self.form == "array":
            return {"array": self._samples(cell, where), "sampling_rate": table.column(self.rate_column)[row].as_py()}
        return {"array": self._samples(cell["array"], where), "sampling_rate": cell["sampling_rate"].as_py()}

    def _open_file(self, file: dict[str, Any], paths: AudioPaths, where: str) -> Any:
        if file.get("bytes") is not None:
            return file["bytes"]
        if file.get("path"):
            return paths.open(file["path"], where)
        raise AudioInputError(f'{where}: bytes and path in the column "{self.name}" are null: there is no audio.')

    def _samples(self, cell: Any, where: str) -> np.ndarray:
        if not cell.is_valid:
            raise AudioInputError(f'{where}: the array in the column "{self.name}" is null: there is no audio.')
        channels = [channel.values for channel in cell.values] if _is_list(cell.values.type) else [cell.values]
        lengths = sorted({len(channel) for channel in channels})
        if len(lengths) != 1:
            raise AudioShapeError(
                f'{where}: the channels in the column "{self.name}" have {lengths} samples: one length.'
            )
        samples = np.stack([channel.to_numpy(zero_copy_only=False) for channel in channels])
        return samples if _is_list(cell.values.type) else samples[0]


def is_media(type: pa.DataType) -> bool:
    """Whether a column holds files, as features of `datasets` for sounds, pictures and documents do."""
    if not types.is_struct(type) or type.get_field_index("bytes") < 0:
        return False
    return _is_binary(type.field("bytes").type) or types.is_null(type.field("bytes").type)


def has_path(type: pa.DataType) -> bool:
    """Whether a struct of a file has its path, too."""
    return is_media(type) and type.get_field_index("path") >= 0


def as_ids(values: pa.Array, column: str, where: Callable[[int], str]) -> pa.Array:
    """A column as ids; `where` names a row of it.

    Raises:
        OptionError: its type cannot be an id.
        AudioInputError: an id is null or empty.
    """
    if types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (_is_text(values.type) or types.is_integer(values.type)):
        raise OptionError(f'The column "{column}" is {values.type}: ids are text or whole numbers; name another one.')
    ids = values.cast(pa.string())
    empty = pc.fill_null(pc.equal(ids, ""), True)
    if (row := pc.index(empty, True).as_py()) >= 0:
        raise AudioInputError(f'{where(row)}: the column "{column}" is empty: every clip needs an id.')
    return ids


def split_mask(values: pa.Array, split: str, splits: dict[str, None]) -> pa.Array:
    """The rows of a split; some names of splits are collected for a message."""
    names = values.cast(pa.string())
    if len(splits) < 20:
        splits.update(dict.fromkeys(str(name) for name in pc.unique(names).to_pylist()))
    return pc.equal(names, split)


def media_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if is_media(field.type)]


def _form(type: pa.DataType) -> Form | None:
    if _is_text(type) or (types.is_dictionary(type) and _is_text(type.value_type)):
        return "path"
    if _is_binary(type):
        return "bytes"
    if is_media(type):
        return "file"
    if _is_numbers(type):
        return "array"
    names = {field.name for field in type} if types.is_struct(type) else set()
    return "waveform" if {"array", "sampling_rate"} <= names and _is_numbers(type.field("array").type) else None


def _is_text(type: pa.DataType) -> bool:
    return types.is_string(type) or types.is_large_string(type) or types.is_string_view(type)


def _is_binary(type: pa.DataType) -> bool:
    return types.is_binary(type) or types.is_large_binary(type) or types.is_binary_view(type)


def _is_list(type: pa.DataType) -> bool:
    return types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type)


def _is_numbers(type: pa.DataType) -> bool:
    """`[N]` or `[C, N]`."""
    if _is_list(type) and _is_list(type.value_type):
        type = type.value_type
    return _is_list(type) and (types.is_floating(type.value_type) or types.is_integer(type.value_type))
