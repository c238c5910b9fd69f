"""AUV: conformer encoder on STFT features, one nested codebook, conformer decoder with an iSTFT head.

Paper: Chen et al., "AUV: Teaching Audio Universal Vector Quantization with Single Nested Codebook",
arXiv 2509.21968. `AuvConfig()` is the released model; `block_type: convnext` and `subframe_mel` features make the
small bundled one.

Shapes: B clips, N samples, F frames, C hidden channels, W = n_fft / 2 + 1 bins, Q codebooks. `valid` `[B, F]` bool
marks the frames that exist, None where all do; with it every clip of a batch is computed as it is alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.audio_utils import mel_filter_bank

from audiotok.codec import AudioCodec, CodecOutput, CodecTrainingOutput, lengths_from_mask
from audiotok.codecs.auv.configuration_auv import AuvConfig, AuvStack
from audiotok.errors import OptionError, did_you_mean
from audiotok.nn.conformer import ConformerStack
from audiotok.nn.convnext import ConvNextStack
from audiotok.nn.masks import valid_frames
from audiotok.nn.stft import istft, magnitude, phase, reflect_pad, stft
from audiotok.quantizers.latents import check_latents
from audiotok.quantizers.vector import Range, ResidualVectorQuantizer
from audiotok.windows import WindowFlips

# Sub-frame features: four windows of one hop within each frame, 64 mel bands each.
SUBFRAMES, SUBFRAME_BANDS = 4, 64
# Ceiling of the head's magnitudes.
MAX_MAGNITUDE = 100.0


def build_stack(stack: AuvStack, hidden_size: int) -> ConformerStack | ConvNextStack:
    if stack.block_type == "convnext":
        return ConvNextStack(stack.num_layers, hidden_size, stack.ffn_mult * hidden_size, stack.conv_kernel_size)
    return ConformerStack(
        stack.num_layers,
        hidden_size,
        stack.head_dim,
        ffn_mult=stack.ffn_mult,
        num_heads=stack.num_attention_heads or max(1, hidden_size // stack.head_dim),
        qk_norm_scale=stack.qk_norm_scale if stack.qk_norm else None,
        conv_kernel_size=stack.conv_kernel_size,
        causal_conv=stack.causal_conv,
    )


class AuvFrontEnd(nn.Module):
    """Waveforms → features of each frame. No parameters; always float32."""

    def __init__(self, config: AuvConfig) -> None:
        super().__init__()
        self.hop, self.n_fft, self.edge = config.hop_length, config.n_fft, config.edge
        self.names, self.standardize = config.input_features, config.standardize_features
        self.subframe_fft = 1 << (self.hop - 1).bit_length()
        bins = self.n_fft // 2 + 1
        widths = {"log_magnitude": bins, "phase": bins, "subframe_mel": SUBFRAMES * SUBFRAME_BANDS}
        self.width = sum(widths[name] for name in self.names)
        if "subframe_mel" in self.names:
            # A NumPy array, not a buffer: nothing to lose on the meta device or in a cast.
            self.mel = mel_filter_bank(
                self.subframe_fft // 2 + 1, SUBFRAME_BANDS, 0.0, config.sampling_rate / 2, config.sampling_rate,
                mel_scale="slaney",
            ).astype(np.float32)  # fmt: skip

    def forward(self, waveform: Tensor, lengths: list[int]) -> Tensor:
        """`[B, N]` → `[B, F, width]`, F = max(lengths) // hop."""
        num_frames = max(lengths) // self.hop
        features: dict[str, Tensor] = {}
        if "log_magnitude" in self.names or "phase" in self.names:
            features.update(self.spectrum(waveform, lengths, num_frames))
        if "subframe_mel" in self.names:
            features["subframe_mel"] = self.subframe_mel(waveform, lengths, num_frames)
        return torch.cat([features[name] for name in self.names], dim=-1)

    def spectrum(self, waveform: Tensor, lengths: list[int], num_frames: int) -> dict[str, Tensor]:
        """ln(|S| + 1e-5) and the phase in (-pi, pi], each `[B, F, W]`."""
        total = (num_frames - 1) * self.hop + self.n_fft
        spectrum = stft(reflect_pad(waveform, self.edge, lengths, total), self.n_fft, self.hop)
        log_magnitude = (magnitude(spectrum) + 1e-5).log()
        if self.standardize:
            log_magnitude = (log_magnitude + 4) / 3
        out = {"log_magnitude": log_magnitude.transpose(1, 2)}
        if "phase" in self.names:
            out["phase"] = phase(spectrum).transpose(1, 2)
        return out

    def subframe_mel(self, waveform: Tensor, lengths: list[int], num_frames: int) -> Tensor:
        """Log-mels of one-hop windows centred on the quarters of each frame, `[B, F, 4 * 64]`."""
        hop = self.hop // SUBFRAMES
        pad = self.subframe_fft // 2 - hop // 2  # the first window is centred on the middle of the first quarter
        total = (num_frames * SUBFRAMES - 1) * hop + self.subframe_fft
        spectrum = stft(reflect_pad(waveform, pad, lengths, total), self.subframe_fft, hop, self.hop)
        mel = magnitude(spectrum).transpose(1, 2) @ torch.from_numpy(self.mel).to(waveform.device)
        log_mel = (mel + 1e-4).log()
        if self.standardize:
            log_mel = (log_mel + 2) / 3
        return log_mel.unflatten(1, (num_frames, SUBFRAMES)).flatten(2)


class AuvEncoder(nn.Module):
    def __init__(self, config: AuvConfig) -> None:
        super().__init__()
        self.front_end = AuvFrontEnd(config)
        self.input_proj = nn.Linear(self.front_end.width, config.hidden_size)
        self.backbone = build_stack(config.encoder_stack, config.hidden_size)

    def forward(self, waveform: Tensor, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
        """`[B, N]` → latents `[B, C, F]`, and the hidden states `[B, F, C]`."""
        with torch.autocast(waveform.device.type, enabled=False):
            features = self.front_end(waveform.float(), lengths)
        valid = valid_frames([n // self.front_end.hop for n in lengths], waveform.device)
        x = self.input_proj(features.to(self.input_proj.weight.dtype))
        x, hidden_states = self.backbone(x, valid)
        return x.transpose(1, 2), hidden_states


@dataclass
class AuvDecoded:
    """`audio` `[B, F * hop]`; `log_magnitude` `[B, F, W]` of the head; `hidden_states` of the decoder `[B, F, C]`."""

    audio: Tensor
    log_magnitude: Tensor
    hidden_states: list[Tensor]


class ISTFTHead(nn.Linear):
    """Channels → W log magnitudes and W phases. Starts quiet: loud noise at the start costs training time."""

    def __init__(self, hidden_size: int, n_fft: int) -> None:
        super().__init__(hidden_size, n_fft + 2)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        bins = self.out_features // 2
        scale = torch.ones(self.out_features, 1)
        scale[:bins] = 0.5
        init.copy_(self.weight, self.weight * scale.to(self.weight))
        shift = torch.zeros(self.out_features)
        shift[:bins] = -3.0
        init.copy_(self.bias, self.bias + shift.to(self.bias))


class AuvDecoder(nn.Module):
    """Conformers, then magnitudes and phases of an iSTFT."""

    def __init__(self, config: AuvConfig) -> None:
        super().__init__()
        self.hop = config.hop_length
        self.backbone = build_stack(config.decoder_stack, config.hidden_size)
        self.head = ISTFTHead(config.hidden_size, config.n_fft)

    def forward(self, quantized: Tensor, frames: Sequence[int]) -> AuvDecoded:
        """Quantized latents `[B, C, F]` → waveforms; `frames[i]` of row i exist."""
        valid = valid_frames(frames, quantized.device)
        x, hidden_states = self.backbone(quantized.transpose(1, 2), valid)
        log_magnitude, phase = self.head(x).float().chunk(2, dim=-1)
        with torch.autocast(quantized.device.type, enabled=False):
            level = log_magnitude.exp().clamp(max=MAX_MAGNITUDE)
            audio = istft(torch.complex(level * phase.cos(), level * phase.sin()), self.hop, valid)
        return AuvDecoded(audio, log_magnitude, hidden_states)


class AuvModel(AudioCodec):
    """The AUV codec.

    Codes are `[B, Q, F]` with Q = 1 in the released model. `encode(..., domain=...)` restricts the search to the
    code range of a domain ("speech", "vocal", "music", "audio", "other", "all" in the released model), one name for
    all clips or a list of one a clip; the decoder needs no domain.
    """

    config_class = AuvConfig
    encode_options = ("domain",)
    loss_names = ("commitment", "codebook", "magnitude")
    # 8 x the largest movement of a near margin between batch shapes, padding, windows and 1 or 2 threads:
    # 3.2e-4 over 7,047 codes of the full size with drawn weights, 1.1e-4 over 6,486 codes of auv-mini
    # (`python -m audiotok.recipes.measure_margins`; x86-64 with AVX-512, torch 2.13).
    margin_bounds: ClassVar[dict[tuple[str, torch.dtype], float]] = {("cpu", torch.float32): 3.2e-4}
    # Of conformers, which attend over the whole clip: `python -m audiotok.recipes.measure_windows auv-full RECORDINGS
    # --join --seconds 120 --limit 3`, 18,000 codes of speech, music and sound. No trained weights were at hand.
    window_flips: ClassVar[tuple[WindowFlips, ...]] = tuple(
        WindowFlips(chunk, context, share, "clips of 120 s, full size, weights drawn at random")
        for chunk, context, share in ((10.0, 1.0, 0.597), (10.0, 5.0, 0.520), (30.0, 5.0, 0.419), (60.0, 5.0, 0.266))
    )

    def __init__(self, config: AuvConfig) -> None:
        super().__init__(config)
        self.encoder = AuvEncoder(config)
        self.quantizer = ResidualVectorQuantizer(
            config.hidden_size, config.codebook_sizes, config.codebook_dim, normalize_latents=config.normalize_latents
        )
        self.decoder = AuvDecoder(config)
        self.post_init()

    def check_option_values(self, options: dict[str, Any]) -> None:
        self._ranges(options.get("domain"), 1)

    def padded_length(self, num_samples: int) -> int:
        """Whole frames; and one sample more than is reflected at the ends, which only one frame can lack."""
        return max(super().padded_length(num_samples), self.config.edge + 1)

    def latents(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the encoder gives before quantization, `[B, C, F]`."""
        self._check_waveforms(input_values)
        waveform, lengths = self._framed(input_values, padding_mask)
        return self.encoder(waveform, lengths)[0]

    def decode_latents(self, latents: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Decode latents `[B, C, F]` without any search: the ceiling that the codebook cannot pass.

        Returns `[B, 1, N]`; `lengths` as in `decode`.

        Raises:
            LatentsError: wrong dtype or shape, or not finite.
        """
        check_latents(latents, self.config.hidden_size)
        quantized = self.quantizer.bypass(latents)
        num_frames = latents.shape[-1]
        if lengths is None:
            return self.decoder(quantized, [num_frames] * len(latents)).audio[:, None]
        samples = [int(n) for n in lengths]
        frames = [self._frames_of(n, num_frames) for n in samples]
        return self._trim(self.decoder(quantized[..., : max(frames)], frames).audio[:, None], samples)

    def codebook_embeddings(self) -> list[Tensor]:
        return [stage.codebook.weight for stage in self.quantizer.in_order]

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        domain: str | Sequence[str] | None = None,
        latent_noise: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CodecTrainingOutput | tuple:
        """Reconstruct `input_values` `[B, 1, N]` with gradients.

        Args:
            padding_mask: `[B, N]`. Batch-norm statistics of a training batch include padding: train on equal lengths.
            domain: as in `encode`; in training it decides which codes a clip may teach.
            latent_noise: `[B]` standard deviations; no search is done, noise on the latents stands for it (the
                continuous start of a training run).

        Losses by name, means over the frames that exist: `commitment` and `codebook` (unweighted), `magnitude` (L1 of
        the head's log magnitudes to those of the input). `loss` = commitment_cost * commitment + codebook, as the
        published quantizer has it.
        """
        self._check_waveforms(input_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        waveform, lengths = self._framed(input_values, padding_mask)
        latents, hidden_states = self.encoder(waveform, lengths)
        frames = [n // self.config.hop_length for n in lengths]
        losses: dict[str, Tensor] = {}
        codes = loss = None
        if latent_noise is not None:
            quantized = self.quantizer.bypass(latents, latent_noise)
        else:
            valid = valid_frames(frames, waveform.device)
            result = self.quantizer(latents, self._ranges(domain, len(waveform)), valid=valid)
            quantized, codes = result.quantized, result.codes
            losses = {"commitment": result.commitment, "codebook": result.codebook}
            loss = self.config.commitment_cost * result.commitment + result.codebook
        decoded = self.decoder(quantized, frames)
        losses["magnitude"] = self._magnitude_loss(decoded.log_magnitude, waveform, lengths, frames)
        output = CodecTrainingOutput(
            loss=loss,
            losses=losses,
            audio_values=self._trim(decoded.audio[:, None], [input_values.shape[-1]] * len(waveform)),
            audio_codes=codes,
            latents=latents,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            distillation_features=decoded.hidden_states[self.config.distill_depth],
        )
        return output if return_dict else output.to_tuple()

    def _encode(self, input_values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        ranges = self._ranges(options.get("domain"), len(input_values))
        waveform, lengths = self._at_least_one_frame(input_values[:, 0], lengths)
        latents, _ = self.encoder(waveform, lengths)
        result = self.quantizer(latents, ranges, return_margins)
        valid = valid_frames([n // self.config.hop_length for n in lengths], waveform.device)
        codes, margins = result.codes, result.margins
        if valid is None:
            return CodecOutput(audio_codes=codes, audio_codes_mask=torch.ones_like(codes).bool(), margins=margins)
        mask = valid[:, None].repeat(1, codes.shape[1], 1)
        if margins is not None:
            margins = margins.masked_fill(~mask, torch.inf)
        return CodecOutput(audio_codes=codes.masked_fill(~mask, 0), audio_codes_mask=mask, margins=margins)

    def _decode(self, codes: Tensor | list[Tensor], frames: list[int], mask: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(codes, Tensor)  # `decode` has checked: this codec has one rate
        return self.decoder(self.quantizer.decode(codes.long()), frames).audio[:, None]

    def _framed(self, input_values: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """Waveforms `[B, N']` with room for whole frames where a mask says how long each clip is."""
        waveform = input_values[:, 0]
        if padding_mask is None:
            return self._at_least_one_frame(waveform, [waveform.shape[1]] * len(waveform))
        lengths = lengths_from_mask(padding_mask, *waveform.shape)
        waveform = waveform * padding_mask.to(waveform.dtype)
        return self._at_least_one_frame(waveform, [self.padded_length(n) for n in lengths])

    def _at_least_one_frame(self, waveform: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """Zero-pad clips too short to be reflected at their ends (the published code refuses them)."""
        lengths = [max(n, self.config.edge + 1) for n in lengths]
        room = max(lengths) - waveform.shape[1]
        return nn.functional.pad(waveform, (0, max(0, room))), lengths

    def _ranges(self, domain: str | Sequence[str] | None, batch: int) -> list[Range] | None:
        """The range of codes each clip may use; None for the whole book."""
        if domain is None:
            return None
        names = list(domain) if isinstance(domain, (list, tuple)) else [domain] * batch
        if len(names) != batch:
            raise OptionError(f"domain names {len(names)} clips, the batch has {batch}: give one name, or one a clip.")
        ranges = {name: (start, end) for name, (start, end) in (self.config.domain_ranges or {}).items()}
        ranges["all"] = (0, max(self.config.codebook_sizes))
        for name in names:
            if name is not None and (not isinstance(name, str) or name not in ranges):
                hint = ' General sound is "audio".' if name == "sound" else did_you_mean(str(name), ranges)
                raise OptionError(f"domain={name!r} is not legal: choose one of {', '.join(ranges)}.{hint}")
        return [ranges[name or "all"] for name in names]

    def _magnitude_loss(self, log_magnitude: Tensor, waveform: Tensor, lengths: list[int], frames: list[int]) -> Tensor:
        front_end = self.encoder.front_end
        total = (max(frames) - 1) * front_end.hop + front_end.n_fft
        with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
            padded = reflect_pad(waveform.float(), front_end.edge, lengths, total)
            target = magnitude(stft(padded, front_end.n_fft, front_end.hop)).transpose(1, 2)
            target = (target + 1e-4).log()
        error = (log_magnitude - target).abs()
        valid = valid_frames(frames, waveform.device)
        return error.mean() if valid is None else error[valid].mean()
