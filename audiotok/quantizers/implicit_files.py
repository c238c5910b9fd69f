"""Published QINCo2 and QINCo1 files → what `QINCo2` is made of. Foreign keys are mapped strictly, no code is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiotok.conversion import KeyRule, convert_state_dict, read_checkpoint, read_config, translate_config_block
from audiotok.errors import CheckpointError, ConfigError, check_number

PARAMETERS = {
    "K": "codebook_size",
    "M": "num_quantizers",
    "L": "num_blocks",
    "de": "embedding_dim",
    "dh": "hidden_dim",
    "A": "num_candidates",
    "B": "beam_size",
    "qinco1_mode": "qinco1_mode",
    # Says how a first step by inverted lists is made; `ivf_in_use` alone tells whether there is one.
    "ivf_K": None,
    "ivf_in_use": None,
}
# What published files leave out where it is None.
ABSENT = {"embedding_dim": None, "num_candidates": None, "qinco1_mode": False}
QINCO1_PARAMETERS = {
    "d": "dim",
    "K": "codebook_size",
    "M": "num_quantizers",
    "L": "num_blocks",
    "h": "hidden_dim",
    "db_scale": "db_scale",
}

RULES = [
    # Older trainings kept the projections inside a block.
    KeyRule(r"(steps\.\d+\.)residual_blocks\.\d+\.((?:in|out)_proj\.weight)", r"\1\2"),
    KeyRule(r"(data_mean|data_std|steps\.\d+\..+)", r"\1"),
]
QINCO1_RULES = [
    KeyRule(r"codebook0\.weight", r"steps.0.codebook.weight"),
    KeyRule(r"step(\d+)\.codebook\.weight", r"steps.\1.codebook.weight"),
    KeyRule(r"step(\d+)\.MLPconcat\.(weight|bias)", r"steps.\1.concat.mlp.\2"),
    KeyRule(r"step(\d+)\.residual_block(\d+)\.0\.weight", r"steps.\1.residual_blocks.\2.up_proj.weight"),
    KeyRule(r"step(\d+)\.residual_block(\d+)\.2\.weight", r"steps.\1.residual_blocks.\2.down_proj.weight"),
]


def read_files(weights: str | Path, config: str | Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Published tensors by their names, and the published configuration."""
    checkpoint = read_checkpoint(weights)
    settings = {key: checkpoint[key] for key in ("parameters", "data_dim") if key in checkpoint}
    tensors = checkpoint["model"] if "model" in checkpoint else checkpoint
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f'{weights} holds no state dict of tensors, neither flat nor under "model".')
    if config is None and not settings:
        raise ConfigError(f"{weights} does not say what it was made with: give its config.json too.")
    return dict(tensors), settings if config is None else read_config(config)


def convert(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Published tensors and configuration → arguments and state dict of `QINCo2`."""
    tensors = {key.removeprefix("module."): value for key, value in weights.items()}
    if "steps.0.ivf_centroids.weight" in tensors:
        raise ConfigError("The weights begin with inverted lists (ivf_centroids), made for search: not supported.")
    original = "db_scale" in config
    options, scale = qinco1_options(config) if original else (qinco2_options(config), None)
    expected = _expected(options)
    if scale is not None:
        tensors |= _statistics(expected, scale)
    rules = QINCO1_RULES + RULES if original else RULES
    return options, convert_state_dict(tensors, rules, expected, derived=unused_tables(options["num_candidates"]))


def unused_tables(num_candidates: int | None) -> re.Pattern[str]:
    """Second tables that files may hold and nothing reads: of step 0, and of all steps without `num_candidates`."""
    return re.compile(r"\bsteps\.0\.substep\." if num_candidates else r"\bsteps\.\d+\.substep\.")


def qinco2_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"parameters", "data_dim"}` → arguments of `QINCo2`."""
    outer = translate_config_block(config, "The config", {"parameters": "parameters", "data_dim": "dim"})
    block = outer.get("parameters")
    if not isinstance(block, Mapping):
        raise ConfigError('The config has no "parameters": a JSON object with K, M, L, dh, B, and de, A where set.')
    if block.get("ivf_in_use"):
        raise ConfigError("ivf_in_use=true: a first step by inverted lists, made for search, is not supported.")
    options = {**ABSENT, **translate_config_block(block, '"parameters"', PARAMETERS)}
    if "dim" in outer:
        options["dim"] = outer["dim"]
    return _complete(options, {"data_dim": "dim", **{k: v for k, v in PARAMETERS.items() if v}})


def qinco1_options(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """An original QINCo1's sizes → arguments of `QINCo2`, and the number that its data were divided by."""
    options = _complete(translate_config_block(config, "The config", QINCO1_PARAMETERS), QINCO1_PARAMETERS)
    scale = options.pop("db_scale")
    check_number("db_scale", scale, least=0, kind=float)
    return {**options, "embedding_dim": None, "num_candidates": None, "beam_size": 1, "qinco1_mode": True}, scale


def _complete(options: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    missing = [theirs for theirs, ours in keys.items() if ours not in options]
    if missing:
        raise ConfigError(f"The config does not say {', '.join(missing)}: add what the weights were made with.")
    return options


def _expected(options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of our state dict; checks the options too."""
    from audiotok.quantizers.implicit import QINCo2

    with torch.device("meta"):
        return QINCo2(**options).state_dict()


def _statistics(expected: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """What QINCo1 keeps outside its state dict, or not at all."""
    starts = {"data_std": float(scale), "data_mean": 0.0, "xtarget_mean": 0.0, "xtarget_var": 1.0}
    endings = {name: name.rpartition(".")[2] for name in expected}
    return {n: torch.full(expected[n].shape, starts[end]) for n, end in endings.items() if end in starts}
