"""Small corpora for tests: recordings, a tokenizer that is fast, and what a corpus holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from conformance.codecs_table import shared_codec, tokenizer_of

from audiotok.integrations.corpus_record import Settings
from audiotok.integrations.corpus_run import CorpusRun, Outcome, Share
from audiotok.integrations.sources import open_source
from audiotok.tokenizer import AudioTokenizer

SMALL = Settings(partitions=3, shard_clips=3)
NUM_CLIPS, BROKEN = 14, "clip-05.wav"


def tiny_tokenizer(name: str = "auv") -> AudioTokenizer:
    """A codec of the table of the laws."""
    return tokenizer_of(shared_codec(name))


def write_recordings(
    folder: Path, count: int = NUM_CLIPS, first: int = 0, rate: int = 16_000, channels: int = 1
) -> Path:
    """`clip-00.wav` ...: noise of different lengths; one of them is no audio."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        path = folder / f"clip-{i:02d}.wav"
        if path.name == BROKEN:
            path.write_bytes(b"RIFF, but nothing else")
        else:
            soundfile.write(path, 0.3 * rng.standard_normal((int(rng.integers(300, 3000)), channels)), rate)
    return folder


def corpus_run(source: Any, output: Any, settings: Settings = SMALL, share: Share | None = None, **options: Any):
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer()
    return CorpusRun(open_source(source), tokenizer, output, settings, share, **options)


def tokenize(source: Any, output: Any, *args: Any, **options: Any) -> Outcome:
    return corpus_run(source, output, *args, **options).run()


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """Id → row, of every shard; no id occurs twice, and a file with the name of a shard is one."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted((output / "data").glob("*")):
        for row in pq.read_table(path).to_pylist():
            assert row["id"] not in rows, f"{row['id']} is there twice"
            rows[row["id"]] = row
    return rows


def rows_as_bytes(output: Path) -> bytes:
    """All rows in the order of their ids, as Arrow lays them out: equal bytes are equal rows of equal types."""
    tables = [pq.read_table(path) for path in sorted((output / "data").glob("*.parquet"))]
    table = pa.concat_tables(tables).replace_schema_metadata(None).sort_by("id").combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def errors_of(output: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "audiotok.json").read_text())


def files_of(output: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change, to see that nothing was written."""
    stats = {path: path.stat() for path in sorted(output.rglob("*")) if path.is_file() and ".run/rank" not in str(path)}
    return {str(path.relative_to(output)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
