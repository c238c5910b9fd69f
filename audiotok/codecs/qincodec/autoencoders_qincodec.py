"""What stands before and behind QinCodec's quantizer: our Vocos autoencoder, or that of another codec.

Both are one seam: waveforms → latents, latents → waveforms, for clips of known lengths, each as it is alone.

Shapes: B clips, C channels, N samples, F frames, D latent dimensions, H hidden channels, W = n_fft / 2 + 1 bins.
`valid` `[B, F]` bool marks the frames that exist, None where all do.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiotok.codec import AudioCodec
from audiotok.codecs.auv import AuvModel
from audiotok.codecs.qincodec.configuration_qincodec import QinCodecConfig, codec_classes
from audiotok.errors import ConfigError
from audiotok.nn.convnext import VocosBackbone
from audiotok.nn.masks import valid_frames
from audiotok.nn.stft import istft, stft

# Added to the power before it is compressed: without it the slope at silence is infinite.
POWER_FLOOR = 1e-7


@dataclass
class Encoded:
    """What an encoder gives.

    Attributes:
        latents: `[B, D, F]`, zero where no frame is.
        frames: of each clip.
        hidden_states: of our encoder, `[B, F, H]` each; none of another codec's.
    """

    latents: Tensor
    frames: list[int]
    hidden_states: list[Tensor] = field(default_factory=list)


@dataclass
class Decoded:
    """`audio` `[B, C, N]`, zero behind each clip's frames; `features` of our decoder `[B, F, H]`, before its head."""

    audio: Tensor
    features: Tensor | None = None


class Autoencoder(nn.Module):
    """The seam between QinCodec and what makes its latents."""

    @abstractmethod
    def encode(self, input_values: Tensor, lengths: Sequence[int]) -> Encoded:
        """`[B, C, N]`, of which row i has `lengths[i]` samples and then zeros → latents."""

    @abstractmethod
    def decode(self, latents: Tensor, frames: Sequence[int]) -> Decoded:
        """Latents `[B, D, F]`, of which row i has `frames[i]` → waveforms."""


def build_autoencoder(config: QinCodecConfig) -> Autoencoder:
    """Ours, or the one that the config wraps."""
    if config.autoencoder is None:
        return VocosAutoencoder(config)
    inner = config.inner_config()
    return wrap_codec(codec_classes(inner.model_type)[1](inner))


def wrap_codec(codec: AudioCodec) -> CodecAutoencoder:
    """Encoder and decoder of a codec, which shares its weights with the result.

    Raises:
        ConfigError: the codec decodes nothing but codes.
    """
    return AuvAutoencoder(codec) if isinstance(codec, AuvModel) else CodecAutoencoder(codec)


# Ours


def compressed_spectrum(waveform: Tensor, num_frames: int, n_fft: int, hop: int, exponent: float) -> Tensor:
    """Waveforms `[B, N]` → complex `[B, W, F]` in float32, magnitudes to the power of `exponent`, phases kept.

    Zeros, not reflections, lie beyond both ends: clips of any length have a spectrum, and padding in a batch is no
    different from what is there anyway.
    """
    edge = (n_fft - hop) // 2
    total = (num_frames - 1) * hop + n_fft
    spectrum = stft(F.pad(waveform, (edge, total - edge - waveform.shape[-1])), n_fft, hop)
    power = spectrum.real.square() + spectrum.imag.square()
    return spectrum * (power + POWER_FLOOR).pow((exponent - 1) / 2)


class VocosTrunk(nn.Module):
    """A Vocos backbone and a linear layer behind it."""

    def __init__(self, config: QinCodecConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.backbone = VocosBackbone(in_channels, *config.trunk)
        self.out = nn.Linear(config.trunk[0], out_channels)

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """`[B, in, F]` → `[B, F, out]`, and the states before each block and behind the last, `[B, F, H]` each."""
        x, states = self.backbone.states(x.to(self.out.weight.dtype), valid)
        return self.out(x), states


class VocosAutoencoder(Autoencoder):
    """Our design: compressed complex spectra, a Vocos trunk, latents, a Vocos trunk, log-magnitudes and phases."""

    def __init__(self, config: QinCodecConfig) -> None:
        super().__init__()
        self.n_fft, self.hop = int(config.n_fft or 0), config.hop_length
        self.exponent = float(config.feature_exponent or 0.0)
        self.encoder = VocosTrunk(config, self.n_fft + 2, config.latent_dim)
        self.decoder = VocosTrunk(config, config.latent_dim, self.n_fft + 2)

    def encode(self, input_values: Tensor, lengths: Sequence[int]) -> Encoded:
        frames = self.num_frames(lengths)
        valid = valid_frames(frames, input_values.device)
        spectrum = self.spectrum(input_values[:, 0], max(frames))
        latents, states = self.encoder(torch.cat([spectrum.real, spectrum.imag], dim=1), valid)
        latents = latents.transpose(1, 2)
        return Encoded(latents if valid is None else latents * valid[:, None], frames, states)

    def decode(self, latents: Tensor, frames: Sequence[int]) -> Decoded:
        valid = valid_frames(frames, latents.device)
        out, states = self.decoder(latents, valid)
        log_magnitude, phase = out.float().chunk(2, dim=-1)
        with torch.autocast(latents.device.type, enabled=False):
            # No waveform within full scale has more than the window's sum, n_fft / 2. Cut before exp, not behind it:
            # where exp overflows its gradient is no number.
            level = log_magnitude.clamp(max=math.log(self.n_fft / 2)).exp()
            audio = istft(torch.complex(level * phase.cos(), level * phase.sin()), self.hop, valid)
        if valid is not None:  # the last frame's window reaches on, and has little energy there to be divided by
            audio = audio * valid.repeat_interleave(self.hop, dim=1)
        return Decoded(audio[:, None], states[-1])

    def num_frames(self, lengths: Sequence[int]) -> list[int]:
        """Frames of clips of these lengths: the last one is filled up with zeros, none is dropped."""
        return [max(1, -(-n // self.hop)) for n in lengths]

    def spectrum(self, waveform: Tensor, num_frames: int) -> Tensor:
        """`compressed_spectrum` with our settings, in float32 also under autocast."""
        with torch.autocast(waveform.device.type, enabled=False):
            return compressed_spectrum(waveform.float(), num_frames, self.n_fft, self.hop, self.exponent)

    def spectral_distance(self, audio: Tensor, target: Tensor, lengths: Sequence[int]) -> Tensor:
        """Mean absolute difference of compressed complex spectra `[B, 1, N]`, real and imaginary parts: a scalar.

        Phases count, unlike in any distance of magnitudes.
        """
        frames = self.num_frames(lengths)
        with torch.no_grad():
            wanted = self.spectrum(target[:, 0], max(frames))
        difference = torch.view_as_real(self.spectrum(audio[:, 0], max(frames)) - wanted).abs().mean(dim=(1, 3))
        valid = valid_frames(frames, audio.device)
        return difference.mean() if valid is None else difference[valid].mean()


# Another codec's


class CodecAutoencoder(Autoencoder):
    """Encoder and decoder of a codec that decodes latents as well as it gives them (`decode_latents`).

    Clips go through it one by one, as published, without a mask: nothing is known of how it pads.
    """

    codec: Any

    def __init__(self, codec: AudioCodec) -> None:
        super().__init__()
        if not callable(getattr(codec, "decode_latents", None)):
            raise ConfigError(
                f"autoencoder={codec.config.model_type} cannot be wrapped: {type(codec).__name__} has no "
                "decode_latents, which turns latents that are no codes into audio."
            )
        self.codec = codec

    def encode(self, input_values: Tensor, lengths: Sequence[int]) -> Encoded:
        clips = [self.to_latents(input_values[i : i + 1, :, :n]) for i, n in enumerate(lengths)]
        return Encoded(_stack(clips), [clip.shape[-1] for clip in clips])

    def decode(self, latents: Tensor, frames: Sequence[int]) -> Decoded:
        clips = [self.to_audio(latents[i : i + 1, :, :n]) for i, n in enumerate(frames)]
        return Decoded(_stack(clips))

    def to_latents(self, clip: Tensor) -> Tensor:
        """One clip `[1, C, N]` → `[1, D, F]`."""
        return self.codec.latents(clip)

    def to_audio(self, latents: Tensor) -> Tensor:
        """Latents of one clip `[1, D, F]` → `[1, C, N]`."""
        return self.codec.decode_latents(latents.to(self.codec.dtype))


class AuvAutoencoder(CodecAutoencoder):
    """AUV's. Its latents are the few dimensions that its own codebook is searched in: the decoder sees no others."""

    codec: AuvModel

    def to_latents(self, clip: Tensor) -> Tensor:
        return self.codec.quantizer.project_in(self.codec.latents(clip)).to(self.codec.dtype)

    def to_audio(self, latents: Tensor) -> Tensor:
        z = latents.to(self.codec.dtype)
        if self.codec.config.normalize_latents:  # the decoder knows the unit sphere only
            z = F.normalize(z, dim=1)
        projected = self.codec.quantizer.in_order[0].out_proj(z.transpose(1, 2)).transpose(1, 2)
        return self.codec.decoder(projected, [latents.shape[-1]]).audio[:, None]


def _stack(clips: list[Tensor]) -> Tensor:
    """`[1, D, n_i]` each → `[B, D, max n_i]`, zeros behind."""
    longest = max(clip.shape[-1] for clip in clips)
    return torch.cat([F.pad(clip, (0, longest - clip.shape[-1])) for clip in clips])
