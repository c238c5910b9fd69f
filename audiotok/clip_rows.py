"""A clip as a row of a table: how Parquet files store codes, whatever layout a language model will read.

Shapes: Q codebooks, T frames, L codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from audiotok.errors import CodesError
from audiotok.facts import CodecFacts
from audiotok.layouts import Layout, default_layout

if TYPE_CHECKING:
    from audiotok.encoding import ClipCodes
    from audiotok.tokenizer import AudioTokenizer


def clip_schema(facts: CodecFacts) -> pa.Schema:
    """The columns of a clip: id, codes, depths (codecs of variable depth), num_frames, audio_length, duration."""
    code = pa.uint16() if max(facts.codebook_sizes) <= 1 << 16 else pa.uint32()
    fields = [("id", pa.string()), ("codes", pa.list_(code))]
    if facts.variable_depth:
        fields.append(("depths", pa.list_(pa.uint8())))
    return pa.schema([*fields, ("num_frames", pa.int64()), ("audio_length", pa.int64()), ("duration", pa.float64())])


class ClipRows:
    """Makes rows of `clip_schema` from codes, for one tokenizer."""

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        facts = tokenizer.codec.facts
        self.schema, self._order, self._rate = clip_schema(facts), FrameOrder(tokenizer), facts.sampling_rate
        self._code = self.schema.field("codes").type.value_type.to_pandas_dtype()

    def row(self, clip_id: str, clip: ClipCodes) -> dict[str, Any]:
        codes, num_frames = self._order.flatten(clip.codes, clip.depths)
        row = {
            "id": clip_id,
            "codes": codes.astype(self._code),
            "depths": None if clip.depths is None else clip.depths.astype(np.uint8),
            "num_frames": num_frames,
            "audio_length": clip.audio_length,
            "duration": clip.audio_length / self._rate,
        }
        return {name: row[name] for name in self.schema.names}


class FrameOrder:
    """Codes of a clip as one run, frame by frame: the order of the codec's default layout, without its id offsets."""

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        facts = tokenizer.codec.facts
        self._strides = facts.codebook_strides
        self._layout: Layout = default_layout(tokenizer.vocabulary, facts.codebook_strides, facts.variable_depth)

    def flatten(self, codes: Any, depths: np.ndarray | None) -> tuple[np.ndarray, int]:
        """Codes `[Q, T]` (a list of `[T_q]` where codebooks have different rates) → `[L]`, and T."""
        num_frames = codes[0].shape[-1] * self._strides[0]
        return self._layout.codes_to_ids(codes, depths) - self._offsets(num_frames, depths), num_frames

    def restore(self, flat: np.ndarray, num_frames: int, depths: np.ndarray | None) -> tuple[Any, np.ndarray | None]:
        """Codes and depths: the inverse of `flatten`.

        Raises:
            TokenError: the run is no clip of so many frames, or of another codec.
        """
        if num_frames < 0:
            raise CodesError(f"num_frames={num_frames} is not legal: 0 or more.")
        offsets = self._offsets(num_frames, depths)
        if len(flat) != len(offsets):
            raise CodesError(
                f"{len(flat)} codes are not {num_frames} frames of this codec, which have {len(offsets)}: were they "
                "made by another one?"
            )
        return self._layout.ids_to_codes(flat + offsets).codes, depths

    def _offsets(self, num_frames: int, depths: np.ndarray | None) -> np.ndarray:
        """What stands between code and id at each place: the ids of a clip of zeros."""
        zeros = [np.zeros(num_frames // stride, np.int64) for stride in self._strides]
        return self._layout.codes_to_ids(zeros if max(self._strides) > 1 else np.stack(zeros), depths)
