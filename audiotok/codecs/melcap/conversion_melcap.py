"""Published MelCap weights → our names, strictly: a missing, extra or misshapen tensor is named and refused.

A codec is two published files. Stage 1 (`vae_########`, no suffix) holds `{encoder: the whole tokenizer, steps,
epoch}`: the encoder, the book and a mel decoder. Stage 2 (`last.ckpt`, Lightning) holds under `state_dict` that mel
decoder fine-tuned and the vocoder, beside training state; its `config.yaml` describes the vocoder. Stage 1 was built
from constants in the published code.

Dropped, because nothing that runs needs it (a warning says how many tensors of each kind): the mel decoder of stage 1,
which must fit all the same; windows and mel filters; discriminators and losses of the training.

The published files leave two things open: the activation, and without a `config.yaml` the padding of the head.
`deciding_melcap` settles what no configuration states.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers.utils import logging

from audiotok.codecs.melcap.configuration_melcap import GRID_STEP, NUM_HALVINGS, PATCH, MelCapConfig
from audiotok.conversion import (
    NAMED,
    KeyRule,
    convert_state_dict,
    read_checkpoint,
    read_config,
    translate_config_block,
)
from audiotok.errors import CheckpointError, CheckpointNotFoundError, ConfigError, check_choice

logger = logging.get_logger(__name__)

# Files


# What a Lightning checkpoint may hold beside tensors and plain values: types that run nothing of the file when they are
# made. The dictionaries of Lightning, which need not be installed, become plain ones.
HARMLESS: list[Any] = [
    argparse.Namespace,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (dict, "lightning.fabric.utilities.data.AttributeDict"),
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "lightning.pytorch.utilities.parsing.AttributeDict"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]
# Under which key a nested file has its tensors: stage 1, stage 2.
WRAPPERS = ("encoder", "state_dict")


def read_published(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of both stages by their published names, which tell the stages apart.

    Args:
        files: of either stage in any order and number, nested as published or flat; in flat ones names may begin
            with `stage1.` or `stage2.`.
    """
    weights: dict[str, Tensor] = {}
    for file in files:
        part = _read(file)
        if twice := sorted(set(part) & set(weights)):
            raise CheckpointError(f"{file} holds tensors that an earlier file holds too: {', '.join(twice[:NAMED])}.")
        weights.update(part)
    for stage, missing in ((1, not any(map(IN_STAGE_1, weights))), (2, all(map(IN_STAGE_1, weights)))):
        if missing:
            raise CheckpointError(
                f"The files hold nothing of stage {stage}: MelCap is two files, the tokenizer (vae_########) and the "
                "vocoder (last.ckpt); give both."
            )
    return weights


def _read(file: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals(HARMLESS):
        content = read_checkpoint(file)
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{file} is no file of MelCap: tensors are expected in it, under encoder (stage 1) or under state_dict "
            f"(stage 2), but {', '.join(others[:NAMED])} are none."
        )
    return {re.sub(r"^stage[12]\.", "", key): tensor for key, tensor in content.items()}


# Tensors


IN_STAGE_1 = re.compile(r"(encoder|quant_conv|quantizer|post_quant_conv|decoder)\..+").fullmatch


def _picture(theirs: str, ours: str) -> list[KeyRule]:
    """One side of the picture's autoencoder; `theirs` is a pattern."""
    level = rf"{theirs}\.(?:down|up)\.(\d+)"
    resampling = "halvings" if ours == "encoder" else "doublings"
    return [
        KeyRule(level + r"\.block\.(\d+)\.nin_shortcut\.(.+)", rf"{ours}.levels.\1.blocks.\2.shortcut.\3"),
        KeyRule(level + r"\.block\.(\d+)\.(.+)", rf"{ours}.levels.\1.blocks.\2.\3"),
        KeyRule(level + r"\.attn\.(\d+)\.(.+)", rf"{ours}.levels.\1.attentions.\2.\3"),
        KeyRule(level + r"\.(?:down|up)sample\.conv\.(.+)", rf"{ours}.{resampling}.\1.\2"),
        KeyRule(rf"{theirs}\.mid\.block_([12])\.(.+)", rf"{ours}.middle.block\1.\2"),
        KeyRule(rf"{theirs}\.mid\.attn_1\.(.+)", rf"{ours}.middle.attention.\1"),
        KeyRule(rf"{theirs}\.((?:conv_in|norm_out|conv_out)\..+)", rf"{ours}.\1"),
    ]


def _block(theirs: str, ours: str) -> KeyRule:
    """One part of the vocoder's blocks."""
    return KeyRule(rf"backbone\.convnext\.(\d+)\.{theirs}", rf"vocoder.backbone.stack.layers.\1.{ours}")


RULES = [
    *_picture("encoder", "encoder"),
    KeyRule(r"quant_conv\.(.+)", r"encoder.latent_proj.\1"),
    KeyRule(r"quantizer\.embedding\.weight", r"quantizer.stages.0.codebook.weight"),
    KeyRule(r"feature_extractor\.mel_decoder\.0\.(.+)", r"decoder.latent_proj.\1"),
    *_picture(r"feature_extractor\.mel_decoder\.1", "decoder"),
    KeyRule(r"backbone\.((?:embed|norm)\..+)", r"vocoder.backbone.\1"),
    _block("gamma", "scale"),
    _block(r"dwconv\.(.+)", r"depthwise_conv.\2"),
    _block(r"norm\.(.+)", r"layer_norm.\2"),
    _block(r"pwconv1\.(.+)", r"up_proj.\2"),
    _block(r"pwconv2\.(.+)", r"down_proj.\2"),
    KeyRule(r"backbone\.final_layer_norm\.(.+)", r"vocoder.backbone.stack.layer_norm.\1"),
    KeyRule(r"head\.out\.(.+)", r"vocoder.head.\1"),
]
# The mel decoder of stage 1, under the names of the one that replaces it.
REPLACED = [KeyRule(r"post_quant_conv\.(.+)", r"decoder.latent_proj.\1"), *_picture("decoder", "decoder")]
DROPPED = {
    "windows and mel filters, which the configuration gives": re.compile(
        r"feature_extractor\.mel_spec\.(spectrogram\.window|mel_scale\.fb)|head\.istft\.window"
    ),
    "the training's discriminators and losses": re.compile(r"(multiperioddisc|multiresddisc|melspec_loss)\..+"),
}


def convert_weights(published: Mapping[str, Tensor], config: MelCapConfig) -> dict[str, Tensor]:
    """Published tensors of both stages → our state dict for `config`."""
    from audiotok.codecs.melcap.modeling_melcap import MelCapModel

    with torch.device("meta"):
        return convert_tensors(published, MelCapModel(config).state_dict())


def convert_tensors(published: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors of both stages → those of `expected`, a state dict of ours (meta tensors do)."""
    dropped = {what: [key for key in published if pattern.fullmatch(key)] for what, pattern in DROPPED.items()}
    dropped["the mel decoder of stage 1, which that of stage 2 replaces"] = [
        key for key, tensor in published.items() if _is_replaced(key, tensor, expected)
    ]
    needed = {key: tensor for key, tensor in published.items() if not any(key in keys for keys in dropped.values())}
    if kinds := [_described(what, keys) for what, keys in dropped.items() if keys]:
        logger.warning(f"MelCap: dropped {'; '.join(kinds)}.")
    return convert_state_dict(needed, RULES, expected)


def _is_replaced(key: str, tensor: Tensor, expected: Mapping[str, Tensor]) -> bool:
    """Whether it is a tensor of the stage-1 mel decoder; one that would not fit is left to be refused."""
    ours = next((name for rule in REPLACED if (name := rule.apply(key)) is not None), None)
    return ours is not None and ours in expected and expected[ours].shape == tensor.shape


def _described(what: str, keys: list[str]) -> str:
    """Tensors of one kind, in words."""
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{len(keys)} tensors of {what} ({', '.join(sorted(keys)[:NAMED])}{more})"


# Configuration


# Top-level keys of a configuration; what Lightning adds for the training is not read.
TOP_KEYS: dict[str, str | None] = {
    "tokenizer": "tokenizer",
    "hidden_act": "hidden_act",
    "model": "model",
    **dict.fromkeys(("seed_everything", "trainer", "data", "ckpt_path", "optimizer", "lr_scheduler")),
}
# What the published stage 1 also allows, and this code does not.
ONLY = {
    "in_channels": 1,
    "out_channels": 1,
    "spatial_compression": GRID_STEP,
    "patch_size": PATCH,
    "patch_method": "haar",
    "quantizer": "VQ",
    "encoder": "Default",
    "decoder": "Default",
}
TOKENIZER_KEYS: dict[str, str | None] = {
    "channels": "base_channels",
    "channels_mult": "channel_multipliers",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "bottleneck_channels",
    "num_embeddings": "codebook_size",
    "embedding_dim": "codebook_dim",
    "resolution": "resolution",
    "attn_resolutions": "attn_resolutions",
    **dict.fromkeys(ONLY),
    **dict.fromkeys(("dropout", "z_factor", "num_quantizers", "name")),  # of training, or not read upstream either
}
EXTRACTOR_KEYS: dict[str, str | None] = {
    "sample_rate": "sampling_rate",
    "n_fft": "n_fft",
    "hop_length": "mel_hop_length",
    "n_mels": "num_mel_bins",
    "padding": "front_end_padding",
    "vae_ckpt_path": None,  # where stage 1 lay on its author's disk
}
BACKBONE_KEYS: dict[str, str | None] = {
    "input_channels": "num_mel_bins",
    "dim": "vocoder_hidden_size",
    "intermediate_dim": "vocoder_intermediate_size",
    "num_layers": "vocoder_num_layers",
    "layer_scale_init_value": None,  # only the start of a training
}
HEAD_KEYS: dict[str, str | None] = {
    "dim": "vocoder_hidden_size",
    "n_fft": "n_fft",
    "hop_length": "mel_hop_length",
    "padding": "head_padding",
}
# Keys of ours that a configuration may leave open, as the published files do.
OPEN = ("hidden_act", "head_padding")


def convert_config(published: Mapping[str, Any] | None) -> tuple[MelCapConfig, list[str]]:
    """The configuration, and those of the `OPEN` keys that nothing states; None is the released model.

    Args:
        published: `model.init_args` as in a stage-2 `config.yaml`; also, which no published file has, `tokenizer`, the
            constants of stage 1, and `hidden_act`.
    """
    blocks = translate_config_block(published or {}, "The configuration", TOP_KEYS)
    stated = _stage_2(blocks.get("model") or {})
    stated |= _stage_1(blocks.get("tokenizer") or {})
    if "hidden_act" in blocks:
        stated["hidden_act"] = blocks["hidden_act"]
    return MelCapConfig(**stated), [key for key in OPEN if key not in stated]


def _stage_1(block: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of the tokenizer's constants."""
    for key, value in ONLY.items():
        if block.get(key, value) != value:
            raise ConfigError(f"tokenizer.{key}={block[key]!r} is not legal: only {value!r} is understood.")
    stated = translate_config_block(block, "tokenizer", TOKENIZER_KEYS)
    if not {"resolution", "attn_resolutions"} & set(stated):
        return stated
    size = stated.pop("resolution", 96) // PATCH
    attending = stated.pop("attn_resolutions", (6, 12))
    levels = len(stated.get("channel_multipliers", MelCapConfig.channel_multipliers))
    # A level attends where its picture would have one of these sizes if it were `resolution` high at the start.
    sizes = [size >> min(level, NUM_HALVINGS) for level in range(levels)]
    return stated | {"attention_levels": [level for level, size in enumerate(sizes) if size in attending]}


def _stage_2(model: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of the front end and the vocoder; the same key of several parts must have one value."""
    arguments = dict(model.get("init_args") or {})
    parts = [
        ("model", {"sampling_rate": arguments.pop("sample_rate")} if "sample_rate" in arguments else {}),
        ("feature_extractor", _part(arguments, "feature_extractor", EXTRACTOR_KEYS)),
        ("backbone", _part(arguments, "backbone", BACKBONE_KEYS, "VocosBackbone")),
        ("head", _part(arguments, "head", HEAD_KEYS, "ISTFTHead")),
    ]
    if arguments:
        logger.info(f"MelCap: keys of the training were not read: {', '.join(sorted(arguments))}.")
    stated: dict[str, Any] = {}
    for name, part in parts:
        for key, value in part.items():
            if stated.setdefault(key, value) != value:
                raise ConfigError(
                    f"{name} has {key}={value!r}, a part before it {stated[key]!r}: nothing resamples or projects "
                    "between them, so both must be one number."
                )
    if "front_end_padding" in stated:  # upstream, anything but "center" is no padding at all
        stated["front_end_padding"] = "center" if stated["front_end_padding"] == "center" else "none"
    return stated


def _part(arguments: dict[str, Any], name: str, keys: dict[str, str | None], kind: str | None = None) -> dict[str, Any]:
    """Our keys of one `{class_path, init_args}`, taken out of `arguments`."""
    block = arguments.pop(name, None) or {}
    if kind is not None and "class_path" in block:
        check_choice(f"{name}: class_path", str(block["class_path"]).rpartition(".")[2], (kind,))
    return translate_config_block(block.get("init_args") or {}, name, keys)


def convert(files: list[Path], config_file: Path | None) -> tuple[MelCapConfig, dict[str, Tensor]]:
    """Configuration and tensors of published files.

    Without a config file the released model is meant; what is left open then, `deciding_melcap` decides by trial.
    """
    from audiotok.codecs.melcap.deciding_melcap import decide

    config, undecided = convert_config(None if config_file is None else _read_config(config_file))
    state = convert_weights(read_published(files), config)
    return (decide(config, undecided, state) if undecided else config), state


def _read_config(path: Path) -> dict[str, Any]:
    """JSON, or the YAML of Lightning's command line."""
    if path.suffix not in (".yaml", ".yml"):
        return read_config(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"There is no config file {path}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no plain YAML: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}: keys and values are needed.")
    return config
