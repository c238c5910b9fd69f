"""Certified codes: where batches flip near-ties, certification gives the codes of each clip alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conformance.codecs_table import OPTION_VALUES, TABLE, clip, new_codec, shared_codec, tokenizer_of
from conformance.helpers import alone, padded, streams, true_codes
from torch import Tensor

from audiotok.certified import Certificate, clip_options
from audiotok.codec import AudioCodec, CodecOutput
from audiotok.encoding import ClipEncoder

HOPS = [31.3, 12, 44.9, 30, 7.5]
# What the simulated kernels change of each sample, and a bound that covers it in all codecs of the table.
NOISE, BOUND = 0.1, 1.0


def clips_of(codec: AudioCodec, seed: int = 0) -> list[np.ndarray]:
    return [clip(codec.facts, round(hops * codec.facts.hop_length), seed + i) for i, hops in enumerate(HOPS)]


def with_noisy_batches(name: str) -> AudioCodec:
    """A codec whose batches are a little off, as those of another kernel are, but much more so."""
    codec = new_codec(name)
    exact: Callable[..., CodecOutput] = codec._encode
    generator = torch.Generator().manual_seed(0)

    def noisy(values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        if len(values) > 1:
            gains = torch.randn(len(values), 1, 1, generator=generator)
            values = values * (1 + NOISE * (gains + torch.randn(values.shape, generator=generator)))
        return exact(values, lengths, return_margins, **options)

    codec._encode = noisy
    return codec


def smallest_margins(output: CodecOutput) -> list[float]:
    rows = zip(*(margins.flatten(1).amin(dim=1).tolist() for margins in streams(output.margins)), strict=True)
    return [min(row) for row in rows]


@pytest.mark.parametrize("name", TABLE)
def test_flipped_codes_are_put_right(name: str) -> None:
    """Codes, and the mask that says how deep a frame is; the audio is then right as well."""
    codec = with_noisy_batches(name)
    clips = clips_of(codec)
    batch = padded(clips)
    expected = [codec.encode(*alone(wave)) for wave in clips]
    codes = [true_codes(output, codec.facts, 0) for output in expected]
    trusted = codec.encode(*batch)
    assert [true_codes(trusted, codec.facts, row) for row in range(5)] != codes, "the noise must flip something"
    certified, certificate = codec.encode_certified(*batch, bound=BOUND)
    assert [true_codes(certified, codec.facts, row) for row in range(5)] == codes
    assert certificate.num_reencoded > 0
    audio = codec.decode(certified)
    for row, output in enumerate(expected):
        single = codec.decode(output)[0]
        torch.testing.assert_close(audio[row, :, : single.shape[-1]], single, rtol=0, atol=1e-5)


def test_real_near_ties() -> None:
    """A pair of rows for every frame, as far on one side of its latent as on the other: rounding decides."""
    codec = new_codec("auv")
    facts = codec.facts
    short = [clip(facts, 37 * facts.hop_length, seed) for seed in range(4)]
    with torch.inference_mode():
        latents = torch.cat([codec.latents(*alone(wave)) for wave in short])
        z = torch.nn.functional.normalize(codec.quantizer.project_in(latents).transpose(1, 2).flatten(0, 1), dim=-1)
    aside = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    aside = 0.3 * torch.nn.functional.normalize(aside - (aside * z).sum(-1, keepdim=True) * z, dim=-1)
    with torch.no_grad():
        codec.quantizer.stages[0].codebook.weight[: 2 * len(z)] = torch.cat([z + aside, z - aside])
    expected = [codec.encode(*alone(wave)).audio_codes[0] for wave in short]
    flips = 0
    for seed, frames in enumerate((199, 64, 400)):
        batch = padded([*short, clip(facts, frames * facts.hop_length, 10 + seed)])
        trusted = codec.encode(*batch).audio_codes
        flips += sum(int((trusted[row, :, :37] != codes).sum()) for row, codes in enumerate(expected))
        output, certificate = codec.encode_certified(*batch, bound=1e-3)
        assert all(torch.equal(output.audio_codes[row, :, :37], codes) for row, codes in enumerate(expected))
        assert certificate.num_reencoded >= 4
        assert certificate.smallest_margin < 1e-4
    if not flips:
        pytest.skip("on this machine batches of these shapes round like a clip alone: no near-tie flipped")


# The certificate


@pytest.mark.parametrize("name", TABLE)
def test_the_certificate_counts_right(name: str) -> None:
    codec = shared_codec(name)
    batch = padded(clips_of(codec))
    margins = smallest_margins(codec.encode(*batch, return_margins=True))
    for bound in (0.0, sorted(margins)[0], sorted(margins)[2], sorted(margins)[4] * 1.01):
        _, certificate = codec.encode_certified(*batch, bound=bound)
        below = sum(margin < bound for margin in margins)
        assert certificate == Certificate(bound, 5, below, min(margins))


@pytest.mark.parametrize("name", TABLE)
def test_an_infinite_bound_encodes_every_clip_again(name: str) -> None:
    """The default where nothing was measured."""
    codec = new_codec(name)
    sizes: list[int] = []
    exact = codec._encode

    def watched(values: Tensor, *rest: Any, **options: Any) -> CodecOutput:
        sizes.append(len(values))
        return exact(values, *rest, **options)

    codec._encode = watched
    _, certificate = codec.encode_certified(*padded(clips_of(codec)), bound=math.inf)
    assert certificate.num_reencoded == 5
    assert sizes == [5, 1, 1, 1, 1, 1]
    sizes.clear()
    _, certificate = codec.encode_certified(*padded(clips_of(codec)), bound=0.0)
    assert certificate.num_reencoded == 0
    assert sizes == [5]


def test_a_clip_alone_needs_no_certificate() -> None:
    codec = shared_codec("toy_rvq")
    wave = clips_of(codec)[0]
    values, mask = padded([wave], extra=100)
    output, certificate = codec.encode_certified(values, mask, bound=1.0)
    assert certificate == Certificate(1.0, 1, 0, math.inf)
    assert true_codes(output, codec.facts, 0) == true_codes(codec.encode(*alone(wave)), codec.facts, 0)


def test_the_bound_is_the_codecs_own_for_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = new_codec("toy_rvq")
    monkeypatch.setattr(type(codec), "margin_bounds", {("cpu", torch.float32): 0.01})
    assert codec.margin_bound(torch.float32, "cpu") == codec.margin_bound(torch.float32, torch.device("cpu")) == 0.01
    assert codec.margin_bound(torch.bfloat16, "cpu") == math.inf
    assert codec.margin_bound(torch.float32, "cuda:1") == math.inf
    monkeypatch.setattr(type(codec), "margin_bounds", {("cuda", torch.float32): 0.02})
    assert codec.margin_bound(torch.float32, "cuda:1") == 0.02
    assert codec.margin_bound(torch.float32, "cpu") == math.inf
    _, certificate = codec.encode_certified(*padded(clips_of(codec)))
    assert certificate.bound == math.inf


@pytest.mark.parametrize("name", TABLE)
def test_measured_bounds_are_honest(name: str) -> None:
    """Where a codec states a bound for this machine's CPU, no code above it flips in batches of many shapes."""
    codec = shared_codec(name)
    bound = codec.margin_bound(torch.float32, "cpu")
    for seed in range(4):
        clips = clips_of(codec, 10 * seed)
        output = codec.encode(*padded(clips, extra=37 * seed), return_margins=True)
        for row, margin in enumerate(smallest_margins(output)):
            if margin >= bound:
                single = codec.encode(*alone(clips[row]))
                assert true_codes(output, codec.facts, row) == true_codes(single, codec.facts, 0)


# Options and the tokenizer


@pytest.mark.parametrize("name", TABLE)
def test_clips_keep_their_options_when_they_are_encoded_again(name: str) -> None:
    codec = shared_codec(name)
    clips = clips_of(codec)
    for option in codec.encode_options:
        one, other = OPTION_VALUES[option]
        values = [one, other, one, other, other]
        output, certificate = codec.encode_certified(*padded(clips), bound=math.inf, **{option: values})
        assert certificate.num_reencoded == 5
        for row, (wave, value) in enumerate(zip(clips, values, strict=True)):
            single = codec.encode(*alone(wave), **{option: value})
            assert true_codes(output, codec.facts, row) == true_codes(single, codec.facts, 0)


def test_options_of_one_clip() -> None:
    options = {"domain": ["speech", "music"], "level": 0.5, "beam": (3, 4)}
    assert clip_options(options, 1, 2) == {"domain": "music", "level": 0.5, "beam": 4}
    assert clip_options(options, 0, 3) == options


def test_the_tokenizer_certifies_its_batches() -> None:
    codec = with_noisy_batches("toy_rvq")
    codec.margin_bounds = {("cpu", torch.float32): BOUND}
    tok = tokenizer_of(codec)
    waves, rate = clips_of(codec), codec.facts.sampling_rate
    expected = [tok(wave, rate).input_ids for wave in waves]
    assert tok(waves, rate, batch_size=5).input_ids == expected
    assert tok(waves, rate, batch_size=5, certify=False).input_ids != expected


def test_an_encoder_keeps_its_certificates() -> None:
    codec = new_codec("toy_rvq")
    codec.margin_bounds = {("cpu", torch.float32): 1e-3}
    tok = tokenizer_of(codec)
    waves, rate = clips_of(codec), codec.facts.sampling_rate
    encoder: ClipEncoder = tok.encoder(batch_size=2)
    assert len(list(encoder.encode(waves, rate))) == 5
    assert [certificate.num_clips for certificate in encoder.certificates] == [2, 2, 1]
    assert {certificate.bound for certificate in encoder.certificates} == {1e-3}
    careless = tok.encoder(batch_size=2, certify=False)
    assert len(list(careless.encode(waves, rate))) == 5
    assert careless.certificates == []
