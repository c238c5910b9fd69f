"""The causal APCodec code frame by code frame: how a stream runs, and how a whole clip is encoded.

A product of matrices rounds by the number of its rows, so a clip in one piece and the same clip in a hundred would
differ in the last places, and a near-tie in a codebook would flip. Here every code comes from the same arithmetic on
the same shapes, one code frame at a time, however the sound arrives.

Shapes: B clips, N samples, K bins, r transform frames a code frame, H samples between them, W samples of a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok.nn.history import History
from audiotok.nn.stft import inverse_frames, overlap_add
from audiotok.streaming import CodecStream

if TYPE_CHECKING:
    from audiotok.codecs.apcodec.modeling_apcodec import ApCodecModel


class FrameEncoder:
    """Samples of one code frame after the other → its latents.

    Args:
        model: a causal one.
    """

    def __init__(self, model: ApCodecModel) -> None:
        config = model.config
        self.model, self.ratio = model, config.downsampling_ratio
        self.look_back = config.win_length - config.stft_hop_length
        self.margin = (config.n_fft - config.win_length) // 2  # where the window is zero
        self.history = History()
        self.past: Tensor | None = None

    def __call__(self, samples: Tensor) -> Tensor:
        """The next `[B, r * H]` samples → latents `[B, D, 1]`."""
        past = samples.new_zeros(len(samples), self.look_back) if self.past is None else self.past
        seen = torch.cat([past, samples], dim=1)
        self.past = seen[:, -self.look_back :]
        encoder = self.model.encoder
        with torch.autocast(samples.device.type, enabled=False):
            padded = F.pad(seen, (self.margin, self.margin))
            log_amplitude, angle = encoder.front_end.features(padded, "settled")
        return encoder.encode(log_amplitude, angle, [self.ratio] * len(samples), self.history).latents


@torch.no_grad()
def encode_frames(
    model: ApCodecModel, waveform: Tensor, frames: int, return_margins: bool
) -> tuple[Tensor, Tensor | None]:
    """Codes and, if asked for, margins `[B, Q, frames]` of whole clips `[B, N]`, as a stream of them gives them."""
    hop = model.facts.hop_length
    waveform = F.pad(waveform, (0, max(0, frames * hop - waveform.shape[1])))[:, : frames * hop]
    encode = FrameEncoder(model)
    found = [search(model, encode(samples), return_margins) for samples in waveform.split(hop, dim=1)]
    codes, margins = zip(*found, strict=True)
    return torch.cat(codes, dim=2), torch.cat(margins, dim=2) if return_margins else None


def search(model: ApCodecModel, latents: Tensor, return_margins: bool = False) -> tuple[Tensor, Tensor | None]:
    """Codes and, if asked for, margins `[B, Q, 1]` of the latents of one frame `[B, D, 1]`."""
    found = model.quantizer(latents, return_margins=return_margins, num_stages=model.config.num_codes)
    assert found.codes is not None  # nothing stood for the search
    return found.codes, found.margins


class StreamingOverlap:
    """Overlap-add of an inverse transform, window energy divided out, samples as they become certain.

    Args:
        win_length: W. hop: H.
    """

    def __init__(self, win_length: int, hop: int) -> None:
        self.win_length, self.hop = win_length, hop
        self.rest = win_length // 2 - hop  # of what waits, the end of a clip gives all before the last window's middle
        self.early = win_length - hop  # the first windows begin before the first sample
        self.signal: Tensor | None = None
        self.energy: Tensor | None = None

    def add(self, spectrum: Tensor) -> Tensor:
        """The next frames `[B, K, r]` → samples `[B, <= r * H]`."""
        frames, window = inverse_frames(spectrum.transpose(1, 2), self.win_length)
        signal = self._joined(self.signal, overlap_add(frames, self.hop))
        energy = self._joined(self.energy, overlap_add(window.square().expand(1, frames.shape[1], -1), self.hop))
        certain = frames.shape[1] * self.hop
        self.signal, self.energy = signal[:, certain:], energy[:, certain:]
        skipped = min(self.early, certain)
        self.early -= skipped
        return signal[:, skipped:certain] / energy[:, skipped:certain]

    def end(self) -> Tensor | None:
        """What is left once no frame comes any more, `[B, W / 2 - H]`; None where none ever came."""
        if self.signal is None or self.energy is None:
            return None
        skipped = self.early
        return self.signal[:, skipped : self.rest] / self.energy[:, skipped : self.rest]

    def _joined(self, waiting: Tensor | None, new: Tensor) -> Tensor:
        """Add what waits to the start of what is new."""
        return new if waiting is None else new + F.pad(waiting, (0, new.shape[1] - waiting.shape[1]))


class ApCodecStream(CodecStream):
    """`CodecStream` of a causal `ApCodecModel`: codes 0 samples after their frame, samples `W - H` after theirs."""

    def __init__(self, codec: ApCodecModel, batch_size: int) -> None:
        super().__init__(codec, batch_size)
        self.model = codec
        self.encoder = FrameEncoder(codec)
        self.history = History()  # of the decoder
        self.overlap = StreamingOverlap(codec.config.win_length, codec.config.stft_hop_length)

    def encode_frame(self, samples: Tensor) -> Tensor:
        codes, _ = search(self.model, self.encoder(samples[:, 0]))
        return codes

    def decode_frame(self, codes: Tensor) -> Tensor:
        quantized = self.model.quantizer.decode(codes)
        decoded = self.model.decoder(quantized, [1] * len(codes), self.history)
        return self.overlap.add(decoded.spectrum)[:, None]

    def decode_rest(self) -> Tensor:
        rest = self.overlap.end()
        return self._no_samples() if rest is None else rest[:, None]
