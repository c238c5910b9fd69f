"""The tokenizer of codecs with `num_quantizers`; see `audiotok.prefixes`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audiotok.features import CodecFeatureExtractor
from audiotok.prefixes import PrefixCodec
from audiotok.tokenizer import AudioTokenizer


class PrefixAudioTokenizer(AudioTokenizer):
    """`AudioTokenizer` whose option `num_quantizers` becomes part of the codec's config, and is saved there.

    Where the depth of frames varies, every call may say the number anew, unless the layout has no room for that.
    """

    def __init__(
        self,
        codec: PrefixCodec,
        feature_extractor: CodecFeatureExtractor | None = None,
        layout: str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> None:
        options = dict(options or {})
        varies = codec.facts.variable_depth and layout in (None, "variable")
        if not varies and (count := options.pop("num_quantizers", None)) is not None:
            codec = codec.with_num_quantizers(count)
        super().__init__(codec, feature_extractor, layout, options, name)
