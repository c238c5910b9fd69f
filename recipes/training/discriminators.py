"""Discriminators for the adversarial finish: multi-period and multi-resolution STFT, hinge loss, feature matching.

Multi-period after HiFi-GAN (Kong et al., arXiv 2010.05646), STFT discriminators after EnCodec (Defossez et al.,
arXiv 2210.13438). Widths come from the config, so that one small enough for a CPU is a matter of two numbers.

Shapes: B clips, N samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from audiotok.recipes.training.config import AdversarialSection

Judgement = tuple[Tensor, list[Tensor]]
"""Scores (one per patch of the input) and the feature maps on the way to them."""


class PatchStack(nn.Module):
    """2-D convolutions with weight norm and leaky ReLU; the last gives the scores."""

    def __init__(self, layers: list[nn.Conv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)

    def forward(self, x: Tensor) -> Judgement:
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.layers[-1](x), features


class PeriodDiscriminator(nn.Module):
    """Folds `[B, 1, N]` into rows of `period` samples and judges each column on its own."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, channels, 4 * channels, 16 * channels, 32 * channels]
        layers = [nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0)) for a, b in pairwise(widths)]
        layers += [nn.Conv2d(widths[-1], widths[-1], (5, 1), 1, (2, 0)), nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0))]
        self.stack = PatchStack(layers)

    def forward(self, audio: Tensor) -> Judgement:
        padded = F.pad(audio, (0, -audio.shape[-1] % self.period), mode="reflect")
        return self.stack(padded.unflatten(-1, (-1, self.period)))


class SpectrumDiscriminator(nn.Module):
    """Judges the complex STFT of `[B, 1, N]` (real and imaginary part as two channels)."""

    def __init__(self, fft_size: int, channels: int) -> None:
        super().__init__()
        self.hop_length = fft_size // 4
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        layers = [nn.Conv2d(2, channels, (3, 9), padding=(1, 4))]
        layers += [
            nn.Conv2d(channels, channels, (3, 9), (1, 2), (dilation, 4), (dilation, 1)) for dilation in (1, 2, 4)
        ]
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, 1, 3, padding=1)]
        self.stack = PatchStack(layers)

    def forward(self, audio: Tensor) -> Judgement:
        spectrum = torch.stft(
            audio[:, 0].float(), len(self.window), self.hop_length, window=self.window, normalized=True,
            return_complex=True,
        )  # fmt: skip
        return self.stack(torch.view_as_real(spectrum).permute(0, 3, 2, 1))


class Discriminators(nn.Module):
    """All of them; returns one judgement each."""

    def __init__(self, config: AdversarialSection) -> None:
        super().__init__()
        judges: list[nn.Module] = [PeriodDiscriminator(p, config.period_channels) for p in config.periods]
        judges += [SpectrumDiscriminator(n, config.fft_channels) for n in config.fft_sizes]
        self.judges = nn.ModuleList(judges)

    def forward(self, audio: Tensor) -> list[Judgement]:
        return [judge(audio) for judge in self.judges]


def discriminator_hinge(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)), averaged over the discriminators."""
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for (r, _), (f, _) in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def generator_hinge(fake: list[Judgement]) -> Tensor:
    """mean max(0, 1 - D(fake)), averaged over the discriminators."""
    return torch.stack([F.relu(1 - score).mean() for score, _ in fake]).mean()


def feature_matching(real: list[Judgement], fake: list[Judgement]) -> Tensor:
    """L1 between feature maps, relative to the size of the real ones, averaged over maps and discriminators."""
    terms = [
        F.l1_loss(f, r.detach()) / r.detach().abs().mean().clamp_min(1e-4)
        for (_, real_maps), (_, fake_maps) in zip(real, fake, strict=True)
        for r, f in zip(real_maps, fake_maps, strict=True)
    ]
    return torch.stack(terms).mean()


def _halves(judged: list[Judgement]) -> tuple[list[Judgement], list[Judgement]]:
    """The judgements of the first and of the second half of a batch."""
    halves = [(score.chunk(2), [feature.chunk(2) for feature in maps]) for score, maps in judged]
    first, second = ([(score[i], [pair[i] for pair in maps]) for score, maps in halves] for i in (0, 1))
    return first, second


class Adversary:
    """The discriminators with their optimizer: learns to tell, then says what the codec should mend."""

    def __init__(self, config: AdversarialSection, accelerator: Accelerator, sampling_rate: int) -> None:
        self.config, self.accelerator = config, accelerator
        self.crop_length = round(config.crop_seconds * sampling_rate)
        discriminators = Discriminators(config)
        optimizer = torch.optim.AdamW(
            discriminators.parameters(), config.learning_rate, betas=tuple(config.betas), fused=True
        )
        self.discriminators, self.optimizer = accelerator.prepare(discriminators, optimizer)

    def excerpt(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The same stretch of the batch's first clips of both `[B, 1, N]`, at a random place."""
        spare = max(real.shape[-1] - self.crop_length, 0)
        start = int(torch.randint(spare + 1, ()))
        part = (slice(self.config.clips), slice(None), slice(start, start + self.crop_length))
        return real[part], fake[part]

    def learn(self, real: Tensor, fake: Tensor, learning_rate_factor: float) -> Tensor:
        """One update of the discriminators; returns their loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor
        self.discriminators.requires_grad_(True)
        # One pass over both: a wrapper for several processes allows no second one before the backward pass.
        judged = self.discriminators(torch.cat([real, fake.detach()]))
        loss = discriminator_hinge(*_halves(judged))
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def criticise(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The codec's terms `adversarial` and `feature_matching`; the discriminators stay as they are."""
        judge = self.accelerator.unwrap_model(self.discriminators)
        judge.requires_grad_(False)
        with torch.no_grad():
            judged_real = judge(real)
        judged_fake = judge(fake)
        return {
            "adversarial": generator_hinge(judged_fake),
            "feature_matching": feature_matching(judged_real, judged_fake),
        }
