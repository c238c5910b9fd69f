"""APCodec: amplitude and phase spectra, coded side by side into one residual quantizer, and decoded side by side.

Paper: Ai et al., "APCodec: A Neural Audio Codec With Parallel Amplitude and Phase Spectrum Encoding and Decoding",
arXiv 2402.10533. `ApCodecConfig()` is the released 48 kHz model; other keys make the 16 kHz ones, and the causal
variant, of which nothing but the idea is published: what it is made of is ours, see `ApCodecModel`.

Shapes: B clips, N samples, K bins, T transform frames, F code frames, D latent channels, Q codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from audiotok.codec import CodecOutput, CodecTrainingOutput, lengths_from_mask
from audiotok.codecs.apcodec.blocks_apcodec import ApCodecDecoder, ApCodecEncoder, Decoded, Encoded
from audiotok.codecs.apcodec.configuration_apcodec import ApCodecConfig
from audiotok.codecs.apcodec.front_end_apcodec import PHASES
from audiotok.codecs.apcodec.losses_apcodec import ReconstructionLosses, compared_features, distillation_loss
from audiotok.codecs.apcodec.streaming_apcodec import ApCodecStream, encode_frames
from audiotok.errors import ConfigError, OptionError, check_choice
from audiotok.nn.masks import valid_frames
from audiotok.prefixes import PrefixCodec
from audiotok.quantizers.latents import with_noise
from audiotok.quantizers.vector import Quantized, ResidualVectorQuantizer
from audiotok.streaming import streaming_scope
from audiotok.windows import WindowFlips

# Of the weights that a trunk starts with.
TRUNK_STD = 0.02
# What a teacher must share with its student, whose features are compared with its own.
SHARED_KEYS = (
    "sampling_rate n_fft win_length stft_hop_length downsampling_ratio trunk_size num_hidden_layers hidden_size"
).split()


class ApCodecModel(PrefixCodec):
    """The APCodec codec.

    Codes are `[B, Q, F]`, coarse to fine. `encode(..., num_quantizers=m)` gives the first m codes of each frame, which
    do not depend on m; `encode(..., phase=...)` is "settled" or "published", one for all clips or a list of one a clip
    (see `audiotok.codecs.apcodec.front_end_apcodec`).

    What is exact. Batch = alone by masks, and the transform of each clip is made by itself. With a padding mask the
    phase is settled: bins that are zero but for rounding, all of a clip's first frame among them where they are
    negative (it is reflected, hence symmetric), have the phase 0 or +pi on every machine. Certified codes are codes
    of settled phases. Without a mask it is that of `torch.stft` in float32, as published: codes of the first frame,
    of the last one where it is symmetric too, and of bins of mere rounding, may then change with the machine.

    Receptive field. Blocks with layer scale (16 kHz, causal) see finitely far, so windows give the codes of the
    whole clip. The norm of ConvNeXt v2 (48 kHz) pools over time: every code hangs on the whole clip.

    The causal variant (`causal=True`). No code or weights of it are published, only that the network looks back ("feed-
    forward layers and causal deconvolutional layers") and that distillation from a teacher helps; chosen here:
        transform    windows end with their frame and begin before the clip, which is silence and not reflected
        blocks       causal depthwise convolutions of 7 frames, layer scale in place of the norm over time
        down         the strided convolution ends with its code frame: code j sees samples before (j + 1) hops
        up           the transposed convolution hangs on this code frame and the one before it (kernel 16, stride 8)
        others       all convolutions padded on the left
        teacher      a centred model of the same sizes on the sound delayed by `config.delay`, so that its frames and
                     ours lie on each other; the mean squared difference of the states of all four trunks, the latents
                     before and after the teacher's own codes, and the maps of log amplitude and phase, see
                     `distillation_targets`
    Latency is one code frame and the overlap of the windows, `config.latency_ms`: 600 samples, 12.5 ms at the sizes of
    the released 48 kHz model. `streaming()` encodes and decodes while the sound comes. Encoding a whole clip does the
    same arithmetic frame by frame, so codes are equal bit for bit; decoding it does not, so samples are equal up to
    rounding.
    """

    config: ApCodecConfig  # ty: ignore[incompatible-mutable-override]
    config_class = ApCodecConfig
    encode_options = ("phase",)
    # 8 x the largest movement of a near margin between batch shapes, padding, windows, 1 or 2 threads was 1.7e-5, over
    # 5,648 codes of the 16 kHz network and 1,760 of the 48 kHz one: full size, drawn weights, recordings, no flip
    # (`audiotok.recipes.measure_margins`; x86-64 with AVX-512, torch 2.13). The bound is six times as wide, since
    # trained latents lie nearer to their rows. Not measured for the causal variant.
    margin_bounds: ClassVar[dict[tuple[str, torch.dtype], float]] = {("cpu", torch.float32): 1e-4}
    # Of blocks with the norm over time; those with layer scale see finitely far.
    window_flips: ClassVar[tuple[WindowFlips, ...]] = tuple(
        WindowFlips(10.0, context, share, "clips of 30 s, full size, weights drawn at random")
        for context, share in ((1.0, 0.038), (5.0, 0.027))
    )
    loss_names = (
        "amplitude",
        "phase",
        "group_delay",
        "phase_difference",
        "consistency",
        "real",
        "imaginary",
        "log_mel",
        "log_mel_squared",
        "commitment",
        "codebook",
    )

    def __init__(self, config: ApCodecConfig) -> None:
        super().__init__(config)
        self.encoder = ApCodecEncoder(config)
        self.quantizer = ResidualVectorQuantizer(
            config.hidden_size,
            [config.codebook_size] * config.num_codebooks,
            config.hidden_size,
            project=config.codebook_projections,
        )
        self.decoder = ApCodecDecoder(config)
        self.reconstruction_losses = ReconstructionLosses(config)
        self.post_init()
        if config.causal:
            self.encode_options = ()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As published: trunks narrow with biases of zero, all else as PyTorch starts it."""
        super()._init_weights(module)
        branches = (self.encoder.amplitude, self.encoder.phase, self.decoder.amplitude, self.decoder.phase)
        trunks = [layer for branch in branches for layer in branch.trunk.modules()]
        if isinstance(module, (nn.Conv1d, nn.Linear)) and any(module is layer for layer in trunks):
            init.trunc_normal_(module.weight, std=TRUNK_STD)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif module is self.decoder.latent_conv:
            init.zeros_(module.bias)

    def encode(self, input_values: Tensor, padding_mask: Tensor | None = None, **options: Any) -> CodecOutput:
        """As `PrefixCodec.encode`; without `phase` it is settled where there is a padding mask, else published."""
        if padding_mask is None and not self.config.causal and options.get("phase") is None:
            options["phase"] = "published"
        return super().encode(input_values, padding_mask, **options)

    def margin_bound(self, dtype: torch.dtype, device: torch.device | str) -> float:
        return math.inf if self.config.causal else super().margin_bound(dtype, device)

    def check_option_values(self, options: dict[str, Any]) -> None:
        self._phases(options.get("phase"), 1)

    def streaming(self, batch_size: int = 1) -> AbstractContextManager[ApCodecStream]:
        """`with codec.streaming(B) as stream:` encode and decode B clips while they come; see `audiotok.streaming`."""
        if not self.config.causal:
            raise OptionError(
                "This APCodec is not causal: its codes hang on sound that is still to come. Stream with a checkpoint "
                "whose config says causal=true, or encode whole clips."
            )
        return streaming_scope(ApCodecStream(self, batch_size))

    def latents(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the encoder gives before quantization, `[B, D, F]`."""
        self._check_waveforms(input_values)
        waveform, lengths, _ = self._framed(input_values, padding_mask)
        return self.encoder(waveform, lengths, self._default_phases(padding_mask, len(waveform))).latents

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        latent_noise: Tensor | None = None,
        distillation_targets: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CodecTrainingOutput | tuple:
        """Reconstruct `input_values` `[B, 1, N]` with gradients.

        Args:
            padding_mask: `[B, N]`.
            latent_noise: `[B]` standard deviations, over the latents' own; no search is done, noise stands for it.
            distillation_targets: of a teacher, for the loss `distillation`; see `distillation_targets`.

        Losses by name, unweighted: `amplitude`, `phase`, `group_delay`, `phase_difference`, `consistency`, `real`,
        `imaginary`, `log_mel`, `log_mel_squared`, `commitment`, `codebook`. Published weights: 45, 100, 100, 100, 20,
        45, 45, 45, 45, 2.5, 10. `loss` = commitment_cost * commitment + codebook. `distillation_features` are the
        last states of the decoder's two trunks, side by side, `[B, T, 2 C]`; `hidden_states` those that enter the
        encoder's blocks, likewise, and the latents.
        """
        self._check_waveforms(input_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        waveform, lengths, given = self._framed(input_values, padding_mask)
        features = self.encoder.features(waveform, lengths, self._default_phases(padding_mask, len(waveform)))
        encoded = self.encoder.encode(*features, [self.encoder.front_end.num_frames(n) for n in lengths])
        frames = [self.encoder.num_frames(n) for n in lengths]
        quantized, result = self._quantized(encoded.latents, valid_frames(frames, waveform.device), latent_noise)
        decoded = self.decoder(quantized, frames)
        audio = self._heard(decoded, frames)
        with torch.autocast(audio.device.type, enabled=False):
            losses = self.reconstruction_losses(features, decoded, audio, lengths)
        loss = None
        if result is not None:
            losses |= {"commitment": result.commitment, "codebook": result.codebook}
            loss = self.config.commitment_cost * result.commitment + result.codebook
        if distillation_targets is not None:
            mine = compared_features(encoded, quantized, decoded)
            losses["distillation"] = distillation_loss(mine, distillation_targets, frames)
        kept = [min(n, self.facts.held_samples(count)) for n, count in zip(given, frames, strict=True)]
        output = CodecTrainingOutput(
            loss=loss,
            losses=losses,
            audio_values=self._trim(audio[:, None], kept, input_values.shape[-1]),
            audio_codes=None if result is None else result.codes,
            latents=encoded.latents,
            hidden_states=_hidden_states(encoded) if output_hidden_states else None,
            distillation_features=torch.cat([decoded.amplitude_states[-1], decoded.phase_states[-1]], dim=-1),
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def distillation_targets(
        self, teacher: ApCodecModel, input_values: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What a centred teacher makes of these waveforms, frame by frame as this model's `forward` compares it.

        Before the sound this model's `delay` is put in as silence, which lays the middle of the teacher's frames on
        the middle of ours. (The first one differs: the teacher reflects where ours sees silence.)

        Returns:
            `[B, T or F, channels]` each: states of all four trunks, latents, their quantized form, log amplitudes and
            the two maps of the phase; of the teacher's own codes.

        Raises:
            ConfigError: the two have other transforms or widths, or the teacher is causal.
        """
        self._check_teacher(teacher.config)
        waveform, lengths, _ = self._framed(input_values, padding_mask)
        frames = [self.encoder.num_frames(n) for n in lengths]
        if self.config.causal:
            delay = self.config.delay
            lengths = [self.facts.held_samples(n) + delay for n in frames]
            waveform = F.pad(waveform, (delay, max(0, max(lengths) - delay - waveform.shape[1])))
        encoded = teacher.encoder(waveform, lengths, ["settled"] * len(waveform))
        quantized = teacher.quantizer(encoded.latents, num_stages=teacher.config.num_codes).quantized
        return tuple(compared_features(encoded, quantized, teacher.decoder(quantized, frames)))

    # Encoding and decoding

    def _encode(self, input_values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        waveform, frames = input_values[:, 0], [self.encoder.num_frames(n) for n in lengths]
        if self.config.causal:
            codes, margins = encode_frames(self, waveform, max(frames), return_margins)
        else:
            phases = self._phases(options.get("phase"), len(waveform))
            latents = self.encoder(waveform, lengths, phases).latents
            result = self.quantizer(latents, return_margins=return_margins, num_stages=self.config.num_codes)
            codes, margins = result.codes, result.margins
        valid = valid_frames(frames, waveform.device)
        if valid is None:
            return CodecOutput(audio_codes=codes, audio_codes_mask=torch.ones_like(codes).bool(), margins=margins)
        mask = valid[:, None].repeat(1, codes.shape[1], 1)
        if margins is not None:
            margins = margins.masked_fill(~mask, torch.inf)
        return CodecOutput(audio_codes=codes.masked_fill(~mask, 0), audio_codes_mask=mask, margins=margins)

    def _decode(self, codes: Tensor | list[Tensor], frames: list[int], mask: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(codes, Tensor)  # `decode` has checked: this codec has one rate
        return self._heard(self.decoder(self.quantizer.decode(codes), frames), frames)[:, None]

    def _heard(self, decoded: Decoded, frames: Sequence[int]) -> Tensor:
        """The waveform `[B, N]` of a decoded spectrum."""
        with torch.autocast(decoded.phase.device.type, enabled=False):
            return self.decoder.waveform(decoded.spectrum, frames)

    def _framed(self, input_values: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, list[int], list[int]]:
        """Waveforms `[B, N']`, the samples of each that are encoded, and those that were given."""
        waveform = input_values[:, 0]
        if padding_mask is None:
            given = [waveform.shape[1]] * len(waveform)
            return waveform, given, given
        given = lengths_from_mask(padding_mask, *waveform.shape)
        lengths = [self.padded_length(n) for n in given]
        waveform = waveform * padding_mask.to(waveform.dtype)
        return F.pad(waveform, (0, max(0, max(lengths) - waveform.shape[1]))), lengths, given

    # Options

    def _default_phases(self, padding_mask: Tensor | None, batch: int) -> list[str]:
        return ["published" if padding_mask is None and not self.config.causal else "settled"] * batch

    def _phases(self, phase: str | Sequence[str] | None, batch: int) -> list[str]:
        """The kind of phase of each clip."""
        kinds: list[Any] = list(phase) if isinstance(phase, (list, tuple)) else [phase] * batch
        if len(kinds) != batch:
            raise OptionError(f"phase names {len(kinds)} clips, the batch has {batch}: give one, or one a clip.")
        for kind in kinds:
            if kind is not None:
                check_choice("phase", kind, PHASES)
        return [kind or "settled" for kind in kinds]

    # Training

    def _quantized(
        self, latents: Tensor, valid: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Quantized | None]:
        """Quantized latents, or latents with noise in the place of a search; `valid` `[B, F]` counts in the losses."""
        if noise is None:
            result = self.quantizer(latents, num_stages=self.config.num_codes, valid=valid)
            return result.quantized, result
        return with_noise(latents, noise), None

    def _check_teacher(self, teacher: ApCodecConfig) -> None:
        if teacher.causal:
            raise ConfigError("A teacher must see the future: give a model with causal=false.")
        for key in SHARED_KEYS:
            mine, theirs = getattr(self.config, key), getattr(teacher, key)
            if mine != theirs:
                raise ConfigError(
                    f"The teacher's {key}={theirs} is not this model's {mine}: their features cannot be compared. They "
                    f"must share {', '.join(SHARED_KEYS)}."
                )


def _hidden_states(encoded: Encoded) -> tuple[Tensor, ...]:
    """What enters each block of the encoder's two trunks `[B, T, 2 C]`, side by side, and the latents `[B, F, D]`."""
    pairs = zip(encoded.amplitude_states[:-1], encoded.phase_states[:-1], strict=True)
    return (*(torch.cat(pair, dim=-1) for pair in pairs), encoded.latents.transpose(1, 2))
