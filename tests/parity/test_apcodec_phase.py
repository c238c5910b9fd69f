"""The settled phase hangs on no rounding: not of the FFT library, the batch, the place in a clip or the sign of a zero.

What certified codes of APCodec are: codes of these phases.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from audiotok import ApCodecConfig, ApCodecModel
from audiotok.codecs.apcodec.front_end_apcodec import ApCodecFrontEnd, settled_phase

FRONT_END = ApCodecFrontEnd(ApCodecConfig(num_mels=20))
N_FFT, WINDOW, HOP = FRONT_END.n_fft, FRONT_END.win_length, FRONT_END.hop
SAMPLES = 3000


def signals() -> dict[str, Tensor]:
    time = torch.arange(SAMPLES)
    noise = 0.3 * torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
    return {
        "noise": noise,
        "noise that ends on a frame": torch.cat([noise[: 70 * HOP + 1]]),
        "16-bit noise": (noise * 32767).round() / 32768,
        "silence": torch.zeros(SAMPLES),
        "negative silence": -torch.zeros(SAMPLES),
        "constant": torch.full((SAMPLES,), -0.25),
        "square": torch.where(time // 80 % 2 == 0, 0.5, -0.5),
        "sine of whole periods": (0.5 * torch.sin(2 * math.pi * time.double() / 32)).float(),
        "impulse": -torch.nn.functional.one_hot(torch.tensor(1000), SAMPLES).float(),
        "onset": torch.cat([torch.zeros(1000), noise[:500], torch.zeros(1500)]),
    }


def settled(wave: Tensor) -> Tensor:
    return FRONT_END(wave[None], [len(wave)], ["settled"])[1][0]


def with_numpy(wave: Tensor) -> Tensor:
    """The settled phase from another library's transform."""
    frames = FRONT_END.num_frames(len(wave))
    padded = FRONT_END.padded(wave[None], frames)[0].double().numpy()
    window = np.zeros(N_FFT)
    start = (N_FFT - WINDOW) // 2
    window[start : start + WINDOW] = torch.hann_window(WINDOW, dtype=torch.float64).numpy()
    cut = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP][:frames]
    return settled_phase(torch.from_numpy(np.fft.rfft(cut * window)).T[None])[0]


@pytest.mark.parametrize("name", signals())
def test_another_library_gives_the_same_phase(name: str) -> None:
    """Not modulo 2 pi: +pi and -pi are far apart for the encoder."""
    wave = signals()[name]
    torch.testing.assert_close(settled(wave), with_numpy(wave), atol=1e-6, rtol=0)


def test_phases_of_float32_do_hang_on_rounding() -> None:
    """Or all this would be idle: the first frame is symmetric, and rounding decides between +pi and -pi."""
    wave = signals()["noise"]
    published = FRONT_END(wave[None], [SAMPLES], ["published"])[1][0]
    flipped = (published - settled(wave)).abs() > 1
    assert flipped[:, 0].sum() > 20
    assert flipped[:, 1:].sum() == 0
    torch.testing.assert_close(published[:, 0].where(flipped[:, 0], -torch.pi), torch.full((513,), -torch.pi))


def test_symmetric_frames_have_phase_zero_or_pi() -> None:
    phase = settled(signals()["noise that ends on a frame"])
    for frame in (0, -1):
        assert set(phase[:, frame].tolist()) == {0.0, float(np.float32(np.pi))}
        assert not phase[:, frame].signbit().any()
    assert (phase[:, 1:-1].unique().numel() > 10_000) == (phase.shape[1] > 40)


def test_lowest_and_highest_bin_are_real() -> None:
    for name, wave in signals().items():
        ends = settled(wave)[[0, -1]]
        assert set(ends.unique().tolist()) <= {0.0, float(np.float32(np.pi))}, name
        assert not ends.signbit().any()


@pytest.mark.parametrize("name", ["silence", "negative silence"])
def test_silence_has_phase_zero(name: str) -> None:
    phase = settled(signals()[name])
    assert not phase.any() and not phase.signbit().any()


def test_only_what_float64_cannot_tell_from_zero_is_zero() -> None:
    """One unit in the last place of a float32 sample moves the phase by something, not to zero."""
    wave = torch.zeros(SAMPLES)
    wave[1500] = 1.0
    wave[1501] = float(np.spacing(np.float32(1.0))) / 2
    frame = settled(wave)[:, 1500 // HOP]
    assert (frame != 0).sum() > N_FFT // 4


@pytest.mark.parametrize("kind", ["settled", "published"])
def test_features_of_a_batch_are_those_alone_bit_for_bit(kind: str) -> None:
    waves = [*signals().values()]
    lengths = [len(wave) - 37 * i for i, wave in enumerate(waves)]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    padded[torch.arange(SAMPLES) >= torch.tensor(lengths)[:, None]] = 5.0  # what follows is not read
    together = FRONT_END(padded, lengths, [kind] * len(waves))
    for row, (wave, n) in enumerate(zip(waves, lengths, strict=True)):
        alone = FRONT_END(wave[None, :n], [n], [kind])
        for many, one in zip(together, alone, strict=True):
            count = one.shape[-1]
            assert torch.equal(many[row, :, :count], one[0])
            assert not many[row, :, count:].any()


@pytest.mark.parametrize("kind", ["settled", "published"])
@pytest.mark.parametrize("name", ["silence", "noise", "onset", "constant"])
def test_gradients_are_finite(kind: str, name: str) -> None:
    wave = signals()[name][None].clone().requires_grad_()
    log_amplitude, phase = FRONT_END(wave, [SAMPLES], [kind])
    (log_amplitude.square().mean() + phase.square().mean()).backward()
    assert bool(wave.grad.isfinite().all())


def test_masked_codes_are_settled_and_bare_ones_published() -> None:
    torch.manual_seed(0)
    keys = {"n_fft": 64, "win_length": 32, "stft_hop_length": 8, "downsampling_ratio": 4, "upsample_kernel_size": 8}
    sizes = {"trunk_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "amplitude_size": 8, "phase_size": 8}
    codec = ApCodecModel(ApCodecConfig(**keys, **sizes, num_mels=8)).eval()
    wave = signals()["noise"][None, None, : 40 * 32 - 8]
    mask = torch.ones(1, wave.shape[-1])
    settled_codes = codec.encode(wave, mask).audio_codes
    assert torch.equal(settled_codes, codec.encode(wave, phase="settled").audio_codes)
    assert torch.equal(codec.encode(wave).audio_codes, codec.encode(wave, phase="published").audio_codes)
    assert torch.equal(codec.encode(wave).audio_codes, codec.encode(wave, mask, phase="published").audio_codes)
    torch.testing.assert_close(codec.latents(wave, mask), codec(wave, mask).latents, atol=0, rtol=0)
    torch.testing.assert_close(codec.latents(wave), codec(wave).latents, atol=0, rtol=0)
    assert not torch.equal(codec.latents(wave, mask), codec.latents(wave))
