"""The tokenizer of QinCodec: `AudioTokenizer` with `num_quantizers=`, `beam_size=` and `num_candidates=`."""

from __future__ import annotations

from audiotok.codecs.qincodec.feature_extraction_qincodec import QinCodecFeatureExtractor
from audiotok.codecs.qincodec.modeling_qincodec import QinCodecModel
from audiotok.prefix_tokenizer import PrefixAudioTokenizer


class QinCodecAudioTokenizer(PrefixAudioTokenizer):
    """`AudioTokenizer` of a `QinCodecModel`.

    Options of `from_pretrained` (or of the constructor):
        num_quantizers: codes a frame. It decides the vocabulary and the layouts, so it holds for all recordings; it
            becomes part of the codec's config, and is saved there.

    Options of `__call__`, or of `from_pretrained` as defaults; one value, or a list of one a clip:
        beam_size: partial codes that the search keeps; 1 is the fastest.
        num_candidates: codewords that the search tries for each of them, at most as many as a codebook has; 0 for
            all of these.
    """

    codec_class = QinCodecModel
    feature_extractor_class = QinCodecFeatureExtractor
