"""APCodec gives what the published code gives: every recorded case, from the waveform to the last tap.

Recorded in float32 on another machine. Codes must be equal; the tolerances of the rest are rounding.

Two things of that machine's FFT no other one repeats. Clips that start with signal (`reflect`) have a symmetric first
frame, whose phases are +pi or -pi by rounding: their codes are compared from the recorded features, and from the
waveform where this machine rounds as that one did. And silence has a phase of pi where the FFT gives it a real part of
-0, which there happened in one bin of the tiny cases, see `with_negative_zeros`. With that machine's FFT all codes are
equal from the waveform: `test_codes_on_the_recording_machines_fft`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published import Golden, close, listening, model_fixture
from torch import Tensor, nn

from audiotok import ApCodecConfig, ApCodecModel
from audiotok.codecs.apcodec.conversion_apcodec import convert_config, convert_weights

LATENT_ATOL, QUANTIZED_ATOL, AUDIO_ATOL, PHASE_ATOL = 2e-5, 1e-5, 2e-5, 1e-3
# Of a transform, absolute: the quieter a bin, the more its logarithm and its phase move.
FFT_ROUNDING = 1e-6
# What another batch shape may move on one machine.
ROUNDING_ATOL = 1e-5

TINY = [
    f"{case}/vectors{kind}"
    for case in ("tiny_v2", "tiny_v1")
    for kind in ("", "_odd", "_short", "_silence", "_reflect")
]
FULL_CASES = ("full_v2_48k", "full_v1_16k")
FULL = [pytest.param(f"{case}/vectors{kind}", marks=pytest.mark.slow) for case in FULL_CASES for kind in ("", "_odd")]
RECORDED_FEATURES = [*TINY, *(pytest.param(f"{case}/vectors", marks=pytest.mark.slow) for case in FULL_CASES)]
REFLECTED = ("tiny_v2/vectors_reflect", "tiny_v1/vectors_reflect")
BATCHES = ["tiny_v2", "tiny_v1", *(pytest.param(case, marks=pytest.mark.slow) for case in FULL_CASES)]

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def vectors(golden: Callable) -> Callable[[str], dict[str, Tensor]]:
    return golden("apcodec").vectors


def convert(files: Golden, case: str) -> tuple[ApCodecConfig, dict[str, Tensor]]:
    weights = files.weights(case)
    config = convert_config(files.config(case), weights)
    return config, convert_weights(weights, config)


model = model_fixture("apcodec", ApCodecModel, convert)


def modulo(angle: Tensor, period: float) -> Tensor:
    """How far an angle is from the nearest multiple of a period."""
    return (angle - period * (angle / period).round()).abs()


def with_negative_zeros(codec: ApCodecModel, wave: Tensor, phase: Tensor) -> Tensor:
    """Phases of one clip as the recording machine has them where it is silent.

    A window of zeros makes -0 of each negative sample beside it. Its transform of 64 points gave bin 17 a real part of
    -0 where the first of them was one; that of 1024 points never did.
    """
    if codec.config.n_fft != 64:
        return phase
    front_end = codec.encoder.front_end
    frames = front_end.padded(wave, phase.shape[-1]).unfold(1, front_end.n_fft, front_end.hop)
    window = torch.zeros(64)
    start = (64 - front_end.win_length) // 2
    window[start : start + front_end.win_length] = torch.hann_window(front_end.win_length)
    negative = ~(frames * window).any(dim=-1) & (frames[..., 0] < 0)
    phase = phase.clone()
    phase[:, 17] = phase[:, 17].masked_fill(negative, math.pi)
    return phase


def same_margins(found: Tensor, recorded: Tensor) -> None:
    """A difference of two distances over the smaller one, which may be near 0: rounding moves it."""
    torch.testing.assert_close(found, recorded, atol=1e-4, rtol=2e-2)


# The front end


@pytest.mark.parametrize("kind", ["published", "settled"])
@pytest.mark.parametrize("name", RECORDED_FEATURES)
def test_features(name: str, kind: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    wave = v["audio"]
    log_amplitude, phase = codec.encoder.front_end(wave, [wave.shape[1]], [kind])
    assert log_amplitude.dtype == phase.dtype == torch.float32
    of_bins = 1e-5 + FFT_ROUNDING / v["logamp"].exp()
    assert bool(((log_amplitude - v["logamp"]).abs() <= of_bins).all())
    error = modulo(with_negative_zeros(codec, wave, phase) - v["pha"], 2 * math.pi)
    assert bool((error <= of_bins).all())


def test_silence_is_the_floor_and_phase_zero(vectors: Callable, model: Callable) -> None:
    for case in ("tiny_v2", "tiny_v1"):
        v = vectors(f"{case}/vectors_silence")
        for kind in ("published", "settled"):
            log_amplitude, phase = model(case).encoder.front_end(v["audio"], [v["audio"].shape[1]], [kind])
            close(log_amplitude, v["logamp"], 1e-6)
            assert torch.equal(phase, v["pha"])
            assert kind == "published" or not bool(phase.signbit().any())


# Encoding


@pytest.mark.parametrize("name", RECORDED_FEATURES)
def test_codes_of_the_recorded_features(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    latents = codec.encoder.encode(v["logamp"], v["pha"], [v["pha"].shape[-1]]).latents
    close(latents, v["encoder.latent"], LATENT_ATOL)
    result = codec.quantizer(latents, return_margins=True)
    assert torch.equal(result.codes, v["codes"].long())
    same_margins(result.margins, v["margins"])
    close(result.quantized, v["quantized"], QUANTIZED_ATOL)
    if "quantizer.commitment_loss" in v:
        torch.testing.assert_close(result.commitment[None], v["quantizer.commitment_loss"], rtol=1e-4, atol=0)
        torch.testing.assert_close(result.codebook[None], v["quantizer.codebook_loss"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [*TINY, *FULL])
def test_encode(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    wave = v["audio"]
    log_amplitude, phase = codec.encoder.front_end(wave, [wave.shape[1]], ["published"])
    if name in REFLECTED and bool(((phase - v["pha"]).abs() > 1).any()):
        pytest.skip("another FFT than the recording machine's: see test_codes_of_the_recorded_features")
    output = codec.encode(wave[:, None])
    assert bool(output.audio_codes_mask.all())
    assert output.audio_lengths.tolist() == [wave.shape[1]]
    recorded = v["codes"].long()
    if not torch.equal(other := with_negative_zeros(codec, wave, phase), phase):
        assert torch.equal(codes_of(codec, log_amplitude, other), recorded)
    else:
        assert torch.equal(output.audio_codes, recorded)


def codes_of(codec: ApCodecModel, log_amplitude: Tensor, phase: Tensor) -> Tensor:
    return codec.quantizer(codec.encoder.encode(log_amplitude, phase, [phase.shape[-1]]).latents).codes


@pytest.mark.parametrize("name", [*(name for name in TINY if name not in REFLECTED), *FULL])
def test_settled_phases_give_the_published_codes(name: str, vectors: Callable, model: Callable) -> None:
    """Wherever those do not hang on rounding."""
    v, codec = vectors(name), model(name.split("/")[0])
    wave = v["audio"][:, None]
    published = codec.encode(wave).audio_codes
    assert torch.equal(codec.encode(wave, phase="settled").audio_codes, published)
    assert torch.equal(codec.encode(wave, torch.ones_like(v["audio"]), partial_frame="drop").audio_codes, published)


OTHER_FFT = """
import sys, torch
from audiotok.auto import FAMILIES, load_published
from pathlib import Path
from safetensors.torch import load_file

for name in sys.argv[1:]:
    file = Path(name)
    codec = load_published(FAMILIES["apcodec"], [file.parent / "weights.safetensors"], file.parent / "config.json")
    v = load_file(file)
    clips = {"audio": "codes"} if "audio" in v else {f"audio_{i}": f"alone.codes_{i}" for i in range(3)}
    print(sum(int((codec.encode(v[wave][:, None]).audio_codes != v[codes]).sum()) for wave, codes in clips.items()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the recorded vectors come from MKL's FFT")
def test_codes_on_the_recording_machines_fft(shared: Path) -> None:
    """MKL without AVX rounds as the recording machine did: every code is equal from the waveform, reflected or not.

    But for a clip of a frame of silence and little else, whose zeros that FFT leaves negative (`with_negative_zeros`).
    """
    names = [name for name in TINY if name != "tiny_v1/vectors_short"]
    files = [shared / "golden" / "apcodec" / f"{name}.safetensors" for name in names]
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_FFT, *map(str, files)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"] * len(files)


def test_clips_that_the_published_code_refuses(model: Callable) -> None:
    """Too short to be reflected: they go on with silence, and keep their own number of frames."""
    codec = model("tiny_v2")
    half = codec.config.n_fft // 2
    wave = 0.1 * torch.randn(1, 1, half, generator=torch.Generator().manual_seed(0))
    for samples in (1, 7, 8, half - 1, half):
        codes = codec.encode(wave[..., :samples]).audio_codes
        frames = samples // 8 + 1
        assert codes.shape == (1, 3, -(-frames // 4))
        padded = torch.nn.functional.pad(wave[..., :samples], (0, half + 1 - samples))
        longer = codec.encoder.front_end(padded[:, 0], [half + 1], ["published"])
        shorter = codec.encoder.front_end(wave[:, 0, :samples], [samples], ["published"])
        for one, other in zip(shorter, longer, strict=True):
            assert torch.equal(one, other[..., :frames])


# Levels


@pytest.mark.parametrize("case", ["tiny_v2", "tiny_v1"])
def test_leading_codebooks(case: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(f"{case}/vectors_levels"), model(case)
    wave, every = v["audio"][:, None], codec.encode(v["audio"][:, None], return_margins=True)
    latents = codec.latents(wave)
    for depth in range(1, codec.config.num_codebooks):
        output = codec.encode(wave, num_quantizers=depth, return_margins=True)
        assert torch.equal(output.audio_codes, v[f"n{depth}.codes"].long())
        assert torch.equal(output.audio_codes, every.audio_codes[:, :depth])
        assert output.audio_codes_mask.shape == output.audio_codes.shape
        same_margins(output.margins, v[f"n{depth}.margins"])
        result = codec.quantizer(latents, num_stages=depth)
        close(result.quantized, v[f"n{depth}.quantized"], QUANTIZED_ATOL)
        losses = torch.stack([result.commitment, result.codebook])
        torch.testing.assert_close(losses, v[f"n{depth}.losses"], rtol=1e-4, atol=0)
        close(codec.decode(output), v[f"n{depth}.audio_out"], AUDIO_ATOL)
    if "from_codes.quantized" in v:
        close(codec.quantizer.decode(every.audio_codes), v["from_codes.quantized"], QUANTIZED_ATOL)


# Decoding


@pytest.mark.parametrize("name", [*TINY, *FULL])
def test_decode(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    audio = codec.decode(v["codes"])
    assert audio.shape[-1] == codec.facts.num_samples(v["codes"].shape[-1]) == v["audio_out"].shape[-1]
    close(audio, v["audio_out"], AUDIO_ATOL)


# Taps


def taps(codec: ApCodecModel) -> dict[str, nn.Module]:
    """Published names of layers → ours."""
    found: dict[str, nn.Module] = {
        "encoder.AMP_downsample": codec.encoder.amplitude.downsample,
        "encoder.PHA_downsample": codec.encoder.phase.downsample,
        "decoder.latent_input": codec.decoder.latent_conv,
        "decoder.AMP_upsample": codec.decoder.amplitude.upsample,
        "decoder.PHA_upsample": codec.decoder.phase.upsample,
    }
    for half in ("encoder", "decoder"):
        for theirs, ours in (("logamp", "amplitude"), ("pha", "phase")):
            branch = getattr(getattr(codec, half), ours)
            trunk, first = branch.trunk, branch.trunk.stack.layers[0]
            found |= {f"{half}.convnext_{theirs}.{i}": layer for i, layer in enumerate(trunk.stack.layers)}
            found |= {
                f"{half}.embed_{theirs}": trunk.embed,
                f"{half}.norm_{theirs}": trunk.norm,
                f"{half}.final_norm_{theirs}": trunk.stack.layer_norm,
                f"{half}.out_{theirs}": branch.out_proj,
                f"{half}.convnext_{theirs}.0.dwconv": first.depthwise_conv,
            }
            if first.response_norm is not None:
                found[f"{half}.convnext_{theirs}.0.grn"] = first.response_norm
    return found


@pytest.mark.parametrize("name", RECORDED_FEATURES)
def test_every_tap(name: str, vectors: Callable, model: Callable) -> None:
    v, codec = vectors(name), model(name.split("/")[0])
    with listening(taps(codec)) as heard:
        codec.encoder.encode(v["logamp"], v["pha"], [v["pha"].shape[-1]])
        decoded = codec.decoder(v["quantized"], [v["quantized"].shape[-1]])
    spectrum = decoded.spectrum
    heard |= {"decoder.logamp": decoded.log_amplitude, "decoder.R": decoded.real, "decoder.I": decoded.imaginary}
    heard |= {"decoder.rea": spectrum.real, "decoder.imag": spectrum.imag, "decoder.pha": decoded.phase}
    heard |= {f"{tap}.every4": value[..., ::4] for tap, value in heard.items() if tap.startswith("decoder.")}
    heard["encoder.latent"] = codec.encoder.encode(v["logamp"], v["pha"], [v["pha"].shape[-1]]).latents
    recorded = [tap for tap in v if tap.startswith(("encoder.", "decoder.")) and not tap.endswith(".gelu")]
    assert set(recorded) <= set(heard)
    for tap in recorded:
        found = heard[tap] if heard[tap].shape == v[tap].shape else heard[tap].transpose(1, 2)
        if tap.startswith("decoder.pha"):
            assert float(modulo(found - v[tap], 2 * math.pi).max()) < PHASE_ATOL
        else:
            close(found, v[tap], LATENT_ATOL * max(1.0, float(v[tap].abs().max())))


# Batches


def batch_of(v: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """Padded waveforms `[3, 1, N]`, their mask, frames of each."""
    waves = [v[f"audio_{i}"][0] for i in range(3)]
    assert [len(wave) for wave in waves] == v["lengths"].tolist()
    padded = nn.utils.rnn.pad_sequence(waves, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < v["lengths"][:, None]).long()
    return padded[:, None], mask, v["latent_lengths"].tolist()


@pytest.mark.parametrize("case", BATCHES)
def test_masked_batch_is_each_clip_alone(case: str, vectors: Callable, model: Callable) -> None:
    """The published code cannot do this; its codes of each clip alone are what ours must be in a batch."""
    v, codec = vectors(f"{case}/vectors_batch"), model(case)
    values, mask, frames = batch_of(v)
    lengths = v["lengths"].tolist()
    output = codec.encode(values, mask, partial_frame="drop")
    latents = codec.encoder(values[:, 0], lengths, ["settled"] * 3).latents
    held = [codec.facts.held_samples(count) for count in frames]
    audio = codec.decode(output.audio_codes, lengths=held)
    decoded = codec.decode(v["masked.codes"], lengths=held)
    for i, count in enumerate(frames):
        alone = output.audio_codes[i : i + 1, :, :count]
        recorded = v[f"alone.codes_{i}"].long()
        assert torch.equal(recorded[0], v["masked.codes"][i, :, :count].long())
        wave = v[f"audio_{i}"]
        assert torch.equal(alone, codec.encode(wave[:, None]).audio_codes)
        log_amplitude, phase = codec.encoder.front_end(wave, lengths[i : i + 1], ["published"])
        assert torch.equal(codes_of(codec, log_amplitude, with_negative_zeros(codec, wave, phase)), recorded)
        assert not bool(output.audio_codes[i, :, count:].any())
        assert output.audio_codes_mask[i].sum(dim=-1).tolist() == [count] * alone.shape[1]
        single = codec.encoder(values[i : i + 1, 0, : lengths[i]], lengths[i : i + 1], ["settled"]).latents
        close(latents[i : i + 1, :, :count], single, ROUNDING_ATOL)
        close(audio[i : i + 1, :, : held[i]], codec.decode(alone), ROUNDING_ATOL)
        close(decoded[i : i + 1, :, : held[i]], v[f"alone.audio_out_{i}"], AUDIO_ATOL)
        assert not bool(audio[i, :, held[i] :].any())


@pytest.mark.parametrize("case", BATCHES)
def test_naive_padding_changes_codes(case: str, vectors: Callable, model: Callable) -> None:
    """Without a mask ours is the published code here too, and wrong for what it has padded."""
    v, codec = vectors(f"{case}/vectors_batch"), model(case)
    values, _, frames = batch_of(v)
    naive = codec.encode(values).audio_codes
    assert torch.equal(naive[0], v["naive.codes"][0].long())
    for i, count in enumerate(frames[1:], start=1):
        assert not torch.equal(naive[i : i + 1, :, :count], v[f"alone.codes_{i}"].long())


@pytest.mark.parametrize("case", ["tiny_v2", "tiny_v1"])
def test_two_ways_to_take_the_phase_in_one_batch(case: str, vectors: Callable, model: Callable) -> None:
    codec, wave = model(case), vectors(f"{case}/vectors_reflect")["audio"][:, None]
    kinds = ["settled", "published", "settled"]
    codes = codec.encode(wave.expand(3, -1, -1), phase=kinds).audio_codes
    for row, kind in zip(codes, kinds, strict=True):
        assert torch.equal(row[None], codec.encode(wave, phase=kind).audio_codes)
