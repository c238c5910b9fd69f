"""The rivals of the benchmark: each family as a careful user runs the published code, without audiotok."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from audiotok import ApCodecModel, AudioCodec, QinCodecModel
from audiotok.errors import OptionError
from audiotok.recipes.plain.apcodec import PlainApCodec
from audiotok.recipes.plain.auv import PlainAuv
from audiotok.recipes.plain.melcap import PlainMelCap
from audiotok.recipes.plain.qincodec import PlainQinCodec
from audiotok.recipes.plain.vrvq import PlainVrvq


class PlainCodec(Protocol):
    """Codes of waveforms and back; -1 stands where a frame has no code of a codebook."""

    def encode(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms `[N_i]` → codes `[Q, T_i]` of each, of frames that hold all of it."""
        ...

    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes `[Q, T_i]` → waveforms, everything that the frames decode to."""
        ...


RIVALS: dict[str, Callable[[Any], PlainCodec]] = {
    "ApCodecModel": PlainApCodec,
    "AuvModel": PlainAuv,
    "MelCapModel": PlainMelCap,
    "QinCodecModel": PlainQinCodec,
    "VrvqModel": PlainVrvq,
}


def plain_rival(codec: AudioCodec) -> PlainCodec:
    """The rival of a codec.

    Raises:
        OptionError: its family has none, or it is a variant that nobody published.
    """
    name = type(codec).__name__
    if name not in RIVALS:
        raise OptionError(f"{name} has no plain rival in audiotok.recipes.plain; those that have: {', '.join(RIVALS)}.")
    if reason := _unpublished(codec):
        raise OptionError(f"This {name} has no plain rival in audiotok.recipes.plain: {reason}.")
    return RIVALS[name](codec)


def _unpublished(codec: AudioCodec) -> str | None:
    """What of a configuration no published code runs."""
    if isinstance(codec, ApCodecModel) and codec.config.causal:
        return "it is causal, and only centred ones are published"
    if isinstance(codec, QinCodecModel) and codec.config.quantizer_block.type != "qinco2":
        return f'its quantizer is "{codec.config.quantizer_block.type}", and the rival searches QINCo2'
    if isinstance(codec, QinCodecModel) and codec.config.autoencoder is not None:
        return "it wraps another codec"
    return None
