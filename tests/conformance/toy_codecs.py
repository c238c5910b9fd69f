"""Four small codecs that are nothing like AUV, so that no law is written for one codebook, one rate or one depth.

    ToyRvqModel        stereo, three residual codebooks of different sizes
    ToyBandsModel      one codebook shared by four streams
    ToyMultirateModel  three codebooks, frames per code 4, 2, 1: codes are a list
    ToyDepthModel      loud frames use more codebooks (option `level`); decodes to another sampling rate

All have the same body: frames of one hop, ConvNeXt blocks, a quantizer, ConvNeXt blocks, frames of one hop. Their
receptive fields are finite, and every clip of a batch is masked at its own end.

Shapes: B clips, C channels, N samples, Q codebooks, F frames, D hidden channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from audiotok import auto
from audiotok.auto import Family
from audiotok.codec import (
    AudioCodec,
    CodecConfig,
    CodecFacts,
    CodecOutput,
    CodecTrainingOutput,
    lengths_from_mask,
)
from audiotok.errors import OptionError
from audiotok.features import CodecFeatureExtractor
from audiotok.nn.convnext import ConvNextStack
from audiotok.quantizers.vector import FactorizedVectorQuantizer, Quantized, ResidualVectorQuantizer
from audiotok.tokenizer import AudioTokenizer

Streams = list[Tensor]  # one `[B, F_q]` a codebook


# Configurations


@strict
class ToyConfig(CodecConfig):
    """What the four share.

    Args:
        output_hop_length: samples a frame at the output; another one than `hop_length` changes the rate.
        codebook_strides: frames per code of each codebook; None for 1 everywhere.
        num_layers, kernel_size: of the blocks on either side.
    """

    sampling_rate: int = 8000
    channels: int = 1
    hop_length: int = 20
    output_hop_length: int = 20
    hidden_size: int = 24
    codebook_sizes: list[int] | tuple[int, ...] = (32,)
    codebook_strides: list[int] | tuple[int, ...] | None = None
    codebook_dim: int = 4
    shared_codebook: bool = False
    variable_depth: bool = False
    num_layers: int = 2
    kernel_size: int = 3

    @property
    def facts(self) -> CodecFacts:
        strides = tuple(self.codebook_strides or [1] * len(self.codebook_sizes))
        # Within its coarsest block a code sees everything, then the blocks' kernels look further.
        reach = self.num_layers * (self.kernel_size - 1) // 2 + max(strides) - 1
        return CodecFacts(
            sampling_rate=self.sampling_rate,
            output_sampling_rate=self.sampling_rate * self.output_hop_length // self.hop_length,
            channels=self.channels,
            hop_length=self.hop_length,
            codebook_sizes=tuple(self.codebook_sizes),
            shared_codebook=self.shared_codebook,
            codebook_strides=strides,
            receptive_field_samples=reach * self.hop_length,
            decoder_reach_samples=reach * self.hop_length,
            variable_depth=self.variable_depth,
        )


@strict
class ToyRvqConfig(ToyConfig):
    model_type = "toy_rvq"
    channels: int = 2
    codebook_sizes: list[int] | tuple[int, ...] = (48, 32, 17)


@strict
class ToyBandsConfig(ToyConfig):
    model_type = "toy_bands"
    codebook_sizes: list[int] | tuple[int, ...] = (40, 40, 40, 40)
    shared_codebook: bool = True


@strict
class ToyMultirateConfig(ToyConfig):
    model_type = "toy_multirate"
    codebook_sizes: list[int] | tuple[int, ...] = (30, 40, 50)
    codebook_strides: list[int] | tuple[int, ...] | None = (4, 2, 1)


@strict
class ToyDepthConfig(ToyConfig):
    model_type = "toy_depth"
    output_hop_length: int = 30
    codebook_sizes: list[int] | tuple[int, ...] = (32, 24, 16)
    variable_depth: bool = True


# The body


class FrameEncoder(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.hop = config.hop_length
        self.input_proj = nn.Linear(config.channels * config.hop_length, config.hidden_size)
        self.backbone = ConvNextStack(config.num_layers, config.hidden_size, 2 * config.hidden_size, config.kernel_size)

    def forward(self, waveform: Tensor, frames: list[int]) -> Tensor:
        """`[B, C, N]` → latents `[B, D, F]`."""
        total = max(frames) * self.hop
        waveform = F.pad(waveform, (0, max(0, total - waveform.shape[-1])))[..., :total]
        cut = waveform.unflatten(2, (-1, self.hop)).transpose(1, 2).flatten(2)
        x = self.input_proj(8 * cut.to(self.input_proj.weight.dtype))
        x, _ = self.backbone(x, valid_frames(frames, x.device))
        return x.transpose(1, 2)


class FrameDecoder(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.backbone = ConvNextStack(config.num_layers, config.hidden_size, 2 * config.hidden_size, config.kernel_size)
        self.output_proj = nn.Linear(config.hidden_size, config.channels * config.output_hop_length)

    def forward(self, quantized: Tensor, frames: list[int]) -> Tensor:
        """`[B, D, F]` → `[B, C, F * output hop]`."""
        x, _ = self.backbone(quantized.transpose(1, 2), valid_frames(frames, quantized.device))
        return 0.3 * self.output_proj(x).unflatten(2, (self.channels, -1)).transpose(1, 2).flatten(2)


def valid_frames(frames: Sequence[int], device: torch.device) -> Tensor:
    """`[B, F]` bool of the frames that exist."""
    return torch.arange(max(frames), device=device) < torch.tensor(frames, device=device)[:, None]


class ToyCodec(AudioCodec):
    """Base of the four; a subclass says how latents become streams of codes and back."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.encoder = FrameEncoder(config)
        self.quantizer = self.build_quantizer(config)
        self.decoder = FrameDecoder(config)
        self.post_init()

    def build_quantizer(self, config: ToyConfig) -> nn.Module:
        raise NotImplementedError

    def quantize(self, latents: Tensor, return_margins: bool) -> Quantized:
        """Latents `[B, D, F]` → quantized ones; codes and margins are `Streams`."""
        raise NotImplementedError

    def dequantize(self, streams: Streams, mask: Streams) -> Tensor:
        """Codes → `[B, D, F]`; where the mask is False there is no code."""
        raise NotImplementedError

    def active(self, valid: Tensor, waveform: Tensor, **options: Any) -> tuple[Streams, Tensor | None]:
        """Where codes are codes, and how near each frame was to another answer (None: never)."""
        return [valid[:, ::stride] for stride in self.facts.codebook_strides], None

    def codebook_embeddings(self) -> list[Tensor]:
        return [stage.codebook.weight for stage in self.quantizer.stages]

    def latents(self, input_values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        self._check_waveforms(input_values)
        return self.encoder(*self._framed(input_values, padding_mask))

    def forward(
        self, input_values: Tensor, padding_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> CodecTrainingOutput | tuple:
        """Reconstruct with gradients; variable depth is for encoding, here all codebooks are used."""
        self._check_waveforms(input_values)
        waveform, frames = self._framed(input_values, padding_mask)
        latents = self.encoder(waveform, frames)
        found = self.quantize(latents, False)
        audio = self.decoder(found.quantized, frames)
        output = CodecTrainingOutput(
            loss=0.25 * found.commitment + found.codebook,
            losses={"commitment": found.commitment, "codebook": found.codebook},
            audio_values=self._trim(audio, [self.facts.output_length(input_values.shape[-1])] * len(audio)),
            audio_codes=self._join(found.codes),
            latents=latents,
        )
        return output if return_dict is not False else output.to_tuple()

    def _encode(self, input_values: Tensor, lengths: list[int], return_margins: bool, **options: Any) -> CodecOutput:
        frames = [self.facts.num_frames(n) for n in lengths]
        found = self.quantize(self.encoder(input_values, frames), return_margins)
        mask, doubt = self.active(valid_frames(frames, input_values.device), input_values, **options)
        margins = found.margins
        if margins is not None:
            if doubt is not None:  # every frame has a code of codebook 0, so its doubt is always told
                margins = [margin.minimum(doubt) for margin in margins]
            margins = self._join([x.masked_fill(~m, torch.inf) for x, m in zip(margins, mask, strict=True)])
        codes = [code.masked_fill(~m, 0) for code, m in zip(found.codes, mask, strict=True)]
        return CodecOutput(audio_codes=self._join(codes), audio_codes_mask=self._join(mask), margins=margins)

    def _decode(self, codes: Tensor | Streams, frames: list[int], mask: Tensor | Streams | None) -> Tensor:
        streams = codes if isinstance(codes, list) else list(codes.unbind(1))
        if mask is None:
            masks = [torch.ones_like(stream, dtype=torch.bool) for stream in streams]
        else:
            masks = mask if isinstance(mask, list) else list(mask.unbind(1))
        return self.decoder(self.dequantize([s.long() for s in streams], masks), frames)

    def _framed(self, input_values: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """Waveforms with zeros behind their ends, and the frames of each."""
        if padding_mask is None:
            return input_values, [self.facts.num_frames(input_values.shape[-1])] * len(input_values)
        lengths = lengths_from_mask(padding_mask, len(input_values), input_values.shape[-1])
        waveform = input_values * padding_mask[:, None].to(input_values.dtype)
        return waveform, [self.facts.num_frames(n) for n in lengths]

    def _join(self, streams: Streams) -> Tensor | Streams:
        return streams if self.facts.frame_multiple > 1 else torch.stack(streams, dim=1)


# The four


class ToyRvqModel(ToyCodec):
    """Stereo, residual stages."""

    config_class = ToyRvqConfig

    def build_quantizer(self, config: ToyConfig) -> nn.Module:
        return ResidualVectorQuantizer(config.hidden_size, config.codebook_sizes, config.codebook_dim)

    def quantize(self, latents: Tensor, return_margins: bool) -> Quantized:
        found = self.quantizer(latents, None, return_margins)
        found.codes = list(found.codes.unbind(1))
        found.margins = None if found.margins is None else list(found.margins.unbind(1))
        return found

    def dequantize(self, streams: Streams, mask: Streams) -> Tensor:
        stages = zip(self.quantizer.stages, streams, mask, strict=False)
        return sum(stage.lookup(codes) * m[..., None] for stage, codes, m in stages).transpose(1, 2)


class ToyDepthModel(ToyRvqModel):
    """A frame's depth follows its loudness; `level` in (0, 1] lowers it, one number or a list of one a clip."""

    config_class = ToyDepthConfig
    encode_options = ("level",)

    def check_option_values(self, options: dict[str, Any]) -> None:
        self.levels(options.get("level"), 1)

    def levels(self, level: float | Sequence[float | None] | None, batch: int) -> Tensor:
        """`[B]`; None is 1."""
        levels = list(level) if isinstance(level, (list, tuple)) else [level] * batch
        levels = [1.0 if one is None else one for one in levels]
        if len(levels) != batch or not all(isinstance(one, (int, float)) and 0 < one <= 1 for one in levels):
            raise OptionError(f"level={level!r} is not legal: give a number in (0, 1], or one for each clip.")
        return torch.tensor(levels, dtype=torch.float64)

    def active(
        self, valid: Tensor, waveform: Tensor, level: float | Sequence[float | None] | None = None
    ) -> tuple[Streams, Tensor | None]:
        total = valid.shape[1] * self.config.hop_length
        waveform = F.pad(waveform, (0, max(0, total - waveform.shape[-1])))[..., :total]
        loudness = waveform.unflatten(2, (-1, self.config.hop_length)).abs().mean(dim=(1, 3))
        most = self.facts.num_codebooks * self.levels(level, len(valid)).to(loudness)
        wish = most[:, None] * loudness / (loudness + 0.03)
        depth = wish.floor() + 1
        mask = [valid & (depth > q) for q in range(self.facts.num_codebooks)]
        return mask, (wish - wish.round().clamp(min=1)).abs().float()  # depth changes at 1, 2, ...


class ToyBandsModel(ToyCodec):
    """The hidden channels in equal groups, each looked up in the same book: the place in the frame names the band."""

    config_class = ToyBandsConfig

    def build_quantizer(self, config: ToyConfig) -> nn.Module:
        group = config.hidden_size // len(config.codebook_sizes)
        return FactorizedVectorQuantizer(group, config.codebook_sizes[0], config.codebook_dim)

    def codebook_embeddings(self) -> list[Tensor]:
        return [self.quantizer.codebook.weight] * self.facts.num_codebooks

    def quantize(self, latents: Tensor, return_margins: bool) -> Quantized:
        z = self.quantizer.project_in(latents.transpose(1, 2).unflatten(2, (self.facts.num_codebooks, -1)))
        found, margins = self.quantizer.search(z.detach().flatten(1, 2), None, return_margins)
        codes = found.unflatten(1, (-1, self.facts.num_codebooks))
        rows = self.quantizer.codebook(codes).to(z.dtype)
        out = self.quantizer.out_proj((z + (rows - z).detach()).to(self.dtype)).flatten(2).transpose(1, 2)
        if margins is not None:
            margins = list(margins.unflatten(1, (-1, self.facts.num_codebooks)).unbind(2))
        commitment, codebook = (z - rows.detach()).square().mean(), (rows - z.detach()).square().mean()
        return Quantized(out, list(codes.unbind(2)), margins, commitment, codebook)

    def dequantize(self, streams: Streams, mask: Streams) -> Tensor:
        bands = [self.quantizer.lookup(codes) for codes in streams]
        missing = self.facts.num_codebooks - len(bands)  # where only the leading ones are given
        return torch.cat([*bands, *[torch.zeros_like(bands[0])] * missing], dim=-1).transpose(1, 2)


class ToyMultirateModel(ToyCodec):
    """Coarse codes for four frames, finer ones for what they leave over."""

    config_class = ToyMultirateConfig

    def build_quantizer(self, config: ToyConfig) -> nn.Module:
        return ResidualVectorQuantizer(config.hidden_size, config.codebook_sizes, config.codebook_dim)

    def quantize(self, latents: Tensor, return_margins: bool) -> Quantized:
        residual = latents.transpose(1, 2)
        total = torch.zeros_like(residual)
        codes, margins, commitment, codebook = [], [], [], []
        for stage, stride in zip(self.quantizer.stages, self.facts.codebook_strides, strict=True):
            z = stage.project_in(residual.unflatten(1, (-1, stride)).mean(dim=2))
            found, margin = stage.search(z.detach(), None, return_margins)
            rows = stage.codebook(found).to(z.dtype)
            commitment.append((z - rows.detach()).square().mean())
            codebook.append((rows - z.detach()).square().mean())
            output = stage.out_proj((z + (rows - z).detach()).to(self.dtype)).repeat_interleave(stride, dim=1)
            residual, total = residual - output, total + output
            codes.append(found)
            margins.append(margin)
        commitment, codebook = torch.stack(commitment).sum(), torch.stack(codebook).sum()
        return Quantized(total.transpose(1, 2), codes, margins if return_margins else None, commitment, codebook)

    def dequantize(self, streams: Streams, mask: Streams) -> Tensor:
        stages = zip(self.quantizer.stages, streams, self.facts.codebook_strides, strict=False)
        return sum(stage.lookup(codes).repeat_interleave(stride, dim=1) for stage, codes, stride in stages).transpose(
            1, 2
        )


# What the table of families needs to know of them


class ToyRvqFeatureExtractor(CodecFeatureExtractor): ...


class ToyBandsFeatureExtractor(CodecFeatureExtractor): ...


class ToyMultirateFeatureExtractor(CodecFeatureExtractor): ...


class ToyDepthFeatureExtractor(CodecFeatureExtractor): ...


class ToyRvqAudioTokenizer(AudioTokenizer):
    codec_class, feature_extractor_class = ToyRvqModel, ToyRvqFeatureExtractor


class ToyBandsAudioTokenizer(AudioTokenizer):
    codec_class, feature_extractor_class = ToyBandsModel, ToyBandsFeatureExtractor


class ToyMultirateAudioTokenizer(AudioTokenizer):
    codec_class, feature_extractor_class = ToyMultirateModel, ToyMultirateFeatureExtractor


class ToyDepthAudioTokenizer(AudioTokenizer):
    codec_class, feature_extractor_class = ToyDepthModel, ToyDepthFeatureExtractor


class ToyFamily(Family):
    """A family whose classes live in this module."""

    def load(self, suffix: str) -> Any:
        return getattr(importlib.import_module(__name__), self.prefix + suffix)


TOY_FAMILIES: dict[str, Family] = {
    config.model_type: ToyFamily(
        name=config.model_type,
        model_type=config.model_type,
        prefix=config.__name__.removesuffix("Config"),
        title="A toy of the tests",
        paper="none",
    )
    for config in (ToyRvqConfig, ToyBandsConfig, ToyMultirateConfig, ToyDepthConfig)
}


@pytest.fixture(autouse=True, scope="module")
def known_toys() -> Iterator[None]:
    """The toys in the table of families, for the tests of a folder whose conftest imports this."""
    with pytest.MonkeyPatch.context() as patch:
        for name, family in TOY_FAMILIES.items():
            patch.setitem(auto.FAMILIES, name, family)
        yield
