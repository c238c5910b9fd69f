"""What a lower precision does to codes, measured on the corpus that it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from audiotok.audio import Downmix
from audiotok.clip_rows import FrameOrder
from audiotok.errors import AudioInputError, AudioTokError, check_choice
from audiotok.integrations.sources import Source

if TYPE_CHECKING:
    from audiotok.tokenizer import AudioTokenizer

DTYPES = ("float32", "bfloat16", "float16")
MEASURED_CLIPS, LOOKED_AT = 16, 64


@dataclass(frozen=True)
class Flips:
    """Codes of some clips that are others than in float32.

    Attributes:
        dtype: of the codec.
        clips, codes: that were compared.
        flipped: those that differ; of a clip with another number of codes, all.
    """

    dtype: str
    clips: int
    codes: int
    flipped: int


def check_dtype(dtype: str | None) -> None:
    """Raise `OptionError` unless a codec can be asked to work in this dtype."""
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)


def measure_flips(source: Source, exact: AudioTokenizer, lower: AudioTokenizer, downmix: Downmix = None) -> Flips:
    """Encode the first clips of a source that can be decoded with both tokenizers, and compare.

    Raises:
        AudioInputError: none of the first clips can be decoded.
    """
    order = FrameOrder(exact)
    clips = codes = flipped = 0
    rows = (row for batch in source.batches() for row in batch.select(["locator"]).to_pylist())
    for row in islice(rows, LOOKED_AT):
        try:
            mine, theirs = (_codes(one, order, source.open(row["locator"]), downmix) for one in (exact, lower))
        except AudioTokError:  # the run names it
            continue
        clips, codes = clips + 1, codes + len(mine)
        flipped += int((mine != theirs).sum()) if len(mine) == len(theirs) else len(mine)
        if clips == MEASURED_CLIPS:
            break
    if not clips:
        raise AudioInputError(f"None of the first {LOOKED_AT} clips can be decoded: no dtype can be tried.")
    return Flips(str(lower.codec.dtype).removeprefix("torch."), clips, codes, flipped)


def _codes(tokenizer: AudioTokenizer, order: FrameOrder, recording: object, downmix: Downmix) -> np.ndarray:
    (clip,) = tokenizer.encoder(batch_size=1).encode([recording], downmix=downmix)
    return order.flatten(clip.codes, clip.depths)[0]
