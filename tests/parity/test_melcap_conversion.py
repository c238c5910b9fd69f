"""Published MelCap weights load as they stand, whole and strictly: nothing missing, nothing left over."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from audiotok import AutoAudioTokenizer, MelCapConfig, MelCapModel, auto
from audiotok.auto import FAMILIES, load_published
from audiotok.codecs.melcap import conversion_melcap
from audiotok.codecs.melcap.conversion_melcap import convert_config, convert_tensors, convert_weights, read_published
from audiotok.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    OptionError,
    UnsafeCheckpointError,
    WeightMismatchError,
)

CASES = ["tiny", "tiny_head_same", "tiny_frontend_same", "tiny_tanh"]
DERIVED = re.compile(r"mel_spec\.|istft\.window")


@pytest.fixture
def manifest(shared: Path) -> dict:
    """Every tensor of the two released files: name → shape."""
    return json.loads((shared / "golden" / "melcap" / "released_manifest.json").read_text())


@pytest.fixture
def released(manifest: dict) -> dict[str, Tensor]:
    """The released files without their values."""
    return {key: torch.empty(shape, device="meta") for part in manifest.values() for key, shape in part.items()}


@pytest.fixture
def stages(golden: Callable) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both files of the stored case, flat."""
    return tuple(load_file(golden("melcap").path(f"tiny_stored/stage{n}.safetensors")) for n in (1, 2))


@pytest.fixture
def weights(stages: tuple) -> dict[str, Tensor]:
    return {**stages[0], **stages[1]}


@pytest.fixture
def published_config(golden: Callable) -> dict[str, Any]:
    return golden("melcap").config("tiny_stored")


@pytest.fixture
def config(published_config: dict) -> MelCapConfig:
    return convert_config(published_config)[0]


@pytest.fixture
def containers(stages: tuple, published_config: dict, tmp_path: Path) -> tuple[list[Path], Path]:
    """Stage 1, stage 2 and the configuration as they are published."""
    tokenizer, checkpoint, options = tmp_path / "vae_00000042", tmp_path / "last.ckpt", tmp_path / "config.yaml"
    torch.save({"encoder": stages[0], "steps": 42, "epoch": 3}, tokenizer)
    torch.save(lightning(stages[1]), checkpoint)
    options.write_text(yaml.safe_dump({"seed_everything": 4444, "trainer": {"max_steps": 9}, **published_config}))
    return [tokenizer, checkpoint], options


def lightning(state: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """What Lightning keeps beside the tensors, discriminators among these."""
    discriminators = {"multiperioddisc.discriminators.0.convs.0.bias": torch.zeros(3), "melspec_loss.x": torch.ones(2)}
    return {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": {**state, **discriminators},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 5e-4}]}],
        "hyper_parameters": argparse.Namespace(sample_rate=44100, folder=Path("logs")),
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}},
        **more,
    }


def answers(codec: MelCapModel, golden: Callable, case: str) -> bool:
    """Whether it encodes the case's clip to its codes."""
    v = golden("melcap").vectors(f"{case}/vectors")
    with torch.inference_mode():
        return torch.equal(codec.encode(v["audio"][:, None]).audio_codes, v["codes"].long())


# The released configuration


def test_defaults_are_the_released_model(manifest: dict, golden: Callable) -> None:
    with torch.device("meta"):
        codec = MelCapModel(MelCapConfig())
    parameters = list(codec.parameters())
    assert sum(p.numel() for p in parameters) == 102_901_446
    assert len(parameters) == len(codec.state_dict()) == 333
    assert [len(part) for part in manifest.values()] == [253, 225, 329]
    config, undecided = convert_config(golden("melcap").config("full"))
    assert not undecided
    assert config.to_dict() == MelCapConfig().to_dict() == convert_config(None)[0].to_dict()
    facts = config.facts
    assert facts.num_codebooks == 12 and facts.shared_codebook
    assert float(facts.ids_per_second()) == pytest.approx(258.40, abs=0.005)
    assert facts.bits_per_second() == pytest.approx(3359.2, abs=0.05)


def test_parts_have_the_released_sizes() -> None:
    with torch.device("meta"):
        codec = MelCapModel(MelCapConfig())

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert size(codec.encoder.latent_proj) == 16_448
    assert size(codec.encoder) == 36_672_128 + 16_448
    assert size(codec.quantizer) == 524_288
    assert size(codec.decoder) == 52_171_268
    assert size(codec.vocoder.backbone) == 12_990_976
    assert size(codec.vocoder.head) == 526_338


def test_the_released_files_are_understood_and_what_is_dropped_is_named(
    released: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(conversion_melcap.logger, "warning", told.append)
    with torch.device("meta"):
        expected = MelCapModel(MelCapConfig()).state_dict()
    found = convert_weights(released, MelCapConfig())
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in expected.items()}
    assert len(told) == 1
    kinds = told[0].split("; ")
    for kind, count, what, key in zip(
        kinds,
        (3, 329, 142),
        ("windows and mel filters", "discriminators", "mel decoder of stage 1"),
        ("head.istft.window)", "melspec_loss", "decoder.conv_in.bias"),
        strict=True,
    ):
        assert f"{count} tensors of" in kind and what in kind and key in kind
    assert "323 more" in kinds[1] and "more" not in kinds[0]


@pytest.mark.parametrize("bins, columns", [(1536, 1), (3583, 1), (3584, 2), (88_200, 43), (441_000, 215)])
def test_published_columns(bins: int, columns: int) -> None:
    config = MelCapConfig()
    assert config.num_columns(bins) == columns
    assert config.shortest_clip == 1536
    same = MelCapConfig(front_end_padding="none")
    assert same.shortest_clip == 2560
    assert same.num_columns(bins + 1024) == columns


@pytest.mark.parametrize("front_end", ["center", "none"])
@pytest.mark.parametrize("head", ["center", "same"])
def test_filled_lengths_lose_nothing(front_end: str, head: str) -> None:
    config = MelCapConfig(front_end_padding=front_end, head_padding=head)
    with torch.device("meta"):
        codec = MelCapModel(config)
    for samples in (1, 1535, 1792, 1793, 2048, 2049, 100_000):
        columns = config.facts.num_frames(samples)
        assert config.num_columns(codec.padded_length(samples)) == columns
        assert config.facts.num_samples(columns) >= samples > config.facts.num_samples(columns - 1)
        assert codec.padded_length(samples) >= samples


# Strictly


def one_of_each_kind(keys: list[str]) -> list[str]:
    """The first key of each pattern of numbers."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        kinds[re.sub(r"\d+", "#", key)].append(key)
    return [same[0] for same in kinds.values()]


def test_every_kind_of_tensor_is_needed_in_its_shape(weights: dict, manifest: dict, golden: Callable) -> None:
    """Of a case with shortcuts and attention, and the derived tensors, which may be missing."""
    files = golden("melcap")
    drawn = {key.partition(".")[2]: tensor for key, tensor in files.weights("tiny_head_same").items()}
    expected = convert_weights(drawn, convert_config(files.config("tiny_head_same"))[0])
    weights = drawn | {key: tensor for key, tensor in weights.items() if DERIVED.search(key)}
    kinds = one_of_each_kind(list(weights))
    assert len(kinds) == len(one_of_each_kind([*manifest["stage1"], *manifest["stage2"]])) == 139
    for key in kinds:
        without = {k: t for k, t in weights.items() if k != key}
        if DERIVED.search(key) or key.startswith(("decoder.", "post_quant_conv.")):
            assert convert_tensors(without, expected).keys() == expected.keys()
        else:
            with pytest.raises(WeightMismatchError, match="1 missing"):
                convert_tensors(without, expected)
        longer = weights[key].new_zeros(weights[key].shape[0] + 1, *weights[key].shape[1:])
        if not DERIVED.search(key):
            with pytest.raises(WeightMismatchError, match=re.escape(key)):
                convert_tensors({**weights, key: longer}, expected)


@pytest.mark.parametrize(
    "key",
    [
        "encoder.down.3.block.0.conv1.weight",  # levels 0 to 2
        "encoder.down.0.attn.0.q.weight",  # attends only at level 2
        "decoder.up.0.upsample.conv.weight",  # the last levels upsample; and the dropped decoder is checked too
        "feature_extractor.mel_decoder.2.weight",
        "feature_extractor.encoder.conv_in.weight",
        "backbone.convnext.8.gamma",
        "backbone.convnext.0.norm.scale.weight",  # of a conditional vocoder
        "head.istft.windows",
        "quantizer.embedding.bias",
    ],
)
def test_extra_tensors_are_named_and_refused(key: str, released: dict[str, Tensor]) -> None:
    with pytest.raises(WeightMismatchError, match=re.escape(key)):
        convert_weights({**released, key: torch.empty(2, device="meta")}, MelCapConfig())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_stored_precisions_become_float32(dtype: torch.dtype, weights: dict, config: MelCapConfig) -> None:
    found = convert_weights({key: t.to(dtype) for key, t in weights.items()}, config)
    exact = convert_weights(weights, config)
    for key, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[key].to(dtype).float())


# Files as they stand


def test_stored_case(golden: Callable) -> None:
    files = [golden("melcap").path(f"tiny_stored/stage{n}.safetensors") for n in (1, 2)]
    config_file = golden("melcap").path("tiny_stored/config.json")
    for order in (files, files[::-1]):
        codec = load_published(FAMILIES["melcap"], order, config_file)
        assert not codec.training
        assert all(p.dtype == torch.float32 and not p.is_meta for p in codec.state_dict().values())
        assert answers(codec, golden, "tiny_stored")


@pytest.mark.parametrize("case", CASES)
def test_drawn_cases(case: str, golden: Callable, tmp_path: Path) -> None:
    """One file, whose names begin with their stage."""
    files = golden("melcap")
    drawn = tmp_path / "weights.safetensors"
    save_file(files.weights(case), drawn)
    codec = load_published(FAMILIES["melcap"], [drawn], files.path(f"{case}/config.json"))
    assert answers(codec, golden, case)


@pytest.mark.slow
def test_full_size_case(golden: Callable, tmp_path: Path) -> None:
    """410 MB in two files."""
    files = golden("melcap")
    extra = files.path("full/extra.safetensors")
    weights = {key: t for key, t in files.weights("full").items() if key not in load_file(extra)}
    drawn = tmp_path / "weights.safetensors"
    save_file(weights, drawn)
    codec = load_published(FAMILIES["melcap"], [drawn, extra], files.path("full/config.json"))
    assert answers(codec, golden, "full")


def test_published_containers(containers: tuple, golden: Callable) -> None:
    files, options = containers
    for order in (files, files[::-1]):
        assert answers(load_published(FAMILIES["melcap"], order, options), golden, "tiny_stored")


def test_dictionaries_of_lightning_need_no_lightning(
    containers: tuple, stages: tuple, golden: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "pytorch_lightning.utilities.parsing"
    kind = type("AttributeDict", (dict,), {"__module__": name})
    modules = {part: ModuleType(part) for part in (name.split(".")[0], name.rpartition(".")[0], name)}
    modules[name].AttributeDict = kind
    files, options = containers
    with monkeypatch.context() as patch:
        for part, module in modules.items():
            patch.setitem(sys.modules, part, module)
        torch.save(lightning(stages[1], hyper_parameters=kind(learning_rate=5e-4)), files[1])
    assert answers(load_published(FAMILIES["melcap"], files, options), golden, "tiny_stored")


class Intruder:
    """Runs a command when it is unpickled by anyone who lets it."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["INTRUDED"],)


def test_no_code_of_a_checkpoint_is_executed(
    containers: tuple, stages: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTRUDED", str(tmp_path / "intruded"))
    files, options = containers
    torch.save(lightning(stages[1], hyper_parameters=Intruder()), files[1])
    with pytest.raises(UnsafeCheckpointError, match=r"last\.ckpt"):
        load_published(FAMILIES["melcap"], files, options)
    assert not (tmp_path / "intruded").exists()
    pickle.loads(pickle.dumps(Intruder()))
    assert (tmp_path / "intruded").exists(), "or nothing was tested"
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "what is allowed here is not elsewhere"


def test_files_that_are_not_the_two_of_a_model(containers: tuple, tmp_path: Path) -> None:
    [tokenizer, checkpoint], _ = containers
    with pytest.raises(CheckpointError, match=r"nothing of stage 2.*give both"):
        read_published([tokenizer])
    with pytest.raises(CheckpointError, match=r"nothing of stage 1.*give both"):
        read_published([checkpoint])
    with pytest.raises(CheckpointError, match="earlier file"):
        read_published([tokenizer, checkpoint, checkpoint])
    other = tmp_path / "other.pt"
    torch.save({"model": {"a": torch.ones(1)}, "steps": 3}, other)
    with pytest.raises(CheckpointError, match=r"other\.pt is no file of MelCap.*model, steps"):
        read_published([other])
    with pytest.raises(CheckpointNotFoundError):
        read_published([tmp_path / "nothing"])


def test_from_pretrained_fetches_the_three_published_files(
    containers: tuple, golden: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, options = containers
    asked: list[tuple[str, str]] = []

    def from_hub(repo: str, hub: dict, file: str) -> Path:
        asked.append((repo, file))
        return {"vae": files[0], "las": files[1], "con": options}[file.rpartition("/")[2][:3]]

    monkeypatch.setattr(auto, "_from_hub", from_hub)
    tok = AutoAudioTokenizer.from_pretrained("jingyi49/MelCap")
    folder = "logs96_decoder_ld/lightning_logs/version_0"
    assert asked == [
        ("jingyi49/MelCap", "cp_8_vgg3/vae_00620000"),
        ("jingyi49/MelCap", f"{folder}/checkpoints/last.ckpt"),
        ("jingyi49/MelCap", f"{folder}/config.yaml"),
    ]
    v = golden("melcap").vectors("tiny_stored/vectors")
    assert answers(tok.codec, golden, "tiny_stored")
    ids = tok(v["audio"][0], 8000, return_tensors="pt")
    assert tok.decode(ids.input_ids[0], ids.audio_lengths[0]).shape == v["audio"].shape


# Published configurations


def test_what_is_open_is_said(published_config: dict) -> None:
    assert convert_config(None)[1] == ["hidden_act", "head_padding"]
    assert convert_config({"model": published_config["model"]})[1] == ["hidden_act"]
    del published_config["model"]["init_args"]["head"]["init_args"]["padding"]
    assert convert_config(published_config)[1] == ["head_padding"]


def test_levels_that_attend(golden: Callable, published_config: dict) -> None:
    def levels(case: str) -> list[int]:
        return convert_config(golden("melcap").config(case))[0].attention_levels

    assert [levels(case) for case in ("full", "tiny", "tiny_head_same", "tiny_stored")] == [[2], [2], [1, 2], []]
    published_config["tokenizer"] |= {"attn_resolutions": [12, 3]}  # the third level would be 3 high
    assert convert_config(published_config)[0].attention_levels == [0]


def test_any_other_front_end_padding_is_none(published_config: dict) -> None:
    extractor = published_config["model"]["init_args"]["feature_extractor"]["init_args"]
    for padding in ("same", "valid", None):
        extractor["padding"] = padding
        assert convert_config(published_config)[0].front_end_padding == "none"


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("backbone", "input_channels", 32),
        ("head", "n_fft", 256),
        ("head", "dim", 8),
        ("head", "hop_length", 16),
    ],
)
def test_parts_that_disagree_are_refused(part: str, key: str, value: int, published_config: dict) -> None:
    published_config["model"]["init_args"][part]["init_args"][key] = value
    with pytest.raises(ConfigError, match=f"{part} has .*{value}"):
        convert_config(published_config)


@pytest.mark.parametrize(
    "key, value",
    [
        ("spatial_compression", 16),
        ("patch_size", 4),
        ("patch_method", "rearrange"),
        ("quantizer", "FSQ"),
        ("in_channels", 3),
    ],
)
def test_other_tokenizers_are_refused(key: str, value: object, published_config: dict) -> None:
    published_config["tokenizer"][key] = value
    with pytest.raises(ConfigError, match=f"tokenizer.{key}={value!r}"):
        convert_config(published_config)


def test_unknown_keys_are_named(published_config: dict) -> None:
    with pytest.raises(ConfigError, match=r'"hidden_acts".*Did you mean "hidden_act"'):
        convert_config({**published_config, "hidden_acts": "tanh"})
    published_config["tokenizer"]["chanels"] = 8
    with pytest.raises(ConfigError, match=r'tokenizer has the key "chanels".*Did you mean "channels"'):
        convert_config(published_config)
    del published_config["tokenizer"]["chanels"]
    published_config["model"]["init_args"]["backbone"]["init_args"]["adanorm_num_embeddings"] = 4
    with pytest.raises(ConfigError, match="adanorm_num_embeddings"):
        convert_config(published_config)


def test_keys_of_the_training_are_told_and_not_read(published_config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(conversion_melcap.logger, "info", told.append)
    published_config["model"]["init_args"] |= {"initial_learning_rate": 5e-4, "mel_loss_coeff": 45}
    assert not convert_config(published_config)[1]
    assert any("initial_learning_rate, mel_loss_coeff" in line for line in told)


def test_other_heads_are_refused(published_config: dict) -> None:
    published_config["model"]["init_args"]["head"]["class_path"] = "vocos.heads.IMDCTSymExpHead"
    with pytest.raises(OptionError, match=r"head.*IMDCTSymExpHead.*ISTFTHead"):
        convert_config(published_config)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "a: !!python/object/apply:os.getcwd []\n"])
def test_yaml_that_is_no_plain_configuration(text: str, containers: tuple) -> None:
    files, options = containers
    options.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_published(FAMILIES["melcap"], files, options)


VALUES = [
    {"sampling_rate": 0},
    {"n_fft": 1023},
    {"mel_hop_length": 600},
    {"mel_hop_length": "256"},
    {"num_mel_bins": 100},
    {"front_end_padding": "same"},
    {"hidden_act": "gelu"},
    {"head_padding": "none"},
    {"base_channels": 48},
    {"channel_multipliers": [2]},
    {"channel_multipliers": [1, 2, 2, 2]},
    {"channel_multipliers": 4},
    {"channel_multipliers": [1, 0]},
    {"attention_levels": [3]},
    {"attention_levels": ["2"]},
    {"num_norm_groups": 3},
    {"codebook_size": 0},
    {"codebook_dim": -1},
    {"normalize_latents": "no"},
    {"vocoder_num_layers": 0},
]


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_impossible_values_are_refused_by_the_config(values: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        MelCapConfig(**values)
    assert next(iter(values)) in str(caught.value)
