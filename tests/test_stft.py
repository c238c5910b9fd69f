"""Spectra of clips in a padded batch are those of each clip alone, and the way back is exact."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from audiotok.nn.stft import istft, magnitude, overlap_add, phase, reflect_pad, stft

HOP = 8
N_FFT = 4 * HOP
EDGE = (N_FFT - HOP) // 2

lengths_of_clips = st.lists(st.integers(EDGE + 1, 6 * HOP), min_size=1, max_size=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    """Clips `[n]`, and all of them `[B, N]` with zeros behind their ends."""
    clips = [noise(n, seed=i) for i, n in enumerate(lengths)]
    return clips, torch.stack([F.pad(clip, (0, max(lengths) - len(clip))) for clip in clips])


def reflected(clip: Tensor, total: int) -> Tensor:
    """What the published code does with one clip, laid in a buffer."""
    padded = F.pad(clip[None, None], (EDGE, EDGE), mode="reflect")[0, 0, :total]
    return F.pad(padded, (0, total - len(padded)))


# Padding


@given(lengths=lengths_of_clips, slack=st.integers(-20, 20))
def test_reflection_at_each_clips_own_end(lengths: list[int], slack: int) -> None:
    clips, batch = padded_batch(lengths)
    behind = torch.arange(batch.shape[1]) >= torch.tensor(lengths)[:, None]
    total = max(1, max(lengths) + 2 * EDGE + slack)
    found = reflect_pad(batch.masked_fill(behind, torch.nan), EDGE, lengths, total)
    assert torch.equal(found, torch.stack([reflected(clip, total) for clip in clips]))


@given(samples=st.integers(EDGE + 1, 60), total=st.integers(1, 120))
def test_reflection_of_equal_lengths(samples: int, total: int) -> None:
    clip = noise(samples)
    for lengths in (None, [samples, samples]):
        found = reflect_pad(clip.expand(2, -1), EDGE, lengths, total)
        assert torch.equal(found, reflected(clip, total).expand(2, -1))


def test_reflection_needs_more_samples_than_it_takes() -> None:
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        reflect_pad(noise(1, EDGE), EDGE, None, 100)


# There and back


def frames_of(lengths: list[int]) -> list[int]:
    return [n // HOP for n in lengths]


def spectrum_of(batch: Tensor, lengths: list[int]) -> Tensor:
    total = (max(frames_of(lengths)) - 1) * HOP + N_FFT
    return stft(reflect_pad(batch, EDGE, lengths, total), N_FFT, HOP)


@given(lengths=lengths_of_clips)
def test_frames_of_a_batch_are_those_of_each_clip(lengths: list[int]) -> None:
    clips, batch = padded_batch(lengths)
    found = spectrum_of(batch, lengths)
    assert found.shape == (len(lengths), N_FFT // 2 + 1, max(frames_of(lengths)))
    for row, clip, frames in zip(found, clips, frames_of(lengths), strict=True):
        alone = spectrum_of(clip[None], [len(clip)])[0]
        assert alone.shape[1] == frames
        torch.testing.assert_close(row[:, :frames], alone, atol=1e-5, rtol=0)


@given(lengths=lengths_of_clips)
def test_inverse_gives_each_clip_back(lengths: list[int]) -> None:
    clips, batch = padded_batch(lengths)
    frames = frames_of(lengths)
    valid = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    spectrum = spectrum_of(batch, lengths).transpose(1, 2)
    audio = istft(spectrum, HOP, valid)
    assert audio.shape == (len(lengths), max(frames) * HOP)
    for i, (clip, count) in enumerate(zip(clips, frames, strict=True)):
        alone = istft(spectrum[i : i + 1, :count], HOP)[0]
        torch.testing.assert_close(alone, clip[: count * HOP], atol=1e-5, rtol=0)
        torch.testing.assert_close(audio[i, : count * HOP], alone, atol=1e-6, rtol=0)
        assert bool(audio[i].isfinite().all())


@given(frames=st.integers(1, 9), overlaps=st.integers(1, 5), hop=st.integers(1, 4))
def test_overlap_add_is_a_fold(frames: int, overlaps: int, hop: int) -> None:
    pieces = noise(2, frames, overlaps * hop)
    total = (frames - 1) * hop + overlaps * hop
    folded = F.fold(pieces.transpose(1, 2), (1, total), (1, overlaps * hop), stride=(1, hop))[:, 0, 0]
    torch.testing.assert_close(overlap_add(pieces, hop), folded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_fft", "window", "hop"), [(32, 32, 8), (64, 24, 6), (64, 20, 7)])
@pytest.mark.parametrize("frames", [5, 12])
def test_a_centred_inverse_is_that_of_torch(n_fft: int, window: int, hop: int, frames: int) -> None:
    spectrum = torch.complex(noise(2, frames, n_fft // 2 + 1), noise(2, frames, n_fft // 2 + 1, seed=1))
    found = istft(spectrum, hop, win_length=window, center=True)
    expected = torch.istft(
        spectrum.transpose(1, 2), n_fft, hop, window, torch.hann_window(window), center=True, return_complex=False
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.shape == (2, (frames - 1) * hop)


def test_a_centred_inverse_of_a_batch_gives_each_clip_its_own_end() -> None:
    window, hop, frames = 24, 6, [9, 4]
    spectrum = torch.complex(noise(2, 9, 33), noise(2, 9, 33, seed=1))
    valid = torch.arange(9) < torch.tensor(frames)[:, None]
    batch = istft(spectrum, hop, valid, window, center=True)
    for row, count in enumerate(frames):
        alone = istft(spectrum[row : row + 1, :count], hop, None, window, center=True)[0]
        torch.testing.assert_close(batch[row, : len(alone)], alone, atol=1e-6, rtol=1e-5)


def test_inverse_ignores_what_real_bins_cannot_have() -> None:
    spectrum = torch.complex(noise(1, 5, N_FFT // 2 + 1), noise(1, 5, N_FFT // 2 + 1, seed=1))
    real_ends = spectrum.clone()
    real_ends[..., [0, -1]] = spectrum[..., [0, -1]].real + 0j
    assert torch.equal(istft(spectrum, HOP), istft(real_ends, HOP))


def test_transform_is_the_periodic_hann_window_and_a_real_fft() -> None:
    clip = noise(1, N_FFT)
    n = torch.arange(N_FFT, dtype=torch.float64)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * n / N_FFT)
    expected = torch.fft.rfft(clip[0].double() * hann)
    torch.testing.assert_close(stft(clip, N_FFT, HOP)[0, :, 0].to(torch.complex128), expected, atol=1e-5, rtol=0)


def test_short_windows_stand_in_the_middle_of_the_transform() -> None:
    clip = noise(1, 32)
    windowed = F.pad(torch.hann_window(20), (6, 6)) * clip[0]
    torch.testing.assert_close(stft(clip, 32, HOP, 20)[0, :, 0], torch.fft.rfft(windowed), atol=1e-5, rtol=0)


# Magnitude and phase


def bins(real: list[float], imaginary: list[float]) -> Tensor:
    """One frame of a spectrum, `[1, bins, 1]`."""
    return torch.complex(torch.tensor(real), torch.tensor(imaginary))[None, :, None]


def test_phase_does_not_hang_on_the_sign_of_a_zero() -> None:
    """FFT libraries leave -0 or rounding residues in bins that are real, and -0 where there is silence."""
    found = phase(bins([-1.0, -0.0, 0.0, -0.0, -1.0], [-0.0, 0.0, -0.0, -0.0, -1e-9])).flatten()
    assert torch.equal(found, torch.tensor([math.pi, 0.0, 0.0, 0.0, math.pi]))
    assert not bool(found.signbit().any())


def test_phase_of_the_other_bins_is_the_angle() -> None:
    spectrum = torch.complex(noise(2, 9, 4), noise(2, 9, 4, seed=1))
    found = phase(spectrum)
    torch.testing.assert_close(found[:, 1:-1], spectrum.angle()[:, 1:-1])
    ends = spectrum[:, [0, -1]].real
    assert torch.equal(found[:, [0, -1]], torch.where(ends < 0, math.pi, 0.0))


def test_phase_leaves_the_spectrum_as_it_was() -> None:
    spectrum = torch.complex(noise(1, 9, 4), noise(1, 9, 4, seed=1))
    before = spectrum.clone()
    phase(spectrum)
    assert torch.equal(spectrum, before)


def test_silence_has_no_magnitude_and_a_gradient_that_is_a_number() -> None:
    spectrum = bins([3.0, 0.0, -0.0], [-4.0, 0.0, 0.0]).requires_grad_()
    found = magnitude(spectrum)
    assert torch.equal(found.flatten(), torch.tensor([5.0, 0.0, 0.0]))
    (found.sum() + (found + 1e-5).log().sum()).backward()
    assert bool(torch.view_as_real(spectrum.grad).isfinite().all())
    assert spectrum.grad.flatten()[1:].abs().max() == 0


def test_double_precision_is_asked_for_by_name() -> None:
    """Nearer to the exact transform by nine digits, whatever the dtype of what comes in."""
    padded = noise(2, 5 * N_FFT)
    exact = torch.fft.rfft(padded.double()[:, :N_FFT] * torch.hann_window(N_FFT, dtype=torch.float64))
    single, double = stft(padded, N_FFT, HOP), stft(padded, N_FFT, HOP, double=True)
    assert (single.dtype, double.dtype) == (torch.complex64, torch.complex128)
    assert (double[..., 0] - exact).abs().max() < 1e-13
    assert (single[..., 0] - exact).abs().max() > 1e-9
    assert torch.equal(stft(padded.double(), N_FFT, HOP), single)
