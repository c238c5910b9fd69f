"""APCodec's published containers load as they stand, and nothing that does not fit is let through."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from audiotok import ApCodecConfig, ApCodecModel, AutoAudioTokenizer
from audiotok.auto import FAMILIES, load_published
from audiotok.codecs.apcodec.conversion_apcodec import RULES, convert, convert_config, convert_weights, read_halves
from audiotok.conversion import convert_state_dict
from audiotok.errors import CheckpointError, ConfigError, UnsafeCheckpointError, WeightMismatchError

HALVES = ("encoder", "decoder")
V1 = {
    "sampling_rate": 16000,
    "win_length": 160,
    "hidden_size": 64,
    "response_norm": False,
    "codebook_projections": False,
    "downsample_kernel_size": 15,
}
RELEASED = {
    "apcodec_48k_6kbps": ApCodecConfig(),
    "apcodec_16k_4kbps": ApCodecConfig(**V1, num_codebooks=8),
    "apcodec_16k_2kbps": ApCodecConfig(**V1, num_codebooks=4),
}
# Parameters and tensors of encoder, quantizer and decoder.
SIZES = {
    "apcodec_48k_6kbps": [(6_893_120 - 139_776, 213 - 28), (139_776, 28), (10_232_582, 194)],
    "apcodec_16k_4kbps": [(7_847_040 - 524_288, 177 - 8), (524_288, 8), (10_277_638, 178)],
    "apcodec_16k_2kbps": [(7_584_896 - 262_144, 173 - 4), (262_144, 4), (10_277_638, 178)],
}


@pytest.fixture
def manifest(shared: Path) -> dict:
    """Name and shape of every tensor of the released encoders and decoders."""
    found = json.loads((shared / "golden" / "apcodec" / "released_manifest.json").read_text())
    encoder = found["apcodec_16k_4kbps"]["encoder"]
    half = {key: shape for key, shape in encoder.items() if not re.match(r"quantizer\.quantizers\.[4-7]\.", key)}
    found["apcodec_16k_2kbps"] = {**found["apcodec_16k_4kbps"], "encoder": half}
    return found


def without_values(shapes: dict) -> dict[str, Tensor]:
    """A released pair of files, on the meta device, with the prefixes of our flat form."""
    return {
        f"{half}.{key}": torch.empty(shape, device="meta") for half in HALVES for key, shape in shapes[half].items()
    }


@pytest.fixture
def tiny(golden: Callable) -> Callable[[str], tuple[dict[str, Tensor], ApCodecConfig]]:
    """`tiny("v1")` → published tensors and our config."""

    def load(network: str) -> tuple[dict[str, Tensor], ApCodecConfig]:
        files = golden("apcodec")
        weights = files.weights(f"tiny_{network}")
        return weights, convert_config(files.config(f"tiny_{network}"), weights)

    return load


def same_state(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=atol, rtol=0)


def respelled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm as current torch spells it."""
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {re.sub(r"weight_[gv]$", lambda m: new[m[0]], key): tensor for key, tensor in weights.items()}


# The released models


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name: str, manifest: dict) -> None:
    with torch.device("meta"):
        codec = ApCodecModel(RELEASED[name])
    parts = [codec.encoder, codec.quantizer, codec.decoder]
    found = [(sum(p.numel() for p in part.parameters()), len(part.state_dict())) for part in parts]
    assert found == SIZES[name]
    assert not list(codec.buffers())
    assert len(codec.state_dict()) == sum(len(manifest[name][half]) for half in HALVES)


@pytest.mark.parametrize("name", RELEASED)
def test_the_tensors_say_which_model_it_is(name: str, manifest: dict) -> None:
    """Without a config file: network, widths, kernels and codebooks from the tensors, the rest as released."""
    weights = without_values(manifest[name])
    config = convert_config(None, weights)
    assert config.to_dict() == RELEASED[name].to_dict()
    fused = {k.removesuffix("_v"): t for k, t in weights.items() if not k.endswith("weight_g")}
    for other in (respelled(weights), fused):
        assert convert_config(None, other).to_dict() == config.to_dict()
    converted = convert_weights(weights, config)
    with torch.device("meta"):
        assert converted.keys() == ApCodecModel(config).state_dict().keys()


@pytest.mark.parametrize("case", ["full_v2_48k", "full_v1_16k"])
def test_published_configs_are_the_released_models(case: str, manifest: dict, golden: Callable) -> None:
    name = "apcodec_48k_6kbps" if "v2" in case else "apcodec_16k_4kbps"
    config = convert_config(golden("apcodec").config(case), without_values(manifest[name]))
    assert config.to_dict() == RELEASED[name].to_dict()


def test_facts_of_the_released_models() -> None:
    for name, (rate, bits) in {"apcodec_48k_6kbps": (150, 6000), "apcodec_16k_2kbps": (50, 2000)}.items():
        facts = RELEASED[name].facts
        assert (facts.frame_rate, facts.bits_per_second(), facts.hop_length) == (rate, bits, 320)
        assert not facts.is_causal
        # Output samples and code frames of the published lengths.
        assert [facts.num_samples(frames) for frames in (1, 2, 25)] == [280, 600, 7960]
        assert [facts.num_frames(samples) for samples in (1, 280, 281, 7960, 7961)] == [1, 1, 2, 25, 26]
    assert RELEASED["apcodec_16k_4kbps"].facts.bits_per_second() == 4000


# Strictness


def one_of_each_kind(keys: list[str]) -> list[str]:
    """The first key of each pattern of numbers."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        kinds[re.sub(r"\d+", "#", key)].append(key)
    return [same[0] for same in kinds.values()]


@pytest.mark.parametrize("network", ["v1", "v2"])
def test_every_kind_of_tensor_is_needed_in_its_shape(network: str, tiny: Callable) -> None:
    weights, config = tiny(network)
    kinds, expected = one_of_each_kind(list(weights)), convert_weights(weights, config)
    assert {sum(rule.apply(key) is not None for rule in RULES) for key in weights} == {1}
    for key in kinds:
        without = {k: t for k, t in weights.items() if k != key}
        with pytest.raises(WeightMismatchError, match="1 missing"):
            convert_state_dict(without, RULES, expected)
        longer = weights[key].new_zeros(weights[key].shape[0] + 1, *weights[key].shape[1:])
        with pytest.raises(WeightMismatchError, match=re.escape(key)):
            convert_state_dict({**weights, key: longer}, RULES, expected)


@pytest.mark.parametrize(
    "key",
    [
        "encoder.convnext_logamp.8.grn.gamma",  # blocks 0 to 2
        "encoder.convnext_logamp.0.gamma",  # of the other network
        "encoder.quantizer.quantizers.3.codebook.weight",
        "decoder.convnext_pha.0.dwconv.weight_g",
        "decoder.AMP_Encoder_downsample_output_conv.bias",
        "decoder.epoch",
        "embed_logamp.weight",  # of neither half
    ],
)
def test_extra_tensors_are_named_and_refused(key: str, tiny: Callable) -> None:
    weights, config = tiny("v2")
    with pytest.raises(WeightMismatchError, match=re.escape(key)):
        convert_weights({**weights, key: torch.zeros(2)}, config)


def test_two_spellings_of_one_tensor_are_refused(tiny: Callable) -> None:
    weights, config = tiny("v1")
    key = "decoder.latent_input_conv"
    twice = {**weights, f"{key}.parametrizations.weight.original0": weights[f"{key}.weight_g"]}
    with pytest.raises(WeightMismatchError, match="original0"):
        convert_weights(twice, config)


# Containers


def split(weights: dict[str, Tensor], prefix: str = "") -> dict[str, dict[str, dict[str, Tensor]]]:
    """The published pair of files: `{"encoder": ...}` and `{"decoder": ...}`."""
    return {
        half: {half: {prefix + key.removeprefix(f"{half}."): t for key, t in weights.items() if key.startswith(half)}}
        for half in HALVES
    }


@pytest.fixture
def pair(tiny: Callable, tmp_path: Path) -> Callable[..., list[Path]]:
    """`pair("v1", prefix="module.")` → the published files of a tiny model, as `torch.save` writes them."""

    def write(network: str, prefix: str = "") -> list[Path]:
        paths = []
        for half, content in split(tiny(network)[0], prefix).items():
            paths.append(tmp_path / f"{half}_00000042")
            torch.save(content, paths[-1])
        return paths

    return write


@pytest.mark.parametrize("network", ["v1", "v2"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_published_pair(network: str, prefix: str, pair: Callable, golden: Callable) -> None:
    """In either order, with and without the prefix of training on several GPUs."""
    files, published = golden("apcodec"), pair(network, prefix)
    config_file = files.path(f"tiny_{network}/config.json")
    v = files.vectors(f"tiny_{network}/vectors")
    for order in (published, published[::-1]):
        codec = load_published(FAMILIES["apcodec"], order, config_file)
        assert not codec.training
        with torch.inference_mode():
            assert torch.equal(codec.encode(v["audio"][:, None]).audio_codes, v["codes"].long())


@pytest.mark.parametrize("network", ["v1", "v2"])
def test_a_flat_file(network: str, golden: Callable, tiny: Callable) -> None:
    files = golden("apcodec")
    config, state = convert(
        [files.path(f"tiny_{network}/weights.safetensors")], files.path(f"tiny_{network}/config.json")
    )
    assert config.response_norm == (network == "v2")
    same_state(state, convert_weights(*tiny(network)))


@pytest.mark.parametrize("network", ["v1", "v2"])
def test_newer_weight_norm_names(network: str, tiny: Callable) -> None:
    weights, config = tiny(network)
    new = respelled(weights)
    assert len(set(new) - set(weights)) == {"v1": 18, "v2": 30}[network]
    same_state(convert_weights(new, config), convert_weights(weights, config))


@pytest.mark.parametrize("network", ["v1", "v2"])
def test_weights_that_were_multiplied_out(network: str, tiny: Callable, golden: Callable) -> None:
    """The same products, so the same codes but for rounding."""
    weights, config = tiny(network)
    fused = {}
    for key, tensor in weights.items():
        if key.endswith("weight_v"):
            norm = tensor.norm(dim=tuple(range(1, tensor.ndim)), keepdim=True)
            fused[f"{key[:-2]}"] = tensor * (weights[f"{key[:-1]}g"] / norm)
        elif not key.endswith("weight_g"):
            fused[key] = tensor
    codec = ApCodecModel(config).eval()
    codec.load_state_dict(convert_weights(fused, config))
    v = golden("apcodec").vectors(f"tiny_{network}/vectors")
    with torch.inference_mode():
        assert torch.equal(codec.encode(v["audio"][:, None]).audio_codes, v["codes"].long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_stored_precisions_become_float32(dtype: torch.dtype, tiny: Callable) -> None:
    weights, config = tiny("v1")
    found = convert_weights({key: tensor.to(dtype) for key, tensor in weights.items()}, config)
    same_state(found, {key: t.to(dtype).float() for key, t in convert_weights(weights, config).items()})


def test_half_a_model_is_refused(pair: Callable) -> None:
    encoder, decoder = pair("v2")
    with pytest.raises(CheckpointError, match=r"decoder is missing.*Give both"):
        read_halves([encoder])
    with pytest.raises(CheckpointError, match="encoder is missing"):
        read_halves([decoder])
    with pytest.raises(CheckpointError, match="earlier file holds too"):
        read_halves([encoder, decoder, encoder])


def test_files_of_discriminators_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "do_00000042"
    torch.save({"mpd": {"x": torch.zeros(1)}, "mrd": {}, "optim_g": {}, "steps": 42}, file)
    with pytest.raises(CheckpointError, match=r"mpd, mrd, optim_g, steps.*encoder_\.\.\. and decoder_\.\.\. files"):
        read_halves([file])


def test_weights_of_another_codec_are_refused(tmp_path: Path) -> None:
    weights = {"encoder.weight": torch.zeros(1), "decoder.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="no known APCodec"):
        convert_config(None, weights)
    with pytest.raises(CheckpointError, match=r"lack encoder\.embed_logamp\.weight"):
        convert_config(None, {"encoder.convnext_logamp.0.gamma": torch.zeros(1)})


def test_code_in_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    file = tmp_path / "encoder"
    torch.save({"encoder": Trap()}, file)
    with pytest.raises(UnsafeCheckpointError):
        read_halves([file])
    assert not (tmp_path / "executed").exists()


def test_what_was_converted_is_saved_and_loaded(pair: Callable, golden: Callable, tmp_path: Path) -> None:
    codec = load_published(FAMILIES["apcodec"], pair("v2"), golden("apcodec").path("tiny_v2/config.json"))
    tok = FAMILIES["apcodec"].load("AudioTokenizer")(codec)
    tok.save_pretrained(tmp_path / "saved")
    wave = golden("apcodec").vectors("tiny_v2/vectors")["audio"][0]
    loaded = AutoAudioTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.fingerprint == tok.fingerprint
    assert loaded(wave, tok.sampling_rate).input_ids == tok(wave, tok.sampling_rate).input_ids
    fewer = AutoAudioTokenizer.from_pretrained(tmp_path / "saved", num_quantizers=2)
    assert fewer.vocab_size == 2 * 64 + 3
    encoded, all_codes = fewer(wave, tok.sampling_rate), tok.ids_to_codes(tok(wave, tok.sampling_rate).input_ids)
    assert (fewer.ids_to_codes(encoded.input_ids) == all_codes[:2]).all()
    assert fewer.decode(encoded.input_ids, encoded.audio_lengths).shape == (1, len(wave))
    fewer.save_pretrained(tmp_path / "fewer")
    assert AutoAudioTokenizer.from_pretrained(tmp_path / "fewer").fingerprint == fewer.fingerprint != tok.fingerprint
    with pytest.raises(ConfigError, match="num_quantizers=4 is not legal: choose 1 to 3"):
        AutoAudioTokenizer.from_pretrained(tmp_path / "saved", num_quantizers=4)


# Published configurations


def test_unknown_missing_and_disagreeing_keys(golden: Callable, tiny: Callable) -> None:
    weights, _ = tiny("v2")
    published = golden("apcodec").config("tiny_v2")
    with pytest.raises(ConfigError, match=r'"latent_dims".*Did you mean "latent_dim"'):
        convert_config({**published, "latent_dims": 3}, weights)
    with pytest.raises(ConfigError, match="lacks hop_size"):
        convert_config({key: value for key, value in published.items() if key != "hop_size"}, weights)
    with pytest.raises(ConfigError, match=r"PHA_Encoder_channel, PHA_Decoder_channel are \[24, 26\]"):
        convert_config({**published, "PHA_Decoder_channel": 26}, weights)


def test_keys_that_only_training_reads_are_dropped(golden: Callable, tiny: Callable) -> None:
    weights, config = tiny("v2")
    training = {"input_training_wav_list": "a.txt", "checkpoint_path": "cp", "test_wav_dir": "x", "num_gpus": 0}
    published = {**golden("apcodec").config("tiny_v2"), **training}
    assert convert_config(published, weights).to_dict() == config.to_dict()


def test_the_v1_network_ignores_one_key_of_its_config(golden: Callable, tiny: Callable) -> None:
    published = golden("apcodec").config("tiny_v1")
    assert published["AMP_Encoder_output_downconv_kernel_size"] == 7
    assert tiny("v1")[1].downsample_kernel_size == 15
    assert tiny("v2")[1].downsample_kernel_size == 7
