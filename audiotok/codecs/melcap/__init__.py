"""MelCap: one codebook of 8192 entries on a two-dimensional log-mel grid, 258 codes a second at 44.1 kHz."""

from audiotok.codecs.melcap.configuration_melcap import MelCapConfig
from audiotok.codecs.melcap.feature_extraction_melcap import MelCapFeatureExtractor
from audiotok.codecs.melcap.modeling_melcap import MelCapModel
from audiotok.codecs.melcap.tokenization_melcap import MelCapAudioTokenizer, from_row_major, to_row_major

__all__ = [
    "MelCapAudioTokenizer",
    "MelCapConfig",
    "MelCapFeatureExtractor",
    "MelCapModel",
    "from_row_major",
    "to_row_major",
]
