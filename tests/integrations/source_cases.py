"""Sources of every kind, made of small real audio files, for the tests of `audiotok.integrations.sources`."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from audiotok.audio import load_audio
from audiotok.integrations.sources import Source, open_source

RATE = 16_000
# Paths in the order of `sorted`, which is not the order in which folders are walked: "-" < "." < "/".
NAMES = ("a-1.wav", "a.flac", "a.wav", "a/one.wav", "a/two/deep.WAV", "b.wav")


def sound(name: str) -> np.ndarray:
    """`[1, N]`; tells one file from another by length and samples. FLAC and WAV keep it as it is."""
    rng = np.random.default_rng(sum(name.encode()))
    return (rng.integers(-3000, 3000, (1, 100 + len(name))) / 32768).astype(np.float32)


def sound_file(name: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(name)[0], RATE, format=name.rpartition(".")[2].upper(), subtype="PCM_16")
    return file.getvalue()


def write_sounds(folder: Path, names: Sequence[str] = NAMES) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound_file(name))
    return folder


def write_csv(path: Path, rows: Sequence[Sequence[object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_tar(path: Path, files: dict[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_samples(names: Sequence[str], **fields: Callable[[int], Any]) -> dict[str, bytes]:
    """Members of a tar: `s0.wav`, `s0.json`, `s0.txt`, `s1.flac`, ..."""
    members: dict[str, bytes] = {}
    for index, name in enumerate(names):
        members[f"s{index}.{name.rpartition('.')[2]}"] = sound_file(name)
        members[f"s{index}.json"] = json.dumps({key: value(index) for key, value in fields.items()}).encode()
        members[f"s{index}.txt"] = f"text {index}".encode()
    return members


def file_structs(names: Sequence[str] = NAMES) -> pa.Array:
    """As `datasets` writes recordings into Parquet."""
    return pa.array([{"bytes": sound_file(name), "path": name} for name in names])


def mirror(folder: Path, url: str) -> str:
    """Copy a folder to `memory://`."""
    fs, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


class Case(NamedTuple):
    """How to open a source, and its clips: id -> name of the sound."""

    open: Callable[[], Source]
    ids: dict[str, str]
    kind: str


def numbered(names: Sequence[str] = NAMES, form: str = "{}") -> dict[str, str]:
    return {form.format(index): name for index, name in enumerate(names)}


def clips(source: Source) -> list[dict[str, Any]]:
    return [row for batch in source.batches() for row in batch.to_pylist()]


def ids(source: Source) -> list[str]:
    return [row["id"] for row in clips(source)]


def sounds(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """Id and samples `[1, N]` of every clip."""
    for row in clips(source):
        yield row["id"], load_audio(source.open(row["locator"])).samples


# One function a kind: makes it in a folder


def folder(path: Path) -> Case:
    (write_sounds(path) / "readme.txt").write_text("no audio")
    return Case(lambda: open_source(path), {name: name for name in NAMES}, "folder")


def glob(path: Path) -> Case:
    write_sounds(path)
    chosen = {name: name for name in NAMES if name.lower().endswith(".wav")}
    return Case(lambda: open_source(f"{path}/**/*.[wW][aA][vV]"), chosen, "folder")


def one_file(path: Path) -> Case:
    write_sounds(path)
    return Case(lambda: open_source(path / "a/one.wav"), {"one.wav": "a/one.wav"}, "folder")


def csv_manifest(path: Path) -> Case:
    rows = [["path", "utt_id", "text"], *([name, f"00{index}", "one,\n two"] for index, name in enumerate(NAMES))]
    manifest = write_csv(write_sounds(path) / "all.csv", rows)
    return Case(lambda: open_source(manifest), numbered(form="00{}"), "manifest")


def tsv_manifest(path: Path) -> Case:
    lines = ["audio\ttext", *(f'{path}/{name}\tsays "yes' for name in write_sounds(path) and NAMES)]
    (path / "all.tsv").write_text("\n".join(lines))
    return Case(lambda: open_source(path / "all.tsv"), {f"{path}/{name}": name for name in NAMES}, "manifest")


def json_manifest(path: Path) -> Case:
    rows = [{"audio_filepath": name, "speaker": index, "words": [name]} for index, name in enumerate(NAMES)]
    (path / "meta").mkdir(parents=True)
    (path / "meta/all.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    write_sounds(path / "clips")
    opened = lambda: open_source(path / "meta/all.jsonl", audio_root=str(path / "clips"))  # noqa: E731
    return Case(opened, {name: name for name in NAMES}, "manifest")


def parquet_of_paths(path: Path) -> Case:
    table = pa.table({"wav": NAMES, "key": pa.array(range(len(NAMES)), pa.int16()), "text": ["x"] * len(NAMES)})
    pq.write_table(table, write_sounds(path) / "all.parquet", row_group_size=4)
    return Case(lambda: open_source(path / "all.parquet"), numbered(), "manifest")


def parquet_of_files(path: Path) -> Case:
    path.mkdir(exist_ok=True)
    for part, names in enumerate((NAMES[:4], NAMES[4:])):
        table = pa.table({"audio": file_structs(names), "n": pa.array(range(len(names)), pa.uint8())})
        pq.write_table(table, path / f"part-{part}.parquet", row_group_size=3)
    return Case(lambda: open_source(path), {name: name for name in NAMES}, "manifest")


def parquet_of_bytes(path: Path) -> Case:
    path.mkdir(exist_ok=True)
    pq.write_table(pa.table({"audio": [sound_file(name) for name in NAMES]}), path / "all.parquet")
    return Case(lambda: open_source(f"{path}/*.parquet"), numbered(form="all.parquet/{}"), "manifest")


def parquet_of_arrays(path: Path) -> Case:
    path.mkdir(exist_ok=True)
    rates = pa.array([RATE] * len(NAMES), pa.int32())
    table = pa.table({"audio": [sound(name)[0] for name in NAMES], "sampling_rate": rates, "id": NAMES})
    pq.write_table(table, path / "all.parquet")
    return Case(lambda: open_source(path / "all.parquet"), {name: name for name in NAMES}, "manifest")


def dataset(path: Path) -> Case:
    paths = [str(write_sounds(path) / name) for name in NAMES]
    rows = datasets.Dataset.from_dict({"sound": paths, "label": list(range(len(NAMES)))})
    rows = rows.cast_column("sound", datasets.Audio()).cast_column("label", datasets.ClassLabel(num_classes=9))
    return Case(lambda: open_source(rows), {f"{path}/{name}": name for name in NAMES}, "dataset")


def shuffled_dataset(path: Path) -> Case:
    table = pa.table({"audio": file_structs(), "label": range(len(NAMES))})
    rows = datasets.Dataset(table).select([3, 1, 0, 2, 5, 4]).with_format("numpy")
    return Case(lambda: open_source(rows), {NAMES[row]: NAMES[row] for row in (3, 1, 0, 2, 5, 4)}, "dataset")


def dataset_of_waveforms(path: Path) -> Case:
    waves = [{"array": sound(name)[0], "sampling_rate": RATE} for name in NAMES]
    rows = datasets.Dataset.from_dict({"audio": waves})
    return Case(lambda: open_source(rows), numbered(), "dataset")


def saved_dataset(path: Path) -> Case:
    # `save_to_disk` keeps the last part of a path only, which is no id here.
    rows = datasets.Dataset(pa.table({"audio": file_structs(), "id": NAMES})).cast_column("audio", datasets.Audio())
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(path)
    return Case(lambda: open_source(path, split="train"), {name: name for name in NAMES}, "dataset")


def tar(path: Path) -> Case:
    path.mkdir(exist_ok=True)
    write_tar(path / "all.tar", tar_samples(NAMES, speaker=str))
    return Case(lambda: open_source(path / "all.tar"), numbered(form="all.tar/s{}"), "tar")


def tars(path: Path) -> Case:
    (path / "part").mkdir(parents=True)
    write_tar(path / "part/0.tar", tar_samples(NAMES[:2]))
    write_tar(path / "part/1.tar", tar_samples(NAMES[2:]))
    first, second = numbered(NAMES[:2], "part/0.tar/s{}"), numbered(NAMES[2:], "part/1.tar/s{}")
    return Case(lambda: open_source(path), first | second, "tar")


def remote_folder(path: Path) -> Case:
    url = mirror(write_sounds(path), "memory://folder")
    return Case(lambda: open_source(url), {name: name for name in NAMES}, "folder")


def remote_manifest(path: Path) -> Case:
    rows = [["file"], *([f"memory://manifest/clips/{name}"] for name in NAMES)]
    write_csv(write_sounds(path / "clips").parent / "all.csv", rows)
    url = mirror(path, "memory://manifest")
    names = {f"memory://manifest/clips/{name}": name for name in NAMES}
    return Case(lambda: open_source(f"{url}/all.csv"), names, "manifest")


def remote_parquet(path: Path) -> Case:
    url = mirror(parquet_of_files(path).open() and path, "memory://parquet")
    return Case(lambda: open_source(f"{url}/*.parquet"), {name: name for name in NAMES}, "manifest")


def remote_tars(path: Path) -> Case:
    case = tars(path)
    url = mirror(path, "memory://tars")
    return Case(lambda: open_source(f"{url}/**/*.tar"), case.ids, "tar")


CASES = (
    folder,
    glob,
    one_file,
    csv_manifest,
    tsv_manifest,
    json_manifest,
    parquet_of_paths,
    parquet_of_files,
    parquet_of_bytes,
    parquet_of_arrays,
    dataset,
    shuffled_dataset,
    dataset_of_waveforms,
    saved_dataset,
    tar,
    tars,
    remote_folder,
    remote_manifest,
    remote_parquet,
    remote_tars,
)
