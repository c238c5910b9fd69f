"""QinCodec weights in their exchange form → our names, strictly: a missing, extra or misshapen tensor is named.

No weights of QinCodec are published. The exchange form is ours: `encoder.*` and `decoder.*` with the short names of
the Vocos family, and a quantizer either as `quantizer.*` or as a published QINCo2 file of its own, whose parameters
then describe it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiotok.codecs.qincodec.configuration_qincodec import QinCodecConfig
from audiotok.conversion import KeyRule, convert_state_dict, read_checkpoint, read_config, translate_config_block
from audiotok.errors import CheckpointError
from audiotok.quantizers import implicit_files

_SIDE, _OURS = r"(encoder|decoder)\.", r"autoencoder.\1."
_BLOCK, _LAYER = _SIDE + r"blocks\.(\d+)\.", _OURS + r"backbone.stack.layers.\2."
RULES = [
    KeyRule(_SIDE + r"(embed|norm)\.(weight|bias)", _OURS + r"backbone.\2.\3"),
    KeyRule(_BLOCK + r"dwconv\.(weight|bias)", _LAYER + r"depthwise_conv.\3"),
    KeyRule(_BLOCK + r"norm\.(weight|bias)", _LAYER + r"layer_norm.\3"),
    KeyRule(_BLOCK + r"pwconv1\.(weight|bias)", _LAYER + r"up_proj.\3"),
    KeyRule(_BLOCK + r"pwconv2\.(weight|bias)", _LAYER + r"down_proj.\3"),
    KeyRule(_BLOCK + r"gamma", _LAYER + r"scale"),
    KeyRule(_SIDE + r"final_norm\.(weight|bias)", _OURS + r"backbone.stack.layer_norm.\2"),
    KeyRule(_SIDE + r"out\.(weight|bias)", _OURS + r"out.\2"),
    # Older trainings kept the projections inside a block.
    KeyRule(r"(quantizer\.steps\.\d+\.)residual_blocks\.\d+\.((?:in|out)_proj\.weight)", r"\1\2"),
    KeyRule(r"(quantizer\..+)", r"\1"),
]
QUANTIZER = "quantizer."
# Published letters → ours, for the plain residual quantizer, which has no networks.
RQ_KEYS = {"type": "type", "M": "num_quantizers", "K": "codebook_size", "B": "beam_size"}


def convert(files: list[Path], config_file: Path | None) -> tuple[QinCodecConfig, dict[str, Tensor]]:
    """Configuration and tensors of files in the exchange form; without a config file, of our 44.1 kHz design."""
    published: dict[str, Tensor] = {}
    parameters: dict[str, Any] | None = None
    for file in files:
        tensors, found = _read(file)
        if twice := sorted(set(tensors) & set(published)):
            raise CheckpointError(f"{file} holds tensors that an earlier file holds too: {', '.join(twice[:6])}.")
        published.update(tensors)
        parameters = found or parameters
    config = convert_config({} if config_file is None else read_config(config_file), parameters)
    return config, convert_weights(published, config)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors under our prefixes; and of a QINCo2 checkpoint, the parameters that it was trained with."""
    checkpoint = read_checkpoint(file)
    tensors = checkpoint.get("model", checkpoint)
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f'{file} holds no tensors by name, neither flat nor under "model".')
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    alone = any(key.startswith(("steps.", "data_mean")) for key in tensors)
    return {QUANTIZER * alone + key: value for key, value in tensors.items()}, checkpoint.get("parameters")


def convert_config(published: dict[str, Any], parameters: dict[str, Any] | None = None) -> QinCodecConfig:
    """The config in the exchange form: our flat keys, and the block `quantizer` in QINCo2's letters (or `type: rq`).

    Args:
        parameters: of a QINCo2 checkpoint; they describe the quantizer where the config does not.
    """
    flat = ("sampling_rate", "n_fft", "hop_length", "hidden_size", "intermediate_size", "num_layers", "latent_dim")
    keys = {key: key for key in (*flat, "feature_exponent", "quantizer")}
    values = translate_config_block(published, "config", keys)
    block = values.pop("quantizer", parameters)
    return QinCodecConfig(**values, quantizer=None if block is None else _quantizer_block(block))


def _quantizer_block(published: dict[str, Any]) -> dict[str, Any]:
    if published.get("type") == "rq":
        return translate_config_block(published, "quantizer", RQ_KEYS)
    letters = {key: value for key, value in published.items() if key != "type"}
    options = implicit_files.qinco2_options({"parameters": letters, "data_dim": 1})
    options.pop("dim")
    return {"type": published.get("type", "qinco2"), **options, "num_candidates": options["num_candidates"] or None}


def convert_weights(published: dict[str, Tensor], config: QinCodecConfig) -> dict[str, Tensor]:
    """Tensors in the exchange form → our state dict for `config`; the strict map lives in `audiotok.conversion`."""
    from audiotok.codecs.qincodec.modeling_qincodec import QinCodecModel

    with torch.device("meta"):
        expected = QinCodecModel(config).state_dict()
    unused = implicit_files.unused_tables((config.quantizer or {}).get("num_candidates"))
    return convert_state_dict(published, RULES, expected, derived=unused)
