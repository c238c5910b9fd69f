"""MelCap trains as the published stage 1 does, value by value; and each loss moves its own side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from audiotok import MelCapConfig, MelCapModel
from audiotok.codecs.melcap.conversion_melcap import REPLACED, RULES, convert_config, convert_weights
from audiotok.codecs.melcap.modeling_melcap import PICTURE_SCALE, Reconstruction, as_columns, stage_1_loss
from audiotok.errors import OptionError

ATOL, GRADIENT_RTOL = 1e-4, 2e-5

TINY = {
    "sampling_rate": 8000,
    "n_fft": 64,
    "mel_hop_length": 16,
    "num_mel_bins": 16,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
    "num_norm_groups": 4,
    "bottleneck_channels": 8,
    "codebook_size": 64,
    "codebook_dim": 6,
    "vocoder_hidden_size": 16,
    "vocoder_intermediate_size": 32,
    "vocoder_num_layers": 2,
}


def ours(key: str) -> str:
    """Our name of a published tensor of stage 1, of its own mel decoder too."""
    return next(name for rule in (*REPLACED, *RULES) if (name := rule.apply(key)) is not None)


@pytest.fixture
def recorded(golden: Callable) -> dict[str, Tensor]:
    return golden("melcap").vectors("tiny/vectors_train")


@pytest.fixture
def stage_1(golden: Callable) -> MelCapModel:
    """The tiny case in training mode, with the mel decoder of its stage 1."""
    files = golden("melcap")
    config, _ = convert_config(files.config("tiny"))
    drawn = files.weights("tiny")
    codec = MelCapModel(config)
    codec.load_state_dict(convert_weights({key.partition(".")[2]: t for key, t in drawn.items()}, config))
    decoder = {key.removeprefix("stage1."): t for key, t in drawn.items() if key.startswith("stage1.")}
    decoder = {ours(key): t for key, t in decoder.items() if key.startswith(("decoder.", "post_quant_conv."))}
    assert not codec.load_state_dict(decoder, strict=False).unexpected_keys and len(decoder) > 50
    return codec.train()


def step(codec: MelCapModel, pictures: Tensor) -> tuple[Reconstruction, Tensor]:
    """One pass over pictures `[B, 1, M, T]`, and the published total."""
    found = codec._reconstruct(list(range(len(pictures))), PICTURE_SCALE * pictures[:, 0], 1, None)
    return found, stage_1_loss(found.losses)


def test_losses_are_the_published_ones(stage_1: MelCapModel, recorded: dict[str, Tensor]) -> None:
    found, total = step(stage_1, recorded["mel_scaled"])
    assert torch.equal(found.codes, recorded["codes"].long())
    assert found.audio is None
    for name, value in {
        "total": total,
        "l1": found.losses["mel_picture"] / PICTURE_SCALE,
        "codebook_term": found.losses["commitment"],  # upstream's names are swapped
        "beta_encoder_term": 0.25 * found.losses["codebook"],
    }.items():
        torch.testing.assert_close(value[None], recorded[name], atol=ATOL, rtol=0)
    quantizer = found.losses["commitment"] + 0.25 * found.losses["codebook"]
    torch.testing.assert_close(quantizer, recorded["quant_loss"].mean(), atol=ATOL, rtol=0)
    picture = stage_1._mel(found.quantized)[:, None] / PICTURE_SCALE
    torch.testing.assert_close(picture, recorded["recon"], atol=ATOL, rtol=0)


def test_gradients_are_the_published_ones(stage_1: MelCapModel, recorded: dict[str, Tensor]) -> None:
    step(stage_1, recorded["mel_scaled"])[1].backward()
    parameters = dict(stage_1.named_parameters())
    keys = [key for key in recorded if key.startswith("grad.")]
    assert len(keys) == 6
    for key in keys:
        atol = GRADIENT_RTOL * float(recorded[key].abs().max())
        torch.testing.assert_close(parameters[ours(key[5:])].grad, recorded[key], atol=atol, rtol=0)


# Small models of our own


@pytest.fixture
def codec() -> MelCapModel:
    torch.manual_seed(0)
    return MelCapModel(MelCapConfig(**TINY)).train()


@pytest.fixture
def waves() -> Tensor:
    return 0.2 * torch.randn(2, 1, 1120, generator=torch.Generator().manual_seed(1))


def test_weights_start_as_published(codec: MelCapModel) -> None:
    rows = codec.codebook_embeddings()[0]
    assert 0.9 / len(rows) < rows.abs().max() < 1 / len(rows)
    block = codec.vocoder.backbone.stack.layers[0]
    for layer in (codec.vocoder.backbone.embed, block.depthwise_conv, block.up_proj, block.down_proj):
        assert 0.015 < layer.weight.std() < 0.025
        assert not layer.bias.any()
    assert bool((block.scale == 1 / len(codec.vocoder.backbone.stack.layers)).all())
    assert codec.vocoder.head.bias.any()


def moved(codec: MelCapModel, loss: Tensor) -> set[str]:
    """The parts of the codec that a loss gives a gradient."""
    codec.zero_grad()
    loss.backward(retain_graph=True)
    found = {key.split(".")[0] for key, p in codec.named_parameters() if p.grad is not None and bool(p.grad.any())}
    codec.zero_grad()
    return found


def test_each_loss_moves_its_own_side(codec: MelCapModel, waves: Tensor) -> None:
    output = codec(waves)
    assert moved(codec, output.losses["commitment"]) == {"encoder"}
    assert moved(codec, output.losses["codebook"]) == {"quantizer"}
    assert moved(codec, output.losses["mel_picture"]) == {"encoder", "decoder"}
    assert moved(codec, output.loss) == {"encoder", "decoder", "quantizer"}
    assert moved(codec, output.audio_values.square().mean()) == {"encoder", "decoder", "vocoder"}


def test_stages_train_what_the_published_ones_train(codec: MelCapModel, waves: Tensor) -> None:
    first = codec(waves, stage=1)
    assert first.audio_values is None
    torch.testing.assert_close(first.loss, codec(waves).loss)
    torch.testing.assert_close(first.loss, stage_1_loss(first.losses))
    second = codec(waves, stage=2)
    assert second.loss is None
    assert moved(codec, second.audio_values.square().mean()) == {"decoder", "vocoder"}
    assert torch.equal(second.audio_values, codec(waves).audio_values)
    assert torch.equal(second.audio_codes, first.audio_codes)


@pytest.mark.parametrize("stage", [0, 3, "1"])
def test_other_stages_are_refused(stage: object, codec: MelCapModel, waves: Tensor) -> None:
    with pytest.raises(OptionError, match=f"stage={stage!r}"):
        codec(waves, stage=stage)


def test_gradients_pass_straight_through_the_search(codec: MelCapModel, waves: Tensor) -> None:
    """What the latents get from behind the quantizer is what the quantized ones get."""
    latents = codec.latents(waves).detach().requires_grad_()
    quantized = codec.quantizer(latents).quantized
    quantized.retain_grad()
    codec._mel(quantized).square().mean().backward()
    assert bool(latents.grad.any())
    assert torch.equal(latents.grad, quantized.grad)
    rows = codec.quantizer.decode(codec.quantizer(latents).codes)
    torch.testing.assert_close(quantized, rows, atol=1e-6, rtol=0)


def test_clips_of_other_lengths_count_as_much(codec: MelCapModel) -> None:
    """A padded batch: losses are the mean of each clip's own, and so are gradients."""
    generator = torch.Generator().manual_seed(2)
    lengths, room = [1100, 300, 1090, 310], 1120
    waves = torch.zeros(4, 1, room)
    for wave, n in zip(waves, lengths, strict=True):
        wave[0, :n] = 0.2 * torch.randn(n, generator=generator)
    mask = (torch.arange(room) < torch.tensor(lengths)[:, None]).long()
    together = codec(waves, mask)
    alone = [codec(waves[i : i + 1, :, :n], torch.ones(1, n)) for i, n in enumerate(lengths)]
    for name, loss in together.losses.items():
        torch.testing.assert_close(loss, torch.stack([one.losses[name] for one in alone]).mean())
    for i, (n, one) in enumerate(zip(lengths, alone, strict=True)):
        columns = codec.facts.num_frames(n)
        assert torch.equal(together.audio_codes[i, :, :columns], one.audio_codes[0])
        torch.testing.assert_close(together.latents[i, :, :columns], one.latents[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.audio_values[i, :, :n], one.audio_values[0], atol=1e-5, rtol=0)
        assert one.audio_values.shape == (1, 1, n)
    assert together.audio_values.shape == waves.shape


def test_noise_in_place_of_a_search(waves: Tensor) -> None:
    torch.manual_seed(0)
    codec = MelCapModel(MelCapConfig(**TINY, normalize_latents=True)).train()
    rows = codec.codebook_embeddings()[0]
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
    silent = codec(waves, latent_noise=torch.zeros(2))
    assert silent.audio_codes is None
    assert silent.losses.keys() == {"mel_picture"}
    torch.testing.assert_close(silent.audio_values, codec.decode_latents(silent.latents, [waves.shape[-1]] * 2))
    loud = codec(waves, latent_noise=torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(loud.audio_values[0], silent.audio_values[0], atol=1e-5, rtol=0)
    assert (loud.audio_values[1] - silent.audio_values[1]).abs().max() > 1e-4
    assert moved(codec, loud.loss) == {"encoder", "decoder"}


def test_noise_needs_latents_of_a_known_size(codec: MelCapModel, waves: Tensor) -> None:
    with pytest.raises(OptionError, match="normalize_latents"):
        codec(waves, latent_noise=torch.zeros(2))


def test_what_the_book_is_searched_with_is_in_the_order_of_the_codes(codec: MelCapModel, waves: Tensor) -> None:
    """So that a training recipe can move the rows that codes chose."""
    output = codec(waves)
    z = codec.quantizer.project_in(output.latents)
    assert z.shape == (2, 6, output.audio_codes[0].numel())
    book = codec.codebook_embeddings()[0]
    nearest = torch.cdist(z.transpose(1, 2), book[None]).argmin(dim=-1)
    assert torch.equal(nearest, output.audio_codes.flatten(1))
    grid = as_columns(z.unflatten(2, output.audio_codes.shape[1:]))
    assert torch.equal(grid, output.latents)


def test_the_quantizers_losses_count_valid_columns_only(codec: MelCapModel, waves: Tensor) -> None:
    latents = codec.latents(waves)
    valid = torch.arange(latents.shape[-1]) < torch.tensor([[latents.shape[-1]], [3]])
    found = codec.quantizer(latents, valid=valid)
    first, second = codec.quantizer(latents[:1]), codec.quantizer(latents[1:, :, :3])
    columns = latents.shape[-1]
    for name in ("commitment", "codebook"):
        expected = (columns * getattr(first, name) + 3 * getattr(second, name)) / (columns + 3)
        torch.testing.assert_close(getattr(found, name), expected)


def test_a_few_steps_lower_the_loss(codec: MelCapModel, waves: Tensor) -> None:
    optimizer = torch.optim.Adam(codec.parameters(), lr=2e-3)
    seen = []
    for _ in range(20):
        loss = codec(waves, stage=1).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.8 * seen[0]
