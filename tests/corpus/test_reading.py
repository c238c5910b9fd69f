"""A corpus gives back what was put into it: to us without weights, and to pandas, DuckDB and datasets without us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conformance.codecs_table import clip, new_codec, tokenizer_of

from audiotok.clip_rows import ClipRows
from audiotok.errors import CodesError, OptionError
from audiotok.integrations.corpus import Corpus, read
from corpus.after_fixtures import KINDS, KINDS_AND_LAYOUTS, Made, edit_record, make_corpus, tokenizer_for


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_corpus(tmp_path / "codes")


def shards(made: Made) -> list[Path]:
    return sorted((made.folder / "data").iterdir())


def rewrite(path: Path, **columns: object) -> None:
    """A shard with other values in some columns."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)


# What comes back


@pytest.mark.parametrize(("kind", "layout"), KINDS_AND_LAYOUTS)
def test_clips_come_back_as_the_codec_shaped_them(tmp_path: Path, kind: str, layout: str) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    rows, input_ids = list(read(made.folder, layout=layout)), made.input_ids(layout)
    assert [row["id"] for row in rows] == made.ids
    for i, (row, one) in enumerate(zip(rows, made.clips, strict=True)):
        assert len(row["codes"]) == len(one.codes)
        assert all(np.array_equal(a, b) and a.dtype == np.int64 for a, b in zip(row["codes"], one.codes, strict=True))
        assert isinstance(row["codes"], list) == isinstance(one.codes, list)
        assert np.array_equal(row["input_ids"], input_ids[i])
        assert row["input_ids"].dtype == np.int64
        assert (row["audio_length"], row["num_frames"]) == (one.audio_length, made.num_frames[i])
        assert (row["text"], row["speaker"]) == (f"Grüße {i}", i % 3)
        assert ("depths" in row) == (kind == "vrvq")
        assert kind != "vrvq" or np.array_equal(row["depths"], one.depths)


def test_an_encoded_corpus_decodes_to_what_its_recordings_decode_to(tmp_path: Path) -> None:
    tokenizer = tokenizer_for("vrvq")
    recordings = [clip(tokenizer.codec.facts, n, seed=n) for n in (900, 2000)]
    encoded = tokenizer.encode_audio(recordings, sampling_rate=tokenizer.sampling_rate)
    made = make_corpus(tmp_path / "codes", "vrvq", num_clips=2)
    rows = [ClipRows(tokenizer).row(name, one) for name, one in zip(made.ids, encoded, strict=True)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    rewrite(shards(made)[0], **columns)
    for row, one in zip(read(made.folder, tokenizer), encoded, strict=True):
        wave = tokenizer.decode(row["input_ids"], row["audio_length"])
        ids = tokenizer.codes_to_ids(one.codes, one.depths)
        assert np.array_equal(wave, tokenizer.decode(ids, one.audio_length))


def test_it_may_be_read_many_times_and_has_a_length(made: Made) -> None:
    clips = read(made.folder)
    assert len(clips) == len(list(clips)) == len(list(clips)) == 11


def test_columns(made: Made) -> None:
    assert list(next(iter(read(made.folder)))) == [
        *("id", "codes", "num_frames", "audio_length", "duration", "text", "speaker")
    ]
    assert list(next(iter(read(made.folder, columns=["text", "id"])))) == ["text", "id"]
    assert list(next(iter(read(made.folder, columns=["input_ids"], layout="delay")))) == ["input_ids"]
    assert [len(row) for row in read(made.folder, columns=["codes"], shuffle=1)] == [1] * 11
    with pytest.raises(
        OptionError, match=r"columns='txt' is not legal: choose one of id, codes.* Did you mean \"text\""
    ):
        read(made.folder, columns=["txt"])
    with pytest.raises(OptionError, match="needs a layout: choose interleaved or coarse_first"):
        read(made.folder, columns=["input_ids"])


def test_columns_without_codes_read_no_codes(made: Made) -> None:
    for path in shards(made):
        rewrite(path, codes=[[9999]] * pq.read_metadata(path).num_rows)
    assert [row["id"] for row in read(made.folder, columns=["id"])] == made.ids
    with pytest.raises(CodesError):
        list(read(made.folder, columns=["codes"]))


@pytest.mark.parametrize("kind", KINDS)
def test_shuffle_moves_whole_clips_the_same_way_each_time(tmp_path: Path, kind: str) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    first, again = list(read(made.folder, shuffle=3)), list(read(made.folder, shuffle=3))
    assert [row["id"] for row in first] == [row["id"] for row in again]
    assert [row["id"] for row in first] != made.ids
    inside = [[row["id"] for row in first if row["id"] in made.ids[i : i + 4]] for i in (0, 4, 8)]
    assert inside != [made.ids[i : i + 4] for i in (0, 4, 8)]
    assert [row["id"] for row in first] != [row["id"] for row in read(made.folder, shuffle=4)]
    plain = {row["id"]: row for row in read(made.folder)}
    assert len(first) == len(plain)
    for row in first:
        for key, value in plain[row["id"]].items():
            assert all(map(np.array_equal, row[key], value)) if key == "codes" else np.array_equal(row[key], value)


def test_memory_holds_one_row_group(made: Made) -> None:
    table = pq.read_table(made.folder / "data")
    for path in shards(made)[1:]:
        path.unlink()
    pq.write_table(table, shards(made)[0], row_group_size=3)
    assert [len(block) for block in Corpus(made.folder).blocks()] == [3, 3, 3, 2]
    assert [row["id"] for row in read(made.folder)] == made.ids


def test_splits(made: Made) -> None:
    shards(made)[1].rename(made.folder / "data" / "dev-00001-00000.parquet")
    assert [row["id"] for row in read(made.folder, split="dev")] == made.ids[4:8]
    assert len(read(made.folder)) == 11
    with pytest.raises(
        OptionError, match=r"split='trian' is not legal: choose one of dev, train. Did you mean \"train\""
    ):
        read(made.folder, split="trian")


def test_a_corpus_behind_a_url(made: Made) -> None:
    fsspec.filesystem("memory").put(str(made.folder), "/behind-a-url", recursive=True)
    rows = list(read("memory://behind-a-url", layout="interleaved"))
    assert [row["id"] for row in rows] == made.ids
    assert np.array_equal(rows[0]["codes"], made.clips[0].codes)


# Whose codes they are


def test_reading_loads_neither_torch_nor_pandas(made: Made) -> None:
    code = (
        "import json, sys\n"
        "from audiotok.integrations.corpus import read\n"
        f"clips = list(read({str(made.folder)!r}, layout='interleaved'))\n"
        "print(json.dumps([len(clips), [name for name in ('torch', 'transformers', 'pandas') if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [11, []]


def test_a_record_without_facts(made: Made) -> None:
    edit_record(made.folder, tokenizer={"facts": None})
    with pytest.raises(CodesError, match=r"audiotok.json does not say the facts of the codec \('facts'\): restore it"):
        read(made.folder)
    edit_record(made.folder, tokenizer={"facts": {"sampling_rate": 16_000}})
    with pytest.raises(CodesError, match=r"does not say the facts of the codec .*hop_length"):
        read(made.folder)


def test_the_tokenizer_must_have_made_the_codes(made: Made) -> None:
    for tokenizer in (made.tokenizer, made.tokenizer.with_layout("delay")):
        row = next(iter(read(made.folder, tokenizer)))
        assert np.array_equal(row["input_ids"], tokenizer.codes_to_ids(made.clips[0].codes))
    assert next(iter(read(made.folder, made.tokenizer, layout="delay")))["input_ids"].ndim == 2
    with_option = tokenizer_of(made.tokenizer.codec, options={"domain": "speech"})
    assert len(read(made.folder, with_option)) == 11
    for other in (new_codec("auv", codebook_size=321), new_codec("vrvq")):
        with pytest.raises(
            CodesError, match=r"was made by a-name \(fingerprint .*the same codes would be other sounds"
        ):
            read(made.folder, tokenizer_of(other))


# What is wrong with it


def test_an_unfinished_corpus_is_read_where_that_is_asked_for(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "codes", finished=False)
    with pytest.raises(OptionError, match="is not finished: run the same `audiotok tokenize` command again"):
        read(made.folder)
    assert [row["id"] for row in read(made.folder, allow_unfinished=True)] == made.ids


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(CodesError, match=r"is no corpus \(it has no audiotok.json\)"):
        read(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_shard_names_itself(made: Made, damage: str) -> None:
    bad, data = shards(made)[1], shards(made)[1].read_bytes()
    middle = len(data) // 4
    flipped = data[:middle] + bytes(255 - byte for byte in data[middle : middle + 8]) + data[middle + 8 :]
    bad.write_bytes({"cut": data[:-20], "flipped": flipped, "empty": b"", "text": b"id,codes\n"}[damage])
    rows = []
    with pytest.raises(CodesError, match=f"(?s){bad} is damaged .*: remove it"):
        rows.extend(read(made.folder))
    assert len(rows) in (0, 4)


def test_no_flipped_bit_gives_other_codes(made: Made) -> None:
    """Pages have checksums: what is read is what was written, or nothing."""
    bad = shards(made)[0]
    data, expected = bad.read_bytes(), made.clips[:4]
    for place in range(4, len(data) // 2, 7):
        bad.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        try:
            found = [row["codes"] for row in read(made.folder, columns=["codes"])][:4]
        except CodesError:
            continue
        assert all(np.array_equal(codes, clip.codes) for codes, clip in zip(found, expected, strict=True)), place


@pytest.mark.parametrize(
    ("kind", "column", "values", "reason"),
    [
        ("auv", "codes", [[320]], "code 320 is outside the 320 entries of codebook 0"),
        ("apcodec", "codes", [[1, 2, 96]], "code 96 is outside the 96 entries of codebook 2"),
        ("apcodec", "codes", [[1, 2]], "row 0 has 2 codes where its 1 frames have 3"),
        ("auv", "num_frames", [0], "row 0 has 0 frames"),
        ("auv", "num_frames", [None], "a row lacks a number"),
        ("auv", "codes", [None], "a row has no codes"),
        ("vrvq", "depths", [[4]], "a depth is outside 1 to 3"),
        ("vrvq", "depths", [[0]], "a depth is outside 1 to 3"),
        ("vrvq", "codes", [[1, 2]], "row 0 has 2 codes where its 1 frames have 1"),
    ],
)
def test_rows_that_no_codec_made(tmp_path: Path, kind: str, column: str, values: list, reason: str) -> None:
    made = make_corpus(tmp_path / "codes", kind, num_clips=1, frames=(1, 2))
    shard = shards(made)[0]
    if kind == "vrvq" and column == "codes":
        rewrite(shard, depths=[[1]])
    rewrite(shard, **{column: values})
    with pytest.raises(CodesError, match=f"{shard}.*{reason}"):
        list(read(made.folder))


def test_sizes_that_differ_are_checked_book_by_book(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "codes", "auv_stages", num_clips=1, frames=(2, 3))
    assert made.tokenizer.codec.facts.codebook_sizes == (96, 64)
    rewrite(shards(made)[0], codes=[[95, 63, 95, 63]])
    assert len(list(read(made.folder))) == 1
    rewrite(shards(made)[0], codes=[[95, 63, 63, 64]])
    with pytest.raises(CodesError, match="code 64 is outside the 64 entries of codebook 1"):
        list(read(made.folder))


# Without us


def test_datasets_reads_it(made: Made, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = str(made.folder / "data" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == made.ids
    assert all(np.array_equal(row["codes"], one.codes[0]) for row, one in zip(rows, made.clips, strict=True))
    assert rows["text"][3] == "Grüße 3"


def test_pandas_reads_it(made: Made) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(made.folder / "data")
    assert frame["id"].tolist() == made.ids
    assert frame["codes"][0].dtype == np.uint16
    assert frame["duration"].sum() == pytest.approx(sum(one.audio_length for one in made.clips) / 16_000)


def test_duckdb_reads_it(made: Made) -> None:
    duckdb = pytest.importorskip("duckdb")
    query = f"select count(*), sum(len(codes)), max(num_frames) from '{made.folder}/data/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(11, sum(made.num_frames), max(made.num_frames))]
