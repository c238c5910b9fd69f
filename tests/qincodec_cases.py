"""Small QinCodecs, and what they are wrapped around, for several test files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from audiotok import AuvConfig, AuvModel, QinCodecConfig, QinCodecModel

HOP = 32
TINY: dict[str, Any] = {
    "sampling_rate": 8000,
    "n_fft": 128,
    "hop_length": HOP,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_layers": 2,
    "latent_dim": 8,
    "quantizer": {
        "num_quantizers": 6,
        "codebook_size": 32,
        "num_blocks": 1,
        "embedding_dim": 12,
        "hidden_dim": 16,
        "num_candidates": 8,
        "beam_size": 4,
    },
}
RQ = {"type": "rq", "num_quantizers": 6, "codebook_size": 32, "beam_size": 4}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**changes: Any) -> QinCodecModel:
    """A codec with drawn weights whose quantizer takes its latents as they are spread."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = QinCodecModel(QinCodecConfig(**{**TINY, **changes})).eval()
        with torch.no_grad():
            for parameter in codec.autoencoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            vectors = codec.latents(noise(1, 1, 100 * HOP))[0].T
            codec.quantizer.set_normalization(vectors.mean(dim=0), vectors.std())
    return codec


# Another codec, to be wrapped

STACK = {"block_type": "convnext", "num_layers": 2, "ffn_mult": 2, "conv_kernel_size": 5}
AUV: dict[str, Any] = {
    "hop_length": 320,
    "hidden_size": 32,
    "input_features": ["log_magnitude", "subframe_mel"],
    "standardize_features": True,
    "normalize_latents": True,
    "codebook_size": 64,
    "domain_ranges": None,
    "encoder_config": STACK,
    "decoder_config": STACK,
}


def auv(**changes: Any) -> AuvModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = AuvModel(AuvConfig(**{**AUV, **changes})).eval()
    with torch.no_grad():  # the codes of random weights become diverse
        projection = codec.quantizer.in_order[0].in_proj
        projected = projection(codec.latents(noise(1, 1, 100 * 320)).transpose(1, 2))
        projection.bias -= projected.mean(dim=(0, 1))
    return codec
