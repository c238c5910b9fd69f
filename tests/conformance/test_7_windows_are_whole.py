"""Law 7: windows give the codes of the whole clip where the receptive field is finite; elsewhere the codec says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audiotok import encoding
from audiotok.audio import open_audio
from audiotok.codec import AudioCodec, CodecOutput
from audiotok.encoding import ClipCodes, ClipEncoder
from audiotok.errors import AudioTooLongError
from audiotok.facts import CodecFacts
from audiotok.features import CodecFeatureExtractor
from audiotok.layouts import LayoutCodes
from conformance.codecs_table import FINITE, UNBOUNDED, clip, double_codec, new_codec, shared_codec, tokenizer_of
from conformance.helpers import double_precision, relative_difference

each_finite = pytest.mark.parametrize("name", FINITE)
each_unbounded = pytest.mark.parametrize("name", UNBOUNDED)


def encode(codec: AudioCodec, wave: np.ndarray, **windows: float | None) -> ClipCodes:
    extractor = CodecFeatureExtractor(codec.facts.channels, codec.facts.sampling_rate, 0.0, codec.facts.hop_length)
    [found] = ClipEncoder(codec, extractor, **windows).encode([wave], codec.facts.sampling_rate)
    return found


def assert_same_clip(found: ClipCodes, expected: ClipCodes) -> None:
    assert found.audio_length == expected.audio_length
    pairs = zip(found.codes, expected.codes, strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    if expected.depths is not None:
        np.testing.assert_array_equal(found.depths, expected.depths)


@each_finite
@settings(max_examples=6)
@given(st.floats(30, 160), st.floats(0.3, 12), st.floats(0, 10), st.integers(0, 2**32))
def test_codes_of_windows_are_those_of_the_whole(
    name: str, hops: float, core: float, context: float, seed: int
) -> None:
    """Windows down to a fraction of a frame; in double precision, so that no near-tie can hide behind rounding."""
    with double_precision(double_codec(name)) as codec:
        facts = codec.facts
        frame_s = facts.hop_length / facts.sampling_rate
        wave = clip(facts, round(hops * facts.hop_length), seed)
        whole = encode(codec, wave, chunk_length_s=1000.0)
        found = encode(codec, wave, chunk_length_s=core * frame_s * facts.frame_multiple, context_s=context * frame_s)
        assert_same_clip(found, whole)


@each_finite
def test_windows_are_really_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece that the codec gets is longer than core and two contexts."""
    codec = new_codec(name)
    facts, whole = codec.facts, codec._encode
    seen: list[int] = []

    def watched(values: Tensor, *rest: Any, **options: Any) -> CodecOutput:
        seen.append(values.shape[-1])
        return whole(values, *rest, **options)

    monkeypatch.setattr(codec, "_encode", watched)
    core = 10 * facts.frame_multiple * facts.hop_length
    encode(codec, clip(facts, 20 * core), chunk_length_s=core / facts.sampling_rate)
    context = facts.num_frames(facts.receptive_field_samples) * facts.hop_length
    assert len(seen) >= 18
    assert max(seen) <= codec.padded_length(core + 2 * context)


@each_finite
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_clips_that_end_at_the_edge_of_a_window(name: str, more: int) -> None:
    with double_precision(double_codec(name)) as codec:
        facts = codec.facts
        core = 8 * facts.frame_multiple * facts.hop_length
        context = facts.num_frames(facts.receptive_field_samples) * facts.hop_length
        for whole_part in (core, core + context, 2 * core, 2 * core + context, 3 * core + context):
            wave = clip(facts, whole_part + more)
            found = encode(codec, wave, chunk_length_s=core / facts.sampling_rate)
            assert_same_clip(found, encode(codec, wave, chunk_length_s=1000.0))


@each_finite
def test_decoding_in_windows_is_decoding_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with double_precision(double_codec(name)) as codec:
        facts = codec.facts
        wave = clip(facts, round(150.3 * facts.hop_length))
        found = encode(codec, wave)
        codes = LayoutCodes(found.codes, found.depths)
        whole = torch.cat(list(encoding.decode_clip(codec, codes, found.audio_length)), dim=1)
        for frames in (1, 7, 40):
            monkeypatch.setattr(encoding, "DEFAULT_WINDOW_S", frames * facts.hop_length / facts.sampling_rate)
            pieces = list(encoding.decode_clip(codec, codes, found.audio_length))
            assert len(pieces) >= 150 // (frames + facts.frame_multiple)
            assert relative_difference(torch.cat(pieces, dim=1), whole) < 1e-9


@each_finite
def test_long_clips_need_no_word(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows for memory's sake are taken by themselves."""
    codec = shared_codec(name)
    wave = clip(codec.facts, 300 * codec.facts.hop_length)
    expected = encode(codec, wave, chunk_length_s=1000.0)
    monkeypatch.setattr(encoding, "DEFAULT_WINDOW_S", 30 * codec.facts.hop_length / codec.facts.sampling_rate)
    assert_same_clip(encode(codec, wave), expected)


@each_unbounded
def test_unbounded_codecs_refuse_long_clips_and_say_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = shared_codec(name)
    rate = codec.facts.sampling_rate
    monkeypatch.setattr(encoding, "MAX_WHOLE_S", 0.2)
    assert encode(codec, clip(codec.facts, round(0.2 * rate))).audio_length == round(0.2 * rate)
    with pytest.raises(AudioTooLongError) as caught:
        encode(codec, clip(codec.facts, round(0.2 * rate) + 1))
    for word in ("0.2 s", type(codec).__name__, "chunk_length_s=", "context_s="):
        assert word in str(caught.value)


@each_unbounded
def test_ten_minutes_is_the_most_that_an_unbounded_codec_takes_whole(name: str) -> None:
    rate = shared_codec(name).facts.sampling_rate
    with pytest.raises(AudioTooLongError, match="600 s"):
        tokenizer_of(shared_codec(name))(np.zeros(600 * rate + 1, np.float32), rate)


@each_unbounded
def test_windows_that_are_asked_for_keep_the_length_law(name: str) -> None:
    codec = shared_codec(name)
    facts: CodecFacts = codec.facts
    for num_samples in (1, 40 * facts.hop_length, 99 * facts.hop_length + 7):
        found = encode(
            codec,
            clip(facts, num_samples),
            chunk_length_s=20 * facts.hop_length / facts.sampling_rate,
            context_s=5 * facts.hop_length / facts.sampling_rate,
        )
        assert found.audio_length == num_samples
        assert found.codes.shape == (facts.num_codebooks, facts.num_frames(num_samples))


@each_unbounded
def test_windows_of_decoding_keep_the_length_and_bound_the_frames(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change the audio, which is near that of the whole only where the context is long."""
    codec = shared_codec(name)
    facts, tok, seen = codec.facts, tokenizer_of(codec), []
    whole = codec._decode
    num_samples = 60 * facts.hop_length - facts.tail_samples - 5
    encoded = tok(clip(facts, num_samples), facts.sampling_rate)

    def watched(codes: Any, frames: list[int], *rest: Any, **options: Any) -> Tensor:
        seen.append(max(frames))
        return whole(codes, frames, *rest, **options)

    monkeypatch.setattr(codec, "_decode", watched)
    frame_s = facts.hop_length / facts.sampling_rate
    for core, context in ((7, 0), (20, 4), (100, 0)):
        seen.clear()
        windows = {"chunk_length_s": core * frame_s, "context_s": context * frame_s}
        pieces = list(tok.decode_blocks(encoded.input_ids, encoded.audio_lengths, **windows))
        assert sum(piece.shape[1] for piece in pieces) == facts.output_length(num_samples)
        assert len(seen) == -(-60 // core)
        assert max(seen) <= core + 2 * max(context, 1)
    assert torch.equal(torch.cat(pieces, dim=1), tok.decode(encoded.input_ids, encoded.audio_lengths))


def test_a_stream_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by the window: no read asks for more."""
    codec = shared_codec("toy_rvq")
    facts = codec.facts
    asked: list[int] = []

    def counting(*args: object, **kwargs: object):
        stream = open_audio(*args, **kwargs)
        real = stream.read
        monkeypatch.setattr(stream, "read", lambda n=None: asked.append(n) or real(n))
        return stream

    monkeypatch.setattr(encoding, "open_audio", counting)
    core = 10 * facts.hop_length
    encode(codec, clip(facts, 40 * core), chunk_length_s=core / facts.sampling_rate)
    assert None not in asked
    assert max(asked) <= core + 2 * facts.receptive_field_samples + 1
