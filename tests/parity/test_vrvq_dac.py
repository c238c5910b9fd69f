"""VRVQ beside transformers' `DacModel` with the same weights, live: the same codes, latents and audio."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import DacConfig, DacModel

from audiotok import VrvqConfig, VrvqModel
from audiotok.codecs.vrvq.conversion_vrvq import convert_config, convert_weights

# Of the largest entry: theirs adds in another order.
RELATIVE = 1e-5

SMALL = {"encoder_hidden_size": 4, "decoder_hidden_size": 64, "num_codebooks": 4, "codebook_size": 64}
CONFIGS = {
    "44.1 kHz": VrvqConfig(variable_rate=False, **SMALL),
    "variable": VrvqConfig(importance_channels=[16, 8], **SMALL),
    "odd strides": VrvqConfig(
        variable_rate=False, downsampling_ratios=[2, 3, 5], upsampling_ratios=[5, 3, 2], sampling_rate=16000, **SMALL
    ),
    "24 kHz": VrvqConfig(
        variable_rate=False, downsampling_ratios=[2, 4, 5], upsampling_ratios=[5, 4, 2], sampling_rate=24000, **SMALL
    ),
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def folded(codec: VrvqModel) -> dict[str, Tensor]:
    """Our tensors without weight norm, under the names of `DacModel`."""
    state = codec.state_dict()
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(("_g", "_v"))}
    for name in (name.removesuffix("_v") for name in state if name.endswith("weight_v")):
        v, g = state[f"{name}_v"], state[f"{name}_g"]
        weight = v * (g / v.norm(dim=tuple(range(1, v.ndim)), keepdim=True))
        weights[name] = weight[..., None] if weight.ndim == 2 else weight
    return {_dac_name(name): tensor for name, tensor in weights.items() if not name.startswith("importance.")}


def _dac_name(name: str) -> str:
    for ours, theirs in (
        ("coder.conv_in.", "coder.conv1."),
        ("coder.conv_out.snake.", "coder.snake1."),
        ("coder.conv_out.conv.", "coder.conv2."),
        (".blocks.", ".block."),
        (".units.0.", ".res_unit1."),
        (".units.1.", ".res_unit2."),
        (".units.2.", ".res_unit3."),
        (".down.snake.", ".snake1."),
        (".down.conv.", ".conv1."),
        (".snake.", ".snake1."),
        (".up.", ".conv_t1."),
        (".stages.", ".quantizers."),
    ):
        name = name.replace(ours, theirs)
    return name


def dac_of(codec: VrvqModel) -> DacModel:
    """A `DacModel` with these weights; every tensor of it is one of ours."""
    config = codec.config
    dac = DacModel(
        DacConfig(
            encoder_hidden_size=config.encoder_hidden_size,
            downsampling_ratios=config.downsampling_ratios,
            decoder_hidden_size=config.decoder_hidden_size,
            n_codebooks=config.num_codebooks,
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            sampling_rate=config.sampling_rate,
        )
    )
    dac.load_state_dict(folded(codec), strict=True)
    return dac.eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=RELATIVE * float(expected.abs().max()))


def compare(codec: VrvqModel, audio: Tensor) -> None:
    """All books, and the first three; the length is a multiple of the hop, as theirs does not pad."""
    dac, books = dac_of(codec), codec.config.num_codebooks
    latents = codec.latents(audio)
    close(latents, dac.encoder(audio))
    for count in (books, 3):
        theirs = dac.encode(audio, n_quantizers=count)
        ours = codec.encode(audio, num_quantizers=count)
        assert torch.equal(ours.audio_codes[:, :count], theirs.audio_codes)
        quantized = codec.quantizer.decode(ours.audio_codes, ours.audio_codes_mask)
        close(quantized, theirs.quantized_representation)
        ours.audio_lengths = None  # all that the decoder gives
        expected = dac.decode(theirs.quantized_representation).audio_values
        assert expected.shape[-1] == codec.facts.num_samples(ours.audio_codes.shape[-1])
        close(codec.decode(ours)[:, 0], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_drawn_weights(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = VrvqModel(CONFIGS[name]).eval()
        for parameter in codec.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter)).add_(0.02 * torch.randn_like(parameter))
        audio = 0.3 * torch.randn(2, 1, 12 * codec.facts.hop_length)
    compare(codec, audio)


@pytest.mark.parametrize("case", ["tiny_vbr", "tiny_cbr", pytest.param("full_vbr", marks=pytest.mark.slow)])
def test_recorded_weights(case: str, golden: Callable) -> None:
    files = golden("vrvq")
    config = convert_config(files.config(case))
    codec = VrvqModel(config).eval()
    codec.load_state_dict(convert_weights(files.weights(case), config))
    compare(codec, files.vectors(f"{case}/vectors")["clip.audio"])
