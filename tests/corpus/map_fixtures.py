"""Datasets of recordings, what their codes must be, and stand-ins that real worker processes import."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import soundfile
import torch
from conformance.codecs_table import clip, new_codec, shared_codec, tokenizer_of

from audiotok.clip_rows import ClipRows
from audiotok.integrations.codec_map import CodecMap
from audiotok.tokenizer import AudioTokenizer

NUM_CLIPS = 5


def recordings(tokenizer: AudioTokenizer, count: int = NUM_CLIPS) -> list[np.ndarray]:
    """`[C, N]` of different lengths, for a codec."""
    facts = tokenizer.codec.facts
    return [clip(facts, 31 * facts.hop_length // 2 + 77 * i, seed=i) for i in range(count)]


def wav(samples: np.ndarray, sampling_rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.T, sampling_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def audio_cells(tokenizer: AudioTokenizer, count: int = NUM_CLIPS) -> list[dict[str, Any]]:
    """As the feature `Audio` stores them."""
    rate = tokenizer.codec.facts.sampling_rate
    return [{"bytes": wav(samples, rate), "path": None} for samples in recordings(tokenizer, count)]


def dataset_of(tokenizer: AudioTokenizer, count: int = NUM_CLIPS, decode: bool = True) -> datasets.Dataset:
    """Columns `key`, `text` and `audio`."""
    columns = {
        "key": [f"utt-{i}" for i in range(count)],
        "text": [f"text {i}" for i in range(count)],
        "audio": audio_cells(tokenizer, count),
    }
    return datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=decode))


def expected_rows(tokenizer: AudioTokenizer, sources: list[Any], **options: Any) -> list[dict[str, Any]]:
    """Rows of a corpus, clip by clip through `tokenizer.encoder().encode`, as Python objects."""
    rows = ClipRows(tokenizer)
    encoded = [rows.row("", one) for one in tokenizer.encoder(**options).encode(sources)]
    found = pa.Table.from_pylist(encoded, rows.schema).to_pylist()
    return [{name: value for name, value in row.items() if name != "id"} for row in found]


def new_columns(dataset: Any, *kept: str) -> list[dict[str, Any]]:
    """Rows without the columns that were there before, as Python objects."""
    dropped = {"key", "text", "audio", *kept}
    return [{name: plain(value) for name, value in row.items() if name not in dropped} for row in dataset]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def saved(folder: Path, name: str = "vrvq", noise: float = 0.0) -> Path:
    """The folder of a saved tokenizer; with `noise`, of one with other weights and codes."""
    codec, drawn = new_codec(name), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=drawn))
    tokenizer_of(codec).save_pretrained(folder)
    return folder


def tiny(name: str) -> AudioTokenizer:
    return tokenizer_of(shared_codec(name))


class Decoder:
    """What of a torchcodec `AudioDecoder` audiotok looks at."""

    def __init__(self, samples: np.ndarray, sample_rate: int) -> None:
        self._samples = SimpleNamespace(data=torch.from_numpy(samples), sample_rate=sample_rate)

    def get_all_samples(self) -> SimpleNamespace:
        return self._samples


class Telling(CodecMap):
    """Adds who encoded a row: process, rank, threads and how often it loaded the model."""

    num_loaded = 0

    def __call__(self, batch: Any, *position: Any) -> Any:
        columns = super().__call__(batch, *position)
        rank = next(value for value in position if not isinstance(value, list))
        told = (os.getpid(), rank, torch.get_num_threads(), type(self).num_loaded)
        return columns | {"told": [list(told)] * len(columns["num_frames"])}

    def _load(self, rank: int | None) -> AudioTokenizer:
        type(self).num_loaded += 1
        return super()._load(rank)


def dying(marker: str) -> Any:
    """A `RayTokenizer` that ends its process, once, in the middle of the batch with the clip utt-3."""
    from audiotok.integrations.ray_data import RayTokenizer

    class Dying(RayTokenizer):
        def __call__(self, table: pa.Table) -> pa.Table:
            rows = super().__call__(table)
            if "utt-3" in rows["id"].to_pylist() and not os.path.exists(marker):
                Path(marker).touch()
                os._exit(1)
            return rows

    return Dying
