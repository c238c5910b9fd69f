"""Vector quantizers: the search finds the nearest row, whatever the blocks, ranges, stages and precision around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from audiotok.quantizers.vector import FactorizedVectorQuantizer, Range, ResidualVectorQuantizer, nearest

DIM, CODE_DIM, SIZE = 12, 4, 40


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(z: Tensor, codebook: Tensor) -> Tensor:
    """Squared, between normalised vectors, `[M, K]` in double precision."""
    z, rows = F.normalize(z.double(), dim=-1), F.normalize(codebook.double(), dim=-1)
    return (z[:, None] - rows).square().sum(-1)


def quantizer(
    sizes: tuple[int, ...] = (SIZE, 24), code_dim: int = CODE_DIM, **options: bool
) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    return ResidualVectorQuantizer(DIM, sizes, code_dim, **options)


# The search


@given(frames=st.integers(1, 40), rows=st.integers(1, 30), seed=st.integers(0, 50))
def test_nearest_row_and_margin(frames: int, rows: int, seed: int) -> None:
    z, codebook = noise(frames, CODE_DIM, seed=seed), noise(rows, CODE_DIM, seed=seed + 1000)
    codes, margins = nearest(z, codebook, return_margins=True)
    expected = distances(z, codebook)
    chosen = expected.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(chosen, expected.amin(dim=1), atol=1e-6, rtol=0)
    if rows == 1:
        assert bool(margins.isinf().all())
        return
    runner_up = expected.scatter(1, codes[:, None], torch.inf).amin(dim=1)
    torch.testing.assert_close(margins.double(), (runner_up - chosen) / chosen.clamp(min=1e-6), atol=1e-4, rtol=1e-3)


@given(data=st.data())
def test_ties_go_to_the_lowest_index(data: st.DataObject) -> None:
    """Rows that differ by a power of two in length are the same direction, bit for bit."""
    copies = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=30))
    codebook = noise(6, CODE_DIM)[copies]
    codebook *= torch.tensor([2.0 ** (i % 3) for i in range(len(copies))])[:, None]
    codes, margins = nearest(noise(25, CODE_DIM, seed=1), codebook, return_margins=True)
    first = torch.tensor([copies.index(c) for c in copies])
    assert torch.equal(codes, first[codes])
    repeated = torch.tensor([copies.count(c) > 1 for c in copies])[codes]
    assert not bool(margins[repeated].any())


@pytest.mark.parametrize("parts", [[1] * 30, [513], [512, 1], [1, 1500, 2, 10]])
def test_codes_do_not_hang_on_how_many_frames_are_searched_at_once(parts: list[int]) -> None:
    z, codebook = noise(sum(parts), CODE_DIM), noise(2000, CODE_DIM, seed=1)
    codes, margins = nearest(z, codebook, return_margins=True)
    alone = [nearest(part, codebook, return_margins=True) for part in z.split(parts)]
    assert torch.equal(codes, torch.cat([found for found, _ in alone]))
    torch.testing.assert_close(margins, torch.cat([gap for _, gap in alone]), atol=1e-4, rtol=1e-2)


def test_only_directions_matter_to_the_search() -> None:
    z, codebook = noise(30, CODE_DIM), noise(SIZE, CODE_DIM, seed=1)
    lengths = torch.rand(SIZE, 1) * 100 + 0.01
    assert torch.equal(nearest(z * 50, codebook * lengths)[0], nearest(z, codebook)[0])


def test_silent_latents_have_a_code() -> None:
    codes, margins = nearest(torch.zeros(3, CODE_DIM), noise(SIZE, CODE_DIM), return_margins=True)
    assert bool(((codes >= 0) & (codes < SIZE)).all()) and bool(margins.isfinite().all())


# Ranges


ranges_of_clips = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 2 * SIZE)).map(lambda pair: (pair[0], pair[0] + pair[1])),
    min_size=3,
    max_size=3,
)


@given(ranges=ranges_of_clips)
def test_restricted_search_is_the_search_with_the_rest_masked(ranges: list[Range]) -> None:
    stage = quantizer().stages[0]
    z = noise(3, 11, CODE_DIM)
    codes, margins = stage.search(z, ranges, return_margins=True)
    for clip, (start, end) in enumerate(ranges):
        sliced, gap = nearest(z[clip], stage.codebook.weight.detach()[start:end], return_margins=True)
        assert torch.equal(codes[clip], sliced + start)
        torch.testing.assert_close(margins[clip], gap)
        masked = distances(z[clip], stage.codebook.weight.detach())
        masked[:, :start] = masked[:, end:] = torch.inf
        assert torch.equal(codes[clip], masked.argmin(dim=1))


def test_without_ranges_the_whole_book_is_searched() -> None:
    stage, z = quantizer().stages[0], noise(3, 11, CODE_DIM)
    everywhere = stage.search(z, [(0, SIZE)] * 3, False)[0]
    assert torch.equal(stage.search(z, None, False)[0], everywhere)
    assert stage.search(z, None, False)[1] is None


# Stages


def test_each_stage_quantizes_what_the_earlier_left() -> None:
    model, latents = quantizer(), noise(2, DIM, 9)
    result = model(latents, return_margins=True)
    assert result.codes.shape == result.margins.shape == (2, 2, 9)
    first = model.decode(result.codes[:, :1])
    rest = (latents - first).transpose(1, 2)
    expected = nearest(model.stages[1].project_in(rest).flatten(0, 1), model.stages[1].codebook.weight)[0]
    assert torch.equal(result.codes[:, 1], expected.view(2, 9))
    torch.testing.assert_close(model.decode(result.codes), result.quantized, atol=1e-5, rtol=0)


def test_losses_are_those_of_raw_rows() -> None:
    model, latents = quantizer((SIZE,)), noise(2, DIM, 9)
    stage, result = model.stages[0], model(latents)
    z, rows = stage.project_in(latents.transpose(1, 2)), stage.codebook(result.codes[:, 0])
    torch.testing.assert_close(result.commitment, F.mse_loss(z, rows))
    torch.testing.assert_close(result.codebook, result.commitment)
    gradients = torch.autograd.grad(result.commitment, [stage.in_proj.bias, stage.codebook.weight], allow_unused=True)
    assert gradients[0] is not None and gradients[1] is None
    result = model(latents)
    gradients = torch.autograd.grad(result.codebook, [stage.in_proj.bias, stage.codebook.weight], allow_unused=True)
    assert gradients[0] is None and gradients[1] is not None


def test_gradients_pass_straight_through() -> None:
    model = quantizer((SIZE,))
    stage, latents = model.stages[0], noise(2, DIM, 9).requires_grad_()
    upstream = noise(2, DIM, 9, seed=1)
    model(latents).quantized.backward(upstream)
    through = upstream.transpose(1, 2) @ stage.out_proj.weight @ stage.in_proj.weight
    torch.testing.assert_close(latents.grad, through.transpose(1, 2).detach())
    assert stage.codebook.weight.grad is None or not bool(stage.codebook.weight.grad.any())


def test_without_projections_rows_have_the_channels_of_the_latents() -> None:
    model = quantizer((SIZE,), code_dim=DIM)
    assert [name for name, _ in model.named_parameters()] == ["stages.0.codebook.weight"]
    latents = noise(2, DIM, 9)
    result = model(latents)
    expected = nearest(latents.transpose(1, 2).flatten(0, 1), model.stages[0].codebook.weight)[0].view(2, 1, 9)
    assert torch.equal(result.codes, expected)
    assert torch.equal(model.decode(result.codes), model.stages[0].codebook(expected[:, 0]).transpose(1, 2))


def test_autocast_does_not_reach_the_search() -> None:
    model, latents = quantizer(), noise(2, DIM, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(latents, return_margins=True)
    outside = model(latents, return_margins=True)
    assert torch.equal(inside.codes, outside.codes) and torch.equal(inside.margins, outside.margins)
    assert inside.quantized.dtype == torch.float32


def test_a_bfloat16_model_searches_in_float32() -> None:
    model, latents = quantizer().to(torch.bfloat16), noise(2, DIM, 9)
    result = model(latents, return_margins=True)
    assert (result.codes.dtype, result.margins.dtype) == (torch.int64, torch.float32)
    stage = model.stages[0]
    z = stage.in_proj(latents.transpose(1, 2).to(torch.bfloat16)).float()
    assert torch.equal(result.codes[:, 0].flatten(), nearest(z.flatten(0, 1), stage.codebook.weight)[0])


# Without a search


def test_bypass_is_the_first_stage_without_a_codebook() -> None:
    model, latents = quantizer(), noise(2, DIM, 9)
    stage = model.stages[0]
    expected = stage.out_proj(stage.in_proj(latents.transpose(1, 2))).transpose(1, 2)
    torch.testing.assert_close(model.bypass(latents), expected)
    torch.testing.assert_close(model.project_in(latents), stage.in_proj(latents.transpose(1, 2)).transpose(1, 2))


def test_bypass_of_latents_on_the_sphere_is_the_limit_of_a_fine_codebook() -> None:
    model, latents = quantizer((SIZE,), normalize_latents=True), noise(1, DIM, 9)
    z = model.project_in(latents)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(1, 9))
    with torch.no_grad():
        model.stages[0].codebook.weight[:9] = z[0].t()
    result = model(latents)
    assert result.codes.flatten().tolist() == list(range(9))
    torch.testing.assert_close(result.quantized, model.bypass(latents), atol=1e-5, rtol=0)


def test_noise_on_the_latents_stays_on_the_sphere() -> None:
    model, latents = quantizer((SIZE,), normalize_latents=True), noise(2, DIM, 500)
    stage = model.stages[0]
    torch.manual_seed(0)
    noisy = model.bypass(latents, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(noisy[:1], model.bypass(latents[:1]), atol=1e-5, rtol=0)
    pseudo_inverse = torch.linalg.pinv(stage.out_proj.weight)
    z = (noisy.transpose(1, 2) - stage.out_proj.bias) @ pseudo_inverse.t()
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2, 500), atol=1e-4, rtol=0)
    assert (noisy[1] - model.bypass(latents[1:])[0]).abs().max() > 0.1


def test_a_single_stage_looks_up_any_shape() -> None:
    stage = FactorizedVectorQuantizer(DIM, SIZE, CODE_DIM)
    codes = torch.arange(12).view(2, 2, 3)
    expected = stage.codebook.weight[codes] @ stage.out_proj.weight.t() + stage.out_proj.bias
    torch.testing.assert_close(stage.lookup(codes), expected)
