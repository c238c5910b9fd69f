"""VRVQ weights as training leaves them → ours, strictly: a missing, extra or misshapen tensor is named and refused.

`weights.pth` holds {"state_dict", "metadata": {"kwargs"}}. The kwargs have all arguments of the constructor, but only
those that the model keeps as attributes are true; the others show the constructor's defaults, whatever was trained. So
without a config file the keys that only training reads are ours (those of the published main configuration).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiotok.codecs.vrvq.configuration_vrvq import DILATIONS, VrvqConfig
from audiotok.conversion import (
    KeyRule,
    convert_state_dict,
    read_checkpoint,
    read_config,
    translate_config_block,
)
from audiotok.errors import CheckpointError, ConfigError, check_choice

# Their keys → ours, and their constructor's defaults where a config does not name them.
ARCHITECTURE = {
    "sample_rate": "sampling_rate",
    "encoder_dim": "encoder_hidden_size",
    "encoder_rates": "downsampling_ratios",
    "latent_dim": "hidden_size",
    "decoder_dim": "decoder_hidden_size",
    "decoder_rates": "upsampling_ratios",
    "n_codebooks": "num_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "model_type": "variable_rate",
}
TRAINING = {
    "quantizer_dropout": "quantizer_dropout",
    "full_codebook_rate": "full_codebook_rate",
    "level_min": "level_min",
    "level_max": "level_max",
    "level_dist": "level_distribution",
    "detach_imp_map_input": "detach_importance",
    "imp2mask_alpha": "surrogate_alpha",
}
PUBLISHED_DEFAULTS = {"n_codebooks": 9, "full_codebook_rate": 0.0, "imp2mask_alpha": 1.0}


def convert(files: list[Path], config_file: Path | None) -> tuple[VrvqConfig, dict[str, Tensor]]:
    """Configuration and tensors of one weight file; a config file goes before what the weights say of themselves."""
    if len(files) != 1:
        raise CheckpointError(f"VRVQ's weights are one file, weights.pth: {len(files)} were given.")
    weights, kwargs = read_published(files[0])
    if config_file is not None:
        config = convert_config(read_config(config_file))
    elif kwargs is not None:
        config = convert_config({key: value for key, value in kwargs.items() if key not in TRAINING}, TRAINING)
    else:
        config = VrvqConfig()
    return config, convert_weights(weights, config)


def read_published(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state dict of a weight file, and the constructor's arguments where it tells them."""
    checkpoint = read_checkpoint(file)
    kwargs = None
    if "state_dict" in checkpoint:
        metadata = checkpoint.get("metadata", {})
        kwargs = metadata.get("kwargs") if isinstance(metadata, dict) else None
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, dict) or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise CheckpointError(
            f'{file} holds neither tensors nor a "state_dict" of them: give the weights.pth that the training wrote.'
        )
    return checkpoint, kwargs


def convert_config(published: dict[str, Any], unknown: dict[str, str] | None = None) -> VrvqConfig:
    """Arguments of the published constructor → `VrvqConfig`.

    Args:
        published: those that are known; the others are the constructor's defaults.
        unknown: names whose value nobody knows; they become the defaults of `VrvqConfig`.
    """
    defaults = {key: value for key, value in PUBLISHED_DEFAULTS.items() if key not in (unknown or {})}
    block = {**defaults, "model_type": "VBR", **published}
    check_choice("model_type", block["model_type"], ("VBR", "CBR"))
    if isinstance(block.get("codebook_size"), list):
        raise ConfigError(f"codebook_size={block['codebook_size']} is not legal: all books of VRVQ have one size.")
    keys = translate_config_block(block, "config", {**ARCHITECTURE, **TRAINING})
    keys["variable_rate"] = keys["variable_rate"] == "VBR"
    # None stands for what the constructor works out, or does not use.
    return VrvqConfig(**{key: value for key, value in keys.items() if value is not None})


def convert_weights(published: dict[str, Tensor], config: VrvqConfig) -> dict[str, Tensor]:
    """Published tensors → our state dict for `config`; the strict map lives in `audiotok.conversion`."""
    from audiotok.codecs.vrvq.modeling_vrvq import VrvqModel

    with torch.device("meta"):
        expected = VrvqModel(config).state_dict()
    return convert_state_dict(published, rules(config), expected)


def rules(config: VrvqConfig) -> list[KeyRule]:
    """Every published key of this configuration and ours; layers are numbered through, so their numbers shift."""
    downs, ups = len(config.downsampling_ratios), len(config.upsampling_ratios)
    found = [*_conv("encoder.block.0", "encoder.conv_in")]
    for i in range(downs):
        theirs, ours = f"encoder.block.{i + 1}.block", f"encoder.blocks.{i}"
        found += _units(theirs, 0, ours)
        found += _snake(f"{theirs}.3", f"{ours}.down.snake") + _conv(f"{theirs}.4", f"{ours}.down.conv")
    found += _snake(f"encoder.block.{downs + 1}", "encoder.conv_out.snake")
    found += _conv(f"encoder.block.{downs + 2}", "encoder.conv_out.conv")
    for k in range(config.num_codebooks):
        theirs, ours = f"quantizer.quantizers.{k}", f"quantizer.stages.{k}"
        found += _conv(f"{theirs}.in_proj", f"{ours}.in_proj", _squeeze_last)
        found += _conv(f"{theirs}.out_proj", f"{ours}.out_proj", _squeeze_last)
        found += [KeyRule(_exactly(f"{theirs}.codebook.weight"), f"{ours}.codebook.weight")]
    for i in range(len(config.importance_channels) + 2 if config.variable_rate else 0):
        theirs = "quantizer.imp_subnet." + ("in_block" if i == 0 else f"blocks.{i - 1}")
        found += _snake(f"{theirs}.0", f"importance.stages.{i}.snake")
        found += _conv(f"{theirs}.1", f"importance.stages.{i}.conv")
    found += _conv("decoder.model.0", "decoder.conv_in")
    for i in range(ups):
        theirs, ours = f"decoder.model.{i + 1}.block", f"decoder.blocks.{i}"
        found += _snake(f"{theirs}.0", f"{ours}.snake") + _conv(f"{theirs}.1", f"{ours}.up")
        found += _units(theirs, 2, ours)
    found += _snake(f"decoder.model.{ups + 1}", "decoder.conv_out.snake")
    return found + _conv(f"decoder.model.{ups + 2}", "decoder.conv_out.conv")


def _units(theirs: str, first: int, ours: str) -> list[KeyRule]:
    """The residual units of a block, which begin at layer `first` of it."""
    found: list[KeyRule] = []
    for j in range(len(DILATIONS)):
        unit, mine = f"{theirs}.{first + j}.block", f"{ours}.units.{j}"
        found += _snake(f"{unit}.0", f"{mine}.snake1") + _conv(f"{unit}.1", f"{mine}.conv1")
        found += _snake(f"{unit}.2", f"{mine}.snake2") + _conv(f"{unit}.3", f"{mine}.conv2")
    return found


def _snake(theirs: str, ours: str) -> list[KeyRule]:
    return [KeyRule(_exactly(f"{theirs}.alpha"), f"{ours}.alpha")]


def _conv(theirs: str, ours: str, transform: Any = None) -> list[KeyRule]:
    """Both spellings of weight norm: torch's parametrization and the older weight_g, weight_v."""
    stem = _exactly(theirs + ".")
    return [
        KeyRule(stem + "bias", f"{ours}.bias"),
        KeyRule(stem + r"(?:weight_g|parametrizations\.weight\.original0)", f"{ours}.weight_g", transform),
        KeyRule(stem + r"(?:weight_v|parametrizations\.weight\.original1)", f"{ours}.weight_v", transform),
    ]


def _exactly(key: str) -> str:
    return key.replace(".", r"\.")


def _squeeze_last(weight: Tensor) -> Tensor:
    """A convolution of kernel 1 `[out, in, 1]` is a linear layer `[out, in]`."""
    return weight.squeeze(-1)
