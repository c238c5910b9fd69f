"""Rate control of VRVQ: levels, bitrates and constant depths, from importance to ids and back."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.codecs_table import VRVQ, clip, new_codec, shared_codec
from conformance.helpers import alone, double_precision, padded, relative_difference, true_codes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from audiotok import AutoAudioTokenizer, VrvqAudioTokenizer, VrvqConfig, VrvqModel
from audiotok import encoding as encoding_module
from audiotok.codec import CodecOutput
from audiotok.codecs.vrvq.rate_vrvq import MAX_LEVEL, TOLERANCE, DepthRate, find_level
from audiotok.errors import ConfigError, OptionError
from audiotok.quantizers.variable import depths_of

PUBLISHED = DepthRate(44100 / 512, 8, 1024)
HOPS = [60, 31.4, 90.5, 44]


@pytest.fixture(scope="module")
def codec() -> VrvqModel:
    """Eight books; do not change it."""
    return new_codec("vrvq", num_codebooks=8)


@pytest.fixture(scope="module")
def tok(codec: VrvqModel) -> VrvqAudioTokenizer:
    return VrvqAudioTokenizer(codec)


def clips_of(codec: VrvqModel, hops: list[float] = HOPS) -> list[np.ndarray]:
    return [clip(codec.facts, max(1, round(h * codec.facts.hop_length)), seed) for seed, h in enumerate(hops)]


def bits_per_second(codec: VrvqModel, output: CodecOutput, row: int) -> float:
    """Counted by hand: codes and the depth of each frame."""
    mask = output.audio_codes_mask[row]
    frames = int(mask[0].sum())
    code_bits, side_bits = math.ceil(math.log2(codec.config.codebook_size)), math.ceil(math.log2(8))
    return (int(mask.sum()) * code_bits + frames * side_bits) / frames * float(codec.facts.frame_rate)


@pytest.mark.parametrize("name", ["vrvq", "vrvq_constant"])
def test_gradients_pass_the_hidden_states(name: str) -> None:
    codec = new_codec(name)
    output = codec(torch.from_numpy(clip(codec.facts, 9 * codec.facts.hop_length))[None], output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.audio_values.square().sum().backward()
    assert all(state.grad is not None and state.grad.any() for state in output.hidden_states)


# Bits


def test_rates_of_the_published_model() -> None:
    assert (PUBLISHED.code_bits, PUBLISHED.side_bits) == (10, 3)
    assert PUBLISHED.bits_per_second(1) == pytest.approx(861.3 + 258.4, abs=0.1)
    assert PUBLISHED.limits[1] == pytest.approx(7149, abs=0.1)
    assert VrvqModel(VrvqConfig(**VRVQ)).rate.limits == (8000.0, 20000.0)


def depths_at(importance: np.ndarray, level: float, books: int) -> np.ndarray:
    """Depths as the codec takes them, in float32."""
    scaled = torch.from_numpy(importance.astype(np.float32)) * torch.tensor(level) * books
    return depths_of(scaled, books).numpy()


CHOICES = [{"level": 0.4}, {"level": 2.0}, {"num_quantizers": 2}, {}]
IMPORTANCE = st.lists(st.floats(0.005, 0.995), min_size=1, max_size=60).map(lambda p: np.array(p, np.float32))


@given(IMPORTANCE, st.floats(1100, 7300), st.integers(1, 3))
def test_the_level_found_gives_the_bitrate_or_none_does(importance: np.ndarray, target: float, repeats: int) -> None:
    """Checked against every level that makes a difference; frames that are alike get deeper together."""
    importance = np.repeat(importance, repeats)
    steps = np.unique(np.outer(np.arange(1, 8) / 8, 1 / importance.astype(np.float64)))
    levels = [0.0, *(steps[:-1] + steps[1:]) / 2, 2 * steps[-1]]
    rates = {level: PUBLISHED.bits_per_second(depths_at(importance, level, 8).mean()) for level in levels}
    # Levels beyond the most that is legal do not count, nor do those that float32 does not tell apart.
    reachable = [rate for level, rate in rates.items() if level <= MAX_LEVEL]
    nearest = min(abs(rate - target) for rate in reachable)
    try:
        found = find_level(importance, target, PUBLISHED)
    except OptionError as error:
        assert nearest > 0.99 * TOLERANCE * target or np.diff(steps).min() < 1e-5
        low, high = map(float, re.search(r"give (\d+) to (\d+) bits per second", str(error)).groups())
        assert low == round(min(reachable))
        assert high <= round(max(rates.values()))
        return
    assert 0 < found.level <= MAX_LEVEL
    assert PUBLISHED.bits_per_second(depths_at(importance, found.level, 8).mean()) == pytest.approx(
        found.bits_per_second
    )
    assert abs(found.bits_per_second - target) <= TOLERANCE * target
    assert abs(found.bits_per_second - target) == pytest.approx(nearest, rel=1e-6, abs=1e-6) or not found.is_nearest


def test_levels_stay_away_from_the_edges_between_depths() -> None:
    """Half the gap to the next frame on either side: no rounding of float32 moves a depth."""
    importance = np.random.default_rng(0).uniform(0.1, 0.9, 500).astype(np.float32)
    for target in range(1200, 7100, 100):
        level = find_level(importance, target, PUBLISHED).level
        depths = depths_at(importance, level, 8)
        for nudge in (1 - 2e-7, 1 + 2e-7):
            assert np.array_equal(depths_at(importance * np.float32(nudge), level, 8), depths)


def test_frames_that_are_alike_get_deeper_together() -> None:
    """Silence: between two depths there is nothing, and the message says what there is."""
    importance = np.full(100, 0.4, np.float32)
    steps = [PUBLISHED.bits_per_second(depth) for depth in range(1, 9)]
    for rate in steps:
        assert find_level(importance, rate * 1.01, PUBLISHED).bits_per_second == pytest.approx(rate)
    with pytest.raises(OptionError, match=r"bitrate=2500 is out of reach of 100 frames.*1120 to 7149.*1981 and 2842"):
        find_level(importance, 2500, PUBLISHED)
    with pytest.raises(OptionError, match=r"bitrate=7000 .*1120 to 4565 bits per second, the nearest 4565\."):
        find_level(np.full(9, 0.009, np.float32), 7000, PUBLISHED)  # of small importance, up to level 64


# Bitrates of a codec


def test_each_clip_meets_its_bitrate(codec: VrvqModel) -> None:
    """Within 2 % wherever a level can; several of these targets within half a per cent."""
    low, high = codec.rate.limits
    clips = clips_of(codec)
    for target in np.linspace(low * 1.01, high, 9):
        output = codec.encode(*padded(clips), bitrate=float(target))
        for row in range(len(clips)):
            found = bits_per_second(codec, output, row)
            assert found == pytest.approx(float(codec.bits_per_second(output)[row]), rel=1e-6)
            assert abs(found - target) <= 0.01 * target


def test_one_bitrate_a_clip(codec: VrvqModel) -> None:
    clips, targets = clips_of(codec), [20000, None, 48000, 12000.0]
    output = codec.encode(*padded(clips), bitrate=targets)
    for row, target in enumerate(targets):
        single = codec.encode(*alone(clips[row]), bitrate=target)
        assert true_codes(output, codec.facts, row) == true_codes(single, codec.facts, 0)
        if target is None:
            assert true_codes(single, codec.facts, 0) == true_codes(codec.encode(*alone(clips[row])), codec.facts, 0)
        else:
            assert bits_per_second(codec, output, row) == pytest.approx(target, rel=TOLERANCE)


def test_all_clips_of_a_batch_meet_a_bitrate_together(codec: VrvqModel) -> None:
    batch = padded(clips_of(codec))
    for target in (15000.0, 30000):
        output = codec.encode(*batch, bitrate=target, bitrate_per="batch")
        mask = output.audio_codes_mask
        mean_depth = float(mask.sum() / mask[:, 0].sum())
        assert codec.rate.bits_per_second(mean_depth) == pytest.approx(target, rel=TOLERANCE)
        level = codec.level_for_bitrate(*batch, target)
        assert torch.equal(mask, codec.encode(*batch, level=level).audio_codes_mask)
        certified, certificate = codec.encode_certified(*batch, bound=math.inf, bitrate=target, bitrate_per="batch")
        assert certificate.num_reencoded == len(HOPS)
        assert torch.equal(certified.audio_codes_mask, mask)
        alone_depths = [bits_per_second(codec, output, row) for row in range(len(HOPS))]
        assert max(alone_depths) > 1.02 * target or min(alone_depths) < 0.98 * target, "clips differ in what they need"


def test_a_level_is_found_without_a_graph(codec: VrvqModel) -> None:
    """Also where gradients are on, as they are by default."""
    assert torch.is_grad_enabled()
    output = codec.encode(*padded(clips_of(codec)), bitrate=20000, return_margins=True)
    assert not output.importance.requires_grad and not output.margins.requires_grad


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bitrate": 99}, r"bitrate=99 is not legal: give 9000 to 51000 bits per second"),
        ({"bitrate": 52100}, r"bitrate=52100 is not legal"),
        ({"bitrate": "3k"}, r"bitrate='3k' is not legal"),
        ({"bitrate": True}, r"bitrate=True is not legal"),
        ({"bitrate": math.nan}, r"bitrate=nan is not legal"),
        ({"level": -0.1}, r"level=-0\.1 is not legal: give a number from 0"),
        ({"level": 64.5}, r"level=64\.5 is not legal.*to 64"),
        ({"level": math.nan}, r"level=nan is not legal"),
        ({"level": [1, 2, 3]}, r"level holds 3 values for 2 clips"),
        ({"num_quantizers": 0}, r"num_quantizers=0 is not legal.*1 to 8"),
        ({"num_quantizers": 9}, r"num_quantizers=9 is not legal"),
        ({"num_quantizers": 2.0}, r"num_quantizers=2\.0 is not legal"),
        ({"num_quantizers": True}, r"num_quantizers=True is not legal"),
        ({"level": 1, "bitrate": 20000}, r"level=1, bitrate=20000 exclude each other"),
        ({"level": [1, None], "num_quantizers": [2, 3]}, r"level=1, num_quantizers=2 exclude each other"),
        ({"bitrate_per": "batch"}, r'bitrate=None does not fit bitrate_per="batch"'),
        ({"bitrate_per": "batch", "bitrate": [20000, 20000]}, r"does not fit .*one number for all"),
        ({"bitrate_per": "batch", "bitrate": 20000, "level": 2}, r"exclude each other"),
        ({"bitrate_per": "file", "bitrate": 20000}, r"bitrate_per='file' is not legal: choose one of clip, batch"),
    ],
    ids=str,
)
def test_options_that_are_refused(codec: VrvqModel, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        codec.encode(*padded(clips_of(codec)[:2]), **options)


def test_clips_may_differ_in_what_decides_their_depth(codec: VrvqModel) -> None:
    clips = clips_of(codec)[:3]
    options = {"level": [0.5, None, None], "bitrate": [None, 20000, None], "num_quantizers": [None, None, 3]}
    output = codec.encode(*padded(clips), **options)
    for row, wave in enumerate(clips):
        single = codec.encode(*alone(wave), **{name: values[row] for name, values in options.items()})
        assert true_codes(output, codec.facts, row) == true_codes(single, codec.facts, 0)


def test_a_bitrate_out_of_reach_says_what_is_in_reach(codec: VrvqModel) -> None:
    """One frame has a whole number of codes: eight rates, and those the message names are met."""
    [wave] = clips_of(codec, [0.5])
    with pytest.raises(OptionError, match="bitrate=12500 is out of reach of 1 frames") as caught:
        codec.encode(*alone(wave), bitrate=12500)
    near = re.search(r"nearest (\d+) and (\d+)", str(caught.value)).groups()
    assert near == ("9000", "15000")
    for rate in map(int, near):
        assert bits_per_second(codec, codec.encode(*alone(wave), bitrate=rate), 0) == rate


# Certified depths


def with_noisy_importance(noise: float) -> VrvqModel:
    """A codec whose importance is a little off in batches, as that of another kernel is, but much more so."""
    codec = new_codec("vrvq", num_codebooks=8)
    exact = codec.importance.forward

    def noisy(features: Tensor, frames: list[int]) -> Tensor:
        importance = exact(features, frames)
        generator = torch.Generator().manual_seed(0)
        if len(features) == 1:
            return importance
        return importance * (1 + noise * (2 * torch.rand(importance.shape, generator=generator) - 1))

    codec.importance.forward = noisy
    return codec


@pytest.mark.parametrize("options", [{}, {"level": 2.5}, {"bitrate": 25000}, {"bitrate": [20000, None, 40000, 30000]}])
def test_depths_that_rounding_flips_are_put_right(options: dict[str, Any]) -> None:
    """Exactly the frames whose depth flips are beside an edge, and the margins say so."""
    noise = 1e-2
    codec = with_noisy_importance(noise)
    clips = clips_of(codec)
    batch = padded(clips)
    trusted = codec.encode(*batch, return_margins=True, **options)
    certified, certificate = codec.encode_certified(*batch, bound=4 * noise, **options)
    num_flipped = 0
    for row, wave in enumerate(clips):
        own = {name: value[row] if isinstance(value, list) else value for name, value in options.items()}
        expected = codec.encode(*alone(wave), **own)
        assert true_codes(certified, codec.facts, row) == true_codes(expected, codec.facts, 0)
        depths, right = trusted.audio_codes_mask[row].sum(dim=0), expected.audio_codes_mask[0].sum(dim=0)
        flipped = (depths[: len(right)] != right).nonzero().flatten()
        num_flipped += len(flipped)
        assert (trusted.margins[row, 0, flipped] < 4 * noise).all()
    assert num_flipped, "the noise must flip a depth"
    assert 0 < certificate.num_reencoded


def test_a_given_depth_is_never_in_doubt() -> None:
    codec = with_noisy_importance(0.1)
    batch = padded(clips_of(codec))
    margins = codec.encode(*batch, num_quantizers=5, return_margins=True).margins
    codes_alone = codec.quantizer(codec.latents(*batch), return_margins=True).margins
    kept = margins.isfinite()
    assert torch.equal(margins[kept], codes_alone[kept])


# Constant rate


def test_a_shorter_codec_shares_its_weights(codec: VrvqModel) -> None:
    short = codec.with_num_quantizers(3)
    assert short.facts.codebook_sizes == (64,) * 3 and not short.facts.variable_depth
    assert short.encode_options == () and codec.encode_options
    assert codec.facts.variable_depth and codec.config.num_quantizers is None
    assert next(short.parameters()) is next(codec.parameters())
    assert short.facts.receptive_field_samples < codec.facts.receptive_field_samples
    [wave] = clips_of(codec, [20])
    output, whole = short.encode(*alone(wave)), codec.encode(*alone(wave), num_quantizers=3)
    assert output.audio_codes.shape[1] == 3 and output.importance is None
    assert torch.equal(output.audio_codes, whole.audio_codes[:, :3])
    assert torch.equal(short.decode(output), codec.decode(whole))
    assert torch.equal(short.encode(*alone(wave), num_quantizers=2).audio_codes, output.audio_codes[:, :2])
    assert float(short.bits_per_second(output)) == 3 * 6 * 1000
    assert short.with_num_quantizers(None).facts == codec.facts
    for illegal in (0, 9, 1.5, True):
        with pytest.raises(ConfigError, match=r"num_quantizers=.*1 to 8"):
            codec.with_num_quantizers(illegal)
    with pytest.raises(OptionError, match='no option "level"'):
        short.encode(*alone(wave), level=1.0)


# Tokenizers


@given(st.integers(1, 60), st.integers(0, 2**32), st.booleans())
def test_ids_carry_every_depth_without_side_information(num_frames: int, seed: int, shallow: bool) -> None:
    tok = VrvqAudioTokenizer(shared_codec("vrvq"))
    rng = np.random.default_rng(seed)
    depths = rng.integers(1, 2 if shallow else 4, num_frames)
    codes = rng.integers(0, 64, (3, num_frames)) * (np.arange(3)[:, None] < depths)
    ids = tok.codes_to_ids(codes, depths)
    assert len(ids) == depths.sum()
    found = tok.layout.ids_to_codes(ids)
    assert np.array_equal(found.codes, codes) and np.array_equal(found.depths, depths)


@given(
    st.floats(0.1, 40), st.sampled_from([{"level": 0.4}, {"level": 2.0}, {"num_quantizers": 2}, {}]), st.integers(0, 99)
)
def test_ids_decode_to_what_the_codec_decodes(hops: float, options: dict[str, Any], seed: int) -> None:
    tok = VrvqAudioTokenizer(shared_codec("vrvq"))
    facts = tok.codec.facts
    wave = clip(facts, max(1, round(hops * facts.hop_length)), seed)
    encoded = tok(wave, facts.sampling_rate, **options)
    with torch.inference_mode():
        output = tok.codec.encode(*alone(wave), **options)
        expected = tok.codec.decode(output)[0]
    assert len(encoded.input_ids) == int(output.audio_codes_mask.sum())
    heard = tok.decode(encoded.input_ids, encoded.audio_lengths)
    torch.testing.assert_close(heard, expected, rtol=0, atol=1e-5)


def test_an_option_of_a_call_replaces_that_of_the_tokenizer(codec: VrvqModel) -> None:
    [wave] = clips_of(codec, [40])
    tok = VrvqAudioTokenizer(codec, options={"level": 0.5})
    rate = tok.sampling_rate
    plain = VrvqAudioTokenizer(codec)
    for options in ({}, {"level": 2.0}, {"bitrate": 20000}, {"num_quantizers": 2}):
        expected = plain(wave, rate, **(options or {"level": 0.5})).input_ids
        assert tok(wave, rate, **options).input_ids == expected
    with pytest.raises(OptionError, match="exclude each other"):
        tok(wave, rate, level=1, bitrate=20000)
    with pytest.raises(OptionError, match="exclude each other"):
        VrvqAudioTokenizer(codec, options={"level": 1, "num_quantizers": 2})


def test_options_are_saved(codec: VrvqModel, tmp_path: Path) -> None:
    [wave] = clips_of(codec, [40])
    tok = VrvqAudioTokenizer(codec, options={"bitrate": 20000})
    tok.save_pretrained(tmp_path / "x")
    loaded = AutoAudioTokenizer.from_pretrained(tmp_path / "x")
    assert isinstance(loaded, VrvqAudioTokenizer)
    assert loaded.fingerprint == tok.fingerprint
    assert loaded(wave, tok.sampling_rate).input_ids == tok(wave, tok.sampling_rate).input_ids


def test_a_long_recording_meets_its_bitrate_as_a_whole(
    tok: VrvqAudioTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Window by window, in one pass: the same ids as at once, and the rate is that of the whole."""
    codec, rate = tok.codec, tok.sampling_rate
    frame_s = codec.facts.hop_length / rate
    wave = clip(codec.facts, 400 * codec.facts.hop_length + 3)
    wave[:, : wave.shape[1] // 2] *= 0.02  # each half alone would need another level
    for options in ({"bitrate": 20000}, {"level": 1.5}, {"num_quantizers": 4}):
        [whole] = tok.encode_audio([wave], rate, chunk_length_s=1000.0, **options)
        [found] = tok.encode_audio([wave], rate, chunk_length_s=50 * frame_s, **options)
        monkeypatch.setattr(encoding_module, "DEFAULT_WINDOW_S", 30 * frame_s)
        [unasked] = tok.encode_audio([wave], rate, **options)
        monkeypatch.undo()
        for one in (found, unasked):
            assert np.array_equal(one.depths, whole.depths)
            assert np.array_equal(one.codes, whole.codes)
            assert one.audio_length == wave.shape[1]
    mean_depth = tok.encode_audio([wave], rate, chunk_length_s=50 * frame_s, bitrate=20000)[0].depths.mean()
    assert codec.rate.bits_per_second(mean_depth) == pytest.approx(20000, rel=TOLERANCE)


def test_a_tokenizer_of_constant_rate_has_every_layout(codec: VrvqModel, tmp_path: Path) -> None:
    [wave] = clips_of(codec, [20])
    tok = VrvqAudioTokenizer(codec, layout="delay", options={"num_quantizers": 3})
    assert tok.codec.facts.num_codebooks == 3 and tok.options == {}
    assert tok.vocab_size == 3 * 64 + 3
    encoded = tok(wave, tok.sampling_rate)
    assert np.array(encoded.input_ids).shape == (3, 22)
    tok.save_pretrained(tmp_path / "x")
    loaded = AutoAudioTokenizer.from_pretrained(tmp_path / "x")
    assert loaded.fingerprint == tok.fingerprint
    assert loaded(wave, tok.sampling_rate).input_ids == encoded.input_ids
    assert AutoAudioTokenizer.from_pretrained(tmp_path / "x", num_quantizers=2).codec.facts.num_codebooks == 2
    constant = VrvqAudioTokenizer(shared_codec("vrvq_constant"), options={"num_quantizers": 2})
    assert constant.layout.name == "interleaved" and constant.codec.facts.num_codebooks == 2
    with pytest.raises(OptionError, match='no option "num_quantizers"'):
        constant(wave, constant.sampling_rate, num_quantizers=1)


def test_another_layout_makes_a_constant_rate_of_a_default(codec: VrvqModel) -> None:
    tok = VrvqAudioTokenizer(codec, options={"num_quantizers": 3})
    assert tok.layout.name == "variable" and tok.codec.facts.num_codebooks == 8
    flat = tok.with_layout("interleaved")
    assert flat.codec.facts.num_codebooks == 3
    [wave] = clips_of(codec, [20])
    ids = [np.array(one(wave, one.sampling_rate).input_ids) for one in (tok, flat)]
    assert np.array_equal(ids[0], ids[1]), "the same codes in the same places"


# Odd strides


@pytest.fixture(scope="module")
def odd() -> VrvqModel:
    return new_codec("vrvq", downsampling_ratios=[3, 5], upsampling_ratios=[5, 3], hidden_size=None)


def test_odd_strides_cost_samples_and_lose_none(odd: VrvqModel) -> None:
    facts = odd.facts
    assert facts.hop_length == 15 and facts.tail_samples == 15 - (3 * (5 - 1) - 1)
    for num_samples in (1, 11, 12, 15, 26, 27, 150, 151):
        output = odd.encode(*alone(clip(facts, num_samples)))
        assert output.audio_codes.shape[-1] == facts.num_frames(num_samples)
        audio = odd.decode(output)
        assert audio.shape == (1, 1, num_samples)
        output.audio_lengths = None
        assert odd.decode(output).shape[-1] == facts.num_samples(facts.num_frames(num_samples))


def test_odd_strides_do_not_leak(odd: VrvqModel) -> None:
    clips = clips_of(odd, [10, 3.3, 17.9, 1.01, 0.1])
    changed = new_codec("vrvq", downsampling_ratios=[3, 5], upsampling_ratios=[5, 3], hidden_size=None)
    with double_precision(changed) as codec, torch.inference_mode():
        values, mask = padded(clips, extra=20)
        together = codec.encode(values.double(), mask)
        audio = codec.decode(together)
        for row, wave in enumerate(clips):
            single = codec.encode(alone(wave)[0].double(), alone(wave)[1])
            assert true_codes(together, codec.facts, row) == true_codes(single, codec.facts, 0)
            expected = codec.decode(single)[0]
            assert relative_difference(audio[row, :, : wave.shape[1]], expected) < 1e-9


def test_odd_strides_decode_in_windows(odd: VrvqModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = VrvqAudioTokenizer(odd)
    wave, rate = clip(odd.facts, 1500), tok.sampling_rate
    encoded = tok(wave, rate)
    whole = tok.decode(encoded.input_ids, encoded.audio_lengths)
    monkeypatch.setattr(encoding_module, "DEFAULT_WINDOW_S", 12 * 15 / rate)
    assert len(list(tok.decode_blocks(encoded.input_ids, encoded.audio_lengths))) > 5
    torch.testing.assert_close(tok.decode(encoded.input_ids, encoded.audio_lengths), whole, rtol=0, atol=1e-5)
    assert tok(wave, rate).input_ids == encoded.input_ids
