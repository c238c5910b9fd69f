"""VRVQ trains as the published code does: the smooth mask, drawn levels, losses and gradients of one step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import close
from torch import Tensor

from audiotok import VrvqConfig, VrvqModel
from audiotok.codec import CodecTrainingOutput
from audiotok.codecs.vrvq.conversion_vrvq import convert_config, convert_weights, rules
from audiotok.errors import OptionError
from audiotok.quantizers.variable import depth_mask, depths_of, smooth_mask, straight_through_mask
from audiotok.recipes.training.config import load_config

MINI = Path(__file__).parents[2] / "recipes" / "configs" / "vrvq_mini.yaml"
# Recorded variant → the keys of the config in which it differs, and the weight of its rate loss.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "uniform_": ({}, 2.0),
    "detach_": ({"detach_importance": True}, 4.0),
    "alpha4_": ({"surrogate_alpha": 4.0}, 3.0),
    "loguniform_": ({"level_distribution": "log_uniform"}, 2.0),
}
LOSS_RTOL, GRADIENT = 1e-5, 1e-4  # of the largest entry of a gradient
AUDIO_ATOL = 2e-5


@pytest.fixture
def trained(golden: Callable) -> Callable[..., tuple[VrvqModel, dict[str, Tensor], dict[str, Any]]]:
    """`trained("vbr", key=value)` → a fresh codec in training mode, the vectors and the scalars of its case."""

    def make(kind: str, **changes: Any) -> tuple[VrvqModel, dict[str, Tensor], dict[str, Any]]:
        files, case = golden("vrvq"), f"train_{kind}"
        config = convert_config(files.config(case))
        codec = VrvqModel(config)
        codec.load_state_dict(convert_weights(files.weights(f"tiny_{kind}"), config))
        for key, value in changes.items():
            setattr(codec.config, key, value)
        facts = json.loads(files.path(f"{case}/facts.json").read_text())
        return codec.train(), files.vectors(f"{case}/vectors"), facts

    return make


def step(codec: VrvqModel, audio: Tensor, rate_weight: float = 0.0) -> tuple[CodecTrainingOutput, Tensor]:
    """The recorded step: seed right before the forward, then the recorded sum of losses, backward."""
    torch.manual_seed(1234)
    output = codec(audio)
    loss = 15 * (output.audio_values - audio).abs().mean() + 0.25 * output.losses["commitment"]
    loss = loss + output.losses["codebook"] + rate_weight * output.losses.get("rate", torch.zeros(()))
    loss.backward()
    return output, loss


def gradient_of(codec: VrvqModel, key: str) -> Tensor:
    """The gradient of a published tensor, in its shape."""
    names = [ours for rule in rules(codec.config) if (ours := rule.apply(key)) is not None]
    assert len(names) == 1
    return dict(codec.named_parameters())[names[0]].grad


def same_gradients(codec: VrvqModel, vectors: dict[str, Tensor], prefix: str) -> None:
    recorded = {key.removeprefix(prefix): tensor for key, tensor in vectors.items() if key.startswith(prefix)}
    assert recorded
    for key, tensor in recorded.items():
        close(gradient_of(codec, key).view(tensor.shape), tensor, GRADIENT * float(tensor.abs().max()))


# The mask


@pytest.mark.parametrize("alpha", [1, 2, 4])
def test_smooth_mask_and_its_gradient(alpha: int, golden: Callable) -> None:
    v = golden("vrvq").vectors("surrogate_mask_fn/vectors")
    hard = depth_mask(depths_of(v["x"][:, 0], 8), 8)
    assert torch.equal(hard.float(), v["hard"])
    for k in range(8):  # the gradient of each book alone
        scaled = v["x"][:, 0].clone().requires_grad_()
        smooth = smooth_mask(scaled, 8, float(alpha))
        close(smooth, v[f"alpha{alpha}.smooth"], 1e-6)
        kept = straight_through_mask(scaled, 8, float(alpha))
        assert torch.equal(kept, v[f"alpha{alpha}.ste_value"])
        (gradient,) = torch.autograd.grad(kept[:, k].sum(), scaled)
        close(gradient, v[f"alpha{alpha}.smooth_grad"][:, k], 1e-6)


# Variable rate


@pytest.mark.parametrize("variant", VARIANTS)
def test_variable_rate(variant: str, trained: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, rate_weight = VARIANTS[variant]
    codec, v, facts = trained("vbr", **changes)
    masks: list[Tensor] = []
    quantize = codec.quantizer.forward
    monkeypatch.setattr(
        codec.quantizer, "forward", lambda *args, mask, **rest: masks.append(mask) or quantize(*args, mask=mask, **rest)
    )
    output, total = step(codec, v["audio"], rate_weight)
    assert torch.equal(output.audio_codes, v["uniform_codes"].long())
    assert torch.equal(masks[0], v[f"{variant}mask"])
    scalars = facts["scalars"]
    for name in ("commitment", "codebook", "rate"):
        assert output.losses[name].item() == pytest.approx(scalars[f"{variant}{name}_loss"], rel=LOSS_RTOL)
    assert (output.audio_values - v["audio"]).abs().mean().item() == pytest.approx(
        scalars[f"{variant}waveform_l1"], rel=LOSS_RTOL
    )
    assert total.item() == pytest.approx(scalars[f"{variant}total"], rel=LOSS_RTOL)
    assert output.loss.item() == pytest.approx(
        0.25 * scalars[f"{variant}commitment_loss"]
        + scalars[f"{variant}codebook_loss"]
        + codec.config.rate_cost * scalars[f"{variant}rate_loss"],
        rel=LOSS_RTOL,
    )
    same_gradients(codec, v, f"{variant}grad.")
    for key, norm in facts["grad_norms"].get(variant, {}).items():
        assert float(gradient_of(codec, key).norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), key


def test_reconstruction_in_training(trained: Callable) -> None:
    codec, v, _ = trained("vbr")
    torch.manual_seed(1234)
    close(codec(v["audio"]).audio_values[:2].detach(), v["uniform_audio_out"], AUDIO_ATOL)


@pytest.mark.parametrize("variant, levels", [("uniform_", "levels"), ("loguniform_", "loguniform_levels")])
def test_levels_are_drawn_as_published(variant: str, levels: str, trained: Callable) -> None:
    codec, v, _ = trained("vbr", **VARIANTS[variant][0])
    found, full = codec._drawn_levels(8, torch.Generator().manual_seed(1234))
    close(torch.tensor(found), v[levels].flatten(), 1e-6)
    assert full == [0] * 6 + [8] * 2


# Constant rate


def test_constant_rate_with_quantizer_dropout(trained: Callable) -> None:
    codec, v, facts = trained("cbr")
    counts = codec._drawn_counts(8, torch.Generator().manual_seed(1234))
    assert counts == [min(4, int(n)) for n in facts["n_quantizers"]]
    output, total = step(codec, v["audio"])
    assert torch.equal(output.audio_codes, v["codes"].long())
    assert set(output.losses) == {"commitment", "codebook"}
    for name in ("commitment", "codebook"):
        assert output.losses[name].item() == pytest.approx(facts["scalars"][f"{name}_loss"], rel=LOSS_RTOL)
    assert total.item() == pytest.approx(facts["scalars"]["total"], rel=LOSS_RTOL)
    close(output.audio_values[:2].detach(), v["audio_out"], AUDIO_ATOL)
    same_gradients(codec, v, "grad.")


def test_quantized_latents_in_training(trained: Callable) -> None:
    for kind, name in (("vbr", "uniform_z_q"), ("cbr", "z_q")):
        codec, v, _ = trained(kind)
        heard: list[Tensor] = []
        codec.quantizer.register_forward_hook(lambda _m, _i, output, heard=heard: heard.append(output.quantized))
        torch.manual_seed(1234)
        codec(v["audio"])
        close(heard[0].detach(), v[name], 1e-5 * float(v[name].abs().max()))


# What the vectors do not show


def test_each_loss_moves_its_own_side(trained: Callable) -> None:
    """Codebooks learn from `codebook` alone, the encoder from `commitment`, the importance from `rate`."""
    codec, v, _ = trained("vbr")
    books = [name for name, _ in codec.named_parameters() if name.endswith("codebook.weight")]
    for loss, moved, still in (
        ("codebook", "quantizer.stages.0.codebook.weight", ["encoder.", "importance.", "decoder."]),
        ("commitment", "encoder.conv_in.weight_v", [*books, "importance.", "decoder."]),
        ("rate", "importance.stages.0.conv.weight_v", ["quantizer.", "decoder."]),
    ):
        codec.zero_grad()
        codec(v["audio"], level=2.0).losses[loss].backward()
        gradients = [name for name, p in codec.named_parameters() if p.grad is not None and p.grad.any()]
        assert moved in gradients
        assert not [name for name in gradients if name.startswith(tuple(still))]


def test_a_given_level_is_used_for_all_clips(trained: Callable) -> None:
    codec, v, _ = trained("vbr")
    state = torch.get_rng_state()
    output = codec(v["audio"], level=1.0)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    expected = codec.eval()(v["audio"])
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss, expected.losses[name])
    close(output.audio_values, expected.audio_values, 1e-5)


def test_a_generator_of_ones_own(trained: Callable) -> None:
    codec, v, _ = trained("vbr")
    state = torch.get_rng_state()
    one, same, other = (codec(v["audio"], generator=torch.Generator().manual_seed(s)).loss for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.item() == same.item() != other.item()


def test_losses_count_true_frames_only(trained: Callable) -> None:
    codec, v, _ = trained("vbr")
    codec.eval()
    mask = torch.ones(2, v["audio"].shape[-1])
    mask[1, 1500:] = 0
    together = codec(v["audio"][:2], mask)
    singles = [codec(v["audio"][:1]), codec(v["audio"][1:2, :, :1500])]
    for name, loss in together.losses.items():
        expected = (8 * singles[0].losses[name] + 3 * singles[1].losses[name]) / 11  # frames of 512 samples
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


# The recipe


def test_the_small_training_config() -> None:
    """What its comment promises: the size, the rates, and stages that leave the importance alone until the last."""
    config = load_config(MINI)
    codec = VrvqModel(VrvqConfig(**config.codec.config))
    assert codec.num_parameters() == 1_781_188 < 2_000_000
    assert [round(rate) for rate in codec.rate.limits] == [1625, 10375]
    first, joint = config.stages[:2]
    audio = 0.1 * torch.randn(4, 1, 4096, generator=torch.Generator().manual_seed(0))
    codec.train()(audio, **first.forward).audio_values.square().mean().backward()
    moved = max(float(p.grad.abs().max()) for p in codec.importance.parameters())
    assert moved < 1e-9 and "rate" not in first.loss_weights
    assert not joint.forward and joint.loss_weights["rate"] > 0


def test_keywords_of_a_stage_are_checked() -> None:
    with pytest.raises(OptionError, match=r"stages\.whole\.forward='leval'.*Did you mean \"level\""):
        load_config(MINI, ["stages.whole.forward={leval: 6.0}"])
