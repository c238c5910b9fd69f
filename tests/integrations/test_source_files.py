"""Folders, globs and file systems: what is walked, in which order, and what is not followed."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiotok.audio import load_audio
from audiotok.errors import (
    AudioFileNotFoundError,
    AudioInputError,
    AudioIsDirectoryError,
    AudioNotReadableError,
    MissingDependencyError,
)
from audiotok.integrations import source_storage
from audiotok.integrations.source_files import AUDIO_EXTENSIONS, extension, walk
from audiotok.integrations.source_storage import Entry, LocalFiles, RemoteFiles, locate
from audiotok.integrations.sources import open_source
from integrations.source_cases import NAMES, clips, ids, mirror, sound, sound_file, write_sounds


@pytest.fixture(autouse=True)
def no_memory_files() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


# Walking

FOLDER_NAMES = st.text("ab-./z~é", min_size=1, max_size=3).map(lambda name: name.replace("/", "_"))
TREES = st.recursive(st.none(), lambda inner: st.dictionaries(FOLDER_NAMES, inner, max_size=4), max_leaves=12)


class Tree(LocalFiles):
    """A file system in nested dictionaries; None is a file."""

    def __init__(self, root: dict) -> None:
        self.root = root

    def at(self, path: str) -> dict:
        node = self.root
        for part in path.split("/")[1:]:
            node = node[part]
        return node

    def entries(self, folder: str) -> list[Entry]:
        return [Entry(name, node is not None) for name, node in self.at(folder).items()]

    def identity(self, folder: str) -> object:
        return folder


@given(TREES.filter(lambda tree: tree is not None))
def test_files_come_in_the_order_of_their_paths(tree: dict) -> None:
    def paths(node: dict, prefix: str) -> Iterator[str]:
        for name, inner in node.items():
            if inner is None:
                yield prefix + name
            else:
                yield from paths(inner, f"{prefix}{name}/")

    assert list(walk(Tree(tree), "root")) == sorted(paths(tree, ""))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", ["a-1.wav", "a.flac", "a.wav", "b.wav"]),
        ("*.wav", ["a-1.wav", "a.wav", "b.wav"]),
        ("?.wav", ["a.wav", "b.wav"]),
        ("[!a]*", ["b.wav"]),
        ("**", [*NAMES]),
        ("**/*", [*NAMES]),
        ("**/*.WAV", ["a/two/deep.WAV"]),
        ("*/*.wav", ["a/one.wav"]),
        ("a*/**/d*", ["a/two/deep.WAV"]),
        ("a/*", ["one.wav"]),
        ("a/**/*", ["one.wav", "two/deep.WAV"]),
        ("a/*/*", ["two/deep.WAV"]),
        ("**/two/*", ["a/two/deep.WAV"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, found: list[str], remote: bool) -> None:
    """Ids begin behind the fixed part."""
    write_sounds(tmp_path)
    root = mirror(tmp_path, "memory://globs") if remote else str(tmp_path)
    assert ids(open_source(f"{root}/{pattern}")) == found


def test_globs_enter_no_folder_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sounds(tmp_path, ["a/x/1.wav", "a/x/y/2.wav", "b/x/3.wav", "c.wav"])
    entered = []
    entries = LocalFiles.entries
    monkeypatch.setattr(LocalFiles, "entries", lambda self, path: entered.append(path) or entries(self, path))
    source = open_source(f"{tmp_path}/[a]/*/*")
    entered.clear()
    assert ids(source) == ["a/x/1.wav"]
    assert entered == [f"{tmp_path}", f"{tmp_path}/a", f"{tmp_path}/a/x"]


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_sounds(tmp_path / "all", ["clips/a.wav"]))
    folder, glob = open_source("clips"), open_source("./cl*/../clips/*.wav")
    monkeypatch.chdir(tmp_path)
    for source in (folder, glob):
        assert load_audio(source.open(ids(source)[0])).num_samples
    assert folder.where("a.wav") == "clips/a.wav"
    assert folder.describe()["path"] == f"{tmp_path}/all/clips"


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    write_sounds(tmp_path, ["a.wav", ".b.wav", ".c/d.wav", "e/.f.wav", "e/._g.wav"])
    assert ids(open_source(tmp_path)) == ids(open_source(f"{tmp_path}/**/*")) == ["a.wav"]
    assert ids(open_source(f"{tmp_path}/.c/*")) == ["d.wav"]  # asked for


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_sounds(tmp_path / "all", ["a/1.wav", "b/2.wav"])
    write_sounds(tmp_path / "outside", ["3.wav"])
    (tmp_path / "all/a/up").symlink_to(tmp_path / "all")
    (tmp_path / "all/a/self").symlink_to("self")
    (tmp_path / "all/a/b").symlink_to(tmp_path / "all/b")
    (tmp_path / "all/b/a").symlink_to(tmp_path / "all/a")
    (tmp_path / "all/out").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(tmp_path / "all")
    found = ["a/1.wav", "a/b/2.wav", "b/2.wav", "b/a/1.wav", "out/3.wav"]
    for folder in ("all", "link"):
        source = open_source(tmp_path / folder)
        assert ids(source) == found
        np.testing.assert_array_equal(load_audio(source.open("out/3.wav")).samples, sound("3.wav"))


def test_what_is_no_file_is_no_clip_or_a_named_failure(tmp_path: Path) -> None:
    write_sounds(tmp_path, ["a.wav", "z.wav/b.wav"])
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "broken.wav").symlink_to("nowhere")
    (tmp_path / "round.wav").symlink_to("round.wav")
    (tmp_path / "to-pipe.wav").symlink_to("pipe.wav")
    source = open_source(tmp_path)
    assert ids(source) == ["a.wav", "broken.wav", "round.wav", "to-pipe.wav", "z.wav/b.wav"]
    for locator, error in (
        ("broken.wav", AudioFileNotFoundError),
        ("round.wav", AudioNotReadableError),
        ("to-pipe.wav", AudioNotReadableError),
        ("pipe.wav", AudioNotReadableError),
        ("z.wav", AudioIsDirectoryError),
        ("gone.wav", AudioFileNotFoundError),
    ):
        with pytest.raises(error, match=locator):
            source.open(locator)


def test_an_unreadable_folder_is_named(tmp_path: Path, without_root: Callable[[], AbstractContextManager]) -> None:
    write_sounds(tmp_path, ["a/1.wav", "locked/2.wav", "z.wav"])
    for folder in (*tmp_path.parents[:2], tmp_path):
        folder.chmod(0o755)
    (tmp_path / "locked").chmod(0)
    source = open_source(tmp_path)
    with without_root(), pytest.raises(AudioNotReadableError, match=r"locked cannot be read"):
        clips(source)
    (tmp_path / "locked").chmod(0o755)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (write_sounds(tmp_path, ["é.wav"]) / os.fsdecode(b"\xff.wav")).write_bytes(b"")
    with pytest.raises(AudioInputError, match=r"\\xff\.wav' is not UTF-8"):
        clips(open_source(tmp_path))
    assert ids(open_source(f"{tmp_path}/é*")) == ["é.wav"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.WAV", "wav"),
        ("a.b.Flac", "flac"),
        ("d.x/a", ""),
        (".wav", ""),
        ("a.", ""),
        ("x/.wav", ""),
        ("a..wav", "wav"),
    ],
)
def test_extension(path: str, found: str) -> None:
    assert extension(path) == found


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "au", "caf", "w64", "rf64", "opus"])
def test_what_libsndfile_reads_is_audio(tmp_path: Path, suffix: str) -> None:
    assert suffix in AUDIO_EXTENSIONS
    (tmp_path / f"x.{suffix.upper()}").write_bytes(b"")
    assert ids(open_source(tmp_path)) == [f"x.{suffix.upper()}"]


def test_a_folder_is_listed_in_bounded_memory(tmp_path: Path) -> None:
    """Twenty times the folders, the same peak."""

    def peak(folders: int) -> int:
        root = tmp_path / str(folders)
        for folder in range(folders):
            (root / str(folder)).mkdir(parents=True)
            for file in range(50):
                (root / f"{folder}/{file}.wav").touch()
        source = open_source(root)
        tracemalloc.start()
        assert sum(batch.num_rows for batch in source.batches()) == 50 * folders
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(1)
    assert peak(100) < peak(5) + 1_500_000  # a batch of 4096 names


# File systems


def test_urls_of_local_files_are_local(tmp_path: Path) -> None:
    write_sounds(tmp_path, ["a.wav"])
    files, path = locate(f"file://{tmp_path}")
    assert (files, path) == (LocalFiles(), str(tmp_path))
    assert ids(open_source(f"file://{tmp_path}")) == ["a.wav"]


def test_errors_of_a_store_name_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class StrangeError(Exception):
        pass

    def fail(*args: object, **options: object) -> None:
        raise StrangeError("no credentials")

    files = RemoteFiles(fsspec.filesystem("memory"))
    monkeypatch.setattr(type(files.fs), "isdir", fail)
    monkeypatch.setattr(type(files.fs), "cat_file", fail)
    for call in (lambda: open_source("memory://bucket/x"), lambda: files.read("/x", 0, 1)):
        with pytest.raises(AudioNotReadableError, match=r"x cannot be read \(StrangeError: no credentials"):
            call()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(source_storage, "url_to_fs", fail)
    with pytest.raises(MissingDependencyError, match="Install s3fs"):
        open_source("s3://bucket/x")


@pytest.mark.parametrize("remote", [False, True])
def test_long_recordings_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    """From the middle of a file, and whole ones of a store."""
    monkeypatch.setattr(source_storage, "LARGEST_WHOLE", 200)
    monkeypatch.setattr(source_storage, "_PIECE", 64)
    data = sound_file("a.wav")
    (tmp_path / "x").write_bytes(b"before" + data + b"behind")
    (tmp_path / "a.wav").write_bytes(data)
    root = mirror(tmp_path, "memory://pieces") if remote else str(tmp_path)
    files, folder = locate(root)
    part = files.part(f"{folder}/x", 6, len(data))
    assert part.seekable() and part.seek(0, os.SEEK_END) == len(data) and part.seek(-2, os.SEEK_CUR) == len(data) - 2
    assert part.read() == data[-2:]
    assert part.seek(0) == 0 and b"".join(iter(lambda: part.read(10), b"")) == data
    for recording in (part, files.recording(f"{folder}/a.wav")):
        np.testing.assert_array_equal(load_audio(recording).samples, sound("a.wav"))
    assert isinstance(files.part(f"{folder}/x", 6, 100), bytes)


def test_an_empty_store_object_is_no_folder_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores show a folder that was made by hand as an object of its own name."""
    fs = fsspec.filesystem("memory")
    infos = [{"name": "/all/", "type": "file", "size": 0}, {"name": "/all/a.wav", "type": "file", "size": 9}]
    monkeypatch.setattr(type(fs), "ls", lambda self, path, detail: infos)
    assert RemoteFiles(fs).entries("/all") == [Entry("a.wav", False)]


def test_ids_are_strings_of_arrow(tmp_path: Path) -> None:
    (batch,) = open_source(write_sounds(tmp_path, ["ü.wav"])).batches()
    assert batch.column("id") == pa.array(["ü.wav"])
