"""Configuration of APCodec (Ai et al., arXiv 2402.10533): the released 48 kHz model, the 16 kHz ones, a causal one.

Lengths, for hop H of the transform, window W, r = `downsampling_ratio`, and F code frames:

              transform frame t, of r a code frame    samples that F code frames hold
    centred   t * H - W / 2 to t * H + W / 2          (r * F - 1) * H
    causal    (t + 1) * H - W to (t + 1) * H          r * F * H - W / 2
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from audiotok.errors import ConfigError, check_flag, check_number
from audiotok.facts import CodecFacts
from audiotok.nn.convnext import VocosBackbone
from audiotok.prefixes import PrefixConfig

WHOLE_NUMBERS = (
    "sampling_rate n_fft win_length stft_hop_length downsampling_ratio trunk_size intermediate_size num_hidden_layers "
    "amplitude_size phase_size hidden_size num_codebooks codebook_size downsample_kernel_size upsample_kernel_size "
    "latent_kernel_size output_kernel_size num_mels"
).split()
FLAGS = ("response_norm", "codebook_projections", "causal")


@strict
class ApCodecConfig(PrefixConfig):
    """The whole codec; the defaults are the released 48 kHz model of 6 kb/s ("v2").

    The released 16 kHz models ("v1") have `sampling_rate=16000, win_length=160, hidden_size=64, response_norm=False,
    codebook_projections=False, downsample_kernel_size=15`, and 8 codebooks (4 kb/s) or 4 (2 kb/s). The low-latency
    variant has `causal=True, response_norm=False` and a `downsample_kernel_size` from `downsampling_ratio` on.

    Args:
        sampling_rate: Hz.
        n_fft, win_length, stft_hop_length: of the transform, samples; the window stands in the middle of `n_fft`.
        downsampling_ratio: transform frames a code frame.
        trunk_size: channels of the four trunks. intermediate_size: inside their blocks.
        num_hidden_layers: blocks a trunk.
        amplitude_size, phase_size: channels of each branch between its trunk and its convolutions, even.
        hidden_size: channels D of the latents, and of the codebooks' rows.
        num_codebooks, codebook_size: stages of the residual quantizer, and rows of each.
        num_quantizers: codes a frame, of the first stages; None for all of them. The codes of a stage do not depend
            on it.
        response_norm: blocks of ConvNeXt v2, whose norm pools over the whole clip; else blocks with layer scale.
        codebook_projections: linear maps around each codebook.
        downsample_kernel_size: transform frames that the strided convolution of the encoder sees.
        upsample_kernel_size, latent_kernel_size, output_kernel_size: of the decoder's transposed convolution, of
            those around the latents, and of those that give the spectrum.
        causal: everything looks back only; see `latency_samples`.
        num_mels: bands of the losses on log-mel spectra.
        commitment_cost: weight of the commitment term in the quantizer loss.
    """

    model_type = "audiotok_apcodec"
    training_keys: ClassVar[tuple[str, ...]] = ("commitment_cost", "num_mels")

    sampling_rate: int = 48000
    n_fft: int = 1024
    win_length: int = 320
    stft_hop_length: int = 40
    downsampling_ratio: int = 8
    trunk_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 8
    amplitude_size: int = 256
    phase_size: int = 256
    hidden_size: int = 32
    num_codebooks: int = 4
    codebook_size: int = 1024
    num_quantizers: int | None = None
    response_norm: bool = True
    codebook_projections: bool = True
    downsample_kernel_size: int = 7
    upsample_kernel_size: int = 16
    latent_kernel_size: int = 7
    output_kernel_size: int = 7
    causal: bool = False
    num_mels: int = 80
    commitment_cost: float = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        for key in WHOLE_NUMBERS:
            check_number(key, getattr(self, key), least=1)
        check_number("commitment_cost", self.commitment_cost, least=0, kind=float)
        for key in FLAGS:
            check_flag(key, getattr(self, key))
        self._check_transform()
        self._check_kernels()
        super().__post_init__(**kwargs)

    def _check_transform(self) -> None:
        for key in ("n_fft", "win_length", "amplitude_size", "phase_size"):
            if getattr(self, key) % 2:
                raise ConfigError(f"{key}={getattr(self, key)} is odd: it is halved, so choose an even number.")
        if not 2 * self.stft_hop_length <= self.win_length <= self.n_fft:
            raise ConfigError(
                f"win_length={self.win_length} is not legal: windows must overlap by half or more and fit the "
                f"transform, so choose {2 * self.stft_hop_length} (two hops) to {self.n_fft} (n_fft)."
            )

    def _check_kernels(self) -> None:
        ratio, down, up = self.downsampling_ratio, self.downsample_kernel_size, self.upsample_kernel_size
        if up < ratio or (up - ratio) % 2:
            raise ConfigError(
                f"upsample_kernel_size={up} is not legal with downsampling_ratio={ratio}: choose {ratio}, {ratio + 2}, "
                f"{ratio + 4}, ... so that each code frame becomes {ratio} transform frames."
            )
        if self.causal:
            if self.response_norm:
                raise ConfigError(
                    "response_norm=true is not legal with causal=true: it pools over the whole clip, the future "
                    "included. Set response_norm=false."
                )
            if down < ratio:
                raise ConfigError(
                    f"downsample_kernel_size={down} is not legal with causal=true: choose {ratio} "
                    "(downsampling_ratio) or more, so that every transform frame is seen."
                )
            return
        for key in ("downsample_kernel_size", "latent_kernel_size", "output_kernel_size"):
            if getattr(self, key) % 2 == 0:
                raise ConfigError(f"{key}={getattr(self, key)} is even: choose an odd number, which has a middle.")

    @property
    def num_bins(self) -> int:
        """K, of each transform frame."""
        return self.n_fft // 2 + 1

    @property
    def hop_length(self) -> int:
        """Samples a code frame."""
        return self.stft_hop_length * self.downsampling_ratio

    @property
    def delay(self) -> int:
        """Samples by which the middle of a causal frame lies before that of the centred frame of its number."""
        return self.win_length // 2 - self.stft_hop_length if self.causal else 0

    @property
    def latency_samples(self) -> int | None:
        """Input samples, from sample s on and itself included, after which output sample s is there at the latest.

        One code frame, and the overlap of the windows that s waits for. None where the codec is not causal.
        """
        return self.hop_length + self.win_length - self.stft_hop_length if self.causal else None

    @property
    def latency_ms(self) -> float | None:
        return None if self.latency_samples is None else 1000 * self.latency_samples / self.sampling_rate

    @property
    def facts(self) -> CodecFacts:
        return CodecFacts(
            sampling_rate=self.sampling_rate,
            output_sampling_rate=self.sampling_rate,
            channels=1,
            hop_length=self.hop_length,
            codebook_sizes=(self.codebook_size,) * self.num_codes,
            is_causal=self.causal,
            receptive_field_samples=self._encoder_reach(),
            decoder_reach_samples=self._decoder_reach(),
            tail_samples=self.win_length // 2 if self.causal else self.stft_hop_length,
        )

    @property
    def _trunk_reach(self) -> int:
        """Transform frames that a trunk sees on each side; causal, twice as many before."""
        return (VocosBackbone.KERNEL - 1) // 2 * (self.num_hidden_layers + 1)

    def _encoder_reach(self) -> int | None:
        """Samples before or behind a code frame that can change its code."""
        if self.response_norm:
            return None
        ratio, down, latent = self.downsampling_ratio, self.downsample_kernel_size, self.latent_kernel_size - 1
        if self.causal:
            frames = ratio * latent + (down - ratio) + 2 * self._trunk_reach
            return frames * self.stft_hop_length + self.win_length - self.stft_hop_length
        frames = ratio * latent // 2 + (down - 1) // 2 + self._trunk_reach
        return frames * self.stft_hop_length + self.win_length // 2

    def _decoder_reach(self) -> int | None:
        """Samples before or behind a code frame that its codes can change."""
        if self.response_norm:
            return None
        ratio, latent, output = self.downsampling_ratio, self.latent_kernel_size - 1, self.output_kernel_size - 1
        surplus = self.upsample_kernel_size - ratio
        if self.causal:
            frames = output + 2 * self._trunk_reach + ratio * (-(-surplus // ratio) + latent)
            return max(frames * self.stft_hop_length, self.win_length - self.stft_hop_length)
        frames = output // 2 + self._trunk_reach + surplus // 2 + ratio * latent // 2
        return frames * self.stft_hop_length + self.win_length // 2
