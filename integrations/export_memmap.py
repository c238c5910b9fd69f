"""Export `memmap`: all ids in one flat file that `np.memmap` opens, and where documents begin in it.

    ids.bin        the ids, little-endian; rows of Q ids, one a step, for 2-D layouts
    offsets.npy    `[documents + 1]` int64: document i has the ids (rows) offsets[i] to offsets[i + 1]
    export.json    dtype, shape, and what they mean

`audiotok.integrations.training_windows` reads it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from audiotok.integrations.export_ids import Counts, Documents

IDS_FILE, OFFSETS_FILE = "ids.bin", "offsets.npy"


def write_memmap(documents: Documents, folder: Path) -> dict[str, Any]:
    """Write the files into an empty folder; what export.json says of them comes back."""
    dtype, end, counts = documents.dtype.newbyteorder("<"), 0, Counts()
    with open(folder / IDS_FILE, "wb") as file, GrowingArray(folder / OFFSETS_FILE) as offsets:
        offsets.append(np.zeros(1, np.int64))
        for block in documents:
            file.write(np.ascontiguousarray(block.ids, dtype).data)
            offsets.append(end + block.bounds[1:])
            end += int(block.bounds[-1])
            counts.add(block)
    shape = [end, documents.layout.num_streams] if documents.layout.is_2d else [end]
    return {"dtype": dtype.str, "shape": shape, **asdict(counts)}


class GrowingArray:
    """A .npy file of one dimension, int64, that is written piece by piece: its length is known at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._length = path, 0

    def __enter__(self) -> GrowingArray:
        self._file = open(self._path, "wb")
        self._begins = self._write_header()
        return self

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, "<i8").data)
        self._length += len(values)

    def __len__(self) -> int:
        return self._length

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                # NumPy leaves room in the header for the digits of a length that grows.
                assert self._write_header() == self._begins

    def _write_header(self) -> int:
        description = {"descr": "<i8", "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, description)
        return self._file.tell()
