"""Published APCodec weights → our names, strictly: a missing, extra or misshapen tensor is named and refused.

Published are two files, `{"encoder": state dict}` (the quantizer in it) and `{"decoder": state dict}`, in any order. A
flat file with the prefixes `encoder.` and `decoder.` is understood too; `module.` behind them, both spellings of weight
norm, and weights that were multiplied out are. Which of the two networks it is, the tensors say ("v2": norm over time
and projections, "v1": layer scale); the config file does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiotok.codecs.apcodec.configuration_apcodec import ApCodecConfig
from audiotok.conversion import KeyRule, convert_state_dict, read_checkpoint, read_config
from audiotok.errors import CheckpointError, ConfigError, did_you_mean

HALVES = ("encoder", "decoder")

# The v1 network has this kernel whatever its config says.
V1_DOWNSAMPLE_KERNEL = 15
# Released models, by network: what neither the tensors nor (for the first line) a config file says.
RELEASED = {
    "v2": {"sampling_rate": 48000, "win_length": 320},
    "v1": {"sampling_rate": 16000, "win_length": 160},
}

# Keys of the published config.json → ours. Those of one line must agree: our model has one width or kernel for them.
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "sampling_rate": ("sampling_rate",),
    "n_fft": ("n_fft",),
    "win_length": ("win_size",),
    "stft_hop_length": ("hop_size",),
    "downsampling_ratio": ("ratio",),
    "hidden_size": ("latent_dim",),
    "amplitude_size": ("AMP_Encoder_channel", "AMP_Decoder_channel"),
    "phase_size": ("PHA_Encoder_channel", "PHA_Decoder_channel"),
    "downsample_kernel_size": ("AMP_Encoder_output_downconv_kernel_size", "PHA_Encoder_output_downconv_kernel_size"),
    "upsample_kernel_size": ("AMP_Decoder_input_upconv_kernel_size", "PHA_Decoder_input_upconv_kernel_size"),
    "latent_kernel_size": ("latent_output_conv_kernel_size", "latent_input_conv_kernel_size"),
    "output_kernel_size": (
        "AMP_Decoder_output_conv_kernel_size",
        "PHA_Decoder_output_R_conv_kernel_size",
        "PHA_Decoder_output_I_conv_kernel_size",
    ),
}
# Sizes that the published code has in its source; some config files name them.
OPTIONAL_KEYS: dict[str, tuple[str, int]] = {
    "trunk_size": ("dim", 256),
    "num_hidden_layers": ("num_layers", 8),
    "intermediate_size": ("intermediate_dim", 512),
    "num_codebooks": ("n_codebooks", 4),
    "codebook_size": ("codebook_size", 1024),
    "num_mels": ("num_mels_for_loss", 80),
}
# Read by the published training script, or by nothing at all.
UNUSED = re.compile(
    r"batch_size|learning_rate|adam_b[12]|lr_decay|seed|training_epochs|segment_size|num_mels|num_workers|num_gpus|"
    r".*_interval|.*_(list|path|dir|file|folder)|(AMP|PHA)_(En|De)coder_resblock_(kernel|dilation)_sizes|"
    r"(AMP|PHA)_Encoder_input_conv_kernel_size"
)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def _squeeze_last(weight: Tensor) -> Tensor:
    """A convolution of kernel 1 `[out, in, 1]` is a linear layer `[out, in]`."""
    return weight.squeeze(-1)


def _weight_norm(theirs: str, ours: str, transform: Callable[[Tensor], Tensor] | None = None) -> list[KeyRule]:
    """Both spellings of weight norm: torch's parametrization and the older weight_g, weight_v."""
    return [
        KeyRule(rf"{theirs}\.bias", rf"{ours}.bias"),
        KeyRule(rf"{theirs}\.(?:parametrizations\.weight\.original0|weight_g)", rf"{ours}.weight_g", transform),
        KeyRule(rf"{theirs}\.(?:parametrizations\.weight\.original1|weight_v)", rf"{ours}.weight_v", transform),
    ]


def _branch(half: str, theirs: str, ours: str) -> list[KeyRule]:
    """A trunk and the layer behind it."""
    block, layer = rf"{half}\.convnext_{theirs}\.(\d+)", rf"{half}.{ours}.trunk.stack.layers.\1"
    return [
        KeyRule(rf"{half}\.embed_{theirs}\.(.+)", rf"{half}.{ours}.trunk.embed.\1"),
        KeyRule(rf"{half}\.norm_{theirs}\.(.+)", rf"{half}.{ours}.trunk.norm.\1"),
        KeyRule(rf"{block}\.dwconv\.(.+)", rf"{layer}.depthwise_conv.\2"),
        KeyRule(rf"{block}\.norm\.(.+)", rf"{layer}.layer_norm.\2"),
        KeyRule(rf"{block}\.pwconv1\.(.+)", rf"{layer}.up_proj.\2"),
        KeyRule(rf"{block}\.grn\.(.+)", rf"{layer}.response_norm.\2", _flat),
        KeyRule(rf"{block}\.pwconv2\.(.+)", rf"{layer}.down_proj.\2"),
        KeyRule(rf"{block}\.gamma", rf"{layer}.scale"),
        KeyRule(rf"{half}\.final_layer_norm_{theirs}\.(.+)", rf"{half}.{ours}.trunk.stack.layer_norm.\1"),
        KeyRule(rf"{half}\.out_{theirs}\.(.+)", rf"{half}.{ours}.out_proj.\1"),
    ]


_STAGE, _OUR_STAGE = r"encoder\.quantizer\.quantizers\.(\d+)", r"quantizer.stages.\1"

RULES = [
    *(rule for half in HALVES for rule in _branch(half, "logamp", "amplitude") + _branch(half, "pha", "phase")),
    *_weight_norm(r"encoder\.AMP_Encoder_downsample_output_conv", "encoder.amplitude.downsample"),
    *_weight_norm(r"encoder\.PHA_Encoder_downsample_output_conv", "encoder.phase.downsample"),
    *_weight_norm(r"encoder\.latent_output_conv", "encoder.latent_conv"),
    *_weight_norm(rf"{_STAGE}\.in_proj", rf"{_OUR_STAGE}.in_proj", _squeeze_last),
    *_weight_norm(rf"{_STAGE}\.out_proj", rf"{_OUR_STAGE}.out_proj", _squeeze_last),
    KeyRule(rf"{_STAGE}\.codebook\.weight", rf"{_OUR_STAGE}.codebook.weight"),
    *_weight_norm(r"decoder\.latent_input_conv", "decoder.latent_conv"),
    *_weight_norm(r"decoder\.AMP_Decoder_upsample_input_conv", "decoder.amplitude.upsample"),
    *_weight_norm(r"decoder\.PHA_Decoder_upsample_input_conv", "decoder.phase.upsample"),
    *_weight_norm(r"decoder\.AMP_Decoder_output_conv", "decoder.log_amplitude_conv"),
    *_weight_norm(r"decoder\.PHA_Decoder_output_R_conv", "decoder.real_conv"),
    *_weight_norm(r"decoder\.PHA_Decoder_output_I_conv", "decoder.imaginary_conv"),
]


def convert(files: list[Path], config_file: Path | None) -> tuple[ApCodecConfig, dict[str, Tensor]]:
    """Configuration and tensors of published files; without a config file, of the released model that they fit."""
    weights = read_halves(files)
    config = convert_config(None if config_file is None else read_config(config_file), weights)
    return config, convert_weights(weights, config)


# Weights


def read_halves(files: list[Path]) -> dict[str, Tensor]:
    """One state dict with the prefixes `encoder.` and `decoder.` from the published files."""
    weights: dict[str, Tensor] = {}
    for file in files:
        part = _with_prefixes(read_checkpoint(file), file)
        if twice := sorted(set(part) & set(weights)):
            raise CheckpointError(f"{file} holds tensors that an earlier file holds too: {', '.join(twice[:6])}.")
        weights.update(part)
    for half in HALVES:
        if not any(key.startswith(f"{half}.") for key in weights):
            raise CheckpointError(
                f"The {half} is missing: APCodec is published as two files, one for the encoder and one for the "
                "decoder. Give both."
            )
    return weights


def _with_prefixes(state: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    nested = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    if foreign := sorted({*nested} - {*HALVES}):
        raise CheckpointError(
            f"{file} holds {', '.join(foreign)}, but neither encoder nor decoder can be read of these: files with "
            "discriminators and optimizers are no part of the codec. Give the encoder_... and decoder_... files."
        )
    flat = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for half, tensors in nested.items():
        flat |= {f"{half}.{key}": tensor for key, tensor in tensors.items()}
    # What training on several GPUs leaves in the names.
    return {re.sub(r"^(encoder|decoder)\.module\.", r"\1.", key): tensor for key, tensor in flat.items()}


def convert_weights(published: Mapping[str, Tensor], config: ApCodecConfig) -> dict[str, Tensor]:
    """Published tensors → our state dict for `config`; the strict map lives in `audiotok.conversion`."""
    from audiotok.codecs.apcodec.modeling_apcodec import ApCodecModel

    with torch.device("meta"):
        expected = ApCodecModel(config).state_dict()
    return convert_state_dict(_with_weight_norm(published), RULES, expected)


def _with_weight_norm(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that were multiplied out, as gain and direction again."""
    normalised = re.compile(r"(.+(?:_conv|\.in_proj|\.out_proj))\.weight")
    split: dict[str, Tensor] = {}
    for key, tensor in published.items():
        if match := normalised.fullmatch(key):
            split[f"{match[1]}.weight_v"] = tensor
            split[f"{match[1]}.weight_g"] = tensor.norm(dim=tuple(range(1, tensor.ndim)), keepdim=True)
        else:
            split[key] = tensor
    return split


# Configurations


def convert_config(published: Mapping[str, Any] | None, weights: Mapping[str, Tensor]) -> ApCodecConfig:
    """The published config and the network that the weights are of; None for the sizes that the weights have."""
    network = _network(weights)
    keys: dict[str, Any] = {**RELEASED[network], **_sizes(weights)} if published is None else _translated(published)
    keys["response_norm"] = network == "v2"
    keys["codebook_projections"] = any(".in_proj." in key for key in weights)
    if network == "v1":
        keys["downsample_kernel_size"] = V1_DOWNSAMPLE_KERNEL
    return ApCodecConfig(**keys)


def _network(weights: Mapping[str, Tensor]) -> str:
    if any(".grn." in key for key in weights):
        return "v2"
    if any(re.fullmatch(r".+convnext_\w+\.\d+\.gamma", key) for key in weights):
        return "v1"
    raise CheckpointError(
        "The weights are of no known APCodec: its blocks have a norm over time (convnext_logamp.0.grn.gamma, 48 kHz) "
        "or a layer scale (convnext_logamp.0.gamma, 16 kHz)."
    )


def _translated(published: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys from those of a published config; what is unknown, missing or disagrees is refused."""
    theirs = {key for group in CONFIG_KEYS.values() for key in group} | {key for key, _ in OPTIONAL_KEYS.values()}
    for key in published:
        if key not in theirs and not UNUSED.fullmatch(key):
            raise ConfigError(f'The config has the key "{key}", which is not known.{did_you_mean(key, theirs)}')
    ours = {name: published.get(key, default) for name, (key, default) in OPTIONAL_KEYS.items()}
    for name, group in CONFIG_KEYS.items():
        if missing := [key for key in group if key not in published]:
            raise ConfigError(f"The config lacks {', '.join(missing)}: give the config.json of the published model.")
        if len(values := {published[key] for key in group}) > 1:
            raise ConfigError(f"{', '.join(group)} are {sorted(values)}: they must be one number.")
        ours[name] = published[group[0]]
    return ours


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """What the shapes of the tensors say; hop and ratio are those of all released models."""
    split = _with_weight_norm(
        {re.sub(r"parametrizations\.weight\.original1", "weight_v", k): t for k, t in weights.items()}
    )

    def size(key: str, dim: int) -> int:
        if key not in split:
            raise CheckpointError(f"The weights lack {key}: are these the files of a whole APCodec?")
        return split[key].shape[dim]

    def count(pattern: str) -> int:
        return len({match[1] for key in split if (match := re.match(pattern, key))})

    return {
        "n_fft": 2 * (size("encoder.embed_logamp.weight", 1) - 1),
        "trunk_size": size("encoder.embed_logamp.weight", 0),
        "intermediate_size": size("encoder.convnext_logamp.0.pwconv1.weight", 0),
        "num_hidden_layers": count(r"encoder\.convnext_logamp\.(\d+)\."),
        "amplitude_size": size("encoder.out_logamp.weight", 0),
        "phase_size": size("encoder.out_pha.weight", 0),
        "hidden_size": size("encoder.latent_output_conv.weight_v", 0),
        "num_codebooks": count(_STAGE),
        "codebook_size": size("encoder.quantizer.quantizers.0.codebook.weight", 0),
        "downsample_kernel_size": size("encoder.AMP_Encoder_downsample_output_conv.weight_v", 2),
        "upsample_kernel_size": size("decoder.AMP_Decoder_upsample_input_conv.weight_v", 2),
        "latent_kernel_size": size("encoder.latent_output_conv.weight_v", 2),
        "output_kernel_size": size("decoder.AMP_Decoder_output_conv.weight_v", 2),
    }
