"""The tokenizer of MelCap, and the order in which the published code writes codes to a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from audiotok.codecs.melcap.feature_extraction_melcap import MelCapFeatureExtractor
from audiotok.codecs.melcap.modeling_melcap import MelCapModel
from audiotok.errors import CodesError, check_number
from audiotok.tokenizer import AudioTokenizer


class MelCapAudioTokenizer(AudioTokenizer):
    """`AudioTokenizer` of a `MelCapModel`; ids run column by column, in each from the lowest mel bins up.

    Options of `__call__`, or of `from_pretrained` as defaults, are those of every codec: the model attends over the
    whole clip, so `chunk_length_s=` and `context_s=` change codes (`MelCapModel.window_flips` says how many); without
    them a clip is encoded whole, as in the published code.
    """

    codec_class = MelCapModel
    feature_extractor_class = MelCapFeatureExtractor


def to_row_major(codes: Any) -> np.ndarray:
    """Codes `[rows, columns]` of one clip → `[rows * columns]` in the published order: all of row 0, then row 1, ...

    Args:
        codes: integers in a tensor, an array or lists.

    Raises:
        CodesError: they are no whole numbers, or not those of one clip.
    """
    grid = _whole_numbers(codes)
    if grid.ndim != 2:
        raise CodesError(f"codes have the shape {grid.shape}: give those of one clip, [rows, columns].")
    return grid.reshape(-1)


def from_row_major(codes: Any, num_rows: int) -> np.ndarray:
    """Codes in the published order → `[num_rows, columns]`, of which `decode` takes a batch.

    Args:
        codes: one integer a place, as in a published `<name>_id.txt` (`numpy.loadtxt(path, dtype=int)`).
        num_rows: 12 in the released model; `facts.num_codebooks`. The file does not say it.

    Raises:
        CodesError: they are no whole numbers, or make no whole rows.
    """
    check_number("num_rows", num_rows, least=1)
    flat = _whole_numbers(codes)
    if flat.ndim != 1 or flat.size == 0 or flat.size % num_rows:
        raise CodesError(
            f"codes have the shape {flat.shape}: a flat sequence of whole rows is needed, a multiple of {num_rows}."
        )
    return flat.reshape(num_rows, -1)


def _whole_numbers(codes: Any) -> np.ndarray:
    """Integers of a tensor on any device, an array or lists as an array."""
    try:
        array = torch.as_tensor(codes).numpy(force=True)
    except (TypeError, ValueError) as error:
        raise CodesError(f"codes are no array of numbers ({error}): pass integers, one clip at a time.") from error
    if array.dtype.kind not in "iu":
        raise CodesError(f"codes are {array.dtype}: they must be integers.")
    return array
