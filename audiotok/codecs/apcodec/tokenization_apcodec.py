"""The tokenizer of APCodec: `AudioTokenizer` with `num_quantizers=` and `phase=`."""

from __future__ import annotations

from audiotok.codecs.apcodec.feature_extraction_apcodec import ApCodecFeatureExtractor
from audiotok.codecs.apcodec.modeling_apcodec import ApCodecModel
from audiotok.prefix_tokenizer import PrefixAudioTokenizer


class ApCodecAudioTokenizer(PrefixAudioTokenizer):
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
