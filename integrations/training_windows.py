"""Windows of fixed length from a memmap export: a `Dataset` for training, shuffled without loading anything.

    windows = TrainingWindows("ids/", window=4096, seed=1)
    for epoch in range(3):
        windows.set_epoch(epoch)
        for batch in DataLoader(windows, batch_size=8, num_workers=4):
            batch["input_ids"]

Windows begin on edges of frames. The order is a permutation that is computed, not stored (a Feistel network over the
numbers of the windows), so memory does not grow with the corpus where documents are packed, and grows by 8 bytes a
document where they are kept apart. Shapes: W ids of a window (steps, for 2-D layouts), Q streams, B windows.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audiotok.errors import CodesError, OptionError, check_choice, check_number
from audiotok.integrations.export_formats import SIDECAR
from audiotok.integrations.export_memmap import IDS_FILE, OFFSETS_FILE

PACKED, APART = "packed", "apart"
_ROUNDS = 6  # of the permutation; four are known to be enough for one that looks random
_SHIFTS = tuple(map(np.uint64, (30, 27, 31)))
_FACTORS = tuple(map(np.uint64, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))


class TrainingWindows(Dataset):
    """Fixed-length windows of the ids of an export.

    Args:
        folder: that `audiotok export --format memmap` wrote.
        window: W, ids of a window; steps, for 2-D layouts.
        stride: ids from one window to the next, before they move back to the edge of a frame. None for the largest
            with which every id is in a window: W, less what a frame's edge may cost.
        documents: "packed" takes all documents as one sequence, end to end, so a window may hold the end of one and
            the start of the next; what remains behind the last window, `left_out` ids, is in none. "apart" keeps
            each window inside a document; the last of a document, where it has less than W, is filled up with pad
            ids.
        shuffle: another order every epoch; False for the order of the export.
        seed: of the order. The same on all ranks.
        epoch: of the order; see `set_epoch`.

    Items:
        `input_ids`, int64 `[W]` (`[Q, W]` for 2-D layouts); `position_ids`, int64 `[W]`, 0 where the window or a
        document begins and counting up from there, which is how attention that keeps packed documents apart wants it
        (packed); `attention_mask`, int64 `[W]`, 0 on padding (apart).

    Raises:
        OptionError: no memmap export, a window that is too small or larger than the export, an option not legal.
        CodesError: the export is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        window: int,
        stride: int | None = None,
        *,
        documents: str = PACKED,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        check_choice("documents", documents, (PACKED, APART))
        for name, value in (("window", window), ("stride", 1 if stride is None else stride)):
            check_number(name, value, 1)
        for name, value in (("seed", seed), ("epoch", epoch)):
            check_number(name, value, 0)
        self.folder, self.window, self.documents = Path(folder).absolute(), window, documents
        self.shuffle, self.seed = shuffle, seed
        # Shared memory, so that workers which outlive an epoch see the next one.
        self._epoch = torch.tensor([epoch]).share_memory_()
        self.sidecar = _read_sidecar(self.folder)
        if self.window < (frame := self.sidecar["frame_ids"]):
            raise OptionError(f"window={window} is not legal: a frame takes up to {frame} ids; give at least that.")
        self.stride = self._default_stride() if stride is None else stride
        self._ids: Any = None  # mapped at first use, in each process
        self._length = self._count()

    def set_epoch(self, epoch: int) -> None:
        """Give the windows another order. Call it before the loader's iterator is made; workers see it, too."""
        check_number("epoch", epoch, 0)
        self._epoch[0] = epoch

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    @property
    def left_out(self) -> int:
        """Ids (steps) behind the last window, which are in none."""
        if self.documents == APART:
            return 0
        self._open()
        last = self._packed_starts(np.array([self._length - 1]))[0]
        return self.sidecar["shape"][0] - int(last) - self.window

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The windows of a batch; loaders of torch call this where it is there."""
        batch = self.batch(indices)
        return [{key: values[i] for key, values in batch.items()} for i in range(len(indices))]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Windows as one tensor a key, `[B, ...]`: what a loader's collation would make of `__getitems__`."""
        numbers = np.asarray(indices, np.int64)
        numbers = np.where(numbers < 0, numbers + self._length, numbers)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self._length:
            raise IndexError(f"there are windows 0 to {self._length - 1}, not {numbers.min()} to {numbers.max()}")
        if self.shuffle:
            numbers = permuted(numbers, self._length, self.seed, self.epoch)
        self._open()
        return self._packed(numbers) if self.documents == PACKED else self._apart(numbers)

    # How many windows there are

    def _default_stride(self) -> int:
        frame = self.sidecar["frame_ids"]
        return self.window // frame * frame if self._frames_are_even else self.window - frame + 1

    @property
    def _frames_are_even(self) -> bool:
        """All frames have the same length, and nothing stands between them."""
        plain = not self.sidecar["bos"] and not self.sidecar["eos"]
        return self.sidecar["frame_begins_below"] is None and plain

    @property
    def _furthest_back(self) -> int:
        """Most ids that a window may move back, to an edge of a frame."""
        frame = self.sidecar["frame_ids"]
        return 0 if self._frames_are_even and self.stride % frame == 0 else frame - 1

    def _count(self) -> int:
        self._open()
        if self.documents == APART:
            return int(self._firsts[-1])
        total = self.sidecar["shape"][0]
        if total < self.window:
            raise OptionError(
                f"window={self.window} is not legal: {self.folder} has {total}; give at most that, or a larger export."
            )
        return (total - self.window) // self.stride + 1

    def _windows_of(self, lengths: np.ndarray) -> np.ndarray:
        """How many windows documents have apart: the last one reaches their end, wherever it moves back to."""
        reach = self.window - self._furthest_back
        more = np.minimum(-(-(lengths - reach) // self.stride), (lengths - 1) // self.stride)
        return 1 + np.where(lengths > self.window, more, 0)

    # Where they begin

    def _packed_starts(self, numbers: np.ndarray) -> np.ndarray:
        """`[B]` places among the ids."""
        places = numbers * self.stride
        return self._moved_back(places, np.searchsorted(self._offsets, places, side="right") - 1)

    def _moved_back(self, places: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Each place, or what is before it: the edge of a frame, or a special token."""
        if self._furthest_back == 0:
            return places
        if (below := self.sidecar["frame_begins_below"]) is not None:
            return np.array([self._edge_before(place, below) for place in places.tolist()], np.int64)
        first, last = self._offsets[documents], self._offsets[documents + 1] - 1
        # A window of the export may have cut the document: then it lacks one of its specials, or both.
        frames = first + (self._ids[first] == self.sidecar["bos_token_id"])
        is_end = (places == last) & (self._ids[last] == self.sidecar["eos_token_id"])
        return np.where((places < frames) | is_end, places, places - (places - frames) % self.sidecar["frame_ids"])

    def _edge_before(self, place: int, below: int) -> int:
        """Where the depth of frames varies, the ids say where they begin."""
        first = max(0, place - self._furthest_back)
        ids = self._ids[first : place + 1]
        return first + int(np.flatnonzero((ids < below) | (ids >= self.sidecar["pad_token_id"]))[-1])

    # What is in them

    def _packed(self, numbers: np.ndarray) -> dict[str, Tensor]:
        starts = self._packed_starts(numbers)
        positions = np.empty((len(starts), self.window), np.int64)
        inner = np.searchsorted(self._offsets, [starts + 1, starts + self.window])  # documents that begin inside
        for row, start, first, end in zip(positions, starts.tolist(), *inner.tolist(), strict=True):
            begins = [0, *(self._offsets[first:end] - start).tolist(), self.window]
            for begin, stop in pairwise(begins):
                row[begin:stop] = self._counting[: stop - begin]
        ids = self._rows(starts, np.full(len(starts), self.window))
        return {"input_ids": ids, "position_ids": torch.from_numpy(positions)}

    def _apart(self, numbers: np.ndarray) -> dict[str, Tensor]:
        documents = np.searchsorted(self._firsts, numbers, side="right") - 1
        firsts, ends = self._offsets[documents], self._offsets[documents + 1]
        starts = self._moved_back(firsts + (numbers - self._firsts[documents]) * self.stride, documents)
        lengths = np.minimum(ends - starts, self.window)
        mask = (self._counting < lengths[:, None]).astype(np.int64)
        return {"input_ids": self._rows(starts, lengths), "attention_mask": torch.from_numpy(mask)}

    def _rows(self, starts: np.ndarray, lengths: np.ndarray) -> Tensor:
        """`[B, W]` int64 ids, or `[B, Q, W]`, with pad ids behind those that are shorter."""
        ids = np.full((len(starts), self.window, *self.sidecar["shape"][1:]), self.sidecar["pad_token_id"], np.int64)
        for row, start, length in zip(ids, starts.tolist(), lengths.tolist(), strict=True):
            row[:length] = self._ids[start : start + length]
        return torch.from_numpy(ids if ids.ndim == 2 else np.ascontiguousarray(ids.transpose(0, 2, 1)))

    # Files

    def _open(self) -> None:
        """Map the files, in each process for itself."""
        if self._ids is not None:
            return
        shape, dtype = tuple(self.sidecar["shape"]), np.dtype(self.sidecar["dtype"])
        try:
            # Plain arrays over the maps: slices of `np.memmap` itself cost some microseconds each.
            self._offsets = np.asarray(np.load(self.folder / OFFSETS_FILE, mmap_mode="r"))
            self._ids = np.asarray(np.memmap(self.folder / IDS_FILE, dtype, "r", shape=shape))
        except (OSError, ValueError) as error:
            raise CodesError(f"{self.folder} is damaged ({error}): export the corpus again.") from error
        if self._offsets[-1] != shape[0]:
            raise CodesError(
                f"{self.folder} is damaged ({OFFSETS_FILE} ends at {self._offsets[-1]}, {IDS_FILE} at {shape[0]}): "
                "export the corpus again."
            )
        self._counting = np.arange(self.window)
        if self.documents == APART:
            self._firsts = np.concatenate([[0], np.cumsum(self._windows_of(np.diff(self._offsets)))])

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("_offsets", "_firsts", "_counting")
        return {key: value for key, value in self.__dict__.items() if key not in mapped} | {"_ids": None}


def permuted(numbers: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Where a drawn permutation of `range(count)` takes these numbers.

    A number is a place in a square just large enough, and a Feistel network moves its row by a hash of its column and
    its column by a hash of its row, by turns (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). What
    lands outside the range, one in sqrt(count) / 2, goes through again until it lands inside.
    """
    side = np.uint64(math.isqrt(max(count - 1, 0)) + 1)
    keys = _round_keys(seed, epoch)
    found = _feistel(numbers.astype(np.uint64), side, keys)
    while (outside := found >= count).any():
        found[outside] = _feistel(found[outside], side, keys)
    return found.astype(np.int64)


@lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64))


def _feistel(numbers: np.ndarray, side: np.uint64, keys: Sequence[np.uint64]) -> np.ndarray:
    row, column = np.divmod(numbers, side)
    for key in keys:
        row, column = column, (row + _mixed(column + key) % side) % side
    return row * side + column


def _mixed(values: np.ndarray) -> np.ndarray:
    """A hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> _SHIFTS[0])) * _FACTORS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _FACTORS[1]
    return values ^ (values >> _SHIFTS[2])


def _read_sidecar(folder: Path) -> dict[str, Any]:
    try:
        sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionError(
            f"{folder} is no export (it has no {SIDECAR}): give the folder that `audiotok export` wrote."
        ) from error
    except ValueError as error:
        raise CodesError(f"{folder / SIDECAR} is damaged ({error}): export the corpus again.") from error
    if sidecar.get("format") != "memmap":
        raise OptionError(f"{folder} is an export of format {sidecar.get('format')}: export as memmap for windows.")
    return sidecar
