"""`audiotok verify` and `audiotok decode DIR`: what is wrong with a corpus is named, and its clips come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from audiotok import AudioTokenizer
from cli.helpers import RATE, Result, decoded, wave_of

Cli = Callable[..., Result]


@pytest.fixture
def corpus(cli: Cli, folder: Path, one: str) -> Path:
    """`codes`: five clips of `in`, in one shard a partition."""
    (folder / "in").mkdir()
    for i in range(5):
        soundfile.write(
            folder / "in" / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(3000 + 700 * i), RATE
        )
    done = cli("tokenize", "in", "-m", one, "-o", "codes", "--num-processes", 1, "--partitions", 2)
    assert done.code == 0, done.err
    return folder / "codes"


def shards_of(corpus: Path) -> list[Path]:
    return sorted((corpus / "data").iterdir())


def rewrite(shard: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Other rows under the same name and footer."""
    table = pq.read_table(shard)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), shard)


def test_a_corpus_that_is_what_it_says(cli: Cli, corpus: Path) -> None:
    done = cli("verify", "codes")
    assert done.code == 0 and "5 clips" in done.err and "5 of 5 clips encoded again with equal codes" in done.err
    said = cli("verify", "codes", "--sample", 2, "--seed", 3, "--json").json
    assert said["problems"] == [] and len(said["encoded_again"]) == 2 and said["finished"]
    again = cli("verify", "codes", "--sample", 2, "--seed", 3, "--json").json
    assert again["encoded_again"] == said["encoded_again"]
    assert cli("verify", "codes", "--sample", 0, "--model", "no-such-model").code == 0


def swap_codes(rows: list[dict]) -> list[dict]:
    return [row | {"codes": row["codes"][::-1]} for row in rows]


@pytest.mark.parametrize(
    "change, said",
    [
        (swap_codes, "are others now"),
        (lambda rows: rows[1:], "rows and says"),
        (lambda rows: [*rows, rows[0]], "is there twice"),
        (lambda rows: [row | {"audio_length": row["audio_length"] + 9999} for row in rows], "samples give"),
        (lambda rows: [row | {"codes": [60000] * len(row["codes"])} for row in rows], "code 60000 is outside"),
        (lambda rows: [row | {"codes": row["codes"][:-1]} for row in rows], "frames have"),
    ],
)
def test_what_is_wrong_is_named(cli: Cli, corpus: Path, change: Callable, said: str) -> None:
    for shard in shards_of(corpus):
        rewrite(shard, change)
    done = cli("verify", "codes")
    assert done.code == 4 and said in done.err, done.err


def test_a_shard_of_another_partition(cli: Cli, corpus: Path) -> None:
    first, second = shards_of(corpus)
    first.rename("kept")
    second.rename(first)
    Path("kept").rename(second)
    done = cli("verify", "codes")
    assert done.code == 4 and "does not belong to partition 0" in done.err


def test_a_flipped_bit_and_a_lost_shard(cli: Cli, corpus: Path) -> None:
    first, second = shards_of(corpus)
    data = bytearray(first.read_bytes())
    data[len(data) // 3] ^= 1
    first.write_bytes(data)
    done = cli("verify", "codes")
    assert done.code == 4 and first.name in done.err and "remove it, and run the same" in done.err
    first.unlink()
    done = cli("verify", "codes")
    assert done.code == 4 and "counts 2 shards, and there are 1" in done.err
    assert second.exists()


def test_another_tokenizer_and_a_recording_that_has_gone(cli: Cli, corpus: Path, two: str) -> None:
    done = cli("verify", "codes", "--model", two)
    assert done.code == 4 and "fingerprint" in done.err
    Path("in/3.wav").rename("3.wav")
    done = cli("verify", "codes")
    assert done.code == 3 and "no longer has the clip '3.wav'" in done.err and "--source" in done.err
    Path("elsewhere").mkdir()
    for path in [*Path("in").iterdir(), Path("3.wav")]:
        path.rename(Path("elsewhere") / path.name)
    assert cli("verify", "codes", "--source", "elsewhere").code == 0


def test_no_corpus(cli: Cli, folder: Path) -> None:
    done = cli("verify", ".")
    assert done.code == 4 and "no corpus" in done.err


def test_clips_of_a_corpus_come_back(cli: Cli, corpus: Path, tok: AudioTokenizer) -> None:
    assert cli("decode", "codes", "--id", "2.wav", "-o", "back.wav").code == 0
    np.testing.assert_allclose(wave_of(Path("back.wav"))[0], decoded(tok, "in/2.wav"), atol=1e-4)
    done = cli("decode", "codes", "-o", "all/", "--json")
    assert done.code == 0 and sorted(clip["id"] for clip in done.json["clips"]) == [f"{i}.wav" for i in range(5)]
    assert soundfile.info("all/4.wav").frames == 3000 + 700 * 4
    done = cli("decode", "codes", "--id", "2.wav", "--id", "4.wav", "-o", "two/", "--json")
    assert sorted(clip["id"] for clip in done.json["clips"]) == ["2.wav", "4.wav"]


def test_what_does_not_decode(cli: Cli, corpus: Path, two: str) -> None:
    done = cli("decode", "codes", "--id", "nope", "-o", "back.wav")
    assert done.code == 4 and "no clip 'nope'" in done.err and not Path("back.wav").exists()
    done = cli("decode", "codes", "--id", "2.wav", "-o", "back.wav", "-t", two)
    assert done.code == 4 and "fingerprint" in done.err and not Path("back.wav").exists()
    Path("ids.txt").write_text("1 2 3")
    done = cli("decode", "ids.txt", "--id", "2.wav", "-o", "back.wav")
    assert done.code == 5 and "--id chooses clips of a folder" in done.err
    done = cli("decode", str(shards_of(corpus)[0]), "-o", "back/")
    assert done.code == 5 and "name it with --tokenizer" in done.err
    assert json.loads(Path("codes/audiotok.json").read_text())["finished"]
