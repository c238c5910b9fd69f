"""What an encoder tells whoever watches it; that codes are right is shown by `conformance`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conformance.codecs_table import clip, shared_codec

from audiotok.encoding import ClipEncoder, decode_clip
from audiotok.errors import CodesError
from audiotok.features import CodecFeatureExtractor
from audiotok.layouts import LayoutCodes

CORE = 10  # frames


def encoder_of(name: str, batch_size: int | None = None) -> ClipEncoder:
    """Windows of `CORE` frames."""
    codec = shared_codec(name)
    facts = codec.facts
    extractor = CodecFeatureExtractor(facts.channels, facts.sampling_rate, 0.0, facts.hop_length)
    length = CORE * facts.frame_multiple * facts.hop_length / facts.sampling_rate
    return ClipEncoder(codec, extractor, chunk_length_s=length, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["auv", "auv_convnext", "toy_multirate", "toy_depth"])
def test_a_watch_hears_of_every_window_and_changes_nothing(name: str, batch_size: int) -> None:
    encoder = encoder_of(name, batch_size)
    facts = encoder.codec.facts
    core = CORE * facts.frame_multiple * facts.hop_length
    reach = encoder.windowing.context * facts.hop_length
    lengths = [core + reach, 4 * core + reach + 7, 1]
    waves = [clip(facts, n, seed) for seed, n in enumerate(lengths)]
    heard: list[tuple[int, int, int | None]] = []
    found = list(encoder.encode(waves, facts.sampling_rate, watch=lambda *told: heard.append(told)))
    assert {(place, total) for place, _, total in heard} == set(enumerate(lengths))
    assert [done for place, done, _ in heard if place != 1] == [0, 0], "these fit into a window"
    assert [done for place, done, _ in heard if place == 1] == [0, *range(core, 5 * core, core), lengths[1]]
    for one, other in zip(found, encoder.encode(waves, facts.sampling_rate), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.codes, other.codes, strict=True))


def test_a_watch_hears_none_where_only_decoding_can_tell_the_length(write_audio: Callable[..., Path]) -> None:
    """A WAV as it is written into a pipe: both of its sizes are 0."""
    encoder = encoder_of("auv_convnext")
    wave = clip(encoder.codec.facts, 16_000)
    streamed = bytearray(write_audio("whole.wav", wave, 16_000).read_bytes())
    at = streamed.index(b"data")
    streamed[4:8] = streamed[at + 4 : at + 8] = bytes(4)
    heard: list[tuple[int, int, int | None]] = []
    (found,) = encoder.encode([bytes(streamed)], watch=lambda *told: heard.append(told))
    assert {total for _, _, total in heard} == {None}
    assert heard[-1][1] == found.audio_length == 16_000


@pytest.mark.parametrize("name", ["auv", "toy_multirate"])
def test_a_length_that_no_such_clip_has_is_an_error_of_the_codes(name: str) -> None:
    """As in `AudioCodec.decode`: codes and length together are data, and no clip gives both."""
    codec = shared_codec(name)
    facts = codec.facts
    (found,) = encoder_of(name).encode([clip(facts, 30 * facts.hop_length)], facts.sampling_rate)
    codes = LayoutCodes(found.codes, None)
    for length in (found.audio_length + facts.hop_length * facts.frame_multiple, 0, -1):
        with pytest.raises(CodesError, match=f"length={length} does not fit"):
            next(decode_clip(codec, codes, length))
