"""The losses and discriminators of VRVQ's published training, against its recorded values."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audiotok.codecs.vrvq.losses_vrvq import (
    BandDiscriminator,
    MelDistance,
    PeriodDiscriminator,
    VrvqDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    mel_filters,
    spectral_distance,
)

RTOL = 1e-5


@pytest.fixture
def recorded(golden: Callable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    files = golden("vrvq")
    return files.vectors("losses/vectors"), json.loads(files.path("losses/facts.json").read_text())


def test_mel_filters(recorded: tuple) -> None:
    for window, num_mels in ((32, 5), (64, 10)):
        torch.testing.assert_close(mel_filters(44100, window, num_mels), recorded[0][f"mel_filters_w{window}"])


def test_mel_distance_and_its_gradient(recorded: tuple) -> None:
    v, facts = recorded
    distance, fake = MelDistance(44100), v["fake"].clone().requires_grad_()
    for window in (32, 512):
        found = distance.mel(v["fake"][:1], window).detach()
        torch.testing.assert_close(found, v[f"mel_w{window}"][0], rtol=RTOL, atol=1e-6)
    for window, expected in zip(distance.windows, facts["mel_loss_per_window"], strict=True):
        assert distance.at(window, v["fake"], v["real"]).item() == pytest.approx(expected, rel=RTOL)
    loss = distance(fake, v["real"])
    assert loss.item() == pytest.approx(facts["mel_loss"], rel=RTOL)
    loss.backward()
    gradient = v["mel_loss.grad_fake"]
    torch.testing.assert_close(fake.grad, gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_spectral_distance(recorded: tuple) -> None:
    v, facts = recorded
    assert spectral_distance(v["fake"], v["real"]).item() == pytest.approx(facts["stft_loss"], rel=RTOL)
    assert (v["fake"] - v["real"]).abs().mean().item() == pytest.approx(facts["waveform_l1"], rel=RTOL)


def test_sizes_of_the_discriminator(recorded: tuple) -> None:
    with torch.device("meta"):
        judge = VrvqDiscriminator()
    sizes = [sum(p.numel() for p in one.parameters()) for one in judge.discriminators]
    assert sizes == [8_221_154] * 5 + [471_330] * 3
    assert sum(sizes) == recorded[1]["disc_params"]
    assert len(judge.state_dict()) == recorded[1]["disc_tensors"]


def test_what_the_discriminators_see(recorded: tuple) -> None:
    v, facts = recorded
    audio = VrvqDiscriminator.preprocess(v["real"])
    torch.testing.assert_close(audio, v["disc.preprocessed"], rtol=0, atol=1e-6)
    for period, lengths in facts["mpd_padded_lengths"].items():
        folded = [PeriodDiscriminator.fold(_period(int(period)), torch.zeros(1, 1, n)) for n in (8000, 8008)]
        assert [one.shape[-2] * one.shape[-1] for one in folded] == lengths
    with torch.device("meta"):
        bands = BandDiscriminator(2048)
    found = bands.split(audio[:1])[0][:, :, :8]
    torch.testing.assert_close(found, v["mrd2048.band0_input"], rtol=0, atol=1e-5 * float(found.abs().max()))


def _period(period: int) -> PeriodDiscriminator:
    with torch.device("meta"):
        return PeriodDiscriminator(period)


@pytest.mark.slow
def test_discriminators_and_the_adversarial_game(golden: Callable, recorded: tuple, shared: Path) -> None:
    """Full size, 42.5 million drawn weights."""
    v, facts = recorded
    spec = importlib.util.spec_from_file_location("recipe", shared / "golden" / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    arrays = recipe.load(golden("vrvq").path("losses/discriminator_recipe.json"))
    judge = VrvqDiscriminator()
    judge.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    with torch.inference_mode():
        real, fake = judge(v["real"]), judge(v["fake"])
    for i, maps in enumerate(real):
        assert [list(one.shape) for one in maps] == facts[f"disc.{i}.shapes"]
        found = torch.stack([one.abs().mean() for one in maps])
        torch.testing.assert_close(found, v[f"disc.{i}.absmean"], rtol=1e-5, atol=0)
        last = v[f"disc.{i}.last"]
        torch.testing.assert_close(maps[-1][:1], last, rtol=0, atol=1e-5 * float(last.abs().max()))
    assert discriminator_loss(real, fake).item() == pytest.approx(facts["disc_loss"], rel=RTOL)
    assert adversarial_loss(fake).item() == pytest.approx(facts["gen_loss"], rel=RTOL)
    assert feature_matching_loss(real, fake).item() == pytest.approx(facts["feat_loss"], rel=RTOL)


def test_each_side_of_the_game_moves_its_own() -> None:
    """Small stand-ins for feature maps: whose gradient each loss has."""
    generator = torch.Generator().manual_seed(0)
    real = [[torch.randn(1, 2, 3, generator=generator).requires_grad_() for _ in range(3)]]
    fake = [[torch.randn(1, 2, 3, generator=generator).requires_grad_() for _ in range(3)]]
    for loss, moved, still in (
        (discriminator_loss(real, fake), [real[0][-1], fake[0][-1]], real[0][:-1] + fake[0][:-1]),
        (adversarial_loss(fake), [fake[0][-1]], fake[0][:-1]),
        (feature_matching_loss(real, fake), fake[0][:-1], [*real[0], fake[0][-1]]),
    ):
        gradients = torch.autograd.grad(loss, [*moved, *still], allow_unused=True)
        assert all(g is not None and g.any() for g in gradients[: len(moved)])
        assert all(g is None for g in gradients[len(moved) :])
