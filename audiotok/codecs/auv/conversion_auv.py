"""Published AUV weights → our names, strictly: a missing, extra or misshapen tensor is named and refused.

The published file (`auv.pt`) is a flat state dict with the prefixes `tokenizer.` (encoder and quantizer) and
`token2wav.` (decoder); the architecture is hard-coded upstream, so a file without `config.json` is the released
model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiotok.codecs.auv.configuration_auv import AuvConfig
from audiotok.conversion import KeyRule, merge_weights, read_config, translate_config_block
from audiotok.errors import ConfigError

# Derived from the config or only counting: dropped on conversion.
DERIVED = re.compile(r"(stft_head\.stft|istft_head\.istft)\.window$|\.num_batches_tracked$")


def _weight_norm(side: str) -> list[KeyRule]:
    """Both spellings of weight norm: torch's parametrization and the older weight_g, weight_v."""
    stem = rf"tokenizer\.vq\.quantizers\.(\d+)\.{side}\."
    ours = rf"quantizer.stages.\1.{side}."
    return [
        KeyRule(stem + r"bias", ours + "bias"),
        KeyRule(stem + r"(?:parametrizations\.weight\.original0|weight_g)", ours + "weight_g", _squeeze_last),
        KeyRule(stem + r"(?:parametrizations\.weight\.original1|weight_v)", ours + "weight_v", _squeeze_last),
    ]


def _squeeze_last(weight: Tensor) -> Tensor:
    """A convolution of kernel 1 `[out, in, 1]` is a linear layer `[out, in]`."""
    return weight.squeeze(-1)


def _backbone(theirs: str, ours: str) -> list[KeyRule]:
    return [
        KeyRule(
            rf"{theirs}\.conformer\.(layers\.\d+\.conv_module\.pointwise_conv[12]\.weight)",
            rf"{ours}.backbone.\1",
            _squeeze_last,
        ),
        KeyRule(rf"{theirs}\.conformer\.(.+)", rf"{ours}.backbone.\1"),
    ]


RULES = [
    KeyRule(r"tokenizer\.stft_head\.inp\.(.+)", r"encoder.input_proj.\1"),
    *_backbone("tokenizer", "encoder"),
    *_weight_norm("in_proj"),
    *_weight_norm("out_proj"),
    KeyRule(r"tokenizer\.vq\.quantizers\.(\d+)\._codebook\.weight", r"quantizer.stages.\1.codebook.weight"),
    *_backbone("token2wav", "decoder"),
    KeyRule(r"token2wav\.istft_head\.out\.(.+)", r"decoder.head.\1"),
]


def convert(files: list[Path], config_file: Path | None) -> tuple[AuvConfig, dict[str, Tensor]]:
    """Configuration and tensors of published files; without a config file, of the released model."""
    config = convert_config(None if config_file is None else read_config(config_file))
    return config, convert_weights(merge_weights(files), config)


def convert_config(published: dict[str, Any] | None) -> AuvConfig:
    """`{sample_rate, enc_conf, vq_conf, dec_conf[, distill_depth]}` → `AuvConfig`; None is the released model."""
    if published is None:
        return AuvConfig()
    blocks = translate_config_block(
        published,
        "config",
        {
            "sample_rate": "sampling_rate",
            "enc_conf": "enc_conf",
            "vq_conf": "vq_conf",
            "dec_conf": "dec_conf",
            "distill_depth": "distill_depth",
        },
    )
    stack_keys = {
        "hop_length": "hop_length",
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_mult": "ffn_mult",
        "head_dim": "head_dim",
        "num_heads": "num_attention_heads",
        "qk_norm": "qk_norm",
        "qk_norm_scale": "qk_norm_scale",
        "conv_kernel_size": "conv_kernel_size",
        "causal": "causal_conv",
        "max_position_embeddings": None,  # the size of a cache upstream, not a limit
    }
    vq_keys = {
        "vq_type": None,
        "num_quantizers": "num_quantizers",
        "dim": "dim",
        "codebook_size": "codebook_size",
        "codebook_dim": "codebook_dim",
        "commitment": "commitment_cost",
        "codebook_partition_maps": "domain_ranges",
    }
    stacks: dict[str, dict[str, Any]] = {}
    for ours, theirs in (("encoder_config", "enc_conf"), ("decoder_config", "dec_conf")):
        defaults = {"num_layers": 12, "hidden_size": 1024, "hop_length": None}
        stacks[ours] = {**defaults, **translate_config_block(blocks.pop(theirs), theirs, stack_keys)}
    vq_defaults = {
        "num_quantizers": 1,
        "dim": 512,
        "codebook_size": 8192,
        "codebook_dim": 8,
        "domain_ranges": None,
    }
    vq: dict[str, Any] = {**vq_defaults, **translate_config_block(blocks.pop("vq_conf", {}), "vq_conf", vq_keys)}
    hidden = {stack.pop("hidden_size") for stack in stacks.values()} | {vq.pop("dim")}
    hops = {stack.pop("hop_length") for stack in stacks.values()}
    if len(hidden) > 1 or len(hops) > 1:
        raise ConfigError(
            f"enc_conf, dec_conf and vq_conf disagree: hidden sizes {sorted(hidden)}, hops {sorted(hops)}; nothing "
            "projects between them, so each must be one number."
        )
    stages = vq.pop("num_quantizers")
    size = vq["codebook_size"]
    vq["codebook_size"] = list(size) if isinstance(size, (list, tuple)) else size if stages == 1 else [size] * stages
    ranges = vq.pop("domain_ranges")
    return AuvConfig(
        hidden_size=hidden.pop(), hop_length=hops.pop(), domain_ranges=ranges or {}, **blocks, **stacks, **vq
    )


def convert_weights(published: dict[str, Tensor], config: AuvConfig) -> dict[str, Tensor]:
    """Published tensors → our state dict for `config`; the strict map lives in `audiotok.conversion`."""
    from audiotok.codecs.auv.modeling_auv import AuvModel
    from audiotok.conversion import convert_state_dict

    with torch.device("meta"):
        expected = AuvModel(config).state_dict()
    return convert_state_dict(published, RULES, expected, derived=DERIVED)
