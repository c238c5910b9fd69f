"""AUV: one nested codebook of 20,480 entries for speech, vocal, music and sound, 50 codes a second at 16 kHz."""

from audiotok.codecs.auv.configuration_auv import AuvConfig
from audiotok.codecs.auv.feature_extraction_auv import AuvFeatureExtractor
from audiotok.codecs.auv.modeling_auv import AuvModel
from audiotok.codecs.auv.tokenization_auv import AuvAudioTokenizer

__all__ = ["AuvAudioTokenizer", "AuvConfig", "AuvFeatureExtractor", "AuvModel"]
