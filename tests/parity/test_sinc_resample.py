"""The published resampler: its recorded outputs, and what any resampler must do.

Equality to the last bit holds for the filters. Their sums with the samples are left to the machine's BLAS, which
adds in an order of its own and so moves single samples by one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from audiotok.errors import IntegerAudioError, SamplingRateError
from audiotok.nn.sinc_resample import polyphase_filters, sinc_resample

ULP = 2.0**-24


@pytest.fixture
def vectors(golden: Callable) -> dict:
    return golden("auv").vectors("tiny/vectors_resample")


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_recorded_outputs(rate: int, vectors: dict) -> None:
    found, recorded = sinc_resample(vectors[f"{rate}/input"], rate, 16000), vectors[f"{rate}/resampled"]
    assert found.shape == recorded.shape
    assert (found - recorded).abs().max() <= ULP  # signals within (-0.5, 0.5)


def fused_multiply_add(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 a * b + total, rounded once (a double holds the product exactly)."""
    return (a.astype(np.float64) * b + total).astype(np.float32)


def multiply_then_add(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return total + a * b


@pytest.mark.parametrize(
    ("rate", "orig", "new", "add", "block", "others"),
    [
        (8000, 1, 2, multiply_then_add, 1000, 0),
        (24000, 3, 2, multiply_then_add, 1000, 1),  # one sample of the first frame was summed otherwise
        (44100, 441, 160, fused_multiply_add, 192, 0),
    ],
)
def test_filters_are_those_of_the_recording_to_the_last_bit(
    rate: int, orig: int, new: int, add: Callable, block: int, others: int, vectors: dict
) -> None:
    """Summed in the order of the recording machine's BLAS, they give every recorded bit."""
    filters, width = polyphase_filters(orig, new, torch.device("cpu"))
    taps = filters.numpy()
    padded = torch.nn.functional.pad(vectors[f"{rate}/input"][0], (width, width + orig))
    frames = padded.unfold(0, taps.shape[1], orig).numpy()
    total = np.zeros((len(frames), new), np.float32)
    for first in range(0, taps.shape[1], block):
        partial = np.zeros_like(total)
        for i in range(first, min(first + block, taps.shape[1])):
            partial = add(partial, frames[:, i : i + 1], taps[None, :, i])
        total = total + partial
    recorded = vectors[f"{rate}/resampled"][0].numpy()
    assert np.count_nonzero(total.ravel()[: len(recorded)] != recorded) <= others


@given(
    samples=st.integers(1, 400),
    orig=st.integers(1, 60),
    new=st.integers(1, 60),
    shape=st.sampled_from([(), (2,), (2, 3)]),
)
def test_lengths_shapes_and_dtype(samples: int, orig: int, new: int, shape: tuple) -> None:
    waveform = torch.linspace(-1, 1, samples).expand(*shape, samples)
    found = sinc_resample(waveform, orig, new)
    assert found.shape == (*shape, -(-samples * new // orig))
    assert found.dtype == torch.float32
    assert torch.equal(found, sinc_resample(waveform, 7 * orig, 7 * new))
    if shape:
        torch.testing.assert_close(found[0], sinc_resample(waveform[0], orig, new), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("orig", "new"), [(8000, 16000), (44100, 16000), (48000, 16000), (16000, 24000)])
def test_keeps_a_tone_below_both_nyquist_rates(orig: int, new: int) -> None:
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(orig, dtype=torch.float64) / orig)
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(new, dtype=torch.float64) / new)
    found = sinc_resample(tone, orig, new)
    assert found.dtype == torch.float64
    assert (found - expected)[new // 10 : -new // 10].abs().max() < 0.01


def test_removes_a_tone_above_the_new_nyquist_rate() -> None:
    tone = torch.sin(2 * torch.pi * 15000 * torch.arange(44100) / 44100)
    assert sinc_resample(tone, 44100, 16000)[100:-100].abs().max() < 0.01


def test_equal_rates_change_nothing() -> None:
    waveform = torch.randn(3, 100)
    assert sinc_resample(waveform, 16000, 16000) is waveform


@pytest.mark.parametrize("rate", [0, -8000, 22050.5, "16000"])
def test_bad_rates_are_refused(rate: object) -> None:
    with pytest.raises(SamplingRateError, match="positive whole number"):
        sinc_resample(torch.zeros(10), rate, 16000)


def test_integers_are_refused() -> None:
    with pytest.raises(IntegerAudioError, match="int16"):
        sinc_resample(torch.zeros(10, dtype=torch.int16), 8000, 16000)
