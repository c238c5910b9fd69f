"""Configuration of VRVQ (Chae et al., arXiv 2410.06016): a Descript Audio Codec that keeps 1 to 8 books a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from audiotok.errors import ConfigError, check_choice, check_flag, check_number
from audiotok.facts import CodecFacts
from audiotok.prefixes import PrefixConfig

DILATIONS = (1, 3, 9)  # of the residual units of each block
LEVEL_DISTRIBUTIONS = ("uniform", "log_uniform")


def downsampled(length: int, stride: int) -> int:
    """Positions that the encoder's convolution of this stride makes of `length`."""
    return (length + 2 * _padding(stride) - 2 * stride) // stride + 1


def upsampled(length: int, stride: int) -> int:
    """Positions that the decoder's convolution of this stride makes of `length`: one short where the stride is odd."""
    return (length + 1) * stride - 2 * _padding(stride)


def _padding(stride: int) -> int:
    return -(-stride // 2)


@strict
class VrvqConfig(PrefixConfig):
    """The whole codec; the defaults are the published main configuration, `vrvq_a2`.

    Args:
        sampling_rate: Hz.
        variable_rate: frames keep as many books as an importance subnet says; False makes the plain codec of constant
            rate, without that subnet.
        encoder_hidden_size: channels at the encoder's input; each block doubles them.
        downsampling_ratios: strides of the encoder's blocks, from 2; their product is the hop.
        hidden_size: channels of the latents; None for what the encoder's last block has, which a variable rate needs.
        decoder_hidden_size: channels at the decoder's input; each block halves them.
        upsampling_ratios: strides of the decoder's blocks; their product is the hop, too. An odd one costs samples:
            see `CodecFacts.tail_samples`.
        num_codebooks: books Q.
        codebook_size: entries of each.
        num_quantizers: codes in every frame, of the first books: the rate is then constant, also of a codec that was
            trained for a variable one. None lets the importance decide, or keeps all books.
        codebook_dim: dimensions of the entries, for all books or a list of one a book.
        importance_channels: of the subnet's stages between the latents' width and the one channel at its end.
        quantizer_dropout: constant rate only: share of a training batch that uses a random number of books.
        full_codebook_rate: variable rate only: share of a training batch that keeps all books.
        level_min, level_max: range of the levels that training draws, one a clip.
        level_distribution: "uniform" or "log_uniform".
        detach_importance: no gradient from the importance to the encoder.
        surrogate_alpha: steepness of the smooth mask whose gradient trains the importance.
        commitment_cost, rate_cost: weights of these terms in `loss`.
    """

    model_type = "audiotok_vrvq"
    training_keys: ClassVar[tuple[str, ...]] = (
        "quantizer_dropout",
        "full_codebook_rate",
        "level_min",
        "level_max",
        "level_distribution",
        "detach_importance",
        "surrogate_alpha",
        "commitment_cost",
        "rate_cost",
    )

    sampling_rate: int = 44100
    variable_rate: bool = True
    encoder_hidden_size: int = 64
    downsampling_ratios: list[int] | tuple[int, ...] = (2, 4, 8, 8)
    hidden_size: int | None = None
    decoder_hidden_size: int = 1536
    upsampling_ratios: list[int] | tuple[int, ...] = (8, 8, 4, 2)
    num_codebooks: int = 8
    codebook_size: int = 1024
    num_quantizers: int | None = None
    codebook_dim: int | list[int] | tuple[int, ...] = 8
    importance_channels: list[int] | tuple[int, ...] = (512, 128, 32, 8)
    quantizer_dropout: float = 0.0
    full_codebook_rate: float = 0.25
    level_min: float = 0.125
    level_max: float = 6.0
    level_distribution: str = "uniform"
    detach_importance: bool = False
    surrogate_alpha: float = 2.0
    commitment_cost: float = 0.25
    rate_cost: float = 2.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        self._check_training()
        for key in ("downsampling_ratios", "upsampling_ratios", "importance_channels"):
            setattr(self, key, list(getattr(self, key)))
        if self.hidden_size is None:
            self.hidden_size = self.feature_channels
        super().__post_init__(**kwargs)
        self._check_shapes()

    def _check_sizes(self) -> None:
        for key in ("sampling_rate", "encoder_hidden_size", "decoder_hidden_size", "num_codebooks", "codebook_size"):
            check_number(key, getattr(self, key), least=1)
        if self.hidden_size is not None:
            check_number("hidden_size", self.hidden_size, least=1)
        check_flag("variable_rate", self.variable_rate)
        for key in ("downsampling_ratios", "upsampling_ratios"):
            if not getattr(self, key):
                raise ConfigError(f"{key}=[] is not legal: give the stride of each block, from 2.")
            for stride in getattr(self, key):
                check_number(key, stride, least=2)
        for width in (*self.importance_channels, *_as_list(self.codebook_dim)):
            check_number("importance_channels or codebook_dim", width, least=1)

    def _check_training(self) -> None:
        check_choice("level_distribution", self.level_distribution, LEVEL_DISTRIBUTIONS)
        check_flag("detach_importance", self.detach_importance)
        for key in ("level_min", "level_max", "surrogate_alpha", "commitment_cost", "rate_cost"):
            check_number(key, getattr(self, key), least=0, kind=float)
        for key in ("quantizer_dropout", "full_codebook_rate"):
            check_number(key, getattr(self, key), least=0, kind=float)
            if getattr(self, key) >= 1:
                raise ConfigError(f"{key}={getattr(self, key)} is not legal: give a share of a batch, below 1.")
        if not 0 < self.level_min <= self.level_max or self.surrogate_alpha == 0:
            raise ConfigError(
                f"level_min={self.level_min}, level_max={self.level_max}, surrogate_alpha={self.surrogate_alpha}: all "
                "must be above 0, and level_min must not be above level_max."
            )
        if self.variable_rate and self.quantizer_dropout:
            raise ConfigError(
                f"quantizer_dropout={self.quantizer_dropout} is for a constant rate: where the depth varies, leave it "
                "0 and use full_codebook_rate."
            )

    def _check_shapes(self) -> None:
        """What the parts need of each other."""
        hop, upsampling = self.hop_length, math.prod(self.upsampling_ratios)
        if hop != upsampling:
            raise ConfigError(
                f"upsampling_ratios={self.upsampling_ratios} multiply to {upsampling}, downsampling_ratios to {hop}: "
                "they must agree, or the audio would come out at another rate."
            )
        halvings = 1 << len(self.upsampling_ratios)
        if self.decoder_hidden_size % halvings:
            raise ConfigError(
                f"decoder_hidden_size={self.decoder_hidden_size} is halved {len(self.upsampling_ratios)} times: give a "
                f"multiple of {halvings}."
            )
        if len(self.codebook_dims) != self.num_codebooks:
            raise ConfigError(
                f"codebook_dim={self.codebook_dim} does not name {self.num_codebooks} books: give one number, or a "
                "list of one a book."
            )
        if self.variable_rate and self.hidden_size != self.feature_channels:
            raise ConfigError(
                f"hidden_size={self.hidden_size} does not fit variable_rate=true: the importance is read from the "
                f"encoder's {self.feature_channels} channels, so leave hidden_size out, or give that."
            )

    @property
    def variable_depth(self) -> bool:
        """Whether frames differ in their number of codes."""
        return self.variable_rate and self.num_quantizers is None

    @property
    def hop_length(self) -> int:
        return math.prod(self.downsampling_ratios)

    @property
    def feature_channels(self) -> int:
        """What the encoder's last block gives."""
        return self.encoder_hidden_size << len(self.downsampling_ratios)

    @property
    def latent_channels(self) -> int:
        """`hidden_size`, which is a number by now."""
        return self.feature_channels if self.hidden_size is None else self.hidden_size

    @property
    def codebook_dims(self) -> list[int]:
        dims = _as_list(self.codebook_dim)
        return dims * self.num_codebooks if isinstance(self.codebook_dim, int) else dims

    @property
    def num_hidden_layers(self) -> int:
        """What `output_hidden_states=True` shows but for the latents: the features that the importance is read from."""
        return 1

    @property
    def facts(self) -> CodecFacts:
        frame = 1
        for stride in self.upsampling_ratios:
            frame = upsampled(frame, stride)
        return CodecFacts(
            sampling_rate=self.sampling_rate,
            output_sampling_rate=self.sampling_rate,
            channels=1,
            hop_length=self.hop_length,
            codebook_sizes=(self.codebook_size,) * self.num_codes,
            receptive_field_samples=_encoder_reach(self),
            decoder_reach_samples=_decoder_reach(self),
            variable_depth=self.variable_depth,
            tail_samples=self.hop_length - frame,
        )


def _as_list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _encoder_reach(config: VrvqConfig) -> int:
    """Samples on each side of a frame that can change its codes, or its depth."""
    # (kernel, stride, padding, dilation) of every convolution that looks at neighbours.
    layers = [(7, 1, 3, 1)]
    for stride in config.downsampling_ratios:
        layers += [(7, 1, 3 * dilation, dilation) for dilation in DILATIONS]
        layers += [(2 * stride, stride, _padding(stride), 1)]
    layers += [(3, 1, 1, 1)] * (len(config.importance_channels) + 2 if config.variable_depth else 1)
    first = last = 0
    for kernel, stride, padding, dilation in reversed(layers):
        first = first * stride - padding
        last = last * stride - padding + (kernel - 1) * dilation
    return max(-first, last - (config.hop_length - 1))


def _decoder_reach(config: VrvqConfig) -> int:
    """Samples on each side of a frame that its codes can change, in whole frames."""
    first, last = -3, config.hop_length - 1 + 3
    for stride in reversed(config.upsampling_ratios):
        first, last = first - 3 * sum(DILATIONS), last + 3 * sum(DILATIONS)
        # Sample t comes from positions i with 0 <= t + padding - stride * i < 2 * stride.
        padding = _padding(stride)
        first, last = -(-(first + padding - 2 * stride + 1) // stride), (last + padding) // stride
    return max(3 - first, last + 3) * config.hop_length
