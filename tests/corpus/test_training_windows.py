"""Training windows: every id is in one, they begin on edges of frames, and no order costs memory."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from audiotok.errors import CodesError, OptionError
from audiotok.integrations.corpus import export
from audiotok.integrations.training_windows import TrainingWindows, permuted
from corpus.after_fixtures import KINDS_AND_LAYOUTS, Made, make_corpus

W = 23
SPECIALS = [(kind, layout, bos, eos) for kind, layout in KINDS_AND_LAYOUTS for bos in (0, 1) for eos in (0, 1)]
SPECIALS = [one for one in SPECIALS if one[1] not in ("parallel", "delay") or not (one[2] or one[3])]


class Exported:
    """An export, and by plain means what windows of it are to be."""

    def __init__(self, folder: Path, kind: str, layout: str, bos: bool = False, eos: bool = False) -> None:
        self.made: Made = make_corpus(folder / "codes", kind)
        self.folder = folder / "ids"
        export(self.made.folder, "memmap", self.folder, layout=layout, bos=bos, eos=eos)
        self.documents = self.made.input_ids(layout, bos, eos)
        self.ids = np.concatenate(self.documents, axis=-1)
        self.first = np.cumsum([0, *(ids.shape[-1] for ids in self.documents)])
        self.edges = self._edges(kind, layout, bos, eos)

    def _edges(self, kind: str, layout: str, bos: bool, eos: bool) -> set[int]:
        """Places where a frame, a document or its end token begins."""
        if layout in ("parallel", "delay", "coarse_first"):
            return set(range(self.ids.shape[-1]))
        edges = set()
        for first, document, clip in zip(self.first, self.documents, self.made.clips, strict=False):
            ids = document[bos : len(document) - eos]
            frames = len(clip.codes[0]) if clip.depths is None else len(clip.depths)
            depths = clip.depths if clip.depths is not None else [len(ids) // frames] * frames
            starts = np.cumsum([0, *depths])[: None if eos else -1]
            edges |= {int(first)} | set((first + bos + starts).tolist())
        return edges


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    return Exported(tmp_path, "apcodec", "interleaved")


def all_of(windows: TrainingWindows) -> dict[str, np.ndarray]:
    return {key: values.numpy() for key, values in windows.batch(range(len(windows))).items()}


# What windows hold


@pytest.mark.parametrize(("kind", "layout", "bos", "eos"), SPECIALS)
def test_packed_windows_hold_every_id_and_begin_on_edges(
    tmp_path: Path, kind: str, layout: str, bos: bool, eos: bool
) -> None:
    made = Exported(tmp_path, kind, layout, bos, eos)
    windows = TrainingWindows(made.folder, W, shuffle=False)
    found, total = all_of(windows), made.ids.shape[-1]
    starts, end = [], 0
    for ids, positions in zip(found["input_ids"], found["position_ids"], strict=True):
        # Where it begins: the only place near the end of the last one that is an edge and has these ids.
        near = range(max(0, end - 2 * W), end + 1)
        places = [p for p in near if p in made.edges and np.array_equal(made.ids[..., p : p + W], ids)]
        places = [p for p in places if not starts or p > starts[-1]]
        assert places, "ids are left out between windows, or a window begins inside a frame"
        starts.append(places[-1])
        end = starts[-1] + W
        begins = np.array([starts[-1], *(f for f in made.first if starts[-1] < f < end)])
        expected = np.arange(starts[-1], end) - begins[np.searchsorted(begins, np.arange(starts[-1], end), "right") - 1]
        assert np.array_equal(positions, expected)
    assert starts[0] == 0
    assert 0 <= windows.left_out == total - end < windows.stride + W
    assert ids.dtype == np.int64 and ids.shape[-1] == W


@pytest.mark.parametrize(("kind", "layout", "bos", "eos"), SPECIALS)
@pytest.mark.parametrize("stride", [None, 7])
def test_windows_apart_stay_in_documents_and_reach_their_ends(
    tmp_path: Path, kind: str, layout: str, bos: bool, eos: bool, stride: int | None
) -> None:
    made = Exported(tmp_path, kind, layout, bos, eos)
    windows = TrainingWindows(made.folder, W, stride, documents="apart", shuffle=False)
    found, at, end, number = all_of(windows), 0, 0, 0
    for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True):
        length = int(mask.sum())
        assert np.array_equal(mask, np.arange(W) < length)
        assert (ids[..., length:] == windows.sidecar["pad_token_id"]).all()
        if end == made.documents[number].shape[-1]:
            # This document is whole; what follows is the next one, or once more the end of this.
            again = ids[..., :length]
            if number + 1 < len(made.documents) and np.array_equal(made.documents[number + 1][..., :length], again):
                number, at, end = number + 1, 0, 0
        document = made.documents[number]
        places = [p for p in range(at, end + 1) if np.array_equal(document[..., p : p + W], ids[..., :length])]
        places = [p for p in places if made.first[number] + p in made.edges]
        assert places
        at, end = places[-1], places[-1] + length
    assert (number, end) == (len(made.documents) - 1, made.documents[-1].shape[-1])
    assert windows.left_out == 0


def test_aligned_windows_do_not_overlap(exported: Exported) -> None:
    windows = TrainingWindows(exported.folder, 24, shuffle=False)
    found = all_of(windows)["input_ids"].reshape(-1)
    assert windows.stride == 24
    assert np.array_equal(found, exported.ids[: len(found)])
    assert windows.left_out == len(exported.ids) - len(found) < 24


def test_a_document_cut_by_a_window_of_the_export_lacks_its_specials(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "codes", "apcodec")
    export(made.folder, "memmap", tmp_path / "ids", bos=True, eos=True, window=14)
    windows = TrainingWindows(tmp_path / "ids", 14, documents="apart", shuffle=False)
    offsets = np.load(tmp_path / "ids" / "offsets.npy")
    assert len(windows) == len(offsets) - 1
    for row, length in zip(all_of(windows)["input_ids"], np.diff(offsets), strict=True):
        assert (row[length:] == windows.sidecar["pad_token_id"]).all()
    packed = all_of(TrainingWindows(tmp_path / "ids", 14, 5, shuffle=False))["input_ids"]
    books = np.searchsorted([96, 192, 288], packed[:, 0], side="right")
    assert set(books.tolist()) <= {0, 3}  # codebook 0, or a special token


# Their order


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 5))
def test_a_permutation(count: int, seed: int, epoch: int) -> None:
    numbers = permuted(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(numbers), np.arange(count))
    one = count // 2
    assert permuted(np.array([one]), count, seed, epoch)[0] == numbers[one]


def test_permutations_look_random() -> None:
    """Each of 24 orders of four windows comes, no place prefers a window, neighbours do not stay together."""
    orders = [tuple(permuted(np.arange(4), 4, seed, 0).tolist()) for seed in range(1200)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24 and counts.min() > 20 and counts.max() < 90
    many = permuted(np.arange(100_000), 100_000, 1, 2)
    assert abs(np.corrcoef(many, np.arange(100_000))[0, 1]) < 0.02
    assert (np.abs(np.diff(many)) == 1).mean() < 1e-3


def test_a_huge_range_needs_no_array_of_its_size() -> None:
    count = 10**15 + 37
    numbers = permuted(np.arange(1000) + count - 1000, count, 3, 0)
    assert len(set(numbers.tolist())) == 1000
    assert numbers.min() >= 0 and numbers.max() < count
    assert numbers.std() > count / 5


def test_epochs_differ_and_seeds_do(exported: Exported) -> None:
    windows = TrainingWindows(exported.folder, W, seed=1)
    plain = all_of(TrainingWindows(exported.folder, W, shuffle=False))["input_ids"]
    first = all_of(windows)["input_ids"]
    windows.set_epoch(1)
    second = all_of(windows)["input_ids"]
    assert windows.epoch == 1
    other = all_of(TrainingWindows(exported.folder, W, seed=2))["input_ids"]
    found = [one.tobytes() for one in (plain, first, second, other)]
    assert len(set(found)) == 4
    for one in (first, second, other):
        assert np.array_equal(np.sort(one, axis=0), np.sort(plain, axis=0))
    windows.set_epoch(0)
    assert np.array_equal(all_of(windows)["input_ids"], first)
    again = TrainingWindows(exported.folder, W, seed=1, epoch=1)
    assert np.array_equal(all_of(again)["input_ids"], second)


# In a loader


def ids_of(loader: Any) -> list[bytes]:
    return [row.numpy().tobytes() for batch in loader for row in batch["input_ids"]]


@pytest.mark.parametrize("documents", ["packed", "apart"])
@pytest.mark.parametrize("layout", ["interleaved", "delay"])
def test_items_batches_and_workers_agree(tmp_path: Path, documents: str, layout: str) -> None:
    made = Exported(tmp_path, "apcodec", layout)
    windows = TrainingWindows(made.folder, W, documents=documents)
    batch = windows.batch(range(len(windows)))
    for i in range(-2, len(windows)):
        assert {key: values.tolist() for key, values in windows[i].items()} == {
            key: values[i].tolist() for key, values in batch.items()
        }
    expected = [row.numpy().tobytes() for row in batch["input_ids"]]
    assert ids_of(DataLoader(windows, batch_size=4)) == expected
    assert ids_of(DataLoader(windows, batch_size=4, num_workers=2)) == expected
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].shape[1:] == ((3, W) if layout == "delay" else (W,))


def test_workers_that_outlive_an_epoch_see_the_next_one(exported: Exported) -> None:
    windows = TrainingWindows(exported.folder, W)
    loader = DataLoader(windows, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        windows.set_epoch(epoch)
        expected = [row.numpy().tobytes() for row in windows.batch(range(len(windows)))["input_ids"]]
        assert ids_of(loader) == expected


def test_ranks_share_the_windows(exported: Exported) -> None:
    windows = TrainingWindows(exported.folder, W)
    found: list[bytes] = []
    for rank in range(2):
        sampler = DistributedSampler(windows, num_replicas=2, rank=rank, shuffle=False, drop_last=False)
        found += ids_of(DataLoader(windows, batch_size=3, sampler=sampler))
    assert set(found) == set(ids_of(DataLoader(windows, batch_size=3)))
    assert len(found) in (len(windows), len(windows) + 1)


@pytest.mark.parametrize("documents", ["packed", "apart"])
def test_it_pickles_small_and_maps_its_files_anew(exported: Exported, documents: str) -> None:
    windows = TrainingWindows(exported.folder, W, documents=documents, seed=3)
    expected = windows[0]["input_ids"]
    data = pickle.dumps(windows)
    assert len(data) < 4000
    assert torch.equal(pickle.loads(data)[0]["input_ids"], expected)


def test_indices_beyond_the_end(exported: Exported) -> None:
    windows = TrainingWindows(exported.folder, W)
    for index in (len(windows), -len(windows) - 1):
        with pytest.raises(IndexError, match="there are windows 0 to"):
            windows[index]


# What cannot be


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 2}, "window=2 is not legal: a frame takes up to 3 ids"),
        ({"window": 0}, "window=0 is not legal"),
        ({"window": 10**6}, "window=1000000 is not legal: .* give at most that"),
        ({"stride": 0}, "stride=0 is not legal"),
        ({"documents": "pack"}, "documents='pack' is not legal: choose one of packed, apart"),
        ({"seed": -1}, "seed=-1 is not legal"),
    ],
)
def test_options_that_are_not_legal(exported: Exported, options: dict, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        TrainingWindows(exported.folder, **{"window": W, **options})


def test_what_is_no_memmap_export(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"is no export \(it has no export.json\)"):
        TrainingWindows(tmp_path, W)
    export(exported.made.folder, "megatron", tmp_path / "other")
    with pytest.raises(OptionError, match="is an export of format megatron: export as memmap"):
        TrainingWindows(tmp_path / "other", W)


def test_damage(exported: Exported) -> None:
    ids = (exported.folder / "ids.bin").read_bytes()
    (exported.folder / "ids.bin").write_bytes(ids[:-2])
    with pytest.raises(CodesError, match=r"is damaged .*export the corpus again"):
        TrainingWindows(exported.folder, W)
    (exported.folder / "ids.bin").write_bytes(ids)
    sidecar = json.loads((exported.folder / "export.json").read_text())
    (exported.folder / "export.json").write_text(json.dumps(sidecar | {"shape": [len(ids) // 2 - 3]}))
    with pytest.raises(CodesError, match=r"offsets.npy ends at \d+, ids.bin at \d+"):
        TrainingWindows(exported.folder, W)
    (exported.folder / "export.json").write_text("{")
    with pytest.raises(CodesError, match=r"export\.json is damaged"):
        TrainingWindows(exported.folder, W)
