"""What no published file says is decided by reconstructing a recording, told with both errors, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from audiotok import MelCapConfig, MelCapModel
from audiotok.auto import FAMILIES, load_published
from audiotok.codecs.melcap import deciding_melcap
from audiotok.codecs.melcap.conversion_melcap import DROPPED, REPLACED, RULES, convert
from audiotok.codecs.melcap.deciding_melcap import RECONSTRUCTS, decide, recording, replaced, spectral_error, stillness
from audiotok.errors import CheckpointError

RATE = 8000
# Named as the stored case, so that its names are those of these weights too.
TINY = {
    "sampling_rate": RATE,
    "n_fft": 256,
    "mel_hop_length": 64,
    "num_mel_bins": 24,
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "attention_levels": [],
    "bottleneck_channels": 32,
    "codebook_size": 256,
    "codebook_dim": 16,
    "vocoder_hidden_size": 96,
    "vocoder_intermediate_size": 192,
    "vocoder_num_layers": 2,
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a decision says."""
    lines: list[str] = []
    monkeypatch.setattr(deciding_melcap.logger, "warning", lines.append)
    return lines


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """Errors by (activation, head padding), in place of reconstructions; 1.0 is that of a still picture."""
    table: dict[tuple[str, str], float] = {}
    monkeypatch.setattr(deciding_melcap, "reconstruct", lambda config, state, waveform: config)
    monkeypatch.setattr(
        deciding_melcap,
        "spectral_error",
        lambda waveform, chosen, config: table[chosen.hidden_act, chosen.head_padding],
    )
    monkeypatch.setattr(deciding_melcap, "stillness", lambda waveform, config: 1.0)
    return table


# The rule


def test_the_best_is_taken_and_all_errors_are_told(errors: dict, told: list[str]) -> None:
    errors.update({("silu", "center"): 0.9, ("silu", "same"): 0.8, ("tanh", "center"): 0.31, ("tanh", "same"): 0.3})
    config = decide(MelCapConfig(codebook_size=17), ["hidden_act", "head_padding"], {})
    assert (config.hidden_act, config.head_padding, config.codebook_size) == ("tanh", "same", 17)
    assert len(told) == 1
    for words in (
        "hidden_act=silu, head_padding=center: 0.900",
        "hidden_act=tanh, head_padding=center: 0.310",
        "Taken: hidden_act=tanh, head_padding=same",
    ):
        assert words in told[0]


def test_what_is_stated_is_not_tried(errors: dict, told: list[str]) -> None:
    errors.update({("silu", "same"): 0.2, ("tanh", "same"): 0.3})  # a look at another one is a KeyError
    config = decide(MelCapConfig(head_padding="same"), ["hidden_act"], {})
    assert (config.hidden_act, config.head_padding) == ("silu", "same")
    assert "head_padding" not in told[0]


def test_none_that_reconstructs_is_refused(errors: dict, told: list[str]) -> None:
    errors.update({("silu", "center"): RECONSTRUCTS, ("tanh", "center"): 0.95})
    with pytest.raises(CheckpointError, match=r"No choice of hidden_act .*silu: 0\.700; hidden_act=tanh: 0\.950"):
        decide(MelCapConfig(), ["hidden_act"], {})
    assert not told


@pytest.mark.parametrize("broken", ["silu", "tanh"])
def test_a_choice_that_gives_no_numbers_is_not_taken(broken: str, errors: dict, told: list[str]) -> None:
    """Wherever it stands: NaN has no place in an order."""
    right = {"silu": "tanh", "tanh": "silu"}[broken]
    errors.update({(broken, "center"): float("nan"), (right, "center"): 0.3})
    assert decide(MelCapConfig(), ["hidden_act"], {}).hidden_act == right
    assert f"hidden_act={broken}: nan" in told.pop()
    errors[right, "center"] = float("nan")
    with pytest.raises(CheckpointError, match="No choice"):
        decide(MelCapConfig(), ["hidden_act"], {})
    assert not told


def test_two_that_are_as_good_are_refused(errors: dict, told: list[str]) -> None:
    errors.update({("silu", "center"): 0.3, ("silu", "same"): 0.301})
    with pytest.raises(CheckpointError, match=r"do not tell which head_padding is right.*0\.300.*0\.301"):
        decide(MelCapConfig(), ["head_padding"], {})
    assert not told


# The measure


def test_errors_of_known_reconstructions() -> None:
    config, wave = MelCapConfig(**TINY), recording(RATE)
    assert wave.shape == (1, 1, 3 * RATE)
    assert spectral_error(wave, wave, config) == 0
    assert 0.2 < spectral_error(wave, wave * 2**0.5, config) <= 0.3466  # 3 dB, wherever it is not silent
    limit = RECONSTRUCTS * stillness(wave, config)
    late = torch.roll(wave, config.mel_hop_length // 2, dims=-1)
    assert 0.05 < spectral_error(wave, late, config) < limit
    noise = wave.std() * torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
    for wrong in (torch.zeros_like(wave), noise, torch.roll(wave, RATE, dims=-1)):
        assert spectral_error(wave, wrong, config) > limit


def test_random_weights_are_refused(golden: Callable, tmp_path: Path) -> None:
    """They reconstruct with no activation; where the configuration states it, nothing is decided."""
    files = [golden("melcap").path(f"tiny_stored/stage{n}.safetensors") for n in (1, 2)]
    stated = golden("melcap").config("tiny_stored")
    config_file = tmp_path / "config.yaml"
    config_file.write_text(yaml.safe_dump({key: block for key, block in stated.items() if key != "hidden_act"}))
    with pytest.raises(CheckpointError, match=r"No choice of hidden_act .*speech_ljspeech\.flac"):
        convert(files, config_file)
    config_file.write_text(yaml.safe_dump(stated))
    assert convert(files, config_file)[0].hidden_act == "silu"


# Weights for which one choice is right


def trained(hidden_act: str, head_padding: str, steps: int = 300) -> MelCapModel:
    """A small codec that has learned the recording by heart, half a second at a time."""
    torch.manual_seed(0)
    codec = MelCapModel(MelCapConfig(**TINY, hidden_act=hidden_act, head_padding=head_padding)).train()
    wave, length = recording(RATE)[0], codec.facts.held_samples(8)
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 * (1 - i / steps)))
    for i in range(steps):
        starts = torch.randint(0, wave.shape[-1] - length, (4,))
        crops = torch.stack([wave[:, start : start + length] for start in starts])
        if i % 40 == 0 and i <= 120:
            wake_rows(codec, crops)
        output = codec(crops)
        loss = output.loss + sum(spectral_loss(crops[:, 0], output.audio_values[:, 0], size) for size in (64, 256))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return codec.eval()


@torch.no_grad()
def wake_rows(codec: MelCapModel, crops: Tensor) -> None:
    """Rows that no place chose become latents: in some hundred steps they would not be found."""
    output = codec(crops)
    latents = codec.quantizer.project_in(output.latents).transpose(1, 2).flatten(0, 1)
    rows = codec.quantizer.book.weight
    unused = torch.ones(len(rows), dtype=torch.bool)
    unused[output.audio_codes.unique()] = False
    some = latents[torch.randint(0, len(latents), (int(unused.sum()),))]
    rows[unused] = some + 0.05 * latents.std() * torch.randn_like(some)


def spectral_loss(wanted: Tensor, got: Tensor, size: int) -> Tensor:
    spectra = [
        torch.stft(x, size, size // 4, window=torch.hann_window(size), return_complex=True) for x in (wanted, got)
    ]
    logarithms = [(spectrum.abs() + 1e-2).log() for spectrum in spectra]
    return (logarithms[0] - logarithms[1]).abs().mean() + (spectra[0] - spectra[1]).abs().mean() / spectra[
        0
    ].abs().mean()


def as_published(codec: MelCapModel, names: dict[str, str], folder: Path) -> tuple[list[Path], Path]:
    """Both files and a configuration that says nothing of the activation and the head's padding."""
    state = {names[key]: tensor for key, tensor in codec.state_dict().items()}
    in_stage_2 = {key: t for key, t in state.items() if key.startswith(("feature_extractor.", "backbone.", "head."))}
    files, config_file = [folder / "vae_00000300", folder / "last.ckpt"], folder / "config.yaml"
    torch.save({"encoder": {k: t for k, t in state.items() if k not in in_stage_2}, "steps": 300, "epoch": 0}, files[0])
    torch.save({"state_dict": in_stage_2, "global_step": 300}, files[1])
    spectrum = {"n_fft": TINY["n_fft"], "hop_length": TINY["mel_hop_length"]}
    blocks = {
        "dim": TINY["vocoder_hidden_size"],
        "intermediate_dim": TINY["vocoder_intermediate_size"],
        "num_layers": 2,
    }
    arguments = {
        "sample_rate": RATE,
        "feature_extractor": {"class_path": "x.Mel", "init_args": {**spectrum, "n_mels": TINY["num_mel_bins"]}},
        "backbone": {"class_path": "vocos.models.VocosBackbone", "init_args": blocks},
        "head": {"class_path": "vocos.heads.ISTFTHead", "init_args": spectrum},
    }
    tokenizer = {"channels": 32, "channels_mult": [1, 1], "num_res_blocks": 1, "resolution": 24, "attn_resolutions": [],
                 "z_channels": 32, "num_embeddings": 256, "embedding_dim": 16}  # fmt: skip
    config_file.write_text(yaml.safe_dump({"model": {"init_args": arguments}, "tokenizer": tokenizer}))
    return files, config_file


@pytest.fixture
def names(golden: Callable) -> dict[str, str]:
    """Our name → the published one."""
    from safetensors import safe_open

    keys: list[str] = []
    for n in (1, 2):
        with safe_open(golden("melcap").path(f"tiny_stored/stage{n}.safetensors"), "pt") as file:
            keys += file.keys()
    dropped = [
        any(p.fullmatch(key) for p in DROPPED.values()) or any(rule.apply(key) for rule in REPLACED) for key in keys
    ]
    needed = [key for key, is_dropped in zip(keys, dropped, strict=True) if not is_dropped]
    return {next(name for rule in RULES if (name := rule.apply(key)) is not None): key for key in needed}


@pytest.mark.slow
@pytest.mark.parametrize("hidden_act, head_padding", [("silu", "center"), ("tanh", "same")])
def test_trained_weights_decide(
    hidden_act: str, head_padding: str, names: dict[str, str], told: list[str], tmp_path: Path
) -> None:
    codec = trained(hidden_act, head_padding)
    files, config_file = as_published(codec, names, tmp_path)
    found = load_published(FAMILIES["melcap"], files, config_file)
    assert (found.config.hidden_act, found.config.head_padding) == (hidden_act, head_padding)
    assert found.config.to_dict() == codec.config.to_dict()
    assert f"Taken: hidden_act={hidden_act}, head_padding={head_padding}" in told[0]
    assert told[0].count("hidden_act=") == 5  # four errors, and the choice
    found.save_pretrained(tmp_path / "saved")
    assert MelCapConfig.from_pretrained(tmp_path / "saved").hidden_act == hidden_act
    wave, state = recording(RATE), found.state_dict()
    other = replaced(found.config, hidden_act="tanh" if hidden_act == "silu" else "silu")
    right, wrong = (
        spectral_error(wave, deciding_melcap.reconstruct(config, state, wave), config)
        for config in (found.config, other)
    )
    assert right < 0.6 * stillness(wave, found.config) and wrong > 1.05 * right
