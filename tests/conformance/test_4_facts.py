"""Law 4: what `facts` declares equals what `encode` and `decode` return, for every length."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audiotok.codec import AudioCodec, CodecOutput
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import FINITE, clip, double_codec, layouts_of
from conformance.helpers import alone, double_precision, streams


def assert_fits(codec: AudioCodec, output: CodecOutput, num_samples: int) -> None:
    """One clip's codes, masks and audio are as the facts say."""
    facts = codec.facts
    codes, masks = streams(output.audio_codes), streams(output.audio_codes_mask)
    frames = facts.num_frames(num_samples)
    assert frames * facts.hop_length >= num_samples
    assert [tuple(stream.shape) for stream in codes] == [(1, frames // stride) for stride in facts.codebook_strides]
    assert [mask.shape for mask in masks] == [stream.shape for stream in codes]
    assert isinstance(output.audio_codes, list) == (facts.frame_multiple > 1)
    for stream, mask, size in zip(codes, masks, facts.codebook_sizes, strict=True):
        assert stream.dtype == torch.int64
        assert mask.dtype == torch.bool
        assert 0 <= int(stream.min()) <= int(stream.max()) < size
        assert not stream[~mask].any()
        assert mask.all() or facts.variable_depth
    assert masks[0].all(), "every frame has a code of the first codebook"
    if facts.variable_depth:
        assert all((fine <= coarse).all() for coarse, fine in pairwise(masks))
    assert output.audio_lengths.tolist() == [num_samples]
    everything = codec.decode(CodecOutput(audio_codes=output.audio_codes, audio_codes_mask=output.audio_codes_mask))
    assert tuple(everything.shape) == (1, facts.channels, facts.num_samples(frames))
    assert tuple(codec.decode(output).shape) == (1, facts.channels, facts.output_length(num_samples))


def test_every_length_up_to_three_frames(codec: AudioCodec, facts: CodecFacts) -> None:
    block = facts.hop_length * facts.frame_multiple
    last = 3 * block + 2
    for num_samples in sorted({*range(1, last, 1 + last // 25), *around(block), last}):
        assert_fits(codec, codec.encode(*alone(clip(facts, num_samples))), num_samples)


def around(block: int) -> list[int]:
    return [multiple * block + more for multiple in (1, 2, 3) for more in (-1, 0, 1)]


@pytest.mark.slow
def test_every_single_length_up_to_three_frames(codec: AudioCodec, facts: CodecFacts) -> None:
    for num_samples in range(1, 3 * facts.hop_length * facts.frame_multiple + 3):
        assert_fits(codec, codec.encode(*alone(clip(facts, num_samples))), num_samples)


@settings(max_examples=6)
@given(st.floats(3, 120), st.integers(0, 2**32))
def test_any_length(codec: AudioCodec, facts: CodecFacts, hops: float, seed: int) -> None:
    num_samples = round(hops * facts.hop_length)
    assert_fits(codec, codec.encode(*alone(clip(facts, num_samples, seed))), num_samples)


def test_leading_codebooks_decode_alone(codec: AudioCodec, facts: CodecFacts) -> None:
    """Fewer codebooks than there are, the coarse ones, give audio of the same length."""
    wave = clip(facts, 9 * facts.frame_multiple * facts.hop_length - 3)
    codes = codec.encode(*alone(wave)).audio_codes
    heard = []
    for count in range(1, facts.num_codebooks + 1):
        leading = codes[:count] if isinstance(codes, list) else codes[:, :count]
        assert codec.decode(leading).shape[-1] == facts.num_samples(facts.num_frames(wave.shape[1]))
        heard.append(codec.decode(leading, lengths=[wave.shape[1]]))
        assert heard[-1].shape[-1] == facts.output_length(wave.shape[1])
    assert all(not torch.equal(one, other) for one, other in pairwise(heard)), "every codebook is heard"


def test_margins_have_the_shape_of_codes(codec: AudioCodec, facts: CodecFacts) -> None:
    output = codec.encode(*alone(clip(facts, 30 * facts.hop_length + 3)), return_margins=True)
    for codes, mask, margins in zip(
        streams(output.audio_codes), streams(output.audio_codes_mask), streams(output.margins), strict=True
    ):
        assert margins.shape == codes.shape
        assert margins.dtype == torch.float32
        assert (margins >= 0).all()
        assert margins[~mask].isposinf().all()
        assert margins[mask].isfinite().all()
    assert codec.encode(*alone(clip(facts, 99))).margins is None


def test_books_are_as_large_as_declared(codec: AudioCodec, facts: CodecFacts, tok: AudioTokenizer) -> None:
    books = codec.codebook_embeddings()
    assert tuple(len(book) for book in books) == facts.codebook_sizes
    assert facts.num_codebooks == len(facts.codebook_strides) == len(books)
    assert (len({book.data_ptr() for book in books}) == 1 < len(books)) == facts.shared_codebook
    assert tok.vocab_size == (facts.codebook_sizes[0] if facts.shared_codebook else sum(facts.codebook_sizes)) + 3
    assert tok.sampling_rate == tok.feature_extractor.sampling_rate == facts.sampling_rate


def test_rates_are_those_of_a_long_clip(tok: AudioTokenizer, facts: CodecFacts) -> None:
    """Ids and bits a second, counted over whole frames."""
    frames = 60 * facts.frame_multiple
    seconds = Fraction(frames * facts.hop_length, facts.sampling_rate)
    wave = clip(facts, facts.held_samples(frames))
    assert facts.frame_rate == frames / seconds
    codes = streams(tok.codec.encode(*alone(wave)).audio_codes)
    bits = sum(stream.numel() * math.log2(size) for stream, size in zip(codes, facts.codebook_sizes, strict=True))
    assert facts.bits_per_second() == pytest.approx(bits / float(seconds))
    for layout in layouts_of(facts):
        laid = tok.with_layout(layout)
        declared = facts.ids_per_second(layout)
        if not facts.variable_depth:
            counted = laid.layout.num_ids(2 * frames) - laid.layout.num_ids(frames)  # without a layout's tail
            assert declared == counted / seconds
        else:
            assert len(laid(wave, facts.sampling_rate).input_ids) <= declared * seconds


# How far samples and codes reach: what lies beyond changes nothing, not one bit.


@pytest.mark.parametrize("name", FINITE)
def test_samples_beyond_the_receptive_field_do_not_matter(name: str) -> None:
    with double_precision(double_codec(name)) as codec, torch.inference_mode():
        facts, hop = codec.facts, codec.facts.hop_length
        reach = facts.receptive_field_samples
        frame = facts.num_frames(reach) + facts.frame_multiple  # with more context than it needs on both sides
        wave = torch.from_numpy(clip(facts, (2 * frame + facts.frame_multiple) * hop)).double()[None]
        place = torch.arange(wave.shape[-1])
        within = (place >= frame * hop - reach) & (place < (frame + 1) * hop + reach)
        assert not within[0]
        assert not within[-1]
        latents = codec.latents(wave)[..., frame]
        assert torch.equal(codec.latents(wave.where(within, 1.0))[..., frame], latents)
        inside = wave.clone()
        inside[..., frame * hop + hop // 2] += 0.5
        assert not torch.equal(codec.latents(inside)[..., frame], latents)
        assert_codes_stay(codec, wave, within, frame)


def assert_codes_stay(codec: AudioCodec, wave: Tensor, within: Tensor, frame: int) -> None:
    """All codes that inform this frame, of every stride, lie within the receptive field too."""
    before, after = codec.encode(wave), codec.encode(wave.where(within, 1.0))
    strides = codec.facts.codebook_strides
    for stride, one, two in zip(strides, streams(before.audio_codes), streams(after.audio_codes), strict=True):
        assert torch.equal(one[..., frame // stride], two[..., frame // stride])


@pytest.mark.parametrize("name", FINITE)
def test_codes_beyond_the_decoders_reach_do_not_matter(name: str) -> None:
    with double_precision(double_codec(name)) as codec, torch.inference_mode():
        facts = codec.facts
        reach = facts.num_frames(facts.decoder_reach_samples)
        first = reach + facts.frame_multiple
        last = first + facts.frame_multiple
        wave = clip(facts, (last + first) * facts.hop_length)
        codes = streams(codec.encode(*alone(wave)).audio_codes)
        changed = []
        for stream, stride, size in zip(codes, facts.codebook_strides, facts.codebook_sizes, strict=True):
            start = torch.arange(stream.shape[1]) * stride
            beyond = (start + stride <= first - reach) | (start >= last + reach)
            changed.append(torch.where(beyond, (stream + 1) % size, stream))
        audio, other = codec.decode(_joined(codec, codes)), codec.decode(_joined(codec, changed))
        assert not torch.equal(audio, other)
        looked_at = slice(facts.num_samples(first), facts.num_samples(last))
        assert torch.equal(audio[..., looked_at], other[..., looked_at])


def _joined(codec: AudioCodec, codes: list[Tensor]) -> Tensor | list[Tensor]:
    return codes if codec.facts.frame_multiple > 1 else torch.stack(codes, dim=1)
