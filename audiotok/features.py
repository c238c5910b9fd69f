"""Waveforms → what a codec takes: padded `input_values` and the mask of the true samples.

Shapes: B clips, C channels, N samples. This is a transformers `SequenceFeatureExtractor`: it is saved and loaded
beside the model, and its inherited `pad` collates single clips as it does for other models.
"""

from __future__ import annotations

import inspect
import numbers
from typing import Any, ClassVar

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType, logging

from audiotok.errors import ConfigError, EmptyAudioError, OptionError, SamplingRateError, did_you_mean
from audiotok.waveforms import FloatArray, as_samples, channel_map, check_sampling_rate

logger = logging.get_logger(__name__)


class CodecFeatureExtractor(SequenceFeatureExtractor):
    """Check, batch and pad waveforms for a codec.

    Args:
        feature_size: channels that the codec takes.
        sampling_rate: that the codec takes, Hz. Nothing is resampled here.
        padding_value: written behind the end of the shorter clips.
        hop_length: samples per frame; a batch is padded to a multiple of it.
        kwargs: what transformers keeps in every extractor (`return_attention_mask`, ...).

    Raises:
        ConfigError, SamplingRateError: a key is unknown, or a value is not legal.
    """

    model_input_names: ClassVar[list[str]] = ["input_values", "padding_mask"]

    # What transformers writes into preprocessor_config.json by itself.
    _foreign_keys: ClassVar[frozenset[str]] = frozenset(
        {"auto_map", "feature_extractor_type", "padding_side", "processor_class", "return_attention_mask"}
    )

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        hop_length: int = 320,
        **kwargs: Any,
    ) -> None:
        self._check_keys(kwargs)
        for name, value in (("feature_size", feature_size), ("hop_length", hop_length)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not legal: give a whole number from 1.")
        if kwargs.get("padding_side", "right") != "right":
            raise ConfigError(
                f"padding_side={kwargs['padding_side']!r} is not legal: frames are counted from the first sample, so "
                'only "right" is.'
            )
        super().__init__(
            feature_size=feature_size,
            sampling_rate=check_sampling_rate(sampling_rate),
            padding_value=padding_value,
            **kwargs,
        )
        self.hop_length = hop_length

    def __call__(
        self,
        raw_audio: Any,
        padding: bool | str | PaddingStrategy | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | TensorType | None = None,
        sampling_rate: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """One clip or a batch of clips, as a codec takes them.

        Args:
            raw_audio: one clip, `[N]` or `[C, N]` of floats at the codec's rate (array, tensor, or `[N]` as a
                list), or a list of clips (arrays, tensors, lists).
            padding: None or True ("longest") pads to the longest clip, "max_length" to `max_length`; either then to
                a multiple of `pad_to_multiple_of`. False leaves lengths as they are.
            truncation: cut clips to `max_length` samples; not together with an explicit `padding`.
            max_length: in samples.
            return_tensors: "pt" or "np" stacks the clips; None returns lists of arrays.
            sampling_rate: of the clips, Hz; without it only a warning can be given.
            pad_to_multiple_of: None means `hop_length`; 1 pads no further than the longest clip.

        Returns:
            `input_values` `[B, C, N]` float32 and `padding_mask` `[B, N]` int32: 1 where a sample belongs to the
            clip, 0 where it is padding.

        Raises:
            SamplingRateError: the clips have another rate than the codec.
            AudioInputError: a subclass, for what is wrong with a clip.
            OptionError: arguments that are not legal, or not together.
        """
        self._check_rate(sampling_rate)
        if padding and truncation:
            raise OptionError(
                f"padding={padding!r} and truncation=True exclude each other: set one of them (clips that are cut "
                "are padded to the longest by themselves)."
            )
        clips = [self._checked(clip) for clip in _clips_of(raw_audio)]
        if truncation:
            clips = _cut(clips, max_length)
        padded = self.pad(
            # The base class pads the first axis: [N] for mono, [N, C] otherwise.
            BatchFeature({"input_values": [clip[0] if self.feature_size == 1 else clip.T for clip in clips]}),
            padding=True if padding is None else padding,
            max_length=max_length,
            pad_to_multiple_of=self.hop_length if pad_to_multiple_of is None else pad_to_multiple_of,
            return_attention_mask=True,
        )
        # A copy, so that nobody who works in place on a batch changes the caller's array.
        values = [np.array(np.atleast_2d(clip.T), np.float32, order="C") for clip in padded["input_values"]]
        features = BatchFeature({"input_values": values, "padding_mask": list(padded["attention_mask"])})
        return features if return_tensors is None else features.convert_to_tensors(return_tensors)

    def _check_keys(self, keys: dict[str, Any]) -> None:
        named = set(inspect.signature(type(self).__init__).parameters) - {"self", "kwargs"}
        known = named | self._foreign_keys
        for key in keys:
            if key not in known and not key.startswith("_"):
                raise ConfigError(
                    f'{type(self).__name__} knows no key "{key}".{did_you_mean(key, known)} Legal keys: '
                    f"{', '.join(sorted(known))}."
                )

    def _check_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning_once(
                f"{type(self).__name__} was called without sampling_rate, so it cannot check that the audio is at "
                f"{self.sampling_rate} Hz; audio at another rate gives wrong codes."
            )
        elif check_sampling_rate(sampling_rate) != self.sampling_rate:
            raise SamplingRateError(
                f"sampling_rate={sampling_rate} is not the codec's: it takes {self.sampling_rate} Hz. Resample the "
                f"audio first, for example with audiotok.audio.load_audio(..., target_rate={self.sampling_rate})."
            )

    def _checked(self, clip: Any) -> FloatArray:
        samples = as_samples(clip, channels=self.feature_size)
        channel_map(len(samples), self.feature_size)  # refuses other counts
        return samples


def _cut(clips: list[FloatArray], max_length: int | None) -> list[FloatArray]:
    """The first `max_length` samples of each clip; `pad` would round that up to the multiple first."""
    if not isinstance(max_length, int) or max_length < 1:
        raise OptionError(f"max_length={max_length!r} is not legal with truncation=True: give 1 or more samples.")
    return [clip[:, :max_length] for clip in clips]


def _clips_of(raw_audio: Any) -> list[Any]:
    """The clips of a batch: a list whose first element is a number is one clip, another list is a batch."""
    if not isinstance(raw_audio, list | tuple):
        return [raw_audio]
    if not raw_audio:
        raise EmptyAudioError("The list of clips is empty: give at least one clip.")
    first = raw_audio[0]
    is_number = isinstance(first, numbers.Real) or getattr(first, "ndim", 1) == 0
    return [raw_audio] if is_number else list(raw_audio)
