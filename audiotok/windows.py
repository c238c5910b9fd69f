"""Long recordings in bounded memory: encode and decode window by window.

Frames of a window's core are kept, frames of its context on both sides only inform them:

    clip     |--------------------------------------------------|
    window 0 [ core ....... )context|
    window 1          |context[ core ....... )context|
    window 2                           |context[ core ..........|

Where the receptive field is finite and the context covers it, the codes are those of the whole clip, up to
rounding: a window has another shape than the clip, so another kernel may compute it, and a near-tie may flip. Unlike
batches (`audiotok.certified`), windows are not compared with the clip as a whole, which would need its memory; so
another `chunk_length_s` can flip such a code. Where a codec attends over the whole clip, codes differ for good
(`AudioCodec.window_flips` says how many), and the caller must ask for windows by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from audiotok.errors import OptionError

if TYPE_CHECKING:
    from audiotok.codec import AudioCodec, CodecOutput
    from audiotok.facts import CodecFacts

# Cores of windows that are chosen for memory's sake alone.
DEFAULT_WINDOW_S = 30.0


@dataclass(frozen=True)
class Windowing:
    """Frames of a core, and of the context on each side."""

    core: int
    context: int

    @classmethod
    def from_seconds(cls, facts: CodecFacts, chunk_length_s: float, context_s: float, reach: int | None) -> Windowing:
        """Whole frames for both; a finite reach must be covered by the context."""
        numbers = all(isinstance(value, (int, float)) for value in (chunk_length_s, context_s))
        if not (numbers and 0 < chunk_length_s < float("inf") and 0 <= context_s < float("inf")):
            raise OptionError(
                f"chunk_length_s={chunk_length_s}, context_s={context_s}: give a positive length and a context of 0 "
                "or more seconds."
            )
        multiple = facts.frame_multiple
        core = max(1, round(chunk_length_s * float(facts.frame_rate) / multiple)) * multiple
        context = -(-round(context_s * facts.sampling_rate) // (facts.hop_length * multiple)) * multiple
        if reach is not None:
            context = max(context, reach_frames(facts, reach))
        return cls(core, context)


@dataclass(frozen=True)
class WindowFlips:
    """What windows do to the codes of a codec that attends over the whole clip, as measured once; no bound.

    Attributes:
        chunk_length_s, context_s: the windows.
        share: of the codes that differ from those of the whole clip.
        measured: on what, and with which weights, in words.
    """

    chunk_length_s: float
    context_s: float
    share: float
    measured: str


def reach_frames(facts: CodecFacts, reach: int) -> int:
    """Frames that cover `reach` samples, in whole multiples."""
    block = facts.hop_length * facts.frame_multiple
    return -(-reach // block) * facts.frame_multiple


def encode_windows(
    codec: AudioCodec,
    read: Callable[[int], np.ndarray],
    windowing: Windowing,
    encode: Callable[[Tensor, Tensor], CodecOutput],
) -> Iterator[CodecOutput]:
    """Encode a clip that is read bit by bit; yields the cores' codes, `[1, Q, frames]` each, in order.

    Args:
        read: `read(n)` gives the next `[channels, <= n]` samples at the codec's rate, fewer only at the end.
        encode: `(input_values [1, C, N], padding_mask [1, N])` → codes of that stretch.
    """
    hop = codec.facts.hop_length
    core, context = windowing.core * hop, windowing.context * hop
    held = read(core + context)
    before = 0  # samples of left context at the start of `held`
    while True:
        at_end = held.shape[1] < before + core + context
        if not at_end:  # one sample more tells a clip that ends here from one that goes on
            extra = read(1)
            at_end = extra.shape[1] == 0
            held = np.concatenate([held, extra], axis=1)
        # A short rest is encoded with this core: it would lack its own context on the left otherwise.
        if at_end:
            window = torch.from_numpy(held)[None]
            output = encode(window, torch.ones(1, window.shape[-1], dtype=torch.long))
            yield _cut(output, codec.facts, before // hop, None)
            return
        window = torch.from_numpy(held[:, : before + core + context])[None]
        output = encode(window, torch.ones(1, window.shape[-1], dtype=torch.long))
        yield _cut(output, codec.facts, before // hop, (before + core) // hop)
        start = max(0, before + core - context)
        held, before = held[:, start:], before + core - start
        held = np.concatenate([held, read(before + core + context - held.shape[1])], axis=1)


def _cut(output: CodecOutput, facts: CodecFacts, start: int, stop: int | None) -> CodecOutput:
    """Frames start to stop (finest rate) of one clip's codes."""

    def cut(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, list):
            strides = facts.codebook_strides
            return [
                v[..., start // s : None if stop is None else stop // s] for v, s in zip(value, strides, strict=True)
            ]
        return value[..., start:stop]

    return replace(
        output,
        audio_codes=cut(output.audio_codes),
        audio_codes_mask=cut(output.audio_codes_mask),
        margins=cut(output.margins),
        importance=cut(output.importance),
        audio_lengths=None,  # those of the window
    )


def decode_windows(
    facts: CodecFacts,
    num_frames: int,
    windowing: Windowing,
    decode: Callable[[int, int], Tensor],
) -> Iterator[Tensor]:
    """Decode frames window by window; yields the cores' samples `[C, samples]` in order.

    Args:
        decode: `(start, stop)` → samples `[C, facts.num_samples(stop - start)]` of these frames.
    """

    def position(frames: int) -> int:
        """Where a frame begins in a piece; only a clip's last frame falls short of a hop."""
        return frames * facts.hop_length * facts.output_sampling_rate // facts.sampling_rate

    for start in range(0, num_frames, windowing.core):
        stop = min(start + windowing.core, num_frames)
        first = max(0, start - windowing.context)
        last = min(num_frames, stop + windowing.context)
        audio = decode(first, last)
        yield audio[:, position(start - first) : None if stop == num_frames else position(stop - first)]
