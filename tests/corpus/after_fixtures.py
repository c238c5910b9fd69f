"""Corpora of drawn codes, written by the parts that a run writes with, without a model that encodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import typer
from conformance.codecs_table import layouts_of, new_codec, tokenizer_of
from typer.testing import CliRunner, Result

from audiotok import AudioTokenizer
from audiotok.cli import export, push, stats
from audiotok.clip_rows import ClipRows
from audiotok.encoding import ClipCodes
from audiotok.integrations.corpus_record import RECORD, Record, Settings
from audiotok.integrations.corpus_shards import CodeCounter, ShardInHand, ShardName
from audiotok.integrations.corpus_storage import corpus_files

# Each kind of codes: one codebook, several, one that all streams share, several rates, depths that vary.
KINDS = ("auv", "apcodec", "toy_bands", "toy_multirate", "vrvq")
TEXT = pa.schema([("text", pa.string()), ("speaker", pa.int32())])


@cache
def tokenizer_for(kind: str) -> AudioTokenizer:
    return tokenizer_of(new_codec(kind))


KINDS_AND_LAYOUTS = [(kind, name) for kind in KINDS for name in layouts_of(tokenizer_for(kind).codec.facts)]


@dataclass
class Made:
    """A corpus and what was put into it, in the order of its rows."""

    folder: Path
    tokenizer: AudioTokenizer
    ids: list[str]
    clips: list[ClipCodes]

    def input_ids(self, layout: str, bos: bool = False, eos: bool = False) -> list[np.ndarray]:
        """Of each clip, by the layout itself."""
        tokenizer = self.tokenizer.with_layout(layout)
        before, behind = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
        made = [tokenizer.codes_to_ids(clip.codes, clip.depths) for clip in self.clips]
        return [np.concatenate([before, ids, behind]) if bos or eos else ids for ids in made]

    @property
    def num_frames(self) -> list[int]:
        stride = self.tokenizer.codec.facts.codebook_strides[0]
        return [clip.codes[0].shape[-1] * stride for clip in self.clips]


def draw_clip(tokenizer: AudioTokenizer, num_frames: int, rng: np.random.Generator) -> ClipCodes:
    """Codes that the codec could have made; the last frame is not full."""
    facts = tokenizer.codec.facts
    num_frames *= facts.frame_multiple
    codes: Any = [
        rng.integers(0, size, num_frames // stride)
        for size, stride in zip(facts.codebook_sizes, facts.codebook_strides, strict=True)
    ]
    depths = None
    if max(facts.codebook_strides) == 1:
        codes = np.stack(codes)
    if facts.variable_depth:
        depths = rng.integers(1, facts.num_codebooks + 1, num_frames)
        codes[np.arange(facts.num_codebooks)[:, None] >= depths] = 0
    return ClipCodes(codes, max(1, facts.held_samples(num_frames) - 3), depths)


def make_corpus(
    folder: Path,
    kind: str = "auv",
    num_clips: int = 11,
    per_shard: int = 4,
    finished: bool = True,
    frames: tuple[int, int] = (1, 40),
    split: str = "train",
    tokenizer: AudioTokenizer | None = None,
) -> Made:
    """A corpus of drawn codes of a codec of the table, with the columns `text` and `speaker`."""
    tokenizer = tokenizer or tokenizer_for(kind)
    rng, files = np.random.default_rng(0), corpus_files(folder)
    clips = [draw_clip(tokenizer, int(count), rng) for count in rng.integers(*frames, num_clips)]
    ids = [f"speaker.{i % 3}/take {i}.wav" for i in range(num_clips)]
    rows, counter = ClipRows(tokenizer), CodeCounter(tokenizer)
    schema = pa.schema([*rows.schema, *TEXT])
    for first in range(0, num_clips, per_shard):
        hand = ShardInHand(ShardName(split, first // per_shard, 0))
        for i in range(first, min(first + per_shard, num_clips)):
            hand.rows.append(rows.row(ids[i], clips[i]) | {"text": f"Grüße {i}", "speaker": i % 3})
        hand.write(files, schema, counter, {"device": "cpu"})
    record = Record.of(tokenizer, Settings(split=split), {"kind": "drawn"}, TEXT)
    record.finished = finished
    record.write(files)
    return Made(folder, tokenizer, ids, clips)


def edit_record(folder: Path, **changes: Any) -> None:
    """Other values in audiotok.json; those of `tokenizer` are changed key by key, None removes one."""
    values = json.loads((folder / RECORD).read_text())
    tokenizer = values["tokenizer"] | changes.pop("tokenizer", {})
    values["tokenizer"] = {key: value for key, value in tokenizer.items() if value is not None}
    (folder / RECORD).write_text(json.dumps(values | changes))


def command(*arguments: object) -> Result:
    """`audiotok stats`, `export` or `push` in this process; errors come as they are."""
    app = typer.Typer()
    for module in (stats, export, push):
        name = module.__name__.rpartition(".")[2]
        app.command(name)(getattr(module, name))
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
