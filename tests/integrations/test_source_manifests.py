"""CSV, TSV, JSON lines and Parquet: types, bad rows with their line, paths that lead out, bounded memory."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiotok.audio import load_audio
from audiotok.errors import (
    AudioFileNotFoundError,
    AudioInputError,
    AudioIsDirectoryError,
    AudioNotReadableError,
    AudioShapeError,
    AudioTokError,
    MissingSamplingRateError,
    OptionError,
)
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
    write_csv,
    write_sounds,
)

# What stands in the rows


def test_csv_keeps_strings_as_they_are(tmp_path: Path) -> None:
    text = '\ufeffpath,id,text\r\na.wav,007,"1e3"\r\n\r\nb.wav,1.50,\r\n'
    text += '"c,""d"".wav",true,"two\r\nlines"\r\ne.wav, x ,NA\r\n'
    (tmp_path / "all.csv").write_bytes(text.encode())
    source = open_source(tmp_path / "all.csv")
    assert source.schema == pa.schema([("text", pa.string())])
    rows = clips(source)
    assert [(row["id"], row["text"]) for row in rows] == [
        ("007", "1e3"),
        ("1.50", ""),
        ("true", "two\r\nlines"),
        (" x ", "NA"),
    ]
    lines = [source.where(row["locator"]).rpartition(" ")[2] for row in rows]
    assert lines == ["2", "4", "5", "7"]
    assert rows[2]["locator"].endswith('c,"d".wav')


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "all.tsv").write_text('path\ttext\na.wav\t"quoted" he said\nb.wav\t"open\n')
    assert [row["text"] for row in clips(open_source(tmp_path / "all.tsv"))] == ['"quoted" he said', '"open']


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_csv_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "all.csv"
    write_csv(path, [["path", "text"], *(["a.wav", text] for text in texts)])
    source = open_source(path)
    rows = clips(source)
    assert [row["text"] for row in rows] == texts
    lines = path.read_bytes().split(b"\n")  # each clip's line begins with its path
    assert all(lines[int(row["locator"].partition(":")[0]) - 1].startswith(b"a.wav,") for row in rows)


def test_json_keeps_types(tmp_path: Path) -> None:
    rows = [
        {"path": "a.wav", "id": 7, "n": 1, "x": 1, "flag": True, "tags": [], "who": {"age": 3}, "none": None},
        {"path": "b.wav", "id": "u8", "n": -2, "x": 1.5, "flag": None, "tags": ["a"], "who": {"name": "é"}},
    ]
    rows += [{"path": "c.wav", "id": "u9", "late": "from here on"}] * 5000
    (tmp_path / "all.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path / "all.json")
    who = pa.struct([("age", pa.int64()), ("name", pa.string())])
    types = {"n": pa.int64(), "x": pa.float64(), "flag": pa.bool_(), "tags": pa.list_(pa.string()), "who": who}
    types |= {"none": pa.string(), "late": pa.string()}
    assert dict(zip(source.schema.names, source.schema.types, strict=True)) == types
    found = clips(source)
    assert [row["id"] for row in found[:3]] == ["7", "u8", "u9"]
    assert found[1]["who"] == {"age": None, "name": "é"} and found[1]["x"] == 1.5 and found[1]["tags"] == ["a"]
    assert found[0]["late"] is None and found[5000]["late"] == "from here on"


def test_parquet_keeps_types(tmp_path: Path) -> None:
    columns = {
        "n": pa.array([1, None], pa.int8()),
        "when": pa.array([1, 2], pa.timestamp("us", tz="UTC")),
        "words": pa.array([["a"], []], pa.list_(pa.large_string())),
        "speaker": pa.array(["x", "y"]).dictionary_encode(),
        "picture": pa.array([{"bytes": b"1", "path": None}] * 2),
        "blob": pa.array([b"a", b"b"]),
    }
    pq.write_table(pa.table({"path": ["a.wav", "b.wav"], **columns}), tmp_path / "all.parquet")
    source = open_source(tmp_path / "all.parquet")
    expected = {name: column.type for name, column in columns.items() if name != "picture"}
    assert dict(zip(source.schema.names, source.schema.types, strict=True)) == expected
    table = pa.Table.from_batches(source.batches())
    assert all(table.column(name).to_pylist() == columns[name].to_pylist() for name in expected)
    assert open_source(tmp_path / "all.parquet", columns=["picture"]).schema.names == ["picture"]


# Bad input

BAD = {
    "empty file": ("all.csv", "", AudioInputError, "empty: its first line must name the columns"),
    "only a header": ("all.csv", "path\n\n", AudioInputError, "lists no clips"),
    "no audio column": ("all.csv", "name,text\na,b\n", OptionError, "audio_column=.*name, text"),
    "two columns of one name": ("all.csv", "path,x,x\n", AudioInputError, 'two columns "x"'),
    "too few values": ("all.csv", "path,text\na.wav,x\n\nb.wav\n", AudioInputError, "line 4 has 1 values.*2 columns"),
    "too many values": ("all.csv", "path,text\na.wav,x\nb.wav,y,z\n", AudioInputError, "line 3 has 3 values"),
    "a quote that never ends": ("all.csv", 'path,text\na.wav,"x\nb.wav,y\n', AudioInputError, "line 2, or behind"),
    "text behind a quote": ("all.csv", 'path,text\na.wav,"x"y\n', AudioInputError, "line 2"),
    "empty path": ("all.csv", "id,path\n1,a.wav\n2,\n", AudioInputError, 'line 3: the column "path" is empty'),
    "empty id": ("all.csv", "id,path\n1,a.wav\n,b.wav\n", AudioInputError, 'line 3: the column "id" is empty'),
    "not UTF-8": ("all.csv", b"path\na.wav\n\xe9.wav\n", AudioInputError, "line 3 is not UTF-8"),
    "UTF-16": ("all.csv", "path\na.wav\n".encode("utf-16"), AudioInputError, "line 1 is not UTF-8"),
    "no JSON": ("all.jsonl", '{"path": "a.wav"}\n\n{"path": \n', AudioInputError, "line 3 is no JSON"),
    "JSON of one array": ("all.json", '["a.wav"]\n', AudioInputError, "line 1 is a list"),
    "JSON over lines": ("all.json", '{\n"path": "a.wav"}\n', AudioInputError, "line 1 is no JSON.*one object a line"),
    "deep JSON": ("all.jsonl", "[" * 100_000 + "\n", AudioInputError, "line 1 is no JSON"),
    "empty JSON": ("all.jsonl", "\n", AudioInputError, "lists no clips"),
    "JSON without a path": ("all.jsonl", '{"path": "a.wav"}\n{"x": 1}\n', AudioInputError, 'line 2: .*"path" is empty'),
    "JSON with null id": ("all.jsonl", '{"path": "a.wav", "id": null}\n', AudioInputError, 'line 1: .*"id" is empty'),
    "JSON with list id": (
        "all.jsonl",
        '{"path": "a.wav", "id": [1]}\n',
        AudioInputError,
        r"line 1: .*\[1\]: give text",
    ),
    "JSON with number path": ("all.jsonl", '{"path": 7}\n', AudioInputError, "line 1: .* 7: give text"),
    "JSON with half a character": ("all.jsonl", '{"path": "\\ud800.wav"}\n', AudioInputError, "line 1"),
    "JSON of two types": (
        "all.jsonl",
        '{"path": "a.wav", "x": 1}\n' + '{"path": "b.wav", "x": "one"}\n' * 2,
        AudioInputError,
        r"line 2: \"x\" is 'one', and int64 before.*columns=\[\]",
    ),
    "JSON of two types far apart": (
        "all.jsonl",
        '{"path": "a.wav", "x": 1}\n' * 5000 + '{"path": "b.wav", "x": true}\n',
        AudioInputError,
        r'line 5001: "x" is True',
    ),
    "JSON of great numbers": ("all.jsonl", f'{{"path": "a.wav", "x": {2**70}}}\n', AudioInputError, 'line 1: "x" is'),
    "no Parquet": ("all.parquet", b"PAR1 nothing", AudioInputError, "all.parquet"),
    "empty Parquet": ("all.parquet", b"", AudioInputError, "all.parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests_say_where(tmp_path: Path, case: str) -> None:
    name, content, error, message = BAD[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        clips(open_source(tmp_path / name))


def test_numbers_are_not_cut_off_where_a_file_has_grown(tmp_path: Path) -> None:
    """Arrow makes 2.5 a 2 if whole numbers are asked for."""
    (tmp_path / "all.jsonl").write_text('{"path": "a.wav", "x": 1}\n')
    source = open_source(tmp_path / "all.jsonl")
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write('{"path": "b.wav", "x": 2.5}\n')
    with pytest.raises(AudioInputError, match=r'"x" cannot be read as int64'):
        clips(source)


def test_a_column_of_two_types_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"path": "a.wav", "x": 1, "y": 1}\n{"path": "b.wav", "x": "one", "y": 2}\n')
    assert clips(open_source(tmp_path / "all.jsonl", columns=["y"]))[1]["y"] == 2


PARQUET = {"path": ["a.wav", "b.wav"], "id": ["1", "2"]}
BAD_PARQUET: dict[str, tuple[dict[str, Any], type[AudioTokError], str]] = {
    "null id": (PARQUET | {"id": ["1", None]}, AudioInputError, 'row 1: the column "id" is empty'),
    "empty id": (PARQUET | {"id": ["", "2"]}, AudioInputError, 'row 0: the column "id" is empty'),
    "null path": (PARQUET | {"path": ["a.wav", None]}, AudioInputError, 'row 1: the column "path" is empty'),
    "ids are floats": (PARQUET | {"id": [0.5, 1.5]}, OptionError, "double: ids are text or whole numbers"),
    "audio is a number": (PARQUET | {"path": [1, 2]}, OptionError, "int64, which holds no recordings"),
    "no audio": ({"id": ["1"]}, OptionError, "none of the columns audio, path"),
    "arrays without a rate": ({"audio": [[0.5]]}, MissingSamplingRateError, "sampling_rate"),
    "path is null though the first is not": (
        {"audio": [{"bytes": b"", "path": "a"}, {"bytes": b"", "path": None}]},
        AudioInputError,
        'row 1: the column "audio" is empty',
    ),
    "no rows": ({"path": pa.array([], pa.string())}, AudioInputError, "lists no clips"),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet_says_where(tmp_path: Path, case: str) -> None:
    columns, error, message = BAD_PARQUET[case]
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    with pytest.raises(error, match=message):
        clips(open_source(tmp_path / "all.parquet"))


@pytest.mark.parametrize("cut", [10, 4000])
def test_a_cut_parquet_file_is_named(tmp_path: Path, cut: int) -> None:
    pq.write_table(pa.table({"path": [f"{index}.wav" for index in range(999)]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) - cut])
    with pytest.raises(AudioInputError, match=r"b.parquet"):
        clips(open_source(tmp_path))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"path": ["b.wav"], "n": ["1"]}, 'column "n" is int64 in .*0.parquet, and string in .*1.parquet'),
        ({"path": ["b.wav"]}, 'column "n" is int64 in .*0.parquet, and missing in .*1.parquet'),
        ({"audio": ["b.wav"], "n": [1]}, 'column "path" is string in .*0.parquet, and missing'),
    ],
)
def test_parquet_files_of_other_columns_are_refused(tmp_path: Path, second: dict, message: str) -> None:
    pq.write_table(pa.table({"path": ["a.wav"], "n": [1]}), tmp_path / "0.parquet")
    pq.write_table(pa.table(second), tmp_path / "1.parquet")
    with pytest.raises(AudioInputError, match=message):
        clips(open_source(tmp_path))


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (None, AudioInputError, 'row 1: the column "audio" is null'),
        ({"bytes": None, "path": None}, AudioInputError, "row 1: bytes and path .* are null"),
        ({"bytes": None, "path": "../x.wav"}, AudioNotReadableError, "row 1: the path '../x.wav' leads out"),
        ({"bytes": None, "path": "gone.wav"}, AudioFileNotFoundError, "row 1: .*gone.wav does not exist"),
    ],
)
def test_a_row_without_audio_fails_alone(tmp_path: Path, cell: Any, error: type[AudioTokError], message: str) -> None:
    table = pa.table(
        {"audio": pa.concat_arrays([file_structs(["a.wav"]), pa.array([cell], file_structs(["a.wav"]).type)])}
    )
    pq.write_table(table.append_column("id", pa.array(["1", "2"])), tmp_path / "all.parquet")
    source = open_source(tmp_path / "all.parquet")
    first, second = clips(source)
    np.testing.assert_array_equal(load_audio(source.open(first["locator"])).samples, sound("a.wav"))
    with pytest.raises(error, match=message):
        source.open(second["locator"])


def test_stereo_arrays_are_channels_first(tmp_path: Path) -> None:
    stereo = np.stack([sound("a")[0], -sound("a")[0]])
    audio = [stereo.tolist(), [[0.5], [0.5, 0.5]]]
    pq.write_table(pa.table({"audio": audio, "sample_rate": [RATE, RATE]}), tmp_path / "all.parquet")
    source = open_source(tmp_path / "all.parquet")
    np.testing.assert_array_equal(load_audio(source.open("0:all.parquet")).samples, stereo)
    with pytest.raises(AudioShapeError, match=r"row 1: .*\[1, 2\] samples"):
        source.open("1:all.parquet")


def test_parquet_reads_each_row_group_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"audio": file_structs()}), tmp_path / "all.parquet", row_group_size=2)
    read: list[int] = []
    row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **o: read.append(i) or row_group(self, i, **o)
    )
    source = open_source(tmp_path / "all.parquet")
    rows = clips(source)
    assert read == []  # listing reads no recordings
    for row in rows:
        np.testing.assert_array_equal(load_audio(source.open(row["locator"])).samples, sound(row["id"]))
    assert read == [0, 1, 2]


def test_a_row_group_that_could_not_be_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"audio": file_structs()}), tmp_path / "all.parquet", row_group_size=2)
    source = open_source(tmp_path / "all.parquet")
    source.open("0:all.parquet")

    def fail(*args: object, **options: object) -> None:
        raise OSError("disk error")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read_row_group", fail)
        with pytest.raises(AudioNotReadableError, match="disk"):
            source.open("2:all.parquet")
    for row in (0, 2):
        np.testing.assert_array_equal(load_audio(source.open(f"{row}:all.parquet")).samples, sound(NAMES[row]))


def test_a_first_row_without_anything_has_no_path(tmp_path: Path) -> None:
    structs = pa.concat_arrays([pa.nulls(1, file_structs().type), file_structs(["a.wav"])])
    pq.write_table(pa.table({"audio": structs}), tmp_path / "all.parquet")
    assert ids(open_source(tmp_path)) == ["all.parquet/0", "all.parquet/1"]


# Paths


@pytest.fixture
def nest(tmp_path: Path) -> Path:
    """Folders beside and around that of the manifest, and links between them."""
    write_sounds(tmp_path, ["top.wav", "lists/here.wav", "lists/sub/deep.wav", "other/there.wav"])
    (tmp_path / "lists/link").symlink_to(tmp_path / "other")
    (tmp_path / "lists/linked.wav").symlink_to(tmp_path / "other/there.wav")
    (tmp_path / "lists/within.wav").symlink_to("sub/deep.wav")
    (tmp_path / "alias").symlink_to(tmp_path / "lists")
    return tmp_path


def listed(nest: Path, path: str, kind: str, audio_root: str | None) -> tuple[Any, list[dict[str, Any]]]:
    manifest = nest / f"lists/all.{kind}"
    if kind == "csv":
        write_csv(manifest, [["path"], ["here.wav"], [path]])
    elif kind == "jsonl":
        manifest.write_text("".join(json.dumps({"path": value}) + "\n" for value in ("here.wav", path)))
    else:
        pq.write_table(pa.table({"path": ["here.wav", path]}), manifest)
    source = open_source(manifest, audio_root=None if audio_root is None else audio_root.format(nest=nest))
    return source, clips(source)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("path", "audio_root", "leads_to"),
    [
        ("sub/deep.wav", None, "lists/sub/deep.wav"),
        ("sub/../here.wav", None, "lists/here.wav"),
        ("./here.wav", None, "lists/here.wav"),
        ("{nest}/lists/sub/deep.wav", None, "lists/sub/deep.wav"),
        ("{nest}/lists/sub/../here.wav", None, "lists/here.wav"),
        ("within.wav", None, "lists/sub/deep.wav"),
        ("there.wav", "{nest}/other", "other/there.wav"),
        ("{nest}/other/there.wav", "{nest}/other", "other/there.wav"),
        ("link/there.wav", "{nest}/other", "other/there.wav"),
        ("linked.wav", "{nest}/other", "other/there.wav"),
        ("../other/there.wav", "{nest}/other", "other/there.wav"),
        ("../top.wav", "{nest}", "top.wav"),
        ("top.wav", "{nest}", "top.wav"),
        ("../top.wav", "/", "top.wav"),
        ("{nest}/top.wav", "/", "top.wav"),
        ("linked.wav", "/", "other/there.wav"),
        ("here.wav", "{nest}/other", "lists/here.wav"),
        ("sub/deep.wav", "{nest}/lists", "lists/sub/deep.wav"),
        ("{nest}/lists/here.wav", "{nest}/alias", "lists/here.wav"),
    ],
)
def test_paths_lead_into_the_folder_or_audio_root(
    nest: Path, kind: str, path: str, audio_root: str | None, leads_to: str
) -> None:
    source, rows = listed(nest, path.format(nest=nest), kind, audio_root)
    assert source.open(rows[1]["locator"]) == str(nest / leads_to)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("audio_root", [None, "{nest}/other/sub"])
@pytest.mark.parametrize(
    "path",
    [
        "../top.wav",
        "sub/../../top.wav",
        "..",
        "/",
        "{nest}/top.wav",
        "{nest}/lists/../top.wav",
        "{nest}/lists-other/x.wav",
        "{nest}/other/there.wav",
        "//{nest}/top.wav",
        "memory://lists/here.wav",
        "file://{nest}/top.wav",
        "https://example.com/a.wav",
        "nosuchprotocol://x",
    ],
)
def test_paths_that_lead_out_are_refused_with_their_line(
    nest: Path, kind: str, path: str, audio_root: str | None
) -> None:
    place = "row 1" if kind == "parquet" else "line 3" if kind == "csv" else "line 2"
    with pytest.raises(AudioNotReadableError, match=f"all.{kind}, {place}: the path .* leads out of .*audio_root"):
        listed(nest, path.format(nest=nest), kind, audio_root)


def test_a_folder_may_be_known_by_two_names(nest: Path) -> None:
    source = open_source(write_csv(nest / "alias/all.csv", [["path"], [f"{nest}/lists/here.wav"], ["here.wav"]]))
    assert [source.open(row["locator"]) for row in clips(source)] == [str(nest / "lists/here.wav")] * 2


@pytest.mark.parametrize("path", ["link/there.wav", "linked.wav", "link/../top.wav"])
def test_links_that_lead_out_are_refused_when_opened(nest: Path, path: str) -> None:
    """To list them without looking is cheap; they must not be read."""
    source, rows = listed(nest, path, "csv", None)
    with pytest.raises(AudioNotReadableError, match=r"line 3: the path .* leads out"):
        source.open(rows[1]["locator"])


@pytest.mark.parametrize(
    ("path", "error"),
    [("gone.wav", AudioFileNotFoundError), ("sub", AudioIsDirectoryError), ("nul\0.wav", AudioInputError)],
)
def test_what_cannot_be_opened_is_named_with_its_line(nest: Path, path: str, error: type[AudioTokError]) -> None:
    for audio_root in (None, str(nest / "other")):
        source, rows = listed(nest, path, "jsonl", audio_root)
        with pytest.raises(error, match=r"all.jsonl, line 2: "):
            source.open(rows[1]["locator"])


def test_a_manifest_of_a_store_stays_in_its_folder() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/lists/all.csv", b"path\nsub/a.wav\nmemory:///lists/sub/a.wav\n/lists/sub/a.wav\nsub/../sub/a.wav\n")
    fs.pipe("/lists/sub/a.wav", sound_file("a.wav"))
    fs.pipe("/secret.wav", sound_file("secret.wav"))
    for _, samples in sounds(open_source("memory://lists/all.csv")):
        np.testing.assert_array_equal(samples, sound("a.wav"))
    for path in ("../secret.wav", "/secret.wav", "memory://secret.wav", "memory://lists/../secret.wav", "/etc/passwd"):
        fs.pipe("/lists/bad.csv", f"path\n{path}\n".encode())
        with pytest.raises(AudioNotReadableError, match=r"line 2: .* leads out"):
            clips(open_source("memory://lists/bad.csv"))
    fs.pipe("/lists/bad.csv", b"path\nmemory://secret.wav\n../secret.wav\n/secret.wav\n")
    assert len(dict(sounds(open_source("memory://lists/bad.csv", audio_root="memory://")))) == 3
    fs.store.clear()


def test_a_local_manifest_may_name_files_of_a_store(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/clips/a.wav", sound_file("a.wav"))
    write_csv(tmp_path / "all.csv", [["path"], ["a.wav"], ["memory://clips/a.wav"]])
    for _, samples in sounds(open_source(tmp_path / "all.csv", audio_root="memory://clips")):
        np.testing.assert_array_equal(samples, sound("a.wav"))
    fs.store.clear()


# Size


def rows_of(count: int) -> list[list[str]]:
    return [[f"u{index:08d}", f"{index % 100}/{index}.wav", f"some words of clip {index}"] for index in range(count)]


def write_many_csv(path: Path, count: int) -> Path:
    with (path / f"{count}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "path", "text"], *rows_of(count)])
    return path / f"{count}.csv"


def write_many_json(path: Path, count: int) -> Path:
    lines = (json.dumps(dict(zip(("id", "path", "text"), row, strict=True))) + "\n" for row in rows_of(count))
    (path / f"{count}.jsonl").write_text("".join(lines))
    return path / f"{count}.jsonl"


def write_many_parquet(path: Path, count: int) -> Path:
    table = pa.table(dict(zip(("id", "path", "text"), map(list, zip(*rows_of(count), strict=True)), strict=True)))
    pq.write_table(table, path / f"{count}.parquet", row_group_size=10_000)
    return path / f"{count}.parquet"


@pytest.mark.parametrize(
    ("write", "rows"), [(write_many_csv, 100_000), (write_many_json, 40_000), (write_many_parquet, 100_000)]
)
def test_many_rows_take_the_memory_of_a_batch(tmp_path: Path, write: Callable[[Path, int], Path], rows: int) -> None:
    """All of 100,000 rows would take 25 MB in Python and 6 MB in Arrow."""
    clips(open_source(write(tmp_path, 100)))  # imports
    source = open_source(write(tmp_path, rows))
    before, arrow = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    count = 0
    for batch in source.batches():
        count += batch.num_rows
        arrow = max(arrow, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows
    assert python < 4_000_000
    assert arrow < 3_000_000


def test_listing_stops_where_it_is_left(tmp_path: Path) -> None:
    """A generator that is dropped closes its file: a warning would be an error here."""
    source = open_source(write_many_csv(tmp_path, 10_000))
    next(source.batches())
    assert next(source.batches()).num_rows == 4096
    assert len(ids(source)) == 10_000
