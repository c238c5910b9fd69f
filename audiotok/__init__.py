"""audiotok: the tokenizer plugin for generative audio language models.

`import audiotok` loads neither torch nor transformers: names are resolved at first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from audiotok.auto import AutoAudioTokenizer as AutoAudioTokenizer
    from audiotok.auto import register as register
    from audiotok.codec import AudioCodec as AudioCodec
    from audiotok.codec import CodecConfig as CodecConfig
    from audiotok.codec import CodecOutput as CodecOutput
    from audiotok.codec import CodecTrainingOutput as CodecTrainingOutput
    from audiotok.codecs.apcodec import ApCodecAudioTokenizer as ApCodecAudioTokenizer
    from audiotok.codecs.apcodec import ApCodecConfig as ApCodecConfig
    from audiotok.codecs.apcodec import ApCodecFeatureExtractor as ApCodecFeatureExtractor
    from audiotok.codecs.apcodec import ApCodecModel as ApCodecModel
    from audiotok.codecs.auv import AuvAudioTokenizer as AuvAudioTokenizer
    from audiotok.codecs.auv import AuvConfig as AuvConfig
    from audiotok.codecs.auv import AuvFeatureExtractor as AuvFeatureExtractor
    from audiotok.codecs.auv import AuvModel as AuvModel
    from audiotok.codecs.melcap import MelCapAudioTokenizer as MelCapAudioTokenizer
    from audiotok.codecs.melcap import MelCapConfig as MelCapConfig
    from audiotok.codecs.melcap import MelCapFeatureExtractor as MelCapFeatureExtractor
    from audiotok.codecs.melcap import MelCapModel as MelCapModel
    from audiotok.codecs.qincodec import QinCodecAudioTokenizer as QinCodecAudioTokenizer
    from audiotok.codecs.qincodec import QinCodecConfig as QinCodecConfig
    from audiotok.codecs.qincodec import QinCodecFeatureExtractor as QinCodecFeatureExtractor
    from audiotok.codecs.qincodec import QinCodecModel as QinCodecModel
    from audiotok.codecs.vrvq import VrvqAudioTokenizer as VrvqAudioTokenizer
    from audiotok.codecs.vrvq import VrvqConfig as VrvqConfig
    from audiotok.codecs.vrvq import VrvqFeatureExtractor as VrvqFeatureExtractor
    from audiotok.codecs.vrvq import VrvqModel as VrvqModel
    from audiotok.errors import AudioTokError as AudioTokError
    from audiotok.facts import CodecFacts as CodecFacts
    from audiotok.features import CodecFeatureExtractor as CodecFeatureExtractor
    from audiotok.tokenizer import AudioTokenizer as AudioTokenizer
    from audiotok.vocabulary import AudioVocabulary as AudioVocabulary

# Public name -> the module that defines it.
_HOME = {
    "AutoAudioTokenizer": "audiotok.auto",
    "register": "audiotok.auto",
    "AudioCodec": "audiotok.codec",
    "CodecConfig": "audiotok.codec",
    "CodecFacts": "audiotok.facts",
    "CodecOutput": "audiotok.codec",
    "CodecTrainingOutput": "audiotok.codec",
    "AudioTokError": "audiotok.errors",
    "CodecFeatureExtractor": "audiotok.features",
    "AudioTokenizer": "audiotok.tokenizer",
    "AudioVocabulary": "audiotok.vocabulary",
    "ApCodecAudioTokenizer": "audiotok.codecs.apcodec",
    "ApCodecConfig": "audiotok.codecs.apcodec",
    "ApCodecFeatureExtractor": "audiotok.codecs.apcodec",
    "ApCodecModel": "audiotok.codecs.apcodec",
    "AuvAudioTokenizer": "audiotok.codecs.auv",
    "AuvConfig": "audiotok.codecs.auv",
    "AuvFeatureExtractor": "audiotok.codecs.auv",
    "AuvModel": "audiotok.codecs.auv",
    "QinCodecAudioTokenizer": "audiotok.codecs.qincodec",
    "QinCodecConfig": "audiotok.codecs.qincodec",
    "QinCodecFeatureExtractor": "audiotok.codecs.qincodec",
    "QinCodecModel": "audiotok.codecs.qincodec",
    "VrvqAudioTokenizer": "audiotok.codecs.vrvq",
    "VrvqConfig": "audiotok.codecs.vrvq",
    "VrvqFeatureExtractor": "audiotok.codecs.vrvq",
    "VrvqModel": "audiotok.codecs.vrvq",
    "MelCapAudioTokenizer": "audiotok.codecs.melcap",
    "MelCapConfig": "audiotok.codecs.melcap",
    "MelCapFeatureExtractor": "audiotok.codecs.melcap",
    "MelCapModel": "audiotok.codecs.melcap",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'audiotok' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
