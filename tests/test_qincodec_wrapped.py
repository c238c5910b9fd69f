"""QinCodec around another codec's autoencoder: the laws hold, and the folder alone brings everything back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance.codecs_table import TABLE, clip, family, shared_codec
from conformance.toy_codecs import ToyMultirateConfig, ToyMultirateModel, ToyRvqConfig, ToyRvqModel
from qincodec_cases import AUV, auv, noise
from torch import Tensor

from audiotok import AutoAudioTokenizer, AuvModel, QinCodecAudioTokenizer, QinCodecConfig, QinCodecModel
from audiotok.codec import AudioCodec
from audiotok.errors import ConfigError, LatentsError
from audiotok.tokenizer import AudioTokenizer

QINCO2 = {"num_quantizers": 3, "codebook_size": 16, "num_blocks": 1, "embedding_dim": 6, "hidden_dim": 8}
SEARCH = {"num_candidates": 4, "beam_size": 3}


def around(codec: AudioCodec, **quantizer: Any) -> QinCodecModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = QinCodecModel.around(codec, {**QINCO2, **SEARCH, **quantizer})
    with torch.no_grad():
        vectors = model.latents(noise(1, codec.facts.channels, 100 * codec.facts.hop_length))[0].T
        model.quantizer.set_normalization(vectors.mean(dim=0), vectors.std())
    return model


@pytest.fixture(scope="module")
def inner() -> AuvModel:
    return auv()


@pytest.fixture(scope="module")
def codec(inner: AuvModel) -> QinCodecModel:
    """One for all tests: do not change it."""
    return around(inner)


def test_facts_are_those_of_the_wrapped_codec(codec: QinCodecModel, inner: AuvModel) -> None:
    facts = codec.facts
    assert facts.codebook_sizes == (16, 16, 16)
    for fact in ("sampling_rate", "hop_length", "channels", "receptive_field_samples", "decoder_reach_samples"):
        assert getattr(facts, fact) == getattr(inner.facts, fact)
    config = codec.config
    assert (config.sampling_rate, config.hop_length, config.latent_dim) == (16000, 320, 8)
    assert config.n_fft is config.hidden_size is config.num_layers is None
    assert codec.padded_length(1) == inner.padded_length(1)


@torch.inference_mode()
@pytest.mark.parametrize("normalized", [True, False])
def test_latents_are_what_the_codecs_own_codebook_is_searched_with(normalized: bool) -> None:
    inner = auv(normalize_latents=normalized)
    codec, wave = around(inner), noise(1, 1, 9 * 320)
    latents = codec.latents(wave)
    assert latents.shape == (1, 8, 9)
    assert torch.equal(latents, inner.quantizer.project_in(inner.latents(wave)))
    expected = inner.decode_latents(inner.latents(wave))
    torch.testing.assert_close(codec.decode_latents(latents), expected, atol=1e-5, rtol=0)
    louder = codec.decode_latents(3 * latents)
    assert torch.allclose(louder, expected, atol=1e-5) == normalized


def test_a_wrapped_codec_starts_as_it_does_alone() -> None:
    """Its linear layers are PyTorch's, not those of our trunks, which stay below 0.04."""
    config = QinCodecConfig(autoencoder={"model_type": "audiotok_auv", **AUV}, latent_dim=8, quantizer=QINCO2)
    layer = QinCodecModel(config).autoencoder.codec.encoder.input_proj
    assert layer.weight.abs().max() > 0.9 * layer.in_features**-0.5
    assert layer.bias.any()


def test_weights_are_shared_and_the_codec_stays_as_it_was(inner: AuvModel) -> None:
    before = {key: tensor.clone() for key, tensor in inner.state_dict().items()}
    model = QinCodecModel.around(inner, QINCO2)
    assert {key: t for key, t in inner.state_dict().items() if not torch.equal(t, before[key])} == {}
    shared = {parameter.data_ptr() for parameter in inner.parameters()}
    assert {parameter.data_ptr() for parameter in model.autoencoder.parameters()} == shared
    again = QinCodecModel.around(model, {"type": "rq", "num_quantizers": 2})
    assert {parameter.data_ptr() for parameter in again.autoencoder.parameters()} == shared
    assert again.facts.codebook_sizes == (256, 256)


@torch.inference_mode()
def test_batch_is_alone(codec: QinCodecModel) -> None:
    lengths = [1, 320, 700, 9 * 320 + 1]
    values, mask = torch.zeros(4, 1, max(lengths) + 50), torch.zeros(4, max(lengths) + 50, dtype=torch.long)
    for row, length in enumerate(lengths):
        values[row, :, :length], mask[row, :length] = noise(1, length, seed=row), 1
    together, _ = codec.encode_certified(values, mask)
    audio = codec.decode(together)
    for row, length in enumerate(lengths):
        single = codec.encode(values[row : row + 1, :, :length], torch.ones(1, length))
        frames = codec.facts.num_frames(length)
        assert single.audio_codes.shape == (1, 3, frames)
        assert torch.equal(together.audio_codes[row, :, :frames], single.audio_codes[0])
        assert not together.audio_codes_mask[row, :, frames:].any()
        alone = codec.decode(single)
        assert alone.shape == (1, 1, length)
        torch.testing.assert_close(audio[row, :, :length], alone[0], atol=1e-5, rtol=0)
        assert not audio[row, :, length:].any()


def test_long_clips_are_encoded_in_windows(codec: QinCodecModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tok, wave = QinCodecAudioTokenizer(codec), noise(300 * 320).numpy()
    whole = tok(wave, 16000, chunk_length_s=1000.0).input_ids
    monkeypatch.setattr("audiotok.encoding.DEFAULT_WINDOW_S", 0.5)
    found = tok(wave, 16000).input_ids
    assert sum(one != other for one, other in zip(found, whole, strict=True)) <= 2, "but for rounding"


CHILD = """
import json, sys
import torch
from audiotok import AutoAudioTokenizer
tok = AutoAudioTokenizer.from_pretrained(sys.argv[1])
wave = torch.randn(7000, generator=torch.Generator().manual_seed(0))
encoded = tok(wave, 16000)
audio = tok.decode(encoded.input_ids, encoded.audio_lengths)
print(json.dumps([type(tok).__name__, encoded.input_ids, float(audio.double().abs().sum()), tok.fingerprint]))
"""


def answers(tok: AudioTokenizer) -> list[Any]:
    encoded = tok(noise(7000), 16000)
    audio: Tensor = tok.decode(encoded.input_ids, encoded.audio_lengths)
    return [type(tok).__name__, encoded.input_ids, float(audio.double().abs().sum()), tok.fingerprint]


def test_a_fresh_process_loads_it_from_the_folder_alone(codec: QinCodecModel, tmp_path: Path) -> None:
    tok = QinCodecAudioTokenizer(codec, name="x")
    tok.save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["autoencoder"]["model_type"] == "audiotok_auv"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "x")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answers(tok)
    loaded = AutoAudioTokenizer.from_pretrained(tmp_path / "x").codec
    for key, tensor in codec.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_the_decoder_can_be_trained_on_quantized_latents(inner: AuvModel) -> None:
    codec = around(auv()).train()
    wave = noise(2, 1, 6 * 320)
    output = codec(wave)
    assert output.losses == {}
    assert output.audio_codes.shape == (2, 3, 6)
    F.l1_loss(output.audio_values, wave).backward()
    moved = {name.split(".")[2] for name, p in codec.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"quantizer", "decoder"}  # of AUV's quantizer what follows its codebook
    assert codec.autoencoder.codec.quantizer.in_order[0].in_proj.weight_g.grad is None


def test_a_frozen_encoder_moves_in_nothing() -> None:
    """Not even in what its batch norms remember; those of the decoder, which learns, do."""
    conformer = {"num_layers": 1, "head_dim": 16, "ffn_mult": 2, "conv_kernel_size": 5}
    inner = auv(input_features=["log_magnitude", "phase"], encoder_config=conformer, decoder_config=conformer)
    codec = around(inner).train()
    before = {key: tensor.clone() for key, tensor in inner.state_dict().items() if "running_mean" in key}
    codec(noise(2, 1, 6 * 320))
    moved = {key.split(".")[0] for key, tensor in before.items() if not torch.equal(tensor, inner.state_dict()[key])}
    assert moved == {"decoder"}
    assert codec.autoencoder.codec.encoder.training


WRAPPABLE = [name for name, config in TABLE.items() if hasattr(family(config).load("Model"), "decode_latents")]


@torch.no_grad()  # not inference mode: the shared codec must stay fit for tests that train
@pytest.mark.parametrize("name", WRAPPABLE)
def test_every_codec_that_decodes_latents_can_be_wrapped(name: str) -> None:
    inner = shared_codec(name)
    codec = around(inner)
    wave = torch.from_numpy(clip(inner.facts, 30 * inner.facts.hop_length + 5))[None]
    mask = torch.ones(1, wave.shape[-1], dtype=torch.long)
    assert codec.decode(codec.encode(wave, mask)).shape == wave.shape
    latents = codec.latents(wave, mask)
    assert latents.shape[1:] == (codec.config.latent_dim, codec.facts.num_frames(wave.shape[-1]))
    expected = inner.decode_latents(inner.latents(wave, mask), [wave.shape[-1]])
    torch.testing.assert_close(codec.decode_latents(latents, [wave.shape[-1]]), expected, atol=1e-4, rtol=0)


@torch.no_grad()  # not inference mode: the shared codec must stay fit for tests that train
@pytest.mark.parametrize("name", WRAPPABLE)
def test_latents_that_no_encoder_gives_are_refused(name: str) -> None:
    codec = shared_codec(name)
    latents = codec.latents(torch.from_numpy(clip(codec.facts, 30 * codec.facts.hop_length))[None])
    shape = rf"it must be a float tensor \[clips, {latents.shape[1]}, frames\]"
    for bad, message in (
        (latents[0], shape),
        (latents[:, 1:], shape),
        (latents.long(), f"torch.int64.*{shape}"),
        (latents.numpy(), f"ndarray: {shape}"),
        (latents[..., :0], "at least one clip of one frame"),
        (latents.masked_fill(latents == latents.max(), torch.inf), "NaN or infinity"),
    ):
        with pytest.raises(LatentsError, match=message):
            codec.decode_latents(bad)


# What cannot be wrapped


def test_codecs_that_decode_only_codes_are_refused() -> None:
    with pytest.raises(ConfigError, match="ToyRvqModel has no decode_latents"):
        QinCodecModel.around(ToyRvqModel(ToyRvqConfig()), QINCO2)


def test_codecs_of_several_rates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "audiotok.codecs.qincodec.configuration_qincodec.codec_classes",
        lambda _: (ToyMultirateConfig, ToyMultirateModel),
    )
    with pytest.raises(ConfigError, match="several rates"):
        QinCodecConfig(autoencoder={"model_type": "toy_multirate"})


def test_what_the_wrapped_codec_decides_cannot_be_given() -> None:
    inner = {"model_type": "audiotok_auv", **AUV}
    for values in ({"sampling_rate": 8000}, {"hop_length": 100}, {"n_fft": 64}, {"num_layers": 2}):
        with pytest.raises(ConfigError, match=rf"{next(iter(values))}=.*audiotok_auv, which decides it"):
            QinCodecConfig(autoencoder=inner, latent_dim=8, **values)
    assert QinCodecConfig(autoencoder=inner, latent_dim=8, sampling_rate=16000, hop_length=320).sampling_rate == 16000
    with pytest.raises(ConfigError, match="codebook_sise"):
        QinCodecConfig(autoencoder={**inner, "codebook_sise": 3}, latent_dim=8)
