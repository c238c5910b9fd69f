"""Codes of Ray datasets, on as many machines as Ray has.

    rows = tokenize_ray(dataset, "audiotok/auv-mini")              # a dataset of rows like those of a corpus
    write_ray(dataset, "audiotok/auv-mini", "s3://bucket/codes")   # a corpus, exactly once

Ray runs a batch again whose actor died. What an actor gives is a value, and an actor writes nothing, so that rows of
`tokenize_ray` are there once; where they go to another sink (`rows.write_parquet(folder, mode="overwrite")`), a batch
that is written again has the same file, and a job that is started again starts from nothing.

`write_ray` is a run of the corpus engine whose clips are encoded by Ray: the process that calls it lists the ids,
takes away those that are in the corpus, is the only one that writes, and takes each id once, whatever Ray repeats;
what was listed and does not come back is an error. So it goes on where it was killed, and its corpus is one as any
other. Codes alone come back to it: some hundred bytes for a second of audio.

Ray starts a batch again however often it kills its actor: a recording that crashes the decoder keeps a job from ending.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from audiotok.clip_rows import FrameOrder
from audiotok.encoding import ClipCodes
from audiotok.errors import AudioInputError, MissingDependencyError, OptionError
from audiotok.integrations.codec_map import ERROR, CodecMap, Recordings, any_path, find_audio
from audiotok.integrations.corpus_pipeline import Done
from audiotok.integrations.corpus_plan import id_hashes
from audiotok.integrations.corpus_record import Settings, describe_machine
from audiotok.integrations.corpus_run import CorpusRun, Outcome, Progress
from audiotok.integrations.corpus_shards import Certified, Failure
from audiotok.integrations.datasets_map import BATCH_ROWS
from audiotok.integrations.source_columns import AudioColumn, as_ids, media_columns
from audiotok.integrations.source_paths import AudioPaths
from audiotok.integrations.sources import (
    BATCH_CLIPS,
    Source,
    SourceOptions,
    choose_columns,
    clip_batch,
    described,
    find_id_column,
)
from audiotok.tokenizer import AudioTokenizer

try:
    import ray
    import ray.data
except ImportError as problem:
    raise MissingDependencyError('Ray is needed for Ray datasets: pip install "audiotok[ray]".') from problem

WHERE = "the Ray dataset"
BATCH_NOTE = "__batch"  # a column that tells the driver, with the first clip of each batch, how it was made


class RaySource(Source):
    """The clips of a Ray dataset, by their ids. They are listed here, and opened by actors only."""

    kind = "ray"

    def __init__(self, dataset: ray.data.Dataset, options: SourceOptions) -> None:
        self.dataset, self.options = dataset, options
        schema = _arrow_schema(dataset)
        self.audio = find_audio(schema.names, schema, options.audio_column)
        if not _is_tensor(schema, self.audio):
            AudioColumn.find(self.audio, schema, WHERE)  # says now what cannot be a recording
        self.id = find_id_column(schema.names, options, WHERE) or self._path_column(schema)
        media = [*media_columns(schema), *(name for name in schema.names if _is_tensor(schema, name))]
        passed = choose_columns(schema.names, options, WHERE, (self.id, self.audio), media)
        self.schema = pa.schema([schema.field(name) for name in passed])

    def batches(self) -> Iterator[pa.RecordBatch]:
        names = list(dict.fromkeys([self.id, *self.schema.names]))
        listed = self.dataset.select_columns(names)
        for table in listed.iter_batches(batch_size=BATCH_CLIPS, batch_format="pyarrow"):
            ids = ids_of(table, self.id)
            columns = [table[field.name].combine_chunks().cast(field.type) for field in self.schema]
            yield clip_batch(ids, ids, columns, self.schema)

    def open(self, locator: str) -> Any:
        raise AudioInputError(f"{self.where(locator)} is opened by Ray's actors alone.")

    def where(self, locator: str) -> str:
        return f"the clip {locator!r} of {WHERE}"

    def describe(self) -> dict[str, Any]:
        chosen = self.options.chosen() | {"audio_column": self.audio, "id_column": self.id}
        return {"kind": self.kind, **chosen, "columns": described(self.schema)}

    def _path_column(self, schema: pa.Schema) -> str:
        """Paths are ids as well. The number of a row is none: it is another one tomorrow."""
        if pa.types.is_string(schema.field(self.audio).type):
            return self.audio
        raise OptionError(
            f"{WHERE} has no column of ids, by which a clip is told from another however often Ray repeats it: add "
            f"one, or name it, id_column=..., out of {', '.join(schema.names)}."
        )


def _arrow_schema(dataset: ray.data.Dataset) -> pa.Schema:
    schema = dataset.schema()
    base = None if schema is None else schema.base_schema
    if not isinstance(base, pa.Schema):
        raise OptionError(
            f"{WHERE} has {'no rows' if schema is None else 'blocks that are no Arrow tables'}: give one of Arrow "
            'tables, dataset.map_batches(lambda table: table, batch_format="pyarrow").'
        )
    return base


def _is_tensor(schema: pa.Schema, name: str) -> bool:
    """Whether a column holds arrays as Ray does."""
    return isinstance(schema.field(name).type, pa.ExtensionType)


def ids_of(table: pa.Table, column: str) -> pa.Array:
    """
    Raises:
        AudioInputError: one is null or empty.
    """
    return as_ids(table[column].combine_chunks(), column, lambda row: f"row {row} of a batch of {WHERE}")


class RayTokenizer:
    """An actor for `map_batches(RayTokenizer, ..., batch_format="pyarrow")`: recordings → rows of a corpus.

    The rows are `id`, the columns of `codes.schema`, and those that pass through.

    Args:
        codes: what encodes; it pickles without its model, which the actor loads at its first batch.
        audio_column, id_column, columns: of the tables that come in.
        paths: opens recordings that are not inside.
        only: of an array `[N]` uint64, sorted: hashes of the ids that are wanted; None for all. (One that is no id's
            own lets a clip through that nobody wants, and never keeps one back.)
        note: add the column `BATCH_NOTE`.
    """

    def __init__(
        self,
        codes: CodecMap,
        audio_column: str,
        id_column: str,
        columns: Sequence[str],
        paths: AudioPaths,
        only: ray.ObjectRef | None = None,
        note: bool = False,
    ) -> None:
        self.codes, self.audio_column, self.id_column, self.columns = codes, audio_column, id_column, list(columns)
        self.paths, self.note = paths, note
        self.only: np.ndarray | None = None if only is None else ray.get(only)

    def __call__(self, table: pa.Table) -> pa.Table:
        if self.only is not None:
            table = table.filter(pa.array(_is_in(id_hashes(ids_of(table, self.id_column).to_pylist()), self.only)))
        ids = ids_of(table, self.id_column)
        done = self.codes.encode(self._recordings(table, ids.to_pylist()))
        columns, schema = self.codes.columns(done), self.codes.schema
        made = {"id": ids} | {field.name: pa.array(columns[field.name], field.type) for field in schema}
        made |= {name: table[name] for name in self.columns}
        if self.note:
            made[BATCH_NOTE] = pa.array(self._notes(done), pa.string())
        return pa.table(made)

    def _recordings(self, table: pa.Table, ids: list[str]) -> Recordings:
        names = [f"the clip {one!r} of {WHERE}" for one in ids]
        if not _is_tensor(table.schema, self.audio_column):
            return Recordings.of_table(table, self.audio_column, names, self.paths)
        values = {name: table[name].to_pylist() for name in table.column_names if name not in self.columns}
        return Recordings.of_values(values, self.audio_column, names, self.paths)  # arrays, as Ray holds them

    def _notes(self, done: list[Done]) -> list[str | None]:
        """How the batch was made, told once: with its first clip that has codes."""
        notes: list[str | None] = [None] * len(done)
        encoded = [row for row, one in enumerate(done) if one.certified is not None]
        if encoded:
            certified = Certified()
            for row in encoded:
                certified.add(done[row].certified)
            codec = self.codes.tokenizer.codec
            made_with = describe_machine(str(codec.device)) | {"dtype": str(codec.dtype).removeprefix("torch.")}
            notes[encoded[0]] = json.dumps({"certified": asdict(certified), "made_with": made_with})
        return notes


def _is_in(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of them are in a sorted array."""
    places = np.searchsorted(wanted, hashes)
    return wanted[np.minimum(places, len(wanted) - 1)] == hashes if len(wanted) else np.zeros(len(hashes), bool)


def tokenize_ray(
    dataset: ray.data.Dataset,
    tokenizer: str | os.PathLike[str] | AudioTokenizer,
    *,
    audio_column: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    audio_root: str | None = None,
    num_actors: int | None = None,
    num_gpus: float = 0,
    batch_size: int = BATCH_ROWS,
    **options: Any,
) -> ray.data.Dataset:
    """A dataset of rows as in a corpus: `id`, `codes`, ..., and the columns that pass through. Nothing runs yet.

    Args:
        tokenizer, options: as in `CodecMap`; `device` follows from `num_gpus`. With on_error="raise", as it is unless
            asked for otherwise, a bad recording ends Ray's job.
        audio_column: as in `CodecMap`; arrays may be tensors of Ray, too.
        id_column: None takes the first of id, key, utt_id, ... that exists, else a column of paths.
        columns: those that pass through. None: all but id, audio and columns of media bytes.
        audio_root: folder or URL that relative paths are below; None for the folder in which this process stands.
        num_actors: that encode; None for one that becomes as many as there are CPUs or GPUs to be had.
        num_gpus: of an actor; 0 encodes on one core of a CPU.
        batch_size: rows that an actor holds at once.

    Raises:
        OptionError, CheckpointError: as in `CodecMap`; or there is no column of ids.
    """
    source = RaySource(dataset, _source_options(audio_column, id_column, columns, audio_root))
    codes = CodecMap(tokenizer, device="cuda" if num_gpus else "cpu", **options)
    return _map(source, codes, num_actors, num_gpus, batch_size)


def write_ray(
    dataset: ray.data.Dataset,
    tokenizer: str | os.PathLike[str] | AudioTokenizer,
    output: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    audio_column: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    audio_root: str | None = None,
    num_actors: int | None = None,
    num_gpus: float = 0,
    batch_size: int = BATCH_ROWS,
    batch_seconds: float | None = None,
    max_errors: int | None = None,
    retry_errors: bool = False,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Tokenize a Ray dataset into a corpus. The same call goes on where a run was killed.

    The dataset is read twice: its ids and the columns that pass through first (of Parquet, these alone), then all.

    Args:
        tokenizer: options of the codec are the tokenizer's own here, since they are part of the corpus.
        output: the corpus: a folder or a URL; of this process, who alone writes.
        settings: what decides rows: filters, downmix, certify, partitions, ...
        max_errors, retry_errors, watch: as in `CorpusRun`. A recording that fails is a line of errors.jsonl.
        batch_seconds: as in `CodecMap`; the others are those of `tokenize_ray`.

    Raises:
        OutputExistsError, OutputNotWritableError: as in `CorpusRun.run`.
        AudioInputError: two clips have one id; or clips that were listed did not come back, what did is written.
    """
    settings = settings or Settings()
    source = RaySource(dataset, _source_options(audio_column, id_column, columns, audio_root))
    codes = CodecMap(
        tokenizer,
        certify=settings.certify,
        on_error="null",
        downmix=settings.downmix,
        device="cuda" if num_gpus else "cpu",
        batch_seconds=batch_seconds,
        filters=settings.filters,
    )
    here = tokenizer if isinstance(tokenizer, AudioTokenizer) else codes.spec.load("cpu")
    run = CorpusRun(source, here, output, settings, max_errors=max_errors, retry_errors=retry_errors, watch=watch)
    pipeline = RayPipeline(source, codes, here, num_actors, num_gpus, batch_size)
    run.pipeline, run.made_with = pipeline, pipeline.made_with
    return run.run()


class RayPipeline:
    """Stands in for the `Pipeline` of a `CorpusRun`: clips are encoded by actors.

    Attributes:
        made_with: dtype, device and versions of the actor that was heard last.
    """

    def __init__(
        self,
        source: RaySource,
        codes: CodecMap,
        tokenizer: AudioTokenizer,
        num_actors: int | None,
        num_gpus: float,
        batch_size: int,
    ) -> None:
        self.source, self.codes, self._order = source, codes, FrameOrder(tokenizer)
        self._pool = (num_actors, num_gpus, batch_size)
        self.made_with: dict[str, str] = {}

    def run(self, clips: Iterable[dict[str, Any]], must_stop: Callable[[], bool] = lambda: False) -> Iterator[Done]:
        """What became of each clip, in the order in which they come back; of one that comes twice, once.

        Raises:
            AudioInputError: some did not come back.
        """
        waiting = {clip["id"]: clip["__partition"] for clip in clips}
        if not waiting:
            return
        only = ray.put(np.sort(id_hashes(waiting)))  # held here until the end: an actor that is made again needs it
        rows = _map(self.source, self.codes, *self._pool, only=only, note=True)
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in range(len(table)):
                if must_stop():
                    return
                done = self._done(table, row)
                partition = waiting.pop(done.clip["id"], None)
                if partition is not None:
                    done.clip["__partition"] = partition
                    yield done
        if waiting:
            raise AudioInputError(
                f"{len(waiting)} clips were listed and did not come back from Ray, {next(iter(waiting))!r} is one: did "
                "the dataset change, or may blocks fail (DataContext.max_errored_blocks)? What came back is written; "
                "run the same again."
            )

    def _done(self, table: pa.Table, row: int) -> Done:
        cells = table.slice(row, 1)
        clip = cells.select(["id", *self.source.schema.names]).to_pylist()[0]
        certified = self._heard(cells[BATCH_NOTE][0].as_py())
        error = cells[ERROR][0].as_py()
        if error is not None:
            name, _, reason = error.partition(": ")
            return Done(clip, failure=Failure(clip["id"], name, reason, self.source.where(clip["id"])))
        flat, num_frames = _numbers(cells, "codes"), cells["num_frames"][0].as_py()
        depths = _numbers(cells, "depths") if "depths" in cells.column_names else None
        codes, depths = self._order.restore(flat, num_frames, depths)
        return Done(clip, ClipCodes(codes, cells["audio_length"][0].as_py(), depths), certified=certified)

    def _heard(self, note: str | None) -> Certified:
        if note is None:
            return Certified()
        told = json.loads(note)
        self.made_with.update(told["made_with"])
        return Certified(**told["certified"])


def _numbers(cells: pa.Table, name: str) -> np.ndarray:
    return cells[name][0].values.to_numpy().astype(np.int64)


def _source_options(
    audio_column: str | None, id_column: str | None, columns: Sequence[str] | None, audio_root: str | None
) -> SourceOptions:
    return SourceOptions(audio_column, id_column, None if columns is None else tuple(columns), None, audio_root)


def _map(
    source: RaySource, codes: CodecMap, num_actors: int | None, num_gpus: float, batch_size: int, **more: Any
) -> ray.data.Dataset:
    available = int(ray.cluster_resources().get("GPU" if num_gpus else "CPU", 1) // (num_gpus or 1))
    least, most = num_actors or 1, num_actors or max(1, available)
    return source.dataset.map_batches(
        RayTokenizer,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
        fn_constructor_args=(codes, source.audio, source.id, source.schema.names, any_path(source.options.audio_root)),
        fn_constructor_kwargs=more,
        num_cpus=1,
        num_gpus=num_gpus or None,
    )
