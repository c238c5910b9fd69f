"""MelCap: a VQ autoencoder of the log-mel picture, and a Vocos vocoder on the decoded mel.

Paper: Li et al., "MelCap: A Unified Single-Codebook Neural Codec for High-Fidelity Audio Compression",
arXiv 2510.01903. `MelCapConfig()` is the released model.

Shapes: B clips, N samples, M mel bins, T mel frames, R rows and W columns of codes, d code dimensions. A column of
latents is its R rows one behind the other, `[B, R * d, W]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from audiotok.codec import AudioCodec, CodecOutput, CodecTrainingOutput, lengths_from_mask
from audiotok.codecs.melcap.blocks_melcap import PictureDecoder, PictureEncoder
from audiotok.codecs.melcap.configuration_melcap import GRID_STEP, MelCapConfig
from audiotok.errors import OptionError
from audiotok.nn.convnext import VocosBackbone
from audiotok.nn.masks import valid_frames
from audiotok.nn.stft import istft, magnitude, reflect_pad, stft
from audiotok.quantizers.latents import check_latents
from audiotok.quantizers.vector import Quantized, Range, ResidualVectorQuantizer
from audiotok.windows import WindowFlips

# Log-mels are divided by it on their way into the picture.
PICTURE_SCALE = 5.0
# Smallest mel magnitude that the front end tells from silence, and the log-mel below which the decoder does not go.
MEL_FLOOR, LOG_MEL_FLOOR = 1e-7, -16.1181
# Ceiling of the head's magnitudes.
MAX_MAGNITUDE = 100.0
# Weights in the published stage 1, beside the L1 of log-mels: of the quantizer, and in it of the side that moves the
# book.
QUANTIZER_WEIGHT, CODEBOOK_WEIGHT = 0.25, 0.25


def mel_filters(sampling_rate: int, n_fft: int, num_mel_bins: int) -> np.ndarray:
    """Triangles `[n_fft / 2 + 1, M]` of height 1 on the HTK scale, from 0 Hz to half the rate, in float32.

    Their corners are rounded to float32 on the mel scale, as the published filters have them.
    """
    top = sampling_rate // 2
    highest = 2595.0 * math.log10(1.0 + top / 700.0)
    # On the CPU by name: a model is also built on the meta device, and this is part of no checkpoint.
    bins = torch.linspace(0, top, n_fft // 2 + 1, dtype=torch.float32, device="cpu")
    mels = torch.linspace(0.0, highest, num_mel_bins + 2, dtype=torch.float32, device="cpu")
    corners = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    widths = corners[1:] - corners[:-1]
    rising = (bins[:, None] - corners[:-2]) / widths[:-1]
    falling = (corners[2:] - bins[:, None]) / widths[1:]
    return torch.minimum(rising, falling).clamp(min=0.0).numpy()


class MelFrontEnd(nn.Module):
    """Waveforms → natural logarithms of mel magnitudes. No parameters; always float32."""

    def __init__(self, sampling_rate: int, n_fft: int, hop_length: int, num_mel_bins: int, centred: bool) -> None:
        super().__init__()
        self.n_fft, self.hop_length, self.centred = n_fft, hop_length, centred
        # A NumPy array, not a buffer: nothing to lose on the meta device or in a cast.
        self.filters = mel_filters(sampling_rate, n_fft, num_mel_bins)

    def forward(self, waveform: Tensor) -> Tensor:
        """`[B, N]` → `[B, M, T]`, T = 1 + floor(N / hop), or without padding 1 + floor((N - n_fft) / hop)."""
        with torch.autocast(waveform.device.type, enabled=False):
            waveform = waveform.float()
            if self.centred:
                edge = self.n_fft // 2
                waveform = reflect_pad(waveform, edge, None, waveform.shape[-1] + 2 * edge)
            spectrum = magnitude(stft(waveform, self.n_fft, self.hop_length))
            mel = spectrum.transpose(1, 2) @ torch.from_numpy(self.filters).to(waveform.device)
            return mel.clamp(min=MEL_FLOOR).log().transpose(1, 2)


def as_columns(grid: Tensor) -> Tensor:
    """`[B, d, R, W]` → `[B, R * d, W]`."""
    return grid.transpose(1, 2).flatten(1, 2)


def as_grid(columns: Tensor, num_rows: int) -> Tensor:
    """`[B, R * d, W]` → `[B, d, R, W]`."""
    return columns.unflatten(1, (num_rows, -1)).transpose(1, 2)


class GridQuantizer(ResidualVectorQuantizer):
    """One book for all rows: each of the R vectors of a column is looked up by itself."""

    def __init__(self, num_rows: int, codebook_size: int, codebook_dim: int, normalize_latents: bool) -> None:
        options = {"project": False, "cosine": normalize_latents, "normalize_latents": normalize_latents}
        super().__init__(codebook_dim, [codebook_size], codebook_dim, **options)
        self.num_rows = num_rows

    @property
    def book(self) -> nn.Embedding:
        return self.in_order[0].codebook

    def forward(
        self,
        latents: Tensor,
        ranges: Sequence[Range] | None = None,
        return_margins: bool = False,
        num_stages: int | None = None,
        *,
        valid: Tensor | None = None,
    ) -> Quantized:
        """Latents `[B, R * d, W]` → the same shape quantized; codes and margins `[B, R, W]`. `valid` `[B, W]`."""
        places = None if valid is None else valid.repeat(1, self.num_rows)
        found = super().forward(self._places(latents), ranges, return_margins, num_stages, valid=places)
        grid = (self.num_rows, latents.shape[-1])
        found.quantized = as_columns(found.quantized.unflatten(2, grid))
        found.codes = None if found.codes is None else found.codes[:, 0].unflatten(1, grid)
        found.margins = None if found.margins is None else found.margins[:, 0].unflatten(1, grid)
        return found

    def project_in(self, latents: Tensor) -> Tensor:
        """What the book is searched with, `[B, R * d, W]` → `[B, d, R * W]`, in the order of `codes.flatten(1)`."""
        return super().project_in(self._places(latents))

    def bypass(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """`[B, R * d, W]` → the same shape without a search; `noise` as in `ResidualVectorQuantizer`."""
        found = super().bypass(self._places(latents), noise)
        return as_columns(found.unflatten(2, (self.num_rows, latents.shape[-1])))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, R, W]` → `[B, R * d, W]`; of fewer rows the lowest, with zeros for the others."""
        grid = super().decode(codes.flatten(1)[:, None]).unflatten(2, codes.shape[1:])
        return as_columns(F.pad(grid, (0, 0, 0, self.num_rows - codes.shape[1])))

    def _places(self, columns: Tensor) -> Tensor:
        """`[B, R * d, W]` → `[B, d, R * W]`, row by row."""
        return as_grid(columns, self.num_rows).flatten(2)


class MelVocoder(nn.Module):
    """Log-mels → waveforms: ConvNeXt blocks, then magnitudes and phases of an inverse STFT (arXiv 2306.00814)."""

    def __init__(self, config: MelCapConfig) -> None:
        super().__init__()
        self.hop_length, self.centred = config.mel_hop_length, config.head_padding == "center"
        self.backbone = VocosBackbone(
            config.num_mel_bins,
            config.vocoder_hidden_size,
            config.vocoder_intermediate_size,
            config.vocoder_num_layers,
        )
        self.head = nn.Linear(config.vocoder_hidden_size, config.n_fft + 2)

    def forward(self, log_mel: Tensor) -> Tensor:
        """`[B, M, T]` → `[B, (T - 1) * hop]` samples, or `[B, T * hop]` where the head does not centre."""
        log_magnitude, phase = self.head(self.backbone(log_mel)).float().chunk(2, dim=-1)
        with torch.autocast(log_mel.device.type, enabled=False):
            level = log_magnitude.clamp(max=math.log(MAX_MAGNITUDE)).exp()
            spectrum = torch.complex(level * phase.cos(), level * phase.sin())
            return istft(spectrum, self.hop_length, center=self.centred)


def alike(clips: Tensor, lengths: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of equal length, and those rows of `[B, ..., longest]` cut to it: nothing is left that is padding."""
    for length in sorted(set(lengths)):
        rows = [i for i, n in enumerate(lengths) if n == length]
        yield rows, (clips if len(rows) == len(lengths) else clips[rows])[..., :length]


def merge(parts: Sequence[tuple[list[int], Tensor]], fill: float = 0.0) -> Tensor:
    """The rows that `alike` took apart in their order, filled up behind their ends to `[B, ..., longest]`."""
    if len(parts) == 1:
        return parts[0][1]
    longest = max(part.shape[-1] for _, part in parts)
    placed = {
        row: F.pad(value, (0, longest - value.shape[-1]), value=fill)
        for rows, part in parts
        for row, value in zip(rows, part, strict=True)
    }
    return torch.stack([placed[row] for row in sorted(placed)])


@dataclass
class Reconstruction:
    """What `forward` makes of some `rows` of a batch: codes are None without a search, audio in stage 1.

    `features` is what the encoder ends in, as columns `[G, R * C, W]`.
    """

    rows: list[int]
    losses: dict[str, Tensor]
    features: Tensor
    latents: Tensor
    quantized: Tensor
    codes: Tensor | None
    audio: Tensor | None


class MelCapModel(AudioCodec):
    """The MelCap codec: codes `[B, R, W]` of one shared book, R = 12 rows of mel bins in the released model.

    Exactness: group norms and attention span the whole picture, so every code depends on the whole clip and every
    decoded sample on all codes; the receptive field is not finite, and windows change codes (`window_flips`). For the
    same reason no padding may reach the picture: clips of a batch that are equally long (in whole columns) are computed
    together, the others apart, each as it is alone. What is left is the rounding of another batch shape; certified
    codes are those of batch 1.

    Without a mask `encode` gives the columns of the published code, floor((N + 512) / 2048) in the released model, and
    `decode` its 2048 W - 256 samples; clips too short for a column, which it refuses, are padded to one. With a mask
    every clip is padded with zeros to whole columns that hold all of it. Fewer rows than all decode to the lowest mel
    bins, with silence above them.
    """

    config_class = MelCapConfig
    loss_names = ("mel_picture", "commitment", "codebook")
    # 8 x the largest movement of a near margin in other batches, with padding and 2 threads: 4.8e-4 over 41,688 codes
    # of recordings by melcap-mini, whose trained latents move most; 1.5e-6 over 564 codes of the released size with
    # drawn weights. No code flipped. (`audiotok.recipes.measure_margins`; x86-64 with AVX-512, torch 2.13.)
    margin_bounds: ClassVar[dict[tuple[str, torch.dtype], float]] = {("cpu", torch.float32): 3.8e-3}
    # Of attention and norms over the whole picture: `python -m audiotok.recipes.measure_windows CHECKPOINT RECORDINGS
    # --join --windows 10:1 --windows 10:5`: 60,032 codes of 8 clips trained, 15,528 of two clips drawn.
    window_flips: ClassVar[tuple[WindowFlips, ...]] = tuple(
        WindowFlips(10.0, context, share, measured)
        for context, share, measured in (
            (1.0, 0.389, "clips of 60 s, audiotok/melcap-mini, trained"),
            (5.0, 0.331, "clips of 60 s, audiotok/melcap-mini, trained"),
            (1.0, 0.432, "clips of 30 s, full size, weights drawn at random"),
            (5.0, 0.295, "clips of 30 s, full size, weights drawn at random"),
        )
    )

    def __init__(self, config: MelCapConfig) -> None:
        super().__init__(config)
        self.front_end = MelFrontEnd(
            config.sampling_rate,
            config.n_fft,
            config.mel_hop_length,
            config.num_mel_bins,
            centred=config.front_end_padding == "center",
        )
        self.encoder = PictureEncoder(config)
        self.quantizer = GridQuantizer(
            config.num_rows, config.codebook_size, config.codebook_dim, config.normalize_latents
        )
        self.decoder = PictureDecoder(config)
        self.vocoder = MelVocoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As published: small rows in the book (of unit length where latents are), a small start in the vocoder."""
        super()._init_weights(module)
        if module is self.quantizer.book:
            rows = self.quantizer.book.weight
            init.uniform_(rows, -1 / len(rows), 1 / len(rows))
            if self.config.normalize_latents:
                init.copy_(rows, F.normalize(rows, dim=-1))
        elif isinstance(module, (nn.Conv1d, nn.Linear)) and module is not self.vocoder.head:
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)

    def padded_length(self, num_samples: int) -> int:
        """What fills as many columns as hold the clip."""
        return max(self.config.filled_length(self.facts.num_frames(num_samples)), self.config.shortest_clip)

    def latents(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the encoder gives before quantization, `[B, R * d, W]`; zeros behind a clip's end."""
        self._check_waveforms(input_values)
        waveform, lengths = self._framed(input_values, padding_mask)
        return merge([(rows, self._encoded(self.front_end(clips))[1]) for rows, clips in alike(waveform, lengths)])

    def decode_latents(self, latents: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Decode latents `[B, R * d, W]` without any search: the ceiling that the codebook cannot pass.

        Returns `[B, 1, N]`; `lengths` as in `decode`.

        Raises:
            LatentsError: wrong dtype or shape, or not finite.
        """
        check_latents(latents, self.config.num_rows * self.config.codebook_dim)
        samples = None if lengths is None else [int(n) for n in lengths]
        num_frames = latents.shape[-1]
        frames = [num_frames] * len(latents) if samples is None else [self._frames_of(n, num_frames) for n in samples]
        quantized = self.quantizer.bypass(latents)
        audio = merge([(rows, self._vocode(self._mel(columns))) for rows, columns in alike(quantized, frames)])
        return audio[:, None] if samples is None else self._trim(audio[:, None], samples)

    def codebook_embeddings(self) -> list[Tensor]:
        return [self.quantizer.book.weight] * self.config.num_rows

    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        stage: int | None = None,
        latent_noise: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CodecTrainingOutput | tuple:
        """Reconstruct `input_values` `[B, 1, N]` with gradients.

        Args:
            padding_mask: `[B, N]`.
            stage: None trains everything together. 1 trains the picture's autoencoder alone, as the published stage 1
                does: there is no audio. 2 trains the mel decoder and the vocoder, as the published stage 2 does: the
                encoder and the book get no gradient, and `loss` is None, since its losses compare waveforms.
            latent_noise: `[B]` standard deviations; no search is done, noise on the latents stands for it. Needs
                `normalize_latents`.

        Losses by name: `mel_picture` (L1 of log-mels, in nepers, over the frames that both have), `commitment` and
        `codebook` (unweighted). `loss` = mel_picture + 0.25 (commitment + 0.25 codebook), the published stage 1.
        `hidden_states` are what the encoder ends in, column by column, and the latents; `distillation_features` the
        quantized latents `[B, W, R * d]`, with which the decoder begins.
        """
        self._check_waveforms(input_values)
        self._check_training(stage, latent_noise)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        waveform, lengths = self._framed(input_values, padding_mask)
        parts = [
            self._reconstruct(rows, self.front_end(clips), stage, None if latent_noise is None else latent_noise[rows])
            for rows, clips in alike(waveform, lengths)
        ]
        losses = {
            name: torch.stack([len(part.rows) * part.losses[name] for part in parts]).sum() / len(waveform)
            for name in parts[0].losses
        }
        codes = [(part.rows, part.codes) for part in parts if part.codes is not None]
        audio = [(part.rows, part.audio) for part in parts if part.audio is not None]
        latents = merge([(part.rows, part.latents) for part in parts])
        features = merge([(part.rows, part.features) for part in parts])
        output = CodecTrainingOutput(
            loss=None if stage == 2 else stage_1_loss(losses),
            losses=losses,
            audio_values=self._trim(merge(audio)[:, None], [input_values.shape[-1]] * len(waveform)) if audio else None,
            audio_codes=merge(codes) if codes else None,
            latents=latents,
            hidden_states=(features.transpose(1, 2), latents.transpose(1, 2)) if output_hidden_states else None,
            distillation_features=merge([(part.rows, part.quantized) for part in parts]).transpose(1, 2),
        )
        return output if return_dict else output.to_tuple()

    def _reconstruct(self, rows: list[int], log_mel: Tensor, stage: int | None, noise: Tensor | None) -> Reconstruction:
        """Log-mels `[G, M, T]` of clips of one length through the parts that a stage trains."""
        losses: dict[str, Tensor] = {}
        with torch.set_grad_enabled(stage != 2 and torch.is_grad_enabled()):
            features, latents = self._encoded(log_mel)
            if noise is not None:
                quantized, codes = self.quantizer.bypass(latents, noise), None
            else:
                found = self.quantizer(latents)
                quantized, codes = found.quantized, found.codes
                losses = {"commitment": found.commitment, "codebook": found.codebook}
        mel = self._mel(quantized)
        frames = min(mel.shape[-1], log_mel.shape[-1])
        losses["mel_picture"] = (mel[..., :frames].float() - log_mel[..., :frames]).abs().mean()
        return Reconstruction(
            rows, losses, features, latents, quantized, codes, None if stage == 1 else self._vocode(mel)
        )

    def _encode(self, input_values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        waveform, lengths = self._at_least_one_column(input_values[:, 0], lengths)
        parts = [
            (rows, self.quantizer(self._encoded(self.front_end(clips))[1], None, return_margins))
            for rows, clips in alike(waveform, lengths)
        ]
        codes = merge([(rows, found.codes) for rows, found in parts])
        margins = merge([(rows, found.margins) for rows, found in parts], math.inf) if return_margins else None
        valid = valid_frames([self.config.num_columns(n) for n in lengths], waveform.device)
        mask = torch.ones_like(codes).bool() if valid is None else valid[:, None].repeat(1, codes.shape[1], 1)
        return CodecOutput(audio_codes=codes, audio_codes_mask=mask, margins=margins)

    def _decode(self, codes: Tensor | list[Tensor], frames: list[int], mask: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(codes, Tensor)  # `decode` has checked: this codec has one rate
        parts = []
        for rows, columns in alike(codes.long(), frames):
            mel = self._mel(self.quantizer.decode(columns))
            mel[:, GRID_STEP * codes.shape[1] :] = LOG_MEL_FLOOR
            parts.append((rows, self._vocode(mel)))
        return merge(parts)[:, None]

    def _encoded(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, M, T]` → what the encoder ends in `[B, R * C, W]`, and latents `[B, R * d, W]`."""
        features, latents = self.encoder((log_mel / PICTURE_SCALE)[:, None].to(self.dtype))
        return as_columns(features), as_columns(latents)

    def _mel(self, quantized: Tensor) -> Tensor:
        """`[B, R * d, W]` → log-mel `[B, M, 8 W]`, without a floor."""
        return PICTURE_SCALE * self.decoder(as_grid(quantized, self.config.num_rows))[:, 0]

    def _vocode(self, mel: Tensor) -> Tensor:
        """Log-mel `[B, M, T]` → waveforms `[B, N]`."""
        return self.vocoder(mel.clamp(min=LOG_MEL_FLOOR))

    def _framed(self, input_values: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """Waveforms `[B, N']` with room for whole columns where a mask says how long each clip is."""
        waveform = input_values[:, 0]
        if padding_mask is None:
            return self._at_least_one_column(waveform, [waveform.shape[1]] * len(waveform))
        lengths = lengths_from_mask(padding_mask, *waveform.shape)
        waveform = waveform * padding_mask.to(waveform.dtype)
        return self._at_least_one_column(waveform, [self.padded_length(n) for n in lengths])

    def _at_least_one_column(self, waveform: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """Zero-pad clips too short for a column (the published code refuses them)."""
        lengths = [max(n, self.config.shortest_clip) for n in lengths]
        return F.pad(waveform, (0, max(0, max(lengths) - waveform.shape[1]))), lengths

    def _check_training(self, stage: int | None, latent_noise: Tensor | None) -> None:
        if stage not in (None, 1, 2):
            raise OptionError(f"stage={stage!r} is not legal: choose 1, 2, or None for everything together.")
        if latent_noise is not None and not self.config.normalize_latents:
            raise OptionError(
                "latent_noise needs normalize_latents=true: longer latents would drown noise of a given size."
            )


def stage_1_loss(losses: dict[str, Tensor]) -> Tensor:
    """L1 of log-mels, and a quarter of the quantizer's loss, whose larger part moves the encoder."""
    if "commitment" not in losses:
        return losses["mel_picture"]
    quantizer = losses["commitment"] + CODEBOOK_WEIGHT * losses["codebook"]
    return losses["mel_picture"] + QUANTIZER_WEIGHT * quantizer
