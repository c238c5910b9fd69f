"""Export `megatron`: the `.bin` and `.idx` of Megatron-LM's indexed dataset (`--data-path OUT/ids`).

    ids.bin    the ids of all sequences, one behind another, little-endian
    ids.idx    magic "MMIDIDX\\0\\0" · version 1, uint64 · dtype code, uint8 (8 = uint16, 4 = int32)
               · sequences n, uint64 · entries of the document index m, uint64
               · int32 [n] ids of each sequence · int64 [n] byte at which each begins
               · int64 [m] sequence at which each document begins, and n at the end

A clip is one of Megatron's documents; it has one sequence, or several where a window cuts it. The index is written
through files, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from audiotok.errors import OptionError
from audiotok.integrations.export_ids import Counts, Documents

PREFIX = "ids"
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPE_CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}
# Megatron-LM takes uint16 for vocabularies below this and int32 from here on (its `optimal_dtype`).
UINT16_BELOW = 65_500
_CHUNK = 1 << 20  # sequences of the index in memory at once


def write_megatron(documents: Documents, folder: Path) -> dict[str, Any]:
    """Write the files into an empty folder; what export.json says of them comes back.

    Raises:
        OptionError: the layout has two dimensions, and the format one.
    """
    check_one_dimension(documents)
    dtype = np.dtype("<u2" if documents.corpus.vocabulary.size < UINT16_BELOW else "<i4")
    counts = Counts()
    with (
        open(folder / f"{PREFIX}.bin", "wb") as data,
        tempfile.TemporaryFile(dir=folder) as lengths,
        tempfile.TemporaryFile(dir=folder) as starts,
    ):
        for block in documents:
            data.write(np.ascontiguousarray(block.ids, dtype).data)
            lengths.write(np.diff(block.bounds).astype("<i4").data)
            starts.write((counts.documents + np.flatnonzero(block.starts_clip)).astype("<i8").data)
            counts.add(block)
        starts.write(struct.pack("<q", counts.documents))
        with open(folder / f"{PREFIX}.idx", "wb") as index:
            index.write(MAGIC + struct.pack("<QBQQ", VERSION, DTYPE_CODES[dtype], counts.documents, counts.clips + 1))
            _copy(lengths, index)
            for pointers in _pointers(lengths, dtype.itemsize):
                index.write(pointers.data)
            _copy(starts, index)
    return {"dtype": dtype.str, "data_path": PREFIX, **asdict(counts)}


def check_one_dimension(documents: Documents) -> None:
    if documents.layout.is_2d:
        legal = " or ".join(name for name in documents.corpus.layout_names if not documents.corpus.layout(name).is_2d)
        raise OptionError(
            f'layout="{documents.layout.name}" has two dimensions, and Megatron\'s format one: '
            f"choose {legal}, or the format memmap."
        )


def _copy(spool: IO[bytes], index: IO[bytes]) -> None:
    spool.seek(0)
    shutil.copyfileobj(spool, index)


def _pointers(lengths: IO[bytes], itemsize: int) -> Iterator[np.ndarray]:
    """The byte at which each sequence begins, some at a time."""
    lengths.seek(0)
    end = 0
    while data := lengths.read(4 * _CHUNK):
        sizes = np.frombuffer(data, "<i4").astype("<i8") * itemsize
        ends = end + np.cumsum(sizes)
        yield ends - sizes
        end = int(ends[-1])
