"""MelCap's feature extractor: mono waveforms at 44.1 kHz, padded to whole columns. The log-mels belong to the model."""

from __future__ import annotations

from typing import Any

from audiotok.features import CodecFeatureExtractor


class MelCapFeatureExtractor(CodecFeatureExtractor):
    """`CodecFeatureExtractor` with the released model's rate and hop; see there for the arguments.

    Its mask says where each clip ends, so that `MelCapModel.encode` gives codes for all of it: the published code
    loses up to 1791 samples.
    """

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 44100,
        padding_value: float = 0.0,
        hop_length: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, hop_length, **kwargs)
