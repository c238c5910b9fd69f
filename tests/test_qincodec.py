"""QinCodec: sizes, lengths and spectra of our design; any number of codes; what freezes and what learns.

There are no vectors of the published autoencoder (none is public); the quantizer has tests of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from qincodec_cases import HOP, RQ, TINY, make, noise
from safetensors.torch import load_file
from torch import Tensor

from audiotok import AutoAudioTokenizer, QinCodecAudioTokenizer, QinCodecConfig, QinCodecModel
from audiotok.codecs.qincodec.autoencoders_qincodec import VocosAutoencoder, compressed_spectrum
from audiotok.errors import CheckpointError, CodesError, ConfigError, EmptyAudioError, OptionError
from audiotok.nn.stft import istft


@pytest.fixture(scope="module")
def codec() -> QinCodecModel:
    """One for all tests: do not change it."""
    return make()


# The 44.1 kHz design


@pytest.fixture(scope="module")
def full() -> QinCodecModel:
    with torch.device("meta"):
        return QinCodecModel(QinCodecConfig())


def test_sizes_of_the_design(full: QinCodecModel) -> None:
    def size(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert isinstance(full.autoencoder, VocosAutoencoder)
    assert size(full.autoencoder.encoder) == 20_026_944
    assert size(full.autoencoder.decoder) == 13_927_938
    assert len(list(full.autoencoder.parameters())) == len(full.autoencoder.state_dict()) == 160
    state = full.quantizer.state_dict()
    assert size(full.quantizer) == 4_729_728
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (281, 4_732_865)


@pytest.mark.parametrize("samples, frames", [(1, 1), (511, 1), (512, 1), (513, 2), (44100, 87), (100_000, 196)])
def test_lengths_of_the_design(full: QinCodecModel, samples: int, frames: int) -> None:
    assert full.facts.num_frames(samples) == frames
    assert full.autoencoder.num_frames([samples]) == [frames]


@pytest.mark.parametrize("kilobits, codes, true_kilobits", [
    (3, 4, 2.76), (5, 7, 4.82), (8, 11, 7.58), (12, 17, 11.71), (16, 23, 15.85), (17, 24, 16.54),
])  # fmt: skip
def test_nominal_rates(kilobits: float, codes: int, true_kilobits: float) -> None:
    rates = [QinCodecConfig(num_quantizers=m).facts.bits_per_second() / 1000 for m in range(1, 25)]
    assert sum(rate <= kilobits for rate in rates) == codes
    assert rates[codes - 1] == pytest.approx(codes * 8 * 86.1328 / 1000, rel=1e-6)
    assert rates[codes - 1] == pytest.approx(true_kilobits, abs=0.005)


def test_how_far_it_sees() -> None:
    """27 frames (a kernel of 7 before 8 of them), and what a window reaches beyond its frame."""
    facts = QinCodecConfig().facts
    assert facts.receptive_field_samples == facts.decoder_reach_samples == 27 * 512 + 768


def test_how_a_fresh_codec_starts() -> None:
    """Blocks add an eighth; weights are normal, of 0.02, cut at two of them; QINCo2 as published."""
    codec = QinCodecModel(QinCodecConfig(**{**TINY, "num_layers": 8}))
    for trunk in (codec.autoencoder.encoder, codec.autoencoder.decoder):
        layer = trunk.backbone.stack.layers[3]
        assert torch.equal(layer.scale, torch.full((24,), 1 / 8))
        for weights in (trunk.backbone.embed, layer.depthwise_conv, layer.up_proj, layer.down_proj, trunk.out):
            assert 0.03 < weights.weight.abs().max() <= 0.04
            assert float(weights.weight.detach().std()) == pytest.approx(0.0176, rel=0.15)
            assert not weights.bias.any()
    step = codec.quantizer.implicit_steps[2]
    assert not step.concat.mlp.weight.any() and not step.blocks[0].down_proj.weight.any()
    assert step.in_proj.weight.any()


# Spectra


@pytest.mark.parametrize("samples", [1, 511, 512, 513, 44100])
def test_the_spectrum_and_back_is_the_clip(samples: int) -> None:
    wave = noise(1, samples)
    frames = max(1, -(-samples // 512))
    spectrum = compressed_spectrum(wave, frames, 2048, 512, exponent=1.0)
    back = istft(spectrum.transpose(1, 2), 512)
    assert back.shape == (1, 512 * frames)
    torch.testing.assert_close(back[:, :samples], wave, atol=3e-6, rtol=0)
    assert back[:, samples:].abs().max() < 3e-6 if 512 * frames > samples else True


def test_magnitudes_are_compressed_and_phases_kept() -> None:
    wave = noise(1, 4000)
    plain, compressed = (compressed_spectrum(wave, 8, 2048, 512, exponent) for exponent in (1.0, 0.3))
    torch.testing.assert_close(compressed.abs(), plain.abs().pow(0.3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compressed / compressed.abs(), plain / plain.abs(), rtol=1e-4, atol=1e-4)
    assert not compressed_spectrum(torch.zeros(1, 4000), 8, 2048, 512, 0.3).any()


def test_no_full_scale_waveform_is_cut_by_the_head() -> None:
    """The loudest bin of any waveform within full scale is the sum of the window, n_fft / 2."""
    time = torch.arange(44100) / 44100
    sine = 0.9 * torch.sin(2 * torch.pi * 440 * time)[None]
    level = compressed_spectrum(sine, 87, 2048, 512, exponent=1.0).abs().max()
    assert 400 < level < 1024
    constant = compressed_spectrum(torch.ones(1, 44100), 87, 2048, 512, exponent=1.0).abs().max()
    assert constant == pytest.approx(1024, rel=1e-5)


def test_loud_outputs_of_the_head_have_finite_gradients() -> None:
    """exp overflows from 88.7 on: cut behind it, the gradient would be NaN."""
    codec, latents = make(), noise(1, 8, 5).requires_grad_()
    with torch.no_grad():
        codec.autoencoder.decoder.out.bias += 100
    audio = codec.autoencoder.decode(latents, [5]).audio
    audio.square().mean().backward()
    assert audio.isfinite().all()
    assert latents.grad.isfinite().all()


@torch.inference_mode()
def test_samples_behind_a_clip_are_silent_and_its_own_are_those_alone(codec: QinCodecModel) -> None:
    latents = noise(2, 8, 9)
    audio = codec.autoencoder.decode(latents, [9, 4]).audio
    assert not audio[1, :, 4 * HOP :].any()
    alone = codec.autoencoder.decode(latents[1:, :, :4], [4]).audio
    torch.testing.assert_close(audio[1:, :, : 4 * HOP], alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_silence(codec: QinCodecModel) -> None:
    """Constant latents and one tuple of codes, but for what the convolutions see beyond both ends."""
    latents = codec.latents(torch.zeros(1, 1, 60 * HOP))
    codes = codec.encode(torch.zeros(1, 1, 60 * HOP)).audio_codes
    edge = 2 * 3  # two depthwise convolutions; the embedding sees zeros there as everywhere
    middle = latents[..., edge:-edge]
    torch.testing.assert_close(middle, middle[..., :1].expand_as(middle), atol=1e-5, rtol=0)
    assert not torch.allclose(latents[..., 0], latents[..., 30], atol=1e-3)
    assert (codes[..., edge:-edge] == codes[..., 30:31]).all()
    assert codec.decode(codes).isfinite().all()


def test_no_samples_are_refused(codec: QinCodecModel) -> None:
    with pytest.raises(EmptyAudioError):
        codec.encode(torch.zeros(1, 1, 0))


# Numbers of codes


@torch.inference_mode()
@pytest.mark.parametrize("count", range(1, 7))
def test_any_number_of_codes_there_and_back(codec: QinCodecModel, count: int) -> None:
    wave = noise(1, 1, 20 * HOP - 5)
    output = codec.encode(wave, torch.ones(1, wave.shape[-1]), num_quantizers=count)
    assert output.audio_codes.shape == output.audio_codes_mask.shape == (1, count, 20)
    assert codec.decode(output).shape == wave.shape
    facts = codec.with_num_quantizers(count).facts
    assert facts.codebook_sizes == (32,) * count
    assert facts.bits_per_second() == count * 5 * 250


@torch.inference_mode()
def test_fewer_codes_are_searched_for_not_cut_off(codec: QinCodecModel) -> None:
    """A search that ends after m steps comes nearer than the first m codes of a longer one."""
    wave = noise(1, 1, 400 * HOP)
    latents, whole = codec.latents(wave), codec.encode(wave).audio_codes
    for count in (1, 3, 5):
        searched = codec.encode(wave, num_quantizers=count).audio_codes
        assert not torch.equal(searched, whole[:, :count])
        errors = [
            (codec.quantizer.decode(codes[0].T) - latents[0].T).square().mean()
            for codes in (searched, whole[:, :count])
        ]
        assert errors[0] < errors[1]
        assert codec.decode(whole[:, :count]).shape == wave.shape
    greedy = codec.encode(wave, beam_size=1).audio_codes
    assert torch.equal(codec.encode(wave, beam_size=1, num_quantizers=3).audio_codes, greedy[:, :3])


def test_a_codec_with_fewer_codes_shares_its_weights(codec: QinCodecModel) -> None:
    fewer = codec.with_num_quantizers(2)
    assert (codec.facts.num_codebooks, fewer.facts.num_codebooks) == (6, 2)
    assert next(fewer.parameters()) is next(codec.parameters())
    assert [len(book) for book in fewer.codebook_embeddings()] == [32, 32]
    with pytest.raises(ConfigError, match=r"num_quantizers=7 .*1 to 6"):
        codec.with_num_quantizers(7)
    with pytest.raises(CodesError, match="1 to 2 codebooks"):
        fewer.decode(torch.zeros(1, 3, 4, dtype=torch.long))


def test_a_tokenizer_with_fewer_codes(codec: QinCodecModel, tmp_path: Path) -> None:
    """Vocabulary, layouts and the saved folder follow; the codec that it was made of stays as it was."""
    wave = noise(50 * HOP).numpy()
    whole = QinCodecAudioTokenizer(codec)
    tok = QinCodecAudioTokenizer(codec, options={"num_quantizers": 2, "beam_size": 3})
    assert (tok.vocab_size, whole.vocab_size) == (2 * 32 + 3, 6 * 32 + 3)
    ids = tok(wave, 8000).input_ids
    assert len(ids) == 100
    assert len(whole(wave, 8000).input_ids) == 300
    assert tok.fingerprint != whole.fingerprint
    tok.save_pretrained(tmp_path / "x")
    for loaded in (
        AutoAudioTokenizer.from_pretrained(tmp_path / "x"),
        QinCodecAudioTokenizer(tok.codec, None, None, tok.options),
    ):
        assert loaded(wave, 8000).input_ids == ids
        assert loaded.fingerprint == tok.fingerprint
    whole.save_pretrained(tmp_path / "whole")
    again = AutoAudioTokenizer.from_pretrained(tmp_path / "whole", num_quantizers=2, beam_size=3)
    assert again(wave, 8000).input_ids == ids
    with pytest.raises(OptionError, match="num_quantizers"):
        whole(wave, 8000, num_quantizers=2)  # the layout has room for six


# The quantizer


def test_swapping_the_quantizer_leaves_the_autoencoder(codec: QinCodecModel) -> None:
    other = QinCodecModel.around(codec, RQ)
    mine, theirs = codec.autoencoder.state_dict(), other.autoencoder.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert set(other.quantizer.state_dict()) == {
        "data_mean",
        "data_std",
        *(f"steps.{m}.codebook.weight" for m in range(6)),
    }
    assert other.encode_options == ("beam_size",)
    with torch.inference_mode():
        wave = noise(1, 1, 9 * HOP)
        assert torch.equal(other.latents(wave), codec.latents(wave))


def test_a_quantizer_that_was_never_fitted_refuses() -> None:
    codec = QinCodecModel(QinCodecConfig(**TINY)).eval()
    for use in (lambda: codec.encode(noise(1, 1, HOP)), lambda: codec.decode(torch.zeros(1, 6, 1, dtype=torch.long))):
        with pytest.raises(CheckpointError, match="never fitted"):
            use()
    assert codec.latents(noise(1, 1, HOP)).shape == (1, 8, 1)


@torch.inference_mode()
def test_the_quantizer_stays_in_float32_under_autocast(codec: QinCodecModel) -> None:
    latents = codec.latents(noise(1, 1, 200 * HOP))[0].T
    codes = codec.quantizer.encode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.quantizer.encode(latents), codes)
        assert torch.equal(codec.quantizer.decode(codes), codec.quantizer.decode(codes))
        assert codec.quantizer.decode(codes).dtype == torch.float32


def test_the_scale_is_saved_without_dimensions(codec: QinCodecModel, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["quantizer.data_std"].shape == ()
    assert saved["quantizer.data_mean"].shape == (8,)


@torch.inference_mode()
def test_a_batch_on_a_cpu_is_alone_to_the_bit(codec: QinCodecModel) -> None:
    """Margins too, so that certified codes need no clip twice; each clip with its own search."""
    lengths, beams = [1, HOP, 90 * HOP + 3, 17 * HOP - 1], [1, 4, 2, 8]
    values, mask = torch.zeros(4, 1, 91 * HOP), torch.zeros(4, 91 * HOP, dtype=torch.long)
    for row, length in enumerate(lengths):
        values[row, :, :length], mask[row, :length] = noise(1, length, seed=row), 1
    together = codec.encode(values, mask, beam_size=beams, return_margins=True)
    for row, (length, beam) in enumerate(zip(lengths, beams, strict=True)):
        alone = codec.encode(
            values[row : row + 1, :, :length], torch.ones(1, length), beam_size=beam, return_margins=True
        )
        frames = alone.audio_codes.shape[-1]
        assert torch.equal(together.audio_codes[row, :, :frames], alone.audio_codes[0])
        assert torch.equal(together.margins[row, :, :frames], alone.margins[0])
        assert together.margins[row, :, frames:].isinf().all()
        assert not together.audio_codes[row, :, frames:].any()
    _, certificate = codec.encode_certified(values, mask, beam_size=beams)
    assert (certificate.bound, certificate.num_reencoded) == (0.0, 0)


def test_options_of_the_search(codec: QinCodecModel) -> None:
    wave = noise(2, 1, 9 * HOP)
    for options in (
        {"beam_size": 0},
        {"beam_size": 33},
        {"num_candidates": 2.0},
        {"num_candidates": -1},
        {"beam_size": True},
        {"beam_size": [1]},
    ):
        name, least = next(iter(options)), int("beam_size" in options)
        with pytest.raises(OptionError, match=rf"{name}=.*from {least} to 32"):
            codec.encode(wave, **options)
    without = {**TINY["quantizer"], "num_candidates": None}
    for other in (QinCodecModel.around(codec, RQ), QinCodecModel.around(codec, without)):
        with pytest.raises(OptionError, match=r'no option "num_candidates".*beam_size'):
            other.encode(wave, num_candidates=3)


@torch.inference_mode()
def test_no_candidates_are_all_of_them(codec: QinCodecModel) -> None:
    """As in the quantizer itself; the config's own number is another search."""
    wave = noise(1, 1, 400 * HOP)
    all_tried, default = codec.encode(wave, num_candidates=0).audio_codes, codec.encode(wave).audio_codes
    assert torch.equal(all_tried, codec.encode(wave, num_candidates=32).audio_codes)
    assert not torch.equal(all_tried, default)
    assert torch.equal(codec.encode(wave, num_candidates=8).audio_codes, default)


# Training


def gradients(codec: QinCodecModel) -> dict[str, bool]:
    """Part → whether any of its parameters has a gradient."""
    found = {"encoder": False, "decoder": False, "quantizer": False}
    for name, parameter in codec.named_parameters():
        part = next(part for part in found if part in name.split("."))
        found[part] |= parameter.grad is not None and bool(parameter.grad.any())
    return found


@pytest.mark.parametrize(
    "loss, stage, moved",
    [
        ("spectrum", 1, {"encoder", "decoder"}),
        ("latent_penalty", 1, {"encoder"}),
        ("spectrum", 3, {"decoder"}),
    ],
)
def test_each_loss_moves_its_own_side(loss: str, stage: int, moved: set[str]) -> None:
    codec = make().train()
    output = codec(noise(2, 1, 20 * HOP), latent_noise=torch.zeros(2) if stage == 1 else None)
    assert (output.audio_codes is None) == (stage == 1)
    output.losses[loss].backward()
    assert {part for part, has in gradients(codec).items() if has} == moved


def test_the_sum_of_losses() -> None:
    codec = make(latent_penalty=0.5)
    output = codec(noise(2, 1, 20 * HOP), latent_noise=torch.zeros(2))
    assert set(output.losses) == set(codec.loss_names)
    expected = output.losses["spectrum"] + 0.5 * output.losses["latent_penalty"]
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.losses["latent_penalty"], output.latents.square().mean())
    assert set(codec(noise(2, 1, 20 * HOP)).losses) == {"spectrum"}


def test_latent_noise_is_a_share_of_the_spread(codec: QinCodecModel) -> None:
    wave = noise(2, 1, 500 * HOP)
    seen: list[Tensor] = []
    hook = codec.autoencoder.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        latents = codec(wave, latent_noise=torch.tensor([0.0, 0.05])).latents
    hook.remove()
    added = seen[0] - latents
    assert not added[0].any()
    assert added[1].std() == pytest.approx(0.05 * float(latents.std()), rel=0.05)


def test_stage_3_decodes_prefixes_of_one_encoding(codec: QinCodecModel) -> None:
    wave = noise(2, 1, 20 * HOP)
    output = codec(wave, num_quantizers=[2, 5])
    codes = codec.encode(wave).audio_codes
    assert torch.equal(output.audio_codes, codes)
    for row, depth in enumerate((2, 5)):
        expected = codec.decode(codes[row : row + 1, :depth])
        torch.testing.assert_close(output.audio_values[row : row + 1], expected, atol=1e-5, rtol=0)
    for illegal in (0, 7, [1, 2, 3]):
        with pytest.raises(CodesError, match="1 to 6"):
            codec(wave, num_quantizers=illegal)


def test_depths_are_drawn_in_training_only() -> None:
    depths = [1, 3, 6]
    codec, wave = make(decoder_depths=depths), noise(1, 1, 4 * HOP).expand(200, -1, -1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        drawn = codec.train()(wave)
        whole = codec.eval()(wave)
        # Of the very codes that this batch got: another batch may round a near-tie to another code.
        kinds = torch.stack([codec.decode(drawn.audio_codes[:, :depth]) for depth in depths])
    distance, kind = (kinds - drawn.audio_values).abs().amax(dim=(2, 3)).min(dim=0)
    assert distance.max() < 1e-5
    counts = kind.bincount(minlength=3).tolist()
    assert 85 <= counts[2] <= 115
    assert min(counts) >= 35
    torch.testing.assert_close(whole.audio_values, codec.decode(whole.audio_codes), atol=1e-5, rtol=0)


def test_depths_of_a_longer_encoding_suit_a_codec_with_fewer_codes() -> None:
    """They stay in its config, and draw no more codes than it has."""
    fewer = make(decoder_depths=[1, 3, 6]).with_num_quantizers(3).train()
    again = QinCodecConfig(**{key: getattr(fewer.config, key) for key in fewer.config.own_keys()})
    assert (again.num_codes, again.decoder_depths) == (3, [1, 3, 6])
    assert fewer(noise(8, 1, 4 * HOP)).audio_codes.shape == (8, 3, 4)


def test_padding_is_no_part_of_what_is_learned(codec: QinCodecModel) -> None:
    """Losses of a padded batch are those of its clips alone, weighed by their frames."""
    wave, mask = noise(2, 1, 20 * HOP), torch.ones(2, 20 * HOP)
    mask[1, 5 * HOP :] = 0
    together = codec(wave, mask, latent_noise=torch.zeros(2))
    alone = [codec(wave[:1], latent_noise=torch.zeros(1)), codec(wave[1:, :, : 5 * HOP], latent_noise=torch.zeros(1))]
    for name in ("spectrum", "latent_penalty"):
        expected = (20 * alone[0].losses[name] + 5 * alone[1].losses[name]) / 25
        torch.testing.assert_close(together.losses[name], expected, rtol=1e-4, atol=1e-5)
    assert not together.audio_values[1, :, 5 * HOP :].any()
    assert not together.latents[1, :, 5:].any()


def test_training_lowers_the_loss() -> None:
    codec = make().train()
    time = torch.arange(40 * HOP) / 8000
    wave = torch.stack([0.5 * torch.sin(2 * torch.pi * pitch * time) for pitch in (220.0, 331.0)])[:, None]
    for stage in (1, 3):
        optimizer = torch.optim.AdamW(codec.parameters(), lr=2e-3)
        seen = []
        for _ in range(12):
            loss = codec(wave, latent_noise=torch.full((2,), 0.05) if stage == 1 else None).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        assert seen[-1] < (0.9 if stage == 1 else 0.995) * seen[0]


def test_hidden_states_are_those_of_the_encoder(codec: QinCodecModel) -> None:
    output = codec(noise(1, 1, 9 * HOP), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, 9, 24)] * 3
    latents = codec.autoencoder.encoder.out(output.hidden_states[-1]).transpose(1, 2)
    torch.testing.assert_close(latents, output.latents)
    assert codec(noise(1, 1, 9 * HOP)).hidden_states is None


# Configurations

IMPOSSIBLE: list[dict[str, Any]] = [
    {"hop_length": 0},
    {"hop_length": 96},
    {"n_fft": 127},
    {"n_fft": None},
    {"latent_dim": 0},
    {"hidden_size": -1},
    {"feature_exponent": math.nan},
    {"latent_penalty": -1.0},
    {"num_quantizers": 0},
    {"num_quantizers": 7},
    {"decoder_depths": [0]},
    {"decoder_depths": [7]},
    {"quantizer": {"type": "vq"}},
    {"quantizer": {"codebook_sise": 3}},
    {"quantizer": {"codebook_size": 1, "num_candidates": 1, "beam_size": 1}},
    {"quantizer": {"num_quantizers": 0}},
    {"quantizer": {"codebook_size": 16, "num_candidates": 17}},
    {"quantizer": {"codebook_size": 16, "num_candidates": 8, "beam_size": 17}},
    {"quantizer": {"qinco1_mode": "yes"}},
    {"quantizer": {**RQ, "hidden_dim": 3}},
    {"autoencoder": {"model_type": "audiotok_nothing"}},
    {"autoencoder": {"model_type": "os"}},
    {"autoencoder": {}},
]


@pytest.mark.parametrize("values", IMPOSSIBLE, ids=str)
def test_impossible_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        QinCodecConfig(**{**TINY, **values})
    key = next(iter(values))
    words = values[key] if isinstance(values[key], dict) and values[key] else {key: None}
    assert any(word in str(caught.value) for word in (key, *words))


def test_the_nearest_key_of_the_quantizer_is_named() -> None:
    with pytest.raises(ConfigError, match=r'"codebook_sise".*Did you mean "codebook_size"'):
        QinCodecConfig(quantizer={"codebook_sise": 3})
    with pytest.raises(ConfigError, match=r'type "rq" knows no key "hidden_dim"'):
        QinCodecConfig(quantizer={**RQ, "hidden_dim": 3})
