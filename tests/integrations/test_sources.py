"""What every source promises: clips in a fixed order, opened one by one in any thread; and which source is chosen."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiotok.audio import load_audio
from audiotok.errors import (
    AudioFileNotFoundError,
    AudioInputError,
    AudioTokError,
    MissingDependencyError,
    OptionError,
)
from audiotok.integrations import sources
from audiotok.integrations.sources import RESERVED_COLUMNS, open_source
from integrations.source_cases import (
    CASES,
    NAMES,
    Case,
    clips,
    ids,
    sound,
    sounds,
    write_csv,
    write_sounds,
    write_tar,
)


@pytest.fixture(autouse=True)
def no_memory_files() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=CASES, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(sources, "BATCH_CLIPS", 4)
    for module in ("files", "manifests", "parquet", "datasets", "tars"):
        monkeypatch.setattr(f"audiotok.integrations.source_{module}.BATCH_CLIPS", 4)
    return request.param(tmp_path / "all")


# Laws of every kind


def test_every_clip_is_the_sound_that_went_in(case: Case) -> None:
    found = dict(sounds(case.open()))
    assert list(found) == list(case.ids)
    for clip, name in case.ids.items():
        np.testing.assert_array_equal(found[clip], sound(name))


def test_batches_have_one_schema_and_one_order(case: Case) -> None:
    source = case.open()
    batches = list(source.batches())
    schema = pa.schema([("id", pa.string()), ("locator", batches[0].schema.field("locator").type), *source.schema])
    assert schema.field("locator").type in (pa.string(), pa.int64())
    assert all(batch.schema.equals(schema) for batch in batches)
    assert all(0 < batch.num_rows <= 4 for batch in batches)
    assert len(batches) > 1 or len(case.ids) == 1
    assert pa.Table.from_batches(batches) == pa.Table.from_batches(case.open().batches())


def test_clips_open_in_many_threads_in_any_order(case: Case) -> None:
    source = case.open()
    rows = clips(source) * 8
    random.Random(0).shuffle(rows)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: load_audio(source.open(row["locator"])).samples, rows))
    for row, samples in zip(rows, found, strict=True):
        np.testing.assert_array_equal(samples, sound(case.ids[row["id"]]))


def test_sources_pickle(case: Case) -> None:
    source = case.open()
    row = clips(source)[-1]
    source.open(row["locator"])
    copy = pickle.loads(pickle.dumps(source))
    assert clips(copy) == clips(source)
    np.testing.assert_array_equal(load_audio(copy.open(row["locator"])).samples, sound(case.ids[row["id"]]))


def test_sources_describe_themselves(case: Case) -> None:
    source = case.open()
    facts = source.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert source.kind == facts["kind"] == case.kind
    assert facts["columns"] == {field.name: str(field.type) for field in source.schema}
    places = [source.where(row["locator"]) for row in clips(source)]
    assert len(set(places)) == len(places)
    assert all(type(place) is str for place in places)


def test_only_what_is_listed_can_be_opened(case: Case, tmp_path: Path) -> None:
    write_sounds(tmp_path, ["secret.wav", "all/.hidden.wav", "all/.hidden/a.wav"])
    write_tar(tmp_path / "secret.tar", {"s0.wav": b"secret ...."})
    pq.write_table(pa.table({name: ["secret.wav"] for name in ("audio", "wav")}), tmp_path / "secret.parquet")
    (tmp_path / "all/secret.txt").write_bytes((tmp_path / "secret.wav").read_bytes())
    source = case.open()
    real = clips(source)[0]["locator"]
    wrong = [
        "",
        "nowhere",
        "../secret.wav",
        "/etc/passwd",
        "1:/etc/passwd",
        "2:../../secret.wav",
        "0:../secret.parquet",
        "99:all.parquet",
        "6:part-0.parquet",
        ".hidden.wav",
        ".hidden/a.wav",
        "secret.txt",
    ]
    wrong += [
        '["../secret.tar", "s0.wav", 0, 9]',
        '["/secret.tar", "s0.wav", 0, 9]',
        "[1, 2, 3, 4]",
        "[]",
        "{}",
        "a\0.wav",
    ]
    if isinstance(real, int):
        wrong = [-1, 10**6]
    for locator in wrong:
        with pytest.raises(AudioInputError):
            source.open(locator)


def test_columns_are_chosen_by_name(case: Case) -> None:
    assert not set(case.open().schema.names) & {*RESERVED_COLUMNS, "audio", "path", "wav", "sound"}


# Which source it is


def test_listing_needs_neither_torch_nor_audio(tmp_path: Path) -> None:
    write_csv(tmp_path / "all.csv", [["path"], *([f"{index}.wav"] for index in range(9))])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/no-audio.wav").write_bytes(b"nothing to hear")
    code = (
        "import sys\n"
        "from audiotok.integrations.sources import open_source\n"
        f"assert sum(batch.num_rows for batch in open_source({str(tmp_path / 'all.csv')!r}).batches()) == 9\n"
        f"assert sum(batch.num_rows for batch in open_source({str(tmp_path / 'folder')!r}).batches()) == 1\n"
        "assert not {'torch', 'datasets', 'transformers', 'soundfile'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: "", OptionError, "Legal are"),
        (lambda path: "nowhere", AudioFileNotFoundError, "nowhere does not exist. Legal are"),
        (lambda path: path / "no/such/folder", AudioFileNotFoundError, "does not exist"),
        (lambda path: f"{path}/none/*.wav", AudioFileNotFoundError, "matches nothing"),
        (lambda path: f"{path}/*.wav", AudioInputError, r"\*.wav leads to no files. Legal are"),
        (lambda path: f"{path}/**.wav", OptionError, "between slashes"),
        (
            lambda path: path,
            AudioInputError,
            r"leads to 4 files, none of them audio \(2 .txt, 1 .json, 1 without an extension\)",
        ),
        (lambda path: path / "1.txt", AudioInputError, 'extension "txt"'),
        (lambda path: path / "README", AudioInputError, 'extension ""'),
        (lambda path: f"file://{path}/1.txt", AudioInputError, 'extension "txt"'),
        (lambda path: "nosuchprotocol://x/a.csv", OptionError, "nosuchprotocol"),
        (lambda path: "memory://none/a.csv", AudioFileNotFoundError, "does not exist"),
        (lambda path: 7, OptionError, "source is a int"),
        (lambda path: ["a.wav"], OptionError, "source is a list"),
    ],
)
def test_what_is_no_source_is_refused(
    tmp_path: Path, make: Callable[[Path], object], error: type[AudioTokError], message: str
) -> None:
    for name in ("1.txt", "sub/2.txt", "3.json", "README", ".hidden.wav", ".hidden/a.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(error, match=message):
        open_source(make(tmp_path))


def test_compressed_files_are_to_be_decompressed(tmp_path: Path) -> None:
    for name in ("all.csv.gz", "all.tar.gz", "all.tgz"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        with pytest.raises(AudioInputError, match="decompress"):
            open_source(tmp_path / name)


def test_a_url_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match="s3fs"):
        open_source("s3://bucket/corpus")


def test_tars_beside_audio_are_ambiguous(tmp_path: Path) -> None:
    for folder, tar in (("tar-first", "a.tar"), ("tar-last", "z.tar")):
        write_sounds(tmp_path / folder, ["b.wav"])
        write_tar(tmp_path / folder / tar, {})
        with pytest.raises(AudioInputError, match=r"both .*\.tar"):
            ids(open_source(tmp_path / folder))


def test_parquet_beside_audio_is_a_list_of_it(tmp_path: Path) -> None:
    write_sounds(tmp_path, ["b.wav"])
    pq.write_table(pa.table({"path": ["b.wav"]}), tmp_path / "a.parquet")
    assert open_source(tmp_path).kind == "folder"


def test_a_path_goes_before_a_glob_and_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_sounds(tmp_path, ["a[1]/x.wav", "owner/name/y.wav"]))
    assert ids(open_source("a[1]")) == ["x.wav"]
    assert ids(open_source("owner/name")) == ["y.wav"]


# Options


def manifest(tmp_path: Path) -> Path:
    rows = [["id", "path", "text", "split"], *([f"u{index}", name, "x", "dev"] for index, name in enumerate(NAMES))]
    return write_csv(write_sounds(tmp_path) / "all.csv", rows)


def test_columns_pass_as_asked(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    assert open_source(path).schema.names == ["text", "split"]
    assert open_source(path, columns=["split", "text"]).schema.names == ["split", "text"]
    assert open_source(path, columns=[]).schema.names == []
    assert open_source(path, id_column="text", columns=[]).describe()["id_column"] == "text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "text"}, r"\['text'\]"),
        ({"columns": ["txt"]}, 'no column "txt".*text, split.*Did you mean "text"'),
        ({"columns": ["path"]}, 'no column "path"'),
        ({"columns": ["text", "text"]}, "named twice"),
        ({"audio_column": "wav"}, "audio_column='wav'.*id, path, text, split"),
        ({"id_column": "texts"}, "id_column='texts'.*Did you mean \"text\""),
        ({"id_column": "text"}, r'the column "id", which a tokenized corpus writes itself.*columns=\[\'split\'\]'),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        open_source(manifest(tmp_path), **options)


@pytest.mark.parametrize("name", RESERVED_COLUMNS[1:])
def test_names_of_the_corpus_cannot_pass(tmp_path: Path, name: str) -> None:
    path = write_csv(tmp_path / "all.csv", [["id", "path", name, "text"], ["1", "a.wav", "x", "y"]])
    with pytest.raises(OptionError, match=rf"\"{name}\".*leave it out, columns=\['text'\]"):
        open_source(path)
    assert ids(open_source(path, columns=["text"])) == ["1"]


@pytest.mark.parametrize("option", ["audio_column", "id_column", "split", "audio_root", "columns"])
def test_a_folder_has_no_columns(tmp_path: Path, option: str) -> None:
    write_sounds(tmp_path)
    with pytest.raises(OptionError, match=option):
        open_source(tmp_path, **{option: ["x"] if option == "columns" else "x"})
    assert ids(open_source(tmp_path, columns=[]))


@pytest.mark.parametrize("option", ["id_column", "split", "audio_root"])
def test_tars_have_ids_of_their_own(tmp_path: Path, option: str) -> None:
    with pytest.raises(OptionError, match=option):
        open_source(write_tar(tmp_path / "a.tar", {}), **{option: "x"})


def test_a_split_is_a_column_of_a_manifest(tmp_path: Path) -> None:
    rows = {"path": list(NAMES), "split": ["dev", "dev", "test", "dev", "test", None]}
    write_sounds(tmp_path)
    pq.write_table(pa.table(rows), tmp_path / "all.parquet")
    write_csv(tmp_path / "all.csv", [["path", "split"], *zip(*rows.values(), strict=True)])
    lines = [json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    for name in ("all.parquet", "all.csv", "all.jsonl"):
        source = open_source(tmp_path / name, split="test")
        found = dict(sounds(source))
        assert list(found) == [NAMES[2], NAMES[4]]
        assert all(np.array_equal(samples, sound(name)) for name, samples in found.items())
        assert {row["split"] for row in clips(source)} == {"test"}
        with pytest.raises(OptionError, match=r"split='train' is in no row.*dev, test"):
            ids(open_source(tmp_path / name, split="train"))
        with pytest.raises(OptionError, match='needs a column "split"'):
            open_source(write_csv(tmp_path / "other.csv", [["path"], ["a.wav"]]), split="dev")
    for name in ("all.parquet", "all.csv", "all.jsonl"):
        assert ids(open_source(tmp_path / name, split="dev", columns=[])) == [NAMES[0], NAMES[1], NAMES[3]]


def test_iterable_datasets_are_for_another_function() -> None:
    rows = datasets.Dataset.from_dict({"audio": ["a.wav"]}).to_iterable_dataset()
    for source in (rows, datasets.IterableDatasetDict({"train": rows})):
        with pytest.raises(OptionError, match="tokenize_dataset"):
            open_source(source)


# Real recordings


def test_the_test_corpus(shared: Path) -> None:
    folder = shared / "data/train"
    by_folder = open_source(folder)
    by_manifest = open_source(folder / "metadata.csv", columns=["text", "domain"])
    assert sorted(ids(by_folder)) == sorted(ids(by_manifest))
    row = clips(by_manifest)[7]
    assert (
        load_audio(by_manifest.open(row["locator"])).samples.tobytes()
        == load_audio(folder / row["id"]).samples.tobytes()
    )
