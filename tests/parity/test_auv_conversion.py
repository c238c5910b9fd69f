"""Published AUV weights load as they stand, whole and strictly: nothing missing, nothing left over."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from audiotok import AuvConfig, AuvModel
from audiotok.auto import FAMILIES, load_published
from audiotok.codecs.auv.conversion_auv import DERIVED, RULES, convert_config, convert_weights
from audiotok.conversion import convert_state_dict, read_weights
from audiotok.errors import CheckpointError, ConfigError, WeightMismatchError

BUNDLED = Path(__file__).parent / "data"
ALL_CASES = ["tiny", "tiny_options", "tiny_noproj"]
NEW_NAMES = re.compile(r"parametrizations\.weight\.original([01])$")


@pytest.fixture
def manifest(shared: Path) -> dict:
    """Every tensor of the released checkpoint: `state[name] = {shape, dtype}`, and the totals."""
    return json.loads((shared / "golden" / "auv" / "released_manifest.json").read_text())


@pytest.fixture
def released(manifest: dict) -> dict[str, Tensor]:
    """The released checkpoint without its values."""
    return {key: torch.empty(entry["shape"], device="meta") for key, entry in manifest["state"].items()}


@pytest.fixture
def tiny(golden: Callable) -> tuple[dict[str, Tensor], AuvConfig]:
    files = golden("auv")
    return files.weights("tiny"), convert_config(files.config("tiny"))


def first_clip(golden: Callable) -> tuple[Tensor, Tensor]:
    """A waveform `[1, 1, n]` of the tiny case and its codes `[1, 1, F]`."""
    v = golden("auv").vectors("tiny/vectors_domains")
    return v["input"][:, None], v["none/codes"].permute(1, 0, 2).long()


# The released configuration


def test_defaults_are_the_released_model(manifest: dict, golden: Callable) -> None:
    with torch.device("meta"):
        codec = AuvModel(AuvConfig())
    parameters = list(codec.parameters())
    assert sum(p.numel() for p in parameters) == 122_628_882
    assert len(parameters) == 535
    assert len(manifest["state"]) == 597
    assert convert_config(None).to_dict() == convert_config(golden("auv").config("full")).to_dict()


def test_parts_have_the_released_sizes() -> None:
    with torch.device("meta"):
        codec = AuvModel(AuvConfig())

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert size(codec.encoder.input_proj) == 656_896
    assert size(codec.encoder.backbone) == 48_456_704
    assert size(codec.encoder.backbone.layers[0]) == 6_056_960
    assert size(codec.quantizer) == 173_072
    assert size(codec.decoder.backbone) == 72_684_544
    assert size(codec.decoder.head) == 657_666


def test_key_map_is_total_and_one_to_one(released: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = set(AuvModel(AuvConfig()).state_dict())
    needed = [key for key in released if not DERIVED.search(key)]
    mapped = [next(ours for rule in RULES if (ours := rule.apply(key)) is not None) for key in needed]
    assert len(released) - len(needed) == 22  # two windows and twenty counters
    assert len(set(mapped)) == len(needed)
    assert set(mapped) | {key for key in expected if DERIVED.search(key)} == expected
    assert set(convert_weights(released, AuvConfig())) == expected


def one_of_each_kind(keys: list[str]) -> list[str]:
    """The first key of each pattern of layer numbers."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        kinds[re.sub(r"\d+", "#", key)].append(key)
    return [same[0] for same in kinds.values()]


def test_every_kind_of_tensor_is_needed_in_its_shape(tiny: tuple, released: dict[str, Tensor]) -> None:
    weights, config = tiny
    kinds, expected = one_of_each_kind(list(weights)), convert_weights(weights, config)
    assert len(kinds) == len(one_of_each_kind(list(released))) == 59
    for key in kinds:
        without = {k: t for k, t in weights.items() if k != key}
        if DERIVED.search(key):
            convert_state_dict(without, RULES, expected, DERIVED)
            continue
        with pytest.raises(WeightMismatchError, match="1 missing"):
            convert_state_dict(without, RULES, expected, DERIVED)
        longer = weights[key].new_zeros(weights[key].shape[0] + 1, *weights[key].shape[1:])
        with pytest.raises(WeightMismatchError, match=re.escape(key)):
            convert_state_dict({**weights, key: longer}, RULES, expected, DERIVED)


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer.conformer.layers.8.ffn1.up_proj.weight",  # the encoder has layers 0 to 7
        "token2wav.conformer.layers.0.attn.q_norm.gamma",  # only with qk_norm
        "tokenizer.vq.quantizers.1._codebook.weight",
        "tokenizer.conformer.layers.0.conv_module.pointwise_conv1.bias",
        "state_dict",
    ],
)
def test_extra_tensors_are_named_and_refused(key: str, released: dict[str, Tensor]) -> None:
    with pytest.raises(WeightMismatchError, match=re.escape(key)):
        convert_weights({**released, key: torch.empty(2, device="meta")}, AuvConfig())


def test_both_spellings_of_one_tensor_are_refused(released: dict[str, Tensor]) -> None:
    key = "tokenizer.vq.quantizers.0.in_proj.parametrizations.weight.original0"
    twice = {**released, "tokenizer.vq.quantizers.0.in_proj.weight_g": released[key]}
    with pytest.raises(WeightMismatchError, match="weight_g"):
        convert_weights(twice, AuvConfig())


# Files as they stand


def test_bundled_vectors_are_the_recorded_ones(shared: Path) -> None:
    bundled = sorted(path for path in BUNDLED.rglob("*") if path.is_file())
    assert len(bundled) > 10
    for path in bundled:
        assert path.read_bytes() == (shared / "golden" / path.relative_to(BUNDLED)).read_bytes(), path.name


@pytest.mark.parametrize("case", ALL_CASES)
def test_every_case_loads_as_it_stands(case: str, golden: Callable) -> None:
    files = golden("auv")
    codec = load_published(
        FAMILIES["auv"], [files.path(f"{case}/weights.safetensors")], files.path(f"{case}/config.json")
    )
    assert not codec.training
    assert all(p.dtype == torch.float32 and not p.is_meta for p in codec.state_dict().values() if p.ndim)
    v = files.vectors(f"{case}/vectors_short_min" if case == "tiny" else f"{case}/vectors")
    with torch.inference_mode():
        assert torch.equal(codec.encode(v["input"][:, None]).audio_codes, v["codes"].permute(1, 0, 2).long())


@pytest.mark.slow
def test_full_size_files_load_as_they_stand(golden: Callable, tmp_path: Path) -> None:
    """490 MB, in two files; without a config the released model is meant."""
    files = golden("auv")
    weights, extra = files.weights("full"), files.path("full/extra.safetensors")
    drawn = tmp_path / "weights.safetensors"
    save_file({key: tensor for key, tensor in weights.items() if key not in read_weights(extra)}, drawn)
    codec = load_published(FAMILIES["auv"], [drawn, extra], None)
    v = files.vectors("full/vectors_silence")
    with torch.inference_mode():
        assert torch.equal(codec.encode(v["input"][:, None]).audio_codes, v["codes"].permute(1, 0, 2).long())
    with pytest.raises(CheckpointError, match="earlier file"):
        load_published(FAMILIES["auv"], [drawn, extra, extra], None)


def test_pytorch_container(tiny: tuple, golden: Callable, tmp_path: Path) -> None:
    """The released file is a flat state dict written by torch.save."""
    file = tmp_path / "auv.pt"
    torch.save(tiny[0], file)
    codec = load_published(FAMILIES["auv"], [file], golden("auv").path("tiny/config.json"))
    waveform, codes = first_clip(golden)
    with torch.inference_mode():
        assert torch.equal(codec.encode(waveform).audio_codes, codes)


def test_older_weight_norm_names(tiny: tuple, golden: Callable) -> None:
    weights, config = tiny
    older = {NEW_NAMES.sub(lambda m: "weight_" + "gv"[int(m[1])], key): t for key, t in weights.items()}
    assert len(set(older) - set(weights)) == 4
    found, expected = convert_weights(older, config), convert_weights(weights, config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_stored_precisions_become_float32(dtype: torch.dtype, tiny: tuple) -> None:
    weights, config = tiny
    stored = {key: t.to(dtype) if t.is_floating_point() else t for key, t in weights.items()}
    found, exact = convert_weights(stored, config), convert_weights(weights, config)
    for key, tensor in found.items():
        assert tensor.dtype == exact[key].dtype
        assert torch.equal(tensor, exact[key].to(dtype).to(tensor.dtype))
    codec = AuvModel(config).eval()
    codec.load_state_dict(found)


def test_windows_and_counters_may_be_missing(tiny: tuple) -> None:
    weights, config = tiny
    bare = {key: t for key, t in weights.items() if not DERIVED.search(key)}
    assert len(bare) == len(weights) - 7
    found, expected = convert_weights(bare, config), convert_weights(weights, config)
    assert all(torch.equal(found[key], expected[key]) for key in expected if not key.endswith("num_batches_tracked"))


# Published configurations


def test_blocks_that_disagree_are_refused(golden: Callable) -> None:
    for block, key, value in (("dec_conf", "hidden_size", 64), ("dec_conf", "hop_length", 64), ("vq_conf", "dim", 64)):
        published = golden("auv").config("tiny")
        published[block][key] = value
        with pytest.raises(ConfigError, match="disagree"):
            convert_config(published)


def test_unknown_key_is_named(golden: Callable) -> None:
    published = golden("auv").config("tiny")
    published["enc_conf"]["num_layer"] = 2
    with pytest.raises(ConfigError, match=r'"num_layer".*Did you mean "num_layers"'):
        convert_config(published)


def test_defaults_of_the_published_classes(golden: Callable) -> None:
    """Without `vq_conf` the published encoder has 8192 entries of 8 dimensions and no domains."""
    published = golden("auv").config("full")
    del published["vq_conf"]
    config = convert_config(published)
    assert config.codebook_sizes == (8192,)
    assert (config.codebook_dim, config.commitment_cost, config.domain_ranges) == (8, 0.25, {})
