"""QinCodec: an autoencoder without codes, then QINCo2 on its latents; up to 24 codes a frame at 44.1 kHz."""

from audiotok.codecs.qincodec.configuration_qincodec import QinCodecConfig
from audiotok.codecs.qincodec.feature_extraction_qincodec import QinCodecFeatureExtractor
from audiotok.codecs.qincodec.modeling_qincodec import QinCodecModel
from audiotok.codecs.qincodec.tokenization_qincodec import QinCodecAudioTokenizer

__all__ = ["QinCodecAudioTokenizer", "QinCodecConfig", "QinCodecFeatureExtractor", "QinCodecModel"]
