"""What a codec is: `AudioCodec`, its `CodecConfig`, and what goes in and comes out.

Shapes: B clips, C channels, N samples, Q codebooks, T frames, D latent dimensions, K codebook entries.

A codec author writes `_encode`, `_decode`, `latents` and `forward` for clips whose lengths are known; this base
class checks what comes in, turns padding masks into lengths, keeps the length law, loads strictly and adds
certified codes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput, logging

from audiotok.certified import Certificate, encode_certified
from audiotok.conversion import report_mismatch
from audiotok.errors import (
    AudioShapeError,
    CodesError,
    ConfigError,
    EmptyAudioError,
    IntegerAudioError,
    NonFiniteAudioError,
    OptionError,
    check_choice,
    did_you_mean,
)
from audiotok.facts import CodecFacts
from audiotok.windows import WindowFlips


class CodecConfig(PreTrainedConfig):
    """Base of codec configurations: a transformers config that refuses keys it does not know."""

    # Keys that only training reads: they change neither ids nor audio, and are no part of the fingerprint.
    training_keys: ClassVar[tuple[str, ...]] = ()

    # What transformers itself writes into config.json or passes through a config's constructor.
    _foreign_keys: ClassVar[frozenset[str]] = frozenset(
        "_attn_implementation _commit_hash _name_or_path attn_implementation auto_map model_type name_or_path "
        "num_labels output_attentions tie_word_embeddings torch_dtype".split()
    )

    def __post_init__(self, **kwargs: Any) -> None:
        known = {f.name for f in dataclasses.fields(self)} | self._foreign_keys
        for key in kwargs:
            if key not in known and not key.startswith("_"):
                raise ConfigError(
                    f'{type(self).__name__} knows no key "{key}".{did_you_mean(key, known)} Legal keys: '
                    f"{', '.join(sorted(type(self).own_keys()))}."
                )
        super().__post_init__(**kwargs)

    @classmethod
    def own_keys(cls) -> set[str]:
        """Names of the keys that this family defines (without those of every transformers config)."""
        inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)}
        return {f.name for f in dataclasses.fields(cls)} - inherited

    @property
    def num_attention_heads(self) -> int:
        """One where nothing attends: tools ask every model."""
        return 1

    @property
    def facts(self) -> CodecFacts:
        raise NotImplementedError(f"{type(self).__name__} must say its facts.")


@dataclass
class CodecOutput(ModelOutput):
    """What `encode` returns.

    Attributes:
        audio_codes: `[B, Q, T]` int64; a list of Q tensors `[B, T_q]` for multi-rate codecs. Code 0 stands where
            the mask is False.
        audio_codes_mask: `[B, Q, T]` bool (a list for multi-rate codecs), True where a code is a code.
        audio_lengths: `[B]` int64, samples of each clip at the codec's input rate.
        audio_scales: loudness factors where the codec has them, else None.
        margins: same shape as `audio_codes`, float32, only with `return_margins=True`: how far the runner-up
            was, (second smallest distance - smallest) / max(smallest, 1e-6); infinite where the mask is False.
        importance: `[B, T]` float32 of codecs that decide the depth of a frame by it.
    """

    audio_codes: Any = None
    audio_codes_mask: Any = None
    audio_lengths: Tensor | None = None
    audio_scales: Tensor | None = None
    margins: Any = None
    importance: Tensor | None = None


@dataclass
class CodecTrainingOutput(ModelOutput):
    """What `forward` returns.

    Attributes:
        loss: the codec's own losses (quantizer terms) summed; None outside training.
        losses: the same terms by name, scalars.
        audio_values: `[B, C, N]` the reconstruction, trimmed to the input's length.
        audio_codes: `[B, Q, T]` int64.
        latents: `[B, D, T]` before quantization.
        hidden_states: tuple of `[B, T, D]`, only with `output_hidden_states=True`: what enters each encoder
            layer and what leaves the encoder.
        distillation_features: `[B, T, D]` the decoder state that a teacher's features are compared with.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    audio_values: Tensor | None = None
    audio_codes: Tensor | None = None
    latents: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    distillation_features: Tensor | None = None


def lengths_from_mask(padding_mask: Tensor, num_clips: int, num_samples: int) -> list[int]:
    """Samples of each clip from a mask `[B, N]` (1 = sample); the ones must come first in every row."""
    if tuple(padding_mask.shape) != (num_clips, num_samples):
        raise CodesError(
            f"padding_mask has the shape {tuple(padding_mask.shape)}: it must be ({num_clips}, {num_samples}), one row "
            "a clip."
        )
    mask = padding_mask.bool()
    lengths = mask.sum(dim=1)
    if not torch.equal(mask, torch.arange(num_samples, device=mask.device) < lengths[:, None]):
        raise CodesError("padding_mask has zeros before ones: clips must be padded on the right.")
    if not bool((lengths > 0).all()):
        raise CodesError("padding_mask marks a clip without samples: every clip needs at least one.")
    return lengths.tolist()


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Keep transformers' reports and progress bars off the terminal while a small model is read or written."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class AudioCodec(PreTrainedAudioTokenizerBase):
    """A neural codec that is a transformers `PreTrainedModel`.

    A codec author defines `config_class`, `encode_options` and the methods `_encode`, `_decode`, `latents`,
    `codebook_embeddings` and `forward`.
    """

    config: CodecConfig
    base_model_prefix = "codec"
    main_input_name = "input_values"
    input_modalities = "audio"

    # Keywords of `encode` beyond those of every codec.
    encode_options: tuple[str, ...] = ()
    decode_options: ClassVar[tuple[str, ...]] = ()
    # Names of the losses that `forward` returns.
    loss_names: ClassVar[tuple[str, ...]] = ()
    # Smallest margin at which a code of a batch is sure to be that of the clip alone, by (device type, dtype).
    margin_bounds: ClassVar[dict[tuple[str, torch.dtype], float]] = {}
    # What windows change where the receptive field is not finite; empty where that was not measured.
    window_flips: ClassVar[tuple[WindowFlips, ...]] = ()

    @property
    def facts(self) -> CodecFacts:
        return self.config.facts

    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        *,
        return_margins: bool = False,
        partial_frame: str = "keep",
        **options: Any,
    ) -> CodecOutput:
        """Waveforms `[B, C, N]` → codes.

        Args:
            input_values: float waveforms at `facts.sampling_rate`.
            padding_mask: `[B, N]`, 1 = sample of the clip, 0 = padding on the right. With it every clip is encoded
                as it is alone, to `facts.num_frames(samples)` frames. Without it the published code's framing is
                kept, with all that it drops at the end.
            return_margins: also say how near each code was to the runner-up.
            partial_frame: with a mask, "keep" pads a clip's last, partial frame with zeros; "drop" leaves it out as
                the published code does.
            options: the codec's own, see `encode_options`.
        """
        check_choice("partial_frame", partial_frame, ("keep", "drop"))
        self._check_waveforms(input_values)
        self._check_options(options)
        given = [input_values.shape[-1]] * len(input_values)
        framed = given
        if padding_mask is not None:
            given = lengths_from_mask(padding_mask, len(input_values), input_values.shape[-1])
            framed = given if partial_frame == "drop" else [self.padded_length(n) for n in given]
            input_values = input_values * padding_mask[:, None].to(input_values.dtype)
        room = max(framed) - input_values.shape[-1]
        output = self._encode(F.pad(input_values, (0, max(room, 0))), framed, return_margins, **options)
        output.audio_lengths = torch.tensor(given, device=input_values.device)
        return output

    def encode_certified(
        self, input_values: Tensor, padding_mask: Tensor, bound: float | None = None, **options: Any
    ) -> tuple[CodecOutput, Certificate]:
        """`encode` for a padded batch, every code equal to that of its clip alone; see `audiotok.certified`."""
        return encode_certified(self, input_values, padding_mask, bound, **options)

    def margin_bound(self, dtype: torch.dtype, device: torch.device | str) -> float:
        """Margins from here on are safe against rounding; infinite where that was not measured."""
        return self.margin_bounds.get((torch.device(device).type, dtype), math.inf)

    def decode(
        self,
        codes: CodecOutput | Tensor | list[Tensor],
        *,
        lengths: Tensor | Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        """Codes → waveforms `[B, C, N]` at `facts.output_sampling_rate`, N the longest clip's length.

        Args:
            codes: what `encode` returned (its lengths are kept), or codes `[B, Q, T]` (fewer than all codebooks:
                the leading ones), a list of `[B, T_q]` for multi-rate codecs.
            lengths: samples of each clip at the input rate; frames beyond them are ignored and what is behind a
                clip's end is zero. None with bare codes: everything the frames decode to, as the published code.
        """
        self._check_options(options, self.decode_options)
        mask = None
        if isinstance(codes, CodecOutput):
            lengths = codes.audio_lengths if lengths is None else lengths
            codes, mask = codes.audio_codes, codes.audio_codes_mask
        num_frames = self._check_codes(codes)
        codes = [c.long() for c in codes] if isinstance(codes, list) else codes.long()
        batch = len(codes[0]) if isinstance(codes, list) else len(codes)
        if lengths is None:
            return self._decode(codes, [num_frames] * batch, mask, **options)
        samples = [int(n) for n in lengths]
        if len(samples) != batch:
            raise CodesError(f"lengths holds {len(samples)} numbers, codes {batch} clips: give one length a clip.")
        available = [num_frames] * batch if mask is None else self._masked_frames(mask)
        frames = [self._frames_of(n, there) for n, there in zip(samples, available, strict=True)]
        codes, mask = (self._first_frames(value, max(frames)) for value in (codes, mask))
        audio = self._decode(codes, frames, mask, **options)
        total = max(self.facts.output_length(n) for n in samples)
        held = [
            min(self.facts.output_length(n), self.facts.num_samples(f)) for n, f in zip(samples, frames, strict=True)
        ]
        return self._trim(audio, held, total)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every layer starts as PyTorch, or its own `reset_parameters`, starts it."""
        if isinstance(reset := getattr(module, "reset_parameters", None), Callable):
            reset()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but float32 unless `dtype` says otherwise, and strict about every tensor.

        Raises:
            WeightMismatchError: tensors are missing, not known or misshapen; each is named. Not raised where the
                caller asks for the report (`output_loading_info=True`), nor for misshapen tensors with
                `ignore_mismatched_sizes=True`.
        """
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = torch.float32
        wants_report = kwargs.pop("output_loading_info", False)
        refuse_misshapen = not kwargs.pop("ignore_mismatched_sizes", False)
        with quiet_transformers():  # what does not fit is raised below, not printed
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        model, report = loaded
        if wants_report:
            return model, report
        misshapen = [f"{key} {list(found)} (ours: {list(ours)})" for key, found, ours in report["mismatched_keys"]]
        refused = misshapen if refuse_misshapen else []
        report_mismatch(sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), refused)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers, without its progress bars."""
        with quiet_transformers():
            super().save_pretrained(save_directory, *args, **kwargs)

    def check_option_values(self, options: dict[str, Any]) -> None:
        """Raise `OptionError` for a value of `encode_options` that is not legal for one clip."""

    def padded_length(self, num_samples: int) -> int:
        """Samples that a clip is zero-padded to so that its frames hold all of it."""
        return self.facts.held_samples(self.facts.num_frames(num_samples))

    def latents(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Continuous features `[B, D, T]` before quantization."""
        raise NotImplementedError(f"{type(self).__name__} must give its latents.")

    def codebook_embeddings(self) -> list[Tensor]:
        """One `[K, D]` a codebook."""
        raise NotImplementedError(f"{type(self).__name__} has no code vectors to show.")

    def _encode(self, input_values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        """Encode clips as the published code encodes each alone, `lengths[i]` samples of row i."""
        raise NotImplementedError

    def _decode(self, codes: Tensor | list[Tensor], frames: list[int], mask: Tensor | None, **options: Any) -> Tensor:
        """Decode `frames[i]` frames of row i, each as alone, to `[B, C, samples]`."""
        raise NotImplementedError

    def _check_waveforms(self, input_values: Tensor) -> None:
        channels = self.facts.channels
        if not isinstance(input_values, Tensor) or input_values.ndim != 3 or input_values.shape[1] != channels:
            found = tuple(input_values.shape) if hasattr(input_values, "shape") else type(input_values).__name__
            raise AudioShapeError(
                f"input_values is {found}: it must be a float tensor [clips, {channels}, samples]; "
                "the feature extractor makes it from recordings."
            )
        if not input_values.is_floating_point():
            raise IntegerAudioError(f"input_values is {input_values.dtype}: waveforms are float, full scale 1.0.")
        if input_values.shape[0] == 0 or input_values.shape[2] == 0:
            raise EmptyAudioError(f"input_values {tuple(input_values.shape)} holds no samples.")
        if not bool(torch.isfinite(input_values).all()):
            raise NonFiniteAudioError("input_values holds NaN or infinity: clean the recording first.")

    def _check_options(self, options: dict[str, Any], legal: tuple[str, ...] | None = None) -> None:
        names = self.encode_options if legal is None else legal
        for key in options:
            if key not in names:
                raise OptionError(
                    f'{type(self).__name__} knows no option "{key}".{did_you_mean(key, names)} '
                    f"Legal here: {', '.join(names) or 'none'}."
                )

    def _check_codes(self, codes: Tensor | list[Tensor]) -> int:
        """Refuse codes that no recording gives; return the number of frames (the finest stream's)."""
        facts = self.facts
        multi_rate = facts.frame_multiple > 1
        if not isinstance(codes, list if multi_rate else Tensor):
            wanted = "a list of tensors [B, T_q], one a codebook" if multi_rate else "one tensor [B, Q, T]"
            raise CodesError(f"codes is a {type(codes).__name__}: this codec takes {wanted}.")
        streams = codes if isinstance(codes, list) else list(codes.unbind(1)) if codes.ndim == 3 else []
        legal = all(isinstance(s, Tensor) and s.ndim == 2 for s in streams)
        if not legal or not 0 < len(streams) <= facts.num_codebooks:
            found = tuple(codes.shape) if isinstance(codes, Tensor) else f"{len(codes)} streams"
            raise CodesError(
                f"codes of shape {found}: must be [clips, codebooks, frames] with 1 to {facts.num_codebooks} codebooks."
            )
        num_frames = streams[0].shape[1] * facts.codebook_strides[0]
        for q, (stream, size) in enumerate(zip(streams, facts.codebook_sizes, strict=False)):
            self._check_stream(stream, q, size, num_frames // facts.codebook_strides[q])
        return num_frames

    def _check_stream(self, stream: Tensor, q: int, size: int, num_codes: int) -> None:
        """Refuse codes `[B, T_q]` of codebook q with a wrong dtype, shape or range."""
        if stream.is_floating_point() or stream.is_complex() or stream.dtype == torch.bool:
            raise CodesError(f"codes are {stream.dtype}: they must be integers.")
        if stream.shape[1] != num_codes:
            raise CodesError(f"codebook {q} has {stream.shape[1]} codes: {num_codes} fit the codes of codebook 0.")
        if stream.numel() == 0:
            raise CodesError(f"codes of codebook {q} have the shape {tuple(stream.shape)}: nothing to decode.")
        stream = stream.long()
        if not 0 <= int(stream.min()) <= int(stream.max()) < size:
            raise CodesError(
                f"codes of codebook {q} lie in [{int(stream.min())}, {int(stream.max())}]: legal are 0 to "
                f"{size - 1}. Are these ids of another codec, or ids that still carry offsets?"
            )

    def _frames_of(self, num_samples: int, available: int) -> int:
        """Frames that a clip of `num_samples` samples has, of those available."""
        frames = self.facts.num_frames(num_samples)
        # The published framing drops a partial frame; its samples come back as zeros.
        if not 0 < num_samples or frames > available + self.facts.frame_multiple:
            raise CodesError(
                f"lengths says {num_samples} samples, but {available} frames hold at most "
                f"{self.facts.num_samples(available)}."
            )
        return min(frames, available)

    def _masked_frames(self, mask: Any) -> list[int]:
        """Frames of each clip that hold codes, by the mask of its first codebook."""
        coarsest = mask[0] if isinstance(mask, list) else mask[:, 0]
        return (coarsest.sum(dim=1) * self.facts.codebook_strides[0]).tolist()

    def _first_frames(self, value: Any, num_frames: int) -> Any:
        """Cut codes or their mask to what `num_frames` frames hold."""
        if isinstance(value, list):
            strides = self.facts.codebook_strides[: len(value)]
            return [v[..., : num_frames // s] for v, s in zip(value, strides, strict=True)]
        return value if value is None else value[..., :num_frames]

    @staticmethod
    def _trim(audio: Tensor, samples: list[int], total: int | None = None) -> Tensor:
        """Cut or zero-extend to `total` (the longest clip's), with zeros behind each clip's own samples."""
        total = max(samples) if total is None else total
        audio = F.pad(audio[..., :total], (0, max(0, total - audio.shape[-1])))
        if min(samples) == total:
            return audio
        inside = torch.arange(total, device=audio.device) < torch.tensor(samples, device=audio.device)[:, None]
        return audio * inside[:, None]
