"""`audiotok.json`: what made a corpus, and what is in it.

The settings in it are those that decide rows. They are fixed with the first run into a folder; a run with others is
refused, with the difference shown, and so is a tokenizer with another fingerprint that would decode it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from audiotok.errors import CodesError, OptionError, OutputExistsError
from audiotok.integrations.corpus_shards import Certified, ShardTotals
from audiotok.integrations.corpus_storage import CorpusFiles, corpus_files
from audiotok.layouts import default_layout

if TYPE_CHECKING:
    from audiotok.tokenizer import AudioTokenizer

RECORD = "audiotok.json"
FORMAT = 1
_SHOWN = 12  # digits of a fingerprint that tell two apart for the eye


@dataclass(frozen=True)
class Filters:
    """Clips that are left out, each with its reason in errors.jsonl.

    Attributes:
        min_duration, max_duration: seconds.
        min_sampling_rate: of the recording, Hz; what was sampled lower has nothing to give above half of it.
        max_silence: share of windows of 20 ms below -60 dB of full scale.
    """

    min_duration: float | None = None
    max_duration: float | None = None
    min_sampling_rate: int | None = None
    max_silence: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value >= 0:
                raise OptionError(f"{name}={value!r} is not legal: give a number from 0 on.")
        if self.max_silence is not None and self.max_silence > 1:
            raise OptionError(f"max_silence={self.max_silence!r} is not legal: give a share from 0 to 1.")


@dataclass(frozen=True)
class Settings:
    """What decides the rows of a corpus, beside the source.

    Attributes:
        split: the first part of the names of shards.
        downmix: as in `load_audio`.
        certify: codes of a batch that could have flipped were made again alone.
        partitions: that the clips are dealt out to.
        shard_clips, shard_seconds: a shard ends when it holds so much.
    """

    split: str = "train"
    downmix: str | int | None = None
    certify: bool = True
    filters: Filters = field(default_factory=Filters)
    partitions: int = 16
    shard_clips: int = 4096
    shard_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if not self.split or not self.split.replace("_", "").replace(".", "").isalnum():
            raise OptionError(f"split={self.split!r} is not legal: letters, digits, _ and . only, as in train or dev.")
        for name in ("partitions", "shard_clips"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 99_999:
                raise OptionError(f"{name}={value!r} is not legal: a whole number from 1 to 99,999.")
        if not self.shard_seconds > 0:
            raise OptionError(f"shard_seconds={self.shard_seconds!r} is not legal: a number above 0.")


def codes_fingerprint(
    tokenizer: AudioTokenizer, options: dict[str, Any] | None = None, weights: str | None = None
) -> str:
    """The tokenizer's fingerprint in the codec's default layout: a corpus holds codes, and any layout can be made of
    them.

    Args:
        options: in place of the tokenizer's own.
        weights: their digest, if it was just computed.

    Raises:
        OptionError: the codec does not have such options.
    """
    from audiotok.saving import fingerprint  # which imports torch: reading a corpus needs none of it

    facts = tokenizer.codec.facts
    plain = default_layout(tokenizer.vocabulary, facts.codebook_strides, facts.variable_depth).name
    options = tokenizer.options if options is None else options
    return fingerprint(type(tokenizer)(tokenizer.codec, tokenizer.feature_extractor, plain, options), weights)


def describe_tokenizer(tokenizer: AudioTokenizer) -> dict[str, Any]:
    """What made the codes, for people, and what tells whether it is the same. The folder `tokenizer` loads it."""
    from audiotok.saving import weights_digest

    config, facts = tokenizer.codec.config, tokenizer.codec.facts
    weights = weights_digest(tokenizer.codec)
    return {
        "name": tokenizer.name_or_path,
        "class": type(tokenizer).__name__,
        "fingerprint": codes_fingerprint(tokenizer, weights=weights),
        "weights": weights,
        "options": tokenizer.options,
        "dtype": str(tokenizer.codec.dtype).removeprefix("torch."),
        "facts": asdict(facts),
        "config": {key: getattr(config, key) for key in sorted(config.own_keys())},
    }


def describe_machine(device: str) -> dict[str, str]:
    """What may move a sample or a code: the audio decoder, the resampler, the kernels."""
    import soundfile
    import torch

    device_name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    packages = ("audiotok", "torch", "transformers", "numpy", "soundfile", "soxr")
    return {
        "device": torch.device(device).type,
        "device_name": device_name or platform.machine(),
        **{package: importlib.metadata.version(package) for package in packages},
        "libsndfile": soundfile.__libsndfile_version__,
    }


@dataclass
class Totals:
    """Sums over the shards of a finished corpus."""

    rows: int = 0
    failures: int = 0
    filtered: int = 0
    shards: int = 0
    hours: float = 0.0
    frames: int = 0
    codes: int = 0
    codebook_use: list[float] = field(default_factory=list)
    certified: Certified = field(default_factory=Certified)
    made_with: list[dict[str, str]] = field(default_factory=list)

    def sum_up(self, shards: list[ShardTotals]) -> None:
        used: list[Any] = []
        for shard in shards:
            self.rows += shard.rows
            self.frames += shard.frames
            self.codes += shard.codes
            self.hours += shard.seconds / 3600
            self.certified.add(shard.certified)
            used = [a | b for a, b in zip(used, shard.used, strict=True)] if used else list(shard.used)
            if shard.made_with not in self.made_with:
                self.made_with.append(shard.made_with)
        self.shards = len(shards)
        self.codebook_use = [round(float(book.mean()), 6) for book in used]


@dataclass
class Record:
    """audiotok.json.

    Attributes:
        tokenizer, settings, columns: what decides rows; see `check_same`.
        source: where the clips were, in the run that began the corpus.
        precision: in a lower precision than float32, what it was measured to do to codes.
        totals: once it is finished.
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    source: dict[str, Any]
    columns: dict[str, str]
    finished: bool = False
    totals: dict[str, Any] | None = None
    precision: dict[str, Any] | None = None
    format: int = FORMAT
    created: str = field(default_factory=lambda: _now())
    changed: str = field(default_factory=lambda: _now())

    @classmethod
    def of(cls, tokenizer: AudioTokenizer, settings: Settings, source: dict[str, Any], columns: pa.Schema) -> Record:
        types = {field.name: str(field.type) for field in columns}
        values = (describe_tokenizer(tokenizer), asdict(settings), source, types)
        return cls(*json.loads(json.dumps(values)))  # as they read back: lists for tuples

    @classmethod
    def read(cls, files: CorpusFiles) -> Record | None:
        """None where there is no corpus.

        Raises:
            CodesError: the file is damaged, or of a newer format.
        """
        data = files.read(RECORD)
        if data is None:
            return None
        try:
            values = json.loads(data)
            if values.get("format") != FORMAT:
                raise CodesError(
                    f"{files.path(RECORD)} has the format {values.get('format')!r}, and this audiotok reads {FORMAT}: "
                    "upgrade audiotok."
                )
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, CodesError):
                raise
            raise CodesError(f"{files.path(RECORD)} is damaged ({error}): restore it, or start anew.") from error

    def write(self, files: CorpusFiles) -> None:
        self.changed = _now()
        files.write(RECORD, (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode())

    def check_same(self, other: Record, place: str) -> None:
        """Raise `OutputExistsError` where `other` would make other rows than those that are there."""
        differences = [
            f"{name} is {_shown(mine)} there and {_shown(theirs)} now"
            for name, mine, theirs in (
                (
                    "the tokenizer's fingerprint",
                    self.tokenizer["fingerprint"][:_SHOWN],
                    other.tokenizer["fingerprint"][:_SHOWN],
                ),
                ("the tokenizer", self.tokenizer["name"], other.tokenizer["name"]),
                *(
                    (f"the tokenizer's {key}", *pair)
                    for key, pair in _pairs(self.tokenizer, other.tokenizer, "options", "dtype")
                ),
                *((key, *pair) for key, pair in _pairs(self.settings, other.settings, *self.settings)),
                ("the columns", self.columns, other.columns),
            )
            if mine != theirs and not (name == "the tokenizer" and self._same_codes(other))
        ]
        if differences:
            raise OutputExistsError(
                f"{place} was made with other settings: {'; '.join(differences)}. Run with those, write to another "
                "folder, or start anew with --overwrite."
            )

    def check_decodes(self, tokenizer: AudioTokenizer, place: str) -> None:
        """Raise `CodesError` unless this tokenizer's codec made the codes.

        Its layout and options are of no account here: they do not change what a code sounds like.
        """
        try:
            found = codes_fingerprint(tokenizer, self.tokenizer["options"])
        except OptionError:  # another codec, which does not have them
            found = codes_fingerprint(tokenizer)
        if found != self.tokenizer["fingerprint"]:
            mine, now = self.tokenizer["fingerprint"][:_SHOWN], found[:_SHOWN]
            made_by, name = self.tokenizer["name"], tokenizer.name_or_path
            raise CodesError(
                f"{place} was made by {made_by} (fingerprint {mine}...), not by {name} as it is now (fingerprint "
                f"{now}...): the same codes would be other sounds."
            )

    def _same_codes(self, other: Record) -> bool:
        """The same weights under another name or path."""
        return self.tokenizer["fingerprint"] == other.tokenizer["fingerprint"]


def partitions_of(output: str | os.PathLike[str]) -> int | None:
    """Of a corpus that exists: they are for life."""
    record = Record.read(corpus_files(output))
    return None if record is None else record.settings["partitions"]


def _pairs(mine: dict[str, Any], theirs: dict[str, Any], *keys: str) -> list[tuple[str, tuple[Any, Any]]]:
    return [(key, (mine.get(key), theirs.get(key))) for key in keys]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
