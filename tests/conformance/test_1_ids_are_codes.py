"""Law 1: `ids_to_codes(codes_to_ids(c)) == c` for every layout, length and depth; other ids are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotok.errors import TokenError
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import clip, layouts_of
from conformance.helpers import alone, streams

FRAMES = st.one_of(st.sampled_from([0, 1]), st.integers(2, 40), st.integers(1000, 3000))


def any_codes(facts: CodecFacts, num_frames: int, seed: int) -> tuple[Any, np.ndarray | None]:
    """Codes drawn from every book, its first and last more often, and depths where frames have them."""
    rng = np.random.default_rng(seed)
    lengths = [num_frames // stride for stride in facts.codebook_strides]
    rows = [rng.choice([0, size - 1, *range(size)], n) for size, n in zip(facts.codebook_sizes, lengths, strict=True)]
    if facts.frame_multiple > 1:
        return rows, None
    codes, depths = np.stack(rows), None
    if facts.variable_depth:
        depths = rng.integers(1, facts.num_codebooks + 1, num_frames)
        codes[np.arange(facts.num_codebooks)[:, None] >= depths] = 0
    return codes, depths


def assert_same_codes(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    else:
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=20)
@given(FRAMES, st.integers(0, 2**32))
def test_ids_are_codes(tok: AudioTokenizer, facts: CodecFacts, num_frames: int, seed: int) -> None:
    num_frames *= facts.frame_multiple
    codes, depths = any_codes(facts, num_frames, seed)
    for layout in layouts_of(facts):
        laid = tok.with_layout(layout)
        ids = laid.codes_to_ids(codes, depths)
        assert ids.dtype == np.int64
        assert_same_codes(laid.ids_to_codes(ids), codes)
        found = laid.layout.ids_to_codes(ids)
        if depths is not None:
            np.testing.assert_array_equal(found.depths, depths)
        if ids.size:
            assert 0 <= ids.min()
            assert ids.max() < laid.vocab_size
        if depths is None:
            assert laid.layout.num_frames(ids.shape[-1]) == num_frames


def test_ids_of_a_recording_are_its_codes(tok: AudioTokenizer, facts: CodecFacts) -> None:
    wave = clip(facts, 50 * facts.hop_length + 7)
    [encoded] = tok.encode_audio([wave], facts.sampling_rate)
    output = tok.codec.encode(*alone(wave))
    for row, codes in zip(encoded.codes, streams(output.audio_codes), strict=True):
        np.testing.assert_array_equal(row, codes[0])
    if facts.variable_depth:
        np.testing.assert_array_equal(encoded.depths, output.audio_codes_mask[0].sum(dim=0))
        assert len(set(encoded.depths.tolist())) == facts.num_codebooks, "the clip must show every depth"
    for layout in layouts_of(facts):
        laid = tok.with_layout(layout)
        ids = np.array(laid(wave, facts.sampling_rate).input_ids)
        assert_same_codes(laid.ids_to_codes(ids), encoded.codes)
        np.testing.assert_array_equal(ids, laid.codes_to_ids(encoded.codes, encoded.depths))


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_other_ids_are_refused_with_position_id_and_reason(
    tok: AudioTokenizer, facts: CodecFacts, num_frames: int, seed: int
) -> None:
    """One id is replaced by one that no codebook has; the message says where, which, and what is legal."""
    codes, depths = any_codes(facts, num_frames * facts.frame_multiple, seed)
    for layout in layouts_of(facts):
        laid = tok.with_layout(layout)
        ids = laid.codes_to_ids(codes, depths)
        illegal = laid.vocab_size + seed % 1000
        place = tuple(np.random.default_rng(seed).integers(0, n) for n in ids.shape)
        ids[place] = illegal
        with pytest.raises(TokenError) as caught:
            laid.ids_to_codes(ids)
        for word in (str(illegal), f"position {place[-1]}", "takes"):
            assert word in str(caught.value)


def test_sequences_that_stop_within_a_frame_are_refused(tok: AudioTokenizer, facts: CodecFacts) -> None:
    """Or they are, in a layout that allows it, the ids of other codes."""
    codes, depths = any_codes(facts, 6 * facts.frame_multiple, 0)
    for layout in layouts_of(facts):
        laid = tok.with_layout(layout)
        ids = laid.codes_to_ids(codes, depths)
        legal = 0
        for length in range(ids.shape[-1]):
            try:
                kept = laid.layout.ids_to_codes(ids[..., :length])
            except TokenError:
                continue
            legal += 1
            np.testing.assert_array_equal(laid.codes_to_ids(kept.codes, kept.depths), ids[..., :length])
        if depths is None and not laid.layout.is_2d:
            assert legal <= 6, "of the sequences that stop within six frames, one for each number of whole frames"
