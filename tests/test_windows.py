"""How windows are cut: cores tile the clip, contexts are whole, nothing is read twice or too early."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audiotok.codec import CodecOutput
from audiotok.errors import OptionError
from audiotok.facts import CodecFacts
from audiotok.windows import Windowing, decode_windows, encode_windows, reach_frames

MONO = CodecFacts(sampling_rate=1000, output_sampling_rate=1000, channels=1, hop_length=10, codebook_sizes=(1 << 20,))
TWO_RATES = replace(MONO, codebook_sizes=(1 << 20, 1 << 20), codebook_strides=(4, 1))
FASTER_OUT = replace(MONO, output_sampling_rate=3000)


# From seconds to frames


@pytest.mark.parametrize(
    "facts, chunk, context, reach, expected",
    [
        (MONO, 1.0, 0.0, None, Windowing(100, 0)),
        (MONO, 1.0, 0.5, None, Windowing(100, 50)),
        (MONO, 1.0, 0.501, None, Windowing(100, 51)),
        (MONO, 0.001, 0.0, None, Windowing(1, 0)),
        (MONO, 1.0, 0.0, 1, Windowing(100, 1)),
        (MONO, 1.0, 0.0, 10, Windowing(100, 1)),
        (MONO, 1.0, 0.0, 11, Windowing(100, 2)),
        (MONO, 1.0, 0.2, 11, Windowing(100, 20)),
        (TWO_RATES, 0.05, 0.0, None, Windowing(4, 0)),
        (TWO_RATES, 1.0, 0.05, None, Windowing(100, 8)),
        (TWO_RATES, 1.0, 0.0, 41, Windowing(100, 8)),
    ],
)
def test_seconds_become_whole_frames(
    facts: CodecFacts, chunk: float, context: float, reach: int | None, expected: Windowing
) -> None:
    assert Windowing.from_seconds(facts, chunk, context, reach) == expected


@pytest.mark.parametrize("chunk, context", [(0, 0), (-1, 0), (float("nan"), 0), (float("inf"), 0), (1, -1), ("a", 0)])
def test_illegal_seconds(chunk: float, context: float) -> None:
    with pytest.raises(OptionError, match=f"chunk_length_s={chunk}, context_s={context}.*positive"):
        Windowing.from_seconds(MONO, chunk, context, None)


def test_reach_in_frames() -> None:
    assert [reach_frames(MONO, n) for n in (0, 1, 10, 11)] == [0, 1, 1, 2]
    assert [reach_frames(TWO_RATES, n) for n in (0, 1, 40, 41)] == [0, 4, 4, 8]


# Encoding: a codec that says, for each frame, which sample it begins with. The samples of a clip count up from 1.


class Recorder:
    """A clip that counts, read bit by bit, and a codec that remembers what it was given."""

    def __init__(self, facts: CodecFacts, num_samples: int) -> None:
        self.codec = SimpleNamespace(facts=facts)
        self.samples = np.arange(1, num_samples + 1, dtype=np.float64)[None].repeat(facts.channels, axis=0)
        self.position = 0
        self.windows: list[tuple[int, int]] = []  # first sample and the one behind the last

    def read(self, count: int) -> np.ndarray:
        piece = self.samples[:, self.position : self.position + count]
        self.position += piece.shape[1]
        return piece

    def encode(self, values: Tensor, mask: Tensor) -> CodecOutput:
        assert mask.all()
        assert mask.shape == (1, values.shape[-1])
        facts = self.codec.facts
        self.windows.append((int(values[0, 0, 0]) - 1, int(values[0, 0, -1])))
        frames = facts.num_frames(values.shape[-1])
        firsts = torch.nn.functional.pad(values[0, 0], (0, frames * facts.hop_length))[:: facts.hop_length]
        streams = [firsts[:frames][::stride][None].long() for stride in facts.codebook_strides]
        if facts.frame_multiple > 1:
            return CodecOutput(audio_codes=streams, audio_codes_mask=[s > 0 for s in streams])
        codes = torch.stack(streams, dim=1)
        return CodecOutput(audio_codes=codes, audio_codes_mask=codes > 0, margins=codes.float())

    def run(self, windowing: Windowing) -> list[CodecOutput]:
        return list(encode_windows(self.codec, self.read, windowing, self.encode))


def finest(output: CodecOutput) -> Tensor:
    return output.audio_codes[-1][0] if isinstance(output.audio_codes, list) else output.audio_codes[0, -1]


@settings(max_examples=100)
@given(st.sampled_from([MONO, TWO_RATES]), st.integers(1, 600), st.integers(1, 12), st.integers(0, 12))
def test_cores_tile_the_clip(facts: CodecFacts, num_samples: int, core: int, context: int) -> None:
    multiple, hop = facts.frame_multiple, facts.hop_length
    windowing = Windowing(core * multiple, context * multiple)
    clip = Recorder(facts, num_samples)
    outputs = clip.run(windowing)
    frames = facts.num_frames(num_samples)
    firsts = torch.cat([finest(output) for output in outputs])
    held = -(-num_samples // hop)
    assert firsts[:held].tolist() == [frame * hop + 1 for frame in range(held)]
    assert len(firsts) == frames
    # Every window but the last has its core, and whole contexts wherever the clip has as much.
    start = 0
    for (first, last), output in zip(clip.windows, outputs, strict=True):
        assert first == max(0, start - windowing.context) * hop
        stop = start + len(finest(output))
        assert last == min(num_samples, (stop + windowing.context) * hop)
        assert last - first <= (windowing.core + 2 * windowing.context) * hop
        assert stop == frames or stop - start == windowing.core
        start = stop
    assert clip.position == num_samples


def test_multirate_streams_are_cut_alike() -> None:
    outputs = Recorder(TWO_RATES, 400).run(Windowing(8, 4))
    coarse = torch.cat([output.audio_codes[0][0] for output in outputs])
    assert coarse.tolist() == [40 * i + 1 for i in range(10)]
    assert [output.audio_codes_mask[0].shape[1] for output in outputs] == [
        output.audio_codes[0].shape[1] for output in outputs
    ]


def test_margins_are_cut_with_the_codes() -> None:
    for output in Recorder(MONO, 333).run(Windowing(8, 2)):
        assert torch.equal(output.margins, output.audio_codes.float())


def test_no_more_is_read_than_a_window_needs() -> None:
    """One sample more tells a clip that ends with a window from one that goes on."""
    clip = Recorder(MONO, 10_000)
    windowing = Windowing(5, 3)
    for number, _ in enumerate(encode_windows(clip.codec, clip.read, windowing, clip.encode)):
        if number < 100:
            assert clip.position <= (5 * (number + 1) + 3) * 10 + 1


# Decoding


@given(
    st.sampled_from([MONO, TWO_RATES, FASTER_OUT]),
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(0, 12),
)
def test_decoded_cores_tile_the_clip(facts: CodecFacts, frames: int, core: int, context: int) -> None:
    multiple = facts.frame_multiple
    frames, windowing = frames * multiple, Windowing(core * multiple, context * multiple)
    asked: list[tuple[int, int]] = []

    def decode(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.arange(facts.num_samples(start), facts.num_samples(stop))[None]

    pieces = list(decode_windows(facts, frames, windowing, decode))
    samples = torch.cat([piece[0] for piece in pieces]) if pieces else torch.zeros(0).long()
    assert samples.tolist() == list(range(facts.num_samples(frames)))
    for number, (start, stop) in enumerate(asked):
        first = number * windowing.core
        assert start == max(0, first - windowing.context)
        assert stop == min(frames, first + windowing.core + windowing.context)
