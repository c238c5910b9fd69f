"""Configuration of QinCodec (Lahrichi et al., arXiv 2503.19597): a continuous autoencoder, then an offline quantizer.

Neither code nor weights of the paper are public. That the autoencoder is made of Vocos blocks, at 44.1 kHz and in
mono, that the quantizer is QINCo2 and is trained afterwards on frozen latents: this the authors state. Every size,
length rule and default here is our own design.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from audiotok.codec import AudioCodec, CodecConfig
from audiotok.errors import ConfigError, check_choice, check_flag, check_number, did_you_mean
from audiotok.facts import CodecFacts
from audiotok.prefixes import PrefixConfig

QUANTIZER_TYPES = ("qinco2", "rq")
# Keys of the quantizer that only its networks have: plain residual quantization knows none of them.
NETWORK_KEYS = ("num_blocks", "embedding_dim", "hidden_dim", "num_candidates", "qinco1_mode")
# Keys that describe our own autoencoder and nothing else; None where another codec's is wrapped.
OWN_KEYS = ("n_fft", "hidden_size", "intermediate_size", "num_layers", "feature_exponent")
# Frames on each side that one convolution sees; all kernels have the width that Vocos gives them.
KERNEL_REACH = 3


@dataclass(frozen=True)
class QuantizerBlock:
    """The quantizer, as the block `quantizer` of the config describes it.

    Attributes:
        type: "qinco2" (implicit codebooks), or "rq": plain residual quantization, the baseline of the same form.
        num_quantizers: steps that there are weights for.
        codebook_size: codewords of each step.
        num_blocks, embedding_dim, hidden_dim: of the network in each step; `embedding_dim` None is the latents' width.
        num_candidates: codewords that a step pre-selects for each beam; None for all of them, and then there are
            no tables to pre-select with.
        beam_size: partial codes that are kept from step to step.
        qinco1_mode: the networks of QINCo (arXiv 2401.14732), without the skip from the base codeword.
    """

    type: str = "qinco2"
    num_quantizers: int = 24
    codebook_size: int = 256
    num_blocks: int = 2
    embedding_dim: int | None = 128
    hidden_dim: int = 256
    num_candidates: int | None = 16
    beam_size: int = 8
    qinco1_mode: bool = False

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> QuantizerBlock:
        """Check the keys and values of the config block."""
        if not isinstance(given, dict):
            raise ConfigError(f"quantizer={given!r} is not legal: give a block of keys.")
        kind = given.get("type", cls.type)
        check_choice("quantizer: type", kind, QUANTIZER_TYPES)
        legal = [f.name for f in dataclasses.fields(cls) if kind != "rq" or f.name not in NETWORK_KEYS]
        for key in given:
            if key not in legal:
                raise ConfigError(
                    f'quantizer of type "{kind}" knows no key "{key}".{did_you_mean(key, legal)} Legal keys: '
                    f"{', '.join(legal)}."
                )
        block = cls(**given)
        block._check()
        return block

    def _check(self) -> None:
        check_number("quantizer: codebook_size", self.codebook_size, least=2)
        for key in ("num_quantizers", "num_blocks", "hidden_dim", "beam_size"):
            check_number(f"quantizer: {key}", getattr(self, key), least=1)
        for key in ("embedding_dim", "num_candidates"):
            if getattr(self, key) is not None:
                check_number(f"quantizer: {key}", getattr(self, key), least=1)
        check_flag("quantizer: qinco1_mode", self.qinco1_mode)
        for key in ("beam_size", "num_candidates"):
            if (value := self._search(key)) is not None and value > self.codebook_size:
                raise ConfigError(
                    f"quantizer: {key}={value} is more than the {self.codebook_size} codewords of a step: choose 1 to "
                    f"{self.codebook_size}."
                )

    def _search(self, key: str) -> int | None:
        return None if self.type == "rq" and key in NETWORK_KEYS else getattr(self, key)

    def to_dict(self) -> dict[str, Any]:
        """The keys that this type of quantizer has."""
        skipped = NETWORK_KEYS if self.type == "rq" else ()
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in skipped}


@strict
class QinCodecConfig(PrefixConfig):
    """The whole codec; the defaults are our 44.1 kHz design, of which no trained weights exist.

    Args:
        sampling_rate: Hz.
        n_fft: samples of the window, in the encoder's features and in the decoder's head.
        hop_length: samples a frame.
        hidden_size, intermediate_size, num_layers: of the two Vocos trunks.
        latent_dim: dimensions of the latents, between encoder and quantizer.
        feature_exponent: the encoder sees spectra whose magnitudes are raised to this power.
        quantizer: keys of `QuantizerBlock`.
        num_quantizers: codes a frame, of the first steps of the quantizer; None for all of them. Encoding ends its
            search there, which is better than leaving codes out afterwards.
        autoencoder: the config of another codec of this package (its keys, and `model_type`), whose encoder and
            decoder then stand in for ours. `sampling_rate` and `hop_length` are its own, and the keys that describe
            only ours become None.
        latent_penalty: weight of mean(z^2) in `loss`; the latents keep a bounded scale.
        decoder_depths: numbers of codes a frame that a training step's clips are decoded from, drawn for each clip:
            half of them the last number, the others evenly; None for all codes always.
    """

    model_type = "audiotok_qincodec"
    training_keys: ClassVar[tuple[str, ...]] = ("latent_penalty", "decoder_depths")

    sampling_rate: int = 44100
    n_fft: int | None = 2048
    hop_length: int = 512
    hidden_size: int | None = 512
    intermediate_size: int | None = 1536
    num_layers: int | None = 8
    latent_dim: int = 64
    feature_exponent: float | int | None = 0.3
    quantizer: dict | None = None
    num_quantizers: int | None = None
    autoencoder: dict | None = None
    latent_penalty: float | int = 1e-4
    decoder_depths: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.quantizer = QuantizerBlock.from_dict({} if self.quantizer is None else self.quantizer).to_dict()
        check_number("latent_dim", self.latent_dim, least=1)
        check_number("latent_penalty", self.latent_penalty, least=0, kind=float)
        self._check_depths()
        if self.autoencoder is None:
            self._check_own()
        else:
            self._take_over()
        super().__post_init__(**kwargs)

    def _check_depths(self) -> None:
        most = self.num_codebooks
        for count in self.decoder_depths or ():
            if not isinstance(count, int) or not 1 <= count <= most:
                raise ConfigError(f"decoder_depths={self.decoder_depths} is not legal: 1 to {most} each.")

    def _check_own(self) -> None:
        for key in ("sampling_rate", "n_fft", "hop_length", "hidden_size", "intermediate_size", "num_layers"):
            check_number(key, getattr(self, key), least=1)
        check_number("feature_exponent", self.feature_exponent, least=0, kind=float)
        hop, window = self.hop_length, self.n_fft
        if window is not None and (window % 2 or (window - hop) % 2 or window < 2 * hop):
            raise ConfigError(
                f"n_fft={window}, hop_length={hop} are not legal: both must be even, and a window at least two hops "
                "long, or overlap-add leaves gaps."
            )

    def _take_over(self) -> None:
        """Fill in what the wrapped codec decides; refuse what contradicts it."""
        inner = self.inner_config()
        if inner.facts.frame_multiple > 1:
            raise ConfigError(
                f"autoencoder={inner.model_type} has codes at several rates: one latent a frame is needed to quantize."
            )
        self.autoencoder = {"model_type": inner.model_type, **{k: getattr(inner, k) for k in sorted(inner.own_keys())}}
        defaults = {f.name: f.default for f in dataclasses.fields(type(self))}
        decided = {"sampling_rate": inner.facts.sampling_rate, "hop_length": inner.facts.hop_length}
        for key in (*decided, *OWN_KEYS):
            value = getattr(self, key)
            if value not in (None, defaults[key], decided.get(key)):
                raise ConfigError(
                    f"{key}={value!r} does not fit autoencoder={inner.model_type}, which decides it: leave it out."
                )
            setattr(self, key, decided.get(key))

    def inner_config(self) -> CodecConfig:
        """The config of the wrapped codec.

        Raises:
            ConfigError: none is wrapped, or no codec of this package is.
        """
        values = dict(self.autoencoder) if isinstance(self.autoencoder, dict) else {}
        config_class, _ = codec_classes(values.pop("model_type", None))
        return config_class(**values)

    @property
    def quantizer_block(self) -> QuantizerBlock:
        return QuantizerBlock.from_dict(self.quantizer or {})

    @property
    def num_codebooks(self) -> int:
        """Steps of the quantizer that there are weights for."""
        return self.quantizer_block.num_quantizers

    @property
    def num_hidden_layers(self) -> int | None:
        """Of the encoder, whose states `output_hidden_states=True` shows."""
        return self.num_layers

    @property
    def trunk(self) -> tuple[int, int, int]:
        """Hidden size, intermediate size and number of blocks of each of our two trunks."""
        assert self.hidden_size and self.intermediate_size and self.num_layers, "another codec's autoencoder is wrapped"
        return self.hidden_size, self.intermediate_size, self.num_layers

    @property
    def edge(self) -> int:
        """Samples that a frame's window reaches beyond the frame on each side."""
        return ((self.n_fft or 0) - self.hop_length) // 2

    @property
    def facts(self) -> CodecFacts:
        sizes = (self.quantizer_block.codebook_size,) * self.num_codes
        if self.autoencoder is not None:
            return dataclasses.replace(
                self.inner_config().facts,
                codebook_sizes=sizes,
                codebook_strides=(1,) * len(sizes),
                shared_codebook=False,
                variable_depth=False,
            )
        reach = (1 + (self.num_layers or 0)) * KERNEL_REACH * self.hop_length + self.edge
        return CodecFacts(
            sampling_rate=self.sampling_rate,
            output_sampling_rate=self.sampling_rate,
            channels=1,
            hop_length=self.hop_length,
            codebook_sizes=sizes,
            receptive_field_samples=reach,
            decoder_reach_samples=reach,
        )


def codec_classes(model_type: Any) -> tuple[type[CodecConfig], type[AudioCodec]]:
    """Config and model class of a codec of this package, by the model type in its config.

    Raises:
        ConfigError: there is no such codec.
    """
    package = f"audiotok.codecs.{str(model_type).removeprefix('audiotok_')}"
    if package.rpartition(".")[2].isidentifier() and importlib.util.find_spec(package) is not None:
        for value in vars(importlib.import_module(package)).values():
            if (
                isinstance(value, type)
                and issubclass(value, AudioCodec)
                and value.config_class.model_type == model_type
            ):
                return value.config_class, value
    raise ConfigError(
        f"autoencoder: model_type={model_type!r} is no codec of audiotok: give a codec's config, as in its config.json."
    )
