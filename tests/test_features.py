"""The feature extractor: what a codec gets, and what transformers expects of every sequence feature extractor."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor, BatchFeature, SequenceFeatureExtractor

from audiotok import features
from audiotok.errors import (
    AudioShapeError,
    ChannelError,
    ConfigError,
    EmptyAudioError,
    IntegerAudioError,
    MissingSamplingRateError,
    NonFiniteAudioError,
    OptionError,
    SamplingRateError,
)
from audiotok.features import CodecFeatureExtractor

RATE = 16_000


def clip(samples: int, channels: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (samples,) if channels is None else (channels, samples)
    return np.random.default_rng(seed).uniform(0.1, 1, shape).astype(np.float32)


@pytest.fixture
def extractor() -> CodecFeatureExtractor:
    return CodecFeatureExtractor()


# Calls


class TestCall:
    def test_pads_to_whole_frames(self, extractor):
        clips = [clip(1000), clip(2345)]
        batch = extractor(clips, sampling_rate=RATE, return_tensors="np")
        assert batch.input_values.shape == (2, 1, 2560) and batch.input_values.dtype == np.float32
        assert batch.padding_mask.shape == (2, 2560) and batch.padding_mask.dtype == np.int32
        assert set(batch) == {"input_values", "padding_mask"} == set(extractor.model_input_names)
        for values, mask, samples in zip(batch.input_values, batch.padding_mask, clips, strict=True):
            np.testing.assert_array_equal(values[0, : len(samples)], samples)
            assert not values[0, len(samples) :].any()
            assert mask[: len(samples)].all() and not mask[len(samples) :].any()

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda x: x,
            lambda x: x.astype(np.float64),
            lambda x: x.tolist(),
            lambda x: tuple(x.tolist()),
            lambda x: x[None],
            lambda x: torch.from_numpy(x),
            lambda x: torch.from_numpy(x)[None],
            lambda x: [x],
            lambda x: [x[None]],
            lambda x: (x,),
            lambda x: [x.tolist()],
            lambda x: [torch.from_numpy(x)],
            lambda x: list(torch.from_numpy(x)),
        ],
    )
    def test_one_clip_in_any_container(self, extractor, wrap):
        samples = clip(700)
        batch = extractor(wrap(samples), sampling_rate=RATE, return_tensors="np")
        assert batch.input_values.shape == (1, 1, 960)
        np.testing.assert_array_equal(batch.input_values[0, 0, :700], samples)
        assert batch.padding_mask.sum() == 700

    def test_batch_in_any_container(self, extractor):
        clips = [clip(800), clip(1000), clip(1200)]
        expected = extractor(clips, sampling_rate=RATE, return_tensors="np")
        mixed = [clips[0].tolist(), torch.from_numpy(clips[1]), clips[2][None]]
        for batch in ([c.tolist() for c in clips], [torch.from_numpy(c) for c in clips], mixed):
            result = extractor(batch, sampling_rate=RATE, return_tensors="np")
            np.testing.assert_array_equal(result.input_values, expected.input_values)
            np.testing.assert_array_equal(result.padding_mask, expected.padding_mask)

    @given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=5))
    def test_batch_equals_alone(self, lengths):
        extractor = CodecFeatureExtractor(hop_length=64)
        clips = [clip(length, seed=length) for length in lengths]
        batch = extractor(clips, sampling_rate=RATE, return_tensors="np")
        assert batch.padding_mask.sum(axis=1).tolist() == lengths
        for samples, values, mask in zip(clips, batch.input_values, batch.padding_mask, strict=True):
            alone = extractor(samples, sampling_rate=RATE, return_tensors="np")
            width = alone.input_values.shape[2]
            assert width == -(-len(samples) // 64) * 64
            np.testing.assert_array_equal(values[:, :width], alone.input_values[0])
            np.testing.assert_array_equal(mask[:width], alone.padding_mask[0])
            assert not values[:, width:].any() and not mask[width:].any()

    def test_stereo(self):
        extractor = CodecFeatureExtractor(feature_size=2)
        clips = [clip(300, 2), clip(500, 2), clip(2, 2), clip(1, 2)]
        batch = extractor(clips, sampling_rate=RATE, return_tensors="pt")
        assert batch.input_values.shape == (4, 2, 640)
        for values, samples in zip(batch.input_values, clips, strict=True):
            np.testing.assert_array_equal(values[:, : samples.shape[1]], samples)
        assert batch.padding_mask.sum(dim=1).tolist() == [300, 500, 2, 1]

    def test_torch_tensors(self, extractor):
        batch = extractor([clip(5), clip(7)], sampling_rate=RATE, return_tensors="pt")
        assert batch.input_values.dtype == torch.float32 and batch.padding_mask.dtype == torch.int32
        assert batch.input_values.shape == (2, 1, 320)

    def test_lists_without_return_tensors(self, extractor):
        batch = extractor([clip(5), clip(700)], sampling_rate=RATE)
        assert [values.shape for values in batch.input_values] == [(1, 960), (1, 960)]
        assert [mask.shape for mask in batch.padding_mask] == [(960,), (960,)]

    def test_no_padding(self, extractor):
        batch = extractor([clip(5), clip(700)], padding=False, sampling_rate=RATE)
        assert [values.shape for values in batch.input_values] == [(1, 5), (1, 700)]
        assert [int(mask.sum()) for mask in batch.padding_mask] == [5, 700]
        assert extractor(clip(5), padding=False, sampling_rate=RATE, return_tensors="pt").input_values.shape == (
            1,
            1,
            5,
        )
        with pytest.raises(ValueError, match="padding=True"):
            extractor([clip(5), clip(700)], padding=False, sampling_rate=RATE, return_tensors="pt")

    def test_pad_to_multiple_of(self, extractor):
        for multiple, width in ((1, 700), (7, 700), (512, 1024), (None, 960)):
            batch = extractor(clip(700), pad_to_multiple_of=multiple, sampling_rate=RATE, return_tensors="np")
            assert batch.input_values.shape == (1, 1, width)

    def test_padding_to_max_length(self, extractor):
        options = {"padding": "max_length", "sampling_rate": RATE, "return_tensors": "np"}
        assert extractor(clip(700), max_length=1500, **options).input_values.shape == (1, 1, 1600)
        assert extractor(clip(700), max_length=1500, pad_to_multiple_of=1, **options).input_values.shape == (1, 1, 1500)

    def test_truncation(self, extractor):
        """To `max_length` itself, not to the multiple above it; the rest of the frame is padding."""
        clips = [clip(500), clip(2000)]
        batch = extractor(clips, truncation=True, max_length=1000, sampling_rate=RATE, return_tensors="np")
        assert batch.input_values.shape == (2, 1, 1280)
        assert batch.padding_mask.sum(axis=1).tolist() == [500, 1000]
        assert not batch.input_values[1, 0, 1000:].any()

    def test_padding_value(self):
        extractor = CodecFeatureExtractor(padding_value=-1.0)
        batch = extractor([clip(3), clip(320)], sampling_rate=RATE, return_tensors="np")
        assert (batch.input_values[0, 0, 3:] == -1).all()

    def test_result_shares_no_memory(self, extractor):
        samples = clip(320)
        before = samples.copy()
        extractor(samples, sampling_rate=RATE).input_values[0][:] = 0
        for values in extractor([samples, samples[:10]], padding=False, sampling_rate=RATE).input_values:
            values[:] = 0
        np.testing.assert_array_equal(samples, before)


class TestRate:
    def test_wrong_rate(self, extractor):
        with pytest.raises(SamplingRateError, match=r"sampling_rate=44100 .* takes 16000 Hz.*target_rate=16000"):
            extractor(clip(10), sampling_rate=44_100)

    def test_missing_rate_warns_once(self, extractor, monkeypatch):
        messages = []
        monkeypatch.setattr(features.logger, "warning", messages.append)
        extractor.sampling_rate = 22_050  # a message of its own: other tests have used up the usual one
        for _ in range(3):
            extractor(clip(10))
        assert len(messages) == 1
        assert "without sampling_rate" in messages[0] and "22050 Hz" in messages[0]


@pytest.mark.parametrize(
    ("audio", "error", "message"),
    [
        ([], EmptyAudioError, "list of clips is empty"),
        (np.zeros(0, np.float32), EmptyAudioError, "no samples"),
        ([np.zeros(5), np.zeros(0)], EmptyAudioError, "no samples"),
        (np.zeros(5, np.int16), IntegerAudioError, "int16"),
        ([0, 1, 2], IntegerAudioError, "full scale"),
        (np.array([0.0, np.nan]), NonFiniteAudioError, "1 of the 2 values.*at sample 1"),
        (np.zeros((2, 100)), ChannelError, "2 channels where 1 is wanted"),
        (np.zeros((64, 100)), ChannelError, "a list of clips if this is a batch"),
        (np.zeros((100, 1)), AudioShapeError, r"\[100, 1\] looks like \[samples, channels\]"),
        (np.zeros((3, 1, 100)), AudioShapeError, "several clips as a list"),
    ],
)
def test_bad_clips(extractor, audio, error, message):
    with pytest.raises(error, match=message):
        extractor(audio, sampling_rate=RATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": True}, "max_length=None is not legal with truncation=True"),
        ({"truncation": True, "max_length": 0}, "max_length=0 is not legal"),
        ({"truncation": True, "max_length": 5, "padding": True}, "exclude each other"),
    ],
)
def test_bad_options(extractor, options, message):
    with pytest.raises(OptionError, match=message):
        extractor(clip(10), sampling_rate=RATE, **options)


# Construction, saving, loading


class TestConfiguration:
    def test_defaults(self):
        extractor = CodecFeatureExtractor()
        assert isinstance(extractor, SequenceFeatureExtractor)
        assert (extractor.feature_size, extractor.sampling_rate, extractor.padding_value) == (1, 16_000, 0.0)
        assert extractor.hop_length == 320

    def test_json(self, tmp_path):
        extractor = CodecFeatureExtractor(feature_size=2, sampling_rate=24_000, hop_length=75)
        fields = json.loads(extractor.to_json_string())
        assert (fields["feature_size"], fields["sampling_rate"], fields["hop_length"]) == (2, 24_000, 75)
        extractor.to_json_file(tmp_path / "extractor.json")
        assert CodecFeatureExtractor.from_json_file(tmp_path / "extractor.json").to_dict() == extractor.to_dict()

    def test_save_and_load(self, tmp_path):
        extractor = CodecFeatureExtractor(sampling_rate=24_000, hop_length=75, padding_value=0.5)
        extractor.save_pretrained(tmp_path)
        assert CodecFeatureExtractor.from_pretrained(tmp_path).to_dict() == extractor.to_dict()
        changed = CodecFeatureExtractor.from_pretrained(tmp_path, hop_length=80)
        assert (changed.hop_length, changed.sampling_rate) == (80, 24_000)

    def test_auto_class(self, tmp_path):
        class LocalFeatureExtractor(CodecFeatureExtractor):
            pass

        AutoFeatureExtractor.register("local-codec", LocalFeatureExtractor, exist_ok=True)
        extractor = LocalFeatureExtractor(hop_length=75)
        extractor.save_pretrained(tmp_path)
        loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
        assert type(loaded) is LocalFeatureExtractor and loaded.to_dict() == extractor.to_dict()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"hop_lenght": 75}, ConfigError, 'no key "hop_lenght". Did you mean "hop_length"'),
            ({"hop_length": 0}, ConfigError, "hop_length=0 is not legal"),
            ({"feature_size": 1.5}, ConfigError, "feature_size=1.5 is not legal"),
            ({"padding_side": "left"}, ConfigError, "padding_side='left' is not legal"),
            ({"sampling_rate": 0}, SamplingRateError, "sampling_rate=0 is not legal"),
            ({"sampling_rate": None}, MissingSamplingRateError, "missing"),
        ],
    )
    def test_illegal_values(self, options, error, message):
        with pytest.raises(error, match=message):
            CodecFeatureExtractor(**options)


# The inherited `pad`, as data collators call it


class TestPad:
    lengths = tuple(range(400, 2000, 266))

    @pytest.fixture(params=["lists", "arrays"])
    def processed(self, request) -> BatchFeature:
        clips = [clip(length) for length in self.lengths]
        return BatchFeature({"input_values": [c.tolist() for c in clips] if request.param == "lists" else clips})

    def test_do_not_pad(self, extractor, processed):
        padded = extractor.pad(processed, padding=False)
        assert [len(values) for values in padded.input_values] == list(self.lengths)

    def test_longest(self, extractor, processed):
        padded = extractor.pad(processed, padding="longest", return_tensors="np")
        assert padded.input_values.shape == (len(self.lengths), max(self.lengths))
        for values, length in zip(padded.input_values, self.lengths, strict=True):
            np.testing.assert_array_equal(values[:length], clip(length))
            assert not values[length:].any()

    def test_longest_equals_max_length(self, extractor, processed):
        longest = extractor.pad(processed, padding="longest")["input_values"]
        to_length = extractor.pad(processed, padding="max_length", max_length=max(self.lengths))["input_values"]
        np.testing.assert_array_equal(longest, to_length)
        wider = extractor.pad(processed, padding="max_length", max_length=2500, return_tensors="np")
        assert wider.input_values.shape[1] == 2500

    def test_max_length_is_needed(self, extractor, processed):
        with pytest.raises(ValueError, match="max_length"):
            extractor.pad(processed, padding="max_length")
        with pytest.raises(ValueError, match="max_length"):
            extractor.pad(processed, padding="longest", truncation=True)

    def test_multiple(self, extractor, processed):
        for options, width in (({}, 2000), ({"padding": "max_length", "max_length": 2001}, 2010)):
            padded = extractor.pad(processed, pad_to_multiple_of=10, return_tensors="np", **options)
            assert padded.input_values.shape[1] == width

    def test_truncation(self, extractor, processed):
        options = {"padding": "max_length", "max_length": self.lengths[1]}
        cut = extractor.pad(processed, truncation=True, return_tensors="np", **options)
        assert cut.input_values.shape == (len(self.lengths), self.lengths[1])
        assert len({len(values) for values in extractor.pad(processed, **options).input_values}) > 1
        rounded = extractor.pad(processed, truncation=True, pad_to_multiple_of=12, return_tensors="np", **options)
        assert rounded.input_values.shape[1] == 672  # transformers rounds max_length 666 up here

    def test_numpy_equals_torch(self, extractor, processed):
        as_numpy = extractor.pad(processed, padding="longest", return_tensors="np")
        as_torch = extractor.pad(processed, padding="longest", return_tensors="pt")
        np.testing.assert_array_equal(as_numpy.input_values, as_torch.input_values.numpy())

    def test_attention_mask(self, extractor, processed):
        padded = extractor.pad(processed, padding="longest", return_attention_mask=True, return_tensors="np")
        assert padded.attention_mask.shape == padded.input_values.shape
        assert padded.attention_mask.sum(axis=1).tolist() == list(self.lengths)

    def test_attention_mask_with_truncation(self, extractor, processed):
        shortest = min(self.lengths)
        padded = extractor.pad(
            processed, padding="max_length", max_length=shortest, truncation=True, return_tensors="np"
        )
        assert padded.attention_mask.sum(axis=1).tolist() == [shortest] * len(self.lengths)

    def test_double_precision_becomes_single(self, extractor):
        samples = clip(100).astype(np.float64)
        for inputs in (samples, samples.tolist()):
            assert extractor.pad([{"input_values": inputs}], return_tensors="np").input_values.dtype == np.float32
            assert extractor.pad([{"input_values": inputs}], return_tensors="pt").input_values.dtype == torch.float32
