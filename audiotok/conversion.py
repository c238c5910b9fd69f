"""Foreign checkpoints → ours: reading weight files safely, and a strict map of keys.

A conversion module of a codec lists `KeyRule`s (a regular expression of the published key, our key, and what to do
with the tensor). Every published tensor must match one rule, every tensor of ours must come out once and with the
right shape; anything else is named in a `WeightMismatchError`. No code from a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiotok.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    UnsafeCheckpointError,
    WeightMismatchError,
    did_you_mean,
)

# How many tensors an error names before it says "and N more".
NAMED = 6


@dataclass(frozen=True)
class KeyRule:
    """`pattern` must match a published key whole; `ours` is the replacement; `transform` is applied to the tensor."""

    pattern: str
    ours: str
    transform: Callable[[Tensor], Tensor] | None = None

    def apply(self, key: str) -> str | None:
        match = re.fullmatch(self.pattern, key)
        return match.expand(self.ours) if match else None


def convert_state_dict(
    published: Mapping[str, Tensor],
    rules: list[KeyRule],
    expected: Mapping[str, Tensor],
    derived: re.Pattern[str] | None = None,
) -> dict[str, Tensor]:
    """Map every published tensor to ours, float32 and contiguous.

    Args:
        published: their tensors by their keys.
        rules: tried in order; the first that matches decides.
        expected: our state dict (meta tensors do), for names and shapes.
        derived: keys of theirs that hold nothing of their own (windows, counters) and are dropped; keys of ours
            that match are filled with zeros when missing (counters).
    """
    converted: dict[str, Tensor] = {}
    extra, misshapen = [], []
    for key, tensor in published.items():
        if derived is not None and derived.search(key):
            continue
        ours, transform = _translate(key, rules)
        if ours is None or ours not in expected or ours in converted:
            extra.append(key)
            continue
        value = transform(tensor) if transform else tensor
        if value.shape != expected[ours].shape:
            misshapen.append(f"{key} {list(tensor.shape)} (ours: {ours} {list(expected[ours].shape)})")
            continue
        converted[ours] = (value.float() if value.is_floating_point() else value).contiguous()
    missing = []
    for key, like in expected.items():
        if key in converted or any(key in m for m in misshapen):
            continue
        if derived is not None and derived.search(key):
            converted[key] = torch.zeros(like.shape, dtype=like.dtype)
        else:
            missing.append(key)
    report_mismatch(missing, extra, misshapen)
    return converted


def report_mismatch(missing: list[str], extra: list[str], misshapen: list[str]) -> None:
    """Raise `WeightMismatchError` naming the tensors, unless all three lists are empty."""
    parts = []
    for what, names in (("missing", missing), ("not known", extra), ("misshapen", misshapen)):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            parts.append(f"{len(names)} {what}: {', '.join(sorted(names)[:NAMED])}{more}")
    if parts:
        raise WeightMismatchError(
            "The weights do not fit the model. Tensors " + "; ".join(parts) + ". Is the config the one they were "
            "made with?"
        )


def _translate(key: str, rules: list[KeyRule]) -> tuple[str | None, Callable[[Tensor], Tensor] | None]:
    for rule in rules:
        if (ours := rule.apply(key)) is not None:
            return ours, rule.transform
    return None, None


def translate_config_block(block: Mapping[str, Any], name: str, keys: Mapping[str, str | None]) -> dict[str, Any]:
    """Rename the keys of a published config block; None drops one, an unknown one is refused."""
    out = {}
    for key, value in block.items():
        if key not in keys:
            raise ConfigError(f'{name} has the key "{key}", which is not known.{did_you_mean(key, keys)}')
        if (ours := keys[key]) is not None:
            out[ours] = value
    return out


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A flat state dict from safetensors, or from a PyTorch file read with `weights_only=True`."""
    state = read_checkpoint(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a flat state dict of tensors.")
    return state


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a weight file holds: a state dict, or a dict with state dicts in it (PyTorch files only)."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointNotFoundError(f"There is no weight file {path}.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}.") from error
    try:
        # Only the zip format can be mapped into memory.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path} holds more than tensors, and loading it would execute its code. Convert it to safetensors where "
            "you trust it."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no readable PyTorch file: {error}.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}: a flat state dict of tensors is needed.")
    return state


def merge_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """One flat state dict from several weight files that share no name."""
    weights: dict[str, Tensor] = {}
    for file in files:
        part = read_weights(file)
        if twice := sorted(set(part) & set(weights)):
            raise CheckpointError(f"{file} holds tensors that an earlier file holds too: {', '.join(twice[:NAMED])}.")
        weights.update(part)
    return weights


def read_config(path: str | Path) -> dict[str, Any]:
    """A published config file (JSON object)."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"There is no config file {path}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}: a JSON object is needed.")
    return config
