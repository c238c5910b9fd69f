"""The tokenizer of APCodec: `AudioTokenizer` with `num_quantizers=` and `phase=`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audiotok.codecs.apcodec.feature_extraction_apcodec import ApCodecFeatureExtractor
from audiotok.codecs.apcodec.modeling_apcodec import ApCodecModel
from audiotok.features import CodecFeatureExtractor
from audiotok.tokenizer import AudioTokenizer


class ApCodecAudioTokenizer(AudioTokenizer):
    """`AudioTokenizer` of an `ApCodecModel`.

    Options of `from_pretrained` (or of the constructor):
        num_quantizers: codes a frame, the coarse ones. It decides the vocabulary and the layouts, so it holds for all
            recordings; it becomes part of the codec's config, and is saved there.

    Options of `__call__`, or of `from_pretrained` as defaults:
        phase: "settled" (the default) or "published": how the phase of bins that rounding decides is taken, one for
            all clips or a list of one a clip. Settled ids are the same on every machine; published ones are those of
            the published code run on the same machine. The causal variant knows no such option.
    """

    codec_class = ApCodecModel
    feature_extractor_class = ApCodecFeatureExtractor

    def __init__(
        self,
        codec: ApCodecModel,
        feature_extractor: CodecFeatureExtractor | None = None,
        layout: str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> None:
        options = dict(options or {})
        if (count := options.pop("num_quantizers", None)) is not None:
            codec = codec.with_num_quantizers(count)
        super().__init__(codec, feature_extractor, layout, options, name)
