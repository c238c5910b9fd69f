"""Certified codes: the codes of a clip encoded alone, at the speed of batches.

Another batch shape, thread count or device picks another kernel, latents move by some units in the last place,
and a near-tie in the codebook flips. So a batch also yields margins (how far each runner-up was); a clip with a
margin under the codec's measured bound is encoded again alone, in the canonical shape: batch 1, float32, the same
device. What comes out equals encoding every clip alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from audiotok.codec import AudioCodec, CodecOutput


@dataclass(frozen=True)
class Certificate:
    """How a batch was certified.

    Attributes:
        bound: margins under it were not trusted; infinite where no measurement exists (every clip is re-encoded).
        num_clips, num_reencoded: clips in all, and those encoded again alone.
        smallest_margin: of all codes of the batch, before re-encoding.
    """

    bound: float
    num_clips: int
    num_reencoded: int
    smallest_margin: float


def encode_certified(
    codec: AudioCodec, input_values: Tensor, padding_mask: Tensor, bound: float | None = None, **options: Any
) -> tuple[CodecOutput, Certificate]:
    """Encode a padded batch; every code equals that of its clip encoded alone.

    Args:
        input_values: `[B, C, N]`. padding_mask: `[B, N]`.
        bound: another bound than the codec's own (tests, other machines).
        options: the codec's; a list or tuple holds one value a clip.
    """
    if bound is None:
        bound = codec.margin_bound(input_values.dtype, input_values.device)
    batch = len(input_values)
    if batch == 1:  # alone already: nothing to certify
        output = codec.encode(input_values, padding_mask, **options)
        return output, Certificate(bound, 1, 0, math.inf)
    output = codec.encode(input_values, padding_mask, return_margins=True, **options)
    streams = output.margins if isinstance(output.margins, list) else [output.margins]
    smallest = torch.stack([s.flatten(1).amin(dim=1) for s in streams]).amin(dim=0)
    doubtful = (smallest < bound).nonzero().flatten().tolist()
    lengths = padding_mask.sum(dim=1).tolist()
    for i in doubtful:
        n = lengths[i]
        alone = codec.encode(
            input_values[i : i + 1, :, :n], padding_mask[i : i + 1, :n], **clip_options(options, i, batch)
        )
        _write_clip(output, alone, i)
    return output, Certificate(bound, batch, len(doubtful), float(smallest.min()))


def clip_options(options: dict[str, Any], i: int, batch: int) -> dict[str, Any]:
    """The options of clip i: of a list or tuple with one value a clip, the i-th."""
    return {
        key: value[i] if isinstance(value, (list, tuple)) and len(value) == batch else value
        for key, value in options.items()
    }


def _write_clip(output: CodecOutput, alone: CodecOutput, i: int) -> None:
    """Put the codes of a clip encoded alone, and their mask, into its row of a batch."""
    pairs = ((output.audio_codes, alone.audio_codes), (output.audio_codes_mask, alone.audio_codes_mask))
    for many, one in pairs:
        rows, news = ([value] if isinstance(value, Tensor) else value for value in (many, one))
        for row, new in zip(rows, news, strict=True):
            row[i, ..., : new.shape[-1]] = new[0]
