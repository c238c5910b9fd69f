"""`AudioTokenizer`: recordings → `input_ids` → recordings, whatever codec is behind it.

    tok = AutoAudioTokenizer.from_pretrained("audiotok/auv-mini")
    enc = tok("speech.wav", return_tensors="pt")          # input_ids, attention_mask, audio_lengths
    wave = tok.decode(enc.input_ids[0], length=enc.audio_lengths[0])

A tokenizer is four public parts: `feature_extractor`, `codec`, `layout` and `vocabulary`. Shapes: Q codebooks,
T frames, C channels, N samples, L ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding

from audiotok.audio import Downmix
from audiotok.batching import as_array, as_ids, pad_batch, truncation_budget
from audiotok.codec import AudioCodec
from audiotok.encoding import ClipCodes, ClipEncoder, decode_clip
from audiotok.errors import EmptyAudioError, InvalidIdError, OptionError, did_you_mean
from audiotok.features import CodecFeatureExtractor
from audiotok.layouts import LayoutCodes, default_layout, get_layout
from audiotok.vocabulary import AudioVocabulary

# Options of encoding that are not the codec's own but change ids as well.
WINDOW_OPTIONS = ("chunk_length_s", "context_s")


class AudioTokenizer:
    """A codec with its feature extractor, a layout of ids and a vocabulary.

    Args:
        codec: the model; put into eval mode.
        feature_extractor: None for the family's own, built from the codec's facts.
        layout: name of a layout, None for the codec's default.
        options: defaults of what changes ids: the codec's own options, and `chunk_length_s`, `context_s`.
        name: what it was loaded from, for messages and cards.
    """

    codec_class: ClassVar[type[AudioCodec]] = AudioCodec
    feature_extractor_class: ClassVar[type[CodecFeatureExtractor]] = CodecFeatureExtractor
    encoder_class: ClassVar[type[ClipEncoder]] = ClipEncoder
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side: ClassVar[str] = "right"

    def __init__(
        self,
        codec: AudioCodec,
        feature_extractor: CodecFeatureExtractor | None = None,
        layout: str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> None:
        self.codec = codec.eval()
        facts = codec.facts
        self.feature_extractor = feature_extractor or self.feature_extractor_class(
            feature_size=facts.channels, sampling_rate=facts.sampling_rate, hop_length=facts.hop_length
        )
        self.vocabulary = AudioVocabulary(facts.codebook_sizes, facts.shared_codebook)
        fit = (self.vocabulary, facts.codebook_strides, facts.variable_depth)
        self.layout = default_layout(*fit) if layout is None else get_layout(layout, *fit)
        self.options = dict(options or {})
        self.name_or_path = name
        self.encoder()  # says at once, not at the first recording, which option is not legal
        self.codec.check_option_values({key: v for key, v in self.options.items() if key not in WINDOW_OPTIONS})

    # Loading and saving live in `auto` and `saving`; these are the names users know.

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> AudioTokenizer:
        """As `AutoAudioTokenizer.from_pretrained`, refusing a checkpoint of another family."""
        from audiotok.auto import AutoAudioTokenizer

        tokenizer = AutoAudioTokenizer.from_pretrained(name, **kwargs)
        if not isinstance(tokenizer, cls):
            raise OptionError(
                f"{name} is a checkpoint of {type(tokenizer).__name__}, not of {cls.__name__}: use that class, or "
                "AutoAudioTokenizer."
            )
        return tokenizer

    def save_pretrained(self, directory: str | Path, save_weights: bool = True) -> None:
        """Write everything needed to load the same tokenizer; see `audiotok.saving`."""
        from audiotok.saving import save_tokenizer

        save_tokenizer(self, Path(directory), save_weights)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes to a hub repository; returns its address."""
        from audiotok.saving import push_tokenizer

        return push_tokenizer(self, repo_id, **kwargs)

    @property
    def fingerprint(self) -> str:
        """Changes if and only if an id or the audio of this tokenizer could change."""
        from audiotok.saving import fingerprint

        return fingerprint(self)

    def with_layout(self, layout: str) -> AudioTokenizer:
        """The same codec, with ids in another order."""
        return type(self)(self.codec, self.feature_extractor, layout, self.options, self.name_or_path)

    def to(self, device: str | torch.device) -> AudioTokenizer:
        """Move the codec; ids do not change."""
        self.codec.to(device)
        return self

    # Facts

    @property
    def sampling_rate(self) -> int:
        return self.codec.facts.sampling_rate

    @property
    def vocab_size(self) -> int:
        """Ids of codes and special tokens."""
        return self.vocabulary.size

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def pad_token_id(self) -> int:
        return self.vocabulary.pad_token_id

    @property
    def bos_token_id(self) -> int:
        return self.vocabulary.bos_token_id

    @property
    def eos_token_id(self) -> int:
        return self.vocabulary.eos_token_id

    @property
    def all_special_ids(self) -> list[int]:
        return list(self.vocabulary.special_ids)

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | Tensor | np.ndarray) -> str | list[str]:
        """Token strings such as `<|a0_17|>`."""
        if isinstance(ids, (int, np.integer)):
            return self.vocabulary.id_to_token(int(ids))
        return self.vocabulary.convert_ids_to_tokens(as_array(ids))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        if isinstance(tokens, str):
            return self.vocabulary.token_to_id(tokens)
        return [self.vocabulary.token_to_id(token) for token in tokens]

    def __repr__(self) -> str:
        facts = self.codec.facts
        return (
            f"{type(self).__name__}({self.name_or_path!r}, {facts.sampling_rate} Hz, "
            f"{float(facts.ids_per_second(self.layout.name)):g} ids/s, layout={self.layout.name!r}, "
            f"vocab_size={self.vocab_size})"
        )

    # Recordings → ids

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = False,
        downmix: Downmix = None,
        batch_size: int | None = None,
        certify: bool = True,
        **options: Any,
    ) -> BatchEncoding:
        """Recordings → ids.

        Args:
            audio: a path, bytes, file object, array or tensor, a row of `datasets`, or a list of them.
            sampling_rate: of arrays, Hz; files know theirs. Resampled to the codec's.
            padding, truncation, max_length, pad_to_multiple_of: as in transformers; lengths count ids.
                Truncation keeps whole frames.
            return_tensors: "pt" or "np"; then one recording gives a batch of one.
            add_special_tokens: `<|audio_start|>` before and `<|audio_end|>` behind the ids (1-D layouts).
            downmix: what to do with more channels than the codec has: "mean" or a channel's index. Not given,
                they are refused.
            batch_size: clips encoded at once; None is 1 on a CPU, where that is fastest, and 16 elsewhere.
            certify: encode the clips of a batch that hold a near-tie again alone; False trusts the batch.
            options: the codec's own (see its class), and `chunk_length_s`, `context_s` for windows.

        Returns:
            `input_ids` (`[B, L]`; `[B, Q, L]` for 2-D layouts), `attention_mask` `[B, L]`, `audio_lengths`
            (samples at the codec's rate).
        """
        many = is_many(audio)
        if many and not audio:
            raise EmptyAudioError("There are no recordings in the list: give at least one.")
        least = (self.layout.num_ids(0) if self.layout.is_2d else 0) + 2 * add_special_tokens
        budget = truncation_budget(max_length, least) - 2 * add_special_tokens if truncation else None
        clips = self.encode_audio(audio if many else [audio], sampling_rate, downmix, batch_size, certify, **options)
        encoded = [self._ids_of(clip, budget, add_special_tokens) for clip in clips]
        features = {"input_ids": [ids for ids, _ in encoded], "audio_lengths": [length for _, length in encoded]}
        batch = self.pad(features, padding, max_length, pad_to_multiple_of, return_tensors=return_tensors)
        if many or return_tensors is not None:
            return batch
        return BatchEncoding({key: rows[0] for key, rows in batch.items()})

    def encode_audio(
        self,
        audio: Sequence[Any],
        sampling_rate: int | None = None,
        downmix: Downmix = None,
        batch_size: int | None = None,
        certify: bool = True,
        **options: Any,
    ) -> list[ClipCodes]:
        """A list of recordings → their codes, before any layout; arguments as in `__call__`."""
        return list(self.encoder(batch_size, certify, **options).encode(audio, sampling_rate, downmix))

    def encoder(self, batch_size: int | None = None, certify: bool = True, **options: Any) -> ClipEncoder:
        """The encoder behind `__call__`, with this tokenizer's options and those given."""
        options = {**self.options, **options}
        self._check_options(options)
        windows = {key: options.pop(key) for key in WINDOW_OPTIONS if key in options}
        return self.encoder_class(
            self.codec, self.feature_extractor, options, batch_size=batch_size, certify=certify, **windows
        )

    def _ids_of(self, clip: ClipCodes, budget: int | None, add_special_tokens: bool) -> tuple[np.ndarray, int]:
        """Ids of a clip, cut to whole frames within `budget` ids, and the samples that they stand for."""
        facts, length, codes, depths = self.codec.facts, clip.audio_length, clip.codes, clip.depths
        ids = self.layout.codes_to_ids(codes, depths)
        if budget is not None and ids.shape[-1] > budget:
            frames = self._frames_within(codes, depths, budget)
            if isinstance(codes, list):
                codes = [c[: frames // s] for c, s in zip(codes, facts.codebook_strides, strict=True)]
            else:
                codes, depths = codes[:, :frames], None if depths is None else depths[:frames]
            ids = self.layout.codes_to_ids(codes, depths)
            length = min(length, facts.held_samples(frames))
        if add_special_tokens:
            if self.layout.is_2d:
                raise OptionError(
                    f'add_special_tokens=True does not fit layout="{self.layout.name}": its streams are parallel; '
                    "choose a 1-D layout."
                )
            ids = np.concatenate([[self.bos_token_id], ids, [self.eos_token_id]])
        return ids, length

    def _frames_within(self, codes: Any, depths: np.ndarray | None, budget: int) -> int:
        """Most whole frames whose ids fit the budget."""
        multiple = self.codec.facts.frame_multiple
        if depths is not None:
            return int(np.searchsorted(np.cumsum(depths), budget, side="right"))
        frames = codes[0].shape[-1] * self.codec.facts.codebook_strides[0]
        counts = [self.layout.num_ids(n * multiple) for n in range(frames // multiple + 1)]
        return max(0, int(np.searchsorted(counts, budget, side="right")) - 1) * multiple

    # Batches of ids

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchEncoding:
        """Pad `input_ids` (and `labels`, with -100) to one length, as transformers' collators ask for it.

        Args:
            encoded_inputs: a list of examples, or one mapping of lists.
        """
        keep_mask = return_attention_mask is not False
        return pad_batch(
            encoded_inputs, self.pad_token_id, padding, max_length, pad_to_multiple_of, keep_mask, return_tensors
        )

    # Ids → recordings

    def codes_to_ids(self, codes: Any, depths: Any = None) -> np.ndarray:
        """Codes `[Q, T]` of one clip → ids in this layout."""
        rows = [as_array(c) for c in codes] if isinstance(codes, (list, tuple)) else as_array(codes)
        return self.layout.codes_to_ids(rows, None if depths is None else as_array(depths))

    def ids_to_codes(self, ids: Any) -> Any:
        """Ids of one clip → codes `[Q, T]`; special tokens at the ends are left out."""
        return self.layout.ids_to_codes(self._without_specials(as_ids(ids))).codes

    def decode(self, ids: Any, length: int | Tensor | None = None) -> Tensor:
        """Ids of one clip → float32 waveform `[C, N]` at the codec's output rate.

        Args:
            ids: in this tokenizer's layout; `<|audio_start|>` before, `<|audio_end|>` and padding behind are left
                out.
            length: samples of the clip (`audio_lengths`); None for all that the frames hold.

        Raises:
            TokenError: ids that no recording can have given, with position, id and reason.
        """
        pieces = list(self.decode_blocks(ids, length))
        return torch.cat(pieces, dim=1) if pieces else torch.zeros(self.codec.facts.channels, 0)

    def batch_decode(self, batch: Any, lengths: Any = None) -> list[Tensor]:
        """`decode` for each clip of a batch."""
        lengths = [None] * len(batch) if lengths is None else list(lengths)
        if len(lengths) != len(batch):
            raise OptionError(f"lengths holds {len(lengths)} numbers for {len(batch)} clips: give one length a clip.")
        return [self.decode(ids, length) for ids, length in zip(batch, lengths, strict=True)]

    def decode_blocks(
        self,
        ids: Any,
        length: int | Tensor | None = None,
        *,
        chunk_length_s: float | None = None,
        context_s: float | None = None,
    ) -> Iterator[Tensor]:
        """`decode` piece by piece `[C, <= window]`, for hours of audio in bounded memory.

        Args:
            chunk_length_s, context_s: the pieces, and what is decoded with each on both sides. Not needed where
                `facts.decoder_reach_samples` is finite, and without effect on the audio there; elsewhere a clip is
                decoded whole unless this asks for windows, which change the audio.
        """
        found: LayoutCodes = self.layout.ids_to_codes(self._without_specials(as_ids(ids)))
        samples = None if length is None else int(length)
        yield from decode_clip(self.codec, found, samples, chunk_length_s, context_s)

    def _without_specials(self, ids: np.ndarray) -> np.ndarray:
        """Cut start and end tokens, and padding behind, from the ids of one clip."""
        if self.layout.is_2d:
            if ids.ndim != 2:
                return ids  # the layout says what is wrong
            used = (ids != self.pad_token_id).any(axis=0).nonzero()[0]
            # The delay layout has padding of its own: no frames are a few steps of nothing else.
            return ids[:, : max(int(used[-1]) + 1 if len(used) else 0, self.layout.num_ids(0))]
        if ids.ndim != 1:
            raise InvalidIdError(
                f"ids have the shape {ids.shape}: decode takes one clip, a flat sequence; use batch_decode for many."
            )
        stop = len(ids)
        while stop and ids[stop - 1] in (self.pad_token_id, self.eos_token_id):
            stop -= 1
        start = 1 if stop and ids[0] == self.bos_token_id else 0
        return ids[start:stop]

    def _check_options(self, options: Mapping[str, Any]) -> None:
        legal = (*self.codec.encode_options, *WINDOW_OPTIONS)
        for key in options:
            if key not in legal:
                raise OptionError(
                    f'{type(self).__name__} knows no option "{key}".{did_you_mean(key, legal)} Legal here: '
                    f"{', '.join(legal)}."
                )


def is_many(audio: Any) -> bool:
    """Whether `audio` is a list of recordings; a list of numbers is one recording."""
    return isinstance(audio, (list, tuple)) and not (audio and isinstance(audio[0], (int, float, np.number)))
