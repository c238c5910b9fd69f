"""Batches of ids: padding as transformers' tokenizers do it, for collators and the Trainer.

Shapes: B clips, L ids; with 2-D layouts ids are `[Q, L]` a clip, and the last axis is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding

from audiotok.errors import InvalidIdError, OptionError
from audiotok.vocabulary import as_integers

LABEL_PAD_ID = -100  # what the losses of transformers ignore


def as_array(ids: Any) -> np.ndarray:
    """Integers of a list, array or tensor as a NumPy array."""
    if isinstance(ids, Tensor):
        return ids.detach().cpu().numpy()
    return np.asarray(ids, dtype=np.int64) if isinstance(ids, (list, tuple)) and len(ids) == 0 else np.asarray(ids)


def as_ids(ids: Any) -> np.ndarray:
    """Whole numbers of a list, array or tensor; anything else is refused with `InvalidIdError`."""
    return as_integers(ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids, "ids", InvalidIdError)


def truncation_budget(max_length: int | None, least: int) -> int:
    """`max_length`, checked: the ids to keep at most."""
    if max_length is None:
        raise OptionError("truncation=True needs max_length=, the number of ids to keep at most.")
    if max_length < least:
        raise OptionError(f"max_length={max_length} is not legal: at least {least} ids are needed here.")
    return max_length


def pad_batch(
    encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    pad_token_id: int,
    padding: bool | str,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    return_attention_mask: bool,
    return_tensors: str | None,
) -> BatchEncoding:
    """Pad `input_ids`, `attention_mask` and `labels` of a batch to one length; other columns stay.

    Args:
        encoded: a mapping of lists, or a list of examples.
        padding: True or "longest", "max_length", False or "do_not_pad".
    """
    if isinstance(encoded, Mapping) and encoded.get("input_ids") and np.ndim(encoded["input_ids"][0]) == 0:
        one = pad_batch(
            [encoded], pad_token_id, padding, max_length, pad_to_multiple_of, return_attention_mask, return_tensors
        )
        return one if return_tensors else BatchEncoding({key: rows[0] for key, rows in one.items()})
    columns = _columns(encoded)
    rows = [as_array(ids) for ids in columns.pop("input_ids")]
    masks = columns.pop("attention_mask", None) or [np.ones(ids.shape[-1], np.int64) for ids in rows]
    target = _target_length([ids.shape[-1] for ids in rows], padding, max_length, pad_to_multiple_of)
    out: dict[str, Any] = {"input_ids": [_pad(ids, target, pad_token_id) for ids in rows]}
    if return_attention_mask:
        out["attention_mask"] = [_pad(as_array(mask), target, 0) for mask in masks]
    if "labels" in columns:
        out["labels"] = [_pad(as_array(labels), target, LABEL_PAD_ID) for labels in columns.pop("labels")]
    out.update(columns)
    return _as_tensors(out, return_tensors)


def _columns(encoded: Any) -> dict[str, Any]:
    columns = dict(encoded) if isinstance(encoded, Mapping) else {}
    if not isinstance(encoded, Mapping) and encoded:
        columns = {key: [example[key] for example in encoded] for key in encoded[0]}
    if "input_ids" not in columns:
        raise OptionError(f"A batch to pad needs input_ids: found {', '.join(columns) or 'nothing'}.")
    return columns


def _target_length(lengths: list[int], padding: bool | str, max_length: int | None, multiple: int | None) -> int | None:
    """The length to pad to; None to leave lengths as they are."""
    if multiple is not None and multiple < 1:
        raise OptionError(f"pad_to_multiple_of={multiple} is not legal: a whole number of at least 1.")
    if padding in (False, "do_not_pad", None):
        return None
    if padding not in (True, "longest", "max_length"):
        raise OptionError(f'padding={padding!r} is not legal: choose True, "longest", "max_length" or False.')
    if padding == "max_length" and max_length is None:
        raise OptionError('padding="max_length" needs max_length=, the number of ids to pad to.')
    target = max_length if padding == "max_length" and max_length is not None else max(lengths, default=0)
    return -(-target // multiple) * multiple if multiple else target


def _pad(row: np.ndarray, target: int | None, value: int) -> np.ndarray:
    missing = 0 if target is None else max(0, target - row.shape[-1])
    return np.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, missing)], constant_values=value)


def _as_tensors(columns: dict[str, Any], kind: str | None) -> BatchEncoding:
    if kind is None:
        lists = {key: [v.tolist() if hasattr(v, "tolist") else v for v in rows] for key, rows in columns.items()}
        return BatchEncoding(lists)
    if kind not in ("pt", "np"):
        raise OptionError(f'return_tensors={kind!r} is not legal: choose "pt" or "np".')
    lengths = {ids.shape[-1] for ids in columns["input_ids"]}
    if len(lengths) > 1:
        raise OptionError(
            f"Clips of {len(lengths)} different lengths make no tensor: add padding=True, or leave out return_tensors."
        )
    stacked = {key: np.stack([as_array(row) for row in rows]) for key, rows in columns.items()}
    if kind == "np":
        return BatchEncoding(stacked)
    return BatchEncoding({key: torch.from_numpy(value) for key, value in stacked.items()})
