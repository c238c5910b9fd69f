"""VRVQ gives what the published code gives: every recorded case, from the waveform to the last layer.

Recorded in float32 on another machine. Codes and depths must be equal; the tolerances of the rest are rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import Golden, close, listening, model_fixture
from torch import Tensor, nn

from audiotok import VrvqConfig, VrvqModel
from audiotok.codecs.vrvq.conversion_vrvq import convert_config, convert_weights
from audiotok.codecs.vrvq.modeling_vrvq import Analysis

IMPORTANCE_ATOL, LATENT_ATOL, AUDIO_ATOL = 5e-6, 5e-5, 2e-5
RELATIVE = 1e-5  # of the largest entry of a tensor

FULL = pytest.param("full_vbr", marks=pytest.mark.slow)  # 330 MB of drawn weights
CASES = ["tiny_vbr", "tiny_cbr", FULL]
VARIABLE = ["tiny_vbr", FULL]
CLIPS = ["clip", "odd", "short1", "short37", "short512", "short513", "silence"]

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def vectors(golden: Callable) -> Callable[[str], dict[str, Tensor]]:
    return lambda case: golden("vrvq").vectors(f"{case}/vectors")


@pytest.fixture
def facts(golden: Callable) -> Callable[[str], dict[str, Any]]:
    return lambda case: json.loads(golden("vrvq").path(f"{case}/facts.json").read_text())


def convert(files: Golden, case: str) -> tuple[VrvqConfig, dict[str, Tensor]]:
    config = convert_config(files.config(case))
    return config, convert_weights(files.weights(case), config)


model = model_fixture("vrvq", VrvqModel, convert)


def close_of_largest(found: Tensor, recorded: Tensor) -> None:
    close(found, recorded, RELATIVE * max(1.0, float(recorded.abs().max())))


def clips_of(vectors: dict[str, Tensor]) -> list[str]:
    """Recorded clips; the full size has fewer."""
    return [clip for clip in CLIPS if f"{clip}.audio" in vectors]


def depths(codec: VrvqModel, audio: Tensor, **options: Any) -> Tensor:
    return codec.encode(audio, **options).audio_codes_mask.sum(dim=1)


def analysed(codec: VrvqModel, audio: Tensor) -> Analysis:
    return codec._analyse(audio, None)


# The model as a whole


def test_full_sizes() -> None:
    with torch.device("meta"):
        variable, constant = VrvqModel(VrvqConfig()), VrvqModel(VrvqConfig(variable_rate=False))

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert (size(variable), len(variable.state_dict())) == (81_559_668, 318)
    assert (size(constant), len(constant.state_dict())) == (76_625_250, 294)
    parts = (variable.encoder, variable.quantizer, variable.importance, variable.decoder)
    assert [size(part) for part in parts] == [22_307_968, 213_120, 4_934_418, 54_104_162]
    for codec, folded in ((variable, 81_527_882), (constant, 76_595_169)):
        gains = sum(t.numel() for name, t in codec.state_dict().items() if name.endswith("weight_g"))
        assert size(codec) - gains == folded


def test_facts_of_the_full_size() -> None:
    facts = VrvqConfig().facts
    assert (facts.sampling_rate, facts.hop_length, float(facts.frame_rate)) == (44100, 512, 86.1328125)
    assert facts.codebook_sizes == (1024,) * 8
    assert facts.variable_depth and not VrvqConfig(variable_rate=False).facts.variable_depth
    assert facts.bits_per_second() == pytest.approx(6890.625)
    # Latent frame f reads samples 512f - 3733 ... 512f + 4244, its importance 512f - 6293 ... 512f + 6804.
    assert facts.receptive_field_samples == 6293 == 6804 - 511
    assert VrvqConfig(variable_rate=False).facts.receptive_field_samples == 3733 == 4244 - 511
    for samples, frames in ((1, 1), (37, 1), (512, 1), (513, 2), (16758, 33), (441000, 862)):
        assert facts.num_frames(samples) == frames


# Whole clips


@pytest.mark.parametrize("case", CASES)
def test_encode(case: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(case), model(case)
    for clip in clips_of(v):
        audio = v[f"{clip}.audio"]
        output, analysis = codec.encode(audio), analysed(codec, audio)
        found = codec.quantizer(analysis.latents, return_margins=True)
        assert torch.equal(found.codes, v[f"{clip}.codes"].long())
        # A difference of two distances over the smaller one: rounding moves it by up to a hundredth.
        torch.testing.assert_close(found.margins, v[f"{clip}.margins"], atol=1e-5, rtol=1e-2)
        close(analysis.latents, v[f"{clip}.latent"], LATENT_ATOL)
        assert output.audio_lengths.tolist() == [audio.shape[-1]]
        mask = output.audio_codes_mask
        assert torch.equal(output.audio_codes, found.codes * mask)
        if codec.importance is None:
            assert bool(mask.all()) and output.importance is None
            continue
        assert torch.equal(mask.sum(dim=1), v[f"{clip}.n_codes"].long())
        close(output.importance[:, None], v[f"{clip}.imp_map"], IMPORTANCE_ATOL)
        if f"{clip}.mask" in v:
            assert torch.equal(mask, v[f"{clip}.mask"].bool())


@pytest.mark.parametrize("case", CASES)
def test_decode(case: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(case), model(case)
    for clip in clips_of(v):
        output = codec.encode(v[f"{clip}.audio"])
        close(codec.decode(output), v[f"{clip}.recon"], AUDIO_ATOL)
        if f"{clip}.recon_padded" in v:
            output.audio_lengths = None
            close(codec.decode(output), v[f"{clip}.recon_padded"], AUDIO_ATOL)


@pytest.mark.parametrize("case", CASES)
def test_losses_in_eval_mode(case: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(case), model(case)
    for clip in clips_of(v):
        output = codec(v[f"{clip}.audio"])
        for name in ("commitment", "codebook"):
            torch.testing.assert_close(output.losses[name][None], v[f"{clip}.{name}_loss"], atol=0, rtol=1e-5)
        close(output.audio_values, v[f"{clip}.recon"], AUDIO_ATOL)
        assert torch.equal(output.audio_codes, codec.encode(v[f"{clip}.audio"]).audio_codes)
        if f"{clip}.imp_map" in v:
            close(output.losses["rate"], v[f"{clip}.imp_map"].mean(), IMPORTANCE_ATOL)


def taps_of(codec: VrvqModel) -> dict[str, nn.Module]:
    """The recorded layers: 7 of the encoder, 6 of the subnet, 8 of the decoder (the last is behind the tanh)."""
    encoder, decoder = codec.encoder, codec.decoder
    taps = {"enc.0": encoder.conv_in, "enc.5": encoder.conv_out.snake, "enc.6": encoder.conv_out.conv}
    taps |= {f"enc.{i + 1}": block for i, block in enumerate(encoder.blocks)} | {"feat": encoder.blocks[-1]}
    taps |= {"dec.0": decoder.conv_in, "dec.5": decoder.conv_out.snake, "dec.6": decoder.conv_out.conv}
    taps |= {f"dec.{i + 1}": block for i, block in enumerate(decoder.blocks)} | {"dec.7": decoder}
    if codec.importance is not None:
        names = ["imp.in", *(f"imp.{i}" for i in range(5))]
        taps |= {name: stage.conv for name, stage in zip(names, codec.importance.stages, strict=True)}
    return taps


@pytest.mark.parametrize("case", CASES)
def test_every_tap(case: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(case), model(case)
    with listening(taps_of(codec)) as heard:
        codec.decode(codec.encode(v["clip.audio"]))
    recorded = {name.removeprefix("clip."): tensor for name, tensor in v.items() if name.startswith("clip.")}
    taps = [name for name in recorded if name in heard]
    assert len(taps) == (22 if codec.importance is not None else 16)
    for tap in taps:
        channels, steps = recorded[tap].shape[1:]
        close_of_largest(heard[tap][:, :channels, :steps], recorded[tap])
        if f"{tap}.absmean" in recorded:
            close_of_largest(heard[tap].abs().mean()[None], recorded[f"{tap}.absmean"].view(1))


@pytest.mark.parametrize("case", CASES)
def test_quantizer(case: str, vectors: Callable, model: Callable) -> None:
    """Projections of all books, and the sum of those kept."""
    v, codec = vectors(case), model(case)
    latents = analysed(codec, v["clip.audio"]).latents
    with listening({str(k): stage.in_proj for k, stage in enumerate(codec.quantizer.stages)}) as heard:
        codec.quantizer(latents)
    close_of_largest(torch.cat(list(heard.values()), dim=2).transpose(1, 2), v["clip.z_e"])
    if "clip.z_q" in v:
        mask = v.get("clip.mask")
        close_of_largest(codec.quantizer(latents, mask=mask).quantized, v["clip.z_q"])
    if "clip.z_q_is" in v:
        for k in range(codec.config.num_codebooks):
            one = torch.zeros_like(v["clip.mask"])
            one[:, k] = 1
            close_of_largest(codec.quantizer(latents, mask=one).quantized, v["clip.z_q_is"][:, k])


# Levels and constant depth


@pytest.mark.parametrize("case", VARIABLE)
def test_levels(case: str, vectors: Callable, model: Callable, facts: Callable) -> None:
    v, codec, audio = vectors(case), model(case), vectors(case)["clip.audio"]
    recorded = facts(case)["levels"]
    assert len(recorded) == 12
    for entry in recorded:
        name, output = f"level_{entry['level']}", codec.encode(audio, level=entry["level"])
        assert torch.equal(output.audio_codes_mask.sum(dim=1), v[f"{name}.n_codes"].long())
        codes_alone = codec.bits_per_second(output) - codec.rate.side_bits * codec.rate.frame_rate
        assert float(codes_alone) / 1000 == pytest.approx(entry["kbps_exact"], rel=1e-6)
        if f"{name}.z_q" in v:
            close_of_largest(codec.quantizer.decode(output.audio_codes, output.audio_codes_mask), v[f"{name}.z_q"])
        if f"{name}.recon" in v:
            close(codec.decode(output), v[f"{name}.recon"], AUDIO_ATOL)


def test_level_zero_keeps_one_book(vectors: Callable, model: Callable) -> None:
    found = depths(model("tiny_vbr"), vectors("tiny_vbr")["clip.audio"], level=0)
    assert torch.equal(found, torch.ones_like(found))


def test_one_level_a_clip(vectors: Callable, model: Callable) -> None:
    v, codec = vectors("tiny_vbr"), model("tiny_vbr")
    found = depths(codec, v["clip.audio"].expand(4, -1, -1), level=[0.35, None, 6.0, 2])
    for row, name in zip(found, ("level_0.35", "level_1.0", "level_6.0", "level_2.0"), strict=True):
        assert torch.equal(row, v[f"{name}.n_codes"][0].long())


@pytest.mark.parametrize("case", VARIABLE)
def test_constant_depth_of_a_variable_codec(case: str, vectors: Callable, model: Callable) -> None:
    """All books as published; fewer are the sum of the first n, where the published code fails or gives n-fold."""
    v, codec = vectors(case), model(case)
    books = codec.config.num_codebooks
    whole = codec.encode(v["clip.audio"], num_quantizers=books)
    assert torch.equal(whole.audio_codes, v["clip.codes"].long())
    close_of_largest(codec.quantizer.decode(whole.audio_codes, whole.audio_codes_mask), v["nq_all.z_q"])
    close(codec.decode(whole), v["nq_all.recon"], AUDIO_ATOL)
    for count in range(1, books + 1):
        output = codec.encode(v["clip.audio"], num_quantizers=count)
        assert output.audio_codes_mask.sum(dim=1).unique().tolist() == [count]
        if "clip.z_q_is" in v:
            found = codec.quantizer.decode(output.audio_codes, output.audio_codes_mask)
            close_of_largest(found, v["clip.z_q_is"][:, :count].sum(dim=1))


def test_first_books_of_a_constant_rate(vectors: Callable, model: Callable) -> None:
    v, codec = vectors("tiny_cbr"), model("tiny_cbr")
    for count in range(1, 5):
        output = codec.encode(v["clip.audio"], num_quantizers=count)
        assert torch.equal(output.audio_codes, v["clip.codes"][:, :count].long())
        close_of_largest(codec.quantizer.decode(output.audio_codes), v[f"nq{count}.z_q"])
        if f"nq{count}.recon" in v:
            close(codec.decode(output), v[f"nq{count}.recon"], AUDIO_ATOL)


def test_decoding_from_codes(vectors: Callable, model: Callable) -> None:
    v, codec = vectors("tiny_cbr"), model("tiny_cbr")
    codes = v["clip.codes"].long()
    rows = [stage.codebook(codes[:, k]) for k, stage in enumerate(codec.quantizer.in_order)]
    assert torch.equal(torch.cat(rows, dim=2).transpose(1, 2), v["from_codes.z_p"])
    close_of_largest(codec.quantizer.decode(codes), v["from_codes.z_q"])
    close(codec.decode(codes), v["from_codes.recon"], AUDIO_ATOL)


# Lengths and batches


@pytest.mark.parametrize("case", VARIABLE)
def test_unpadded_clip(case: str, vectors: Callable, model: Callable, facts: Callable) -> None:
    """The encoder itself floors at every stage; `encode` pads to whole frames first, as the published forward."""
    v, codec, recorded = vectors(case), model(case), facts(case)["odd_unpadded"]
    features, latents, frames = codec.encoder(v["odd.audio"], [recorded["n"]])
    features, latents = features.transpose(1, 2), latents.transpose(1, 2)
    assert frames == [recorded["frames"]] == [latents.shape[-1]]
    assert torch.equal(codec.quantizer(latents).codes, v["odd_unpadded.codes"].long())
    kept = codec.importance(features, frames) * codec.config.num_codebooks
    mask = torch.arange(codec.config.num_codebooks)[:, None] <= kept[:, None]
    audio = codec.decoder(codec.quantizer(latents, mask=mask.float()).quantized, frames)[0]
    assert audio.shape[-1] == recorded["samples_out"]
    close(audio, v["odd_unpadded.recon"], AUDIO_ATOL)


@pytest.mark.parametrize("case", ["tiny_vbr", "tiny_cbr"])
def test_masked_batch_is_each_clip_alone(case: str, vectors: Callable, model: Callable) -> None:
    """The published code cannot do this; its codes of each clip alone are what ours must be in a batch."""
    v, codec = vectors(case), model(case)
    lengths = v["batch.lengths"].long()
    mask = (torch.arange(v["batch.audio"].shape[-1]) < lengths[:, None]).long()
    output = codec.encode(v["batch.audio"], mask)
    audio = codec.decode(output)
    latents = codec.latents(v["batch.audio"], mask)
    found = codec.quantizer(latents)
    for i, samples in enumerate(lengths.tolist()):
        frames = codec.facts.num_frames(samples)
        assert torch.equal(found.codes[i : i + 1, :, :frames], v[f"alone{i}.codes"].long())
        if f"alone{i}.n_codes" in v:
            assert torch.equal(output.audio_codes_mask[i].sum(dim=0)[:frames], v[f"alone{i}.n_codes"][0].long())
            close(output.importance[i : i + 1, None, :frames], v[f"alone{i}.imp_map"], IMPORTANCE_ATOL)
        assert not bool(output.audio_codes_mask[i, :, frames:].any())
        close(audio[i : i + 1, :, :samples], v[f"alone{i}.recon"], AUDIO_ATOL)
        assert not bool(audio[i, :, samples:].any())
        alone = codec.latents(v["batch.audio"][i : i + 1, :, :samples])
        close_of_largest(latents[i : i + 1, :, :frames], alone)


@pytest.mark.parametrize("case", ["tiny_vbr", "tiny_cbr"])
def test_naive_padding_changes_codes(case: str, vectors: Callable, model: Callable, facts: Callable) -> None:
    """Without a mask ours is the published code here too: what it gives for a padded batch, and that it is wrong."""
    v, codec = vectors(case), model(case)
    naive = codec.quantizer(codec.latents(v["batch.audio"])).codes
    assert torch.equal(naive, v["batch.codes"].long())
    if "batch.n_codes" in v:
        assert torch.equal(depths(codec, v["batch.audio"]), v["batch.n_codes"].long())
    for i, recorded in enumerate(facts(case)["padded_batch"]):
        alone = v[f"alone{i}.codes"].long()
        assert int((naive[i : i + 1, :, : alone.shape[-1]] != alone).sum()) == recorded["codes_changed"]
