"""AUV gives what the published code gives: every recorded case, from the waveform to the last tap.

Recorded in float32 on another machine. Codes must be equal; the tolerances of the rest are rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from published import Golden, close, listening, model_fixture
from torch import Tensor, nn

from audiotok import AuvConfig, AuvModel
from audiotok.codecs.auv.conversion_auv import convert_config, convert_weights
from audiotok.nn.sinc_resample import sinc_resample

LATENT_ATOL, AUDIO_ATOL = 1e-4, 2e-5
# Empty bands have phases of near-zero bins: ill conditioned (the codes are still safe).
RESAMPLED_ATOL = {8000: 5e-3, 24000: LATENT_ATOL, 44100: 5e-3}
FFT_ROUNDING = 1e-6
# What another batch shape may move on one machine.
ROUNDING_ATOL = 1e-5

WHOLE = [
    "tiny/vectors",
    "tiny/vectors_exact",
    "tiny/vectors_hop_plus_one",
    "tiny/vectors_short_min",
    "tiny/vectors_short_two_frames",
    "tiny/vectors_silence",
    "tiny/vectors_long",
    "tiny_options/vectors",
    "tiny_noproj/vectors",
    "full/vectors",
    "full/vectors_short_min",
    "full/vectors_silence",
]
BATCHES = ["tiny/vectors_batch", "tiny_options/vectors_batch", "full/vectors_batch"]

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def vectors(golden: Callable) -> Callable[[str], dict[str, Tensor]]:
    return golden("auv").vectors


def convert(files: Golden, case: str) -> tuple[AuvConfig, dict[str, Tensor]]:
    config = convert_config(files.config(case))
    return config, convert_weights(files.weights(case), config)


model = model_fixture("auv", AuvModel, convert)


def same_codes(found: Tensor, recorded: Tensor) -> None:
    """Ours `[B, Q, F]`, theirs `[Q, B, F]`."""
    assert torch.equal(found, recorded.permute(1, 0, 2).long())


def same_margins(found: Tensor, recorded: Tensor) -> None:
    """A difference of two distances over the smaller one: rounding moves it by up to a hundredth."""
    torch.testing.assert_close(found.permute(1, 0, 2), recorded, atol=1e-5, rtol=1e-2)


# Whole clips


@pytest.mark.parametrize("name", WHOLE)
def test_encode(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    output = codec.encode(v["input"][:, None], return_margins=True)
    same_codes(output.audio_codes, v["codes"])
    same_margins(output.margins, v["margins"])
    assert bool(output.audio_codes_mask.all())
    assert output.audio_lengths.tolist() == [v["input"].shape[1]]
    latents = codec.latents(v["input"][:, None])
    if "before_quantize" in v:
        close(latents.transpose(1, 2), v["before_quantize"], LATENT_ATOL)
    if "quantized" in v:
        close(codec.quantizer(latents).quantized.transpose(1, 2), v["quantized"], LATENT_ATOL)


@pytest.mark.parametrize("name", WHOLE)
def test_decode(name: str, vectors: Callable, model: Callable) -> None:
    v, case = vectors(name), name.split("/")[0]
    codec, atol = model(case), 1e-4 if case == "tiny_noproj" else AUDIO_ATOL
    codes = v["codes"].permute(1, 0, 2)
    audio = codec.decode(codes)
    assert audio.shape[-1] == codes.shape[-1] * codec.config.hop_length
    close(audio, v["audio_from_codes"], atol)
    if "embedding_from_codes" in v:
        close(codec.quantizer.decode(codes.long()).transpose(1, 2), v["embedding_from_codes"], LATENT_ATOL)
    if "audio_from_quantized" in v:
        decoded = codec.decoder(v["quantized"].transpose(1, 2), [codes.shape[-1]])
        close(decoded.audio[:, None], v["audio_from_quantized"], atol)


def test_shortest_clip_and_lengths(vectors: Callable, model: Callable) -> None:
    """floor(n / hop) frames from 1.5 hops and a sample on, as published: what is left over makes no frame."""
    codec, wave = model("tiny"), vectors("tiny/vectors_silence")["input"]
    for samples, frames in ((49, 1), (63, 1), (64, 2), (95, 2), (96, 3), (1000, 31)):
        assert codec.encode(wave[:, None, :samples]).audio_codes.shape == (1, 1, frames)


def test_silence_has_floor_magnitude_and_zero_phase(vectors: Callable, model: Callable) -> None:
    v = vectors("tiny/vectors_silence")
    spectrum = model("tiny").encoder.front_end.spectrum(v["input"], [1000], 31)
    close(spectrum["log_magnitude"].transpose(1, 2), v["enc/log_mag"], 1e-6)
    assert torch.equal(spectrum["phase"].transpose(1, 2), v["enc/phase"])
    assert not bool(spectrum["phase"].signbit().any())


# Taps


def backbone_taps(side: str, backbone: nn.Module) -> dict[str, nn.Module]:
    first = backbone.layers[0]
    parts = {
        "ffn1": first.ffn1,
        "attn": first.attn,
        "conv": first.conv_module,
        "depthwise": first.conv_module.depthwise_conv,
        "ffn2": first.ffn2,
    }
    taps = {f"{side}/layer{i}": layer for i, layer in enumerate(backbone.layers)}
    taps |= {f"{side}/layer0_{name}": module for name, module in parts.items()}
    return taps | {f"{side}/conformer_out": backbone.layer_norm}


@pytest.mark.parametrize("name", ["tiny/vectors", "tiny_options/vectors", "tiny_noproj/vectors", "full/vectors"])
def test_every_tap(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    modules = backbone_taps("enc", codec.encoder.backbone) | backbone_taps("dec", codec.decoder.backbone)
    modules |= {"enc/stft_head_out": codec.encoder.input_proj, "dec/head_out": codec.decoder.head}
    modules |= {f"vq{q}/z_e": stage.in_proj for q, stage in enumerate(codec.quantizer.stages)}
    with listening(modules) as heard:
        codec.encode(v["input"][:, None])
        codec.decode(v["codes"].permute(1, 0, 2))
    samples, frames = v["input"].shape[1], v["codes"].shape[2]
    spectrum = codec.encoder.front_end.spectrum(v["input"], [samples], frames)
    heard["enc/log_mag"] = spectrum["log_magnitude"].transpose(1, 2)
    heard["enc/phase"] = spectrum["phase"].transpose(1, 2)
    recorded = [tap for tap in v if tap.startswith(("enc/", "dec/", "vq"))]
    assert set(recorded) <= set(heard)
    # The FFT's rounding is absolute: a quiet bin's logarithm and phase move the more the quieter it is.
    of_bins = LATENT_ATOL + FFT_ROUNDING / v["enc/log_mag"].exp()
    for tap in recorded:
        found = heard[tap] if heard[tap].shape == v[tap].shape else heard[tap].transpose(1, 2)
        atol = of_bins if tap in ("enc/log_mag", "enc/phase") else LATENT_ATOL
        assert bool(((found - v[tap]).abs() <= atol).all()), tap


# Domains


@pytest.mark.parametrize("case", ["tiny", "full"])
@pytest.mark.parametrize("domain", ["speech", "vocal", "music", "audio", "other", "all"])
def test_domain(case: str, domain: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(f"{case}/vectors_domains"), model(case)
    output = codec.encode(v["input"][:, None], domain=domain, return_margins=True)
    same_codes(output.audio_codes, v[f"{domain}/codes"])
    same_margins(output.margins, v[f"{domain}/margins"])
    if f"{domain}/quantized" in v:
        latents = codec.latents(v["input"][:, None])
        ranges = [tuple(codec.config.domain_ranges.get(domain, (0, 320)))]
        close(codec.quantizer(latents, ranges).quantized.transpose(1, 2), v[f"{domain}/quantized"], LATENT_ATOL)
        close(codec.decode(output.audio_codes), v[f"{domain}/audio_from_codes"], AUDIO_ATOL)


def test_each_clip_of_a_batch_has_its_own_domain(vectors: Callable, model: Callable) -> None:
    v, codec = vectors("tiny/vectors_domains"), model("tiny")
    domains = ["other", "speech", "all"]
    output = codec.encode(v["input"][:, None].expand(3, -1, -1), domain=domains)
    for row, domain in zip(output.audio_codes, domains, strict=True):
        same_codes(row[None], v[f"{domain}/codes"])
    same_codes(codec.encode(v["input"][:, None]).audio_codes, v["none/codes"])


# Batches


@pytest.mark.parametrize("name", BATCHES)
def test_masked_batch_is_each_clip_alone(name: str, vectors: Callable, model: Callable) -> None:
    """The published code cannot do this; its codes of each clip alone are what ours must be in a batch."""
    v, codec = vectors(name), model(name.split("/")[0])
    waveform, lengths, frames = v["input_padded"], v["lengths"].tolist(), v["frames"].tolist()
    mask = (torch.arange(waveform.shape[1]) < v["lengths"][:, None]).long()
    output = codec.encode(waveform[:, None], mask, partial_frame="drop", return_margins=True)
    latents = codec.encoder(waveform, lengths)[0].transpose(1, 2)
    audio = codec.decode(output.audio_codes, lengths=[f * codec.config.hop_length for f in frames])
    for i, count in enumerate(frames):
        same_codes(output.audio_codes[i : i + 1, :, :count], v[f"item{i}/codes"])
        assert output.audio_codes_mask[i].sum(dim=-1).tolist() == [count] * output.audio_codes.shape[1]
        if f"item{i}/margins" in v:
            same_margins(output.margins[i : i + 1, :, :count], v[f"item{i}/margins"])
            close(latents[i : i + 1, :count], v[f"item{i}/before_quantize"], LATENT_ATOL)
        alone = codec.encoder(waveform[i : i + 1, : lengths[i]], lengths[i : i + 1])[0].transpose(1, 2)
        close(latents[i : i + 1, :count], alone, ROUNDING_ATOL)
        samples = count * codec.config.hop_length
        close(audio[i : i + 1, :, :samples], v[f"item{i}/audio_from_codes"], AUDIO_ATOL)
        close(audio[i : i + 1, :, :samples], codec.decode(output.audio_codes[i : i + 1, :, :count]), ROUNDING_ATOL)
        assert not bool(audio[i, :, samples:].any())


@pytest.mark.parametrize("name", BATCHES)
def test_output_of_a_batch_decodes_as_each_clip_alone(name: str, vectors: Callable, model: Callable) -> None:
    """A partial frame that was dropped must not come back as a frame of code 0."""
    v, codec = vectors(name), model(name.split("/")[0])
    mask = (torch.arange(v["input_padded"].shape[1]) < v["lengths"][:, None]).long()
    audio = codec.decode(codec.encode(v["input_padded"][:, None], mask, partial_frame="drop"))
    for i, (samples, frames) in enumerate(zip(v["lengths"].tolist(), v["frames"].tolist(), strict=True)):
        kept = frames * codec.config.hop_length
        close(audio[i : i + 1, :, :kept], v[f"item{i}/audio_from_codes"], AUDIO_ATOL)
        assert not bool(audio[i, :, kept:].any()) and audio.shape[-1] >= samples


@pytest.mark.parametrize("name", BATCHES)
def test_naive_padding_changes_codes_and_audio(name: str, vectors: Callable, model: Callable) -> None:
    """Without a mask ours is the published code here too: what it gives for a padded batch, and that it is wrong."""
    v, codec = vectors(name), model(name.split("/")[0])
    naive = codec.encode(v["input_padded"][:, None]).audio_codes
    same_codes(naive, v["naive_codes"])
    if "naive_audio_from_codes" in v:
        close(codec.decode(naive), v["naive_audio_from_codes"], AUDIO_ATOL)
    for i, frames in enumerate(v["frames"].tolist()[1:], start=1):
        alone = v[f"item{i}/codes"].permute(1, 0, 2).long()
        assert not torch.equal(naive[i : i + 1, :, :frames], alone)
        padded = torch.nn.functional.pad(alone, (0, naive.shape[-1] - frames))
        unmasked = codec.decode(padded)[..., : frames * codec.config.hop_length]
        assert (unmasked - v[f"item{i}/audio_from_codes"]).abs().max() > 1e-3


# Distillation, resampled input


def test_distillation_state(vectors: Callable, model: Callable) -> None:
    v, codec = vectors("tiny_options/vectors_distill"), model("tiny_options")
    assert codec.config.distill_depth == 1
    decoded = codec.decoder(v["quantized"].transpose(1, 2), [v["quantized"].shape[1]])
    close(decoded.audio[:, None], v["audio"], AUDIO_ATOL)
    close(decoded.hidden_states[codec.config.distill_depth], v["hidden_feat"], LATENT_ATOL)


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_resampled_input(rate: int, vectors: Callable, model: Callable) -> None:
    v, codec = vectors("tiny/vectors_resample"), model("tiny")
    ours = sinc_resample(v[f"{rate}/input"], rate, 16000)
    for waveform in (v[f"{rate}/resampled"], ours):
        output = codec.encode(waveform[:, None])
        same_codes(output.audio_codes, v[f"{rate}/codes"])
        latents = codec.latents(waveform[:, None]).transpose(1, 2)
        close(latents, v[f"{rate}/before_quantize"], RESAMPLED_ATOL[rate])
    close(codec.decode(output.audio_codes), v[f"{rate}/audio_from_codes"], AUDIO_ATOL)
