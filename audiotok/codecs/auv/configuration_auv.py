"""Configuration of AUV (Chen et al., arXiv 2509.21968): one nested codebook for speech, vocal, music and sound."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from audiotok.codec import CodecConfig
from audiotok.errors import ConfigError, check_choice, check_flag, check_number, did_you_mean
from audiotok.facts import CodecFacts

# Half-open code ranges of the released model. Nested: speech in vocal in music = audio; `other` is vocal's complement.
RELEASED_DOMAIN_RANGES: dict[str, list[int]] = {
    "speech": [0, 8192],
    "vocal": [0, 12288],
    "music": [0, 20480],
    "audio": [0, 20480],
    "other": [12288, 20480],
}
INPUT_FEATURES = ("log_magnitude", "phase", "subframe_mel")
BLOCK_TYPES = ("conformer", "convnext")


@dataclass(frozen=True)
class AuvStack:
    """One of AUV's two stacks of blocks, as `encoder_config` and `decoder_config` describe it.

    Attributes:
        num_layers: blocks.
        block_type: "conformer" (the released model) or "convnext" (finite receptive field).
        ffn_mult: width of the feed-forward layers over the hidden size.
        num_attention_heads: None for hidden_size // head_dim; heads * head_dim need not equal the hidden size.
        head_dim: channels a head.
        qk_norm: normalise queries and keys, scale by `qk_norm_scale` in place of 1 / sqrt(head_dim).
        conv_kernel_size: frames of the depthwise convolution; odd unless causal.
        causal_conv: the depthwise convolution looks back only. The attention stays bidirectional, so this does
            not make the model causal.
    """

    num_layers: int
    block_type: str = "conformer"
    ffn_mult: int = 4
    num_attention_heads: int | None = None
    head_dim: int = 64
    qk_norm: bool = False
    qk_norm_scale: float = 10.0
    conv_kernel_size: int = 31
    causal_conv: bool = False

    @classmethod
    def from_dict(cls, name: str, given: dict[str, Any]) -> AuvStack:
        """Check the keys and values of the config block called `name`."""
        if not isinstance(given, dict):
            raise ConfigError(f"{name}={given!r} is not legal: give a block of keys.")
        legal = [f.name for f in fields(cls)]
        for key in given:
            if key not in legal:
                raise ConfigError(
                    f'{name} knows no key "{key}".{did_you_mean(key, legal)} Legal keys: {", ".join(legal)}.'
                )
        stack = cls(**given)
        check_choice(f"{name}: block_type", stack.block_type, BLOCK_TYPES)
        for key in ("num_layers", "ffn_mult", "head_dim", "conv_kernel_size"):
            check_number(f"{name}: {key}", getattr(stack, key), least=1)
        if stack.num_attention_heads is not None:
            check_number(f"{name}: num_attention_heads", stack.num_attention_heads, least=1)
        check_number(f"{name}: qk_norm_scale", stack.qk_norm_scale, least=0, kind=float)
        for key in ("qk_norm", "causal_conv"):
            check_flag(f"{name}: {key}", getattr(stack, key))
        if stack.head_dim % 2:
            raise ConfigError(f"{name}: head_dim={stack.head_dim} is odd: rotary positions turn pairs of channels.")
        if stack.conv_kernel_size % 2 == 0 and not stack.causal_conv:
            raise ConfigError(
                f"{name}: conv_kernel_size={stack.conv_kernel_size} is even: choose an odd number of frames, "
                "or causal_conv=true."
            )
        if stack.causal_conv and stack.block_type == "convnext":
            raise ConfigError(f"{name}: causal_conv=true is known to conformer blocks only, not to convnext.")
        return stack


@strict
class AuvConfig(CodecConfig):
    """The whole codec; the defaults are the released model `SWivid/AUV`.

    Args:
        sampling_rate: Hz.
        hop_length: samples a frame, even; windows are four hops long.
        hidden_size: channels C of both stacks.
        input_features: what the encoder sees of each frame, of "log_magnitude", "phase" (both from the four-hop
            window) and "subframe_mel" (4 x 64 log-mels of one-hop windows: time resolution inside the frame).
        standardize_features: shift and scale the features to about unit variance (the released model does not).
        encoder_config, decoder_config: keys of `AuvStack`; 8 and 12 conformer layers by default.
        codebook_size: entries; a list for one codebook a residual stage.
        codebook_dim: dimensions of the rows; no projections if equal to `hidden_size`.
        normalize_latents: latents lie on the unit sphere before the straight-through step.
        commitment_cost: weight of the commitment term in the quantizer loss.
        domain_ranges: domain -> half-open range of codes that its clips may use; "all" is always there.
        distill_depth: index of the decoder state for distillation into [input of layer 0, ..., input of the last
            layer, final output].
    """

    model_type = "audiotok_auv"
    training_keys: ClassVar[tuple[str, ...]] = ("commitment_cost", "distill_depth")

    sampling_rate: int = 16000
    hop_length: int = 320
    hidden_size: int = 512
    input_features: list[str] | tuple[str, ...] = ("log_magnitude", "phase")
    standardize_features: bool = False
    encoder_config: dict | None = None
    decoder_config: dict | None = None
    codebook_size: int | list[int] | tuple[int, ...] = 20480
    codebook_dim: int = 8
    normalize_latents: bool = False
    commitment_cost: float = 0.25
    domain_ranges: dict[str, list[int] | tuple[int, int]] | None = field(
        default_factory=lambda: {name: list(span) for name, span in RELEASED_DOMAIN_RANGES.items()}
    )
    distill_depth: int = -1

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_values()
        self.encoder_config = asdict(self._stack("encoder_config", num_layers=8))
        self.decoder_config = asdict(self._stack("decoder_config", num_layers=12))
        self.input_features = list(self.input_features)
        self.domain_ranges = {name: list(span) for name, span in (self.domain_ranges or {}).items()}
        super().__post_init__(**kwargs)
        self._check_ranges()
        if not -self.num_states <= self.distill_depth < self.num_states:
            raise ConfigError(
                f"distill_depth={self.distill_depth} is not legal: the decoder has {self.num_states} states, so choose "
                f"{-self.num_states} to {self.num_states - 1}."
            )

    def _stack(self, name: str, **defaults: Any) -> AuvStack:
        """Written out in full, so that config.json says what the model is whatever the defaults become."""
        given = getattr(self, name)
        return AuvStack.from_dict(name, {**defaults, **given} if isinstance(given, dict) else given or defaults)

    def _check_values(self) -> None:
        for key in ("sampling_rate", "hop_length", "hidden_size", "codebook_dim"):
            check_number(key, getattr(self, key), least=1)
        check_number("commitment_cost", self.commitment_cost, least=0, kind=float)
        for key in ("standardize_features", "normalize_latents"):
            check_flag(key, getattr(self, key))
        sizes = self.codebook_size if isinstance(self.codebook_size, (list, tuple)) else [self.codebook_size]
        if not sizes:
            raise ConfigError("codebook_size=[] is not legal: give one size, or a list of one a stage.")
        for size in sizes:
            check_number("codebook_size", size, least=1)
        features = list(self.input_features)
        for name in features:
            check_choice("input_features", name, INPUT_FEATURES)
        if not features or len(set(features)) < len(features):
            raise ConfigError(f"input_features={features} is not legal: name each of some of {INPUT_FEATURES} once.")
        if self.hop_length % 2 or (self.hop_length % 4 and "subframe_mel" in features):
            raise ConfigError(f"hop_length={self.hop_length}: must be even, and divisible by 4 for subframe_mel.")
        if self.domain_ranges is not None and not isinstance(self.domain_ranges, dict):
            raise ConfigError(f"domain_ranges={self.domain_ranges!r} is not legal: give domain names and their ranges.")

    def _check_ranges(self) -> None:
        for name, span in (self.domain_ranges or {}).items():
            legal = len(span) == 2 and all(isinstance(edge, int) for edge in span)
            if name == "all" or not legal or not 0 <= span[0] < span[1] or span[0] >= min(self.codebook_sizes):
                raise ConfigError(
                    f"domain_ranges[{name!r}] = {list(span)}: a range is two whole numbers, non-empty and starting "
                    f'inside every codebook (sizes {self.codebook_sizes}); "all" is added by itself and must not be '
                    "given."
                )

    @property
    def num_states(self) -> int:
        """Decoder states that `distill_depth` may name."""
        return self.decoder_stack.num_layers + 1

    @property
    def encoder_stack(self) -> AuvStack:
        return AuvStack.from_dict("encoder_config", self.encoder_config or {})

    @property
    def decoder_stack(self) -> AuvStack:
        return AuvStack.from_dict("decoder_config", self.decoder_config or {})

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.codebook_size,) if isinstance(self.codebook_size, int) else tuple(self.codebook_size)

    @property
    def num_hidden_layers(self) -> int:
        """Of the encoder, whose states `output_hidden_states=True` shows."""
        return self.encoder_stack.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.encoder_stack.num_attention_heads or max(1, self.hidden_size // self.encoder_stack.head_dim)

    @property
    def n_fft(self) -> int:
        return 4 * self.hop_length

    @property
    def edge(self) -> int:
        """Samples that a frame's window reaches beyond the frame on each side, and that are reflected at the ends."""
        return (self.n_fft - self.hop_length) // 2

    @property
    def facts(self) -> CodecFacts:
        return CodecFacts(
            sampling_rate=self.sampling_rate,
            output_sampling_rate=self.sampling_rate,
            channels=1,
            hop_length=self.hop_length,
            codebook_sizes=self.codebook_sizes,
            receptive_field_samples=_reach(self.encoder_stack, self),
            decoder_reach_samples=_reach(self.decoder_stack, self),
        )


def _reach(stack: AuvStack, config: AuvConfig) -> int | None:
    """Samples on each side of a frame that can change it; None for attention over the whole clip."""
    if stack.block_type == "conformer":
        return None
    frames = stack.num_layers * (stack.conv_kernel_size - 1) // 2
    return frames * config.hop_length + config.edge
