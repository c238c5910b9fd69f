"""Streaming: a causal codec encodes and decodes sound while it comes, in pieces of any size.

    with codec.streaming() as stream:
        for chunk in microphone:                            # [B, C, any number of samples]
            play(stream.decode(stream.encode(chunk)))       # codes and samples as soon as they are certain
        play(stream.decode(stream.flush()))                 # the codes of what is left
        play(stream.flush())                                # the samples that the decoder still holds

All state is in the stream; the model serves any number of them at once. What a stream gives does not depend on the
sizes of the pieces, bit for bit: it computes code frame by code frame, whatever it is handed. Codes are those of
`codec.encode` of the whole clip (with a padding mask, if flushed), samples those of `codec.decode`.

Shapes: B clips, C channels, N samples, Q codebooks, T frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from audiotok.errors import AudioShapeError, CodesError, OptionError

if TYPE_CHECKING:
    from audiotok.codec import AudioCodec


class CodecStream(ABC):
    """The state of B clips on their way through a codec, all of them at the same sample.

    A family's stream defines `encode_frame`, `decode_frame` and `decode_rest`.

    Args:
        codec: a causal one with one rate.
        batch_size: B.
    """

    def __init__(self, codec: AudioCodec, batch_size: int) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise OptionError(f"batch_size={batch_size!r} is not legal: give the number of clips, from 1.")
        self.codec, self.batch_size, self.facts = codec, batch_size, codec.facts
        self.waiting = torch.zeros(batch_size, self.facts.channels, 0, device=codec.device)
        self.num_samples = self.num_frames = 0
        self.encoder_open, self.decoder_open, self.is_closed = True, True, False

    @abstractmethod
    def encode_frame(self, samples: Tensor) -> Tensor:
        """The next hop of samples `[B, C, hop]` → its codes `[B, Q, 1]`."""

    @abstractmethod
    def decode_frame(self, codes: Tensor) -> Tensor:
        """The next codes `[B, Q, 1]` → the samples that are certain now, `[B, C, N]`."""

    @abstractmethod
    def decode_rest(self) -> Tensor:
        """The samples that waited for codes which do not come, `[B, C, N]`."""

    @torch.no_grad()
    def encode(self, chunk: Tensor) -> Tensor:
        """The next samples `[B, C, N]`, N from 0 on → codes `[B, Q, T]` of the frames that are whole now."""
        self._check_open(self.encoder_open, "encode")
        self._check_chunk(chunk)
        self.num_samples += chunk.shape[-1]
        self.waiting = torch.cat([self.waiting, chunk.to(self.waiting)], dim=-1)
        return self._encode_waiting()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The next codes `[B, Q, T]`, T from 0 on → samples `[B, C, N]`; Q may be fewer codebooks, the leading ones."""
        self._check_open(self.decoder_open, "decode")
        self._check_codes(codes)
        pieces = [self.decode_frame(codes[..., t : t + 1].long()) for t in range(codes.shape[-1])]
        return torch.cat([self._no_samples(), *pieces], dim=-1)

    @torch.no_grad()
    def flush(self) -> Tensor:
        """End the clip: what the encoder still holds, or, if it has ended or had nothing, what the decoder holds.

        Returns:
            Codes `[B, Q, T]` that complete those of the clip, silence added behind its end; or samples `[B, C, N]`.
            In a stream that encodes and decodes, decode the former before asking for the latter.
        """
        self._check_open(self.decoder_open, "flush")
        if self.encoder_open and self.num_samples:
            self.encoder_open = False
            missing = self.facts.num_frames(self.num_samples) - self.num_frames
            silence = missing * self.facts.hop_length - self.waiting.shape[-1]
            self.waiting = torch.nn.functional.pad(self.waiting, (0, silence))
            return self._encode_waiting()
        self.encoder_open = self.decoder_open = False
        return torch.cat([self._no_samples(), self.decode_rest()], dim=-1)

    def _encode_waiting(self) -> Tensor:
        """Codes of the whole frames among the samples that wait."""
        hop = self.facts.hop_length
        whole = self.waiting.shape[-1] // hop
        frames = self.waiting[..., : whole * hop].split(hop, dim=-1) if whole else ()
        self.waiting = self.waiting[..., whole * hop :]
        self.num_frames += whole
        none = torch.zeros(self.batch_size, self.facts.num_codebooks, 0, dtype=torch.long, device=self.waiting.device)
        return torch.cat([none, *(self.encode_frame(frame) for frame in frames)], dim=-1)

    def _no_samples(self) -> Tensor:
        return torch.zeros(self.batch_size, self.facts.channels, 0, device=self.codec.device)

    def _check_open(self, is_open: bool, call: str) -> None:
        if self.is_closed or not is_open:
            reason = "its `with` block has ended" if self.is_closed else "it was flushed"
            raise OptionError(f"{call}() was called on a stream that is over ({reason}): open another one.")

    def _check_chunk(self, chunk: Tensor) -> None:
        if not isinstance(chunk, Tensor) or chunk.ndim != 3 or chunk.shape[:2] != self.waiting.shape[:2]:
            found = tuple(chunk.shape) if isinstance(chunk, Tensor) else type(chunk).__name__
            raise AudioShapeError(
                f"The chunk is {found}: this stream takes float tensors [{self.batch_size}, {self.facts.channels}, "
                "samples]."
            )
        if chunk.shape[-1]:
            self.codec._check_waveforms(chunk)

    def _check_codes(self, codes: Tensor) -> None:
        if not isinstance(codes, Tensor) or codes.ndim != 3 or len(codes) != self.batch_size:
            found = tuple(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise CodesError(
                f"The codes are {found}: this stream takes integers [{self.batch_size}, codebooks, frames]."
            )
        if codes.shape[-1]:
            self.codec._check_codes(codes)


Stream = TypeVar("Stream", bound=CodecStream)


@contextmanager
def streaming_scope(stream: Stream) -> Generator[Stream]:
    """The stream in a `with` block, over when the block ends."""
    try:
        yield stream
    finally:
        stream.is_closed = True
