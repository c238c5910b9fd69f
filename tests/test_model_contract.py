"""What transformers' own common tests ask of a model, for every codec of the package in the table of the laws."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import dill
import pytest
import torch
from conformance.codecs_table import PUBLISHED, TABLE, clip, make_uneven, new_codec, shared_codec
from datasets.fingerprint import Hasher
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import ModelOutput

from audiotok import AuvAudioTokenizer
from audiotok.codec import AudioCodec, CodecConfig
from audiotok.codecs.auv import AuvConfig
from audiotok.errors import ConfigError, OptionError, WeightMismatchError
from audiotok.quantizers.successive import SuccessiveQuantizer

FRAMES = 20


@pytest.fixture(params=PUBLISHED, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def codec(name: str) -> AudioCodec:
    """One for all tests: do not change it."""
    return shared_codec(name)


@pytest.fixture(scope="module")
def batch(codec: AudioCodec) -> Tensor:
    facts = codec.facts
    waves = [torch.from_numpy(clip(facts, facts.held_samples(FRAMES), seed)) for seed in range(2)]
    return torch.stack(waves)


def codes(codec: AudioCodec, batch: Tensor) -> Tensor:
    return codec.encode(batch).audio_codes


# Signature and outputs


def test_forward_takes_input_values_first(codec: AudioCodec) -> None:
    parameters = list(inspect.signature(type(codec).forward).parameters)
    assert parameters[1:3] == ["input_values", "padding_mask"]
    assert codec.main_input_name == "input_values"
    assert {"output_hidden_states", "return_dict"} <= set(parameters)


def test_outputs_of_forward(codec: AudioCodec, batch: Tensor) -> None:
    output = codec(batch)
    assert isinstance(output, ModelOutput)
    assert output.audio_values.shape == batch.shape
    published = codes(codec, batch)  # some published front ends drop what does not fill a window
    assert FRAMES - 1 <= published.shape[-1] <= FRAMES
    assert torch.equal(output.audio_codes, published)
    assert output.latents.shape[::2] == (2, published.shape[-1])
    assert output.loss.ndim == 0
    assert output.hidden_states is None
    assert all(loss.ndim == 0 and loss.isfinite() for loss in output.losses.values())
    assert torch.equal(output.latents, codec.latents(batch))


def test_a_tuple_holds_what_the_dict_holds(codec: AudioCodec, batch: Tensor) -> None:
    by_name, by_place = codec(batch), codec(batch, return_dict=False)
    assert isinstance(by_place, tuple)
    assert len(by_place) == len(by_name.to_tuple())
    for one, other in zip(by_place, by_name.to_tuple(), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
        else:
            assert one.keys() == other.keys()


def test_hidden_states(codec: AudioCodec, batch: Tensor) -> None:
    """What enters each layer, at the rate of that layer, and what leaves the encoder."""
    hidden, latents = codec(batch, output_hidden_states=True).hidden_states, codec.latents(batch)
    assert len(hidden) == codec.config.num_hidden_layers + 1
    assert all(state.ndim == 3 and len(state) == 2 and state.isfinite().all() for state in hidden)
    assert hidden[-1].shape[1:] == (latents.shape[-1], codec.config.hidden_size)
    assert {state.shape[1] % latents.shape[-1] for state in hidden} == {0}
    if codec.config.hidden_size == latents.shape[1]:  # else a bottleneck follows
        assert torch.equal(hidden[-1].transpose(1, 2), latents)


def test_the_config_asks_for_outputs_too(name: str, batch: Tensor) -> None:
    """As in every model of transformers: a keyword left out is read from the config."""
    codec = new_codec(name)
    codec.config.output_hidden_states = True
    assert codec(batch).hidden_states is not None
    assert codec(batch, output_hidden_states=False).hidden_states is None
    codec.config.return_dict = False
    assert isinstance(codec(batch), tuple)
    assert isinstance(codec(batch, return_dict=True), ModelOutput)


def test_padding_is_no_part_of_a_clip(codec: AudioCodec, batch: Tensor) -> None:
    """The reconstruction of a padded clip is that of the clip alone, in forward as in encode and decode."""
    length = codec.facts.held_samples(11)
    mask = torch.ones(2, batch.shape[-1])
    mask[1, length:] = 0
    together = codec(batch, mask)
    single = codec(batch[1:, :, :length], torch.ones(1, length))
    torch.testing.assert_close(together.audio_values[1:, :, :length], single.audio_values, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.latents[1:, :, :11], single.latents, rtol=1e-4, atol=1e-4)


# Gradients


@pytest.mark.parametrize("silent", [False, True], ids=["sound", "silence"])
def test_gradients_reach_every_parameter_and_are_finite(name: str, batch: Tensor, silent: bool) -> None:
    codec = new_codec(name).train()
    waves = (torch.zeros_like(batch) if silent else batch.clone()).requires_grad_()
    offline = isinstance(codec.quantizer, SuccessiveQuantizer)  # fitted on latents, once everything else is trained
    output = codec(waves, latent_noise=torch.zeros(2)) if offline else codec(waves)
    losses = [output.loss, output.audio_values.square().mean(), output.distillation_features.square().mean()]
    (sum(losses) + sum(output.losses.values())).backward()
    for key, parameter in codec.named_parameters():
        if offline and key.startswith("quantizer."):
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert silent or parameter.grad.any(), key
    assert waves.grad.isfinite().all()


def test_a_step_of_training_lowers_the_loss(name: str, batch: Tensor) -> None:
    codec = new_codec(name).train()
    optimizer = torch.optim.Adam(codec.parameters(), lr=1e-3)
    seen = []
    for _ in range(6):
        torch.manual_seed(0)  # some draw a depth for each clip
        output = codec(batch)
        loss = output.loss + (output.audio_values - batch).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < seen[0]


def test_no_gradient_checkpointing_is_promised(codec: AudioCodec) -> None:
    """It is refused loudly, rather than accepted and ignored."""
    assert not codec.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="does not support"):
        copy.deepcopy(codec).activation_checkpointing_enable()


# Precision and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run(name: str, batch: Tensor, dtype: torch.dtype) -> None:
    codec = new_codec(name).to(dtype)
    for waves in (batch, batch.to(dtype)):
        output = codec(waves)
        assert output.latents.dtype == dtype
        audio = codec.decode(codec.encode(waves))
        assert audio.shape == batch.shape
        assert audio.isfinite().all()
        assert output.audio_values.isfinite().all()


def test_autocast_runs(codec: AudioCodec, batch: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = codec(batch)
    assert output.audio_values.isfinite().all()
    assert output.audio_codes.shape == codes(codec, batch).shape


# Saving and loading


def assert_same_state(one: AudioCodec, other: AudioCodec) -> None:
    for kind in ("named_parameters", "named_buffers"):  # buffers that are not saved, too
        mine, theirs = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert mine[key].dtype == tensor.dtype, key
            assert torch.equal(mine[key], tensor), key


def test_loading_gives_the_same_state(codec: AudioCodec, batch: Tensor, tmp_path: Path) -> None:
    """`from_pretrained` builds on the meta device: nothing computed in a constructor may get lost."""
    codec.save_pretrained(tmp_path)
    loaded, report = type(codec).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_state(loaded, codec)
    assert not loaded.training
    assert all(tensor.device.type == "cpu" for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(codes(loaded, batch), codes(codec, batch))
    assert torch.equal(loaded.decode(codes(codec, batch)), codec.decode(codes(codec, batch)))


@pytest.mark.parametrize("saved_as", [torch.bfloat16, torch.float16])
def test_loading_is_float32_unless_asked_otherwise(
    name: str, codec: AudioCodec, tmp_path: Path, saved_as: torch.dtype
) -> None:
    new_codec(name).to(saved_as).save_pretrained(tmp_path)
    model = type(codec)
    assert model.from_pretrained(tmp_path).dtype == torch.float32
    assert model.from_pretrained(tmp_path, dtype=saved_as).dtype == saved_as
    assert model.from_pretrained(tmp_path, dtype="auto").dtype == saved_as
    assert model.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("what", ["missing", "not known", "misshapen"])
def test_every_tensor_is_needed_known_and_shaped(codec: AudioCodec, tmp_path: Path, what: str) -> None:
    """Tensor by tensor of one block, with the names in the error; a lost buffer is as bad as a lost weight."""
    codec.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    keys = [key for key in weights if "layers.0.conv" in key or "layers.0.depthwise" in key or "quantizer" in key]
    changed = dict(weights)
    for key in keys:
        tensor = changed.pop(key)
        if what == "not known":
            changed[key] = tensor
            changed[f"{key}_"] = tensor.clone()
        elif what == "misshapen":
            changed[key] = torch.zeros(*tensor.shape, 2)
    save_file(changed, path, {"format": "pt"})
    with pytest.raises(WeightMismatchError, match=f"{len(keys)} {what}") as caught:
        type(codec).from_pretrained(tmp_path)
    assert sorted(keys)[0] in str(caught.value)


def test_missing_weights_are_never_invented(codec: AudioCodec, tmp_path: Path) -> None:
    """transformers would start the missing tensor anew and go on."""
    codec.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightMismatchError):
        type(codec).from_pretrained(tmp_path, ignore_mismatched_sizes=False)


def test_initialization_on_the_meta_device(name: str) -> None:
    """`_init_weights` fills every parameter with finite numbers, none of them left as memory was."""
    model = type(shared_codec(name))
    with torch.device("meta"):
        codec = model(copy.deepcopy(TABLE[name]))
    codec.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in codec.parameters():
            tensor.fill_(torch.nan)
    codec.apply(codec._init_weights)
    for key, tensor in codec.named_parameters():
        assert tensor.isfinite().all(), key


# Copies


def test_copies_answer_the_same(codec: AudioCodec, batch: Tensor) -> None:
    expected = codes(codec, batch)
    copies = [
        copy.deepcopy(codec),
        pickle.loads(pickle.dumps(codec)),
        dill.loads(dill.dumps(codec, recurse=True)),
    ]
    for same in copies:
        assert_same_state(same, codec)
        assert torch.equal(codes(same, batch), expected)
        make_uneven(same)
    assert torch.equal(codes(codec, batch), expected), "copies share no memory with it"


def test_the_hash_of_datasets_is_stable() -> None:
    """Or `Dataset.map` computes everything again, each time."""
    codec = new_codec("auv")
    batch = torch.from_numpy(clip(codec.facts, FRAMES * codec.facts.hop_length))[None]
    before = Hasher.hash(codec)
    codec.decode(codec.encode(batch))
    codec(batch)
    assert Hasher.hash(codec) == before
    make_uneven(codec)
    assert Hasher.hash(codec) != before


# Configs


def test_configs_survive_json(codec: AudioCodec, tmp_path: Path) -> None:
    config = codec.config
    config.save_pretrained(tmp_path)
    copies = [
        type(config).from_pretrained(tmp_path),
        type(config).from_dict(config.to_dict()),
        type(config)(**json.loads(config.to_json_string())),
        type(config)(**json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
    ]
    for same in copies:
        assert own(same) == own(config)
        assert same.facts == config.facts


def own(config: CodecConfig) -> dict[str, object]:
    return json.loads(json.dumps({key: getattr(config, key) for key in config.own_keys()}))


def test_configs_do_not_write_to_what_they_are_given(name: str) -> None:
    given = own(TABLE[name])
    before = copy.deepcopy(given)
    first, second = type(TABLE[name])(**given), type(TABLE[name])(**given)
    assert given == before
    assert own(first) == own(second)


def test_attributes_that_other_tools_read(codec: AudioCodec) -> None:
    config = codec.config
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        assert isinstance(getattr(config, key), int)
        assert getattr(config, key) > 0
    assert codec.num_parameters() == sum(p.numel() for p in codec.parameters())


def test_unknown_keys_are_refused_with_the_nearest_name(codec: AudioCodec) -> None:
    with pytest.raises(ConfigError, match=r'no key "sampling_rat".*Did you mean "sampling_rate"'):
        type(codec.config)(sampling_rat=3)


def test_unknown_keys_of_a_part_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r'encoder_config knows no key "num_layrs".*"num_layers"'):
        AuvConfig(encoder_config={"num_layrs": 3})


AUV_VALUES = [
    {"hop_length": 0},
    {"hop_length": -32},
    {"hop_length": 33},
    {"hop_length": "320"},
    {"hidden_size": 0},
    {"sampling_rate": 0},
    {"sampling_rate": -16000},
    {"codebook_size": 0},
    {"codebook_size": []},
    {"codebook_size": [96, 0]},
    {"codebook_size": "320"},
    {"codebook_dim": 0},
    {"input_features": []},
    {"input_features": ["phases"]},
    {"input_features": ["phase", "phase"]},
    {"normalize_latents": "yes"},
    {"commitment_cost": "much"},
    {"commitment_cost": float("nan")},
    {"distill_depth": 99},
    {"encoder_config": {"num_layers": "2"}},
    {"encoder_config": {"num_layers": -1}},
    {"encoder_config": {"ffn_mult": 0}},
    {"encoder_config": {"head_dim": 15}},
    {"encoder_config": {"block_type": "convnex"}},
    {"encoder_config": {"conv_kernel_size": 8}},
    {"encoder_config": {"conv_kernel_size": -1}},
    {"encoder_config": [1]},
    {"domain_ranges": {"speech": [0]}},
    {"domain_ranges": {"speech": [5, 5]}},
    {"domain_ranges": {"speech": ["a", "b"]}},
    {"domain_ranges": {"all": [0, 5]}},
    {"domain_ranges": [1]},
]


@pytest.mark.parametrize("values", AUV_VALUES, ids=str)
def test_impossible_values_are_refused_by_the_config(values: dict[str, object]) -> None:
    """Before a model is built, which would fail somewhere in PyTorch or not at all; the key is named."""
    with pytest.raises(OptionError) as caught:
        type(TABLE["auv"])(**values)
    assert next(iter(values)) in str(caught.value)


# Names that checkpoints depend on

SNAPSHOT = {
    "auv": [
        "encoder.input_proj.weight",
        "encoder.backbone.layers.0.ffn1_layer_norm.weight",
        "encoder.backbone.layers.0.ffn1.up_proj.bias",
        "encoder.backbone.layers.1.attn.to_qkv.weight",
        "encoder.backbone.layers.1.conv_module.depthwise_conv.weight",
        "encoder.backbone.layers.1.conv_module.conv_norm.running_var",
        "encoder.backbone.layers.1.conv_module.conv_norm.num_batches_tracked",
        "encoder.backbone.layer_norm.weight",
        "quantizer.stages.0.in_proj.weight_g",
        "quantizer.stages.0.in_proj.weight_v",
        "quantizer.stages.0.out_proj.bias",
        "quantizer.stages.0.codebook.weight",
        "decoder.backbone.layers.2.final_layer_norm.bias",
        "decoder.head.weight",
        "decoder.head.bias",
    ],
    "auv_convnext": [
        "encoder.input_proj.bias",
        "encoder.backbone.layers.1.depthwise_conv.weight",
        "encoder.backbone.layers.1.layer_norm.bias",
        "encoder.backbone.layers.1.scale",
        "decoder.backbone.layers.0.up_proj.weight",
        "decoder.backbone.layer_norm.bias",
    ],
    "auv_stages": ["quantizer.stages.1.codebook.weight", "quantizer.stages.1.out_proj.weight_g"],
}
COUNTS = {"auv": 160, "auv_convnext": 51, "auv_stages": 167}


@pytest.mark.parametrize("known", SNAPSHOT)
def test_names_of_tensors_are_stable(known: str) -> None:
    """Saved checkpoints carry these names: a changed one needs a conversion, so it must be a decision."""
    keys = set(shared_codec(known).state_dict())
    assert set(SNAPSHOT[known]) <= keys
    assert len(keys) == COUNTS[known]


# transformers' Auto classes

# One process pays for the imports; each way of making the types known starts from there, in a fork of its own.
CHILD = """
import os, sys
import audiotok.codecs.auv
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

folder = sys.argv[1]


def register():
    audiotok.register()
    audiotok.register()


def use():
    audiotok.AutoAudioTokenizer.from_pretrained(folder)


def unknown():
    try:
        AutoConfig.from_pretrained(folder)
    except ValueError as error:
        print("unknown", "audiotok_auv" in str(error))


def known():
    autos = [AutoConfig, AutoModel, AutoModelForAudioTokenization, AutoFeatureExtractor]
    found = [auto.from_pretrained(folder) for auto in autos]
    print(*(type(one).__name__ for one in found), found[1].dtype, found[1].training)


for make_known in (register, use):
    child = os.fork()
    if child == 0:
        unknown()
        make_known()
        known()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_the_auto_classes_of_transformers_know_our_types(tmp_path: Path) -> None:
    """After `audiotok.register()`, and after a mere use of `AutoAudioTokenizer`; not before."""
    AuvAudioTokenizer(shared_codec("auv")).save_pretrained(tmp_path / "auv")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "auv")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = ["unknown True", "AuvConfig AuvModel AuvModel AuvFeatureExtractor torch.float32 False"]
    assert done.stdout.splitlines() == 2 * answer, done.stderr
