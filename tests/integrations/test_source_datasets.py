"""Hugging Face datasets: columns of audio in every shape, splits, the hub without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from audiotok.audio import load_audio
from audiotok.errors import AudioFileNotFoundError, AudioInputError, AudioNotReadableError, AudioTokError, OptionError
from audiotok.integrations import source_datasets
from audiotok.integrations.sources import open_source
from integrations.source_cases import (
    NAMES,
    RATE,
    clips,
    file_structs,
    ids,
    sound,
    sound_file,
    sounds,
    write_sounds,
)


def table(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset(pa.table(columns))


# Columns of audio

COLUMNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "files": lambda path: {"clip": file_structs()},
    "bytes": lambda path: {"clip": [sound_file(name) for name in NAMES]},
    "absolute paths": lambda path: {"clip": [str(path / name) for name in NAMES]},
    "relative paths": lambda path: {"clip": list(NAMES)},
    "arrays": lambda path: {"clip": [sound(name)[0] for name in NAMES], "sampling_rate": [RATE] * len(NAMES)},
    "waveforms": lambda path: {"clip": [{"array": sound(name)[0], "sampling_rate": RATE} for name in NAMES]},
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_named_column_of_any_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(write_sounds(tmp_path))
    rows = table(**COLUMNS[case](tmp_path), name=NAMES)
    source = open_source(rows, audio_column="clip", id_column="name")
    for name, samples in sounds(source):
        np.testing.assert_array_equal(samples, sound(name))
    assert len(clips(source)) == len(NAMES)


def test_types_and_labels_stay(tmp_path: Path) -> None:
    rows = table(audio=file_structs(), n=pa.array(range(6), pa.uint8()), words=[["a"]] * 6, label=[0, 1] * 3)
    rows = rows.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    rows = rows.add_column("picture", [{"bytes": b"", "path": None}] * 6)
    for source in (open_source(rows), open_source(rows.shuffle(seed=1))):
        types = {"n": pa.uint8(), "words": pa.list_(pa.string()), "label": pa.int64()}
        assert dict(zip(source.schema.names, source.schema.types, strict=True)) == types
        assert source.describe()["labels"] == {"label": ["cat", "dog"]}
        assert sorted(row["n"] for row in clips(source)) == [0, 1, 2, 3, 4, 5]
    assert open_source(rows, columns=["picture"]).schema.names == ["picture"]


def test_audio_is_never_decoded_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("datasets decodes")

    monkeypatch.setattr(datasets.Audio, "decode_example", fail)
    features = datasets.Features(
        {"audio": datasets.Audio(sampling_rate=8000), "second": datasets.Audio(), "t": datasets.Value("string")}
    )
    rows = datasets.Dataset(
        pa.table({"audio": file_structs(), "second": file_structs(), "t": NAMES}),
        info=datasets.DatasetInfo(features=features),
    )
    source = open_source(rows, audio_column="second")
    assert source.schema.names == ["t"]
    for name, samples in sounds(source):
        np.testing.assert_array_equal(samples, sound(name))
    with pytest.raises(OptionError, match=r"several columns of audio: .*audio, second"):
        open_source(rows)


def test_rows_without_names_have_numbers() -> None:
    rows = table(audio=pa.array([{"bytes": sound_file("a.wav"), "path": None}] * 3))
    assert ids(open_source(rows)) == ["0", "1", "2"]
    rows = table(audio=pa.array([{"bytes": b"", "path": "a"}, {"bytes": b"", "path": None}]))
    with pytest.raises(AudioInputError, match=r'row 1 of the dataset: the column "audio.path" is empty'):
        clips(open_source(rows))


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        ({"audio": []}, {}, AudioInputError, "lists no clips"),
        ({"text": ["a"]}, {}, OptionError, "none of the columns audio"),
        ({"audio": [1]}, {}, OptionError, "int64, which holds no recordings"),
        ({"audio": ["a"], "id": [None]}, {}, OptionError, "null: ids are text"),
        ({"audio": ["a", "b"], "id": ["x", None]}, {}, AudioInputError, "row 1 of the dataset"),
        ({"audio": ["a", None]}, {}, AudioInputError, 'row 1 of the dataset: the column "audio" is empty'),
        ({"audio": [b"a"]}, {"id_column": "audio"}, OptionError, "binary: ids are text"),
        ({"audio": ["a"]}, {"split": "test"}, OptionError, "split='test' cannot be chosen"),
    ],
)
def test_bad_datasets_are_named(
    columns: dict[str, Any], options: dict[str, Any], error: type[AudioTokError], message: str
) -> None:
    with pytest.raises(error, match=message):
        clips(open_source(table(**columns), **options))


# Splits, folders, the hub


def test_a_dataset_dict_needs_a_split(tmp_path: Path) -> None:
    parts = datasets.DatasetDict({"train": table(audio=file_structs()), "test": table(audio=file_structs(["b.wav"]))})
    parts.save_to_disk(tmp_path / "saved")
    for source in (parts, tmp_path / "saved"):
        assert ids(open_source(source, split="test")) == ["b.wav"]
        with pytest.raises(OptionError, match="has the splits train, test: choose one"):
            open_source(source)
        with pytest.raises(OptionError, match=r"has the splits train, test: .*not 'dev'"):
            open_source(source, split="dev")


def test_a_saved_dataset_reads_only_files_that_are_allowed(tmp_path: Path) -> None:
    write_sounds(tmp_path, ["a.wav", "saved/b.wav"])
    rows = pa.array([{"bytes": None, "path": str(tmp_path / name)} for name in ("a.wav", "saved/b.wav")])
    table(audio=rows).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert source.open(1) == str(tmp_path / "saved/b.wav")
    with pytest.raises(AudioNotReadableError, match=r"row 0 of .*saved: the path .* leads out"):
        source.open(0)
    assert open_source(tmp_path / "saved", audio_root=tmp_path).open(0) == str(tmp_path / "a.wav")


def test_a_damaged_saved_dataset_is_named(tmp_path: Path) -> None:
    table(audio=file_structs()).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    with pytest.raises(AudioInputError, match="saved cannot be read"):
        open_source(tmp_path / "saved")


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return table(audio=file_structs(), id=NAMES).cast_column("audio", datasets.Audio())

    monkeypatch.setattr(source_datasets, "load_dataset", load)
    source = open_source("owner/name", split="train")
    assert asked == [("owner/name", "train")]
    assert source.describe()["name"] == "owner/name" and source.where(3) == "row 3 of owner/name"
    for name, samples in sounds(source):
        np.testing.assert_array_equal(samples, sound(name))


def test_files_of_a_hub_dataset_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = write_sounds(tmp_path / "cache", ["a.wav"])
    write_sounds(tmp_path, ["secret.wav"])
    paths = pa.array([{"bytes": None, "path": str(path)} for path in (cache / "a.wav", tmp_path / "secret.wav")])
    monkeypatch.setattr(source_datasets, "load_dataset", lambda name, split: table(audio=paths))
    monkeypatch.setattr(source_datasets.config, "HF_DATASETS_CACHE", cache)
    source = open_source("owner/name", split="train")
    assert load_audio(source.open(0)).num_samples
    with pytest.raises(AudioNotReadableError, match="row 1 of owner/name"):
        source.open(1)


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (ConnectionError("no network"), AudioFileNotFoundError, r"no path here.*\(no network\).*Offline"),
        (datasets.exceptions.DatasetNotFoundError("gone"), AudioFileNotFoundError, "no path here"),
        (ValueError("Config name is missing.\nPick"), OptionError, r"\(Config name is missing\).*give the Dataset"),
    ],
)
def test_the_hub_may_fail(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[AudioTokError], message: str
) -> None:
    def fail(name: str, split: str) -> None:
        raise raised

    monkeypatch.setattr(source_datasets, "load_dataset", fail)
    with pytest.raises(error, match=message):
        open_source("owner/name", split="train")


def test_splits_on_the_hub_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_datasets, "get_dataset_split_names", lambda name: ["train", "dev"])
    with pytest.raises(OptionError, match=r"name one, split=.* It has train, dev"):
        open_source("owner/name")


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    """The real library, offline."""
    code = (
        "from audiotok.errors import AudioTokError\n"
        "from audiotok.integrations.sources import open_source\n"
        "for options in ({'split': 'train'}, {}):\n"
        "    try:\n"
        "        open_source('owner/name', **options)\n"
        "    except AudioTokError as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("AudioFileNotFoundError owner/name is no path here") and "Offline" in first
    assert second.startswith("OptionError owner/name") and "split=" in second


def test_no_warnings_reach_the_user(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids(open_source(table(audio=file_structs())))
