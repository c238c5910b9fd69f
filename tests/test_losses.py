"""Losses on signals whose value is known, on silence, and the gradients that discriminators give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from audiotok.recipes.training.config import AdversarialSection
from audiotok.recipes.training.discriminators import (
    Adversary,
    Discriminators,
    discriminator_hinge,
    feature_matching,
    generator_hinge,
)
from audiotok.recipes.training.losses import (
    BandCorrelation,
    MultiResolutionSTFT,
    MultiScaleMel,
    magnitude_spectrogram,
    spread_loss,
    waveform_error,
)

RATE = 16_000
SMALL = AdversarialSection(
    periods=[2, 3], period_channels=2, fft_sizes=[256], fft_channels=2, clips=2, crop_seconds=0.125
)


def noise(clips: int = 2, seconds: float = 0.6, level: float = 0.1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, 1, round(seconds * RATE), generator=generator) * level


@pytest.fixture(scope="module")
def mel() -> MultiScaleMel:
    return MultiScaleMel(RATE)


@pytest.fixture(scope="module")
def correlation() -> BandCorrelation:
    return BandCorrelation(RATE)


# Spectra


def test_magnitude_of_a_sine_is_half_the_window_sum():
    window = torch.hann_window(512)
    sine = torch.sin(2 * math.pi * 1000 * torch.arange(RATE) / RATE)[None]  # 1000 Hz: bin 32 exactly
    magnitude = magnitude_spectrogram(sine, window, 128)[0, :, 20]
    assert magnitude.argmax() == 32
    assert magnitude[32].item() == pytest.approx(window.sum().item() / 2, rel=1e-3)


def test_every_mel_band_hears_something(mel: MultiScaleMel):
    for scale in mel.scales:
        assert (scale.bank.sum(dim=1) > 0).all()


# Multi-scale mel


def test_mel_of_equal_clips_is_zero(mel: MultiScaleMel):
    assert mel(noise(), noise()).item() == 0


@given(st.floats(0.25, 4.0))
def test_mel_reads_a_gain_as_its_logarithm(gain: float):
    x = noise(1, 0.3)
    assert MultiScaleMel(RATE, floor=1e-9)(x * gain, x).item() == pytest.approx(abs(math.log(gain)), abs=0.01)


def test_mel_grows_with_noise_and_is_symmetric_in_sign(mel: MultiScaleMel):
    x, n = noise(), noise(seed=1)
    distances = [mel(x + level * n, x).item() for level in (0.03, 0.1, 0.3, 1.0)]
    assert distances == sorted(distances)
    assert mel(-x, x).item() == pytest.approx(0, abs=1e-5)


@given(st.floats(0.0, 4.0))
def test_convergence_reads_a_gain_as_its_distance_from_one(gain: float):
    """So silence costs 1: what the median-like log distance hardly sees."""
    x = noise(1, 0.3)
    terms = MultiScaleMel(RATE).terms(x * gain, x)
    assert terms["mel_convergence"].item() == pytest.approx(abs(gain - 1), abs=1e-3)
    assert terms["mel"].item() == MultiScaleMel(RATE)(x * gain, x).item()


def test_a_band_that_is_missing_costs(mel: MultiScaleMel):
    x = noise()
    spectrum = torch.fft.rfft(x)
    spectrum[..., spectrum.shape[-1] // 2 :] = 0
    assert mel(torch.fft.irfft(spectrum, x.shape[-1]), x) > 0.5


def harmonics(shift: float) -> torch.Tensor:
    """Partials 100 Hz apart from 3 to 4 kHz, `shift` Hz higher."""
    t = torch.arange(RATE) / RATE
    partials = [torch.sin(2 * torch.pi * (3000 + 100 * k + shift) * t + k * k) for k in range(10)]
    return 0.05 * torch.stack(partials).sum(dim=0)[None, None]


def test_linear_spectra_hear_harmonics_that_mel_bands_do_not(mel: MultiScaleMel):
    x, moved, stft = harmonics(0), harmonics(50), MultiResolutionSTFT()
    assert stft(x, x).item() == 0
    assert stft(moved, x) > 2 * mel(moved, x)


@given(st.floats(0.25, 4.0))
def test_linear_spectra_read_a_gain_in_both_terms(gain: float):
    x = noise(1, 0.3)
    found = MultiResolutionSTFT(floor=1e-6)(x * gain, x).item()
    assert found == pytest.approx((abs(gain - 1) + abs(np.log(gain))) / 2, abs=5e-3)


def test_linear_spectra_of_silence_have_gradients_that_are_numbers():
    silent = torch.zeros(1, 1, 4096, requires_grad=True)
    MultiResolutionSTFT()(silent, noise(1, 4096 / RATE)).backward()
    assert torch.isfinite(silent.grad).all()


# Waveforms


def test_waveform_error_is_relative_to_each_clip():
    x = noise(2)
    assert waveform_error(x, x).item() == 0
    assert waveform_error(torch.zeros_like(x), x).item() == pytest.approx(1)
    loud_and_soft = x * torch.tensor([1.0, 0.01])[:, None, None]
    assert waveform_error(0.9 * loud_and_soft, loud_and_soft).item() == pytest.approx(0.1, rel=1e-4)


# Envelope correlation


def test_correlation_of_equal_clips_is_zero_and_ignores_gain(correlation: BandCorrelation):
    x = noise()
    assert correlation(x, x).item() == pytest.approx(0, abs=1e-4)
    assert correlation(3 * x, x).item() == pytest.approx(0, abs=1e-4)


def test_correlation_of_unrelated_clips_is_near_one(correlation: BandCorrelation):
    assert correlation(noise(8, 2.0), noise(8, 2.0, seed=1)).item() == pytest.approx(1, abs=0.1)


def test_correlation_leaves_silent_bands_out(correlation: BandCorrelation):
    """A target without anything above 1 kHz: what the output does up there must not matter."""
    times = torch.arange(RATE) / RATE
    low = torch.sin(2 * math.pi * 300 * times) * torch.sin(2 * math.pi * 5 * times).abs()
    high = 1e-3 * torch.sin(2 * math.pi * 4000 * times)
    assert correlation((low + high)[None, None], low[None, None]).item() < 0.02


# Silence


@pytest.mark.parametrize("silent", ["reconstruction", "target", "both"])
def test_silence_gives_finite_values_and_gradients(mel: MultiScaleMel, correlation: BandCorrelation, silent: str):
    zeros = torch.zeros(2, 1, 9600)
    output = (zeros if silent in ("reconstruction", "both") else noise()).clone().requires_grad_()
    target = zeros if silent in ("target", "both") else noise()
    discriminators = Discriminators(SMALL)
    for loss in (
        *mel.terms(output, target).values(),
        correlation(output, target),
        waveform_error(output, target),
        generator_hinge(discriminators(output)),
        feature_matching(discriminators(target), discriminators(output)),
    ):
        (gradient,) = torch.autograd.grad(loss, output, allow_unused=True, retain_graph=True)
        assert torch.isfinite(loss)
        assert gradient is None or torch.isfinite(gradient).all()


def test_mel_gradient_points_towards_the_target(mel: MultiScaleMel):
    target = noise()
    output = (0.5 * target).requires_grad_()
    mel(output, target).backward()
    step = 1e-3 * output.grad / output.grad.norm()
    assert mel(output - step, target) < mel(output, target)


# Spread


def test_spread_of_a_full_sphere_and_of_one_direction():
    latents = F.normalize(torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert spread_loss(latents).item() == pytest.approx(-3.08, abs=0.02)
    assert spread_loss(torch.ones(64, 8) / math.sqrt(8)).item() == pytest.approx(0, abs=1e-5)


def test_spread_pushes_a_cone_apart():
    raw = (torch.tensor([1.0] + [0.0] * 7) + 0.1 * torch.randn(64, 8)).requires_grad_()
    before = spread_loss(F.normalize(raw, dim=1))
    before.backward()
    assert spread_loss(F.normalize(raw - 10 * raw.grad, dim=1)) < before


# Discriminators


def test_hinge_values():
    def judged(score: float) -> list:
        return [(torch.full((2, 1, 3), score), [])]

    assert discriminator_hinge(judged(2.0), judged(-2.0)) == 0
    assert discriminator_hinge(judged(0.0), judged(0.0)) == 2
    assert generator_hinge(judged(0.0)) == 1
    assert generator_hinge(judged(5.0)) == 0


def test_every_discriminator_sees_the_waveform():
    audio = noise(2, 0.2).requires_grad_()
    for score, features in Discriminators(AdversarialSection(period_channels=2, fft_channels=2))(audio):
        (gradient,) = torch.autograd.grad(score.sum(), audio)
        assert gradient.abs().sum() > 0
        assert len(features) >= 4


def test_feature_matching_is_zero_for_equal_clips_and_gives_no_gradient_to_the_real_side():
    discriminators = Discriminators(SMALL)
    real, fake = noise(2, 0.2).requires_grad_(), noise(2, 0.2, seed=1).requires_grad_()
    assert feature_matching(discriminators(real), discriminators(real)) == 0
    feature_matching(discriminators(real), discriminators(fake)).backward()
    assert real.grad is None or real.grad.abs().sum() == 0
    assert fake.grad.abs().sum() > 0


@pytest.fixture
def adversary() -> Adversary:
    torch.manual_seed(0)
    return Adversary(SMALL, Accelerator(cpu=True), RATE)


def test_adversary_learns_to_tell_noise_from_a_tone(adversary: Adversary):
    tone = torch.sin(torch.arange(2000) * 0.1).expand(2, 1, -1) * 0.3
    losses = [adversary.learn(tone, noise(2, 0.125, seed=s), 1.0).item() for s in range(60)]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_criticism_moves_the_codec_and_not_the_discriminators(adversary: Adversary):
    fake = noise(2, 0.125).requires_grad_()
    before = [p.clone() for p in adversary.discriminators.parameters()]
    terms = adversary.criticise(noise(2, 0.125, seed=1), fake)
    sum(terms.values()).backward()
    assert set(terms) == {"adversarial", "feature_matching"}
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in adversary.discriminators.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, adversary.discriminators.parameters(), strict=True))


def test_learning_gives_no_gradient_to_the_codec(adversary: Adversary):
    fake = noise(2, 0.125).requires_grad_()
    adversary.learn(noise(2, 0.125, seed=1), fake, 1.0)
    assert fake.grad is None


def test_real_and_fake_in_one_pass_are_what_they_are_alone(adversary: Adversary):
    real, fake = noise(2, 0.125), noise(2, 0.125, seed=1)
    judge = adversary.discriminators
    with torch.no_grad():
        apart = discriminator_hinge(judge(real), judge(fake))
    assert adversary.learn(real, fake, 0.0).item() == pytest.approx(apart.item(), rel=1e-5)


def test_excerpts_lie_at_the_same_place(adversary: Adversary):
    audio = noise(4, 0.6)
    real, fake = adversary.excerpt(audio, audio.clone())
    assert real.shape == (2, 1, 2000)
    assert torch.equal(real, fake)
