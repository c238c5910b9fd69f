"""APCodec's feature extractor: mono waveforms, padded to whole frames. The spectra belong to the model."""

from __future__ import annotations

from typing import Any

from audiotok.features import CodecFeatureExtractor


class ApCodecFeatureExtractor(CodecFeatureExtractor):
    """`CodecFeatureExtractor` with the released 48 kHz model's rate and hop; see there for the arguments."""

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 48000,
        padding_value: float = 0.0,
        hop_length: int = 320,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, hop_length, **kwargs)
