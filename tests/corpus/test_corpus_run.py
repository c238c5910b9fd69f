"""A corpus run: exactly once, with any number of processes, whatever its source and settings do between runs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conformance.codecs_table import FINITE, TABLE, shared_codec, tokenizer_of

from audiotok.errors import (
    AudioInputError,
    CodesError,
    OptionError,
    OutputError,
    OutputExistsError,
    OutputNotWritableError,
)
from audiotok.integrations import corpus_storage
from audiotok.integrations.corpus_plan import FirstClips, deal, id_hashes
from audiotok.integrations.corpus_record import Filters, Record
from audiotok.integrations.corpus_run import CorpusRun, Share, remove_corpus
from audiotok.integrations.corpus_shards import ShardName, Shards
from audiotok.integrations.corpus_storage import corpus_files
from audiotok.integrations.sources import open_source
from audiotok.saving import weights_digest
from corpus.corpora import (
    BROKEN,
    NUM_CLIPS,
    SMALL,
    corpus_run,
    errors_of,
    files_of,
    record_of,
    rows_as_bytes,
    rows_of,
    tiny_tokenizer,
    tokenize,
    write_recordings,
)

KILLS = 30


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"))


@pytest.fixture(scope="session")
def undisturbed(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert tokenize(recordings, output).finished
    return output


# What is written


@pytest.mark.parametrize("name", TABLE)
def test_rows_are_the_codes_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(shared_codec(name))
    rate = tokenizer.sampling_rate
    write_recordings(tmp_path / "in", 4, rate=rate, channels=tokenizer.codec.facts.channels)
    tokenize(tmp_path / "in", tmp_path / "out", tokenizer=tokenizer)
    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == [f"clip-{i:02d}.wav" for i in range(4)]
    paths = [tmp_path / "in" / name for name in sorted(rows)]
    for path, clip in zip(paths, tokenizer.encode_audio(paths), strict=True):
        row, ids = rows[path.name], tokenizer.codes_to_ids(clip.codes, clip.depths)
        assert row["audio_length"] == clip.audio_length == soundfile.info(path).frames
        assert row["duration"] == clip.audio_length / rate
        assert len(row["codes"]) <= len(ids)
        assert row.get("depths") == (None if clip.depths is None else clip.depths.tolist())
        if tokenizer.codec.facts.num_codebooks == 1:
            assert row["codes"] == ids.tolist()


def test_every_input_is_a_row_or_a_named_failure(undisturbed: Path) -> None:
    rows, (failure,) = rows_of(undisturbed), errors_of(undisturbed)
    assert len(rows) == NUM_CLIPS - 1 and BROKEN not in rows
    assert failure["id"] == BROKEN and failure["error"] == "NotAudioError" and BROKEN in failure["source"]
    totals = record_of(undisturbed)["totals"]
    assert totals["rows"] == len(rows) and totals["failures"] == 1
    assert totals["codes"] == sum(len(row["codes"]) for row in rows.values())
    assert totals["hours"] * 3600 == pytest.approx(sum(row["duration"] for row in rows.values()))
    used = {code for row in rows.values() for code in row["codes"]}
    assert totals["codebook_use"] == [pytest.approx(len(used) / 320, abs=1e-6)]


def test_the_record_says_what_made_the_codes(undisturbed: Path, recordings: Path) -> None:
    record, tokenizer = record_of(undisturbed), tiny_tokenizer()
    assert record["finished"] and record["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert record["tokenizer"]["weights"] == weights_digest(tokenizer.codec)
    assert record["source"]["path"] == str(recordings)
    (made_with,) = record["totals"]["made_with"]
    assert made_with["dtype"] == "float32" and made_with["device"] == "cpu"
    assert {"torch", "soxr", "soundfile", "libsndfile", "audiotok"} <= set(made_with)
    assert {path.name for path in (undisturbed / "tokenizer").iterdir()} >= {"config.json", "audio_tokenizer.json"}
    assert not list((undisturbed / "tokenizer").glob("*.safetensors"))


def test_weights_on_request_decode_the_corpus(recordings: Path, tmp_path: Path) -> None:
    from audiotok import AutoAudioTokenizer

    tokenize(recordings, tmp_path / "out", save_weights=True)
    again = AutoAudioTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    record = Record.read(corpus_files(tmp_path / "out"))
    assert record is not None
    record.check_decodes(again, "OUT")
    if again.codec.facts.num_codebooks > 1:
        record.check_decodes(again.with_layout("delay"), "OUT")


def test_another_tokenizer_does_not_decode(undisturbed: Path) -> None:
    record, other = Record.read(corpus_files(undisturbed)), tiny_tokenizer("auv_convnext")
    assert record is not None
    with pytest.raises(CodesError, match=rf"{tiny_tokenizer().fingerprint[:12]}.*{other.fingerprint[:12]}"):
        record.check_decodes(other, "OUT")


def test_columns_pass_through(tmp_path: Path) -> None:
    write_recordings(tmp_path / "in", 3)
    lines = [{"path": f"in/clip-0{i}.wav", "text": f"line {i}", "speaker": i, "tags": ["a", "b"][:i]} for i in range(3)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize(tmp_path / "list.jsonl", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [(rows[f"in/clip-0{i}.wav"][key]) for i in range(3) for key in ("text", "speaker", "tags")] == [
        value for line in lines for value in (line["text"], line["speaker"], line["tags"])
    ]


def test_the_public_readers_read_it(undisturbed: Path) -> None:
    import datasets

    found = datasets.load_dataset(
        "parquet", data_files=str(undisturbed / "data" / "*.parquet"), split="train", cache_dir=str(undisturbed / "c")
    )
    assert sorted(found["id"]) == sorted(rows_of(undisturbed))


# Again, and with others


def test_a_second_run_writes_nothing(recordings: Path, undisturbed: Path) -> None:
    before = files_of(undisturbed)
    outcome = tokenize(recordings, undisturbed)
    assert outcome.finished and outcome.progress.clips == 0 and outcome.totals == record_of(undisturbed)["totals"]
    assert files_of(undisturbed) == before


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_gives_the_same_rows(
    recordings: Path, undisturbed: Path, world: int, tmp_path: Path
) -> None:
    outcomes = [tokenize(recordings, tmp_path, share=Share(rank, world)) for rank in range(world)]
    assert [outcome.finished for outcome in outcomes] == [False] * (min(world, SMALL.partitions) - 1) + [True] * (
        len(outcomes) - min(world, SMALL.partitions) + 1
    )
    assert rows_as_bytes(tmp_path) == rows_as_bytes(undisturbed)
    assert errors_of(tmp_path) == errors_of(undisturbed)


def test_a_run_that_is_stopped_goes_on_with_another_number(recordings: Path, undisturbed: Path, tmp_path: Path) -> None:
    asked = iter(range(1000))
    stopped = tokenize(recordings, tmp_path, must_stop=lambda: next(asked) >= 5)
    assert stopped.stopped and not stopped.finished and 0 < len(rows_of(tmp_path)) < NUM_CLIPS - 1
    rest = [tokenize(recordings, tmp_path, share=Share(rank, 2)) for rank in range(2)]
    assert sum(outcome.progress.already for outcome in rest) == stopped.progress.clips
    assert rest[-1].finished and rows_as_bytes(tmp_path) == rows_as_bytes(undisturbed)


def test_a_source_that_has_grown(recordings: Path, undisturbed: Path, tmp_path: Path) -> None:
    write_recordings(tmp_path / "in", 6)
    assert tokenize(tmp_path / "in", tmp_path / "out").finished
    few = files_of(tmp_path / "out")
    write_recordings(tmp_path / "in", NUM_CLIPS - 6, first=6)
    outcome = tokenize(tmp_path / "in", tmp_path / "out")
    assert outcome.finished and outcome.progress.clips == NUM_CLIPS - 6
    assert rows_as_bytes(tmp_path / "out") == rows_as_bytes(undisturbed)
    kept = {name: stat for name, stat in few.items() if name.startswith("data/")}
    assert kept.items() <= files_of(tmp_path / "out").items(), "a shard that was there has changed"


def test_the_first_clips_then_all(recordings: Path, undisturbed: Path, tmp_path: Path) -> None:
    source = FirstClips(open_source(recordings), 4)
    first = CorpusRun(source, tiny_tokenizer(), tmp_path, SMALL).run()
    assert first.finished and len(rows_of(tmp_path)) == 4
    assert tokenize(recordings, tmp_path).finished
    assert rows_as_bytes(tmp_path) == rows_as_bytes(undisturbed)


def test_a_shard_that_was_removed_is_made_again(recordings: Path, undisturbed: Path, tmp_path: Path) -> None:
    tokenize(recordings, tmp_path)
    sorted((tmp_path / "data").iterdir())[1].unlink()
    assert tokenize(recordings, tmp_path).finished
    assert rows_as_bytes(tmp_path) == rows_as_bytes(undisturbed)


def test_a_damaged_shard_is_named(recordings: Path, tmp_path: Path) -> None:
    tokenize(recordings, tmp_path)
    shard = sorted((tmp_path / "data").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(CodesError, match=rf"{shard.name} is damaged.*remove it"):
        tokenize(recordings, tmp_path)


def test_killed_at_every_step_and_at_random(recordings: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "corpus.killing", recordings, tmp_path, str(KILLS)]
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["rows"] == NUM_CLIPS - 1 and seen["steps"] > 100 and seen["kills"] >= KILLS
    assert seen["clips_redone_a_kill"] <= 2 * SMALL.shard_clips  # the shard in hand, and one that is being written


# What is refused


def test_other_settings_are_refused_with_the_difference(recordings: Path, tmp_path: Path) -> None:
    tokenize(recordings, tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(OutputExistsError, match=r"shard_clips is 3 there and 4 now"):
        tokenize(recordings, tmp_path, replace(SMALL, shard_clips=4))
    with pytest.raises(OutputExistsError, match=r"filters is .*0\.5.* now"):
        tokenize(recordings, tmp_path, replace(SMALL, filters=Filters(min_duration=0.5)))
    other = tiny_tokenizer("auv_convnext")
    with pytest.raises(
        OutputExistsError, match=rf"fingerprint is .*{tiny_tokenizer().fingerprint[:12]}.*{other.fingerprint[:12]}"
    ):
        tokenize(recordings, tmp_path, tokenizer=other)
    assert files_of(tmp_path) == before


def test_a_folder_with_other_files_is_refused(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"thesis\.txt.*choose an empty"):
        tokenize(recordings, tmp_path)
    with pytest.raises(OutputError, match="no corpus"):
        remove_corpus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwriting_removes_the_corpus_alone(recordings: Path, tmp_path: Path) -> None:
    tokenize(recordings, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    remove_corpus(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and "rank-" not in p.name] == [
        "notes.txt"
    ]


def test_double_ids_are_refused_with_the_pair(tmp_path: Path) -> None:
    write_recordings(tmp_path / "in", 3)
    (tmp_path / "list.csv").write_text("id,path\na,in/clip-00.wav\nb,in/clip-01.wav\na,in/clip-02.wav\n")
    with pytest.raises(AudioInputError, match=r"'a'.*list\.csv, line 2.*list\.csv, line 4.*--id-column"):
        tokenize(tmp_path / "list.csv", tmp_path / "out")
    assert not (tmp_path / "out" / "data").exists()


def test_two_runs_into_one_folder(recordings: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work; a lock of a dead process hinders nobody."""
    inside: list[str] = []

    def second(share: Share) -> None:
        with pytest.raises(OutputExistsError, match=rf"Another run is at work.*process {os.getpid()}") as caught:
            tokenize(recordings, tmp_path, share=share)
        inside.append(str(caught.value))

    def watch(progress: Any) -> None:
        if progress.phase == "encoding" and not inside:
            second(Share())
            second(Share(1, 2))

    assert tokenize(recordings, tmp_path, watch=watch).finished
    assert len(inside) == 2
    (tmp_path / ".run" / "rank-00007-of-00009.lock").touch()
    assert tokenize(recordings, tmp_path).finished


@pytest.mark.parametrize("rank, world", [(2, 2), (-1, 2), (0, 0)])
def test_a_wrong_rank_is_refused(rank: int, world: int) -> None:
    with pytest.raises(OptionError, match=rf"rank {rank} of {world}"):
        Share(rank, world)


# Failures


def test_failures_are_tried_again_on_request(recordings: Path, tmp_path: Path) -> None:
    write_recordings(tmp_path / "in", 7)
    tokenize(tmp_path / "in", tmp_path / "out")
    soundfile.write(tmp_path / "in" / BROKEN, np.zeros(900), 16_000)
    assert tokenize(tmp_path / "in", tmp_path / "out").progress.clips == 0
    outcome = tokenize(tmp_path / "in", tmp_path / "out", retry_errors=True)
    assert outcome.finished and outcome.progress.clips == 1
    assert len(rows_of(tmp_path / "out")) == 7 and errors_of(tmp_path / "out") == []
    assert record_of(tmp_path / "out")["totals"]["failures"] == 0


def test_too_many_failures_stop_the_run(tmp_path: Path) -> None:
    write_recordings(tmp_path / "in", 4)
    for i in range(4, 8):
        (tmp_path / "in" / f"bad-{i}.wav").write_bytes(b"nothing")
    with pytest.raises(AudioInputError, match=r"3 clips failed, more than --max-errors 2"):
        tokenize(tmp_path / "in", tmp_path / "out", max_errors=2)
    done = len(rows_of(tmp_path / "out")) + len(errors_of(tmp_path / "out"))
    assert 3 <= done < 8 and not record_of(tmp_path / "out")["finished"]
    assert tokenize(tmp_path / "in", tmp_path / "out").finished
    assert len(rows_of(tmp_path / "out")) == 4 and len(errors_of(tmp_path / "out")) == 4


def test_where_everything_fails_the_run_ends_early(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(120):
        (tmp_path / "in" / f"{i:03d}.wav").write_bytes(b"nothing")
    with pytest.raises(AudioInputError, match="Each of the first 50 clips failed"):
        tokenize(tmp_path / "in", tmp_path / "out")


def test_filters_name_what_they_leave_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise = 0.3 * np.random.default_rng(0).standard_normal(48_000)
    for name, samples, rate in (
        ("fine", noise[:16_000], 16_000),
        ("short", noise[:1_000], 16_000),
        ("long", noise, 16_000),
        ("dull", noise[:8_000], 8_000),
        ("silent", noise[:16_000] * np.repeat([1, 0, 0, 0], 4_000), 16_000),
    ):
        soundfile.write(tmp_path / "in" / f"{name}.wav", samples, rate)
    filters = Filters(min_duration=0.2, max_duration=2.0, min_sampling_rate=16_000, max_silence=0.5)
    tokenize(tmp_path / "in", tmp_path / "out", replace(SMALL, filters=filters))
    assert list(rows_of(tmp_path / "out")) == ["fine.wav"]
    assert {failure["id"]: failure["error"] for failure in errors_of(tmp_path / "out")} == {
        "short.wav": "min_duration",
        "long.wav": "max_duration",
        "dull.wav": "min_sampling_rate",
        "silent.wav": "max_silence",
    }
    assert (totals := record_of(tmp_path / "out")["totals"])["filtered"] == 4 and totals["failures"] == 0


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(
    recordings: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    calls = 0

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        getattr(os, step)(*args)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_storage, "os", _Os({step: full}))
        with pytest.raises(OutputNotWritableError, match="the disk is full: make room, and run the same command again"):
            tokenize(recordings, tmp_path)
    assert not list((tmp_path / ".run" / "unfinished").iterdir())
    rows_of(tmp_path)
    assert tokenize(recordings, tmp_path).finished
    assert rows_as_bytes(tmp_path) == rows_as_bytes(undisturbed)


class _Os:
    """The module os with some functions changed."""

    def __init__(self, changed: dict[str, Callable[..., Any]]) -> None:
        self.changed = changed

    def __getattr__(self, name: str) -> Any:
        return self.changed.get(name) or getattr(os, name)


def test_a_folder_without_rights_is_named(
    recordings: Path, tmp_path: Path, without_root: Callable[[], AbstractContextManager[None]]
) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    run = corpus_run(recordings, tmp_path / "out")
    with without_root(), pytest.raises(OutputError, match=r"out.*Permission denied"):
        run.run()


# In batches, over a network, and long


@pytest.mark.parametrize("name", ["auv", "vrvq", "apcodec_v1", "melcap", "toy_multirate"])
def test_certified_batches_give_the_canonical_codes(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(shared_codec(name))
    write_recordings(tmp_path / "in", 12, rate=tokenizer.sampling_rate, channels=tokenizer.codec.facts.channels)
    tokenize(tmp_path / "in", tmp_path / "one", tokenizer=tokenizer)
    batches = tokenize(tmp_path / "in", tmp_path / "many", tokenizer=tokenizer, batch_seconds=1.0)
    assert rows_as_bytes(tmp_path / "one") == rows_as_bytes(tmp_path / "many")
    assert batches.totals is not None and batches.totals["certified"]["clips"] == 11


def test_batches_are_hardly_padded(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(7.5, 0.7, 300)).astype(int) + 200  # as lengths of utterances are
    for i, length in enumerate(lengths):
        soundfile.write(tmp_path / "in" / f"{i}.wav", 0.1 * rng.standard_normal(length), 16_000)
    run = corpus_run(tmp_path / "in", tmp_path / "out", replace(SMALL, partitions=1), batch_seconds=2.0)
    assert run.run().finished
    pipeline = run.pipeline
    assert pipeline.encoded_samples == lengths.sum()
    assert pipeline.padded_samples < 1.03 * pipeline.encoded_samples
    assert len(run.pipeline.encoder.certificates) <= 1  # they are told, not kept


def test_an_object_store(recordings: Path, undisturbed: Path, tmp_path: Path) -> None:
    store = "memory://bucket/corpus"
    try:
        first = tokenize(recordings, store, share=Share(0, 2))
        assert not first.finished and tokenize(recordings, store, share=Share(1, 2)).finished
        assert tokenize(recordings, store).progress.clips == 0
        fsspec.filesystem("memory").get("bucket/corpus/", str(tmp_path / "copy"), recursive=True)
        remove_corpus(store)
        assert fsspec.filesystem("memory").find("bucket/corpus") == []
    finally:
        fsspec.filesystem("memory").store.clear()
    assert rows_as_bytes(tmp_path / "copy") == rows_as_bytes(undisturbed)


def test_no_such_store(recordings: Path) -> None:
    with pytest.raises(OptionError, match="nonsense://"):
        tokenize(recordings, "nonsense://bucket/corpus")


@pytest.mark.parametrize("name", FINITE)
def test_long_recordings_have_the_codes_of_the_whole(name: str, tmp_path: Path) -> None:
    """Some windows long; only the window is held."""
    codec = shared_codec(name)
    rate = codec.facts.sampling_rate
    (tmp_path / "in").mkdir()
    samples = 0.3 * np.random.default_rng(0).standard_normal((3 * rate + 77, codec.facts.channels))
    soundfile.write(tmp_path / "in" / "long.wav", samples, rate)
    whole = tokenizer_of(codec)
    windowed = tokenizer_of(codec, options={"chunk_length_s": 0.7})
    tokenize(tmp_path / "in", tmp_path / "whole", tokenizer=whole)
    tokenize(tmp_path / "in", tmp_path / "windows", tokenizer=windowed)
    assert rows_as_bytes(tmp_path / "whole") == rows_as_bytes(tmp_path / "windows")
    assert record_of(tmp_path / "windows")["tokenizer"]["options"] == {"chunk_length_s": 0.7}


@pytest.mark.slow
def test_an_hour_needs_the_memory_of_a_window(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with soundfile.SoundFile(tmp_path / "in" / "hour.flac", "w", 16_000, 1) as file:
        for i in range(60):
            file.write(0.1 * np.random.default_rng(i).standard_normal(60 * 16_000))
    peaks = {}
    for name, limit in (("minute", 60), ("hour", 3600)):
        code = (
            "import resource, sys; from corpus.corpora import *; from audiotok import AutoAudioTokenizer; "
            "tok = AutoAudioTokenizer.from_pretrained('audiotok/auv-mini'); "
            f"tokenize({str(tmp_path / name)!r}, {str(tmp_path / name) + '-out'!r}, tokenizer=tok); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        (tmp_path / name).mkdir()
        samples, _ = soundfile.read(tmp_path / "in" / "hour.flac", frames=limit * 16_000, dtype="float32")
        soundfile.write(tmp_path / name / "clip.flac", samples, 16_000)
        tests = Path(__file__).resolve().parents[1]
        done = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout)
    assert rows_of(tmp_path / "hour-out")["clip.flac"]["num_frames"] == 50 * 3600
    assert peaks["hour"] < peaks["minute"] + 200, peaks  # MiB; its samples alone are 220


# The parts


def test_clips_are_dealt_by_their_ids_alone(tmp_path: Path) -> None:
    write_recordings(tmp_path / "in", 9)
    source = open_source(tmp_path / "in")
    census, parts = deal(source, 4, range(4))
    assert census.total == 9 == sum(map(len, parts))
    for part in parts:
        hashes = id_hashes(part.clips["id"].to_pylist())
        assert set(hashes % np.uint64(4)) == {part.partition} and (np.diff(hashes.astype(object)) > 0).all()
    _, (only,) = deal(source, 4, [parts[0].partition])
    assert only.clips.equals(parts[0].clips)


def test_shards_are_named_by_what_they_hold(undisturbed: Path) -> None:
    names = [name for some in Shards(corpus_files(undisturbed), "train").list().values() for name in some]
    assert [ShardName.parse(name.data) for name in names] == names
    for name in names:
        hashes = id_hashes(pq.read_table(undisturbed / name.data)["id"].to_pylist())
        assert set(hashes % np.uint64(SMALL.partitions)) == {name.partition}
    assert ShardName.parse("data/train-1-2.parquet") is None
