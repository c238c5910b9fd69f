"""Export `arrow`: a folder that `datasets.load_from_disk` opens, one row a document.

Columns: `id`, `piece` (where a window cuts clips), `input_ids` (`[L]`, or `[Q, S]` for 2-D layouts, in the smallest
unsigned type), `audio_length`, and those of the source. `with_format("torch")` gives int64.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from audiotok.integrations.export_ids import Counts, Documents, IdBlock

_ROWS = "rows"


def write_arrow(documents: Documents, folder: Path, shard_size: int) -> dict[str, Any]:
    """Write the files into an empty folder; what export.json says of them comes back.

    Args:
        shard_size: bytes of a file, about.

    The rows go through one file that is removed in the end: memory does not grow with the corpus.
    """
    from datasets import Dataset

    counts, writer = Counts(), None
    rows = folder / _ROWS / "all.arrow"  # in a folder of its own: datasets refuses to save beside what it reads
    rows.parent.mkdir()
    try:
        for block in documents:
            table = _table(documents, block)
            writer = writer or pa.ipc.new_stream(rows, table.schema)
            writer.write_table(table)
            counts.add(block)
    finally:
        if writer is not None:
            writer.close()
    with _no_bars():
        Dataset.from_file(str(rows)).save_to_disk(folder, max_shard_size=shard_size)
    shutil.rmtree(rows.parent)
    return asdict(counts)


def _table(documents: Documents, block: IdBlock) -> pa.Table:
    columns = dict(zip(block.columns.column_names, block.columns.columns, strict=True))
    first = {"id": columns.pop("id")}
    if documents.window is not None:
        first["piece"] = pa.array(block.pieces, pa.int32())
    ids = {"input_ids": _input_ids(documents, block), "audio_length": pa.array(block.audio_lengths)}
    return pa.table({**first, **ids, **columns})


def _input_ids(documents: Documents, block: IdBlock) -> pa.Array:
    if not documents.layout.is_2d:
        return pa.ListArray.from_arrays(pa.array(block.bounds, pa.int32()), pa.array(block.ids))
    streams = documents.layout.num_streams
    flat = np.concatenate([block.document(i).reshape(-1) for i in range(len(block))])
    steps = np.repeat(np.diff(block.bounds), streams)
    rows = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(steps)), pa.int32()), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(np.arange(len(block) + 1) * streams, pa.int32()), rows)


@contextmanager
def _no_bars() -> Generator[None]:
    """`datasets` draws bars of its own; ours are the caller's."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
