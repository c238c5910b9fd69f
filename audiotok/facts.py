"""What a language-model builder must know of a codec: its rates, sizes and reach, all computed from its config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class CodecFacts:
    """What a language-model builder must know of a codec; always computed from its config.

    Attributes:
        sampling_rate: rate of the waveform that `encode` takes, Hz.
        output_sampling_rate: rate of the waveform that `decode` returns, Hz.
        channels: 1 mono, 2 stereo.
        hop_length: input samples per frame (the finest one, for multi-rate codecs).
        codebook_sizes: entries of each stream of codes.
        shared_codebook: all streams index one book, so one id offset serves all.
        codebook_strides: frames per code of each stream; all 1 unless multi-rate.
        is_causal: a code depends on no later sample than its own frame's end.
        receptive_field_samples: how far from a frame's edges (each side) samples can change its code; None
            where unbounded.
        decoder_reach_samples: how far from a sample codes can change it on decoding; None where unbounded.
        variable_depth: frames may use fewer than all codebooks.
        tail_samples: what the last frame falls short of a whole hop on decoding, where windows end in its middle:
            F frames hold `F * hop_length - tail_samples` input samples.
    """

    sampling_rate: int
    output_sampling_rate: int
    channels: int
    hop_length: int
    codebook_sizes: tuple[int, ...]
    shared_codebook: bool = False
    codebook_strides: tuple[int, ...] = ()
    is_causal: bool = False
    receptive_field_samples: int | None = None
    decoder_reach_samples: int | None = None
    variable_depth: bool = False
    tail_samples: int = 0

    def __post_init__(self) -> None:
        if not self.codebook_strides:
            object.__setattr__(self, "codebook_strides", (1,) * len(self.codebook_sizes))

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exact."""
        return Fraction(self.sampling_rate, self.hop_length)

    @property
    def frame_multiple(self) -> int:
        """Frames come in multiples of this: 1, or the coarsest stride of a multi-rate codec."""
        return math.lcm(*self.codebook_strides)

    def num_frames(self, num_samples: int) -> int:
        """Frames that hold `num_samples` samples at `sampling_rate`: enough to return every one of them."""
        if num_samples <= 0:
            return 0
        block = self.hop_length * self.frame_multiple
        return -(-(num_samples + self.tail_samples) // block) * self.frame_multiple

    def held_samples(self, num_frames: int) -> int:
        """Samples at `sampling_rate` that `num_frames` frames stand for."""
        return max(0, num_frames * self.hop_length - self.tail_samples)

    def num_samples(self, num_frames: int) -> int:
        """Samples at `output_sampling_rate` that `num_frames` frames decode to, before trimming."""
        return self.held_samples(num_frames) * self.output_sampling_rate // self.sampling_rate

    def output_length(self, num_samples: int) -> int:
        """Length after decoding of a clip of `num_samples` input samples (equal rates: the same)."""
        return -(-num_samples * self.output_sampling_rate // self.sampling_rate)

    def bits_per_second(self) -> float:
        """log2 of the number of code choices per second, all codebooks in use."""
        per_frame = sum(math.log2(k) / s for k, s in zip(self.codebook_sizes, self.codebook_strides, strict=True))
        return float(self.frame_rate) * per_frame

    def ids_per_second(self, layout: str | None = None) -> Fraction:
        """Ids per second of audio in `layout`; a 2-D layout (parallel, delay) spends one position a frame."""
        if layout in ("parallel", "delay"):
            return self.frame_rate
        return self.frame_rate * sum(Fraction(1, s) for s in self.codebook_strides)
