"""What several laws need: streams of codes, padded batches, arithmetic in double precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from audiotok.codec import AudioCodec, CodecOutput
from audiotok.errors import AudioTokError
from audiotok.facts import CodecFacts


def streams(value: Any) -> list[Tensor]:
    """One `[B, T_q]` a codebook, of codes, masks or margins in either form."""
    return value if isinstance(value, list) else list(value.unbind(1))


def true_codes(output: CodecOutput, facts: CodecFacts, row: int) -> list[list[int | None]]:
    """The codes of one clip without its padding; None where a frame has no code of a codebook."""
    frames = facts.num_frames(int(output.audio_lengths[row]))
    found = []
    for codes, mask, stride in zip(
        streams(output.audio_codes), streams(output.audio_codes_mask), facts.codebook_strides, strict=True
    ):
        pairs = zip(codes[row, : frames // stride].tolist(), mask[row, : frames // stride].tolist(), strict=True)
        found.append([code if is_code else None for code, is_code in pairs])
    return found


def padded(clips: Sequence[np.ndarray], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Clips `[C, N_i]` as `[B, C, N]` with zeros behind their ends, `extra` samples more than the longest has, and
    the mask `[B, N]`."""
    total = max(clip.shape[1] for clip in clips) + extra
    values = torch.stack([torch.from_numpy(np.pad(clip, [(0, 0), (0, total - clip.shape[1])])) for clip in clips])
    mask = torch.stack([(torch.arange(total) < clip.shape[1]).long() for clip in clips])
    return values, mask


def alone(clip: np.ndarray) -> tuple[Tensor, Tensor]:
    return padded([clip])


@contextmanager
def double_precision(codec: AudioCodec) -> Iterator[AudioCodec]:
    """All arithmetic of this codec in float64, also where it asks for float32 by name.

    Rounding is then a billion times smaller than any leak, so "equal up to rounding" becomes a sharp test. The codec
    stays in float64: give one that no other test uses.
    """
    default = torch.get_default_dtype()
    for module in codec.double().modules():
        for name, value in vars(module).items():
            if isinstance(value, np.ndarray):
                setattr(module, name, value.astype(np.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield codec
        finally:
            torch.set_default_dtype(default)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest value."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


@contextmanager
def refused(error: type[AudioTokError], *words: object) -> Iterator[None]:
    """What is inside must raise exactly this error, with a sentence that holds all these words."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"
    assert message.endswith((".", "?")), message
