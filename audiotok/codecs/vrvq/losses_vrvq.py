"""What the published training makes small besides the codec's own losses: mel distance and an adversarial game.

The generator's loss is 15 mel + 2 feature matching + 1 adversarial + 0.25 commitment + 1 codebook + w rate, with w
`VrvqConfig.rate_cost`; the distance of linear spectra is only logged. Multi-period and multi-band spectrogram
discriminators as in the Descript Audio Codec (Kumar et al., arXiv 2306.06546), with least-squares scores.

Shapes: B clips, N samples, F frames, K bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.audio_utils import mel_filter_bank

from audiotok.nn.stft import magnitude, reflect_pad, stft

FLOOR = 1e-5  # under every logarithm
Judgement = list[Tensor]
"""Feature maps of a discriminator; the last holds its scores."""


def spectrum(audio: Tensor, window: int, hop: int) -> Tensor:
    """Centred, reflected at both ends: `[B, 1, N]` → complex `[B, K, F]`."""
    return stft(reflect_pad(audio[:, 0], window // 2, None, audio.shape[-1] + window), window, hop)


def mel_filters(sampling_rate: int, window: int, num_mels: int) -> Tensor:
    """Slaney's filters up to half the rate, each of area 1 in Hz, `[mels, K]`."""
    bank = mel_filter_bank(
        window // 2 + 1, num_mels, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
    )
    return torch.from_numpy(bank.T.astype(np.float32))


class MelDistance(nn.Module):
    """Mean |difference| of log10 mel spectrograms, summed over windows.

    Args:
        scales: (window in samples, mels); the hop is a quarter of the window.
    """

    SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))

    def __init__(self, sampling_rate: int = 44100, scales: Sequence[tuple[int, int]] = SCALES) -> None:
        super().__init__()
        self.windows = [window for window, _ in scales]
        for window, num_mels in scales:
            self.register_buffer(f"filters_{window}", mel_filters(sampling_rate, window, num_mels), persistent=False)

    def mel(self, audio: Tensor, window: int) -> Tensor:
        """`[B, 1, N]` → magnitudes `[B, mels, F]`."""
        return self.get_buffer(f"filters_{window}") @ magnitude(spectrum(audio, window, window // 4))

    def at(self, window: int, reconstruction: Tensor, target: Tensor) -> Tensor:
        """The distance of one window."""
        found, wanted = (self.mel(audio, window).clamp(min=FLOOR).log10() for audio in (reconstruction, target))
        return F.l1_loss(found, wanted)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Both `[B, 1, N]`; a scalar."""
        return torch.stack([self.at(window, reconstruction, target) for window in self.windows]).sum()


def spectral_distance(reconstruction: Tensor, target: Tensor, windows: Sequence[int] = (2048, 512)) -> Tensor:
    """Mean |difference| of log10 of the power, and of the magnitude, summed over windows; both `[B, 1, N]`."""
    terms = []
    for window in windows:
        found, wanted = (magnitude(spectrum(audio, window, window // 4)) for audio in (reconstruction, target))
        log_found, log_wanted = (values.clamp(min=FLOOR).square().log10() for values in (found, wanted))
        terms += [F.l1_loss(log_found, log_wanted), F.l1_loss(found, wanted)]
    return torch.stack(terms).sum()


# Discriminators


def _conv(
    in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)
) -> nn.Sequential:
    """A padded 2-D convolution with weight norm, then leaky ReLU."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(weight_norm(nn.Conv2d(in_channels, out_channels, kernel, stride, padding)), nn.LeakyReLU(0.1))


class PeriodDiscriminator(nn.Module):
    """Looks at each phase of a period by itself."""

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, 32, 128, 512, 1024]
        self.convs = nn.ModuleList(_conv(a, b, (5, 1), (3, 1)) for a, b in pairwise(widths))
        self.convs.append(_conv(1024, 1024, (5, 1)))
        self.conv_post = weight_norm(nn.Conv2d(1024, 1, (3, 1), padding=(1, 0)))

    def fold(self, audio: Tensor) -> Tensor:
        """`[B, 1, N]` → `[B, 1, rows, period]`; where the period divides N, a whole one is added, as published."""
        missing = self.period - audio.shape[-1] % self.period
        return F.pad(audio, (0, missing), mode="reflect").unflatten(-1, (-1, self.period))

    def forward(self, audio: Tensor) -> Judgement:
        maps = [self.fold(audio)]
        for layer in (*self.convs, self.conv_post):
            maps.append(layer(maps[-1]))
        return maps[1:]


class BandDiscriminator(nn.Module):
    """Looks at real and imaginary parts of a spectrogram, each of five bands with a stack of its own."""

    BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.hop = window, window // 4
        edges = [int(share * (window // 2 + 1)) for share in self.BANDS]
        self.bands = list(pairwise(edges))
        self.band_convs = nn.ModuleList(self._stack() for _ in self.bands)
        self.conv_post = weight_norm(nn.Conv2d(32, 1, (3, 3), padding=(1, 1)))

    @staticmethod
    def _stack() -> nn.ModuleList:
        narrowing = [_conv(32, 32, (3, 9), (1, 2)) for _ in range(3)]
        return nn.ModuleList([_conv(2, 32, (3, 9)), *narrowing, _conv(32, 32, (3, 3))])

    def split(self, audio: Tensor) -> list[Tensor]:
        """`[B, 1, N]` → the bands `[B, 2, ceil(N / hop), bins]`."""
        side = (self.window - self.hop) // 2
        padded = F.pad(audio, (side, side + -audio.shape[-1] % self.hop), mode="reflect")
        bins = spectrum(padded, self.window, self.hop)[..., 2:-2]  # the ends see the reflection of a reflection
        parts = torch.view_as_real(bins).permute(0, 3, 2, 1)
        return [parts[..., first:last] for first, last in self.bands]

    def forward(self, audio: Tensor) -> Judgement:
        maps, ends = [], []
        for band, stack in zip(self.split(audio), self.band_convs, strict=True):
            assert isinstance(stack, nn.ModuleList)
            for layer in stack:
                band = layer(band)
                maps.append(band)
            ends.append(band)
        return [*maps, self.conv_post(torch.cat(ends, dim=-1))]


class VrvqDiscriminator(nn.Module):
    """All eight of them."""

    PERIODS, WINDOWS = (2, 3, 5, 7, 11), (2048, 1024, 512)

    def __init__(self) -> None:
        super().__init__()
        judges: list[nn.Module] = [PeriodDiscriminator(period) for period in self.PERIODS]
        self.discriminators = nn.ModuleList([*judges, *(BandDiscriminator(window) for window in self.WINDOWS)])

    @staticmethod
    def preprocess(audio: Tensor) -> Tensor:
        """Without its mean, at a peak of 0.8."""
        centred = audio - audio.mean(dim=-1, keepdim=True)
        return 0.8 * centred / (centred.abs().amax(dim=-1, keepdim=True) + 1e-9)

    def forward(self, audio: Tensor) -> list[Judgement]:
        """`[B, 1, N]` → what each thinks of it."""
        audio = self.preprocess(audio)
        return [judge(audio) for judge in self.discriminators]


def discriminator_loss(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """Scores of 1 for recordings and 0 for reconstructions, least squares, summed over discriminators."""
    terms = [f[-1].square().mean() + (1 - r[-1]).square().mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).sum()


def adversarial_loss(fake: list[Judgement]) -> Tensor:
    """Scores of 1 for reconstructions, least squares, summed over discriminators."""
    return torch.stack([(1 - maps[-1]).square().mean() for maps in fake]).sum()


def feature_matching_loss(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """Mean |difference| of all feature maps but the scores, summed."""
    pairs = [pair for r, f in zip(real, fake, strict=True) for pair in zip(r[:-1], f[:-1], strict=True)]
    return torch.stack([F.l1_loss(found, wanted.detach()) for wanted, found in pairs]).sum()
