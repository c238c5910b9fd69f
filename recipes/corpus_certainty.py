"""Codes made in certified batches beside canonical ones: whether they are equal, and what that costs.

Recordings are decoded beforehand, so that nothing but encoding is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from audiotok import AudioTokenizer
from audiotok.integrations.corpus_pipeline import Done, Pipeline
from audiotok.integrations.corpus_record import Filters
from audiotok.integrations.sources import Source, clip_batch
from audiotok.recipes.benchmark_measures import Timing, measure_in_turn
from audiotok.recipes.corpus_measures import Workload, count_differing, decoded_share


@dataclass(frozen=True)
class CertifyRow:
    """Codes made in one way beside the canonical ones: each clip alone, one thread.

    Attributes:
        way: "alone" or "batches".
        codes: in all; `differing` of them are others than the canonical ones. In batches this must be 0.
        uncertified: those that would be others without certification; None where clips are alone.
        clips, reencoded: clips, and those that were encoded again.
        certified, bare: of encoding with and without certification; bare is None where clips are alone.
        padding: share of what was encoded that is padding.
    """

    way: str
    threads: int
    codes: int
    differing: int
    uncertified: int | None
    clips: int
    reencoded: int
    certified: Timing
    bare: Timing | None
    padding: float

    @property
    def cost(self) -> float | None:
        """Share of time that certification adds."""
        return None if self.bare is None else self.certified.wall / self.bare.wall - 1

    @property
    def cpu_cost(self) -> float | None:
        """The same by CPU time, which other work on the machine disturbs less."""
        return None if self.bare is None else self.certified.cpu / self.bare.cpu - 1


class HeldClips(Source):
    """Waveforms `[C, N]` in memory, so that nothing but encoding is timed."""

    kind, schema = "memory", pa.schema([])

    def __init__(self, clips: Sequence[np.ndarray], sampling_rate: int) -> None:
        self.clips, self.sampling_rate = clips, sampling_rate

    def batches(self) -> Iterator[pa.RecordBatch]:
        numbers = range(len(self.clips))
        yield clip_batch(pa.array([str(i) for i in numbers]), pa.array(numbers, pa.int64()), [], self.schema)

    def rows(self) -> list[dict[str, Any]]:
        return [row for batch in self.batches() for row in batch.to_pylist()]

    def open(self, locator: int) -> dict[str, Any]:
        return {"array": self.clips[locator], "sampling_rate": self.sampling_rate}

    def where(self, locator: int) -> str:
        return f"clip {locator}"

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": None, "columns": {}}


def measure_certainty(load: Workload, batch_seconds: float, repeats: int) -> list[CertifyRow]:
    """Codes alone and in batches, on one thread and on two; for a process of its own."""
    tokenizer = load.tokenizer()
    whole = replace(load, processes=1)
    clips = list(decoded_share(whole, 0, tokenizer.sampling_rate))
    source = HeldClips(clips, tokenizer.sampling_rate)
    torch.set_num_threads(1)
    canonical = _Encoding(tokenizer, source, None)
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows.append(_alone_row(tokenizer, source, canonical, threads, repeats))
        rows.append(_batches_row(tokenizer, source, canonical, threads, batch_seconds, repeats))
    return rows


class _Encoding:
    """One pass of the engine's pipeline over clips in memory."""

    def __init__(
        self, tokenizer: AudioTokenizer, source: HeldClips, batch_seconds: float | None, certify: bool = True
    ) -> None:
        encoder = tokenizer.encoder(certify=certify, batch_size=1 if batch_seconds is None else None)
        pipeline = Pipeline(source, encoder, Filters(), None, batch_seconds, num_workers=1)
        self.done: list[Done] = list(pipeline.run(source.rows()))
        self.padding = 1 - pipeline.encoded_samples / pipeline.padded_samples

    @property
    def reencoded(self) -> int:
        return sum(one.certified.reencoded for one in self.done if one.certified is not None)

    def codes(self) -> dict[str, np.ndarray]:
        """Id → all codes of the clip `[L]`, -1 in frames that do not use a codebook; empty for one that failed."""
        found = {}
        for one in self.done:
            clip = one.codes
            streams = [] if clip is None else list(clip.codes)
            if clip is not None and clip.depths is not None:
                streams = [np.where(clip.depths > q, row, -1) for q, row in enumerate(streams)]
            found[one.clip["id"]] = np.concatenate([np.empty(0, np.int64), *streams])
        return found

    def differing(self, other: _Encoding) -> int:
        mine, theirs = self.codes(), other.codes()
        return sum(count_differing(codes, theirs[name]) for name, codes in mine.items())

    @property
    def num_codes(self) -> int:
        return sum(codes.size for codes in self.codes().values())


def _alone_row(
    tokenizer: AudioTokenizer, source: HeldClips, canonical: _Encoding, threads: int, repeats: int
) -> CertifyRow:
    times = measure_in_turn({"alone": lambda: _Encoding(tokenizer, source, None)}, repeats)
    found = _Encoding(tokenizer, source, None)
    differing, count = canonical.differing(found), len(source.clips)
    return CertifyRow(
        "alone", threads, canonical.num_codes, differing, None, count, 0, times["alone"], None, found.padding
    )


def _batches_row(
    tokenizer: AudioTokenizer,
    source: HeldClips,
    canonical: _Encoding,
    threads: int,
    batch_seconds: float,
    repeats: int,
) -> CertifyRow:
    certified = _Encoding(tokenizer, source, batch_seconds)
    bare = _Encoding(tokenizer, source, batch_seconds, certify=False)
    times = measure_in_turn(
        {
            "certified": lambda: _Encoding(tokenizer, source, batch_seconds),
            "bare": lambda: _Encoding(tokenizer, source, batch_seconds, certify=False),
        },
        repeats,
        warm=True,
    )
    return CertifyRow(
        way="batches",
        threads=threads,
        codes=canonical.num_codes,
        differing=canonical.differing(certified),
        uncertified=canonical.differing(bare),
        clips=len(source.clips),
        reencoded=certified.reencoded,
        certified=times["certified"],
        bare=times["bare"],
        padding=certified.padding,
    )
