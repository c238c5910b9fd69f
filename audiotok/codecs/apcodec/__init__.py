"""APCodec: amplitude and phase spectra coded side by side, at 48 kHz and 16 kHz, and a causal variant for streaming."""

from audiotok.codecs.apcodec.configuration_apcodec import ApCodecConfig
from audiotok.codecs.apcodec.feature_extraction_apcodec import ApCodecFeatureExtractor
from audiotok.codecs.apcodec.modeling_apcodec import ApCodecModel
from audiotok.codecs.apcodec.tokenization_apcodec import ApCodecAudioTokenizer

__all__ = ["ApCodecAudioTokenizer", "ApCodecConfig", "ApCodecFeatureExtractor", "ApCodecModel"]
