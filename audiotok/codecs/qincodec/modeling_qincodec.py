"""QinCodec: a continuous autoencoder, and a quantizer that was trained afterwards on its latents.

Paper: Lahrichi et al., "QinCodec: Neural Audio Compression with Implicit Neural Codebooks", arXiv 2503.19597. It has
three stages: the autoencoder alone, without any codes; QINCo2 (arXiv 2501.03078) on the latents of the frozen
encoder; the decoder once more, on quantized latents. No code and no weights are public: the three stages, the Vocos
blocks, the rate and the quantizer are the authors', all sizes and rules of the autoencoder are ours.

Shapes: B clips, C channels, N samples, F frames, D latent dimensions, M codes a frame, K codewords of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from audiotok.codec import AudioCodec, CodecOutput, CodecTrainingOutput, lengths_from_mask
from audiotok.codecs.qincodec.autoencoders_qincodec import (
    CodecAutoencoder,
    Encoded,
    VocosAutoencoder,
    build_autoencoder,
    wrap_codec,
)
from audiotok.codecs.qincodec.configuration_qincodec import QinCodecConfig, QuantizerBlock
from audiotok.errors import CodesError, OptionError
from audiotok.nn.masks import valid_frames
from audiotok.prefixes import PrefixCodec
from audiotok.quantizers.implicit import QINCo2
from audiotok.quantizers.latents import check_latents
from audiotok.quantizers.residual_kmeans import ResidualQuantizer
from audiotok.quantizers.successive import SuccessiveQuantizer, TableStep

# Of the convolutions and linear layers of our trunks at the start, in a normal distribution cut at two of them.
INITIAL_STD = 0.02


class Search(NamedTuple):
    """How a clip is searched: candidates a beam (0: all codewords), and beams; None for the quantizer's own numbers."""

    num_candidates: int | None
    beam_size: int | None


def build_quantizer(dim: int, block: QuantizerBlock) -> SuccessiveQuantizer:
    """The quantizer that a config block describes, not fitted yet."""
    if block.type == "rq":
        return ResidualQuantizer(dim, block.num_quantizers, block.codebook_size, block.beam_size)
    return QINCo2(
        dim,
        block.num_quantizers,
        block.codebook_size,
        block.num_blocks,
        block.embedding_dim,
        block.hidden_dim,
        block.num_candidates,
        block.beam_size,
        block.qinco1_mode,
    )


class QinCodecModel(PrefixCodec):
    """The QinCodec codec, with our own autoencoder or that of another codec (`config.autoencoder`).

    `encode(..., beam_size=..., num_candidates=...)` trade time for nearness: numbers for all clips, or lists of one a
    clip; `num_candidates=0` tries every codeword. `encode(..., num_quantizers=m)` gives m codes a frame by a search
    that ends after m steps; these are not the first m of a longer encoding. `decode` takes any prefix of any encoding.
    `codebook_embeddings` are the tables; of their rows QINCo2's networks make codewords from the second step on.

    Exactness. Our autoencoder sees `facts.receptive_field_samples` on each side and no more, so windows give the codes
    of the whole clip; another codec's sees what its own facts say. On a CPU `encode` takes the clips of a batch one by
    one: batch = alone to the bit, and certified codes cost nothing. Elsewhere frames that a clip does not have are
    masked in every convolution (another codec's clips go through it one by one), latents are quantized each by itself
    in float32, and rounding is left. A margin is the smallest relative gap at any cut of the beam search up to its
    code, also at those that did not decide, so that hardly a clip of some seconds has none near 0: certified codes
    there mean each clip encoded again.
    """

    config_class = QinCodecConfig
    encode_options = ("beam_size", "num_candidates")
    loss_names = ("spectrum", "latent_penalty")
    # One clip after the other: nothing that a batch could move. (Two threads moved margins by 4.1e-7 at most and no
    # code, of 10,560 at full size with drawn weights; as much as a batch would have.)
    margin_bounds: ClassVar[dict[tuple[str, torch.dtype], float]] = {("cpu", torch.float32): 0.0}

    def __init__(self, config: QinCodecConfig) -> None:
        super().__init__(config)
        self.autoencoder = build_autoencoder(config)
        self.quantizer = build_quantizer(config.latent_dim, config.quantizer_block)
        if not self.quantizer.selects:  # it has no second tables to choose candidates with: all are tried
            self.encode_options = ("beam_size",)
        self.post_init()

    @classmethod
    @torch.no_grad()
    def around(cls, codec: AudioCodec, quantizer: dict[str, Any]) -> QinCodecModel:
        """The autoencoder of a codec, sharing its weights, with a quantizer that is yet to be fitted.

        Args:
            codec: a QinCodec, whose quantizer is replaced; or another codec that can decode its latents.
            quantizer: keys of `QuantizerBlock`.

        Raises:
            ConfigError: the codec decodes nothing but codes, or has no single rate.
        """
        if isinstance(codec, QinCodecModel):
            values = {key: getattr(codec.config, key) for key in codec.config.own_keys()}
            autoencoder, values = codec.autoencoder, values | {"num_quantizers": None, "decoder_depths": None}
        else:
            autoencoder = wrap_codec(codec)
            probe = torch.zeros(1, codec.facts.channels, codec.padded_length(1), device=codec.device)
            inner = {"model_type": codec.config.model_type}
            inner |= {key: getattr(codec.config, key) for key in codec.config.own_keys()}
            values = {"autoencoder": inner, "latent_dim": autoencoder.to_latents(probe).shape[1]}
        settings: dict[str, Any] = values | {"quantizer": quantizer}
        model = cls(QinCodecConfig(**settings))
        model.autoencoder = autoencoder
        model.quantizer.to(codec.device)
        return model.eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Of the quantizer's layers each step takes care, and of another codec's that codec.
        ours = isinstance(module, nn.Conv1d | nn.Linear) and any(module is one for one in self.autoencoder.modules())
        if ours:
            init.trunc_normal_(module.weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
            if module.bias is not None:
                init.zeros_(module.bias)
        if isinstance(module, SuccessiveQuantizer | TableStep):  # what training measures; a scale of 0 is "not fitted"
            for name, buffer in module.named_buffers(recurse=False):
                fill = init.ones_ if name == "xtarget_var" else init.zeros_
                fill(buffer)
        if isinstance(module, QINCo2):
            module.reset_networks()

    def check_option_values(self, options: dict[str, Any]) -> None:
        self._searches(options, 1)

    def padded_length(self, num_samples: int) -> int:
        if isinstance(self.autoencoder, CodecAutoencoder):
            return self.autoencoder.codec.padded_length(num_samples)
        return super().padded_length(num_samples)

    def latents(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the encoder gives, `[B, D, F]`: continuous, in the units that the quantizer was fitted to."""
        self._check_waveforms(input_values)
        return self.autoencoder.encode(*self._framed(input_values, padding_mask)).latents

    def decode_latents(self, latents: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Decode latents `[B, D, F]` that were never quantized: what no quantizer can pass.

        Returns `[B, C, N]`; `lengths` as in `decode`.

        Raises:
            LatentsError: wrong dtype or shape, or not finite.
        """
        check_latents(latents, self.config.latent_dim)
        num_frames = latents.shape[-1]
        if lengths is None:
            return self.autoencoder.decode(latents, [num_frames] * len(latents)).audio
        samples = [int(n) for n in lengths]
        frames = [self._frames_of(n, num_frames) for n in samples]
        audio = self.autoencoder.decode(latents[..., : max(frames)], frames).audio
        return self._trim(audio, [self.facts.output_length(n) for n in samples])

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        latent_noise: Tensor | None = None,
        num_quantizers: int | Sequence[int] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CodecTrainingOutput | tuple:
        """Reconstruct `input_values` `[B, C, N]` with gradients.

        Stage 1, with `latent_noise`: encoder and decoder learn, nothing is quantized. Stage 3, without: the decoder
        learns from quantized latents, encoder and quantizer are frozen, and no gradient passes the codes (there is no
        straight-through). Stage 2 is not done here but on a set of latents: `recipes/fit_quantizer.py`.

        Args:
            latent_noise: `[B]`; Gaussian noise on the latents that stands for the quantizer, in shares of the
                batch's standard deviation. 0 for none.
            num_quantizers: stage 3: codes of each frame that the decoder gets, the first ones of the whole encoding;
                one number, or one a clip. None draws from `config.decoder_depths` in training, else takes all.

        Losses by name: `spectrum` (our autoencoder; L1 of compressed complex spectra), and in stage 1
        `latent_penalty`, mean(z^2). `loss` = spectrum + config.latent_penalty * latent_penalty.
        """
        self._check_waveforms(input_values)
        waveform, lengths = self._framed(input_values, padding_mask)
        codes, losses = None, {}
        if latent_noise is not None:
            encoded = self.autoencoder.encode(waveform, lengths)
            decoder_input = self._noisy(encoded.latents, encoded.frames, latent_noise)
            losses["latent_penalty"] = _frames_of_all(encoded.latents, encoded.frames).square().mean()
        else:
            encoded = self._encode_frozen(waveform, lengths)
            codes, _ = self._search(encoded.latents, encoded.frames, [Search(None, None)] * len(waveform))
            decoder_input = self._prefixes(codes, self._depths(num_quantizers, len(waveform)))
        decoded = self.autoencoder.decode(decoder_input.to(encoded.latents.dtype), encoded.frames)
        given = [input_values.shape[-1]] * len(waveform) if padding_mask is None else lengths
        if isinstance(self.autoencoder, VocosAutoencoder):
            losses["spectrum"] = self.autoencoder.spectral_distance(decoded.audio, waveform, given)
        terms = {"spectrum": 1.0, "latent_penalty": self.config.latent_penalty}
        output = CodecTrainingOutput(
            loss=sum((terms[name] * loss for name, loss in losses.items()), start=decoder_input.new_zeros(())),
            losses=losses,
            audio_values=self._trim(decoded.audio, [self.facts.output_length(input_values.shape[-1])] * len(waveform)),
            audio_codes=codes,
            latents=encoded.latents,
            hidden_states=tuple(encoded.hidden_states) if self._wants_states(output_hidden_states) else None,
            distillation_features=decoded.features,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    # Codes

    def _encode(self, input_values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        searches, frames, codes, margins = self._searches(options, len(input_values)), [], [], []
        # On a CPU one clip after the other: bit for bit what each has alone, in no more time.
        at_once = 1 if input_values.device.type == "cpu" else len(lengths)
        for first in range(0, len(lengths), at_once):
            part = slice(first, first + at_once)
            encoded = self.autoencoder.encode(input_values[part, :, : max(lengths[part])], lengths[part])
            found, margin = self._search(encoded.latents, encoded.frames, searches[part])
            frames += encoded.frames
            codes.append(found)
            margins.append(margin)
        audio_codes = _joined(codes, 0)
        return CodecOutput(
            audio_codes=audio_codes,
            audio_codes_mask=_mask(frames, audio_codes),
            margins=_joined(margins, torch.inf) if return_margins else None,
        )

    def _search(self, latents: Tensor, frames: list[int], searches: list[Search]) -> tuple[Tensor, Tensor]:
        """Codes `[B, M, F]` of latents `[B, D, F]`, 0 where no frame is, and their margins, infinite there."""
        vectors, count = latents.detach().transpose(1, 2), self.config.num_codes
        codes = torch.zeros(*vectors.shape[:2], count, dtype=torch.long, device=latents.device)
        margins = torch.full(codes.shape, torch.inf, device=latents.device, dtype=torch.float32)
        exists = torch.arange(vectors.shape[1]) < torch.tensor(frames)[:, None]
        for search in dict.fromkeys(searches):
            chosen = exists & torch.tensor([one == search for one in searches])[:, None]
            chosen = chosen.to(latents.device)
            found, margin = self.quantizer.encode(
                vectors[chosen].float(),
                num_candidates="default" if search.num_candidates is None else search.num_candidates,
                beam_size=search.beam_size,
                num_quantizers=count,
                return_margins=True,
            )
            codes[chosen], margins[chosen] = found, margin.to(margins.dtype)
        return codes.transpose(1, 2), margins.transpose(1, 2)

    def _decode(self, codes: Tensor | list[Tensor], frames: list[int], mask: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(codes, Tensor)  # `decode` has checked: this codec has one rate
        return self.autoencoder.decode(self._dequantize(codes), frames).audio

    def _dequantize(self, codes: Tensor) -> Tensor:
        """Codes `[B, m, F]` of the first m steps → latents `[B, D, F]`, float32."""
        vectors = self.quantizer.decode(codes.transpose(1, 2).flatten(0, 1))
        return vectors.view(len(codes), codes.shape[2], -1).transpose(1, 2)

    def _searches(self, options: dict[str, Any], batch: int) -> list[Search]:
        """The settings of each clip, checked."""
        most = self.config.quantizer_block.codebook_size
        columns = []
        for name, least in Search(num_candidates=0, beam_size=1)._asdict().items():
            given = options.get(name)
            values = list(given) if isinstance(given, (list, tuple)) else [given] * batch
            for value in values if len(values) == batch else [given]:
                legal = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
                if value is not None and not legal:
                    raise OptionError(
                        f"{name}={value!r} is not legal: choose a whole number from {least} to {most}, or a list of "
                        "one a clip."
                    )
            columns.append(values)
        return [Search(*values) for values in zip(*columns, strict=True)]

    # Training

    def _framed(self, input_values: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """Waveforms `[B, C, N']` with room for whole frames where a mask says how long each clip is."""
        if padding_mask is None:
            return input_values, [input_values.shape[-1]] * len(input_values)
        lengths = lengths_from_mask(padding_mask, len(input_values), input_values.shape[-1])
        lengths = [self.padded_length(n) for n in lengths]
        waveform = input_values * padding_mask[:, None].to(input_values.dtype)
        return nn.functional.pad(waveform, (0, max(0, max(lengths) - waveform.shape[-1]))), lengths

    @torch.no_grad()
    def _encode_frozen(self, waveform: Tensor, lengths: list[int]) -> Encoded:
        """As after training: a wrapped codec's batch norms must not move either."""
        training = self.autoencoder.training
        encoded = self.autoencoder.eval().encode(waveform, lengths)
        self.autoencoder.train(training)
        return encoded

    @staticmethod
    def _noisy(latents: Tensor, frames: list[int], shares: Tensor) -> Tensor:
        spread = _frames_of_all(latents.detach(), frames).std()
        return latents + torch.randn_like(latents) * (spread * shares.to(latents))[:, None, None]

    def _depths(self, asked: int | Sequence[int] | None, batch: int) -> list[int]:
        """Codes a frame that the decoder gets of each clip."""
        choices = self.config.decoder_depths
        if asked is None and self.training and choices:
            weights = torch.ones(len(choices))
            weights[-1] = max(1, len(choices) - 1)
            drawn = torch.multinomial(weights, batch, replacement=True).tolist()
            return [min(choices[i], self.config.num_codes) for i in drawn]
        asked = self.config.num_codes if asked is None else asked
        depths = [asked] * batch if isinstance(asked, int) else list(asked)
        if len(depths) != batch or not all(1 <= depth <= self.config.num_codes for depth in depths):
            raise CodesError(
                f"num_quantizers={asked!r} is not legal: 1 to {self.config.num_codes}, one number or one for each of "
                f"{batch} clips."
            )
        return depths

    @torch.no_grad()
    def _prefixes(self, codes: Tensor, depths: list[int]) -> Tensor:
        """Latents of the first `depths[i]` codes of each frame of clip i."""
        return torch.cat([self._dequantize(codes[i : i + 1, :depth]) for i, depth in enumerate(depths)])

    def _wants_states(self, asked: bool | None) -> bool:
        wanted = self.config.output_hidden_states if asked is None else asked
        return bool(wanted) and isinstance(self.autoencoder, VocosAutoencoder)


def _joined(parts: list[Tensor], value: float) -> Tensor:
    """`[b, M, f]` each → `[B, M, F]`, filled up with `value`."""
    longest = max(part.shape[-1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, longest - part.shape[-1]), value=value) for part in parts])


def _mask(frames: list[int], codes: Tensor) -> Tensor:
    """`[B, M, F]` bool, True where a clip has a frame."""
    valid = valid_frames(frames, codes.device)
    if valid is None:
        return torch.ones_like(codes, dtype=torch.bool)
    return valid[:, None].repeat(1, codes.shape[1], 1)


def _frames_of_all(latents: Tensor, frames: list[int]) -> Tensor:
    """The latents of frames that exist, of `[B, D, F]`: `[frames, D]`."""
    rows, valid = latents.transpose(1, 2), valid_frames(frames, latents.device)
    return rows.flatten(0, 1) if valid is None else rows[valid]
