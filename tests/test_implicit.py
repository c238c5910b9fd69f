"""QINCo2 and residual quantizers beyond the recorded cases: the search against brute force, options, memory, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from audiotok.errors import CheckpointError, CodesError, ConfigError, LatentsError, OptionError
from audiotok.quantizers import QINCo2, ResidualQuantizer
from audiotok.quantizers.beam_search import MIN_ROWS, search, smallest

D, M, K = 6, 3, 8


def make(**options: object) -> QINCo2:
    """A small fitted-looking quantizer: random networks that matter, tables of falling size."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"num_blocks": 2, "embedding_dim": 10, "hidden_dim": 12, "num_candidates": 4, "beam_size": 4}
    q = QINCo2(D, M, K, **{**sizes, **options})
    with torch.no_grad():
        for name, parameter in q.named_parameters():
            scale = 1.0 if "codebook" in name else 0.4
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for m, step in enumerate(q.in_order):
            step.codebook.weight.mul_(0.6**m)
    q.set_normalization(torch.linspace(-1, 1, D), 2.0)
    return q.eval()


@pytest.fixture
def quantizer() -> QINCo2:
    return make()


@pytest.fixture
def residual() -> ResidualQuantizer:
    q = ResidualQuantizer(D, M, K)
    generator = torch.Generator().manual_seed(0)
    q.set_tables([0.6**m * torch.randn(K, D, generator=generator) for m in range(M)])
    q.set_normalization(torch.linspace(-1, 1, D), 2.0)
    return q.eval()


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(1))


def error(q: QINCo2 | ResidualQuantizer, x: Tensor, codes: Tensor) -> Tensor:
    """Squared error `[N]`."""
    return (q.decode(codes) - x).detach().square().sum(dim=1)


# The search


@pytest.mark.parametrize("kind", ["quantizer", "residual"])
def test_a_beam_that_drops_nothing_finds_the_best_codes(kind: str, request: pytest.FixtureRequest, x: Tensor) -> None:
    q = request.getfixturevalue(kind)
    codes, margins = q.encode(x, num_candidates=0, beam_size=K**M, return_margins=True)
    tuples = torch.tensor(list(itertools.product(range(K), repeat=M)))
    errors = (q.decode(tuples).detach()[None] - x[:, None]).square().sum(dim=-1)
    torch.testing.assert_close(error(q, x, codes), errors.amin(dim=1))
    assert torch.equal(codes, tuples[errors.argmin(dim=1)])
    best, runner_up = errors.topk(2, largest=False).values.unbind(1)
    torch.testing.assert_close(margins[:, -1], (runner_up - best) / best, rtol=1e-3, atol=1e-4)
    assert bool(margins[:, :-1].isinf().all())


def test_one_beam_with_all_candidates_is_the_greedy_choice(quantizer: QINCo2, x: Tensor) -> None:
    codes = quantizer.encode(x, num_candidates=None, beam_size=1)
    for m in range(M):
        tries = torch.stack([torch.cat([codes[:, :m], torch.full((len(x), 1), k)], dim=1) for k in range(K)])
        errors = torch.stack([error(quantizer, x, t) for t in tries])
        assert torch.equal(errors.argmin(dim=0), codes[:, m])


def test_wider_beams_come_nearer(quantizer: QINCo2, x: Tensor) -> None:
    errors = [float(error(quantizer, x, quantizer.encode(x, 0, beam)).mean()) for beam in (1, 4, 16, 512)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_all_candidates_by_number_by_zero_and_by_none(quantizer: QINCo2, x: Tensor) -> None:
    codes = quantizer.encode(x, num_candidates=None)
    for everything in (0, K, K + 1, 10_000):
        assert torch.equal(quantizer.encode(x, num_candidates=everything), codes)
    assert torch.equal(quantizer.encode(x), quantizer.encode(x, num_candidates=4, beam_size=4))
    assert not torch.equal(quantizer.encode(x, num_candidates=1, beam_size=1), codes)


def test_an_encoding_that_ends_early_is_no_prefix(quantizer: QINCo2, x: Tensor) -> None:
    short, long = quantizer.encode(x, num_quantizers=2), quantizer.encode(x)
    assert short.shape == (len(x), 2)
    assert not torch.equal(short, long[:, :2])
    assert float(error(quantizer, x, short).mean()) < float(error(quantizer, x, long[:, :2]).mean())


@given(data=st.data())
def test_smallest_is_a_stable_sort(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 20))
    levels = data.draw(st.lists(st.integers(0, 4), min_size=3 * columns, max_size=3 * columns))
    count = data.draw(st.integers(1, columns + 2))
    distances = torch.tensor(levels, dtype=torch.float32).view(3, columns) / 3
    choice = smallest(distances, count)
    order = distances.sort(dim=1, stable=True)
    assert torch.equal(choice.index, order.indices[:, :count])
    if count < columns:
        last, first_out = order.values[:, count - 1], order.values[:, count]
        torch.testing.assert_close(choice.margin, (first_out - last) / last.clamp(min=1e-6))
    else:
        assert bool(choice.margin.isinf().all())


def test_of_equal_codewords_the_first_is_taken(residual: ResidualQuantizer, x: Tensor) -> None:
    before = residual.encode(x)
    with torch.no_grad():
        table = residual.in_order[0].codebook.weight
        table[K - 1] = table[int(before[0, 0])]
    codes, margins = residual.encode(x[:1], return_margins=True)
    assert torch.equal(codes, before[:1])
    assert margins[0, 0] == 0


# Batches, precision, memory


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5), candidates=st.integers(0, K), beam=st.integers(1, 12)
)
def test_codes_do_not_depend_on_the_batch(sizes: list[int], candidates: int, beam: int) -> None:
    q = make()
    x = torch.randn(sum(sizes), D, generator=torch.Generator().manual_seed(2))
    parts = [q.encode(part, candidates, beam) for part in x.split(sizes)]
    assert torch.equal(torch.cat(parts), q.encode(x, candidates, beam))


class ProductRows(TorchDispatchMode):
    """Records the rows of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.rows.append(len(args[0]))
        elif func in (torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.rows.append(len(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["quantizer", "residual"])
def test_one_vector_alone_takes_the_kernels_of_many(kind: str, request: pytest.FixtureRequest, x: Tensor) -> None:
    q = request.getfixturevalue(kind)
    searches = [step.searcher(None if kind == "residual" else 1) for step in q.in_order]
    with ProductRows() as products:
        search(searches, q.normalize(x[:1]), beam_size=1)
    assert len(products.rows) >= M
    assert min(products.rows) >= MIN_ROWS


def test_no_vectors(quantizer: QINCo2) -> None:
    codes, margins = quantizer.encode(torch.zeros(0, D), return_margins=True)
    assert codes.shape == margins.shape == (0, M)
    assert codes.dtype == torch.long
    assert quantizer.decode(codes).shape == (0, D)
    assert quantizer.decode_steps(codes[:, :2]).shape == (2, 0, D)


@pytest.mark.parametrize("options", [{}, {"num_candidates": 0, "beam_size": 2}, {"num_candidates": 1, "beam_size": 1}])
def test_memory_stays_within_the_budget_with_equal_codes(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    q = QINCo2(32, 3, 64, num_blocks=2, embedding_dim=48, hidden_dim=96, num_candidates=8, beam_size=8).eval()
    q.set_normalization(torch.zeros(32), 1.0)
    x = torch.randn(3000, 32)
    budget = 4 << 20
    peak, codes = peak_memory(lambda: q.encode(x, memory_budget=budget, **options))
    assert peak <= budget + codes.numel() * 8
    few = x[:300]
    assert torch.equal(q.encode(few, memory_budget=64 << 20, **options), codes[:300])


def peak_memory(work: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """The most bytes of tensors held at once by some work, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    assert len(changes) > 100
    return max(itertools.accumulate(changes)), result


def test_a_budget_too_small_for_one_vector(quantizer: QINCo2, x: Tensor) -> None:
    with pytest.raises(OptionError, match=r"memory_budget=100 bytes is too small: one vector .* takes \d+"):
        quantizer.encode(x, memory_budget=100)


def test_float32_under_autocast_and_with_half_weights(quantizer: QINCo2, x: Tensor) -> None:
    codes, decoded = quantizer.encode(x), quantizer.decode(quantizer.encode(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(x), codes)
        assert torch.equal(quantizer.decode(codes), decoded)
        assert quantizer.train().loss(x).total.dtype == torch.float32
    rounded = make().bfloat16()
    assert rounded.decode(codes).dtype == torch.float32
    widened = make()
    widened.load_state_dict(rounded.state_dict())
    assert torch.equal(rounded.encode(x), widened.eval().encode(x))
    assert torch.equal(quantizer.eval().encode(x.double()), codes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_codes_on_a_gpu(quantizer: QINCo2, x: Tensor) -> None:
    codes, margins = quantizer.encode(x, return_margins=True)
    clear = margins.amin(dim=1) > 1e-5
    found = make().cuda().encode(x)
    assert found.device == x.device
    assert torch.equal(found[clear], codes[clear])


# Training


def test_each_loss_moves_its_own_side(quantizer: QINCo2, x: Tensor) -> None:
    quantizer.train()
    quantizer.loss(x).reconstruction.backward(retain_graph=False)
    moved = {name for name, p in quantizer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {name for name, _ in quantizer.named_parameters() if "substep" not in name}
    quantizer.zero_grad(set_to_none=True)
    quantizer.loss(x).selection.backward()
    moved = {name for name, p in quantizer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {name for name, _ in quantizer.named_parameters() if "substep" in name}


def test_running_statistics_move_in_training_only(quantizer: QINCo2, x: Tensor) -> None:
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    quantizer.loss(x)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())
    quantizer.train().loss(x)
    moved = {name for name, value in quantizer.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {f"steps.{m}.{name}" for m in range(M) for name in ("xtarget_mean", "xtarget_var")}


def test_without_second_tables_there_is_one_loss(x: Tensor) -> None:
    losses = make(num_candidates=None).train().loss(x)
    assert losses.selection == 0
    assert losses.total == losses.reconstruction
    assert losses.reconstruction_per_step.shape == (M,)


def test_gradients_reach_the_first_table_through_every_step(quantizer: QINCo2, x: Tensor) -> None:
    last = list(quantizer.reconstructions(quantizer.encode(x)))[-1]
    last.square().sum().backward()
    rows = quantizer.in_order[0].codebook.weight.grad
    # Through the skips alone the gradient would be that of a sum of tables.
    assert not torch.allclose(rows, torch.zeros(K, D).index_add_(0, quantizer.encode(x)[:, 0], 2 * last.detach()))


# What is refused


def test_a_quantizer_that_was_never_fitted(x: Tensor) -> None:
    for q in (QINCo2(D, M, K, num_candidates=4), ResidualQuantizer(D, M, K)):
        with pytest.raises(CheckpointError, match="never fitted: its data_std is 0"):
            q.encode(x)
        with pytest.raises(CheckpointError, match="never fitted"):
            q.decode(torch.zeros(2, M, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": -1}, "num_candidates=-1"),
        ({"num_candidates": 2.0}, r"num_candidates=2\.0"),
        ({"num_candidates": True}, "num_candidates=True"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"beam_size": 1.5}, r"beam_size=1\.5"),
        ({"num_quantizers": 0}, "num_quantizers=0 .* has 1 to 3"),
        ({"num_quantizers": 4}, "num_quantizers=4 .* has 1 to 3"),
    ],
)
def test_options(quantizer: QINCo2, x: Tensor, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quantizer.encode(x, **options)


def test_candidates_need_second_tables(residual: ResidualQuantizer, x: Tensor) -> None:
    for q in (residual, make(num_candidates=0)):
        with pytest.raises(OptionError, match=r"num_candidates=4 .* no second tables"):
            q.encode(x, num_candidates=4)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(3, D + 1), torch.zeros(D), torch.zeros(2, 3, D), torch.zeros(2, D, dtype=torch.long), [[0.0] * D]],
)
def test_vectors_of_a_wrong_kind(quantizer: QINCo2, bad: object) -> None:
    with pytest.raises(LatentsError, match=r"must be a float tensor \[vectors, 6\]"):
        quantizer.encode(bad)


def test_vectors_that_are_not_finite(quantizer: QINCo2, x: Tensor) -> None:
    x[3, 2] = torch.nan
    with pytest.raises(LatentsError, match="NaN"):
        quantizer.encode(x)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, M + 1, dtype=torch.long), "1 to 3 steps"),
        (torch.zeros(2, 0, dtype=torch.long), "1 to 3 steps"),
        (torch.zeros(M, dtype=torch.long), "1 to 3 steps"),
        (torch.zeros(2, M), "integers"),
        (torch.zeros(2, M, dtype=torch.bool), "integers"),
        (torch.tensor([[0, K, 0]]), r"\[0, 8\]: legal are 0 to 7"),
        (torch.tensor([[0, -1, 0]]), r"\[-1, 0\]"),
    ],
)
def test_codes_of_a_wrong_kind(quantizer: QINCo2, bad: Tensor, message: str) -> None:
    for decode in (quantizer.decode, quantizer.decode_steps):
        with pytest.raises(CodesError, match=message):
            decode(bad)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"num_quantizers": 0},
        {"codebook_size": 1},
        {"num_blocks": 0},
        {"embedding_dim": -1},
        {"hidden_dim": 2.5},
        {"num_candidates": 9},
        {"beam_size": 0},
        {"qinco1_mode": 1},
    ],
)
def test_sizes_that_are_not_legal(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        QINCo2(**{"dim": D, "num_quantizers": M, "codebook_size": K, "num_candidates": 4, **options})
