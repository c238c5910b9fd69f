"""QinCodec's exchange form: short names of the Vocos family, a quantizer under its prefix or in a file of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qincodec_cases import HOP, RQ, TINY, make, noise
from safetensors.torch import save_file
from torch import Tensor

from audiotok import QinCodecConfig, QinCodecModel
from audiotok.auto import FAMILIES, load_published
from audiotok.codecs.qincodec.conversion_qincodec import convert, convert_config, convert_weights
from audiotok.errors import CheckpointError, ConfigError, WeightMismatchError

# Our names → those of the exchange form.
SHORTER = [
    (r"autoencoder\.", ""),
    (r"backbone\.stack\.layers\.", "blocks."),
    (r"backbone\.stack\.layer_norm", "final_norm"),
    (r"backbone\.", ""),
    (r"depthwise_conv", "dwconv"),
    (r"layer_norm", "norm"),
    (r"up_proj", "pwconv1"),
    (r"down_proj", "pwconv2"),
    (r"\.scale$", ".gamma"),
]
LETTERS = {"K": 32, "M": 6, "L": 1, "de": 12, "dh": 16, "A": 8, "B": 4}


def exchange_form(codec: QinCodecModel) -> dict[str, Tensor]:
    """The state dict under the names of the exchange form."""
    renamed = {}
    for key, tensor in codec.state_dict().items():
        if not key.startswith("quantizer."):
            for pattern, short in SHORTER:
                key = re.sub(pattern, short, key)
        renamed[key] = tensor.clone()
    return renamed


def exchange_config(quantizer: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        **TINY,
        "feature_exponent": 0.3,
        "quantizer": {"type": "qinco2", **LETTERS} if quantizer is None else quantizer,
    }


@pytest.fixture(scope="module")
def codec() -> QinCodecModel:
    return make()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, content: dict[str, Any]) -> Path:
        path = tmp_path / name
        if name.endswith(".json"):
            path.write_text(json.dumps(content))
        elif name.endswith(".pt"):
            torch.save(content, path)
        else:
            save_file(content, path)
        return path

    return write


def test_names_are_those_of_the_exchange_form(codec: QinCodecModel) -> None:
    names = set(exchange_form(codec))
    for side in ("encoder", "decoder"):
        parts = ["embed.weight", "norm.bias", "blocks.1.dwconv.weight", "blocks.0.norm.weight", "blocks.0.pwconv1.bias"]
        parts += ["blocks.1.pwconv2.weight", "blocks.0.gamma", "final_norm.bias", "out.weight"]
        assert {f"{side}.{part}" for part in parts} <= names
    assert {"quantizer.data_std", "quantizer.steps.0.codebook.weight", "quantizer.steps.5.concat.mlp.bias"} <= names


@torch.inference_mode()
def test_there_and_back(codec: QinCodecModel, write: Callable) -> None:
    file, config = write("weights.safetensors", exchange_form(codec)), write("config.json", exchange_config())
    loaded = load_published(FAMILIES["qincodec"], [file], config)
    assert loaded.config.to_dict() == codec.config.to_dict() | {"dtype": loaded.config.to_dict()["dtype"]}
    wave = noise(1, 1, 20 * HOP)
    codes = codec.encode(wave).audio_codes
    assert torch.equal(loaded.encode(wave).audio_codes, codes)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))


@torch.inference_mode()
@pytest.mark.parametrize("described", ["by the config", "by the checkpoint"])
def test_a_qinco2_file_beside_the_autoencoder(codec: QinCodecModel, write: Callable, described: str) -> None:
    """As published: a training checkpoint, perhaps of a model in parallel, with the letters of its parameters."""
    form = exchange_form(codec)
    quantizer = {key.removeprefix("quantizer."): t for key, t in form.items() if key.startswith("quantizer.")}
    checkpoint = {
        "epoch": 3,
        "model": {f"module.{key}": tensor for key, tensor in quantizer.items()},
        "parameters": {**LETTERS, "ivf_in_use": False, "ivf_K": 1048576},
        "data_dim": 8,
    }
    rest = {key: tensor for key, tensor in form.items() if not key.startswith("quantizer.")}
    config = exchange_config()
    if described == "by the checkpoint":
        del config["quantizer"]
    files = [write("autoencoder.safetensors", rest), write("qinco2.pt", checkpoint)]
    loaded = load_published(FAMILIES["qincodec"], files, write("config.json", config))
    wave = noise(1, 1, 20 * HOP)
    assert torch.equal(loaded.encode(wave).audio_codes, codec.encode(wave).audio_codes)


@pytest.mark.parametrize("with_tables", [True, False])
def test_older_files_of_the_quantizer(codec: QinCodecModel, with_tables: bool) -> None:
    """Projections inside a block, a second table at step 0, and tables where nothing is pre-selected."""
    block = {**TINY["quantizer"], "num_candidates": 8 if with_tables else None}
    model, form = QinCodecModel.around(codec, block), {}
    for key, tensor in exchange_form(model).items():
        form[re.sub(r"(?<=\d\.)(in|out)_proj", r"residual_blocks.0.\1_proj", key)] = tensor
    form["quantizer.steps.0.substep.codebook.weight"] = torch.zeros(32, 8)
    if not with_tables:
        form["quantizer.steps.3.substep.codebook.weight"] = torch.zeros(32, 8)
    assert sum("residual_blocks.0.in_proj" in key for key in form) == 5
    found = convert_weights(form, model.config)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_residual_quantizer(codec: QinCodecModel, write: Callable) -> None:
    other = QinCodecModel.around(codec, RQ)
    config = exchange_config({"type": "rq", "M": 6, "K": 32, "B": 4})
    files = [write("weights.safetensors", exchange_form(other))]
    found, weights = convert(files, write("config.json", config))
    assert found.quantizer == RQ
    assert set(weights) == set(other.state_dict())


def test_without_a_config_the_design_is_meant() -> None:
    assert convert_config({}).to_dict() == QinCodecConfig().to_dict()


@pytest.mark.parametrize("what", ["missing", "not known", "misshapen"])
def test_every_kind_of_tensor_is_needed_known_and_shaped(codec: QinCodecModel, what: str) -> None:
    form = exchange_form(codec)
    kinds = sorted({re.sub(r"\d+", "1", key) for key in form} & set(form))
    assert len(kinds) >= 34
    for key in kinds:
        changed = dict(form)
        tensor = changed.pop(key)
        if what == "not known":
            changed |= {key: tensor, f"{key}.more": tensor}
        elif what == "misshapen":
            changed[key] = torch.zeros(*tensor.shape, 2)
        with pytest.raises(WeightMismatchError, match=f"1 {what}"):
            convert_weights(changed, codec.config)


def test_files_that_hold_one_tensor_twice(codec: QinCodecModel, write: Callable) -> None:
    file = write("weights.safetensors", exchange_form(codec))
    with pytest.raises(CheckpointError, match=r"earlier file.*decoder\.blocks"):
        convert([file, file], write("config.json", exchange_config()))
    with pytest.raises(CheckpointError, match="no tensors by name"):
        convert([write("odd.pt", {"model": {"epoch": 3}})], None)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r'"hop_lenght".*Did you mean "hop_length"'):
        convert_config({"hop_lenght": 3})
    with pytest.raises(ConfigError, match='"Q"'):
        convert_config({"quantizer": {**LETTERS, "Q": 3}})
