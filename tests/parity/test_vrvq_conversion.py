"""VRVQ weights load as training leaves them, whole and strictly: nothing missing, nothing left over."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audiotok import VrvqConfig, VrvqModel
from audiotok.auto import FAMILIES, load_published
from audiotok.codecs.vrvq.conversion_vrvq import convert, convert_config, convert_weights, rules
from audiotok.conversion import convert_state_dict
from audiotok.errors import CheckpointError, ConfigError, OptionError, UnsafeCheckpointError, WeightMismatchError

NEWER = re.compile(r"weight_([gv])$")
NEWER_NAMES = {"g": "parametrizations.weight.original0", "v": "parametrizations.weight.original1"}
# What the published constructor writes into metadata.kwargs whatever was trained.
UNTRUE = {
    "quantizer_dropout": 0.0,
    "full_codebook_rate": 0.0,
    "level_min": None,
    "level_max": None,
    "level_dist": "uniform",
    "detach_imp_map_input": False,
    "imp2mask_alpha": 1.0,
}


@pytest.fixture
def released(shared: Path) -> dict[str, Tensor]:
    """Every tensor of the full model, without its values."""
    manifest = json.loads((shared / "golden" / "vrvq" / "released_manifest.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in manifest["shapes"].items()}


@pytest.fixture
def tiny(golden: Callable) -> Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]:
    """`tiny("vbr")` → published weights and constructor arguments."""
    files = golden("vrvq")
    return lambda kind: (files.weights(f"tiny_{kind}"), files.config(f"tiny_{kind}"))


def first_clip(golden: Callable, kind: str) -> tuple[Tensor, Tensor]:
    """A waveform of the case and the codes that its frames keep."""
    v = golden("vrvq").vectors(f"tiny_{kind}/vectors")
    codes = v["clip.codes"].long()
    return v["clip.audio"], codes * v["clip.mask"].long() if kind == "vbr" else codes


def answers(codec: VrvqModel, golden: Callable, kind: str) -> bool:
    audio, codes = first_clip(golden, kind)
    with torch.inference_mode():
        return torch.equal(codec.encode(audio).audio_codes, codes)


def write_checkpoint(file: Path, weights: dict[str, Tensor], kwargs: dict[str, Any] | None) -> Path:
    metadata = {} if kwargs is None else {"kwargs": kwargs}
    torch.save({"state_dict": weights, "metadata": metadata}, file)
    return file


# Names


def test_key_map_is_total_and_one_to_one(released: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = set(VrvqModel(VrvqConfig()).state_dict())
    mapped = [ours for key in released for rule in rules(VrvqConfig()) if (ours := rule.apply(key)) is not None]
    assert len(released) == 318
    assert len(mapped) == len(set(mapped)) == 318, "each key has exactly one rule"
    assert set(mapped) == expected == set(convert_weights(released, VrvqConfig()))


def one_of_each_kind(keys: list[str]) -> list[str]:
    """The first key of each pattern of layer numbers."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        kinds[re.sub(r"\d+", "#", key)].append(key)
    return [same[0] for same in kinds.values()]


def test_every_kind_of_tensor_is_needed_in_its_shape(tiny: Callable) -> None:
    weights, arguments = tiny("vbr")
    config, kinds = convert_config(arguments), one_of_each_kind(list(weights))
    expected, our_rules = convert_weights(weights, config), rules(config)
    assert len(kinds) > 25
    for key in kinds:
        without = {k: t for k, t in weights.items() if k != key}
        with pytest.raises(WeightMismatchError, match="1 missing"):
            convert_state_dict(without, our_rules, expected)
        longer = weights[key].new_zeros(weights[key].shape[0] + 1, *weights[key].shape[1:])
        with pytest.raises(WeightMismatchError, match=re.escape(key)):
            convert_state_dict({**weights, key: longer}, our_rules, expected)


@pytest.mark.parametrize(
    "key",
    [
        "encoder.block.7.weight_v",  # the encoder has layers 0 to 6
        "encoder.block.1.block.3.block.0.alpha",
        "quantizer.quantizers.8.codebook.weight",
        "quantizer.imp_subnet.blocks.5.0.alpha",
        "decoder.model.1.block.1.weight",
        "encoder_block_0_bias",
        "state_dict",
    ],
)
def test_extra_tensors_are_named_and_refused(key: str, released: dict[str, Tensor]) -> None:
    with pytest.raises(WeightMismatchError, match=re.escape(key)):
        convert_weights({**released, key: torch.empty(2, device="meta")}, VrvqConfig())


def test_a_constant_rate_has_no_subnet(tiny: Callable) -> None:
    weights, arguments = tiny("vbr")
    constant = convert_config({**arguments, "model_type": "CBR"})
    with pytest.raises(WeightMismatchError, match="imp_subnet"):
        convert_weights(weights, constant)
    plain = {key: tensor for key, tensor in weights.items() if "imp_subnet" not in key}
    assert len(convert_weights(plain, constant)) == len(weights) - 24
    with pytest.raises(WeightMismatchError, match="24 missing"):
        convert_weights(plain, convert_config(arguments))


def test_newer_weight_norm_names(tiny: Callable) -> None:
    weights, arguments = tiny("vbr")
    config = convert_config(arguments)
    newer = {NEWER.sub(lambda m: NEWER_NAMES[m[1]], key): tensor for key, tensor in weights.items()}
    assert len(set(newer) - set(weights)) > 100
    found, expected = convert_weights(newer, config), convert_weights(weights, config)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    key = "encoder.block.0.weight_g"
    with pytest.raises(WeightMismatchError, match="weight_g"):
        convert_weights({**newer, key: weights[key]}, config)


# Files as they stand


@pytest.mark.parametrize("kind", ["vbr", "cbr"])
def test_every_case_loads_as_it_stands(kind: str, golden: Callable) -> None:
    files = golden("vrvq")
    codec = load_published(
        FAMILIES["vrvq"], [files.path(f"tiny_{kind}/weights.safetensors")], files.path(f"tiny_{kind}/config.json")
    )
    assert not codec.training
    assert codec.config.variable_rate == (kind == "vbr")
    assert answers(codec, golden, kind)


@pytest.mark.slow
def test_full_size_loads_as_it_stands(golden: Callable, tmp_path: Path) -> None:
    """330 MB; without a config the published main configuration is meant."""
    save_file(golden("vrvq").weights("full_vbr"), tmp_path / "weights.safetensors")
    codec = load_published(FAMILIES["vrvq"], [tmp_path / "weights.safetensors"], None)
    v = golden("vrvq").vectors("full_vbr/vectors")
    with torch.inference_mode():
        output = codec.encode(v["short37.audio"])
    assert torch.equal(output.audio_codes_mask.sum(dim=1), v["short37.n_codes"].long())


@pytest.mark.parametrize("kind", ["vbr", "cbr"])
def test_published_container(kind: str, tiny: Callable, golden: Callable, tmp_path: Path) -> None:
    """weights.pth: what the kwargs say of the architecture is true, what they say of training is not."""
    weights, arguments = tiny(kind)
    file = write_checkpoint(tmp_path / "weights.pth", weights, {**arguments, **UNTRUE})
    codec = load_published(FAMILIES["vrvq"], [file], None)
    assert answers(codec, golden, kind)
    ours, main = codec.config, VrvqConfig()
    for key in ours.training_keys:
        assert getattr(ours, key) == getattr(main, key), key
    trained = convert([file], _written(tmp_path, {**arguments, "imp2mask_alpha": 4.0, "level_max": 3}))[0]
    assert (trained.surrogate_alpha, trained.level_max) == (4.0, 3)


def _written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def test_containers_without_arguments_need_a_config(tiny: Callable, golden: Callable, tmp_path: Path) -> None:
    weights, arguments = tiny("vbr")
    nested = write_checkpoint(tmp_path / "nested.pth", weights, None)
    torch.save(weights, tmp_path / "flat.pth")
    for file in (nested, tmp_path / "flat.pth"):
        with pytest.raises(WeightMismatchError, match="Is the config the one"):
            load_published(FAMILIES["vrvq"], [file], None)  # taken for the main configuration
        assert answers(load_published(FAMILIES["vrvq"], [file], _written(tmp_path, arguments)), golden, "vbr")


def test_other_containers_are_refused(tiny: Callable, tmp_path: Path) -> None:
    weights, arguments = tiny("vbr")
    torch.save({"model_state_dict": weights}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r'"state_dict".*weights\.pth'):
        convert([tmp_path / "other.pth"], None)
    write_checkpoint(tmp_path / "code.pth", weights, {**arguments, "model": torch.nn.Linear(1, 1)})
    with pytest.raises(UnsafeCheckpointError, match="execute"):
        convert([tmp_path / "code.pth"], None)
    with pytest.raises(CheckpointError, match=r"one file.*2 were given"):
        convert([tmp_path / "other.pth"] * 2, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_stored_precisions_become_float32(dtype: torch.dtype, tiny: Callable) -> None:
    weights, arguments = tiny("vbr")
    config = convert_config(arguments)
    found = convert_weights({key: tensor.to(dtype) for key, tensor in weights.items()}, config)
    exact = convert_weights(weights, config)
    assert all(torch.equal(tensor, exact[key].to(dtype).float()) for key, tensor in found.items())


# Published configurations


def test_defaults_are_the_main_configuration(golden: Callable) -> None:
    assert VrvqConfig().to_dict() == convert_config(golden("vrvq").config("full_vbr")).to_dict()


def test_defaults_of_the_published_constructor() -> None:
    """Nine books, alpha 1 and no clips of full depth, where a config does not say otherwise."""
    config = convert_config({})
    assert (config.num_codebooks, config.surrogate_alpha, config.full_codebook_rate) == (9, 1.0, 0.0)
    assert config.hidden_size == 1024 and config.variable_rate


def test_one_dimension_a_book(golden: Callable) -> None:
    config = convert_config({"encoder_dim": 2, "decoder_dim": 32, "n_codebooks": 3, "codebook_dim": [8, 4, 2]})
    with torch.device("meta"):
        codec = VrvqModel(config)
    assert [book.shape[1] for book in codec.codebook_embeddings()] == [8, 4, 2]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"encoder_dims": 2}, '"encoder_dims".*Did you mean "encoder_dim"'),
        ({"model_type": "ABR"}, "model_type='ABR'.*VBR, CBR"),
        ({"codebook_size": [64] * 8}, "one size"),
        ({"latent_dim": 48}, "hidden_size=48.*32 channels"),
        ({"decoder_rates": [8, 8, 4, 4]}, "multiply to 1024.*512"),
        ({"decoder_dim": 40}, "decoder_hidden_size=40.*multiple of 16"),
        ({"codebook_dim": [8, 8]}, "codebook_dim.*8 books"),
        ({"quantizer_dropout": 0.5}, "quantizer_dropout=0.5.*constant rate"),
        ({"level_dist": "loguniform"}, "level_distribution='loguniform'.*Did you mean \"log_uniform\""),
        ({"level_min": 7}, "level_min=7"),
        ({"full_codebook_rate": 1.0}, "full_codebook_rate=1.0.*below 1"),
        ({"encoder_rates": [1, 512]}, "downsampling_ratios=1.*at least 2"),
        ({"encoder_rates": []}, r"downsampling_ratios=\[\]"),
    ],
)
def test_impossible_configurations(changes: dict[str, Any], words: str, tiny: Callable) -> None:
    _, arguments = tiny("vbr")
    with pytest.raises((ConfigError, OptionError), match=words):
        convert_config({**arguments, **changes})
