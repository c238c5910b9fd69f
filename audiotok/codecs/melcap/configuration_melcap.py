"""Configuration of MelCap (Li et al., arXiv 2510.01903): one codebook on a grid of mel rows and time columns."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from audiotok.codec import CodecConfig
from audiotok.errors import ConfigError, check_choice, check_flag, check_number
from audiotok.facts import CodecFacts

# Mel bins of a row, and mel frames of a column: a patch of 2 x 2, then two halvings.
PATCH = 2
NUM_HALVINGS = 2
GRID_STEP = PATCH << NUM_HALVINGS

ACTIVATIONS = ("silu", "tanh")
FRONT_END_PADDINGS = ("center", "none")
HEAD_PADDINGS = ("center", "same")


@strict
class MelCapConfig(CodecConfig):
    """The whole codec; the defaults are the released model `jingyi49/MelCap`.

    Args:
        sampling_rate: Hz.
        n_fft: samples of the Hann window, of the front end and of the head.
        mel_hop_length: samples between mel frames; eight frames make a column of codes.
        num_mel_bins: a multiple of 8; eight bins make a row of codes.
        front_end_padding: "center" reflects half a window at both ends; "none" starts with the first whole window.
        hidden_act: "silu" or "tanh", of the two-dimensional encoder and decoder.
        base_channels: after the encoder's first convolution.
        channel_multipliers: channels of each of the two or three levels, over `base_channels`.
        num_res_blocks: of an encoder level; a decoder level has one more.
        attention_levels: levels with attention after each block (the middle always has one).
        num_norm_groups: of every group norm; all channel counts are multiples of it.
        bottleneck_channels: what the encoder ends in, and the decoder begins with.
        codebook_size: entries. codebook_dim: of its rows.
        normalize_latents: latents and rows of unit length, compared by angle (the released model does not). Moving
            averages can then train the book.
        vocoder_hidden_size, vocoder_intermediate_size, vocoder_num_layers: of the ConvNeXt blocks.
        head_padding: "center" cuts half a window from both ends, so W columns give 8 W - 1 hops of samples; "same"
            gives 8 W hops.
    """

    model_type = "audiotok_melcap"
    training_keys: ClassVar[tuple[str, ...]] = ()

    sampling_rate: int = 44100
    n_fft: int = 1024
    mel_hop_length: int = 256
    num_mel_bins: int = 96
    front_end_padding: str = "center"
    hidden_act: str = "silu"
    base_channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: list[int] | tuple[int, ...] = (2,)
    num_norm_groups: int = 32
    bottleneck_channels: int = 256
    codebook_size: int = 8192
    codebook_dim: int = 64
    normalize_latents: bool = False
    vocoder_hidden_size: int = 512
    vocoder_intermediate_size: int = 1536
    vocoder_num_layers: int = 8
    head_padding: str = "center"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_values()
        self.channel_multipliers = list(self.channel_multipliers)
        self.attention_levels = list(self.attention_levels)

    def _check_values(self) -> None:
        for key in (
            "sampling_rate n_fft mel_hop_length num_mel_bins base_channels num_res_blocks num_norm_groups "
            "bottleneck_channels codebook_size codebook_dim vocoder_hidden_size vocoder_intermediate_size "
            "vocoder_num_layers"
        ).split():
            check_number(key, getattr(self, key), least=1)
        check_flag("normalize_latents", self.normalize_latents)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        check_choice("front_end_padding", self.front_end_padding, FRONT_END_PADDINGS)
        check_choice("head_padding", self.head_padding, HEAD_PADDINGS)
        self._check_spectrum()
        self._check_levels()

    def _check_spectrum(self) -> None:
        if self.n_fft % 2 or self.mel_hop_length % 2 or 2 * self.mel_hop_length > self.n_fft:
            raise ConfigError(
                f"n_fft={self.n_fft}, mel_hop_length={self.mel_hop_length}: both must be even, and the hop at most "
                "half a window."
            )
        if self.num_mel_bins % GRID_STEP:
            raise ConfigError(f"num_mel_bins={self.num_mel_bins} is not legal: give a multiple of {GRID_STEP}.")

    def _check_levels(self) -> None:
        levels = self.channel_multipliers
        for key, values in (("channel_multipliers", levels), ("attention_levels", self.attention_levels)):
            if not isinstance(values, (list, tuple)):
                raise ConfigError(f"{key}={values!r} is not legal: give a list of whole numbers.")
        if len(levels) not in (NUM_HALVINGS, NUM_HALVINGS + 1):
            raise ConfigError(f"channel_multipliers={list(levels)} is not legal: give two or three, one a level.")
        for multiplier in levels:
            check_number("channel_multipliers", multiplier, least=1)
        for level in self.attention_levels:
            if not isinstance(level, int) or not 0 <= level < len(levels):
                raise ConfigError(
                    f"attention_levels={list(self.attention_levels)} is not legal: the levels are 0 to "
                    f"{len(levels) - 1}."
                )
        for channels in {self.base_channels, *(self.base_channels * m for m in levels)}:
            if channels % self.num_norm_groups:
                raise ConfigError(
                    f"base_channels={self.base_channels}, channel_multipliers={list(levels)}: {channels} channels "
                    f"make no {self.num_norm_groups} groups (num_norm_groups) of equal size."
                )

    @property
    def level_channels(self) -> list[int]:
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def num_rows(self) -> int:
        """Codes of a column."""
        return self.num_mel_bins // GRID_STEP

    @property
    def hop_length(self) -> int:
        """Samples of a column."""
        return GRID_STEP * self.mel_hop_length

    @property
    def hidden_size(self) -> int:
        """Dimensions of a column of latents: its rows one behind the other."""
        return self.num_rows * self.codebook_dim

    @property
    def num_hidden_layers(self) -> int:
        """What `output_hidden_states=True` shows but for the latents: what the encoder ends in."""
        return 1

    @property
    def shortest_clip(self) -> int:
        """Samples of the shortest clip that the published code encodes, to one column."""
        hops = (GRID_STEP - 2) * self.mel_hop_length
        if self.front_end_padding == "none":
            return self.n_fft + hops
        return max(hops, self.n_fft // 2 + 1)  # more samples than are reflected

    def num_columns(self, num_samples: int) -> int:
        """Columns that the published code makes of a clip, by the rounding of its strided layers."""
        first_window = self.n_fft if self.front_end_padding == "none" else 0
        frames = 1 + (num_samples - first_window) // self.mel_hop_length
        return (frames + 1) // GRID_STEP

    def filled_length(self, num_columns: int) -> int:
        """Samples from which the published code makes `num_columns` columns, no fewer than these decode to."""
        if self.front_end_padding == "none":  # eight whole windows a column
            return num_columns * self.hop_length + self.n_fft - self.mel_hop_length
        return self.facts.held_samples(num_columns)

    @property
    def facts(self) -> CodecFacts:
        return CodecFacts(
            sampling_rate=self.sampling_rate,
            output_sampling_rate=self.sampling_rate,
            channels=1,
            hop_length=self.hop_length,
            codebook_sizes=(self.codebook_size,) * self.num_rows,
            shared_codebook=True,
            # A centred inverse transform ends in the middle of the last window.
            tail_samples=self.mel_hop_length if self.head_padding == "center" else 0,
        )
