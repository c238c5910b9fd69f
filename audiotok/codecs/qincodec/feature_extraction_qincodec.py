"""QinCodec's feature extractor: mono waveforms at 44.1 kHz, padded to whole frames. The spectra belong to the model."""

from __future__ import annotations

from typing import Any

from audiotok.features import CodecFeatureExtractor


class QinCodecFeatureExtractor(CodecFeatureExtractor):
    """`CodecFeatureExtractor` with our 44.1 kHz design's rate and hop; see there for the arguments."""

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 44100,
        padding_value: float = 0.0,
        hop_length: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, hop_length, **kwargs)
