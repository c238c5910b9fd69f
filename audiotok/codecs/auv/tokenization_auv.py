"""The tokenizer of AUV: `AudioTokenizer` with `domain=`."""

from __future__ import annotations

from audiotok.codecs.auv.feature_extraction_auv import AuvFeatureExtractor
from audiotok.codecs.auv.modeling_auv import AuvModel
from audiotok.tokenizer import AudioTokenizer


class AuvAudioTokenizer(AudioTokenizer):
    """`AudioTokenizer` of an `AuvModel`.

    Options of `__call__`, or of `from_pretrained` as defaults:
        domain: restrict codes to the range of a domain: "speech" (13 bits a code), "vocal", "music", "audio"
            (general sound), "other", "all" in the released model; one name, or a list of one a clip. Without it
            every clip may use the whole codebook, as in the published `encode`.
    """

    codec_class = AuvModel
    feature_extractor_class = AuvFeatureExtractor
