"""Streams of a causal codec: pieces of any size give what the whole clip gives, as soon as it is certain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from audiotok import ApCodecConfig, ApCodecModel
from audiotok.codecs.apcodec.streaming_apcodec import FrameEncoder, StreamingOverlap
from audiotok.errors import (
    AudioShapeError,
    CodesError,
    ConfigError,
    IntegerAudioError,
    NonFiniteAudioError,
    OptionError,
)
from audiotok.nn.convnext import DepthwiseConv
from audiotok.nn.history import History, extend_left, weight_of

CAUSAL = {
    "sampling_rate": 8000,
    "n_fft": 48,
    "win_length": 32,
    "stft_hop_length": 8,
    "downsampling_ratio": 4,
    "trunk_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "amplitude_size": 12,
    "phase_size": 8,
    "hidden_size": 8,
    "num_codebooks": 2,
    "codebook_size": 64,
    "upsample_kernel_size": 8,
    "downsample_kernel_size": 6,
    "latent_kernel_size": 3,
    "output_kernel_size": 4,
    "num_mels": 8,
    "response_norm": False,
    "causal": True,
}
HOP = 32
PIECES = st.lists(st.sampled_from([0, 1, 1, 2, 7, 31, 32, 33, 64, 100]), min_size=1, max_size=12)


def make(seed: int = 0, **keys: object) -> ApCodecModel:
    """Weights large enough that every frame has codes of its own."""
    torch.manual_seed(seed)
    codec = ApCodecModel(ApCodecConfig(**{**CAUSAL, **keys})).eval()
    for parameter in codec.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return codec


CODEC = make()


def sound(samples: int, batch: int = 1, seed: int = 1) -> Tensor:
    return 0.2 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def whole(codec: ApCodecModel, wave: Tensor) -> Tensor:
    """Codes of whole clips."""
    return codec.encode(wave, torch.ones(len(wave), wave.shape[-1])).audio_codes


def cut(wave: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Pieces of these sizes, and the rest."""
    places = [0, *torch.tensor(sizes).cumsum(0).clamp(max=wave.shape[-1]).tolist(), wave.shape[-1]]
    return [wave[..., start:stop] for start, stop in pairwise(places)]


def streamed(codec: ApCodecModel, pieces: Sequence[Tensor]) -> Tensor:
    with codec.streaming(len(pieces[0])) as stream:
        return torch.cat([*(stream.encode(piece) for piece in pieces), stream.flush()], dim=-1)


def heard(codec: ApCodecModel, pieces: Sequence[Tensor]) -> Tensor:
    with codec.streaming(len(pieces[0])) as stream:
        return torch.cat([*(stream.decode(piece) for piece in pieces), stream.flush()], dim=-1)


# Pieces are the whole


@settings(max_examples=25)
@given(PIECES, st.integers(0, 2**32))
def test_codes_of_pieces_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    """Bit for bit, in float32: the same arithmetic on the same shapes."""
    wave = sound(max(1, sum(sizes)), seed=seed)
    assert torch.equal(streamed(CODEC, cut(wave, sizes)), whole(CODEC, wave))


def test_frames_one_by_one_are_the_network_at_once() -> None:
    """The two ways through the encoder, which share no call of a layer, see the same windows and the same past."""
    wave = sound(9 * HOP + 5)
    frames, encode = CODEC.facts.num_frames(wave.shape[-1]), FrameEncoder(CODEC)
    padded = torch.nn.functional.pad(wave[:, 0], (0, frames * HOP - wave.shape[-1]))
    with torch.no_grad():
        one_by_one = torch.cat([encode(samples) for samples in padded.split(HOP, dim=1)], dim=2)
        torch.testing.assert_close(one_by_one, CODEC.latents(wave), atol=1e-5, rtol=0)


def test_sample_by_sample() -> None:
    wave = sound(3 * HOP + 5)
    codes = streamed(CODEC, wave.split(1, dim=-1))
    assert torch.equal(codes, whole(CODEC, wave))
    audio = heard(CODEC, codes.split(1, dim=-1))
    torch.testing.assert_close(audio, CODEC.decode(codes), atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 2))
def test_audio_of_pieces_is_that_of_the_whole(sizes: list[int], codebooks: int) -> None:
    codes = whole(CODEC, sound(12 * HOP))[:, :codebooks]
    audio = heard(CODEC, cut(codes, sizes))
    expected = CODEC.decode(codes)
    assert audio.shape[-1] == expected.shape[-1] == CODEC.facts.num_samples(codes.shape[-1])
    torch.testing.assert_close(audio, expected, atol=1e-5, rtol=0)
    assert torch.equal(audio, heard(CODEC, codes.split(1, dim=-1))), "the sizes of the pieces do not matter at all"


@pytest.mark.parametrize(
    "keys", [{"downsample_kernel_size": 4, "upsample_kernel_size": 4}, {"upsample_kernel_size": 14}]
)
@pytest.mark.parametrize("window", [16, 32, 48])
def test_other_kernels_and_windows(keys: dict, window: int) -> None:
    """Windows of two hops, and of more than a code frame: several frames pass before the first sample."""
    codec = make(win_length=window, num_codebooks=1, **keys)
    wave = sound(7 * HOP + 9)
    codes = streamed(codec, wave.split(17, dim=-1))
    assert torch.equal(codes, whole(codec, wave))
    torch.testing.assert_close(heard(codec, codes.split(2, dim=-1)), codec.decode(codes), atol=1e-5, rtol=0)


def test_windows_longer_than_a_code_frame() -> None:
    codec = make(win_length=48, downsampling_ratio=2, upsample_kernel_size=4, downsample_kernel_size=2)
    wave = sound(100)
    codes = streamed(codec, wave.split(10, dim=-1))
    assert torch.equal(codes, whole(codec, wave))
    audio = heard(codec, codes.split(1, dim=-1))
    torch.testing.assert_close(audio, codec.decode(codes), atol=1e-5, rtol=0)
    assert audio.shape[-1] >= 100


def test_clips_of_a_batch_run_side_by_side() -> None:
    wave = sound(5 * HOP + 3, batch=3)
    codes = streamed(CODEC, wave.split(50, dim=-1))
    assert torch.equal(codes, whole(CODEC, wave))
    assert len({tuple(row.flatten().tolist()) for row in codes}) == 3
    torch.testing.assert_close(heard(CODEC, codes.split(2, dim=-1)), CODEC.decode(codes), atol=1e-5, rtol=0)


def test_streams_do_not_meet() -> None:
    """Two at once through one model, and others before: state is in the stream."""
    one, other = sound(200), sound(200, seed=2)
    with CODEC.streaming() as first, CODEC.streaming() as second:
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for a, b in zip(one.split(40, dim=-1), other.split(40, dim=-1), strict=True):
            found[0].append(first.encode(a))
            found[1].append(second.encode(b))
            first.decode(found[0][-1])
        found[0].append(first.flush())
        found[1].append(second.flush())
    assert torch.equal(torch.cat(found[0], dim=-1), whole(CODEC, one))
    assert torch.equal(torch.cat(found[1], dim=-1), whole(CODEC, other))


def test_both_ways_in_one_stream() -> None:
    """As a call is made: what comes in is coded and heard at once."""
    wave = sound(6 * HOP + 11)
    with CODEC.streaming() as stream:
        audio = [stream.decode(stream.encode(piece)) for piece in wave.split(9, dim=-1)]
        audio += [stream.decode(stream.flush()), stream.flush()]
    expected = CODEC.decode(whole(CODEC, wave))
    torch.testing.assert_close(torch.cat(audio, dim=-1), expected, atol=1e-5, rtol=0)
    assert expected.shape[-1] >= wave.shape[-1]


def test_without_flush_only_whole_frames_come() -> None:
    wave = sound(3 * HOP + HOP // 2)
    with CODEC.streaming() as stream:
        codes = stream.encode(wave)
    assert codes.shape[-1] == 3
    assert torch.equal(codes, whole(CODEC, wave)[..., :3])
    assert torch.equal(whole(CODEC, wave), CODEC.encode(wave).audio_codes), "nothing is published to frame otherwise"


def test_the_state_does_not_grow() -> None:
    """Hours pass through a stream of constant size."""

    def held(stream) -> int:
        tensors = [*stream.encoder.history.inputs.values(), *stream.history.inputs.values(), stream.waiting]
        tensors += [stream.encoder.past, stream.overlap.signal, stream.overlap.energy]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    with CODEC.streaming() as stream:
        sizes = []
        for _ in range(12):
            stream.decode(stream.encode(sound(HOP)))
            sizes.append(held(stream))
    assert len(set(sizes[3:])) == 1


def test_gradients_are_not_kept() -> None:
    with CODEC.streaming() as stream:
        assert not stream.decode(stream.encode(sound(4 * HOP).requires_grad_())).requires_grad


# Latency


def test_latency_of_the_variant_of_the_released_size() -> None:
    config = ApCodecConfig(causal=True, response_norm=False, downsample_kernel_size=8)
    assert config.latency_samples == 320 + 280
    assert config.latency_ms == 12.5
    assert config.facts.is_causal
    assert ApCodecConfig().latency_ms is None
    assert CODEC.config.latency_samples == HOP + 32 - 8


def test_a_code_depends_on_nothing_behind_its_frame() -> None:
    wave = sound(10 * HOP)
    codes, latents = whole(CODEC, wave), CODEC.latents(wave)
    for frame in (0, 4, 8):
        end = (frame + 1) * HOP
        other = wave.clone()
        other[..., end:] = sound(10 * HOP - end, seed=3)
        assert torch.equal(whole(CODEC, other)[..., : frame + 1], codes[..., : frame + 1])
        torch.testing.assert_close(CODEC.latents(other)[..., : frame + 1], latents[..., : frame + 1], atol=1e-5, rtol=0)
        other = wave.clone()
        other[..., end - 2] += 1.0
        assert not torch.equal(CODEC.latents(other)[..., frame], latents[..., frame]), "its own frame it does see"


def test_later_sound_never_changes_earlier_sound() -> None:
    """Whatever comes `latency` samples after s leaves s as it is; and much less than that is not enough."""
    latency, wave = CODEC.config.latency_samples, sound(14 * HOP)
    audio = CODEC.decode(whole(CODEC, wave))
    needed = []
    for place in range(5 * HOP, 6 * HOP, 3):
        other = wave.clone()
        other[..., place:] = 0.5 - other[..., place:]
        moved = (CODEC.decode(whole(CODEC, other)) - audio).abs() > 1e-5
        first = int(moved[0, 0].nonzero()[0])
        needed.append(place - first + 1)
    assert max(needed) <= latency
    assert max(needed) > latency - HOP // 2, "windows fade out, so the last samples of all matter little"


def test_samples_come_no_later_than_the_latency() -> None:
    """Handed in sample by sample, output sample s is there once input sample s + latency - 1 is."""
    given_out, worst = 0, 0
    with CODEC.streaming() as stream:
        for i, sample in enumerate(sound(8 * HOP).split(1, dim=-1)):
            arrived = stream.decode(stream.encode(sample)).shape[-1]
            if arrived:
                worst = max(worst, i + 1 - given_out)
            given_out += arrived
    assert worst == CODEC.config.latency_samples


# Refusals


def test_codecs_that_see_the_future_are_refused() -> None:
    codec = make(causal=False, downsample_kernel_size=5, output_kernel_size=5)
    with pytest.raises(OptionError, match=r"not causal.*causal=true"):
        codec.streaming()


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, True, "2"])
def test_batch_sizes(batch_size: object) -> None:
    with pytest.raises(OptionError, match="batch_size"):
        CODEC.streaming(batch_size)


def test_streams_that_are_over() -> None:
    with CODEC.streaming() as stream:
        stream.encode(sound(HOP))
        stream.flush()
        with pytest.raises(OptionError, match=r"encode\(\).*flushed"):
            stream.encode(sound(HOP))
        assert stream.flush().shape == (1, 1, 0), "nothing was decoded"
        with pytest.raises(OptionError, match=r"decode\(\).*flushed"):
            stream.decode(torch.zeros(1, 2, 1, dtype=torch.long))
    for call in (stream.flush, lambda: stream.encode(sound(1)), lambda: stream.decode(torch.zeros(1, 2, 1).long())):
        with pytest.raises(OptionError, match="block has ended"):
            call()


def test_bad_pieces_leave_the_stream_as_it_was() -> None:
    wave = sound(3 * HOP)
    with CODEC.streaming() as stream:
        codes = [stream.encode(wave[..., :40])]
        for error, bad in (
            (AudioShapeError, wave[0]),
            (AudioShapeError, wave.expand(2, -1, -1)),
            (AudioShapeError, wave.expand(1, 2, -1)),
            (AudioShapeError, wave.numpy()),
            (IntegerAudioError, (100 * wave).long()),
            (NonFiniteAudioError, wave / 0),
        ):
            with pytest.raises(error):
                stream.encode(bad)
        for bad in (torch.zeros(2, 2, 1).long(), torch.zeros(2, 1).long(), torch.zeros(1, 2, 1), [0]):
            with pytest.raises(CodesError):
                stream.decode(bad)
        for bad in (torch.full((1, 2, 1), 64), torch.zeros(1, 3, 1).long()):
            with pytest.raises(CodesError):
                stream.decode(bad)
        codes += [stream.encode(wave[..., 40:]), stream.flush()]
    assert torch.equal(torch.cat(codes, dim=-1), whole(CODEC, wave))


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"response_norm": True}, "response_norm"),
        ({"downsample_kernel_size": 3}, "downsample_kernel_size=3"),
        ({"upsample_kernel_size": 5}, "upsample_kernel_size=5"),
        ({"win_length": 12}, "win_length=12"),
        ({"num_quantizers": 3}, "num_quantizers=3"),
    ],
)
def test_causal_configs_that_make_no_sense(keys: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ApCodecConfig(**{**CAUSAL, **keys})


# The pieces that streams are made of


def test_histories_hold_the_last_frames() -> None:
    layer, history = DepthwiseConv(1, 3, causal=True), History()
    x = torch.arange(1.0, 6.0).view(1, 1, 5)
    assert extend_left(x, 0, history, layer) is x
    assert extend_left(x, 2, None, layer).flatten().tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert extend_left(x[..., :1], 2, history, layer).flatten().tolist() == [0, 0, 1]
    assert extend_left(x[..., 1:], 2, history, layer).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert history.inputs[layer].flatten().tolist() == [4, 5]
    assert weight_of(layer, history) is weight_of(layer, history)


def test_overlap_add_piece_by_piece() -> None:
    spectrum = torch.randn(2, 9, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    overlap, again = StreamingOverlap(12, 4), StreamingOverlap(12, 4)
    one = torch.cat([overlap.add(spectrum), overlap.end()], dim=1)
    parts = torch.cat([*(again.add(part) for part in spectrum.split([1, 4, 7], dim=-1)), again.end()], dim=1)
    torch.testing.assert_close(parts, one, atol=1e-6, rtol=1e-5)
    assert one.shape == (2, 12 * 4 - 6)
    assert StreamingOverlap(12, 4).end() is None
