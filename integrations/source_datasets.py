"""Hugging Face datasets: an object, a folder of `save_to_disk`, or a name on the hub.

Nothing is decoded here (`datasets` would want torchcodec): the audio column is cast to `Audio(decode=False)` before
anything looks at it, and clips are handed on as the bytes or paths that stand in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pyarrow as pa
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    config,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from huggingface_hub.constants import HF_HUB_CACHE

from audiotok.errors import AudioFileNotFoundError, AudioInputError, OptionError
from audiotok.integrations.source_columns import AudioColumn, as_ids, has_path, media_columns
from audiotok.integrations.source_paths import AudioPaths, Place
from audiotok.integrations.source_storage import LocalFiles, reading
from audiotok.integrations.sources import (
    BATCH_CLIPS,
    LEGAL_KINDS,
    Source,
    SourceOptions,
    choose_columns,
    clip_batch,
    described,
    find_audio_column,
    find_id_column,
    no_audio_column,
    no_clips,
)


class DatasetSource(Source):
    """Rows of a `datasets.Dataset`; a locator is the number of the row.

    Without a column for ids, a clip's id is its path as written; where recordings are inside and the first one has
    no path, the number of the row.

    Args:
        name: what messages call the dataset.
        facts: for `describe`.
        paths: opens recordings that are not inside.
    """

    kind = "dataset"

    def __init__(
        self, dataset: Dataset, name: str, facts: dict[str, Any], paths: AudioPaths, options: SourceOptions
    ) -> None:
        self._name, self._facts, self._paths, self._options = name, facts, paths, options
        self._num_rows = dataset.num_rows
        if not self._num_rows:
            raise no_clips(name, options, ())
        column = _audio_column(dataset, name, options)
        if isinstance(dataset.features[column], Audio):
            dataset = dataset.cast_column(column, Audio(decode=False))
        schema = dataset.features.arrow_schema
        self._audio = AudioColumn.find(column, schema, name)
        self._recordings = dataset.select_columns(self._audio.columns).with_format("arrow")
        self._id, self._ids = self._find_ids(dataset, schema)
        passed = choose_columns(dataset.column_names, options, name, (self._id, column), media_columns(schema))
        self._columns = dataset.select_columns(passed).with_format("arrow") if passed else None
        self.schema = pa.schema([(name, schema.field(name).type) for name in passed])
        features = {name: dataset.features[name] for name in passed}
        self._labels = {name: label.names for name, label in features.items() if isinstance(label, ClassLabel)}

    def batches(self) -> Iterator[pa.RecordBatch]:
        for first in range(0, self._num_rows, BATCH_CLIPS):
            rows = range(first, min(first + BATCH_CLIPS, self._num_rows))
            locators = pa.array(rows, pa.int64())
            ids = locators.cast(pa.string())
            if self._ids is not None:
                (name,), (values,) = self._ids.column_names, _arrays(self._ids, rows)
                ids = as_ids(values, name, lambda index, rows=rows: self.where(rows[index]))
            columns = [] if self._columns is None else _arrays(self._columns, rows)
            columns = [column.cast(field.type) for column, field in zip(columns, self.schema, strict=True)]
            yield clip_batch(ids, locators, columns, self.schema)

    def open(self, locator: int) -> Any:
        row = int(locator)
        if not 0 <= row < self._num_rows:
            raise AudioInputError(f"{self.where(row)} does not exist: there are {self._num_rows} rows.")
        return self._audio.open(self._recordings[row], 0, self._paths, self.where(row))

    def where(self, locator: int) -> str:
        return f"row {locator} of {self._name}"

    def describe(self) -> dict[str, Any]:
        chosen = self._options.chosen() | {"audio_column": self._audio.name, "id_column": self._id}
        labels = {"labels": self._labels} if self._labels else {}
        return {"kind": self.kind, **self._facts, **chosen, "columns": described(self.schema), **labels}

    def _find_ids(self, dataset: Dataset, schema: pa.Schema) -> tuple[str | None, Dataset | None]:
        """The name of the column with ids or paths, and a dataset of it alone; Nones for the numbers of the rows."""
        audio, has_paths = self._audio.name, has_path(schema.field(self._audio.name).type)
        column = find_id_column(dataset.column_names, self._options, self._name)
        if column is None and self._audio.form == "path":
            column = audio
        if column is not None and not (column == audio and has_paths):
            return column, dataset.select_columns([column]).with_format("arrow")
        if not has_paths:
            return None, None
        files = dataset.select_columns([audio]).flatten()
        paths = files.select_columns([f"{audio}.path"]).with_format("arrow")  # the bytes beside it stay unread
        if column is None and not paths[0].column(0)[0].as_py():
            return None, None
        return audio, paths


def _arrays(dataset: Dataset, rows: range) -> list[pa.Array]:
    """Some rows of a dataset with the format "arrow", column by column."""
    table = cast(pa.Table, dataset[rows.start : rows.stop])
    return [column.combine_chunks() for column in table.columns]


def open_dataset(source: Any, options: SourceOptions) -> DatasetSource:
    """A `Dataset`, or the split of a `DatasetDict`; it may name files anywhere, as it may for `datasets`.

    Raises:
        OptionError: it is something else, or the split is missing.
    """
    dataset = _one_split(source, "the dataset", options)
    root = options.audio_root or "/"
    paths = AudioPaths(Place(LocalFiles(), os.getcwd()), root)
    facts = {"name": dataset.info.dataset_name, "split": _split_name(dataset)}
    return DatasetSource(dataset, "the dataset", facts, paths, options)


def open_saved(path: str, name: str, options: SourceOptions) -> DatasetSource:
    """A folder of `save_to_disk`."""
    with reading(name):
        saved = load_from_disk(path)
    dataset = _one_split(saved, name, options)
    facts = {"path": path, "split": _split_name(dataset)}
    return DatasetSource(dataset, name, facts, AudioPaths(Place(LocalFiles(), path), options.audio_root), options)


def open_hub(name: str, options: SourceOptions) -> DatasetSource:
    """A dataset on the hub, or in its cache.

    Raises:
        AudioFileNotFoundError: there is none of that name, or no network.
        OptionError: the split is missing, or the dataset has several configurations.
    """
    if options.split is None:
        raise OptionError(f"{name} on the hub may have several splits: name one, split=...{_legal_splits(name)}")
    try:
        dataset = load_dataset(name, split=options.split)
    except OSError as error:
        raise AudioFileNotFoundError(
            f"{name} is no path here, and no dataset of that name came from the hub ({_first_line(error)}). Offline, "
            f"only datasets that are in the cache can be opened. {LEGAL_KINDS}"
        ) from error
    except ValueError as error:
        raise OptionError(
            f"{name} with split={options.split!r} cannot be loaded ({_first_line(error)}). To choose a configuration, "
            "load it by datasets.load_dataset and give the Dataset, or give its files: hf://datasets/..."
        ) from error
    cache = Place(LocalFiles(), os.path.abspath(config.HF_DATASETS_CACHE))
    paths = AudioPaths(cache, options.audio_root, trusted=[HF_HUB_CACHE])
    facts = {"name": name, "split": options.split}
    return DatasetSource(dataset, name, facts, paths, options)


def _one_split(source: Any, name: str, options: SourceOptions) -> Dataset:
    if isinstance(source, IterableDataset | IterableDatasetDict):
        raise OptionError(
            "An IterableDataset has no rows that could be opened again: give it to tokenize_dataset, which takes it."
        )
    if isinstance(source, DatasetDict):
        if options.split not in source:
            given = "" if options.split is None else f", not {options.split!r}"
            raise OptionError(f"{name} has the splits {', '.join(map(str, source))}: choose one, split=...{given}.")
        return source[options.split]
    if not isinstance(source, Dataset):
        raise OptionError(
            f"source is a {type(source).__name__}: give a path, glob, URL, name or Dataset. {LEGAL_KINDS}"
        )
    if options.split not in (None, _split_name(source)):
        raise OptionError(
            f"split={options.split!r} cannot be chosen: {name} is one split ({_split_name(source)}). Leave it out."
        )
    return source


def _split_name(dataset: Dataset) -> str | None:
    return None if dataset.split is None else str(dataset.split)


def _audio_column(dataset: Dataset, name: str, options: SourceOptions) -> str:
    """What was asked for, else the one `Audio` feature, else a column of a usual name, else the one of files."""
    names, features = dataset.column_names, dataset.features
    sounds = [column for column in names if isinstance(features[column], Audio)]
    if options.audio_column is None and len(sounds) > 1:
        raise OptionError(f"{name} has several columns of audio: choose one, audio_column=, of {', '.join(sounds)}.")
    if options.audio_column is None and sounds:
        return sounds[0]
    media = media_columns(features.arrow_schema)
    column = find_audio_column(names, options, name) or (media[0] if len(media) == 1 else None)
    if column is None:
        raise no_audio_column(names, name)
    return column


def _legal_splits(name: str) -> str:
    """A sentence with the splits that the hub knows; empty if it cannot be asked."""
    try:
        return f" It has {', '.join(get_dataset_split_names(name))}."
    except (OSError, ValueError):
        return " Most have train."


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
