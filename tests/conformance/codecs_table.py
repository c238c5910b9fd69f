"""The table of codecs that the laws loop over. A new codec is done when it has its line here and all laws pass.

The weights are random, drawn from a fixed seed; they are made uneven on purpose, so that a tensor that is lost on the
way (to disk, to another process) changes ids.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch

from audiotok.auto import FAMILIES, Family
from audiotok.codec import AudioCodec, CodecConfig
from audiotok.codecs.apcodec import ApCodecConfig
from audiotok.codecs.auv import AuvConfig
from audiotok.codecs.melcap import MelCapConfig
from audiotok.codecs.qincodec import QinCodecConfig
from audiotok.codecs.vrvq import VrvqConfig
from audiotok.facts import CodecFacts
from audiotok.layouts import layout_names
from audiotok.recipes.benchmark_models import spread_codes
from audiotok.tokenizer import AudioTokenizer
from audiotok.vocabulary import AudioVocabulary
from conformance.toy_codecs import TOY_FAMILIES, ToyBandsConfig, ToyDepthConfig, ToyMultirateConfig, ToyRvqConfig

CONFORMER = {"head_dim": 16, "ffn_mult": 2, "conv_kernel_size": 7}
CONVNEXT = {"block_type": "convnext", "num_layers": 2, "ffn_mult": 2, "conv_kernel_size": 5}
AUV = {
    "hidden_size": 48,
    "hop_length": 32,
    "encoder_config": {"num_layers": 2, **CONFORMER},
    "decoder_config": {"num_layers": 3, **CONFORMER},
    "codebook_size": 320,
    "domain_ranges": {"speech": [0, 128], "vocal": [0, 192], "music": [0, 320], "audio": [0, 320], "other": [192, 320]},
}
# The kind of the small bundled checkpoint; its mel bands need frames of this length.
MINI = {
    "hop_length": 320,
    "input_features": ["log_magnitude", "subframe_mel"],
    "standardize_features": True,
    "normalize_latents": True,
    "encoder_config": CONVNEXT,
    "decoder_config": CONVNEXT,
}
STAGES = {"codebook_size": [96, 64], "domain_ranges": {"speech": [0, 32], "other": [32, 96]}, "sampling_rate": 8000}

APCODEC = {
    "sampling_rate": 8000,
    "n_fft": 64,
    "win_length": 32,
    "stft_hop_length": 8,
    "downsampling_ratio": 4,
    "trunk_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "amplitude_size": 20,
    "phase_size": 16,
    "hidden_size": 10,
    "num_codebooks": 3,
    "codebook_size": 96,
    "upsample_kernel_size": 8,
    "num_mels": 10,
}
APCODEC_V1 = {"response_norm": False, "codebook_projections": False, "downsample_kernel_size": 9, "hidden_size": 12}
APCODEC_CAUSAL = {
    "response_norm": False,
    "causal": True,
    "num_hidden_layers": 1,
    "downsample_kernel_size": 6,
    "latent_kernel_size": 2,
    "output_kernel_size": 4,
}

QINCODEC = {
    "n_fft": 128,
    "hop_length": 32,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_layers": 1,
    "latent_dim": 8,
}
QINCO2 = {"num_quantizers": 3, "codebook_size": 32, "num_blocks": 1, "embedding_dim": 12, "hidden_dim": 16}
SEARCH = {"num_candidates": 8, "beam_size": 3}

MELCAP = {
    "sampling_rate": 8000,
    "n_fft": 64,
    "mel_hop_length": 16,
    "num_mel_bins": 16,
    "base_channels": 8,
    "channel_multipliers": [1, 2, 2],
    "num_res_blocks": 1,
    "num_norm_groups": 4,
    "bottleneck_channels": 8,
    "codebook_size": 96,
    "codebook_dim": 8,
    "vocoder_hidden_size": 16,
    "vocoder_intermediate_size": 32,
    "vocoder_num_layers": 2,
}
# Every other choice that a configuration has.
MELCAP_OTHER = {
    "front_end_padding": "none",
    "hidden_act": "tanh",
    "channel_multipliers": [2, 1],
    "attention_levels": [],
    "normalize_latents": True,
    "head_padding": "same",
}

VRVQ = {
    "sampling_rate": 8000,
    "encoder_hidden_size": 4,
    "downsampling_ratios": [2, 4],
    "decoder_hidden_size": 8,
    "upsampling_ratios": [4, 2],
    "num_codebooks": 3,
    "codebook_size": 64,
    "codebook_dim": 4,
    "importance_channels": [8],
    "level_min": 1.0,
}
VRVQ_CONSTANT = {
    "variable_rate": False,
    "downsampling_ratios": [8],
    "upsampling_ratios": [8],
    "codebook_dim": [4, 3, 2],
}

TABLE: dict[str, CodecConfig] = {
    "auv": AuvConfig(**AUV),
    "auv_convnext": AuvConfig(**{**AUV, **MINI}),
    "auv_stages": AuvConfig(**{**AUV, **STAGES}),
    "apcodec": ApCodecConfig(**APCODEC),
    "apcodec_v1": ApCodecConfig(**{**APCODEC, **APCODEC_V1}),
    "apcodec_causal": ApCodecConfig(**{**APCODEC, **APCODEC_CAUSAL}),
    "melcap": MelCapConfig(**MELCAP),
    "melcap_other": MelCapConfig(**{**MELCAP, **MELCAP_OTHER}),
    "qincodec": QinCodecConfig(**QINCODEC, quantizer={**QINCO2, **SEARCH}),
    "qincodec_rq": QinCodecConfig(
        **QINCODEC, quantizer={"type": "rq", "num_quantizers": 3, "codebook_size": 32, "beam_size": 2}, num_quantizers=2
    ),
    "vrvq": VrvqConfig(**VRVQ),
    "vrvq_constant": VrvqConfig(**{**VRVQ, **VRVQ_CONSTANT}),
    "toy_rvq": ToyRvqConfig(),
    "toy_bands": ToyBandsConfig(),
    "toy_multirate": ToyMultirateConfig(),
    "toy_depth": ToyDepthConfig(),
}
# Two legal values of each option of `encode` that give different codes.
OPTION_VALUES: dict[str, tuple[Any, Any]] = {
    "domain": ("speech", "other"),
    "level": (0.4, 0.9),
    "beam_size": (1, 16),
    "num_candidates": (1, 16),
    "phase": ("settled", "published"),
    "bitrate": (8000, 20000),
    "num_quantizers": (1, 2),
}
# Of these and `level`, a clip takes one alone.
EXCLUSIVE = ("bitrate", "num_quantizers")

FINITE = [name for name, config in TABLE.items() if config.facts.receptive_field_samples is not None]
UNBOUNDED = [name for name in TABLE if name not in FINITE]
# Codecs of the package, which have to be good citizens of transformers too.
PUBLISHED = [name for name, config in TABLE.items() if type(config).__module__.startswith("audiotok.")]


def family(config: CodecConfig) -> Family:
    return next(f for f in (*FAMILIES.values(), *TOY_FAMILIES.values()) if f.model_type == config.model_type)


def new_codec(name: str, **changes: Any) -> AudioCodec:
    """A codec of its own, for tests that change it; `changes` are keys of its config."""
    config = copy.deepcopy(TABLE[name])
    if changes:
        config = type(config)(**{**{key: getattr(config, key) for key in config.own_keys()}, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = family(config).load("Model")(config)
        make_uneven(codec.eval())
        spread_codes(codec, torch.from_numpy(clip(codec.facts, 100 * codec.facts.hop_length))[None])
    return codec


@torch.no_grad()
def make_uneven(codec: AudioCodec) -> None:
    """No tensor keeps the value that its layer starts with; variances stay positive."""
    for name, tensor in codec.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.2 * torch.rand_like(tensor))
            if not name.endswith("running_var"):
                tensor.add_(0.02 * torch.randn_like(tensor))


@cache
def shared_codec(name: str) -> AudioCodec:
    return new_codec(name)


@cache
def double_codec(name: str) -> AudioCodec:
    """A codec for tests in double precision, which stays in it."""
    return new_codec(name)


def tokenizer_of(codec: AudioCodec, layout: str | None = None, options: dict[str, Any] | None = None) -> AudioTokenizer:
    return family(codec.config).load("AudioTokenizer")(codec, None, layout, options, "a-name")


def layouts_of(facts: CodecFacts) -> tuple[str, ...]:
    vocabulary = AudioVocabulary(facts.codebook_sizes, facts.shared_codebook)
    return layout_names(vocabulary, facts.codebook_strides, facts.variable_depth)


def clip(facts: CodecFacts, num_samples: int, seed: int = 0) -> np.ndarray:
    """A recording for a codec, `[C, N]` float32: a chirp and noise, with loud, soft and silent stretches."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / facts.sampling_rate
    phases = rng.uniform(0, 2 * np.pi, (facts.channels, 1))
    chirp = np.sin(2 * np.pi * (200 + 700 * rng.random() + 3000 * time) * time + phases)
    noise = rng.standard_normal((facts.channels, num_samples))
    stretch = 4 * facts.hop_length
    levels = rng.choice([0.0, 0.02, 0.1, 0.3, 0.6], 1 + num_samples // stretch, p=[0.1, 0.2, 0.3, 0.2, 0.2])
    envelope = np.repeat(levels, stretch)[:num_samples]
    return (envelope * (0.6 * chirp + 0.4 * noise)).astype(np.float32)
