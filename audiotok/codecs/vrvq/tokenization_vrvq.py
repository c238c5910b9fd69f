"""The tokenizer of VRVQ: `AudioTokenizer` with `level=`, `bitrate=` and `num_quantizers=`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from audiotok.audio import AudioStream
from audiotok.codec import CodecOutput
from audiotok.codecs.vrvq.feature_extraction_vrvq import VrvqFeatureExtractor
from audiotok.codecs.vrvq.modeling_vrvq import VrvqModel
from audiotok.encoding import ClipCodes, ClipEncoder
from audiotok.prefix_tokenizer import PrefixAudioTokenizer


class VrvqClipEncoder(ClipEncoder):
    """`ClipEncoder` that meets a bitrate over a whole recording, also where it is encoded window by window."""

    codec: VrvqModel
    # Importance of the frames seen so far, while a long recording is read whose depths wait for the last of them.
    _seen: list[np.ndarray] | None = None

    def _encode_long(
        self,
        stream: AudioStream,
        head: np.ndarray,
        options: dict[str, Any],
        watch: Callable[[int, int | None], None],
    ) -> ClipCodes:
        """Codes do not depend on the depth: all are kept until the importance of every frame is known."""
        if (bitrate := options.get("bitrate")) is None:
            return super()._encode_long(stream, head, options, watch)
        books = self.codec.config.num_codebooks
        self._seen = seen = []
        try:
            clip = super()._encode_long(stream, head, {"num_quantizers": books}, watch)
        finally:
            self._seen = None
        importance = torch.from_numpy(np.concatenate(seen)).to(self.codec.device)
        depths = self.codec.depths_for_bitrate(importance, bitrate).cpu().numpy()
        codes = np.where(np.arange(books)[:, None] < depths, clip.codes, 0)
        return replace(clip, codes=codes, depths=depths)

    def _clip(self, output: CodecOutput, row: int, num_frames: int | None = None) -> ClipCodes:
        if self._seen is not None:
            assert output.importance is not None  # a codec of variable depth says it
            self._seen.append(output.importance[row, :num_frames].cpu().numpy())
        return super()._clip(output, row, num_frames)


class VrvqAudioTokenizer(PrefixAudioTokenizer):
    """`AudioTokenizer` of a `VrvqModel`.

    Options of `__call__`, or of `from_pretrained` as defaults; one value, or a list of one a clip. At most one of them
    counts for a clip: one given in a call takes the place of a default.
        level: depth of all frames, from 0 (one book each) over 1 (the default) to 64; training goes from 0.125 to 6.
        bitrate: bits per second that each recording takes, depths counted (3 bits a frame), within 2 %. Recordings
            that cannot meet it are refused with what they can.
        num_quantizers: every frame has this many books.
    A codec of constant rate takes none of these in a call. `num_quantizers` given to `from_pretrained` (or to the
    constructor) decides its vocabulary and layouts and is saved in its config; together with another layout than
    `variable` it makes a codec of constant rate of one that varies.

    Ids come frame by frame, coarse to fine, and a frame ends where an id of codebook 0 begins the next: the depth
    needs no id of its own (layout `variable`).
    """

    codec_class = VrvqModel
    feature_extractor_class = VrvqFeatureExtractor
    encoder_class: ClassVar[type[ClipEncoder]] = VrvqClipEncoder

    def encoder(self, batch_size: int | None = None, certify: bool = True, **options: Any) -> ClipEncoder:
        """As in every tokenizer; what decides the depth here replaces what decides it by default."""
        if any(options.get(name) is not None for name in self.codec.encode_options):
            options = {**dict.fromkeys(self.codec.encode_options), **options}
        return super().encoder(batch_size, certify, **options)
