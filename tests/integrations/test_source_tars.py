"""WebDataset tars: what becomes columns, what is refused, and that a damaged tar never looks whole."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from audiotok.audio import load_audio
from audiotok.errors import AudioInputError, AudioTokError, OptionError
from audiotok.integrations import source_tars
from audiotok.integrations.sources import open_source
from integrations.source_cases import clips, ids, sound, sound_file, sounds, tar_samples, write_tar

WAV = sound_file("a.wav")


def fields(**values: Any) -> bytes:
    return json.dumps(values).encode()


def columns(source: Any) -> dict[str, pa.DataType]:
    return dict(zip(source.schema.names, source.schema.types, strict=True))


# What becomes columns


def test_texts_become_columns(tmp_path: Path) -> None:
    members = {
        "./d/0.wav": WAV,
        "./d/0.json": fields(text="é", n=1, x=1, on=True, words=[1], who={"a": 1}, none=None),
        "./d/0.cls": b"7\n",
        "./d/0.speaker.txt": b"Ann",
        "./d/0.pyd": b"cos\nsystem\n(S'false'\ntR.",
        "./d/1.json": fields(x=1.5),
        "./d/1.wav": WAV,
        "./.hidden/2.wav": WAV,
        "./._3.wav": b"resource fork",
        "./README": b"no sample",
    }
    source = open_source(write_tar(tmp_path / "a.tar", members))
    types = {"text": pa.string(), "n": pa.int64(), "x": pa.float64(), "on": pa.bool_(), "cls": pa.int64()}
    assert columns(source) == types | {"speaker.txt": pa.string()}
    first, second = clips(source)
    assert first | {"locator": None} == {
        "id": "a.tar/d/0",
        "locator": None,
        "text": "é",
        "n": 1,
        "x": 1.0,
        "on": True,
        "cls": 7,
        "speaker.txt": "Ann",
    }
    assert second["id"] == "a.tar/d/1" and second["x"] == 1.5 and second["text"] is None
    assert source.where(first["locator"]) == f"{tmp_path}/a.tar: d/0.wav"


@pytest.mark.parametrize("chosen", [[], ["n"], ["txt", "n"], ["speaker"]])
def test_only_chosen_columns_are_read(tmp_path: Path, chosen: list[str]) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", tar_samples(["a.wav"] * 3, n=int, speaker=str)), columns=chosen)
    assert source.schema.names == chosen
    assert [list(row)[2:] for row in clips(source)] == [chosen] * 3


def test_the_first_tar_decides(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.wav": WAV, "0.json": fields(n=1, text="a")})
    write_tar(tmp_path / "1.tar", {"0.wav": WAV, "0.json": fields(n=None)})
    assert [row["n"] for row in clips(open_source(tmp_path))] == [1, None]
    write_tar(tmp_path / "2.tar", {"0.wav": WAV, "0.json": fields(n=2, new=1)})
    with pytest.raises(
        OptionError, match=r"2.tar: 0.wav: the column \"new\" is not in .*0.tar.*columns=\['n', 'text'\]"
    ):
        clips(open_source(tmp_path))
    assert [row["n"] for row in clips(open_source(tmp_path, columns=["n", "text"]))] == [1, None, 2]
    write_tar(tmp_path / "3.tar", {"0.wav": WAV, "0.json": fields(n=2.5)})
    with pytest.raises(AudioInputError, match=r"3.tar: 0.wav: \"n\" is 2.5, and int64 in the first tar"):
        clips(open_source(tmp_path, columns=["n"]))


def test_one_of_several_recordings_is_named(tmp_path: Path) -> None:
    members = {"0.mic1.wav": WAV, "0.mic2.wav": sound_file("b.wav"), "0.txt": b"x"}
    with pytest.raises(AudioInputError, match=r"a.tar: 0 .*several recordings \(.mic1.wav, .mic2.wav\).*audio_column"):
        open_source(write_tar(tmp_path / "a.tar", members))
    source = open_source(tmp_path / "a.tar", audio_column="mic2.wav")
    assert [samples.tobytes() for _, samples in sounds(source)] == [sound("b.wav").tobytes()]


# Samples that cannot be used

BAD: dict[str, tuple[list[tuple[str, bytes]], type[AudioTokError], str]] = {
    "no recording": ([("0.wav", WAV), ("1.txt", b"x")], AudioInputError, r"a.tar: 1 .*without a recording \(.txt\)"),
    "not together": (
        [("0.wav", WAV), ("1.wav", WAV), ("0.txt", b"")],
        AudioInputError,
        "a.tar: 0 .*next to each other",
    ),
    "no JSON": ([("0.wav", WAV), ("0.json", b"{")], AudioInputError, "a.tar: 0: the .json file cannot be read"),
    "deep JSON": ([("0.wav", WAV), ("0.json", b"[" * 10**5)], AudioInputError, "a.tar: 0: the .json file cannot be"),
    "JSON is no object": ([("0.wav", WAV), ("0.json", b"[1]")], AudioInputError, "no JSON object but list"),
    "text is not UTF-8": ([("0.wav", WAV), ("0.txt", b"\xff")], AudioInputError, "a.tar: 0: the .txt file"),
    "class is no number": ([("0.wav", WAV), ("0.cls", b"dog")], AudioInputError, "a.tar: 0: the .cls file"),
    "two types": (
        [("0.wav", WAV), ("0.json", fields(x=1)), ("1.wav", WAV), ("1.json", fields(x="a"))],
        AudioInputError,
        r'"x" is int and str in .*a.tar.*columns=\[\]',
    ),
    "one column twice": (
        [("0.wav", WAV), ("0.json", fields(txt="a")), ("0.txt", b"b")],
        AudioInputError,
        'a.tar: 0: the column "txt" is there twice',
    ),
    "a number beyond 64 bits": ([("0.wav", WAV), ("0.json", fields(n=2**70))], AudioInputError, '0.wav: "n" is'),
    "a column of the corpus": ([("0.wav", WAV), ("0.json", fields(duration=1))], OptionError, r"rename.*columns=\[\]"),
    "no samples": ([("README", b"x")], AudioInputError, "lists no clips"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_named(tmp_path: Path, case: str) -> None:
    members, error, message = BAD[case]
    with pytest.raises(error, match=message):
        clips(open_source(write_tar(tmp_path / "a.tar", members)))


def test_a_huge_text_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tars, "LARGEST_TEXT", 5)
    path = write_tar(tmp_path / "a.tar", {"0.wav": WAV, "0.txt": b"too long"})
    with pytest.raises(AudioInputError, match=r"0.txt has 8 bytes"):
        open_source(path)
    assert ids(open_source(path, columns=[])) == ["a.tar/0"]


# Entries that could lead elsewhere


def add(name: str, type: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Callable[[tarfile.TarFile], None]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, link, size
    return lambda tar: tar.addfile(info, io.BytesIO(b"x" * size))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (add("1.wav", tarfile.SYMTYPE, "/etc/passwd"), "1.wav is a link"),
        (add("1.wav", tarfile.LNKTYPE, "0.wav"), "1.wav is a link"),
        (add("1.wav", tarfile.CHRTYPE), "1.wav is a link, device"),
        (add("1.wav", tarfile.FIFOTYPE), "1.wav is a link, device"),
        (add("dir", tarfile.SYMTYPE, ".."), "dir is a link"),
        (add("/etc/1.wav"), "/etc/1.wav leads out"),
        (add("../1.wav"), "../1.wav leads out"),
        (add("a/../../1.wav"), "leads out"),
        (add("a/..", tarfile.DIRTYPE), "leads out"),
        (add("a\udcff.wav"), "is not UTF-8"),
    ],
)
def test_entries_that_lead_elsewhere_are_refused(
    tmp_path: Path, member: Callable[[tarfile.TarFile], None], message: str
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add("folder", tarfile.DIRTYPE)(tar)
        add("0.wav", size=9)(tar)
        member(tar)
    with pytest.raises(AudioInputError, match=f"a.tar: .*{message}"):
        clips(open_source(tmp_path / "a.tar"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format: int) -> None:
    name = f"{'é' * 30}/{'b' * 60}.wav"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(WAV)
        tar.addfile(info, io.BytesIO(WAV))
    assert [samples.tobytes() for _, samples in sounds(open_source(tmp_path))] == [sound("a.wav").tobytes()]
    assert ids(open_source(tmp_path)) == [f"a.tar/{name[:-4]}"]


# Damaged tars


@pytest.mark.parametrize(
    "end", ["in a recording", "behind one", "in a header", "in a text", "in the end mark", "nothing"]
)
def test_a_cut_tar_is_named(tmp_path: Path, end: str) -> None:
    path = write_tar(tmp_path / "a.tar", tar_samples(["a.wav"] * 3, n=int))
    with tarfile.open(path) as tar:
        last = tar.getmember("s2.wav")
    data = path.read_bytes()
    middle = data.index(b"text 2")
    length = {
        "in a recording": last.offset_data + 7,
        "behind one": last.offset,
        "in a header": last.offset + 100,
        "in a text": middle + 2,
        "in the end mark": middle + 512 + 100,
        "nothing": 0,
    }[end]
    path.write_bytes(data[:length])
    with pytest.raises(AudioInputError, match=r"a.tar is no whole, uncompressed tar"):
        clips(open_source(path))


@pytest.mark.parametrize("damage", ["a header", "more behind the end", "compressed", "text"])
def test_a_damaged_tar_is_named(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "a.tar", tar_samples(["a.wav"] * 3, n=int))
    data = bytearray(path.read_bytes())
    if damage == "a header":
        data[data.index(b"s1.wav")] ^= 1
    elif damage == "more behind the end":
        data = data + data  # what `cat a.tar b.tar` makes: all readers stop at the first end
    elif damage == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            add("0.wav", size=9)(tar)
        data = bytearray(path.read_bytes())
    else:
        data = bytearray(b"this is no tar " * 100)
    path.write_bytes(data)
    with pytest.raises(AudioInputError, match=r"a.tar is no whole, uncompressed tar"):
        clips(open_source(path))


def test_a_tar_that_goes_backwards_ends(tmp_path: Path) -> None:
    """A negative size, which the format can write, would lead back to the same header for ever."""
    path = write_tar(tmp_path / "a.tar", {"0.wav": WAV, "1.wav": b"", "2.wav": b""})
    data = bytearray(path.read_bytes())
    header = data.index(b"1.wav")
    data[header + 124 : header + 136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 155] = b"%06o\0" % sum(data[header : header + 512])
    path.write_bytes(data)
    with pytest.raises(AudioInputError, match=r"a.tar"):
        clips(open_source(path))


def test_a_tar_that_changed_is_noticed(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", {"0.wav": WAV}))
    (row,) = clips(source)
    (tmp_path / "a.tar").write_bytes(b"short")
    with pytest.raises(AudioInputError, match=r"a.tar: 0.wav is cut off: the tar has changed"):
        source.open(row["locator"])


def test_a_tar_is_listed_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tars, "BATCH_CLIPS", 200)

    def peak(samples: int) -> int:
        members = [(f"{index}.wav", b"") for index in range(samples)]
        source = open_source(write_tar(tmp_path / f"{samples}.tar", members), columns=[])
        tracemalloc.start()
        assert sum(batch.num_rows for batch in source.batches()) == samples
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10)
    assert peak(4000) < 1.2 * peak(400)  # two batches: the next is made while one is held


def test_a_recording_is_read_at_its_place(tmp_path: Path) -> None:
    names = ["a.wav", "b.flac", "c.wav"]
    source = open_source(write_tar(tmp_path / "a.tar", tar_samples(names)))
    rows = clips(source)
    for row, name in reversed(list(zip(rows, names, strict=True))):
        assert source.open(row["locator"]) == sound_file(name)
        np.testing.assert_array_equal(load_audio(source.open(row["locator"])).samples, sound(name))
