"""AUV trains as the published modules do: losses, gradients and batch-norm statistics of one step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from published import close
from torch import Tensor

from audiotok import AuvModel
from audiotok.codecs.auv.conversion_auv import RULES, convert_config, convert_weights

CASES = ["tiny", "tiny_options"]
GRADIENT_ATOL, LATENT_ATOL, AUDIO_ATOL = 1e-5, 1e-4, 2e-5


@pytest.fixture
def vectors(golden: Callable) -> Callable[[str], dict[str, Tensor]]:
    return lambda case: golden("auv").vectors(f"{case}/vectors_train")


@pytest.fixture
def training_model(golden: Callable) -> Callable[[str], AuvModel]:
    """`training_model(case)` → a fresh codec in training mode."""

    def make(case: str) -> AuvModel:
        files = golden("auv")
        config = convert_config(files.config(case))
        codec = AuvModel(config)
        codec.load_state_dict(convert_weights(files.weights(case), config))
        return codec.train()

    return make


def ours(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A published tensor under our name and in our shape."""
    rule = next(rule for rule in RULES if rule.apply(key) is not None)
    return rule.apply(key), rule.transform(tensor) if rule.transform else tensor


def recorded(vectors: dict[str, Tensor], prefix: str, published_prefix: str = "") -> dict[str, Tensor]:
    found = [ours(published_prefix + k.removeprefix(prefix), t) for k, t in vectors.items() if k.startswith(prefix)]
    assert found
    return dict(found)


@pytest.mark.parametrize("case", CASES)
def test_forward(case: str, vectors: Callable, training_model: Callable) -> None:
    v, codec = vectors(case), training_model(case)
    output = codec(v["input"][:, None])
    assert torch.equal(output.audio_codes, v["codes"].permute(1, 0, 2).long())
    close(output.latents.transpose(1, 2), v["before_quantize"], LATENT_ATOL)
    close(output.audio_values, v["audio"], AUDIO_ATOL)
    close(output.distillation_features, v["hidden_feat"], LATENT_ATOL)
    close(output.loss[None], v["vq_loss"], AUDIO_ATOL)
    statistics = recorded(v, "after/")
    state = codec.state_dict()
    for name, tensor in statistics.items():
        close(state[name], tensor, GRADIENT_ATOL)


@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, vectors: Callable, training_model: Callable) -> None:
    v, codec = vectors(case), training_model(case)
    output = codec(v["input"][:, None])
    loss = output.audio_values.square().mean() + output.loss
    close(loss[None], v["loss"], AUDIO_ATOL)
    loss.backward()
    parameters = dict(codec.named_parameters())
    for name, gradient in recorded(v, "grad/").items():
        assert gradient.abs().max() > 10 * GRADIENT_ATOL  # the tolerance would hide nothing
        close(parameters[name].grad, gradient, GRADIENT_ATOL)


@pytest.mark.parametrize("case", CASES)
def test_quantizer_alone(case: str, vectors: Callable, training_model: Callable) -> None:
    v, codec = vectors(case), training_model(case)
    latents = v["vq/input"].clone().requires_grad_()
    result = codec.quantizer(latents)
    assert torch.equal(result.codes, v["vq/codes"].permute(1, 0, 2).long())
    close(result.quantized, v["vq/quantized"], GRADIENT_ATOL)
    loss = codec.config.commitment_cost * result.commitment + result.codebook
    close(loss, v["vq/losses"].sum(), GRADIENT_ATOL)
    (loss + 0.1 * result.quantized.square().mean()).backward()
    close(latents.grad, v["vq/grad_input"], GRADIENT_ATOL)
    parameters = dict(codec.named_parameters())
    for name, gradient in recorded(v, "vq/grad/", "tokenizer.vq.").items():
        close(parameters[name].grad, gradient, GRADIENT_ATOL)


def test_domains_limit_what_a_clip_may_teach(vectors: Callable, training_model: Callable) -> None:
    v, codec = vectors("tiny"), training_model("tiny")
    ranges = [tuple(codec.config.domain_ranges[name]) for name in ("speech", "other")]
    result = codec.quantizer(v["vq/input"], ranges)
    assert torch.equal(result.codes, v["vq/partition_codes_speech_other"].permute(1, 0, 2).long())
    loss = codec.config.commitment_cost * result.commitment + result.codebook
    close(loss[None], v["vq/partition_losses"], GRADIENT_ATOL)


def test_domains_reach_the_training_forward(vectors: Callable, training_model: Callable) -> None:
    v, codec = vectors("tiny"), training_model("tiny")
    codes = codec(v["input"][:, None], domain=["speech", "other"]).audio_codes
    assert codes[0].max() < 128 and codes[1].min() >= 192


@torch.no_grad()
def test_padding_is_no_part_of_the_losses(vectors: Callable, training_model: Callable) -> None:
    """Each is the mean over the frames that exist: of each clip's own loss, as many times as it has frames."""
    codec = training_model("tiny_options").eval()
    waves, frames = vectors("tiny_options")["input"][:, None], torch.tensor([40, 13])
    samples = frames * codec.config.hop_length
    mask = torch.arange(waves.shape[-1]) < samples[:, None]
    together = codec(waves, mask)
    alone = [codec(waves[i : i + 1, :, :n], torch.ones(1, n)) for i, n in enumerate(samples)]
    assert together.losses.keys() == alone[0].losses.keys() == set(codec.loss_names)
    for name, loss in (*together.losses.items(), ("loss", together.loss)):
        own = torch.stack([one.loss if name == "loss" else one.losses[name] for one in alone])
        close(loss, (own * frames).sum() / frames.sum(), 1e-6)
