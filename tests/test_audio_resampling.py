"""Resampling: against the sine itself, without aliases, in time and to the sample."""

from __future__ import annotations

import numpy as np
import pytest
from audio_signals import decibels, tone
from hypothesis import given
from hypothesis import strategies as st

from audiotok.audio import load_audio


@pytest.mark.parametrize(
    ("rate", "target"),
    [(44_100, 16_000), (48_000, 16_000), (16_000, 24_000), (8_000, 48_000), (22_050, 16_000), (192_000, 44_100)],
)
@pytest.mark.parametrize("position", [0.02, 0.2, 0.45])
def test_resampled_sine(rate, target, position):
    """Against the sine itself, up to 90 % of the lower band: gain, phase, and what is added to it."""
    hertz = position * min(rate, target)
    wave = load_audio(tone(rate, 1.0, hertz, 1.0), sampling_rate=rate, target_rate=target)
    assert wave.samples.shape == (1, target)
    middle = slice(target // 10, -target // 10)
    angle = 2 * np.pi * hertz * np.arange(target)[middle] / target
    basis = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    (in_phase, quadrature), *_ = np.linalg.lstsq(basis, wave.samples[0, middle], rcond=None)
    assert abs(in_phase - 1) < 1e-3 and abs(quadrature) < 1e-6
    assert decibels(wave.samples[0, middle] - basis @ (in_phase, quadrature), basis[:, 0]) < -125
    if position < 0.3:
        assert decibels(wave.samples[0, middle] - basis[:, 0], basis[:, 0]) < -125


def test_no_aliasing():
    """A tone above the new band's end must vanish, not fold back."""
    wave = load_audio(tone(48_000, 1.0, 9_500), sampling_rate=48_000, target_rate=16_000)
    assert np.abs(wave.samples[0, 1600:-1600]).max() < 1e-5


def test_resampling_keeps_time():
    """A click stays where it was: the filter's delay is taken out."""
    samples = np.zeros(48_000, np.float32)
    samples[30_000] = 1
    wave = load_audio(samples, sampling_rate=48_000, target_rate=16_000)
    assert np.abs(wave.samples[0]).argmax() == 10_000


@given(
    count=st.one_of(st.integers(1, 400), st.integers(1, 200_000)),
    rates=st.tuples(*[st.sampled_from([1000, 8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])] * 2),
)
def test_resampled_length(count, rates):
    rate, target = rates
    wave = load_audio(np.zeros(count, np.float32), sampling_rate=rate, target_rate=target)
    assert wave.num_samples == -(-count * target // rate)


@pytest.mark.parametrize(("rate", "target"), [(768_000, 1_000), (1_000, 768_000), (44_100, 44_099)])
def test_extreme_rates(rate, target):
    wave = load_audio(np.full(2 * rate, 0.5, np.float32), sampling_rate=rate, target_rate=target)
    assert wave.num_samples == 2 * target
    np.testing.assert_allclose(wave.samples[0, target // 2 : -target // 2], 0.5, atol=1e-4)
