"""The benchmark of the corpus engine runs, what it says can be parsed, and it sees what it is there to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from audiotok.certified import encode_certified
from audiotok.errors import OptionError, OutputError, OutputExistsError
from audiotok.integrations.corpus_record import Settings
from audiotok.integrations.corpus_run import CorpusRun
from audiotok.recipes import benchmark_corpus as bench
from audiotok.recipes import corpus_measures as measures
from audiotok.recipes.benchmark_measures import Timing
from audiotok.recipes.benchmark_models import MINI, load_tokenizer
from audiotok.recipes.corpus_certainty import CertifyRow, measure_certainty
from audiotok.recipes.corpus_kills import KillsReport, compare_rows
from audiotok.recipes.corpus_measures import CodesBeside, SideTimes, SpeedReport, Workload
from audiotok.recipes.corpus_rows import (
    SHORT_FRAMES,
    DrawnCodes,
    NumberedClips,
    RowsReport,
    Stage,
    measure_windows,
    measure_writing,
    plan_rows,
    write_rows,
)

TINY = str(Path(bench.__file__).parent / "configs" / "auv_tiny_test.yaml")


def write_recordings(folder: Path, count: int) -> list[Path]:
    """Noise of different lengths, rates and channels."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        samples = 0.1 * rng.standard_normal((int(rng.integers(2000, 9000)), 1 + i % 2))
        soundfile.write(folder / f"{i}.wav", samples, (16000, 22050, 8000)[i % 3])
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_recordings(tmp_path_factory.mktemp("data") / "recordings", 6)


@pytest.fixture(scope="module")
def load(recordings: list[Path]) -> Iterator[Workload]:
    with measures.workload(load_tokenizer(TINY), recordings, 2) as (load, _):
        yield load


@pytest.fixture(scope="module")
def corpus(load: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engine makes of the recordings."""
    output = tmp_path_factory.mktemp("corpus")
    assert CorpusRun(load.source(), load.tokenizer(), output, Settings(downmix=load.downmix)).run().finished
    return output


@pytest.fixture(scope="module")
def plain(load: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plain recipe makes of them."""
    output = tmp_path_factory.mktemp("plain") / "codes.parquet"
    began, ended = measures.plain_recipe(load, output, decodes=True)
    assert began < ended
    return output


# Speed


def test_engine_and_plain_recipe_agree(corpus: Path, plain: Path) -> None:
    found = measures.compare_codes(corpus, plain, variable_depth=False)
    rows = pq.read_table(corpus / "data").to_pylist()
    assert found.total == sum(len(row["codes"]) for row in rows) > 50 and len(rows) == 6
    # soxr.resample makes 4686 samples of one clip, 1.wav, where its 6458 at 22,050 Hz last 4686.1 at 16,000.
    assert (found.differing, found.cut_clips) == (0, 1) and found.cut_codes <= 1


def test_codes_that_differ_are_counted(corpus: Path, plain: Path, tmp_path: Path) -> None:
    rows = {row["id"]: row for row in pq.read_table(plain).to_pylist()}
    before = measures.compare_codes(corpus, plain, variable_depth=False)
    lengths = {name: len(row["codes"][0]) for name, row in rows.items()}
    rows["0"]["codes"][0][1] += 1  # another code
    rows["2"]["codes"] = [rows["2"]["codes"][0][:-1]]  # a frame less
    rows["3"]["id"] = "another"  # only here, and only there
    rows["1"]["codes"][0][0] += 1  # where a sample is missing
    pq.write_table(pa.Table.from_pylist(list(rows.values())), tmp_path / "other.parquet")
    found = measures.compare_codes(corpus, tmp_path / "other.parquet", variable_depth=False)
    assert found.differing == 1 + lengths["2"] + 2 * lengths["3"]
    assert (found.cut_clips, found.cut_codes) == (1, before.cut_codes + 1)


def test_depths_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clip = {"id": "0", "codes": np.array([[1, 2], [3, 0]]), "depths": np.array([2, 1]), "audio_length": 9}
    monkeypatch.setattr(measures, "read", lambda corpus: [clip])
    for codes, expected in (([[1, 2], [3, -1]], 0), ([[1, 2], [3, 0]], 1)):
        row = {"id": "0", "codes": codes, "num_samples": 9}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "plain.parquet")
        found = measures.compare_codes(tmp_path, tmp_path / "plain.parquet", variable_depth=True)
        assert found == CodesBeside(total=4, differing=expected)


def test_work_of_a_process_is_from_its_lock_to_its_last_shard(tmp_path: Path) -> None:
    times = {
        ".run/rank-00000-of-00002.json": 100.0,
        ".run/rank-00001-of-00002.json": 103.0,
        "data/train-00000-00000.parquet": 104.0,
        "data/train-00002-00000.parquet": 106.0,
        "data/train-00001-00000.parquet": 110.0,
    }
    for name, when in times.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (when, when))
    assert measures.engine_spans(tmp_path, 2) == [(100.0, 106.0), (103.0, 110.0)]


def test_shares_of_processes_are_all_clips_once(load: Workload) -> None:
    shares = [list(measures.decoded_share(load, rank, 16000)) for rank in range(2)]
    assert all(clip.shape[0] == 1 for share in shares for clip in share)
    whole = list(measures.decoded_share(replace(load, processes=1), 0, 16000))
    together = sorted(clip.shape[1] for share in shares for clip in share)
    assert together == sorted(clip.shape[1] for clip in whole) and len(whole) == 6


def test_sides_are_timed_and_compared() -> None:
    sides = {measures.ENGINE: SideTimes(2.0, 5.0, 4.0), measures.PLAIN: SideTimes(8.0, 12.0, 9.0)}
    report = SpeedReport("tiny", 2, 6, 0, 40.0, sides, CodesBeside(100))
    assert report.rate(measures.ENGINE) == 20 and report.ratio(measures.PLAIN) == 4
    assert sides[measures.ENGINE].around == 3


@pytest.mark.slow
def test_a_run_that_fails_says_why(load: Workload, tmp_path: Path) -> None:
    """A leader and its two processes, each of which imports PyTorch."""
    with pytest.raises(OutputError, match=r"exit code .*no-such-model"):
        measures.engine_work(replace(load, model=str(tmp_path / "no-such-model")), tmp_path / "out")


def test_threads_of_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(measures.THREADS_VARIABLE, "7")
    with measures.threads_of_children(None):
        assert measures.THREADS_VARIABLE not in os.environ
    with measures.threads_of_children(1):
        assert os.environ[measures.THREADS_VARIABLE] == "1"
    assert os.environ[measures.THREADS_VARIABLE] == "7"


# Certainty


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_batches_have_the_canonical_codes(load: Workload, threads: None) -> None:
    rows = measure_certainty(load, batch_seconds=1.0, repeats=1)
    assert [(row.way, row.threads) for row in rows] == [
        ("alone", 1),
        ("batches", 1),
        ("alone", 2),
        ("batches", 2),
    ]
    for row in rows:
        assert row.differing == 0 and row.codes > 50 and row.clips == 6 and row.certified.wall > 0
        assert (row.cost is None) == (row.way == "alone") == (row.padding == 0)
        assert 0 <= row.padding < 0.5


def test_batches_that_are_not_exact_are_seen(load: Workload, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(codec: object, values: torch.Tensor, mask: torch.Tensor, **options: object) -> object:
        output, certificate = encode_certified(codec, values, mask, **options)  # type: ignore[arg-type]
        if len(values) > 1:
            output.audio_codes[0, 0, 0] ^= 1
        return output, replace(certificate, num_reencoded=2)

    monkeypatch.setattr("audiotok.codec.AudioCodec.encode_certified", wrong)
    alone, batches = measure_certainty(load, batch_seconds=1.0, repeats=1)[:2]
    assert alone.differing == 0 and batches.uncertified == 0
    assert batches.differing >= 1 and batches.reencoded >= 2


# Rows


def test_rows_are_planned_written_and_not_written_again(tmp_path: Path) -> None:
    planned = plan_rows(300, str(tmp_path))
    first = write_rows(300, str(tmp_path))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus" / "data").iterdir()}
    again = write_rows(300, str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert all(stage.seconds > 0 and stage.peak >= stage.loaded > 0 for stage in (planned, first, again))
    table = pa.concat_tables(map(pq.read_table, sorted(shards)))
    assert table.num_rows == 300 and len(set(table["id"].to_pylist())) == 300
    assert all(len(codes) == SHORT_FRAMES for codes in table["codes"].to_pylist())


def test_drawn_clips_fit_the_codec() -> None:
    tokenizer = load_tokenizer(MINI)
    drawn, facts = DrawnCodes(tokenizer, 20), tokenizer.codec.facts
    clips = [done.codes for done in drawn.run([{"locator": i} for i in (0, 5, 10**9)])]
    assert all(clip is not None and clip.codes.shape == (facts.num_codebooks, 20) for clip in clips)
    assert all(clip is not None and facts.num_frames(clip.audio_length) == 20 for clip in clips)
    assert sum(len(batch) for batch in NumberedClips(10_000).batches()) == 10_000


def test_writing_and_windows_are_measured() -> None:
    short, long = measure_writing(rows=64, repeats=1)
    assert (short.codes_per_row, short.codes, long.codes) == (50, 3200, 32_000)
    assert short.shard.wall > short.parquet.wall > 0 and 1 < long.size < short.size
    windows = measure_windows(clips=20, repeats=1, window=1024, batch=4)
    assert windows.ids == 20 * 500 and windows.read == windows.ids // 1024 * 1024
    assert min(t.wall for t in (windows.exporting, windows.batches, windows.items, windows.copy)) > 0


# Kills


def test_rows_that_kills_cost_are_seen() -> None:
    rows = [{"id": str(i), "codes": [i, i]} for i in range(5)]
    expected = pa.Table.from_pylist(rows)
    assert compare_rows(expected, expected) == (0, 0, 0)
    found = [*rows[:3], rows[1], {"id": "3", "codes": [3, 4]}]
    assert compare_rows(expected, pa.Table.from_pylist(found)) == (1, 1, 1)
    assert compare_rows(expected, pa.Table.from_pylist([*rows, {"id": "new", "codes": [1]}])) == (0, 0, 1)


# The whole


def report_of(**found: list) -> bench.Report:
    return bench.Report({"settings": {"processes": 2, "batch_seconds": 5.0}, "models": {}}, **found)


def test_what_is_not_exact_fails() -> None:
    certain = CertifyRow("batches", 1, 100, 0, 3, 6, 1, Timing(2.0, 3.0), Timing(1.6, 2.0), 0.02)
    killed = KillsReport("tiny", 4, 1, 6, 0, 0, 0, 1.5, 1.5, 4, 9.0)
    assert report_of(certainty=[("tiny", certain)], kills=[killed]).exact
    assert certain.cost == pytest.approx(0.25) and certain.cpu_cost == pytest.approx(0.5)
    assert not report_of(certainty=[("tiny", replace(certain, differing=1))]).exact
    assert report_of(certainty=[("tiny", replace(certain, way="alone", differing=1))]).exact
    for fault in ("lost", "repeated", "changed"):
        assert not report_of(kills=[replace(killed, **{fault: 1})]).exact


def test_tables_say_what_was_found() -> None:
    sides = {measures.ENGINE: SideTimes(2.0, 5.0, 4.0), measures.PLAIN: SideTimes(8.0, 12.0, 9.0)}
    sides |= {measures.MODEL_ONLY: SideTimes(1.0, 3.0, 2.0), measures.READING: SideTimes(0.5, 3.0, 2.0)}
    stage = Stage(2.0, 100.0, 200.0)
    report = report_of(
        speed=[SpeedReport("tiny", 2, 6, 1, 40.0, sides, CodesBeside(100, 3, 1, 2))],
        certainty=[("tiny", CertifyRow("batches", 2, 100, 0, 3, 6, 1, Timing(2.0, 3.0), Timing(1.6, 2.0), 0.02))],
        kills=[KillsReport("tiny", 4, 1, 6, 0, 0, 0, 1.5, 2.0, 4, 9.0)],
        rows=[RowsReport(1_000_000, 50_000_000, stage, stage, stage)],
    )
    text = "\n".join(table.markdown() for table in bench.tables(report))
    assert "| tiny, plain map | 5.0 | 4.00 | 8.00 | 4.00 | 12.00 | 9.00 |" in text
    assert "| tiny | 20.0 | 40.0 | 80.0 | 26.7 | 0.50 | 0.75 |" in text
    assert "| tiny | 6 | 1 | 40.0 | 100 | 3 | 2 in 1 clips |" in text
    assert "| tiny, batches, 2 threads | 100 | 0 | 3 | 1 of 6 | 2.00 | +25.0 % | +50.0 % | 2.0 % |" in text
    assert "1.5 (at worst 2.0)" in text
    assert "| 1,000,000, planning | 2.00 | 2.0 | 100 | 200 | 105 |" in text
    assert json.loads(json.dumps(report.as_json()))["speed"][0]["ratios"][measures.PLAIN] == 4


def test_rates_are_of_both_clocks() -> None:
    assert bench._millions(3_000_000, Timing(wall=2.0, cpu=1.0)) == ["1.5", "3.0"]


def test_command_line_refuses_what_cannot_be_measured(tmp_path: Path) -> None:
    for options in ({"speed": True}, {"certify": True}, {"kills": 3}):
        with pytest.raises(OptionError, match="--data"):
            bench.run(**{"speed": False, "certify": False, **options})
    (tmp_path / "taken.json").touch()
    with pytest.raises(OutputExistsError):
        bench.run(speed=False, certify=False, json_file=tmp_path / "taken.json")


@pytest.mark.slow
def test_quick_run_agrees_and_can_be_parsed(recordings: list[Path], tmp_path: Path) -> None:
    """About twenty fresh processes, each of which imports PyTorch."""
    files = [tmp_path / "report.json", tmp_path / "report.md"]
    words = [TINY, "--data", recordings[0].parent, "--quick", "--processes", "2", "--kills", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "audiotok.recipes.benchmark_corpus", *words, "--json", files[0], "--markdown", files[1]],
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report, markdown = json.loads(files[0].read_text()), files[1].read_text()
    assert report["exact"] and report["about"]["settings"]["repeats"] == 1
    (speed,) = report["speed"]
    assert speed["clips"] == 6 and speed["failed"] == speed["codes"]["differing"] == 0 and speed["codes"]["total"] > 50
    assert all(side["command"] > side["work"] > 0 and side["cpu"] > 0 for side in speed["sides"].values())
    assert [row["differing"] for row in report["certainty"]] == [0, 0, 0, 0]
    (kills,) = report["kills"]
    assert kills["kills"] >= 2 and kills["rows"] == 6 and kills["lost"] == kills["repeated"] == kills["changed"] == 0
    assert [row["rows"] for row in report["rows"]] == [300] and len(report["writing"]) == 2
    for title in ("Speed", "Certified codes", "Runs that were killed", "Synthetic rows", "Writing", "Training windows"):
        assert f"### {title}" in markdown and title in done.stdout
