"""Exports: what trainers read back is what went in, each format by a reader of its own."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import urllib.parse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conformance.codecs_table import new_codec, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from audiotok.errors import CodesError, OptionError, OutputExistsError, OutputNotWritableError
from audiotok.integrations.corpus import FORMATS, Corpus, export
from audiotok.integrations.export_formats import whole_folder
from audiotok.integrations.export_ids import Documents
from audiotok.integrations.export_webdataset import safe_key
from corpus.after_fixtures import KINDS, KINDS_AND_LAYOUTS, Made, command, make_corpus


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_corpus(tmp_path / "codes", "apcodec")


def documents_of(folder: Path, *args: Any, **options: Any) -> list[np.ndarray]:
    blocks = Documents(Corpus(folder), *args, **options)
    return [block.document(i) for block in blocks for i in range(len(block))]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


# Ids of many clips at once


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
@pytest.mark.parametrize("specials", [(False, False), (True, False), (False, True), (True, True)])
def test_ids_are_those_of_the_layout(tmp_path: Path, kind: str, layout: str, specials: tuple[bool, bool]) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    if layout in ("parallel", "delay") and any(specials):
        with pytest.raises(OptionError, match="Start and end tokens do not fit"):
            Documents(Corpus(made.folder), layout, *specials)
        return
    assert_equal(documents_of(made.folder, layout, *specials), made.input_ids(layout, *specials))


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
@pytest.mark.parametrize("window", [14, 15, 23, 1000])
def test_windows_cut_on_edges_of_frames_and_lose_nothing(tmp_path: Path, kind: str, layout: str, window: int) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    corpus, is_2d = Corpus(made.folder), layout in ("parallel", "delay")
    tokenizer, specials = made.tokenizer.with_layout(layout), not is_2d
    pieces: list[list[np.ndarray]] = []
    lengths: list[list[int]] = []
    for block in Documents(corpus, layout, specials, specials, window):
        for i in range(len(block)):
            if block.pieces[i] == 0:
                pieces.append([])
                lengths.append([])
            assert block.pieces[i] == len(pieces[-1])
            pieces[-1].append(block.document(i).astype(np.int64))
            lengths[-1].append(int(block.audio_lengths[i]))
    assert len(pieces) == len(made.clips)
    for parts, samples, clip in zip(pieces, lengths, made.clips, strict=True):
        assert all(part.shape[-1] <= window for part in parts)
        # Each piece decodes by itself; together they are the clip.
        codes = [tokenizer.ids_to_codes(part) for part in parts]
        for book, whole in enumerate(clip.codes):
            assert np.array_equal(np.concatenate([part[book] for part in codes]), whole)
        facts = tokenizer.codec.facts
        assert samples[0] == clip.audio_length or len(parts) > 1
        assert 0 <= clip.audio_length - sum(samples) <= facts.tail_samples * (len(parts) - 1)
        if specials:
            starts = [part[0] == tokenizer.bos_token_id for part in parts]
            ends = [part[-1] == tokenizer.eos_token_id for part in parts]
            assert starts == [True] + [False] * (len(parts) - 1)
            assert ends == [False] * (len(parts) - 1) + [True]
        # No piece could have held the next frame as well.
        for part, following in pairwise(parts):
            frame = following[: tokenizer.codec.facts.num_codebooks]
            if layout == "variable":  # it ends where codebook 0 comes again, or a special token
                inside = (frame[1:] >= tokenizer.codec.facts.codebook_sizes[0]) & (frame[1:] < tokenizer.pad_token_id)
                frame = frame[: 1 + (len(inside) if inside.all() else int(inside.argmin()))]
            held = part.shape[-1] + (part[0] != tokenizer.bos_token_id) + 1 if specials else part.shape[-1]
            if layout in ("interleaved", "variable"):
                assert held + len(frame) > window


def test_a_window_holds_at_least_a_frame(made: Made) -> None:
    assert documents_of(made.folder, "interleaved", True, True, 5)
    with pytest.raises(OptionError, match=r"window=4 is not legal: a frame in layout interleaved, .* takes up to 5"):
        Documents(Corpus(made.folder), "interleaved", True, True, 4)
    with pytest.raises(OptionError, match=r"window=2 is not legal: a frame in layout delay, .* takes up to 3"):
        Documents(Corpus(made.folder), "delay", window=2)


def test_watch_is_told_the_progress(made: Made) -> None:
    told: list[tuple[int, int]] = []
    documents_of(made.folder, watch=lambda done, total: told.append((done, total)))
    assert told == [(4, 11), (8, 11), (11, 11)]


# memmap


def read_memmap(folder: Path) -> list[np.ndarray]:
    sidecar, offsets = json.loads((folder / "export.json").read_text()), np.load(folder / "offsets.npy")
    assert offsets.dtype == np.int64
    ids = np.memmap(folder / "ids.bin", sidecar["dtype"], "r").reshape(sidecar["shape"])
    assert offsets[-1] == len(ids)
    return [ids[a:b].T for a, b in pairwise(offsets)]


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
def test_memmap(tmp_path: Path, kind: str, layout: str) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    sidecar = export(made.folder, "memmap", tmp_path / "out", layout=layout)
    assert_equal(read_memmap(tmp_path / "out"), made.input_ids(layout))
    assert sidecar == json.loads((tmp_path / "out" / "export.json").read_text())
    assert (sidecar["dtype"], sidecar["documents"], sidecar["clips"]) == ("<u2", 11, 11)
    assert sidecar["ids"] == sum(ids.size for ids in made.input_ids(layout))
    assert sidecar["audio_samples"] == sum(clip.audio_length for clip in made.clips)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ids.bin", "offsets.npy", "export.json"}


def test_the_sidecar_says_whose_ids_they_are(made: Made, tmp_path: Path) -> None:
    sidecar = export(made.folder, "memmap", tmp_path / "out", layout="coarse_first", bos=True, window=31, shuffle=5)
    tokenizer = made.tokenizer
    assert sidecar["tokenizer"]["fingerprint"] == Corpus(made.folder).record.tokenizer["fingerprint"]
    assert sidecar["vocab_size"] == tokenizer.vocab_size
    specials = (sidecar["pad_token_id"], sidecar["bos_token_id"], sidecar["eos_token_id"])
    assert list(specials) == tokenizer.all_special_ids
    expected = {"layout": "coarse_first", "bos": True, "eos": False, "window": 31, "shuffle": 5, "frame_ids": 1}
    assert {key: sidecar[key] for key in expected} == expected


def test_shuffled_documents_are_the_same_ones(made: Made, tmp_path: Path) -> None:
    export(made.folder, "memmap", tmp_path / "out", shuffle=1)
    shuffled = [ids.tobytes() for ids in read_memmap(tmp_path / "out")]
    plain = [ids.astype("<u2").tobytes() for ids in made.input_ids("interleaved")]
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)


@pytest.mark.parametrize(("size", "memmap", "megatron"), [(65_496, "<u2", 8), (65_497, "<u2", 4), (65_534, "<u4", 4)])
def test_ids_have_the_smallest_type(tmp_path: Path, size: int, memmap: str, megatron: int) -> None:
    """Three specials come on top: 65,536 ids fit uint16; Megatron itself takes it below 65,500 only."""
    tokenizer = tokenizer_of(new_codec("auv", codebook_size=size, domain_ranges={}))
    made = make_corpus(tmp_path / "codes", tokenizer=tokenizer)
    assert export(made.folder, "memmap", tmp_path / "out", eos=True)["dtype"] == memmap
    assert_equal(read_memmap(tmp_path / "out"), made.input_ids("interleaved", eos=True))
    export(made.folder, "megatron", tmp_path / "meg", eos=True)
    sequences, _, code = read_megatron(tmp_path / "meg" / "ids")
    assert code == megatron
    assert_equal(sequences, made.input_ids("interleaved", eos=True))


# Megatron


def read_megatron(prefix: Path) -> tuple[list[np.ndarray], list[int], int]:
    """Sequences, document index and dtype code, as the format is described: written without a look at the writer."""
    index, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = {8: np.dtype("<u2"), 4: np.dtype("<i4")}[code]
    place = 34
    lengths = np.frombuffer(index, "<i4", sequences, place)
    pointers = np.frombuffer(index, "<i8", sequences, place := place + 4 * sequences)
    starts = np.frombuffer(index, "<i8", documents, place := place + 8 * sequences)
    assert place + 8 * documents == len(index)
    found = [np.frombuffer(data, dtype, n, at) for n, at in zip(lengths.tolist(), pointers.tolist(), strict=True)]
    assert len(data) == lengths.sum() * dtype.itemsize
    return found, starts.tolist(), code


@pytest.mark.parametrize("kind", KINDS)
def test_megatron(tmp_path: Path, kind: str) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    export(made.folder, "megatron", tmp_path / "out", bos=True, eos=True)
    sequences, documents, code = read_megatron(tmp_path / "out" / "ids")
    layout = Corpus(made.folder).layout_names[0]
    assert_equal(sequences, made.input_ids(layout, bos=True, eos=True))
    assert documents == list(range(12))
    assert code == 8


def test_megatron_documents_keep_the_pieces_of_a_clip_together(made: Made, tmp_path: Path) -> None:
    sidecar = export(made.folder, "megatron", tmp_path / "out", window=30)
    sequences, documents, _ = read_megatron(tmp_path / "out" / "ids")
    assert max(map(len, sequences)) == 30
    assert (documents[0], documents[-1], len(documents)) == (0, len(sequences), 12)
    assert sidecar["documents"] == len(sequences)
    joined = [np.concatenate(sequences[a:b]) for a, b in pairwise(documents)]
    assert_equal(joined, made.input_ids("interleaved"))


@pytest.mark.parametrize("layout", ["parallel", "delay"])
def test_megatron_has_one_dimension(made: Made, tmp_path: Path, layout: str) -> None:
    with pytest.raises(OptionError, match=f'"{layout}" has two dimensions.*choose interleaved or coarse_first, or the'):
        export(made.folder, "megatron", tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


# WebDataset


def read_tars(folder: Path) -> list[dict[str, Any]]:
    """Samples, grouped as readers group them: by all before the first dot of the last part of the name."""
    samples: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                folder_name, _, name = member.name.rpartition("/")
                assert not folder_name
                key, _, extension = name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                value = json.load(file) if extension == "json" else np.load(io.BytesIO(file.read()))
                samples.setdefault(key, {})[extension] = value
    return [{"key": key} | files for key, files in samples.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_webdataset_of_codes(tmp_path: Path, kind: str) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    if kind == "toy_multirate":
        with pytest.raises(OptionError, match="Codebooks of different rates are no one array"):
            export(made.folder, "webdataset", tmp_path / "out")
        return
    assert export(made.folder, "webdataset", tmp_path / "out")["samples"] == 11
    samples = read_tars(tmp_path / "out")
    assert [sample["json"]["id"] for sample in samples] == made.ids
    assert [urllib.parse.unquote(sample["key"]) for sample in samples] == made.ids
    for i, (sample, clip) in enumerate(zip(samples, made.clips, strict=True)):
        assert np.array_equal(sample["npy"], clip.codes)
        assert sample["json"] == {
            "id": made.ids[i], "audio_length": clip.audio_length, "text": f"Grüße {i}", "speaker": i % 3
        }  # fmt: skip
        if kind == "vrvq":
            assert np.array_equal(sample["depths.npy"], clip.depths)


@pytest.mark.parametrize("layout", ["interleaved", "delay"])
def test_webdataset_of_ids(made: Made, tmp_path: Path, layout: str) -> None:
    export(made.folder, "webdataset", tmp_path / "out", layout=layout, columns=["speaker"])
    samples = read_tars(tmp_path / "out")
    assert_equal([sample["ids.npy"] for sample in samples], made.input_ids(layout))
    assert list(samples[0]["json"]) == ["id", "speaker", "audio_length"]


def test_webdataset_of_pieces(made: Made, tmp_path: Path) -> None:
    export(made.folder, "webdataset", tmp_path / "out", layout="interleaved", window=30)
    samples = read_tars(tmp_path / "out")
    for name, ids, clip in zip(made.ids, made.input_ids("interleaved"), made.clips, strict=True):
        mine = [sample for sample in samples if sample["json"]["id"] == name]
        assert [sample["json"]["piece"] for sample in mine] == list(range(len(mine)))
        assert [sample["key"] for sample in mine] == [f"{safe_key(name)}-{i:06d}" for i in range(len(mine))]
        assert np.array_equal(np.concatenate([sample["ids.npy"] for sample in mine]), ids)
        lost = clip.audio_length - sum(sample["json"]["audio_length"] for sample in mine)
        assert lost == made.tokenizer.codec.facts.tail_samples * (len(mine) - 1)  # of pieces decoded alone


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its tars open
def test_the_webdataset_package_reads_it(made: Made, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    export(made.folder, "webdataset", tmp_path / "out", shard_size=5 * 2560)
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == made.ids
    assert_equal([sample["npy"] for sample in samples], [clip.codes for clip in made.clips])


def test_tars_have_the_size_that_was_asked_for_and_the_same_bytes_each_time(made: Made, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(made.folder, "webdataset", tmp_path / name, shard_size=9000)
    one, two = (sorted((tmp_path / name).glob("*.tar")) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert len(one) > 2
    for path in one:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}
            assert sum(512 + -(-member.size // 512) * 512 for member in members) <= 9000


def test_a_sample_larger_than_a_tar_has_one_to_itself(made: Made, tmp_path: Path) -> None:
    assert len(export(made.folder, "webdataset", tmp_path / "out", shard_size=1)["shards"]) == 11


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_keys_are_safe_and_reversible(clip_id: str) -> None:
    key = safe_key(clip_id)
    assert urllib.parse.unquote(key) == clip_id
    assert key.isascii() and not set(key) & set("./\\ *?")


# Arrow


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
def test_arrow(tmp_path: Path, kind: str, layout: str) -> None:
    from datasets import load_from_disk

    made = make_corpus(tmp_path / "codes", kind)
    export(made.folder, "arrow", tmp_path / "out", layout=layout)
    rows = load_from_disk(tmp_path / "out")
    assert rows.column_names == ["id", "input_ids", "audio_length", "text", "speaker"]
    assert rows["id"][:] == made.ids
    assert rows["audio_length"][:] == [clip.audio_length for clip in made.clips]
    assert_equal([np.array(ids) for ids in rows["input_ids"]], made.input_ids(layout))
    assert "uint16" in str(rows.features["input_ids"])


def test_arrow_of_pieces_in_several_files(made: Made, tmp_path: Path) -> None:
    from datasets import load_from_disk

    export(made.folder, "arrow", tmp_path / "out", window=30, columns=[], shard_size=400)
    assert len(list((tmp_path / "out").glob("*.arrow"))) > 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    rows = load_from_disk(tmp_path / "out")
    assert rows.column_names == ["id", "piece", "input_ids", "audio_length"]
    for name, ids in zip(made.ids, made.input_ids("interleaved"), strict=True):
        mine = [row for row in rows if row["id"] == name]
        assert [row["piece"] for row in mine] == list(range(len(mine)))
        assert np.concatenate([row["input_ids"] for row in mine]).tolist() == ids.tolist()


def test_torch_takes_the_ids_as_they_are(made: Made, tmp_path: Path) -> None:
    import torch
    from datasets import load_from_disk

    export(made.folder, "arrow", tmp_path / "out")
    ids = load_from_disk(tmp_path / "out").with_format("torch")[0]["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.tolist() == made.input_ids("interleaved")[0].tolist()


# Whole or not at all


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_is_stopped_leaves_nothing(made: Made, tmp_path: Path, format: str) -> None:
    (tmp_path / "place").mkdir()

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(made.folder, format, tmp_path / "place" / "out", watch=stop)
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_is_replaced_stays_until_the_new_one_is_whole(made: Made, tmp_path: Path, format: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    export(made.folder, "memmap", place / "out")
    before = (place / "out" / "ids.bin").read_bytes()
    with pytest.raises(OutputExistsError, match="exists: choose another folder, or replace it with --overwrite"):
        export(made.folder, format, place / "out")
    shard = sorted((made.folder / "data").iterdir())[-1]
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) // 2])
    with pytest.raises(CodesError, match=str(shard)):
        export(made.folder, format, place / "out", overwrite=True)
    assert (place / "out" / "ids.bin").read_bytes() == before
    shard.write_bytes(good)
    export(made.folder, format, place / "out", overwrite=True)
    assert json.loads((place / "out" / "export.json").read_text())["format"] == format
    assert (format == "memmap") == (place / "out" / "offsets.npy").exists()
    assert [path.name for path in place.iterdir()] == ["out"]


def test_what_is_no_export_is_never_replaced(made: Made, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match=r"is no export \(it has no export.json\): choose another folder"):
        export(made.folder, "memmap", made.folder, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputExistsError):
        export(made.folder, "memmap", tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(made.folder, "memmap", tmp_path / "empty")


def test_places_that_cannot_be_written(made: Made, tmp_path: Path, without_root: Any) -> None:
    with pytest.raises(OutputNotWritableError, match="is no folder: make it first"):
        export(made.folder, "memmap", tmp_path / "missing" / "out")
    with pytest.raises(OptionError, match="is a URL: export to a folder of this machine"):
        export(made.folder, "memmap", "s3://bucket/out")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    with without_root(), pytest.raises(OutputNotWritableError, match="check the folder and its rights"):
        with whole_folder(locked / "out", overwrite=False):
            pass


# What cannot be exported


def test_no_clips(made: Made, tmp_path: Path) -> None:
    for path in (made.folder / "data").iterdir():
        path.unlink()
    with pytest.raises(CodesError, match="has no clips: there is nothing to export"):
        export(made.folder, "memmap", tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "options", "reason"),
    [
        ("memap", {}, "format='memap' is not legal.*Did you mean \"memmap\""),
        ("memmap", {"layout": "variable"}, 'layout="variable" does not fit'),
        ("memmap", {"columns": ["text"]}, "holds ids alone: leave columns out"),
        ("webdataset", {"bos": True}, "are matters of ids: choose a layout"),
        ("webdataset", {"columns": ["txt"]}, 'Did you mean "text"'),
        ("arrow", {"columns": ["audio_length"]}, "has the name of one that the export makes"),
        ("arrow", {"shard_size": 0}, "shard_size=0 is not legal"),
        ("memmap", {"shuffle": -1}, "shuffle=-1 is not legal"),
        ("memmap", {"split": "dev"}, "split='dev' is not legal: choose one of train"),
    ],
)
def test_options_that_do_not_fit(made: Made, tmp_path: Path, format: str, options: dict, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        export(made.folder, format, tmp_path / "out", **options)


def test_a_column_that_json_has_no_words_for(made: Made, tmp_path: Path) -> None:
    for path in (made.folder / "data").iterdir():
        table = pq.read_table(path)
        place = table.schema.get_field_index("text")
        pq.write_table(table.set_column(place, "text", table["text"].cast("binary")), path)
    with pytest.raises(OptionError, match=r"JSON has no words for a bytes .*name the columns to take along"):
        export(made.folder, "webdataset", tmp_path / "out")
    export(made.folder, "webdataset", tmp_path / "out", columns=["speaker"])


def test_an_unfinished_corpus(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "codes", finished=False)
    with pytest.raises(OptionError, match="is not finished"):
        export(made.folder, "memmap", tmp_path / "out")
    assert export(made.folder, "memmap", tmp_path / "out", allow_unfinished=True)["corpus_finished"] is False


# The command


def test_the_command(made: Made, tmp_path: Path) -> None:
    options = ("--layout", "delay", "--window", 20, "--shuffle", 3)
    result = command("export", made.folder, "--format", "memmap", "--output-dir", tmp_path / "out", *options, "--json")
    said = json.loads(result.stdout)
    assert said == json.loads((tmp_path / "out" / "export.json").read_text()) | {"output": str(tmp_path / "out")}
    assert (said["layout"], said["window"], said["shuffle"]) == ("delay", 20, 3)
    shown = command("export", made.folder, "-f", "arrow", "-o", tmp_path / "set", "--columns", "text").stdout
    assert "fingerprint" in shown and "input" not in shown
    assert command("export", made.folder, "-f", "arrow", "-o", tmp_path / "set", "--overwrite", "-q").stdout == ""
