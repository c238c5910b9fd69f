"""VRVQ: a Descript Audio Codec whose depth, the number of codebooks kept, varies from frame to frame.

Paper: Chae et al., "Variable Bitrate Residual Vector Quantization for Audio Coding", arXiv 2410.06016.
`VrvqConfig()` is the published main configuration; `variable_rate=False` is the same codec at a constant rate.

Shapes: B clips, N samples, F frames, D latent channels, Q codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from audiotok.certified import Certificate
from audiotok.codec import CodecOutput, CodecTrainingOutput, lengths_from_mask
from audiotok.codecs.vrvq.autoencoder_vrvq import ImportanceSubnet, VrvqDecoder, VrvqEncoder
from audiotok.codecs.vrvq.configuration_vrvq import VrvqConfig
from audiotok.codecs.vrvq.rate_vrvq import DEPTH_OPTIONS, DepthChoice, DepthRate, depth_choices, find_level
from audiotok.errors import OptionError, check_choice
from audiotok.nn.masks import valid_frames
from audiotok.nn.weight_norm import WeightNormConv1d, WeightNormLinear
from audiotok.prefixes import PrefixCodec
from audiotok.quantizers.latents import with_noise
from audiotok.quantizers.variable import (
    VariableResidualQuantizer,
    depth_margins,
    depth_mask,
    depths_of,
    straight_through_mask,
)


@dataclass
class Analysis:
    """What the encoder finds in a batch.

    Attributes:
        hidden_states: features `[B, F, C]` and latents `[B, F, D]`.
        frames: of each clip. valid: `[B, F]` bool, None where all frames exist.
    """

    hidden_states: tuple[Tensor, Tensor]
    frames: list[int]
    valid: Tensor | None

    @property
    def features(self) -> Tensor:
        """`[B, C, F]`."""
        return self.hidden_states[0].transpose(1, 2)

    @property
    def latents(self) -> Tensor:
        """`[B, D, F]`."""
        return self.hidden_states[1].transpose(1, 2)

    @property
    def exists(self) -> Tensor:
        """`[B, F]` bool, `valid` or all."""
        if self.valid is not None:
            return self.valid
        batch, _, frames = self.latents.shape
        return torch.ones(batch, frames, dtype=torch.bool, device=self.latents.device)


class VrvqModel(PrefixCodec):
    """The VRVQ codec.

    Depth. `encode(..., level=...)` scales the importance of all frames (1 by default; the more, the deeper),
    `bitrate=...` finds the level that meets a number of bits per second, depths counted, within 2 %, and
    `num_quantizers=n` gives every frame n books. Each is one value, or a list of one a clip. With
    `bitrate_per="batch"` one level is found that meets the bitrate over all clips together. The depth is in
    `audio_codes_mask`; codes do not depend on it.

    Constant rate. A codec with `variable_rate=False`, or `with_num_quantizers(n)` of any, has frames of n codes and
    nothing to choose; `encode(..., num_quantizers=m)` gives the first m of them.

    What is exact. The receptive field is finite (`facts.receptive_field_samples`), and every clip of a batch is masked
    at the input of each convolution: batches and windows give what the clip alone gives, up to rounding. Certified
    codes are exact, depths included: importance near the edge between two depths counts as a near-tie. Padding to
    whole frames is the published framing, so `partial_frame` changes nothing here.
    """

    config: VrvqConfig  # ty: ignore[incompatible-mutable-override]
    config_class = VrvqConfig
    encode_options = DEPTH_OPTIONS
    loss_names = ("commitment", "codebook", "rate")
    # 8 x the largest movement between batch shapes, padding, windows and 1 or 2 threads. Of near margins: 2.0e-5 over
    # 19,256 codes of the full size with drawn weights, 1.5e-5 over 38,744 codes of vrvq-mini. Of importance, which
    # margins of the first book count in: 1.9e-5 and 2.3e-5 of itself, so whatever the level. No code of any book and
    # no depth flipped (`recipes.measure_margins` with all books, depths apart; x86-64 with AVX-512, torch 2.13).
    margin_bounds: ClassVar[dict[tuple[str, torch.dtype], float]] = {("cpu", torch.float32): 1.9e-4}

    def __init__(self, config: VrvqConfig) -> None:
        super().__init__(config)
        self.encoder = VrvqEncoder(config)
        self.importance = ImportanceSubnet(config) if config.variable_rate else None
        self.quantizer = VariableResidualQuantizer(
            config.latent_channels, [config.codebook_size] * config.num_codebooks, config.codebook_dims, project=True
        )
        self.decoder = VrvqDecoder(config)
        if not config.variable_depth:
            self.encode_options = ()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As PyTorch starts each layer, but for the biases of plain convolutions, which start at zero."""
        super()._init_weights(module)
        if isinstance(module, (WeightNormConv1d, WeightNormLinear)):
            init.zeros_(module.bias)

    def with_num_quantizers(self, num_quantizers: int | None) -> Self:
        """As in every codec with prefixes; with a number, there is nothing left to choose in encoding."""
        same = super().with_num_quantizers(num_quantizers)
        same.encode_options = DEPTH_OPTIONS if same.config.variable_depth else ()
        return same

    @property
    def rate(self) -> DepthRate:
        """Bits a second from mean depths."""
        return DepthRate(float(self.facts.frame_rate), self.config.num_codebooks, self.config.codebook_size)

    # Encoding

    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        *,
        bitrate_per: str = "clip",
        **options: Any,
    ) -> CodecOutput:
        """As `PrefixCodec.encode`, with `level=`, `bitrate=` or `num_quantizers=` as the class describes them.

        Args:
            bitrate_per: "clip" meets `bitrate` in every clip, "batch" in all clips together, at one level. The
                latter reads the batch twice, and a clip's depths then depend on the others.
        """
        options = self._with_shared_level(input_values, padding_mask, bitrate_per, options)
        return super().encode(input_values, padding_mask, **options)

    def encode_certified(
        self,
        input_values: Tensor,
        padding_mask: Tensor,
        bound: float | None = None,
        *,
        bitrate_per: str = "clip",
        **options: Any,
    ) -> tuple[CodecOutput, Certificate]:
        """As in every codec; with `bitrate_per="batch"`, codes are those of each clip alone at the level found."""
        options = self._with_shared_level(input_values, padding_mask, bitrate_per, options)
        return super().encode_certified(input_values, padding_mask, bound, **options)

    def level_for_bitrate(self, input_values: Tensor, padding_mask: Tensor | None, bitrate: float) -> float:
        """The one level at which all clips `[B, 1, N]` together take `bitrate` bits per second, within 2 %.

        Raises:
            OptionError: no level does, or the codec has none.
        """
        self._check_options({"bitrate": bitrate})
        analysis = self._analyse(input_values, padding_mask)
        importance = self._importance(analysis).detach().cpu().numpy()
        together = np.concatenate([row[:count] for row, count in zip(importance, analysis.frames, strict=True)])
        return find_level(together, self.rate.check(bitrate), self.rate).level

    def depths_for_bitrate(self, importance: Tensor, bitrate: float) -> Tensor:
        """Books of each frame `[F]` int64 of a clip of this importance `[F]`, as `encode(bitrate=...)` takes them.

        Raises:
            OptionError: the clip cannot have this bitrate.
        """
        choice = DepthChoice(bitrate=self.rate.check(bitrate))
        return self._depths(importance[None], [choice], [len(importance)])[0][0]

    def bits_per_second(self, output: CodecOutput) -> Tensor:
        """Bits a second `[B]` of what `encode` returned, depths counted, over the time that its frames take."""
        mask = output.audio_codes_mask
        mean_depth = mask.sum(dim=(1, 2)) / mask[:, 0].sum(dim=1)
        if self.config.variable_depth:
            return self.rate.bits_per_second(mean_depth)
        return mean_depth * self.rate.code_bits * self.rate.frame_rate

    def check_option_values(self, options: dict[str, Any]) -> None:
        self._choices(options, 1)

    def latents(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the encoder gives before quantization, `[B, D, F]`."""
        return self._analyse(input_values, padding_mask).latents

    def _encode(self, input_values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        choices = self._choices(options, len(input_values))
        analysis = self._analyse_framed(input_values, lengths)
        found = self.quantizer(analysis.latents, None, return_margins, self.config.num_codes)
        mask, importance, margins = analysis.exists[:, None].repeat(1, self.config.num_codes, 1), None, found.margins
        if self.config.variable_depth:
            importance = self._importance(analysis).detach()
            depths, doubts = self._depths(importance, choices, analysis.frames)
            mask = mask & depth_mask(depths, self.config.num_codes)
            if margins is not None:
                # Every frame has a code of the first book, so there its depth's doubt is always told.
                margins[:, 0] = margins[:, 0].minimum(doubts)
        if margins is not None:
            margins = margins.masked_fill(~mask, torch.inf)
        return CodecOutput(found.codes.masked_fill(~mask, 0), mask, margins=margins, importance=importance)

    def _depths(self, importance: Tensor, choices: list[DepthChoice], frames: list[int]) -> tuple[Tensor, Tensor]:
        """Books of each frame `[B, F]`, and how near another number was (infinitely far where it is given)."""
        levels, sure = [choice.level or 0.0 for choice in choices], [True] * len(choices)
        for i, (row, count, choice) in enumerate(zip(importance, frames, choices, strict=True)):
            if choice.bitrate is not None:
                found = find_level(row[:count].cpu().numpy(), choice.bitrate, self.rate)
                levels[i], sure[i] = found.level, found.is_nearest
        books, device = self.config.num_codebooks, importance.device
        scaled = self._scaled(importance, levels)
        depths = depths_of(scaled, books)
        # Rounding may tell levels apart that were taken for one.
        doubts = depth_margins(scaled, books).masked_fill(~torch.tensor(sure, device=device)[:, None], 0.0)
        counts = torch.tensor([choice.num_quantizers or 0 for choice in choices], device=device)[:, None]
        return counts.where(counts > 0, depths), doubts.masked_fill(counts > 0, torch.inf)

    def _scaled(self, importance: Tensor, levels: list[float]) -> Tensor:
        """Importance `[B, F]` at the level of each clip: its whole part is the depth but for one."""
        return importance * torch.tensor(levels, device=importance.device)[:, None] * self.config.num_codebooks

    def _choices(self, options: dict[str, Any], batch: int) -> list[DepthChoice]:
        """What decides the depth of each clip, checked."""
        return depth_choices(options, batch, self.rate)

    def _with_shared_level(
        self, input_values: Tensor, padding_mask: Tensor | None, bitrate_per: str, options: dict[str, Any]
    ) -> dict[str, Any]:
        """The options with a level in place of a bitrate that all clips meet together."""
        check_choice("bitrate_per", bitrate_per, ("clip", "batch"))
        if bitrate_per == "clip":
            return options
        bitrate = options.get("bitrate")
        if not isinstance(bitrate, (int, float)):
            raise OptionError(f'bitrate={bitrate!r} does not fit bitrate_per="batch": give one number for all clips.')
        self._choices({name: options.get(name) for name in DEPTH_OPTIONS}, len(input_values))
        return {**options, "bitrate": None, "level": self.level_for_bitrate(input_values, padding_mask, bitrate)}

    # What encoding and training share

    def _analyse(self, input_values: Tensor, padding_mask: Tensor | None) -> Analysis:
        """Clips as `encode` takes them."""
        self._check_waveforms(input_values)
        batch, _, samples = input_values.shape
        if padding_mask is None:
            return self._analyse_framed(input_values, [samples] * batch)
        lengths = lengths_from_mask(padding_mask, batch, samples)
        waveform = input_values * padding_mask[:, None].to(input_values.dtype)
        return self._analyse_framed(waveform, [self.padded_length(n) for n in lengths])

    def _analyse_framed(self, waveform: Tensor, lengths: list[int]) -> Analysis:
        """Clips `[B, 1, N]` of these lengths with zeros behind, each padded to whole frames as published."""
        hop = self.config.hop_length
        lengths = [-(-n // hop) * hop for n in lengths]
        waveform = F.pad(waveform, (0, max(0, max(lengths) - waveform.shape[-1])))[..., : max(lengths)]
        features, latents, frames = self.encoder(waveform, lengths)
        return Analysis((features, latents), frames, valid_frames(frames, latents.device))

    def _importance(self, analysis: Analysis, detach: bool = False) -> Tensor:
        """`[B, F]` in (0, 1)."""
        assert self.importance is not None  # only codecs of variable depth come here
        features = analysis.features.detach() if detach else analysis.features
        return self.importance(features, analysis.frames)

    def _decode(self, codes: Tensor | list[Tensor], frames: list[int], mask: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(codes, Tensor)  # `decode` has checked: this codec has one rate
        return self.decoder(self.quantizer.decode(codes.long(), mask), frames)[0]

    # Training

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        level: float | Sequence[float | None] | None = None,
        latent_noise: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> CodecTrainingOutput | tuple:
        """Reconstruct `input_values` `[B, 1, N]` with gradients.

        Args:
            padding_mask: `[B, N]`.
            level: as in `encode`. Without it, training draws a level a clip, and lets the last `full_codebook_rate`
                of the batch keep all books; eval mode takes level 1. (Constant rate: training lets the first
                `quantizer_dropout` of the batch keep a random number of books.)
            latent_noise: `[B]` standard deviations, over the latents' own; no search is done, noise stands for it, and
                there is neither depth nor loss.
            generator: of what is drawn, on the CPU; None for PyTorch's own.

        Losses by name: `commitment` and `codebook` of the books kept, and, where the depth varies, `rate`: the mean
        importance of the clips whose depth it decides. `loss` weighs them with `commitment_cost`, 1 and `rate_cost`.

        `audio_codes` are those of all books in training; in eval mode, as `encode` gives them. `hidden_states` are the
        features that the importance is read from, and the latents.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        analysis = self._analyse(input_values, padding_mask)
        codes, losses = None, {}
        if latent_noise is None:
            mask, losses = self._kept(analysis, level, generator)
            found = self.quantizer(analysis.latents, num_stages=self.config.num_codes, mask=mask, valid=analysis.valid)
            quantized, codes = found.quantized, found.codes if self.training else found.codes.masked_fill(mask == 0, 0)
            losses = {"commitment": found.commitment, "codebook": found.codebook, **losses}
        else:
            quantized = with_noise(analysis.latents, latent_noise)
        audio, states = self.decoder(quantized, analysis.frames)
        weights = {"commitment": self.config.commitment_cost, "codebook": 1.0, "rate": self.config.rate_cost}
        output = CodecTrainingOutput(
            loss=torch.stack([weights[name] * loss for name, loss in losses.items()]).sum() if losses else None,
            losses=losses,
            audio_values=self._trim(audio, [input_values.shape[-1]] * len(audio)),
            audio_codes=codes,
            latents=analysis.latents,
            hidden_states=analysis.hidden_states if output_hidden_states else None,
            distillation_features=states,
        )
        return output if return_dict else output.to_tuple()

    def _kept(
        self, analysis: Analysis, level: Any, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mask of books `[B, Q, F]` with its gradients, and what its rate costs."""
        if not self.config.variable_depth:
            self._check_options({} if level is None else {"level": level})
            return self._mask_of(self._drawn_counts(len(analysis.latents), generator), analysis), {}
        if level is None and self.training:
            levels, counts = self._drawn_levels(len(analysis.latents), generator)
        else:
            levels = [choice.level or 0.0 for choice in self._choices({"level": level}, len(analysis.latents))]
            counts = [0] * len(levels)
        importance = self._importance(analysis, detach=self.config.detach_importance)
        scaled = self._scaled(importance, levels)
        mask = straight_through_mask(scaled, self.config.num_codes, self.config.surrogate_alpha)
        decides = torch.tensor(counts, device=mask.device)[:, None] == 0
        mask = mask.where(decides[:, None], self._mask_of(counts, analysis)) * analysis.exists[:, None]
        return mask, {"rate": importance[decides & analysis.exists].mean()}

    def _mask_of(self, counts: list[int], analysis: Analysis) -> Tensor:
        """`[B, Q, F]` float of clips that keep so many books in every frame."""
        per_clip = torch.tensor(counts, device=analysis.latents.device)[:, None]
        return (depth_mask(per_clip, self.config.num_codes) & analysis.exists[:, None]).float()

    def _drawn_levels(self, batch: int, generator: torch.Generator | None) -> tuple[list[float], list[int]]:
        """A level a clip from the range of the config, and the books of those that keep all of them (else 0)."""
        share = torch.rand(batch, generator=generator)
        low, high = self.config.level_min, self.config.level_max
        if self.config.level_distribution == "uniform":
            levels = low + share * (high - low)
        else:
            levels = (math.log(low) + share * (math.log(high) - math.log(low))).exp()
        num_full = math.floor(batch * self.config.full_codebook_rate)
        return levels.tolist(), [0] * (batch - num_full) + [self.config.num_codes] * num_full

    def _drawn_counts(self, batch: int, generator: torch.Generator | None) -> list[int]:
        """Books of each clip; in training a random number in the first share of the batch."""
        books = self.config.num_codes
        if not self.training:
            return [books] * batch
        drawn = torch.randint(1, books + 1, (batch,), generator=generator).tolist()
        num_dropped = math.floor(batch * self.config.quantizer_dropout)
        return drawn[:num_dropped] + [books] * (batch - num_dropped)
