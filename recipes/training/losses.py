"""Losses between a recording and its reconstruction, and on the latents. All in float32.

Shapes: B clips, N samples, T frames, D latent dimensions. Every logarithm and square root is guarded, so that
digital silence gives finite values and gradients.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

MIN_POWER = 1e-10  # under every square root: a magnitude of 1e-5, -100 dB for a full-scale sine


def magnitude_spectrogram(audio: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """`[B, N]` -> `[B, bins, frames]`: |STFT| with `len(window)` points, centred frames, guarded root."""
    spectrum = torch.stft(audio, len(window), hop_length, window=window, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return power.clamp_min(MIN_POWER).sqrt()


class LogMelScale(nn.Module):
    """`[B, N]` -> `[B, bands, frames]`: ln(mel magnitude + floor) of one FFT size, hop n_fft / 4."""

    def __init__(self, sampling_rate: int, fft_size: int, num_bands: int, floor: float) -> None:
        super().__init__()
        bank = mel_filter_bank(fft_size // 2 + 1, num_bands, 0.0, sampling_rate / 2, sampling_rate)
        self.register_buffer("bank", torch.from_numpy(bank.T.astype(np.float32)).contiguous())
        self.register_buffer("window", torch.hann_window(fft_size))
        self.hop_length = fft_size // 4
        self.floor = floor

    def forward(self, audio: Tensor) -> Tensor:
        return torch.log(self.magnitude(audio) + self.floor)

    def magnitude(self, audio: Tensor) -> Tensor:
        """`[B, N]` -> mel magnitudes `[B, bands, frames]`."""
        return self.bank @ magnitude_spectrogram(audio, self.window, self.hop_length)


class MultiScaleMel(nn.Module):
    """Mean absolute difference of log-mel spectrograms, averaged over several FFT sizes.

    Args:
        scales: pairs (FFT size, bands).
        floor: added to the mel magnitudes before the logarithm.
    """

    SCALES = ((128, 16), (256, 32), (512, 64), (1024, 80), (2048, 96))

    def __init__(self, sampling_rate: int, scales: tuple[tuple[int, int], ...] = SCALES, floor: float = 1e-4) -> None:
        super().__init__()
        self.scales = nn.ModuleList(LogMelScale(sampling_rate, n, bands, floor) for n, bands in scales)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Both `[B, 1, N]`; returns a scalar."""
        return self.terms(reconstruction, target)["mel"]

    def terms(self, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Two scalars from the same spectrograms, each a mean over scales.

        `mel` is the mean absolute difference of logarithms: every band counts alike, loud or soft. `mel_convergence`
        is |M - M'| / |M| (Frobenius norms of the linear magnitudes of each clip, as in Parallel WaveGAN,
        arXiv 1910.11480): it counts what is loud, and keeps the level that the median-like `mel` loses.
        """
        reconstruction, target = reconstruction.flatten(0, 1), target.flatten(0, 1)
        distances, convergences = [], []
        for scale in self.scales:
            with torch.no_grad():
                wanted = scale.magnitude(target)
            got = scale.magnitude(reconstruction)
            distances.append(F.l1_loss(torch.log(got + scale.floor), torch.log(wanted + scale.floor)))
            convergences.append(convergence(got, wanted))
        return {"mel": torch.stack(distances).mean(), "mel_convergence": torch.stack(convergences).mean()}


class MultiResolutionSTFT(nn.Module):
    """Spectral convergence and log-magnitude distance of linear spectra at several FFT sizes (arXiv 1910.11480).

    Mel bands are too wide above 1 kHz to tell the harmonics of a voice apart; the bins of a long transform are not.
    """

    def __init__(self, fft_sizes: tuple[int, ...] = (512, 1024, 2048), floor: float = 1e-3) -> None:
        super().__init__()
        self.fft_sizes, self.floor = fft_sizes, floor

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Both `[B, 1, N]`; the mean over sizes and over the two terms, a scalar."""
        reconstruction, target = reconstruction.flatten(0, 1), target.flatten(0, 1)
        return torch.stack([self._at(size, reconstruction, target) for size in self.fft_sizes]).mean()

    def _at(self, size: int, reconstruction: Tensor, target: Tensor) -> Tensor:
        window = torch.hann_window(size, device=target.device)
        with torch.no_grad():
            wanted = magnitude_spectrogram(target, window, size // 4)
        got = magnitude_spectrogram(reconstruction, window, size // 4)
        return (convergence(got, wanted) + F.l1_loss(torch.log(got + self.floor), torch.log(wanted + self.floor))) / 2


def convergence(got: Tensor, wanted: Tensor) -> Tensor:
    """|M - M'| / |M|, Frobenius norms of each clip's magnitudes `[B, bins, frames]`, mean over clips."""
    energy = wanted.flatten(1).norm(dim=1).clamp_min(MIN_POWER**0.5)
    return ((got - wanted).flatten(1).norm(dim=1) / energy).mean()


def waveform_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """|x - y| / |x| of waveforms `[B, 1, N]`, mean over clips: 1 for silence.

    For codecs whose encoder sees the waveform, and can keep where its periods lie: spectra alone teach a fresh decoder
    of waveforms slowly what it should sound like. Clips below -80 dB count as if they had that level.
    """
    silence = 1e-4 * target.shape[-1] ** 0.5
    error = (reconstruction - target).flatten(1).norm(dim=1)
    return (error / target.flatten(1).norm(dim=1).clamp_min(silence)).mean()


class BandCorrelation(nn.Module):
    """1 - correlation of third-octave envelopes over 30 frames (about 0.4 s), the idea behind STOI.

    Warning: a loss that imitates a reported metric is a way to buy that metric. It is off unless a config turns
    it on; a checkpoint trained with it must say so on its card, and show level, band bias and mel distance
    beside STOI.

    Bands that are silent in the target (60 dB under the clip's loudest) count nothing.
    """

    SEGMENT = 30
    NUM_BANDS = 15

    def __init__(self, sampling_rate: int) -> None:
        super().__init__()
        self.window_length = round(0.025625 * sampling_rate)
        fft_size = 1 << (self.window_length - 1).bit_length()
        window = F.pad(torch.hann_window(self.window_length), (0, fft_size - self.window_length))
        self.register_buffer("window", window)
        self.register_buffer("bank", self._third_octaves(fft_size, sampling_rate))

    @classmethod
    def _third_octaves(cls, fft_size: int, sampling_rate: int) -> Tensor:
        """`[15, bins]` of 0 and 1: bands a third of an octave wide, centres from 150 Hz."""
        frequencies = torch.arange(fft_size // 2 + 1) * (sampling_rate / fft_size)
        centres = 150.0 * 2.0 ** (torch.arange(cls.NUM_BANDS) / 3)
        low, high = centres * 2 ** (-1 / 6), centres * 2 ** (1 / 6)
        return ((frequencies >= low[:, None]) & (frequencies < high[:, None])).float()

    def _envelopes(self, audio: Tensor) -> Tensor:
        """`[B, N]` -> `[B, 15, segments, 30]` band magnitudes, segments overlapping by half."""
        magnitude = magnitude_spectrogram(audio, self.window, self.window_length // 2)
        bands = (self.bank @ magnitude.square()).clamp_min(MIN_POWER).sqrt()
        return bands.unfold(-1, self.SEGMENT, self.SEGMENT // 2)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Both `[B, 1, N]` of at least 0.42 s; returns a scalar in [0, 2]."""
        with torch.no_grad():
            wanted = self._envelopes(target.flatten(0, 1))
            level = wanted.norm(dim=-1)
            audible = (level > 1e-3 * level.amax(dim=(1, 2), keepdim=True)) & (level > 1e-2)
        correlation = F.cosine_similarity(
            _centred(self._envelopes(reconstruction.flatten(0, 1))), _centred(wanted), dim=-1, eps=1e-6
        )
        return ((1 - correlation) * audible).sum() / audible.sum().clamp_min(1)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=-1, keepdim=True)


def spread_loss(latents: Tensor, temperature: float = 4.0) -> Tensor:
    """ln mean exp(t (z_i . z_j - 1)) over pairs i != j of unit latents `[M, D]`: small when spread on the sphere.

    For D = 8 and t = 4 latents that fill the sphere evenly give -3.08, a single direction gives 0.
    """
    similarity = latents @ latents.T
    pairs = ~torch.eye(len(latents), dtype=torch.bool, device=latents.device)
    count = len(latents) * (len(latents) - 1)
    return torch.logsumexp(temperature * (similarity[pairs] - 1), dim=0) - float(np.log(count))
