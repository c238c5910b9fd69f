"""Codes or ids as new columns of Hugging Face datasets.

    coded = tokenize_dataset(dataset, "audiotok/auv-mini", num_proc=8)

They are the codes that `tokenizer.encoder().encode` gives; `audiotok.integrations.codec_map` is how. The cache of `map`
serves a second call. It keeps nothing of a run that was killed: `audiotok tokenize` resumes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import multiprocess
import torch
from datasets import Audio, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict

from audiotok.errors import AudioInputError, OptionError, did_you_mean
from audiotok.integrations.codec_map import CUDA_WAS_IN_USE, WHERE, CodecMap, find_audio, torch_device
from audiotok.tokenizer import AudioTokenizer

OneDataset = Dataset | IterableDataset
AnyDataset = OneDataset | DatasetDict | IterableDatasetDict

BATCH_ROWS = 64  # of `datasets`' own thousand, the recordings alone would fill the memory


def tokenize_dataset(
    dataset: AnyDataset,
    tokenizer: str | os.PathLike[str] | AudioTokenizer,
    *,
    audio_column: str | None = None,
    columns: Sequence[str] | None = None,
    num_proc: int | None = None,
    batch_size: int = BATCH_ROWS,
    **options: Any,
) -> AnyDataset:
    """A dataset with columns of codes or ids, in place of its recordings.

    Args:
        dataset: a `Dataset` or `IterableDataset`, or a dict of them. Columns of the feature `Audio` are never decoded
            by `datasets`, so torchcodec is not needed; an `IterableDataset` is cast to `Audio(decode=False)` for it.
        tokenizer, options: as in `CodecMap`.
        audio_column: None takes the one column of the feature `Audio`, else as in `CodecMap`.
        columns: of the dataset that stay as they are; None for all but the recordings.
        num_proc: processes, of a `Dataset`; None for this one. On a CPU best as many as cores. An `IterableDataset`
            is tokenized while it is read, by the workers of a DataLoader.
        batch_size: rows that are in memory at once. Codes do not depend on it, but the cache does.

    Returns:
        The same kind of dataset; its rows are those of `dataset`, in order, and its format is reset.

    Raises:
        OptionError, CheckpointError: as `CodecMap`; a column is missing or would be overwritten; CUDA would be forked.
        AudioInputError: a subclass, of the first recording that failed, with on_error="raise".
    """
    splits = dataset if isinstance(dataset, DatasetDict | IterableDatasetDict) else {"": dataset}
    if not splits:
        raise OptionError(f"The {type(dataset).__name__} has no splits: there is nothing to tokenize.")
    codes = CodecMap(tokenizer, audio_column=_audio_column(next(iter(splits.values())), audio_column), **options)
    if num_proc is not None and torch_device(codes.device).type == "cuda" and torch.cuda.is_initialized():
        if (multiprocess.get_start_method(allow_none=True) or multiprocess.get_all_start_methods()[0]) == "fork":
            raise OptionError(CUDA_WAS_IN_USE)
    how = {"batched": True, "batch_size": batch_size, "with_indices": True}
    mapped = {name: _map(split, codes, columns, num_proc, how) for name, split in splits.items()}
    return mapped[""] if splits is not dataset else type(dataset)(mapped)


def _map(
    dataset: OneDataset, codes: CodecMap, columns: Sequence[str] | None, num_proc: int | None, how: dict[str, Any]
) -> OneDataset:
    """One split."""
    names, known = _column_names(dataset), dataset.features
    audio = find_audio(names, None, codes.audio_column)
    kept = _kept_columns(names, audio, columns, codes.schema.names)
    features = None if known is None else Features({name: known[name] for name in kept} | codes.features)
    how = how | {"remove_columns": [name for name in names if name not in kept], "features": features}
    if isinstance(dataset, IterableDataset):
        if known is not None and isinstance(known[audio], Audio):
            dataset = dataset.cast_column(audio, Audio(decode=False))
        return dataset.map(codes, **how)
    if not dataset.num_rows:  # map would return it as it is
        return Dataset.from_dict({name: [] for name in features}, features, split=dataset.split)
    return dataset.with_format(None).map(codes, with_rank=True, num_proc=num_proc, desc="tokenizing", **how)


def _audio_column(dataset: OneDataset, audio_column: str | None) -> str:
    """The column asked for, else the one of the feature `Audio`, else as a `CodecMap` finds it."""
    features = dataset.features or Features()
    sounds = [name for name, feature in features.items() if isinstance(feature, Audio)]
    if audio_column is None and len(sounds) > 1:
        raise OptionError(f"{WHERE} has several columns of audio: choose one, audio_column=, of {', '.join(sounds)}.")
    audio_column = sounds[0] if audio_column is None and sounds else audio_column
    return find_audio(_column_names(dataset), features.arrow_schema, audio_column)


def _column_names(dataset: OneDataset) -> list[str]:
    """Those of a stream that does not say are read from its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise AudioInputError("The IterableDataset has no rows, and says nothing of its columns: give one that does.")
    return list(first)


def _kept_columns(names: list[str], audio: str, columns: Sequence[str] | None, written: list[str]) -> list[str]:
    """Those asked for, else all but the recordings; never one that would be overwritten."""
    if isinstance(columns, str):
        raise OptionError(f"columns={columns!r} is not legal: give a list of names, [{columns!r}].")
    chosen = [name for name in names if name != audio] if columns is None else list(columns)
    for name in chosen:
        if name not in names:
            hint = did_you_mean(name, names)
            raise OptionError(f'columns: {WHERE} has no column "{name}": choose among {", ".join(names)}.{hint}')
    if clash := [name for name in chosen if name in written]:
        rest = [name for name in chosen if name not in clash]
        raise OptionError(
            f'The dataset has the column "{clash[0]}", which would be overwritten: rename it, or leave it out, '
            f"columns={rest!r}."
        )
    return chosen
