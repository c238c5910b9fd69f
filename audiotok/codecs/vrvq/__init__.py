"""VRVQ: a Descript Audio Codec at 44.1 kHz that keeps 1 to 8 codebooks a frame, as many as the sound needs."""

from audiotok.codecs.vrvq.configuration_vrvq import VrvqConfig
from audiotok.codecs.vrvq.feature_extraction_vrvq import VrvqFeatureExtractor
from audiotok.codecs.vrvq.modeling_vrvq import VrvqModel
from audiotok.codecs.vrvq.tokenization_vrvq import VrvqAudioTokenizer

__all__ = ["VrvqAudioTokenizer", "VrvqConfig", "VrvqFeatureExtractor", "VrvqModel"]
