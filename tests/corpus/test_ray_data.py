"""Ray datasets: the rows of a corpus run, there once whatever dies.

What needs a cluster starts a real one, with two actors; the rest calls the parts that actors and driver are made of.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conformance.helpers import refused

from audiotok import AutoAudioTokenizer
from audiotok.errors import AudioInputError, MissingDependencyError, OptionError, OutputExistsError
from audiotok.integrations.codec_map import CodecMap, any_path
from audiotok.integrations.corpus_plan import id_hashes
from audiotok.integrations.corpus_record import Filters, Settings
from audiotok.integrations.corpus_run import CorpusRun
from audiotok.integrations.sources import SourceOptions, open_source
from corpus.corpora import rows_of
from corpus.map_fixtures import audio_cells, dataset_of, dying, expected_rows, recordings, saved, tiny

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "audiotok[ray]"')
pytest.importorskip("ray.data", reason='Ray Data is not installed: pip install "audiotok[ray]"')

from audiotok.integrations import ray_data  # noqa: E402
from audiotok.integrations.ray_data import RayPipeline, RaySource, RayTokenizer, tokenize_ray, write_ray  # noqa: E402

# Of Ray's own making: it warns of its own settings, and leaves files and sockets open at its end.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
BAD = {"bytes": b"no audio", "path": None}
SMALL = Settings(partitions=2, shard_clips=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer of variable depth."""
    return saved(tmp_path_factory.mktemp("saved") / "vrvq")


def clips(count: int = 7, bad: int | None = None) -> pa.Table:
    """Columns `key`, `text` and `audio`; one recording may be bad."""
    cells = audio_cells(tiny("vrvq"), count)
    if bad is not None:
        cells[bad] = BAD
    names = [f"utt-{i}" for i in range(count)]
    return pa.table({"key": names, "text": [f"text {name}" for name in names], "audio": cells})


def expected(count: int = 7, kept: tuple[str, ...] = ("text",)) -> dict[str, dict[str, Any]]:
    """Id → row."""
    tokenizer = tiny("vrvq")
    rows = expected_rows(tokenizer, [cell["bytes"] for cell in audio_cells(tokenizer, count)])
    texts = [{"text": f"text utt-{i}"} if "text" in kept else {} for i in range(count)]
    return {f"utt-{i}": {"id": f"utt-{i}", **row, **texts[i]} for i, row in enumerate(rows)}


def by_id(table: pa.Table) -> dict[str, dict[str, Any]]:
    rows = {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == len(table), "an id is there twice"
    return rows


def actor(codes: CodecMap, **more: Any) -> RayTokenizer:
    return RayTokenizer(codes, "audio", "key", ["text"], any_path(None), **more)


# Without a cluster


def test_an_actor_gives_rows_of_a_corpus() -> None:
    rows = actor(CodecMap(tiny("vrvq")))(clips())
    assert rows.schema.field("codes").type == pa.list_(pa.uint16())
    assert rows.schema.field("depths").type == pa.list_(pa.uint8())
    assert rows.schema.names == ["id", "codes", "depths", "num_frames", "audio_length", "duration", "text"]
    assert by_id(rows) == expected()


def test_rows_are_those_of_the_engine(tmp_path: Path) -> None:
    """Columns, their types and what stands in them."""
    dataset = dataset_of(tiny("vrvq"))
    source = open_source(dataset, id_column="key")
    CorpusRun(source, tiny("vrvq"), tmp_path, Settings(partitions=1)).run()
    (shard,) = (tmp_path / "data").iterdir()
    rows = actor(CodecMap(tiny("vrvq")))(dataset.with_format("arrow")[:])
    assert rows.schema.remove_metadata() == pq.read_schema(shard).remove_metadata()
    assert by_id(rows) == by_id(pq.read_table(shard))


def test_arrays_as_ray_holds_them() -> None:
    from ray.data.extensions import ArrowVariableShapedTensorArray

    tokenizer = tiny("vrvq")
    arrays = ArrowVariableShapedTensorArray.from_numpy(np.array([*recordings(tokenizer, 7), None], dtype=object)[:-1])
    table = pa.table({"key": [f"utt-{i}" for i in range(7)], "audio": arrays, "sample_rate": [8000] * 7})
    codes = CodecMap(tokenizer)
    rows = RayTokenizer(codes, "audio", "key", [], any_path(None))(table)
    assert by_id(rows) == expected(kept=())


class Listed:
    """A source whose rows come back as Ray's would: in any order, some of them twice, some not at all."""

    schema = pa.schema([("text", pa.string())])

    def where(self, locator: str) -> str:
        return locator


def came_back(monkeypatch: pytest.MonkeyPatch, tables: list[pa.Table]) -> Iterator[Any]:
    class Rows:
        def iter_batches(self, **options: Any) -> Iterator[pa.Table]:
            return iter(tables)

    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray_data, "_map", lambda *args, **options: Rows())
    pipeline = RayPipeline(Listed(), CodecMap(tiny("vrvq")), tiny("vrvq"), None, 0, 4)
    return pipeline.run([{"id": f"utt-{i}", "__partition": i % 2} for i in range(7)])


def test_a_clip_that_comes_twice_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first clip of a batch, with which its certificate would come, has failed."""
    rows = actor(CodecMap(tiny("vrvq"), on_error="null"), note=True)(clips(bad=0))
    found = list(came_back(monkeypatch, [rows[4:], rows[:3], rows[1:5], rows]))
    assert [one.clip["id"] for one in found] == [f"utt-{i}" for i in (4, 5, 6, 0, 1, 2, 3)]
    assert {one.clip["__partition"] for one in found if one.clip["id"] in ("utt-1", "utt-3")} == {1}
    assert [(one.clip["id"], one.failure.error) for one in found if one.failure] == [("utt-0", "NotAudioError")]
    assert sum(one.certified.clips for one in found if one.certified) == 6


def test_a_clip_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = actor(CodecMap(tiny("vrvq"), on_error="null"), note=True)(clips())
    with refused(AudioInputError, "1 clips", "utt-6", "max_errored_blocks"):
        list(came_back(monkeypatch, [rows[:6]]))


def test_an_actor_leaves_out_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    codes = CodecMap(tiny("vrvq"))
    wanted = np.sort(id_hashes(["utt-2", "utt-5", "of another batch"]))
    assert actor(codes, only=wanted)(clips())["id"].to_pylist() == ["utt-2", "utt-5"]
    nothing = actor(codes, only=np.empty(0, np.uint64), note=True)(clips())
    assert len(nothing) == 0 and nothing.schema.field("codes").type == pa.list_(pa.uint16())


def test_ray_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "audiotok.integrations.ray_data")
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused(MissingDependencyError, "audiotok[ray]"):
        import audiotok.integrations.ray_data  # noqa: F401


# On a cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two cores, workers that import the tests, and a token of its own."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(os.urandom(32).hex())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        paths = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False, runtime_env=paths
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


@pytest.mark.slow
def test_a_run_of_two_actors_one_of_which_dies(
    cluster: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are there once; the same call again does nothing; what is added is added."""
    marker = tmp_path / "died"
    monkeypatch.setattr(ray_data, "RayTokenizer", dying(str(marker)))
    out = tmp_path / "codes"

    def write(table: pa.Table, **options: Any) -> Any:
        dataset = ray.data.from_arrow([table[i : i + 1] for i in range(len(table))])
        return write_ray(dataset, folder, out, settings=SMALL, num_actors=2, batch_size=1, **options)

    outcome = write(clips(7, bad=5))
    assert marker.exists() and outcome.finished and outcome.totals["failures"] == 1
    whole = expected()
    assert rows_of(out) == {key: row for key, row in whole.items() if key != "utt-5"}
    assert (out / "errors.jsonl").read_text().count("utt-5") == 2  # id and place
    assert outcome.totals["certified"]["clips"] == 6
    assert outcome.totals["made_with"][0]["dtype"] == "float32"
    shards = {path.name: path.stat().st_mtime_ns for path in (out / "data").iterdir()}

    again = write(clips(7, bad=5))
    assert again.finished and again.progress.clips == 0 and again.progress.already == 7
    assert {path.name: path.stat().st_mtime_ns for path in (out / "data").iterdir()} == shards

    grown = write(clips(9), retry_errors=True)
    assert grown.finished and grown.progress.clips == 3
    assert rows_of(out) == expected(9)

    with refused(OutputExistsError, "min_duration"):
        write_ray(
            ray.data.from_arrow(clips()), folder, out, settings=Settings(filters=Filters(min_duration=1), partitions=2)
        )


@pytest.mark.slow
def test_a_dataset_of_rows(cluster: None, folder: Path, tmp_path: Path) -> None:
    """Lazy; read by `datasets` and Parquet as a corpus is; an error is that of the recording."""
    import datasets

    rows = tokenize_ray(ray.data.from_arrow(clips(7, bad=5)), folder, on_error="null", batch_size=3, num_actors=1)
    rows.write_parquet(str(tmp_path / "rows"), mode="overwrite")
    table = pq.read_table(tmp_path / "rows")
    found = by_id(table)
    assert found["utt-5"]["codes"] is None and found["utt-5"]["error"].startswith("NotAudioError: ")
    whole = expected()
    assert all({**found[key], **row} == found[key] for key, row in whole.items() if key != "utt-5")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "rows" / "*.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded.features["codes"] == datasets.List(datasets.Value("uint16"))

    bad = tokenize_ray(ray.data.from_arrow(clips(2, bad=1)), AutoAudioTokenizer.from_pretrained(folder), num_actors=1)
    with pytest.raises(Exception, match="the clip 'utt-1' of the Ray dataset"):
        bad.materialize()


@pytest.mark.slow
def test_columns_of_a_dataset(cluster: None, folder: Path) -> None:
    assert RaySource(ray.data.from_arrow(clips()), SourceOptions()).describe() == {
        "kind": "ray",
        "audio_column": "audio",
        "id_column": "key",
        "columns": {"text": "string"},
    }
    assert RaySource(ray.data.from_items([{"path": "a.wav"}]), SourceOptions()).id == "path"
    with refused(OptionError, "no column of ids", "id_column=", "text, audio"):
        RaySource(ray.data.from_arrow(clips().drop_columns(["key"])), SourceOptions())
    with refused(OptionError, "has none of the columns"):
        RaySource(ray.data.from_items([{"id": "a"}]), SourceOptions())
    with refused(OptionError, "holds no recordings"):
        RaySource(ray.data.from_items([{"id": "a", "audio": 1}]), SourceOptions())
    tensors = ray.data.from_items([{"id": "a", "audio": np.zeros(9), "sample_rate": 8000, "extra": np.zeros((2, 2))}])
    assert RaySource(tensors, SourceOptions()).schema.names == ["sample_rate"]
    with refused(OptionError, "no rows"):
        RaySource(ray.data.from_items([]), SourceOptions())
    twins = pa.concat_tables([clips(2), clips(1)])
    with refused(AudioInputError, "Two clips have the id 'utt-0'"):
        write_ray(ray.data.from_arrow(twins), folder, "memory://twins", settings=SMALL)
