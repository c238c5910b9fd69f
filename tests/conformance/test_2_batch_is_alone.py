"""Law 2: what a clip becomes depends on nothing else in its batch, nor on padding, nor on the size of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotok.codec import AudioCodec, CodecOutput
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import OPTION_VALUES, clip, double_codec
from conformance.helpers import alone, double_precision, padded, relative_difference, streams, true_codes

# Of hops: from less than one to many, no multiples of one.
LENGTHS = st.lists(st.floats(0.01, 30), min_size=2, max_size=6)
RAGGED = [0.02, 17.3, 4, 29.9, 1.01]


def clips_of(facts: CodecFacts, hops: list[float], seed: int = 0) -> list[np.ndarray]:
    return [clip(facts, max(1, round(h * facts.hop_length)), seed + i) for i, h in enumerate(hops)]


@settings(max_examples=6)
@given(LENGTHS, st.integers(0, 100), st.integers(0, 2**32))
def test_codes_and_audio_are_those_of_the_clip_alone(
    codec: AudioCodec, facts: CodecFacts, hops: list[float], extra: int, seed: int
) -> None:
    clips = clips_of(facts, hops, seed)
    values, mask = padded(clips, extra)
    together, certificate = codec.encode_certified(values, mask)
    assert certificate.num_clips == len(clips)
    audio = codec.decode(together)
    for row, wave in enumerate(clips):
        single = codec.encode(*alone(wave))
        assert true_codes(together, facts, row) == true_codes(single, facts, 0)
        expected = codec.decode(single)[0]
        length = facts.output_length(wave.shape[1])
        torch.testing.assert_close(audio[row, :, :length], expected, rtol=0, atol=1e-5)
        assert not audio[row, :, length:].any(), "behind a clip's end there is silence"


def test_without_certification_only_near_ties_differ(codec: AudioCodec, facts: CodecFacts) -> None:
    """Rounding may move a code whose runner-up was as near; nothing else may."""
    for seed in range(5):
        clips = clips_of(facts, RAGGED, 10 * seed)
        together = codec.encode(*padded(clips), return_margins=True)
        for row, wave in enumerate(clips):
            if true_codes(together, facts, row) != true_codes(codec.encode(*alone(wave)), facts, 0):
                assert min(float(m[row].min()) for m in streams(together.margins)) < 1e-3


def test_nothing_leaks_in_double_precision(codec_name: str) -> None:
    with double_precision(double_codec(codec_name)) as codec, torch.inference_mode():
        facts = codec.facts
        clips = clips_of(facts, RAGGED)
        values, mask = padded(clips, extra=2 * facts.hop_length + 1)
        latents = codec.latents(values.double(), mask)
        together = codec.encode(values.double(), mask)
        audio = codec.decode(together)
        for row, wave in enumerate(clips):
            value, own_mask = alone(wave)
            frames = facts.num_frames(wave.shape[1])
            expected = codec.latents(value.double(), own_mask)[0, :, :frames]
            assert relative_difference(latents[row, :, :frames], expected) < 1e-9
            single = codec.encode(value.double(), own_mask)
            assert true_codes(together, facts, row) == true_codes(single, facts, 0)
            length = facts.output_length(wave.shape[1])
            assert relative_difference(audio[row, :, :length], codec.decode(single)[0]) < 1e-9


def test_the_published_framing_does_not_leak_either(codec_name: str) -> None:
    """`partial_frame="drop"` leaves out what the published code leaves out, clip by clip."""
    with double_precision(double_codec(codec_name)) as codec, torch.inference_mode():
        clips = clips_of(codec.facts, RAGGED)
        together = codec.encode(*padded(clips), partial_frame="drop")
        for row, wave in enumerate(clips):
            single = codec.encode(*alone(wave), partial_frame="drop")
            for field in ("audio_codes", "audio_codes_mask"):
                for many, one in zip(streams(together[field]), streams(single[field]), strict=True):
                    assert torch.equal(many[row, : one.shape[1]], one[0])
                    assert not many[row, one.shape[1] :].any()


def test_options_do_not_leak_either(codec_name: str) -> None:
    """Clips of one batch, each with its own value, without any certification."""
    with double_precision(double_codec(codec_name)) as codec, torch.inference_mode():
        clips = clips_of(codec.facts, RAGGED)
        for option in codec.encode_options:
            one, other = OPTION_VALUES[option]
            values = [other, one, None, other, one]
            together = codec.encode(*padded(clips), **{option: values})
            for row, (wave, value) in enumerate(zip(clips, values, strict=True)):
                single = codec.encode(*alone(wave), **{option: value})
                assert true_codes(together, codec.facts, row) == true_codes(single, codec.facts, 0)


@torch.inference_mode()
def test_padding_and_the_other_clips_are_not_read(codec: AudioCodec, facts: CodecFacts) -> None:
    """Another content of the padding and of the other clips, in a batch of one shape: not one bit may change."""
    clips = clips_of(facts, RAGGED)
    values, mask = padded(clips, extra=facts.hop_length)
    kept = 1
    before = codec.encode(values, mask, return_margins=True)
    generator = torch.Generator().manual_seed(0)
    other = torch.where(
        (torch.arange(len(clips)) == kept)[:, None, None] & mask.bool()[:, None],
        values,
        3 * torch.randn(values.shape, generator=generator),
    )
    after = codec.encode(other, mask, return_margins=True)
    assert not torch.equal(streams(before.audio_codes)[0][3], streams(after.audio_codes)[0][3])
    frames = facts.num_frames(clips[kept].shape[1])
    for field in ("audio_codes", "audio_codes_mask", "margins"):
        for stride, one, two in zip(facts.codebook_strides, streams(before[field]), streams(after[field]), strict=True):
            assert torch.equal(one[kept, : frames // stride], two[kept, : frames // stride]), field


@torch.inference_mode()
def test_codes_where_the_mask_is_false_are_not_read(codec: AudioCodec, facts: CodecFacts) -> None:
    clips = clips_of(facts, RAGGED)
    output = codec.encode(*padded(clips))
    generator = torch.Generator().manual_seed(0)
    garbage = [
        codes.where(mask, torch.randint(0, size, codes.shape, generator=generator))
        for codes, mask, size in zip(
            streams(output.audio_codes), streams(output.audio_codes_mask), facts.codebook_sizes, strict=True
        )
    ]
    assert any(not torch.equal(a, b) for a, b in zip(garbage, streams(output.audio_codes), strict=True))
    other = CodecOutput(
        audio_codes=garbage if isinstance(output.audio_codes, list) else torch.stack(garbage, dim=1),
        audio_codes_mask=output.audio_codes_mask,
        audio_lengths=output.audio_lengths,
    )
    assert torch.equal(codec.decode(other), codec.decode(output))


@torch.inference_mode()
def test_frames_beyond_the_lengths_are_not_read(codec: AudioCodec, facts: CodecFacts) -> None:
    """Lengths that need fewer frames than there are codes: as if the rest were not there."""
    frames, kept = 8 * facts.frame_multiple, 3 * facts.frame_multiple
    wave = clip(facts, facts.held_samples(frames))
    codes = codec.encode(*padded([wave, wave])).audio_codes
    lengths = [facts.held_samples(kept) - 1] * 2
    if isinstance(codes, list):
        cut = [stream[:, : kept // stride] for stream, stride in zip(codes, facts.codebook_strides, strict=True)]
    else:
        cut = codes[..., :kept]
    expected = codec.decode(cut, lengths=lengths)
    torch.testing.assert_close(codec.decode(codes, lengths=lengths), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_tokenizer_keeps_order_in_any_batch_size(tok: AudioTokenizer, facts: CodecFacts, batch_size: int) -> None:
    """More clips than the pool holds, so that several pools are drained."""
    waves = clips_of(facts, [(7 * i) % 13 + 0.4 for i in range(18)])
    expected = [tok(wave, facts.sampling_rate).input_ids for wave in waves]
    encoded = tok(waves, facts.sampling_rate, batch_size=batch_size)
    assert encoded.input_ids == expected
    assert encoded.audio_lengths == [wave.shape[1] for wave in waves]


def test_options_stay_with_their_clips(tok: AudioTokenizer, facts: CodecFacts) -> None:
    """One value a clip, in batches that are sorted by length inside."""
    waves = clips_of(facts, [9, 3, 14, 3.5])
    for option in tok.codec.encode_options:
        one, other = OPTION_VALUES[option]
        values = [one, other, other, one]
        expected = [
            tok(wave, facts.sampling_rate, **{option: value}).input_ids
            for wave, value in zip(waves, values, strict=True)
        ]
        assert tok(waves, facts.sampling_rate, batch_size=3, **{option: values}).input_ids == expected
        assert tok(waves, facts.sampling_rate, **{option: one}).input_ids[1] != expected[1]
