"""Recordings → codes → recordings, with the parts that the tokenizer and corpus tools share.

Clips are read at the codec's rate, encoded alone (CPU) or in certified batches of similar length, and window by
window where they are long. Codes of a clip never depend on the clips around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiotok.audio import AudioStream, Downmix, open_audio
from audiotok.certified import Certificate, clip_options
from audiotok.codec import AudioCodec, CodecOutput
from audiotok.errors import AudioTooLongError, CodesError, OptionError
from audiotok.facts import CodecFacts
from audiotok.features import CodecFeatureExtractor
from audiotok.layouts import LayoutCodes
from audiotok.windows import DEFAULT_WINDOW_S, Windowing, decode_windows, encode_windows, reach_frames

# Whole-clip attention over this much audio still fits an ordinary machine; beyond it windows must be asked for.
MAX_WHOLE_S = 600.0
# Clips held at once, in batches, so that those of similar length meet.
POOL_BATCHES = 8
# Is told `(place among the sources, samples encoded, samples in all)`, at the codec's rate, when a recording is opened
# and after each window of a long one. In all: as the header says; None where only decoding can tell.
Watch = Callable[[int, int, int | None], None]


def _unwatched(i: int, done: int, total: int | None) -> None:
    """A `Watch` that looks away."""


@dataclass(frozen=True)
class ClipCodes:
    """Codes of one clip.

    Attributes:
        codes: `[Q, T]` int64; a list of `[T_q]` for multi-rate codecs.
        audio_length: samples at the codec's rate.
        depths: `[T]`, codes in each frame, of variable-depth codecs; else None.
        scales: loudness factors where the codec has them; else None.
    """

    codes: Any
    audio_length: int
    depths: np.ndarray | None = None
    scales: np.ndarray | None = None


class ClipEncoder:
    """Encodes clips with one codec and one set of options.

    Args:
        codec: in eval mode.
        feature_extractor: of the codec.
        options: the codec's own; a list holds one value a clip of what is passed to `encode`.
        chunk_length_s, context_s: windows; None for whole clips, or windows that change no code where the
            receptive field is finite.
        batch_size: None is 1 on a CPU, where that is fastest, and 16 elsewhere.
        certify: encode clips of a batch that hold a near-tie again alone.
    """

    def __init__(
        self,
        codec: AudioCodec,
        feature_extractor: CodecFeatureExtractor,
        options: dict[str, Any] | None = None,
        chunk_length_s: float | None = None,
        context_s: float | None = None,
        batch_size: int | None = None,
        certify: bool = True,
    ) -> None:
        self.codec, self.feature_extractor, self.options = codec, feature_extractor, dict(options or {})
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise OptionError(
                f"batch_size={batch_size!r} is not legal: a whole number of at least 1, or None for the device's own."
            )
        self.batch_size = batch_size or (1 if codec.device.type == "cpu" else 16)
        self.certify = certify
        self.windowing = _windowing(codec.facts, codec.facts.receptive_field_samples, chunk_length_s, context_s)
        self.certificates: list[Certificate] = []

    def encode(
        self,
        sources: Sequence[Any],
        sampling_rate: int | None = None,
        downmix: Downmix = None,
        watch: Watch = _unwatched,
    ) -> Iterator[ClipCodes]:
        """Codes of each recording, in order.

        Args:
            sources, sampling_rate, downmix: as in `load_audio`, one source a recording.
            watch: is told how far each recording is, for progress; see `Watch`. It changes nothing.
        """
        for key, value in self.options.items():
            if isinstance(value, (list, tuple)) and len(value) != len(sources):
                raise OptionError(
                    f"{key} holds {len(value)} values for {len(sources)} recordings: give one for all, or one each."
                )
        facts = self.codec.facts
        pool: list[tuple[int, Any]] = []
        limit = self.longest_whole
        for i, source in enumerate(sources):
            options = clip_options(self.options, i, len(sources))
            with open_audio(
                source,
                sampling_rate=sampling_rate,
                target_rate=facts.sampling_rate,
                channels=facts.channels,
                downmix=downmix,
            ) as stream:
                watch(i, 0, stream.num_samples)
                head = stream.read(limit + 1)
                is_long = head.shape[1] > limit
                pool.append((i, self._encode_long(stream, head, options, partial(watch, i)) if is_long else head))
            if len(pool) == self.batch_size * (POOL_BATCHES if self.batch_size > 1 else 1):
                yield from self._drain(pool, len(sources))
                pool = []
        yield from self._drain(pool, len(sources))

    def _drain(self, pool: list[tuple[int, Any]], total: int) -> Iterator[ClipCodes]:
        """Encode what waits, in batches of similar length; give everything in order."""
        done = {i: item for i, item in pool if isinstance(item, ClipCodes)}
        waiting = sorted(((i, item) for i, item in pool if i not in done), key=lambda pair: pair[1].shape[1])
        for first in range(0, len(waiting), self.batch_size):
            batch = waiting[first : first + self.batch_size]
            per_clip = [clip_options(self.options, i, total) for i, _ in batch]
            options = {key: [chosen[key] for chosen in per_clip] for key in self.options}
            clips = self.encode_batch([samples for _, samples in batch], options)
            done.update(zip((i for i, _ in batch), clips, strict=True))
        yield from (done[i] for i, _ in pool)

    @torch.inference_mode()
    def encode_batch(self, waveforms: list[np.ndarray], options: dict[str, Any] | None = None) -> list[ClipCodes]:
        """Codes of waveforms `[C, N]` at the codec's rate; `options` hold one value a clip in lists."""
        options = self.options if options is None else options
        features = self.feature_extractor(
            [wave[0] if len(wave) == 1 else wave for wave in waveforms],
            sampling_rate=self.codec.facts.sampling_rate,
            return_tensors="pt",
        )
        values = features["input_values"].to(self.codec.device)
        mask = features["padding_mask"].to(self.codec.device)
        if len(waveforms) == 1:
            options = clip_options(options, 0, 1)
        if self.certify:
            output, certificate = self.codec.encode_certified(values, mask, **options)
            self.certificates.append(certificate)
        else:
            output = self.codec.encode(values, mask, **options)
        return [self._clip(output, row) for row in range(len(waveforms))]

    def _clip(self, output: CodecOutput, row: int, num_frames: int | None = None) -> ClipCodes:
        """One row of a batch's codes, without padding."""
        facts = self.codec.facts
        length = 0 if output.audio_lengths is None else int(output.audio_lengths[row])
        frames = facts.num_frames(length) if num_frames is None else num_frames
        scales = None if output.audio_scales is None else output.audio_scales[row].cpu().numpy()
        if isinstance(output.audio_codes, list):
            pairs = zip(output.audio_codes, facts.codebook_strides, strict=True)
            return ClipCodes([c[row, : frames // s].cpu().numpy() for c, s in pairs], length, None, scales)
        codes = output.audio_codes[row, :, :frames].cpu().numpy()
        depths = None
        if facts.variable_depth:
            depths = output.audio_codes_mask[row, :, :frames].sum(dim=0).cpu().numpy()
        return ClipCodes(codes, length, depths, scales)

    @torch.inference_mode()
    def _encode_long(
        self,
        stream: AudioStream,
        head: np.ndarray,
        options: dict[str, Any],
        watch: Callable[[int, int | None], None],
    ) -> ClipCodes:
        """Window by window; memory is bounded by the window."""
        if self.windowing is None:
            raise AudioTooLongError(
                f"The recording is longer than {MAX_WHOLE_S:g} s, and {type(self.codec).__name__} attends over the "
                "whole clip: ask for windows with chunk_length_s=60, context_s=5 (some codes then differ from those "
                "of the whole clip; `audiotok info` says how many, where that was measured)."
            )
        reader = _Rereader(head, stream)
        device = self.codec.device

        def encode(values: Tensor, mask: Tensor) -> CodecOutput:
            return self.codec.encode(values.to(device), mask.to(device), **options)

        clips, num_frames = [], 0
        for piece in encode_windows(self.codec, reader.read, self.windowing, encode):
            finest = piece.audio_codes if isinstance(piece.audio_codes, Tensor) else piece.audio_codes[-1]
            frames = finest.shape[-1] * self.codec.facts.codebook_strides[-1]
            clips.append(self._clip(piece, 0, frames))
            num_frames += frames
            watch(min(num_frames * self.codec.facts.hop_length, reader.num_read), stream.num_samples)
        if isinstance(clips[0].codes, list):
            codes = [np.concatenate(parts) for parts in zip(*(clip.codes for clip in clips), strict=True)]
        else:
            codes = np.concatenate([clip.codes for clip in clips], axis=1)
        depths = None
        if self.codec.facts.variable_depth:
            depths = np.concatenate([clip.depths for clip in clips if clip.depths is not None])
        return ClipCodes(codes, reader.num_read, depths, clips[0].scales)

    @property
    def longest_whole(self) -> int:
        """Samples, at the codec's rate, up to which a clip is encoded whole."""
        facts = self.codec.facts
        if self.windowing is None:
            return round(MAX_WHOLE_S * facts.sampling_rate)
        return (self.windowing.core + self.windowing.context) * facts.hop_length


def _windowing(
    facts: CodecFacts, reach: int | None, chunk_length_s: float | None, context_s: float | None
) -> Windowing | None:
    """Windows asked for, or those that memory wants where they change nothing; None for the whole clip at once."""
    if chunk_length_s is None and context_s is None and reach is None:
        return None
    length = DEFAULT_WINDOW_S if chunk_length_s is None else chunk_length_s
    return Windowing.from_seconds(facts, length, context_s or 0.0, reach)


class _Rereader:
    """A stream whose first samples were read already; counts what it gives."""

    def __init__(self, head: np.ndarray, stream: AudioStream) -> None:
        self.head, self.stream, self.num_read = head, stream, 0

    def read(self, num_samples: int) -> np.ndarray:
        """The next `[C, <= num_samples]`, fewer only at the end."""
        taken, self.head = self.head[:, :num_samples], self.head[:, num_samples:]
        if (rest := num_samples - taken.shape[1]) > 0:
            taken = np.concatenate([taken, self.stream.read(rest)], axis=1)
        self.num_read += taken.shape[1]
        return taken


def decode_clip(
    codec: AudioCodec,
    found: LayoutCodes,
    length: int | None = None,
    chunk_length_s: float | None = None,
    context_s: float | None = None,
) -> Iterator[Tensor]:
    """Codes of one clip → its waveform in pieces `[C, samples]` on the CPU.

    Args:
        length: samples of the clip at the input rate; None for all that the frames hold.
        chunk_length_s, context_s: windows; None for the whole clip at once, or windows that change nothing where the
            decoder's reach is finite. Elsewhere windows bound the memory, and change the audio.

    Raises:
        CodesError: no clip of `length` samples has so many frames.
    """
    facts = codec.facts
    streams = found.codes if isinstance(found.codes, list) else [found.codes]
    num_frames = streams[0].shape[-1] * facts.codebook_strides[0]
    if length is not None and facts.num_frames(length) != num_frames:
        least = facts.held_samples(num_frames - facts.frame_multiple) + 1 if num_frames else 0
        raise CodesError(
            f"length={length} does not fit {num_frames} frames: they stand for {least} to "
            f"{facts.held_samples(num_frames)} samples."
        )
    left = facts.num_samples(num_frames) if length is None else facts.output_length(length)
    windowing = _windowing(facts, facts.decoder_reach_samples, chunk_length_s, context_s)
    if windowing is None:
        windowing = Windowing(max(num_frames, 1), 0)
    elif facts.tail_samples:  # a piece ends so much before its last frame does
        windowing = replace(windowing, context=max(windowing.context, reach_frames(facts, facts.tail_samples)))
    for piece in decode_windows(facts, num_frames, windowing, _frame_decoder(codec, found)):
        yield piece[:, :left]
        left = max(0, left - piece.shape[1])


def _frame_decoder(codec: AudioCodec, found: LayoutCodes) -> Callable[[int, int], Tensor]:
    """`(start, stop)` → samples of these frames."""
    facts, device = codec.facts, codec.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))[None].to(device)

    def decode(start: int, stop: int) -> Tensor:
        with torch.inference_mode():
            if isinstance(found.codes, list):
                pairs = zip(found.codes, facts.codebook_strides, strict=True)
                codes: Any = [tensor(c[start // s : stop // s]) for c, s in pairs]
            else:
                codes = tensor(found.codes[:, start:stop])
            mask = None
            if found.depths is not None:
                order = torch.arange(len(found.codes), device=device)[:, None]
                mask = order < tensor(found.depths[start:stop])[:, None]
            audio = codec.decode(CodecOutput(audio_codes=codes, audio_codes_mask=mask))[0].float().cpu()
        return audio.clone()  # a tensor that autograd may use, outside inference mode

    return decode
