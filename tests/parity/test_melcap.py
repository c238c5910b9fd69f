"""MelCap gives what the published code gives: every recorded case, from the waveform to the last tap.

Recorded in float32 on another machine. Codes must be equal; the tolerances of the rest are rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published import Golden, listening, model_fixture
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from audiotok import MelCapConfig, MelCapModel
from audiotok.codecs.melcap import from_row_major, to_row_major
from audiotok.codecs.melcap.blocks_melcap import Doubling, haar_patches, haar_pictures
from audiotok.codecs.melcap.conversion_melcap import convert_config, convert_weights
from audiotok.codecs.melcap.modeling_melcap import LOG_MEL_FLOOR, PICTURE_SCALE, alike, as_columns, merge
from audiotok.errors import CodesError, OptionError

TAP_ATOL, AUDIO_ATOL = 1e-4, 2e-5
# The FFT's rounding is absolute: the quieter a mel bin, the more its logarithm moves. At the released size the recorded
# log-mels are up to 2.6e-4 from those in double precision, ours up to 3.8e-4.
FFT_ROUNDING = 3e-7

FULL = pytest.param("full/vectors", marks=pytest.mark.slow)
TINY = [
    "tiny/vectors",
    "tiny/vectors_short",
    "tiny/vectors_silence",
    "tiny_head_same/vectors",
    "tiny_frontend_same/vectors",
    "tiny_tanh/vectors",
    "tiny_stored/vectors",
]
WHOLE = [*TINY, FULL]

pytestmark = pytest.mark.usefixtures("inference")


def published_weights(files: Golden, case: str) -> dict[str, Tensor]:
    """Tensors of both stages by their bare published names."""
    if case == "tiny_stored":
        return {
            **load_file(files.path(f"{case}/stage1.safetensors")),
            **load_file(files.path(f"{case}/stage2.safetensors")),
        }
    return {key.partition(".")[2]: tensor for key, tensor in files.weights(case).items()}


@pytest.fixture
def vectors(golden: Callable) -> Callable[[str], dict[str, Tensor]]:
    return golden("melcap").vectors


def convert(files: Golden, case: str) -> tuple[MelCapConfig, dict[str, Tensor]]:
    config, undecided = convert_config(files.config(case))
    assert not undecided
    return config, convert_weights(published_weights(files, case), config)


model = model_fixture("melcap", MelCapModel, convert)


def close(found: Tensor, recorded: Tensor, atol: float | Tensor) -> None:
    assert found.shape == recorded.shape
    assert bool(((found - recorded).abs() <= atol).all()), float((found - recorded).abs().max())


def same_margins(found: Tensor, recorded: Tensor) -> None:
    """A difference of two distances over the smaller one: rounding moves it by up to a hundredth."""
    torch.testing.assert_close(found, recorded, atol=1e-5, rtol=1e-2)


# Whole clips


@pytest.mark.parametrize("name", WHOLE)
def test_encode(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    output = codec.encode(v["audio"][:, None], return_margins=True)
    assert torch.equal(output.audio_codes, v["codes"].long())
    same_margins(output.margins, v["margins"])
    assert bool(output.audio_codes_mask.all())
    assert output.audio_lengths.tolist() == [v["audio"].shape[1]]
    close(codec.front_end(v["audio"]), v["log_mel"], TAP_ATOL + FFT_ROUNDING / v["log_mel"].exp())
    latents = codec.latents(v["audio"][:, None])
    close(latents, as_columns(v["latents"]), TAP_ATOL)
    if "quantized" in v:
        close(codec.quantizer(latents).quantized, as_columns(v["quantized"]), TAP_ATOL)


@pytest.mark.parametrize("name", WHOLE)
def test_decode(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    audio = codec.decode(v["codes"])
    assert audio.shape[-1] == codec.facts.num_samples(v["codes"].shape[-1])
    recorded = v["audio_from_codes"] if "audio_from_codes" in v else v["audio_out"]
    close(audio[:, 0], recorded, AUDIO_ATOL)
    assert not torch.equal(audio[:, 0], torch.zeros_like(recorded))
    if "quantized" in v:
        mel = codec._mel(as_columns(v["quantized"]))
        close(mel.clamp(min=LOG_MEL_FLOOR), v["mel_recon"], TAP_ATOL)
        close(codec._vocode(mel), v["audio_out"], AUDIO_ATOL)


def test_the_ceiling_of_the_heads_magnitudes_is_reached(vectors: Callable, model: Callable) -> None:
    """Or the case would not show that there is one."""
    v, codec = vectors("tiny_head_same/vectors"), model("tiny_head_same")
    bins = codec.config.n_fft // 2 + 1
    assert v["head_out"][..., :bins].exp().max() > 140
    assert v["audio_out"].abs().max() > 2.5


@pytest.mark.parametrize("frames", range(73, 81))
def test_every_remainder_of_mel_frames(frames: int, vectors: Callable, model: Callable) -> None:
    v = {
        key.partition(".")[2]: t for key, t in vectors("tiny/vectors_lengths").items() if key.startswith(f"T{frames}.")
    }
    codec = model("tiny")
    output = codec.encode(v["audio"][:, None], return_margins=True)
    assert torch.equal(output.audio_codes, v["codes"].long())
    same_margins(output.margins, v["margins"])
    close(codec.decode(output.audio_codes)[:, 0], v["audio_out"], AUDIO_ATOL)
    log_mel = codec.front_end(v["audio"])
    assert log_mel.shape[-1] == frames
    if "enc_patched" in v:
        close(haar_patches(v["log_mel"][:, None] / PICTURE_SCALE), v["enc_patched"], 1e-6)
        close(log_mel, v["log_mel"], TAP_ATOL)


def test_lengths_are_the_measured_ones(golden: Callable, model: Callable) -> None:
    """Every length that the published code takes; those that it refuses give one column here."""
    codec = model("tiny")
    generator = torch.Generator().manual_seed(0)
    for row in json.loads(golden("melcap").path("tiny/lengths.json").read_text()):
        if row["samples"] == 0:
            continue
        wave = 0.1 * torch.randn(1, 1, row["samples"], generator=generator)
        codes = codec.encode(wave).audio_codes
        if "error" in row:
            assert codes.shape == (1, 3, 1)
            continue
        assert codec.front_end(wave[:, 0]).shape[-1] == row["mel_frames"]
        assert codes.shape == (1, row["rows"], row["columns"])
        assert codec.decode(codes).shape == (1, 1, row["samples_out"])


def test_silence_has_several_codes(vectors: Callable, model: Callable) -> None:
    v = vectors("tiny/vectors_silence")
    assert len(model("tiny").encode(v["audio"][:, None]).audio_codes.unique()) == 19


# Taps


def taps_of(codec: MelCapModel) -> dict[str, nn.Module]:
    encoder, decoder, vocoder = codec.encoder, codec.decoder, codec.vocoder
    taps = {f"enc_level{i}": level for i, level in enumerate(encoder.levels)}
    taps |= {f"dec_level{i}": level for i, level in enumerate(decoder.levels)}
    return taps | {
        "enc_conv_in": encoder.conv_in,
        "enc_mid": encoder.middle,
        "enc_conv_out": encoder.conv_out,
        "latents": encoder.latent_proj,
        "post_quant": decoder.latent_proj,
        "dec_mid": decoder.middle,
        "dec_conv_out": decoder.conv_out,
        "backbone_embed": vocoder.backbone.embed,
        "backbone_out": vocoder.backbone,
        "head_out": vocoder.head,
    }


def sampled(name: str, tap: Tensor) -> Tensor:
    """The part of a tap that the full-size case keeps."""
    if name == "backbone_embed":
        return tap[:, ::64]
    if name in ("backbone_out", "head_out"):
        return tap[:, ::16, ::32]
    return tap[:, :: tap.shape[1] // 4, ::4, ::4]


@pytest.mark.parametrize("name", ["tiny/vectors", "tiny_head_same/vectors", "tiny_tanh/vectors", FULL])
def test_every_tap(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    taps = taps_of(codec)
    with listening(taps) as heard:
        codec.encode(v["audio"][:, None])
        if "quantized" in v:
            heard["mel_unclamped"] = codec._mel(as_columns(v["quantized"]))
            codec._vocode(heard["mel_unclamped"])
        else:
            codec.decode(v["codes"])
    heard["enc_patched"] = haar_patches(codec.front_end(v["audio"])[:, None] / PICTURE_SCALE)
    recorded = [key for key in v if key.removeprefix("tap.") in heard]
    assert len(recorded) >= (16 if name != "tiny_tanh/vectors" else 4)
    for key in recorded:
        tap = key.removeprefix("tap.")
        close(sampled(tap, heard[tap]) if key.startswith("tap.") else heard[tap], v[key], TAP_ATOL)


def test_mel_filters_are_the_published_ones_to_the_last_bit(golden: Callable, model: Callable) -> None:
    stored = load_file(golden("melcap").path("tiny_stored/stage2.safetensors"))
    filters = torch.from_numpy(model("tiny_stored").front_end.filters)
    assert torch.equal(filters, stored["feature_extractor.mel_spec.mel_scale.fb"])


def test_no_filter_of_the_released_size_is_empty() -> None:
    from audiotok.codecs.melcap.modeling_melcap import mel_filters

    filters = mel_filters(44100, 1024, 96)
    assert filters.shape == (513, 96)
    assert (filters.max(axis=0) > 0.25).all()
    assert filters.max() <= 1


def test_haar_patches_are_turned_back() -> None:
    picture = torch.randn(2, 1, 8, 10, generator=torch.Generator().manual_seed(0))
    close(haar_pictures(haar_patches(picture)), picture, 1e-6)


def test_doubling_is_the_convolution_of_the_doubled_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Doubling(3)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    for size in ((4, 5), (1, 1), (12, 22), (256, 1)):
        assert (size[0] * size[1] >= Doubling.LARGE) == (size[0] > 4)
        picture = torch.randn(2, 3, *size, generator=generator)
        doubled = picture.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        close(layer(picture), F.conv2d(doubled, layer.weight, layer.bias, padding=1), 1e-5)


def test_attention_holds_no_matrix_of_all_places(vectors: Callable, model: Callable) -> None:
    """It would be gigabytes for a minute: only the kernel that works in blocks may be taken."""
    v, codec = vectors("tiny/vectors"), model("tiny")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        codes = codec.encode(v["audio"][:, None]).audio_codes
        assert torch.equal(codes, v["codes"].long())
        close(codec.decode(codes)[:, 0], v["audio_from_codes"], AUDIO_ATOL)


# Batches


def test_masked_batch_is_each_clip_alone(vectors: Callable, model: Callable) -> None:
    """The published code cannot do this; its codes of each clip alone are what ours must be in a batch."""
    v, codec = vectors("tiny/vectors_batch"), model("tiny")
    mask = (torch.arange(v["audio_padded"].shape[1]) < v["lengths"][:, None]).long()
    output = codec.encode(v["audio_padded"][:, None], mask, partial_frame="drop", return_margins=True)
    for i in range(2):
        alone = v[f"codes_alone_{i}"].long()
        columns = alone.shape[-1]
        assert torch.equal(output.audio_codes[i : i + 1, :, :columns], alone)
        assert output.audio_codes_mask[i].sum(dim=-1).tolist() == [columns] * 3
        assert not bool(output.audio_codes[i, :, columns:].any())
        assert bool(output.margins[i, :, columns:].isposinf().all())
        same_margins(output.margins[i : i + 1, :, :columns], v[f"margins_alone_{i}"])
        close(codec.decode(alone)[:, 0], v[f"audio_out_alone_{i}"], AUDIO_ATOL)
    held = [codec.facts.held_samples(v[f"codes_alone_{i}"].shape[-1]) for i in range(2)]
    audio = codec.decode(output.audio_codes, lengths=held)
    for i in range(2):
        close(audio[i, :, : held[i]], v[f"audio_out_alone_{i}"], AUDIO_ATOL)
        assert not bool(audio[i, :, held[i] :].any())


def test_naive_padding_changes_almost_all_codes(vectors: Callable, model: Callable) -> None:
    """Without a mask ours is the published code here too: what it gives for a padded batch, and that it is wrong."""
    v, codec = vectors("tiny/vectors_batch"), model("tiny")
    naive = codec.encode(v["audio_padded"][:, None], return_margins=True)
    assert torch.equal(naive.audio_codes, v["codes_padded"].long())
    same_margins(naive.margins, v["margins_padded"])
    short = naive.audio_codes[1, :, :12]
    assert int((short != v["codes_alone_1"][0]).sum()) == 35


def test_rows_come_back_in_their_order() -> None:
    clips = torch.arange(24.0).view(4, 6)
    lengths = [6, 2, 5, 2]
    taken = {tuple(rows): part for rows, part in alike(clips, lengths)}
    assert {rows: part.shape[-1] for rows, part in taken.items()} == {(1, 3): 2, (2,): 5, (0,): 6}
    whole = merge([(list(rows), part) for rows, part in taken.items()], fill=-1.0)
    for row, n in enumerate(lengths):
        assert torch.equal(whole[row, :n], clips[row, :n])
        assert bool((whole[row, n:] == -1).all())


# Order of codes


@pytest.mark.parametrize("name", ["tiny/vectors", "tiny_stored/vectors", "tiny/vectors_short"])
def test_row_major_order_is_upstreams(name: str, vectors: Callable) -> None:
    v = vectors(name)
    flat = to_row_major(v["codes"][0])
    assert flat.tolist() == v["codes_upstream"].tolist()
    assert from_row_major(flat, 3).tolist() == v["codes"][0].tolist()
    assert from_row_major(flat.tolist(), 3).tolist() == v["codes"][0].tolist()


@pytest.mark.parametrize(
    "codes, words",
    [
        (torch.zeros(1, 3, 4, dtype=torch.long), r"shape \(1, 3, 4\)"),
        (torch.zeros(3, 4), "float32.*integers"),
        ([[1, 2], [3]], "no array of numbers"),
        ("abc", "no array of numbers"),
    ],
)
def test_what_has_no_row_major_order(codes: object, words: str) -> None:
    with pytest.raises(CodesError, match=words):
        to_row_major(codes)


def test_what_is_no_row_major_order() -> None:
    for codes in (torch.arange(7), torch.zeros(2, 3, dtype=torch.long), np.zeros(0, np.int64)):
        with pytest.raises(CodesError, match=r"shape .*whole rows.*multiple of 3"):
            from_row_major(codes, 3)
    with pytest.raises(OptionError, match="num_rows=0"):
        from_row_major(torch.arange(6), 0)


def test_ids_run_column_by_column(vectors: Callable, model: Callable) -> None:
    from audiotok import MelCapAudioTokenizer

    codec, v = model("tiny"), vectors("tiny/vectors")
    tok = MelCapAudioTokenizer(codec)
    codes = v["codes"][0].long()
    ids = tok.codes_to_ids(codes)
    assert ids.tolist() == codes.T.flatten().tolist()
    assert torch.equal(torch.as_tensor(tok.ids_to_codes(ids)), codes)
    close(tok.decode(ids), v["audio_from_codes"], AUDIO_ATOL)
    assert tok.vocab_size == 256 + 3
