"""A function for `map` of Hugging Face datasets, and for actors: batches of recordings → codes or ids.

    codes = CodecMap("audiotok/auv-mini")
    coded = dataset.map(codes, batched=True, batch_size=64, with_rank=True, num_proc=8, remove_columns=["audio"])

Recordings are read by libsndfile and resampled by soxr, as everywhere in audiotok, whether torchcodec is installed or
not: a column of the feature `Audio` is read as it is stored, and what its `sampling_rate` asks for is of no effect.

`Dataset.map` keeps what it made under a hash of its function. That of a `CodecMap` holds the tokenizer's fingerprint,
all options, and the versions of what makes samples and codes: equal in every process, and taken without the model.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import multiprocess
import numpy as np
import pyarrow as pa
import soundfile
import torch
from datasets import Features
from datasets.formatting.formatting import LazyBatch, LazyRow

from audiotok.audio import Downmix
from audiotok.auto import AutoAudioTokenizer
from audiotok.clip_rows import ClipRows
from audiotok.errors import AudioInputError, AudioTokError, CheckpointError, OptionError, check_choice
from audiotok.integrations.corpus_pipeline import Done, Pipeline, batch_seconds_of, num_workers_of
from audiotok.integrations.corpus_record import Filters
from audiotok.integrations.source_columns import RATE_COLUMNS, AudioColumn, media_columns
from audiotok.integrations.source_paths import AudioPaths, Place
from audiotok.integrations.source_storage import LocalFiles
from audiotok.integrations.sources import SourceOptions, find_audio_column, find_id_column, no_audio_column
from audiotok.tokenizer import AudioTokenizer

ERROR = "error"
WHERE, RECORDING = "the dataset", "the recording"  # in messages
CUDA_WAS_IN_USE = (
    "CUDA was in use in this process before the workers of map were forked from it, and a forked process cannot use "
    'it: load the tokenizer on the CPU, or by its name; or call multiprocess.set_start_method("spawn") first; or '
    'leave num_proc out; or encode on the CPU, device="cpu".'
)
logger = logging.getLogger(__name__)


# The same tokenizer in every process


@dataclass(frozen=True)
class TokenizerSpec:
    """How any process makes the same tokenizer.

    Attributes:
        name: a bundled name, an absolute folder or a hub repository.
        layout, dtype, options: that it is loaded with.
        fingerprint: that it then has.
        files: file → bytes, as `save_pretrained` writes them, of a tokenizer that no name leads to, such as one that
            was trained in this process: it travels with its weights, and leaves nothing behind. Else none.
    """

    name: str
    layout: str
    dtype: str
    options: dict[str, Any]
    fingerprint: str
    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def named(cls, tokenizer: AudioTokenizer, name: str | os.PathLike[str]) -> TokenizerSpec:
        """Of a tokenizer that was loaded by this name."""
        place = os.path.abspath(name) if os.path.isdir(name) else os.fspath(name)  # workers may stand elsewhere
        dtype = str(tokenizer.codec.dtype).removeprefix("torch.")
        options = dict(sorted(tokenizer.options.items()))
        return cls(place, tokenizer.layout.name, dtype, options, tokenizer.fingerprint)

    @classmethod
    def of(cls, tokenizer: AudioTokenizer) -> TokenizerSpec:
        """Of any tokenizer. It is loaded once more by its name, to see whether that leads to it."""
        spec = cls.named(tokenizer, tokenizer.name_or_path)
        try:
            spec.load()
        except (AudioTokError, OSError):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                return replace(spec, files={path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())})
        return spec

    def load(self, device: str | None = None) -> AudioTokenizer:
        """
        Raises:
            CheckpointError: there is none, or by now another one.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, data in self.files.items():
                (Path(folder) / name).write_bytes(data)
            place = folder if self.files else self.name
            tokenizer = AutoAudioTokenizer.from_pretrained(
                place, layout=self.layout, dtype=self.dtype, device=device, **self.options
            )
        self.check(tokenizer)
        return tokenizer

    def check(self, tokenizer: AudioTokenizer) -> None:
        """Raise `CheckpointError` unless the tokenizer is, by now, the one that this is the spec of."""
        if (found := tokenizer.fingerprint) != self.fingerprint:
            raise CheckpointError(
                f"{self.name or 'The tokenizer'} has the fingerprint {found[:12]}... now and had "
                f"{self.fingerprint[:12]}... when the map was made: it was changed meanwhile. Make the map again."
            )


# The recordings of a batch


@dataclass(frozen=True)
class Recordings:
    """What a `Pipeline` needs of a source, for one batch: a locator is a row's place, `names` are for messages."""

    names: list[str]
    _open: Callable[[int], Any]

    @classmethod
    def of_table(cls, table: pa.Table, audio_column: str, names: list[str], paths: AudioPaths) -> Recordings:
        """As they are stored: nothing is decoded, and arrays do not become lists."""
        column = AudioColumn.find(audio_column, table.schema, WHERE)
        return cls(names, lambda row: column.open(table, row, paths, RECORDING))

    @classmethod
    def of_values(cls, batch: Mapping[str, Any], audio_column: str, names: list[str], paths: AudioPaths) -> Recordings:
        """As Python objects: paths, bytes, arrays, dicts of these, decoders of torchcodec."""
        values = batch[audio_column]
        rates = next((batch[name] for name in RATE_COLUMNS if name in batch), None)

        def open_value(row: int) -> Any:
            value, rate = values[row], None if rates is None else rates[row]
            if isinstance(value, Mapping):
                rate = value.get("sampling_rate", rate)
                value = next((value[key] for key in ("array", "bytes", "path") if value.get(key) is not None), None)
            if value is None:
                raise AudioInputError(f'The column "{audio_column}" is null: there is no audio.')
            if isinstance(value, str):
                return paths.open(value, RECORDING)
            if rate is not None and isinstance(value, np.ndarray | torch.Tensor | list):
                return {"array": value, "sampling_rate": rate}
            return value

        return cls(names, open_value)

    def open(self, locator: int) -> Any:
        return self._open(locator)

    def where(self, locator: int) -> str:
        return self.names[locator]


def any_path(audio_root: str | None) -> AudioPaths:
    """Opens paths of this machine, relative ones below `audio_root` or here; URLs below `audio_root` alone."""
    return AudioPaths(Place(LocalFiles(), os.getcwd()), audio_root or "/")


# Batches → codes


class _Ready(NamedTuple):
    """A tokenizer at work in this process."""

    tokenizer: AudioTokenizer
    rows: ClipRows
    pipeline: Pipeline
    paths: AudioPaths


class CodecMap:
    """A function for `map(..., batched=True)`: batches of recordings → new columns.

    It pickles as a `TokenizerSpec` and options: each worker loads the model at its first batch, on the GPU of its rank
    (without `with_rank=True`, all on one), or on a CPU, for one thread.

    Args:
        tokenizer: a name, folder or repository as `AutoAudioTokenizer.from_pretrained` takes it; or a tokenizer. One
            that no name leads to travels with its weights, which is slower: save it first.
        audio_column: None takes the first of audio, path, ... that exists, else the one column of files. A cell is a
            path, bytes, a struct or dict {bytes, path} or {array, sampling_rate}, an array with the rate in a column
            `sampling_rate`, or a decoder of torchcodec.
        id_column: names rows in messages; None takes the first of id, key, utt_id, ... that exists.
        output: "codes" gives `codes` (frame by frame, coarse to fine) and, of codecs of variable depth, `depths`;
            "input_ids" gives `input_ids` (`[Q, L]` for 2-D layouts) and an `attention_mask` of ones. Then both give
            num_frames, audio_length (samples at the codec's rate) and duration (seconds).
        layout: of ids; None for the tokenizer's.
        certify: encode the clips of a batch that hold a near-tie again alone.
        on_error: what becomes of a recording that cannot be encoded. "raise" ends the map with an error that names
            the row. "null" keeps the row, with nulls and the reason in a column `error`, null elsewhere; give the map
            `features=`, since types cannot be read from nulls.
        downmix: as in `load_audio`.
        device: "cpu", or "cuda" for GPU number rank modulo GPUs, or one GPU; None for a given tokenizer's kind, and
            for a name for GPUs where there are any.
        batch_seconds: of audio, padding included, encoded at once; None is one clip on a CPU and 240 s on a GPU.
        filters: recordings that are left out, as if they had failed; with on_error="null" only.
        audio_root: folder or URL that relative paths are below; URLs are read below it alone.
        options: the codec's own, and windows, as for `AudioTokenizer.__call__`.

    Raises:
        OptionError: an argument is not legal.
        CheckpointError: the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        tokenizer: str | os.PathLike[str] | AudioTokenizer,
        *,
        audio_column: str | None = None,
        id_column: str | None = None,
        output: Literal["codes", "input_ids"] = "codes",
        layout: str | None = None,
        certify: bool = True,
        on_error: Literal["raise", "null"] = "raise",
        downmix: Downmix = None,
        device: str | None = None,
        batch_seconds: float | None = None,
        filters: Filters | None = None,
        audio_root: str | None = None,
        **options: Any,
    ) -> None:
        check_choice("output", output, ("codes", "input_ids"))
        check_choice("on_error", on_error, ("raise", "null"))
        if batch_seconds is not None and not batch_seconds > 0:
            raise OptionError(f"batch_seconds={batch_seconds!r} is not legal: a number above 0, or None.")
        if filters is not None and on_error == "raise":
            raise OptionError('filters= leaves recordings out, and so needs on_error="null", which keeps their rows.')
        if isinstance(tokenizer, str | os.PathLike):
            name, tokenizer = tokenizer, AutoAudioTokenizer.from_pretrained(tokenizer, layout=layout)
            self.spec = TokenizerSpec.named(tokenizer, name)
            self.device = device or ("cuda" if torch.cuda.device_count() else "cpu")
        else:
            tokenizer = tokenizer if layout is None else tokenizer.with_layout(layout)
            self.spec = TokenizerSpec.of(tokenizer)
            self.device = device or tokenizer.codec.device.type
        tokenizer.encoder(**options)  # says now which option is not legal
        asked, here = torch_device(self.device), tokenizer.codec.device
        self.audio_column, self.id_column, self.output = audio_column, id_column, output
        self.certify, self.on_error, self.downmix = certify, on_error, downmix
        self.batch_seconds, self.filters, self.audio_root = batch_seconds, filters or Filters(), audio_root
        self.options = dict(sorted(options.items()))
        # What may move a sample or a code, beside the tokenizer: the audio decoder, the resampler, the kernels.
        self.versions = {name: importlib.metadata.version(name) for name in ("soxr", "soundfile", "torch")}
        self.versions["libsndfile"] = soundfile.__libsndfile_version__
        self.schema = self._schema(tokenizer)
        self._tokenizer = tokenizer if asked.type == here.type and asked.index in (None, here.index) else None
        self._ready: _Ready | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What decides the columns, and nothing else: `datasets` hashes it."""
        return vars(self) | {"_ready": None, "_tokenizer": None}

    def __call__(self, batch: Any, *position: Any) -> Any:
        """
        Args:
            batch: a table of Arrow, which comes back with the new columns behind its own; or a mapping of columns,
                for which a dict of the new ones comes back.
            position: what `with_indices` and `with_rank` add.
        """
        indices = next((value for value in position if isinstance(value, list)), None)
        rank = next((value for value in position if isinstance(value, int)), None)
        self._prepare(rank)
        columns = self.columns(self.encode(self._recordings(batch, indices)))
        if not isinstance(batch, pa.Table):
            return columns
        for column in self.schema:
            batch = batch.append_column(column, pa.array(columns[column.name], column.type))
        return batch

    @property
    def tokenizer(self) -> AudioTokenizer:
        """The one at work in this process."""
        return self._prepare().tokenizer

    @property
    def features(self) -> Features:
        """Of the new columns: `map(..., features=Features({**kept, **codes.features}))` fixes their types."""
        return Features.from_arrow_schema(self.schema)

    def encode(self, recordings: Recordings) -> list[Done]:
        """What became of each recording, in order.

        Raises:
            AudioInputError: a subclass, that names the row, of the first that failed, with on_error="raise".
        """
        pipeline = self._prepare().pipeline
        pipeline.source = recordings
        clips = [{"id": name, "locator": row} for row, name in enumerate(recordings.names)]
        found: dict[int, Done] = {}
        for done in pipeline.run(clips):
            if done.failure is not None and self.on_error == "raise":
                kind = type(done.error) if isinstance(done.error, AudioTokError) else AudioInputError
                raise kind(f"{done.failure.source}: {done.failure.reason}") from done.error
            found[done.clip["locator"]] = done
        failures = [done.failure for done in found.values() if done.failure is not None]
        if failures:
            logger.warning("%d of %d recordings failed; one of them: %s", len(failures), len(clips), failures[0])
        return [found[row] for row in range(len(clips))]

    def columns(self, done: Sequence[Done]) -> dict[str, list[Any]]:
        """Columns of `schema`."""
        rows = [self._row(one) for one in done]
        return {name: [row.get(name) for row in rows] for name in self.schema.names}

    def _row(self, done: Done) -> dict[str, Any]:
        if done.failure is not None:
            return {ERROR: f"{done.failure.error}: {done.failure.reason}"}
        clip: Any = done.codes
        row = self._prepare().rows.row(done.clip["id"], clip)
        if self.output == "input_ids":
            ids = self.tokenizer.codes_to_ids(clip.codes, clip.depths).astype(np.int32)
            row |= {"input_ids": ids, "attention_mask": np.ones(ids.shape[-1], np.int8)}
        return row

    def _schema(self, tokenizer: AudioTokenizer) -> pa.Schema:
        """The new columns; types are fixed, so that none depends on the first batch."""
        fields = list(ClipRows(tokenizer).schema)[1:]  # all but the id
        if self.output == "input_ids":
            ids = pa.list_(pa.int32())
            ids = pa.list_(ids) if tokenizer.layout.is_2d else ids
            fields = [one for one in fields if one.name not in ("codes", "depths")]
            fields = [pa.field("input_ids", ids), pa.field("attention_mask", pa.list_(pa.int8())), *fields]
        return pa.schema([*fields, (ERROR, pa.string())] if self.on_error == "null" else fields)

    def _recordings(self, batch: Any, indices: list[int] | None) -> Recordings:
        table = batch.pa_table if isinstance(batch, LazyBatch) else batch if isinstance(batch, pa.Table) else None
        names = list(batch) if table is None else table.column_names
        audio = find_audio(names, None if table is None else table.schema, self.audio_column)
        if isinstance(batch, LazyRow) or (table is None and isinstance(batch[audio], str | bytes | Mapping)):
            raise OptionError("A CodecMap takes batches: say batched=True to map.")
        id_column = find_id_column(names, SourceOptions(id_column=self.id_column), WHERE)
        count = len(batch[audio] if table is None else table)
        rows = [f"row {row} of a batch of {count}" for row in range(count)]
        rows = rows if indices is None else [f"row {index}" for index in indices]
        if id_column is not None:
            rows = [f"{row} (id {one})" for row, one in zip(rows, batch[id_column], strict=True)]
        make = Recordings.of_values if table is None else Recordings.of_table
        return make(batch if table is None else table, audio, rows, self._prepare().paths)

    def _prepare(self, rank: int | None = None) -> _Ready:
        """Load what works in this process, once."""
        if self._ready is None:
            tokenizer = self._load(rank)
            source, device = cast(Any, None), tokenizer.codec.device  # each batch brings its source
            seconds = batch_seconds_of(device, self.batch_seconds)
            encoder = tokenizer.encoder(None if seconds else 1, self.certify, **self.options)
            pipeline = Pipeline(source, encoder, self.filters, self.downmix, seconds, num_workers_of(device))
            self._ready = _Ready(tokenizer, ClipRows(tokenizer), pipeline, any_path(self.audio_root))
        return self._ready

    def _load(self, rank: int | None) -> AudioTokenizer:
        if self._tokenizer is not None:
            self.spec.check(self._tokenizer)
            return self._tokenizer
        kind = torch_device(self.device).type
        if kind == "cuda":
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:  # torch says so in this way alone
                raise OptionError(CUDA_WAS_IN_USE if "fork" in str(error) else f"{error}: choose the CPU.") from error
        if kind == "cpu" and multiprocess.parent_process() is not None:
            torch.set_num_threads(1)  # one process a core
        gpu = (rank or 0) % max(1, torch.cuda.device_count()) if kind == "cuda" else 0
        return self.spec.load(f"cuda:{gpu}" if self.device == "cuda" else self.device)


def torch_device(device: str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise OptionError(f'device={device!r} is not legal: "cpu", "cuda", or one GPU, such as "cuda:1".') from error


def find_audio(names: Sequence[str], schema: pa.Schema | None, audio_column: str | None = None) -> str:
    """The column asked for, else one of a usual name, else the one column of files."""
    media = [] if schema is None else media_columns(schema)
    column = find_audio_column(names, SourceOptions(audio_column), WHERE) or (media[0] if len(media) == 1 else None)
    if column is None:
        raise no_audio_column(names, WHERE)
    return column
