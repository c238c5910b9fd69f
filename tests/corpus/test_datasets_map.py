"""`tokenize_dataset` and `CodecMap`: the codes of `encode`, in real processes, kept and found again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conformance.helpers import refused
from datasets import Audio, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from datasets.fingerprint import Hasher

from audiotok.errors import (
    AudioFileNotFoundError,
    AudioInputError,
    ChannelError,
    CheckpointError,
    NotAudioError,
    OptionError,
)
from audiotok.integrations.codec_map import CodecMap, TokenizerSpec
from audiotok.integrations.corpus_record import Filters
from audiotok.integrations.datasets_map import tokenize_dataset
from audiotok.layouts import get_layout
from corpus.map_fixtures import (
    NUM_CLIPS,
    Decoder,
    Telling,
    audio_cells,
    dataset_of,
    expected_rows,
    new_columns,
    plain,
    recordings,
    saved,
    tiny,
    wav,
)

# One codebook, several, a shared one, several rates, depths that vary; mono and stereo.
CODECS = ("auv", "apcodec", "melcap", "toy_rvq", "toy_multirate", "vrvq")
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer of variable depth."""
    return saved(tmp_path_factory.mktemp("saved") / "vrvq")


def sources(tokenizer: Any, count: int = NUM_CLIPS) -> list[Any]:
    return [cell["bytes"] for cell in audio_cells(tokenizer, count)]


# The same codes


@pytest.mark.parametrize("name", CODECS)
def test_codes_are_those_of_encode(name: str) -> None:
    tokenizer = tiny(name)
    coded = tokenize_dataset(dataset_of(tokenizer), tokenizer, batch_size=3)
    assert new_columns(coded) == expected_rows(tokenizer, sources(tokenizer))
    assert coded["key"][:] == [f"utt-{i}" for i in range(NUM_CLIPS)] and "audio" not in coded.column_names


@pytest.mark.parametrize("name", CODECS)
def test_ids_are_those_of_the_tokenizer(name: str) -> None:
    tokenizer = tiny(name)
    coded = tokenize_dataset(dataset_of(tokenizer), tokenizer, output="input_ids")
    ids = tokenizer(sources(tokenizer))
    assert coded["input_ids"][:] == ids["input_ids"] and coded["audio_length"][:] == ids["audio_lengths"]
    assert coded["attention_mask"][:] == ids["attention_mask"]
    assert coded.features["input_ids"] == List(Value("int32"))


def test_ids_of_a_2d_layout() -> None:
    tokenizer = tiny("apcodec")
    coded = tokenize_dataset(dataset_of(tokenizer), tokenizer, output="input_ids", layout="delay")
    ids = tokenizer.with_layout("delay")(sources(tokenizer))
    assert coded["input_ids"][:] == ids["input_ids"]
    assert [len(mask) for mask in coded["attention_mask"]] == [len(row[0]) for row in coded["input_ids"]]


def test_batches_are_certified() -> None:
    """Padded batches on a CPU, where the bound was measured, give the codes of clips alone."""
    tokenizer = tiny("vrvq")
    coded = tokenize_dataset(dataset_of(tokenizer), tokenizer, batch_seconds=1.0)
    assert new_columns(coded) == expected_rows(tokenizer, sources(tokenizer))


def test_options_reach_the_codec() -> None:
    tokenizer = tiny("vrvq")
    low, high = (tokenize_dataset(dataset_of(tokenizer), tokenizer, level=level) for level in (0.4, 0.9))
    assert new_columns(low) == expected_rows(tokenizer, sources(tokenizer), level=0.4)
    assert new_columns(high) == expected_rows(tokenizer, sources(tokenizer), level=0.9) != new_columns(low)


# What a column of recordings may be


def forms(tokenizer: Any, folder: Path) -> dict[str, dict[str, list[Any]]]:
    """The same recordings in every form."""
    rate, waves = tokenizer.codec.facts.sampling_rate, recordings(tokenizer)
    files = [wav(samples, rate) for samples in waves]
    paths = [str(folder / f"{i}.wav") for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        Path(path).write_bytes(data)
    arrays = [samples.astype(np.float64) if len(samples) > 1 else samples[0] for samples in waves]
    return {
        "paths": {"path": paths},
        "bytes": {"audio": files},
        "structs of bytes": {"audio": [{"bytes": data, "path": "elsewhere.wav"} for data in files]},
        "structs of paths": {"audio": [{"bytes": None, "path": path} for path in paths]},
        "structs of arrays": {"audio": [{"array": array, "sampling_rate": rate} for array in arrays]},
        "arrays": {"audio": arrays, "sampling_rate": [rate] * len(arrays)},
    }


@pytest.mark.parametrize("name", ["auv", "toy_rvq"])  # mono, stereo
def test_every_form_of_a_column(name: str, tmp_path: Path) -> None:
    tokenizer = tiny(name)
    expected = expected_rows(tokenizer, sources(tokenizer))
    for form, columns in forms(tokenizer, tmp_path).items():
        dataset = Dataset.from_dict(columns)
        for given in (dataset, dataset.to_iterable_dataset(), dataset.with_format("numpy")):
            coded = tokenize_dataset(given, tokenizer)
            assert new_columns(coded, "sampling_rate") == expected, (form, type(given))


@pytest.mark.parametrize("kind", ["python", "numpy", "torch", "arrow"])
def test_by_hand(kind: str, tmp_path: Path) -> None:
    """`map` hands its function lazy batches, dicts of arrays, or tables."""
    tokenizer = tiny("vrvq")
    codes, expected = CodecMap(tokenizer), expected_rows(tokenizer, sources(tokenizer))
    for form, columns in forms(tokenizer, tmp_path).items():
        dataset = Dataset.from_dict(columns).with_format(None if kind == "python" else kind)
        coded = dataset.map(codes, batched=True, batch_size=3).with_format(None)
        assert new_columns(coded.remove_columns(list(columns))) == expected, form
        assert coded.features["codes"] == List(Value("uint16")) and coded.features["depths"] == List(Value("uint8"))


@pytest.mark.parametrize("decode", [True, False])
def test_the_feature_audio_needs_no_torchcodec(decode: bool) -> None:
    """Nor does it where the column stays, or where `map` is called by hand, or in a stream."""
    tokenizer = tiny("vrvq")
    dataset = dataset_of(tokenizer, decode=decode)
    expected = expected_rows(tokenizer, sources(tokenizer))
    kept = tokenize_dataset(dataset, tokenizer, columns=["audio", "text"])
    assert kept.features["audio"] == Audio(decode=decode) and "key" not in kept.column_names
    assert new_columns(kept.remove_columns("audio")) == expected
    assert new_columns(dataset.map(CodecMap(tokenizer), batched=True, remove_columns="audio")) == expected
    assert new_columns(tokenize_dataset(dataset.to_iterable_dataset(num_shards=2), tokenizer)) == expected


def test_decoders_of_torchcodec() -> None:
    tokenizer = tiny("vrvq")
    rate, waves = tokenizer.codec.facts.sampling_rate, recordings(tokenizer)
    columns = CodecMap(tokenizer)({"audio": [Decoder(samples, rate) for samples in waves]}, 0)
    found = [{name: plain(values[row]) for name, values in columns.items()} for row in range(len(waves))]
    assert found == expected_rows(tokenizer, sources(tokenizer))


def test_relative_paths_and_audio_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny("vrvq")
    forms(tokenizer, tmp_path)
    dataset = Dataset.from_dict({"file": [f"{i}.wav" for i in range(NUM_CLIPS)]})
    rooted = tokenize_dataset(dataset, tokenizer, audio_root=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    here = tokenize_dataset(dataset, tokenizer)
    assert new_columns(rooted) == new_columns(here) == expected_rows(tokenizer, sources(tokenizer))


def test_streams_that_say_nothing_of_their_columns() -> None:
    tokenizer = tiny("vrvq")
    cells = audio_cells(tokenizer)
    stream = IterableDataset.from_generator(lambda: ({"key": str(i), "audio": cell} for i, cell in enumerate(cells)))
    assert stream.column_names is None
    assert new_columns(tokenize_dataset(stream, tokenizer)) == expected_rows(tokenizer, sources(tokenizer))


# Whole datasets


def test_dicts_of_splits() -> None:
    tokenizer = tiny("auv")
    parts = DatasetDict(train=dataset_of(tokenizer, 4), test=dataset_of(tokenizer, 2))
    parts["none"] = parts["test"].select(range(0))
    coded = tokenize_dataset(parts, tokenizer)
    assert isinstance(coded, DatasetDict) and {name: len(one) for name, one in coded.items()} == {
        "train": 4,
        "test": 2,
        "none": 0,
    }
    assert coded["train"].features == coded["test"].features == coded["none"].features
    streams = IterableDatasetDict({name: parts[name].to_iterable_dataset() for name in ("train", "test")})
    coded_streams = tokenize_dataset(streams, tokenizer)
    assert isinstance(coded_streams, IterableDatasetDict)
    assert new_columns(coded_streams["test"]) == new_columns(coded["test"])


def test_types_do_not_depend_on_the_first_batch() -> None:
    """All recordings of the first batch are bad."""
    tokenizer = tiny("vrvq")
    cells = [{"bytes": b"no audio", "path": None}] * 2 + audio_cells(tokenizer, 3)
    dataset = Dataset.from_dict({"audio": cells})
    coded = tokenize_dataset(dataset, tokenizer, on_error="null", batch_size=2)
    assert coded.features == Features(
        codes=List(Value("uint16")),
        depths=List(Value("uint8")),
        num_frames=Value("int64"),
        audio_length=Value("int64"),
        duration=Value("float64"),
        error=Value("string"),
    )
    assert new_columns(coded.remove_columns("error"))[2:] == expected_rows(tokenizer, sources(tokenizer, 3))


def test_a_row_that_fails_keeps_its_place() -> None:
    tokenizer = tiny("auv")
    dataset = dataset_of(tokenizer, 3)
    cells = dataset.cast_column("audio", Audio(decode=False))["audio"][:]
    cells[1] = {"bytes": None, "path": "/nowhere/at/all.wav"}
    dataset = dataset.remove_columns("audio").add_column("audio", cells)
    for given in (dataset, dataset.to_iterable_dataset()):
        rows = list(tokenize_dataset(given, tokenizer, on_error="null"))
        assert [row["error"] is None for row in rows] == [True, False, True]
        assert rows[1]["error"].startswith("AudioFileNotFoundError: ") and "/nowhere/at/all.wav" in rows[1]["error"]
        assert rows[1]["codes"] is None and rows[1]["num_frames"] is None and rows[1]["key"] == "utt-1"
        with refused(AudioFileNotFoundError, "row 1 (id utt-1)", "/nowhere/at/all.wav"):
            list(tokenize_dataset(given, tokenizer))


def test_filters_are_failures() -> None:
    tokenizer = tiny("auv")
    shortest = recordings(tokenizer)[0].shape[1] / tokenizer.codec.facts.sampling_rate
    filters = Filters(min_duration=shortest + 1e-3)
    coded = tokenize_dataset(dataset_of(tokenizer), tokenizer, on_error="null", filters=filters)
    assert [error is None for error in coded["error"]] == [False] + [True] * (NUM_CLIPS - 1)
    assert coded["error"][0].startswith("min_duration: ")
    with refused(OptionError, "filters="):
        CodecMap(tokenizer, filters=filters)


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ({"bytes": None, "path": None}, AudioInputError),
        ({"bytes": b"nothing", "path": None}, NotAudioError),
        ({"bytes": wav(np.zeros((2, 99), np.float32), 16_000), "path": None}, ChannelError),
    ],
)
def test_a_bad_recording_is_named(cell: dict[str, Any], error: type[AudioInputError]) -> None:
    tokenizer = tiny("auv")
    cells = [*audio_cells(tokenizer, 2), cell]
    dataset = Dataset.from_dict({"audio": cells, "speaker": ["a", "b", "c"]})
    with pytest.raises(error, match=r"^row 2 \(id c\): "):
        tokenize_dataset(dataset, tokenizer, id_column="speaker")
    with pytest.raises(error, match=r"^row 2 of a batch of 3: "):
        dataset.map(CodecMap(tokenizer), batched=True)


# What is refused


def test_columns() -> None:
    tokenizer = tiny("auv")
    dataset = dataset_of(tokenizer, 1).add_column("duration", [0.5])
    with refused(OptionError, '"duration"', "columns=['key', 'text']"):
        tokenize_dataset(dataset, tokenizer)
    assert tokenize_dataset(dataset, tokenizer, columns=["key"]).column_names[0] == "key"
    with refused(OptionError, '"txt"', 'Did you mean "text"'):
        tokenize_dataset(dataset, tokenizer, columns=["txt"])
    with refused(OptionError, "columns='text'", "['text']"):
        tokenize_dataset(dataset, tokenizer, columns="text")
    with refused(OptionError, "audio_column='sound'"):
        tokenize_dataset(dataset, tokenizer, audio_column="sound")
    twice = dataset.map(lambda row: {}, remove_columns="duration").add_column("b", audio_cells(tokenizer, 1))
    with refused(OptionError, "audio, b"):
        tokenize_dataset(twice.cast_column("b", Audio()), tokenizer)
    with refused(OptionError, "has none of the columns"):
        tokenize_dataset(Dataset.from_dict({"text": ["a"]}), tokenizer)


def test_options() -> None:
    tokenizer, dataset = tiny("vrvq"), dataset_of(tiny("vrvq"), 1)
    with refused(OptionError, "levle", "level"):
        CodecMap(tokenizer, levle=0.5)
    with refused(OptionError, "output='ids'"):
        tokenize_dataset(dataset, tokenizer, output="ids")
    with refused(OptionError, "on_error='skip'"):
        tokenize_dataset(dataset, tokenizer, on_error="skip")
    with refused(OptionError, "batch_seconds=0"):
        tokenize_dataset(dataset, tokenizer, batch_seconds=0)
    with refused(OptionError, "device='gpu'"):
        tokenize_dataset(dataset, tokenizer, device="gpu")
    with refused(OptionError, "DatasetDict"):
        tokenize_dataset(DatasetDict(), tokenizer)
    texts = dataset.remove_columns("audio")
    for given in (dataset, texts.to_iterable_dataset()):
        with refused(OptionError, "batched=True"):
            list(given.map(CodecMap(tokenizer, audio_column="text")))


# Processes


def test_workers_load_once_and_take_one_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Telling, "num_loaded", 0)
    tokenizer = tiny("vrvq")
    codes = Telling(folder)
    torch.set_num_threads(2)
    try:
        coded = dataset_of(tokenizer).map(
            codes, batched=True, batch_size=2, with_rank=True, num_proc=2, remove_columns="audio"
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    told = [tuple(row) for row in coded["told"]]
    processes = {process for process, *_ in told}
    assert len(processes) == 2 and os.getpid() not in processes
    # rank, threads, models loaded
    assert {(rank, threads, loaded) for _, rank, threads, loaded in told} == {(0, 1, 1), (1, 1, 1)}
    assert new_columns(coded, "told") == expected_rows(tokenizer, sources(tokenizer))


def test_a_tokenizer_of_memory_alone_reaches_the_workers() -> None:
    """No name leads to it: it travels with its weights."""
    tokenizer = tiny("toy_multirate")
    assert CodecMap(tokenizer).spec.files
    coded = tokenize_dataset(dataset_of(tokenizer), tokenizer, num_proc=2)
    assert new_columns(coded) == expected_rows(tokenizer, sources(tokenizer))


def test_it_pickles_small(folder: Path) -> None:
    from audiotok import AutoAudioTokenizer

    named, loaded = CodecMap(folder), CodecMap(AutoAudioTokenizer.from_pretrained(folder))
    named({"audio": sources(tiny("vrvq"), 1)})  # the model is at work by now
    for codes in (named, loaded):
        assert len(pickle.dumps(codes)) < 4000
        again = pickle.loads(pickle.dumps(codes))
        assert again.spec == codes.spec and Hasher.hash(again) == Hasher.hash(codes)


def test_ranks_share_out_the_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    loaded: list[str] = []
    monkeypatch.setattr(TokenizerSpec, "load", lambda spec, device: loaded.append(device) or tiny("vrvq"))
    codes = CodecMap(folder)
    assert codes.device == "cuda"
    for rank in (None, 0, 1, 2):
        pickle.loads(pickle.dumps(codes))({"audio": sources(tiny("vrvq"), 1)}, rank)
    pickle.loads(pickle.dumps(CodecMap(folder, device="cuda:1")))({"audio": sources(tiny("vrvq"), 1)}, 0)
    assert loaded == ["cuda:0", "cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_cuda_is_not_taken_across_a_fork(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(tiny("vrvq"), 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with refused(OptionError, "set_start_method", 'device="cpu"'):
        tokenize_dataset(dataset, folder, num_proc=2, device="cuda")
    assert len(tokenize_dataset(dataset, folder, num_proc=2, device="cpu")) == 2
    # What a worker of a map by hand sees: `torch.cuda.init` itself says so.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with refused(OptionError, "set_start_method", 'device="cpu"'):
        pickle.loads(pickle.dumps(CodecMap(folder, device="cuda")))({"audio": sources(tiny("vrvq"), 1)}, 0)


def test_a_tokenizer_that_changes_is_refused(tmp_path: Path) -> None:
    codes = CodecMap(saved(tmp_path / "it"))
    worker = pickle.loads(pickle.dumps(codes))
    saved(tmp_path / "it", noise=0.1)
    with refused(CheckpointError, "fingerprint", str(tmp_path)):
        worker({"audio": sources(tiny("vrvq"), 1)})
    assert codes({"audio": sources(tiny("vrvq"), 1)})["num_frames"]  # what it has in memory is what it was made with


# The cache


def test_the_hash_is_of_what_decides_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = saved(tmp_path / "it")
    hashes = [Hasher.hash(CodecMap(place))]
    assert Hasher.hash(CodecMap(place)) == hashes[0]
    for options in (
        {"certify": False},
        {"output": "input_ids"},
        {"layout": "parallel"},
        {"level": 0.4},
        {"downmix": "mean"},
        {"on_error": "null"},
        {"batch_seconds": 1.0},
        {"device": "cuda"},
        {"audio_column": "sound"},
    ):
        if options.get("layout") and not _has_layout(place, options["layout"]):
            continue
        hashes.append(Hasher.hash(CodecMap(place, **options)))
    version = importlib.metadata.version
    for package in ("soxr", "soundfile", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name, p=package: "9" if name == p else version(name))
            hashes.append(Hasher.hash(CodecMap(place)))
    saved(place, noise=0.1)
    hashes.append(Hasher.hash(CodecMap(place)))
    assert len(set(hashes)) == len(hashes)


def _has_layout(place: Path, layout: str) -> bool:
    tokenizer = CodecMap(place).tokenizer
    try:
        get_layout(layout, tokenizer.vocabulary, tokenizer.codec.facts.codebook_strides, True)
    except OptionError:
        return False
    return True


SCRIPT = """
import json, sys
import datasets
from audiotok.encoding import ClipEncoder
from audiotok.integrations import codec_map, datasets_map
from corpus.map_fixtures import dataset_of, tiny

datasets.disable_progress_bars()
calls = []
encode = ClipEncoder.encode_batch
ClipEncoder.encode_batch = lambda *args, **options: calls.append(1) or encode(*args, **options)
place, data, options = json.loads(sys.argv[1])
dataset = datasets.load_dataset("parquet", data_files=data, split="train")
coded = datasets_map.tokenize_dataset(dataset, place, batch_size=3, **options)
by_hand = dataset.map(codec_map.CodecMap(place, **options), batched=True, batch_size=3, remove_columns="audio")
print(json.dumps([len(calls), coded["codes"][:] == by_hand["codes"][:], sum(map(sum, coded["codes"]))]))
"""


def in_another_process(tmp_path: Path, place: Path, data: Path, **options: Any) -> tuple[int, bool, int]:
    """How often a fresh process called the codec, with one cache for all."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
    argument = json.dumps([str(place), str(data), options])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_another_process_finds_what_was_made(tmp_path: Path) -> None:
    place, data = saved(tmp_path / "it"), tmp_path / "data.parquet"
    dataset_of(tiny("vrvq"), decode=False).to_parquet(data)
    first = in_another_process(tmp_path, place, data)
    assert first[0] == 2 * NUM_CLIPS and first[1]
    assert in_another_process(tmp_path, place, data) == (0, True, first[2])
    assert in_another_process(tmp_path, place, data, certify=False) == (2 * NUM_CLIPS, True, first[2])
    saved(place, noise=0.1)
    again = in_another_process(tmp_path, place, data)
    assert again[0] == 2 * NUM_CLIPS and again[2] != first[2]


@pytest.mark.slow
def test_two_processes_hash_alike(folder: Path) -> None:
    code = (
        "import sys; from datasets.fingerprint import Hasher; from audiotok.integrations.codec_map import CodecMap; "
        "print(Hasher.hash(CodecMap(sys.argv[1], level=0.5, chunk_length_s=2.0)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == Hasher.hash(CodecMap(folder, chunk_length_s=2.0, level=0.5))


def test_a_table_comes_back_as_a_table() -> None:
    tokenizer = tiny("vrvq")
    table = dataset_of(tokenizer, 2, decode=False).with_format("arrow")[:]
    coded = CodecMap(tokenizer)(table)
    assert isinstance(coded, pa.Table) and coded.column_names[:3] == table.column_names
    assert coded.schema.field("depths").type == pa.list_(pa.uint8())
    assert new_columns(coded.drop_columns(["audio"]).to_pylist()) == expected_rows(tokenizer, sources(tokenizer, 2))
