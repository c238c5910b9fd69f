"""Published QINCo2 and QINCo1 files load as they stand; what does not fit is named and refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audiotok.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    OptionError,
    UnsafeCheckpointError,
    WeightMismatchError,
)
from audiotok.quantizers import QINCo2

PUBLISHED = "q2-m4k32d16"
ORIGINAL = "q1-m8k64d16"


@pytest.fixture
def weights(golden: Callable) -> dict[str, Tensor]:
    return golden("qinco2").weights(PUBLISHED)


@pytest.fixture
def config(golden: Callable) -> dict[str, Any]:
    return golden("qinco2").config(PUBLISHED)


@pytest.fixture
def x(golden: Callable) -> Tensor:
    return golden("qinco2").vectors(f"{PUBLISHED}/vectors")["x"]


@pytest.fixture
def codes(golden: Callable) -> Tensor:
    return golden("qinco2").vectors(f"{PUBLISHED}/vectors")["codes.A4B4"].long()


def test_safetensors_and_config(golden: Callable, x: Tensor, codes: Tensor) -> None:
    files = golden("qinco2")
    q = QINCo2.from_files(files.path(f"{PUBLISHED}/weights.safetensors"), files.path(f"{PUBLISHED}/config.json"))
    assert not q.training
    assert torch.equal(q.encode(x), codes)


def test_published_container(
    tmp_path: Path, weights: dict[str, Tensor], config: dict[str, Any], x: Tensor, codes: Tensor
) -> None:
    checkpoint = {"epoch": 3, "model": {f"module.{k}": v for k, v in weights.items()}, "optimizer": {}, **config}
    torch.save(checkpoint, tmp_path / "qinco2.pt")
    assert torch.equal(QINCo2.from_files(tmp_path / "qinco2.pt").encode(x), codes)


def test_parameters_that_a_container_has_beside_ours(
    tmp_path: Path, weights: dict[str, Tensor], config: dict[str, Any]
) -> None:
    parameters = {**config["parameters"], "ivf_K": 1048576, "ivf_in_use": False, "qinco1_mode": False}
    torch.save({"model": weights, "parameters": parameters, "data_dim": 16}, tmp_path / "a.pt")
    assert QINCo2.from_files(tmp_path / "a.pt").beam_size == 4


def test_names_of_older_trainings(weights: dict[str, Tensor], config: dict[str, Any], x: Tensor, codes: Tensor) -> None:
    older = {
        key.replace(".in_proj", ".residual_blocks.0.in_proj").replace(".out_proj", ".residual_blocks.1.out_proj"): v
        for key, v in weights.items()
    }
    older["steps.0.substep.codebook.weight"] = torch.zeros(32, 16)
    assert torch.equal(QINCo2.from_tensors(older, config).encode(x), codes)


def test_original_qinco1(golden: Callable) -> None:
    files = golden("qinco2")
    q = QINCo2.from_files(files.path(f"{ORIGINAL}/weights_v1.safetensors"), files.path(f"{ORIGINAL}/config_v1.json"))
    v = files.vectors(f"{ORIGINAL}/vectors")
    assert torch.equal(q.encode(v["x"]), v["codes.A0B1"].long())
    torch.testing.assert_close(q.decode(v["codes.A0B1"]).detach(), v["recon_v1"], atol=2e-5, rtol=0)
    state = QINCo2.from_tensors(files.weights(ORIGINAL), files.config(ORIGINAL)).state_dict()
    for name, value in q.state_dict().items():
        if "xtarget" not in name:
            torch.testing.assert_close(value, state[name], atol=0, rtol=1e-6)


def test_second_tables_are_left_out_where_the_config_does_without(
    golden: Callable, weights: dict[str, Tensor], config: dict[str, Any], x: Tensor
) -> None:
    q = QINCo2.from_tensors(weights, {**config, "parameters": {**config["parameters"], "A": 0, "B": 1}})
    assert not any("substep" in name for name in q.state_dict())
    recorded = golden("qinco2").vectors(f"{PUBLISHED}/vectors")["codes.A0B1"]
    assert torch.equal(q.encode(x), recorded.long())
    with pytest.raises(OptionError, match=r"num_candidates=4 .* no second tables"):
        q.encode(x, num_candidates=4)


def test_state_dict_comes_back(tmp_path: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    q = QINCo2.from_tensors(weights, config)
    save_file(q.state_dict(), tmp_path / "again.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = QINCo2.from_files(tmp_path / "again.safetensors", tmp_path / "config.json").state_dict()
    assert again.keys() == weights.keys()
    assert again["data_std"].ndim == 0
    assert all(torch.equal(value, weights[name]) for name, value in again.items())


# What does not fit


def test_missing_extra_and_misshapen_tensors(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    del weights["steps.2.substep.codebook.weight"]
    weights["steps.3.concat.mlp.bias"] = torch.zeros(23)
    weights["steps.1.gate.weight"] = torch.zeros(2)
    with pytest.raises(WeightMismatchError) as caught:
        QINCo2.from_tensors(weights, config)
    for name in ("steps.2.substep.codebook.weight", "steps.3.concat.mlp.bias", "steps.1.gate.weight"):
        assert name in str(caught.value)


def test_other_sizes_than_the_config_says(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name, value in (("M", 3), ("K", 16), ("L", 3), ("de", None), ("dh", 16)):
        with pytest.raises(WeightMismatchError):
            QINCo2.from_tensors(weights, {**config, "parameters": {**config["parameters"], name: value}})


def test_inverted_lists_are_refused(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="ivf_in_use"):
        QINCo2.from_tensors(weights, {**config, "parameters": {**config["parameters"], "ivf_in_use": True}})
    with pytest.raises(ConfigError, match="ivf_centroids"):
        QINCo2.from_tensors({**weights, "steps.0.ivf_centroids.weight": torch.zeros(2, 16)}, config)


def test_configs_that_say_too_little_or_too_much(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    parameters = dict(config["parameters"])
    with pytest.raises(ConfigError, match=r'"Kk".*Did you mean "K"'):
        QINCo2.from_tensors(weights, {**config, "parameters": {**parameters, "Kk": 2}})
    del parameters["dh"]
    with pytest.raises(ConfigError, match="does not say dh"):
        QINCo2.from_tensors(weights, {**config, "parameters": parameters})
    with pytest.raises(ConfigError, match="does not say data_dim"):
        QINCo2.from_tensors(weights, {"parameters": config["parameters"]})
    with pytest.raises(ConfigError, match='no "parameters"'):
        QINCo2.from_tensors(weights, {"data_dim": 16})
    with pytest.raises(ConfigError, match=r"does not say .*L"):
        QINCo2.from_tensors(weights, {"d": 16, "db_scale": 1.0})


def test_sizes_of_a_wrong_kind(golden: Callable, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="codebook_size='32'"):
        QINCo2.from_tensors(weights, {**config, "parameters": {**config["parameters"], "K": "32"}})
    original = json.loads(golden("qinco2").path(f"{ORIGINAL}/config_v1.json").read_text())
    for name, value in (("d", "16"), ("db_scale", None)):
        with pytest.raises(ConfigError, match=f"{'dim' if name == 'd' else name}="):
            QINCo2.from_tensors({}, {**original, name: value})


def test_files_that_cannot_be_read(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointNotFoundError):
        QINCo2.from_files(tmp_path / "nothing.pt")
    torch.save(weights, tmp_path / "flat.pt")
    with pytest.raises(ConfigError, match=r"give its config\.json"):
        QINCo2.from_files(tmp_path / "flat.pt")
    torch.save({"model": [1, 2]}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        QINCo2.from_files(tmp_path / "odd.pt")
    # As the first QINCo1 release: a whole pickled object.
    (tmp_path / "module.pt").write_bytes(pickle.dumps(Path("/"), protocol=2))
    with pytest.raises(UnsafeCheckpointError):
        QINCo2.from_files(tmp_path / "module.pt")
