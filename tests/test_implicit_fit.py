"""Fitting QINCo2 and residual quantizers: it helps, it goes on exactly after a stop, and it refuses what cannot be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiotok.errors import ConfigError, LatentsError, MissingDependencyError, OptionError, OutputNotWritableError
from audiotok.quantizers import FitProgress, FitSettings, QINCo2, ResidualQuantizer, fit, fit_residual_quantizer
from audiotok.quantizers.implicit_fit import replace_codes, start
from audiotok.quantizers.residual_kmeans import kmeans_table, residual_kmeans

pytest.importorskip("sklearn", reason="scikit-learn is not installed (train extra)")

D, M, K = 8, 3, 16
SHORT = FitSettings(
    num_epochs=3, vectors_per_epoch=512, batch_size=128, warmup_epochs=1.0, decay_epochs=9.0, validation_vectors=200
)


def make(**options: object) -> QINCo2:
    sizes = {"num_blocks": 1, "embedding_dim": 12, "hidden_dim": 16, "num_candidates": 4, "beam_size": 2}
    return QINCo2(D, M, K, **{**sizes, **options})


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Vectors on a curved surface of two dimensions: a sum of tables cannot follow the curve."""
    generator = torch.Generator().manual_seed(0)
    flat = 2 * torch.rand(3000, 2, generator=generator) - 1
    return 3.0 + torch.sin(flat @ torch.randn(2, D, generator=generator))


@pytest.fixture(scope="module")
def residual(x: Tensor) -> ResidualQuantizer:
    return fit_residual_quantizer(ResidualQuantizer(D, M, K), x[:2500])


def mse(q: QINCo2 | ResidualQuantizer, x: Tensor, **options: int) -> float:
    with torch.no_grad():
        return float((q.decode(q.encode(x, **options)) - x).square().mean())


# Training


@pytest.mark.parametrize("options", [{}, {"embedding_dim": None}, {"embedding_dim": None, "qinco1_mode": True}])
def test_a_plain_start_is_the_residual_quantizer(options: dict, x: Tensor, residual: ResidualQuantizer) -> None:
    q = make(**options)
    start(q, residual, FitSettings())
    codes = residual.encode(x, beam_size=2)
    torch.testing.assert_close(q.decode(codes), residual.decode(codes))
    assert mse(q, x, num_candidates=0, beam_size=2) == pytest.approx(mse(residual, x, beam_size=2), rel=1e-4)


def test_training_beats_the_residual_quantizer(x: Tensor, residual: ResidualQuantizer) -> None:
    q = make(hidden_dim=32)
    settings = dataclasses.replace(
        SHORT, num_epochs=12, vectors_per_epoch=None, decay_epochs=12.0, learning_rate=2e-3, beam_size=1
    )
    result = fit(q, x[:2500], validation=x[2500:], residual=residual, settings=settings)
    assert not q.training
    assert mse(q, x[2500:], beam_size=4) < 0.9 * mse(residual, x[2500:], beam_size=4)
    best = min(result.history, key=lambda report: report.validation_mse)
    assert best.epoch == result.best_epoch > 0
    assert float(q.data_std) ** 2 * result.best_mse == pytest.approx(mse(q, x[2500:], beam_size=1), rel=1e-5)


def test_the_best_epoch_is_kept_and_patience_ends_a_run(x: Tensor, residual: ResidualQuantizer) -> None:
    q = make()
    settings = dataclasses.replace(SHORT, num_epochs=50, patience=2, learning_rate=0.5, gradient_clip=10.0)
    result = fit(q, x, residual=residual, settings=settings)
    assert len(result.history) == 1 + result.best_epoch + 2
    assert result.best_epoch == 0
    plain = make()
    start(plain, residual, settings)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in q.state_dict().items())


def test_the_published_start(x: Tensor, residual: ResidualQuantizer) -> None:
    q = make()
    start(q, residual, FitSettings(start="published"))
    for step, source in zip(q.in_order, residual.in_order, strict=True):
        table = source.codebook.weight.detach()
        noise = step.codebook.weight.detach() - table
        assert float(noise.std()) == pytest.approx(0.1 * float(table.std()), rel=0.3)
    for step in q.implicit_steps:
        assert torch.equal(step.substep.codebook.weight, step.codebook.weight)
        assert not bool(step.concat.mlp.weight.any())
        assert bool(step.out_proj.weight.any())
    result = fit(make(), x, residual=residual, settings=dataclasses.replace(SHORT, start="published"))
    assert result.best_epoch > 0


def test_learning_rate_as_published() -> None:
    settings = FitSettings()
    factors = {e: settings.learning_rate_factor(e) for e in (0.0, 0.5, 1.5, 3.0, 33.0, 60.0, 63.0, 70.0)}
    assert factors[0.0] == factors[63.0] == factors[70.0] == 8e-7
    assert factors[0.5] == pytest.approx(0.5 / 3)
    assert factors[1.5] == pytest.approx(0.5)
    assert factors[3.0] == 1.0
    assert factors[33.0] == pytest.approx(math.cos(math.pi / 4))
    assert 8e-4 * factors[60.0] == pytest.approx(6.3e-5, rel=0.01)


def test_dead_codes_move_to_where_targets_lie(residual: ResidualQuantizer) -> None:
    q = make()
    start(q, residual, FitSettings())
    for step in q.steps:
        step.xtarget_mean.fill_(5.0)
        step.xtarget_var.fill_(0.01)
    before = {name: value.clone() for name, value in q.state_dict().items()}
    dead = torch.zeros(M, K, dtype=torch.bool)
    dead[0, 3] = dead[1, 2] = dead[1, 7] = True
    replace_codes(q, dead, torch.Generator().manual_seed(0))
    after = q.state_dict()
    for m in range(M):
        table = after[f"steps.{m}.codebook.weight"]
        assert torch.equal(table[~dead[m]], before[f"steps.{m}.codebook.weight"][~dead[m]])
        assert bool(((table[dead[m]] - 5.0).abs() < 0.03).all())
        if m > 0:
            second = after[f"steps.{m}.substep.codebook.weight"]
            assert torch.equal(second[~dead[m]], before[f"steps.{m}.substep.codebook.weight"][~dead[m]])
            difference = (second - table)[dead[m]].abs()
            assert bool((difference < 0.01 * 0.025 * 5).all())
            assert not dead[m].any() or bool(difference.any())


def test_unused_codes_are_counted_and_revived(x: Tensor, residual: ResidualQuantizer) -> None:
    far = ResidualQuantizer(D, M, K)
    far.load_state_dict(residual.state_dict())
    with torch.no_grad():
        far.in_order[0].codebook.weight[:4] = 1e3
    q = make()
    result = fit(q, x, residual=far, settings=dataclasses.replace(SHORT, num_epochs=2))
    assert result.history[1].replaced_codes >= 4
    assert result.best_epoch == 2
    assert float(q.in_order[0].codebook.weight.detach().abs().amax()) < 20
    quiet = fit(make(qinco1_mode=True, embedding_dim=None), x, residual=far, settings=SHORT)
    assert all(report.replaced_codes == 0 for report in quiet.history)


# Stopping and going on


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def stop_in_epoch(epoch: int) -> Callable[[FitProgress], None]:
    """A callback that ends the run some updates into an epoch (counted from 0)."""

    def callback(progress: FitProgress) -> None:
        if progress.stage == "training" and progress.done == 4 * epoch + 2:
            raise Stop

    return callback


def test_stopped_runs_end_as_undisturbed_ones(tmp_path: Path, x: Tensor) -> None:
    ten = dataclasses.replace(SHORT, num_epochs=10)
    whole, halves, torn = make(), make(), make()
    expected = fit(whole, x, settings=ten)
    # Five epochs and five more, with another quantizer object.
    fit(halves, x, settings=dataclasses.replace(ten, num_epochs=5), state_file=tmp_path / "halves.pt")
    halves = make()
    found = fit(halves, x, settings=ten, state_file=tmp_path / "halves.pt")
    # Torn off in the middle of an epoch.
    with pytest.raises(Stop):
        fit(torn, x, settings=ten, state_file=tmp_path / "torn.pt", progress=stop_in_epoch(7))
    again = fit(torn, x, settings=ten, state_file=tmp_path / "torn.pt")
    assert repr(expected) == repr(found) == repr(again)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[name])
        assert torch.equal(value, torn.state_dict()[name])
    assert not list(tmp_path.glob("*.partial"))


def test_tables_are_kept_before_the_first_epoch(tmp_path: Path, x: Tensor) -> None:
    told: list[FitProgress] = []
    with pytest.raises(Stop):
        fit(make(), x, settings=SHORT, state_file=tmp_path / "state.pt", progress=stop_in_epoch(0))
    fit(make(), x, settings=SHORT, state_file=tmp_path / "state.pt", progress=told.append)
    assert {p.stage for p in told} == {"training"}


def test_a_finished_run_is_not_trained_again(tmp_path: Path, x: Tensor) -> None:
    first = make()
    result = fit(first, x, settings=SHORT, state_file=tmp_path / "state.pt")
    told: list[FitProgress] = []
    again = make()
    assert repr(fit(again, x, settings=SHORT, state_file=tmp_path / "state.pt", progress=told.append)) == repr(result)
    assert told == []
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


def test_another_run_is_not_continued(tmp_path: Path, x: Tensor, residual: ResidualQuantizer) -> None:
    state = tmp_path / "state.pt"
    fit(make(), x, residual=residual, settings=SHORT, state_file=state)
    with pytest.raises(OptionError, match=r"batch_size was 128 and is 64; seed was 0 and is 1"):
        fit(make(), x, settings=dataclasses.replace(SHORT, batch_size=64, seed=1), state_file=state)
    with pytest.raises(OptionError, match="the vectors are others"):
        fit(make(), x + 1, settings=SHORT, state_file=state)
    torch.save({"model": {}}, state)
    with pytest.raises(OptionError, match="no state of a fit"):
        fit(make(), x, settings=SHORT, state_file=state)


def test_a_state_that_cannot_be_written(tmp_path: Path, x: Tensor, residual: ResidualQuantizer) -> None:
    with pytest.raises(OutputNotWritableError, match="missing"):
        fit(make(), x, residual=residual, settings=SHORT, state_file=tmp_path / "missing" / "state.pt")


# Vectors and progress


def test_arrays_maps_and_blocks_give_the_same(tmp_path: Path, x: Tensor, residual: ResidualQuantizer) -> None:
    np.save(tmp_path / "x.npy", x.numpy())
    forms = [x, x.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r"), (block for block in x.split(400))]
    results = [repr(fit(make(), form, residual=residual, settings=SHORT)) for form in forms]
    assert len(set(results)) == 1


def test_windows_slide_through_the_vectors(x: Tensor, residual: ResidualQuantizer) -> None:
    seen: list[Tensor] = []

    class Recording(QINCo2):
        def loss(self, x: Tensor, *args: object) -> object:
            seen.append(x)
            return super().loss(x, *args)

    q = Recording(D, M, K, 1, 12, 16, 4, 2)
    fit(q, x[:1000], validation=x[1000:], residual=residual, settings=dataclasses.replace(SHORT, vectors_per_epoch=500))
    assert [len(batch) for batch in seen] == [128, 128, 128, 116] * 3
    for epoch, expected in enumerate((x[:500], x[500:1000], x[:500])):
        trained = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert {tuple(row.tolist()) for row in trained} == {tuple(row.tolist()) for row in expected}


def test_progress(x: Tensor) -> None:
    told: list[FitProgress] = []
    result = fit(make(), x, settings=SHORT, progress=told.append)
    assert [p.done for p in told if p.stage == "tables"] == [1, 2, 3]
    training = [p for p in told if p.stage == "training"]
    assert [p.done for p in training] == list(range(1, 13))
    assert {p.total for p in training} == {12}
    assert [p.report for p in training if p.report] == result.history[1:]


def test_too_few_vectors(x: Tensor) -> None:
    with pytest.raises(LatentsError, match="10 vectors are too few to fit 16 codes"):
        fit(make(), x[:10], validation=x[10:20], settings=SHORT)
    with pytest.raises(LatentsError, match="too few to hold a tenth out"):
        fit(make(), x[:9], settings=SHORT)
    with pytest.raises(LatentsError, match="no blocks"):
        fit(make(), iter(()), settings=SHORT)
    with pytest.raises(LatentsError, match="All 100 vectors are equal"):
        fit(make(), torch.ones(100, D), validation=x, settings=SHORT)


def test_vectors_of_a_wrong_kind(x: Tensor) -> None:
    torn = torch.cat([x, torch.full((1, D), torch.nan)])
    shape = r"it must be a float tensor \[vectors, 8\]"
    for bad, message in ((x[:, :3], shape), (x[:, 0], shape), (torn, "NaN or infinity")):
        with pytest.raises(LatentsError, match=message):
            fit(make(), bad, settings=SHORT)
        with pytest.raises(LatentsError, match=message):
            fit_residual_quantizer(ResidualQuantizer(D, M, K), bad)


def test_sizes_of_the_residual_quantizer(x: Tensor, residual: ResidualQuantizer) -> None:
    with pytest.raises(OptionError, match=r"\(8, 3, 16\): QINCo2 needs \(8, 4, 16\)"):
        fit(QINCo2(D, 4, K, num_candidates=4), x, residual=residual, settings=SHORT)


@pytest.mark.parametrize("options", [{"num_epochs": 0}, {"batch_size": 2.5}, {"beam_size": 0}, {"learning_rate": -1}])
def test_settings_that_are_not_legal(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        FitSettings(**options)
    with pytest.raises(OptionError, match="start='random'"):
        FitSettings(start="random")


# Tables by k-means


def test_tables_for_beams_suit_beams(x: Tensor) -> None:
    for_one = fit_residual_quantizer(ResidualQuantizer(D, M, K), x)
    for_four = fit_residual_quantizer(ResidualQuantizer(D, M, K), x, training_beam_size=4)
    assert mse(for_one, x, beam_size=4) < mse(for_one, x, beam_size=1)
    assert mse(for_four, x, beam_size=4) < mse(for_four, x, beam_size=1)
    assert not torch.equal(for_one.in_order[1].codebook.weight, for_four.in_order[1].codebook.weight)


def test_each_table_lowers_the_error(x: Tensor, residual: ResidualQuantizer) -> None:
    steps = residual.decode_steps(residual.encode(x)).detach()
    errors = (steps - x).square().mean(dim=(1, 2)).tolist()
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < float(x.var())


def test_the_same_seed_gives_the_same_tables(x: Tensor) -> None:
    tables = [residual_kmeans(x, 2, K, seed=seed) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(tables[0], tables[1], strict=True))
    assert not torch.equal(tables[0][0], tables[2][0])


def test_fewer_different_vectors_than_codes() -> None:
    x = torch.arange(4.0).repeat_interleave(10)[:, None].expand(-1, 3)
    table = kmeans_table(x, 8)
    assert table.shape == (8, 3)
    assert float(torch.cdist(x, table).amin(dim=1).amax()) < 1e-5


def test_kmeans_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(MissingDependencyError, match=r"audiotok\[train\]"):
        kmeans_table(x, K)
