"""Law 3: `decode(encode(x))` has exactly the samples and channels of x, from one sample up to hours."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiotok.codec import AudioCodec
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import clip, new_codec, tokenizer_of
from conformance.helpers import alone

# From one sample over fractions of a frame to a hundred frames.
LENGTHS = st.one_of(st.integers(1, 40), st.floats(0.5, 100).map(lambda hops: -hops))


def samples_of(length: float, facts: CodecFacts) -> int:
    """Positive numbers are samples, negative ones hops."""
    return int(length) if length > 0 else max(1, round(-length * facts.hop_length))


@settings(max_examples=12)
@given(LENGTHS)
def test_the_round_trip_keeps_samples_and_channels(
    tok: AudioTokenizer, codec: AudioCodec, facts: CodecFacts, length: float
) -> None:
    wave = clip(facts, samples_of(length, facts))
    encoded = tok(wave, facts.sampling_rate)
    seconds = Fraction(wave.shape[1], facts.sampling_rate)
    expected = (facts.channels, math.ceil(seconds * facts.output_sampling_rate))
    assert encoded.audio_lengths == wave.shape[1]
    decoded = tok.decode(encoded.input_ids, encoded.audio_lengths)
    assert tuple(decoded.shape) == expected
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()
    by_the_codec = codec.decode(codec.encode(*alone(wave)))
    assert tuple(by_the_codec.shape) == (1, *expected)
    torch.testing.assert_close(decoded, by_the_codec[0], rtol=0, atol=1e-5)


def test_one_to_many_samples(tok: AudioTokenizer, facts: CodecFacts) -> None:
    for num_samples in [*range(1, 5), facts.hop_length - 1, facts.hop_length, facts.hop_length + 1]:
        encoded = tok(clip(facts, num_samples), facts.sampling_rate)
        decoded = tok.decode(encoded.input_ids, encoded.audio_lengths)
        assert tuple(decoded.shape) == (facts.channels, facts.output_length(num_samples))


@pytest.mark.parametrize("rate", [4000, 11025, 48000])
def test_other_rates_come_out_at_the_codecs(tok: AudioTokenizer, facts: CodecFacts, rate: int) -> None:
    wave = clip(facts, 997)
    encoded = tok(wave, rate)
    assert encoded.audio_lengths == -(-997 * facts.sampling_rate // rate)
    decoded = tok.decode(encoded.input_ids, encoded.audio_lengths)
    assert decoded.shape[1] == facts.output_length(encoded.audio_lengths)


def test_batches_of_codes_keep_every_length(codec: AudioCodec, facts: CodecFacts) -> None:
    """Lengths given for bare codes: silence behind each clip's end, N the longest clip's."""
    frames = 6 * facts.frame_multiple
    full = facts.held_samples(frames)
    wave = clip(facts, full)
    values, mask = torch.from_numpy(np.stack([wave, wave])), torch.ones(2, full)
    codes = codec.encode(values, mask).audio_codes
    for one, other in [(full, full - 1), (1, full), (full // 2, full // 3)]:
        audio = codec.decode(codes, lengths=[one, other])
        longest = facts.output_length(max(one, other))
        assert tuple(audio.shape) == (2, facts.channels, longest)
        for row, length in zip(audio, (one, other), strict=True):
            assert not row[:, facts.output_length(length) :].any()
    assert codec.decode(codes).shape[-1] == facts.num_samples(frames)


HOURS = 3
CHILD = """
import json, resource, sys
import torch
from audiotok import AutoAudioTokenizer

torch.set_num_threads(1)
tok = AutoAudioTokenizer.from_pretrained(sys.argv[1])
tok.decode(tok(sys.argv[2]).input_ids)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoded = tok(sys.argv[3])
samples = sum(piece.shape[1] for piece in tok.decode_blocks(encoded.input_ids, encoded.audio_lengths))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"ids": len(encoded.input_ids), "samples": samples, "grown_mib": grown / 1024}))
"""


@pytest.mark.slow
def test_three_hours_in_bounded_memory(tmp_path: Path) -> None:
    """The waveform alone would be 660 MiB; a minute of it is encoded before memory is first measured."""
    codec = new_codec("auv_convnext")
    tokenizer_of(codec).save_pretrained(tmp_path / "codec")
    rate, minute = codec.facts.sampling_rate, clip(codec.facts, 60 * codec.facts.sampling_rate)[0]
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 1, "PCM_16") as long:
        for _ in range(HOURS * 60):
            long.write(minute)
    soundfile.write(tmp_path / "short.wav", minute, rate, "PCM_16")
    command = [sys.executable, "-c", CHILD, "codec", "short.wav", "long.wav"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=1200)
    found = json.loads(done.stdout)
    num_samples = HOURS * 3600 * rate
    assert found["samples"] == num_samples
    assert found["ids"] == codec.facts.num_frames(num_samples)
    assert found["grown_mib"] < 250
