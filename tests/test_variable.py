"""Depths from importance: masks, their gradients and margins, and the quantizer that keeps what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from audiotok.nn.snake import (
    BLOCK,
    MAX_CHANNELS,
    InterleavedConv1d,
    InterleavedConvTranspose1d,
    Snake,
    SnakeConv,
    SnakeResidualUnit,
)
from audiotok.nn.weight_norm import WeightNormConv1d, WeightNormConvTranspose1d
from audiotok.quantizers.variable import (
    VariableResidualQuantizer,
    depth_margins,
    depth_mask,
    depths_of,
    smooth_mask,
    straight_through_mask,
)
from audiotok.quantizers.vector import ResidualVectorQuantizer

BOOKS, DIM = 4, 12
SCALED = st.one_of(st.integers(0, 10).map(float), st.floats(0, 12, width=32))


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, DIM, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantizer() -> VariableResidualQuantizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VariableResidualQuantizer(DIM, [16] * BOOKS, [5, 4, 3, 2], project=True)


@pytest.fixture
def mask() -> Tensor:
    return depth_mask(torch.tensor([[1, 4, 2, 3, 1, 1, 4, 2, 3], [4, 4, 4, 1, 1, 2, 3, 2, 1]]), BOOKS).float()


# Depths


@given(SCALED, st.integers(1, 8))
def test_a_book_is_kept_where_the_importance_reaches_it(x: float, books: int) -> None:
    kept = [x - k >= 0 for k in range(books)]
    depth = depths_of(torch.tensor([[x]]), books)
    assert int(depth) == sum(kept) == min(books, math.floor(x) + 1)
    assert depth_mask(depth, books)[0, :, 0].tolist() == kept


@given(SCALED, st.integers(2, 8))
def test_margins_say_how_far_another_depth_is(x: float, books: int) -> None:
    scaled = torch.tensor([[x]])
    margin = float(depth_margins(scaled, books))
    assert margin == pytest.approx(min(abs(x - k) / k for k in range(1, books)), abs=1e-6)
    # Whatever is nearer than the margin has the same depth; a little beyond it, on one side, there is another.
    depth = int(depths_of(scaled, books))
    for share in (-0.99, 0.99):
        inside = x / (1 - share * margin / (1 + margin))
        assert int(depths_of(torch.tensor([inside]), books)) == depth or margin < 1e-5
    outside = [x + sign * (1e-5 + margin * k) for sign in (-1, 1) for k in range(1, books)]
    assert any(int(depths_of(torch.tensor([max(y, 0.0)]), books)) != depth for y in outside)


def test_one_book_has_no_other_depth() -> None:
    assert depth_margins(torch.tensor([[0.0, 1.0, 5.0]]), 1).isposinf().all()


# Masks


@pytest.mark.parametrize(
    "alpha, values, slopes",
    [
        (1.0, [0.5, 0.716890, 0.867663], [0.462117, 0.380797, 0.221516]),
        (2.0, [0.5, 0.831251, 0.968887], [0.761594, 0.482014, 0.116730]),
        (4.0, [0.5, 0.913399, 0.997732], [0.964028, 0.499665, 0.017980]),
    ],
)
def test_smooth_mask_of_the_paper(alpha: float, values: list[float], slopes: list[float]) -> None:
    scaled = torch.tensor([[0.0, 0.5, 1.0]], requires_grad=True)
    smooth = smooth_mask(scaled, 1, alpha)
    (gradient,) = torch.autograd.grad(smooth.sum(), scaled)
    torch.testing.assert_close(smooth[0, 0], torch.tensor(values), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient[0], torch.tensor(slopes), atol=1e-6, rtol=0)


@given(st.lists(SCALED, min_size=1, max_size=20), st.sampled_from([0.5, 2.0, 40.0]))
def test_straight_through_is_hard_with_the_slope_of_the_smooth_mask(values: list[float], alpha: float) -> None:
    scaled = torch.tensor([values], requires_grad=True)
    hard = straight_through_mask(scaled, 8, alpha)
    assert torch.equal(hard, depth_mask(depths_of(scaled, 8), 8).float())
    weights = torch.rand(hard.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((hard * weights).sum(), scaled)
    (expected,) = torch.autograd.grad((smooth_mask(scaled, 8, alpha) * weights).sum(), scaled)
    assert torch.equal(found, expected)
    assert found.isfinite().all()


def test_extreme_importance_gives_finite_masks() -> None:
    scaled = torch.tensor([[0.0, 1e-30, 48.0, 512.0, 1e6]], requires_grad=True)
    mask = smooth_mask(scaled, 8, 4.0)
    mask.sum().backward()
    assert mask.isfinite().all() and scaled.grad.isfinite().all()
    torch.testing.assert_close(mask[0, :, 2:], torch.ones(8, 3), atol=1e-2, rtol=0)


# The quantizer


def test_without_a_mask_it_is_the_residual_quantizer(quantizer: VariableResidualQuantizer, latents: Tensor) -> None:
    plain = ResidualVectorQuantizer(DIM, [16] * BOOKS, [5, 4, 3, 2], project=True)
    plain.load_state_dict(quantizer.state_dict())
    for num_stages in (None, 2):
        found, expected = (q(latents, None, True, num_stages) for q in (quantizer, plain))
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.margins, expected.margins)
        torch.testing.assert_close(found.quantized, expected.quantized)
        torch.testing.assert_close(found.commitment, expected.commitment)
        torch.testing.assert_close(found.codebook, expected.codebook)
    assert [book.weight.shape[1] for book in (stage.codebook for stage in quantizer.in_order)] == [5, 4, 3, 2]


def test_the_mask_keeps_stages_and_changes_no_code(
    quantizer: VariableResidualQuantizer, latents: Tensor, mask: Tensor
) -> None:
    whole, kept = quantizer(latents), quantizer(latents, mask=mask)
    assert torch.equal(kept.codes, whole.codes)
    stages = [quantizer(latents, mask=torch.eye(BOOKS)[k].view(1, -1, 1).expand_as(mask)) for k in range(BOOKS)]
    expected = sum(stage.quantized * mask[:, k, None] for k, stage in enumerate(stages))
    torch.testing.assert_close(kept.quantized, expected)
    torch.testing.assert_close(quantizer.decode(whole.codes, mask), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.decode(whole.codes), whole.quantized, atol=1e-5, rtol=1e-5)
    first = quantizer.decode(whole.codes[:, :2], mask[:, :2])
    torch.testing.assert_close(first, expected_of_first(stages, mask), atol=1e-5, rtol=1e-5)


def expected_of_first(stages: list, mask: Tensor) -> Tensor:
    return sum(stage.quantized * mask[:, k, None] for k, stage in enumerate(stages[:2]))


def test_losses_are_those_of_the_stages_kept(
    quantizer: VariableResidualQuantizer, latents: Tensor, mask: Tensor
) -> None:
    residual, commitment = latents.transpose(1, 2), torch.zeros(2, 9)
    for k, stage in enumerate(quantizer.in_order):
        found = stage(residual)
        commitment, residual = commitment + found.commitment * mask[:, k], residual - found.output
    torch.testing.assert_close(quantizer(latents, mask=mask).commitment, commitment.mean())
    valid = torch.arange(9) < torch.tensor([[9], [4]])
    torch.testing.assert_close(quantizer(latents, mask=mask, valid=valid).codebook, commitment[valid].mean())


def test_gradients_run_through_the_mask_and_the_chain(
    quantizer: VariableResidualQuantizer, latents: Tensor, mask: Tensor
) -> None:
    mask, latents = mask.requires_grad_(), latents.requires_grad_()
    found = quantizer(latents, mask=mask)
    weights = torch.randn(found.quantized.shape, generator=torch.Generator().manual_seed(1))
    (found.quantized * weights).sum().backward(retain_graph=True)
    for k in range(BOOKS):  # what a stage adds, seen along the weights
        alone = quantizer(latents, mask=torch.eye(BOOKS)[k].view(1, -1, 1).expand(2, -1, 9)).quantized
        torch.testing.assert_close(mask.grad[:, k], (alone * weights).sum(dim=1))
    # The residual is not detached: the last stage's loss reaches the first stage's way out.
    quantizer.zero_grad()
    quantizer(latents, mask=torch.eye(BOOKS)[-1].view(1, -1, 1).expand(2, -1, 9)).commitment.backward()
    assert quantizer.in_order[0].out_proj.weight_v.grad.any()
    assert latents.grad.any()


# Snake layers


def test_snake_keeps_zero_and_starts_at_one() -> None:
    snake, x = Snake(3), torch.linspace(-4, 4, 30).view(1, 3, 10)
    torch.testing.assert_close(snake(x), x + torch.sin(x).square())
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.0, 0.5, -3.0]).view(1, 3, 1))
    expected = x + torch.sin(snake.alpha * x).square() / (snake.alpha + 1e-9)
    torch.testing.assert_close(snake(x), expected)
    assert not snake(torch.zeros(1, 3, 5)).any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_snake_is_the_same_block_by_block(interleaved: bool) -> None:
    """Without gradients a CPU takes long clips in blocks."""
    snake, x = Snake(3), torch.randn(2, 3, BLOCK // 4, generator=torch.Generator().manual_seed(0))
    if interleaved:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.nn.init.uniform_(snake.alpha, 0.5, 2.0)
    with torch.no_grad():
        found = snake(x)
    assert torch.equal(found, snake(x)) and found.stride() == x.stride()


@pytest.mark.parametrize("channels", [1, 6, MAX_CHANNELS + 1])
@pytest.mark.parametrize(
    ("ours", "plain", "options"),
    [
        (InterleavedConv1d, WeightNormConv1d, {"stride": 2, "padding": 4, "dilation": 2}),
        (InterleavedConvTranspose1d, WeightNormConvTranspose1d, {"stride": 3, "padding": 2, "output_padding": 1}),
    ],
)
def test_interleaved_convolutions_are_convolutions(
    ours: Any, plain: Any, options: dict[str, int], channels: int
) -> None:
    expected, found = plain(4, channels, 5, **options), ours(4, channels, 5, **options)
    found.load_state_dict(expected.state_dict())
    x = torch.randn(2, 4, 17, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(x), expected(x))
    for layer in (found, expected):
        layer(x).square().sum().backward()
    torch.testing.assert_close(found.weight_v.grad, expected.weight_v.grad, rtol=1e-4, atol=1e-4)
    assert (found(x).stride(1) == 1) == (channels <= MAX_CHANNELS) or channels == 1


@pytest.mark.parametrize("layer", [SnakeResidualUnit(3, 3), SnakeConv(3, 3, 3, padding=1)], ids=["unit", "conv"])
def test_what_lies_beyond_the_end_is_zero_and_not_read(layer: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(40) < torch.tensor([[40], [23]])
    found = layer(x * valid[:, None], valid)
    assert not found[1, :, 23:].any()
    torch.testing.assert_close(found[1:, :, :23], layer(x[1:, :, :23]))
    torch.testing.assert_close(found[:1], layer(x[:1]))
