"""What a run carries from step to step: averaged weights, folders, tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from audiotok.recipes.training.reporting import Table
from audiotok.recipes.training.state import WeightAverage, replace_folder


def test_average_starts_as_a_mean_copies_what_no_gradient_trains_and_keeps_eval_mode():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1), torch.nn.Embedding(2, 1))
    model[2].weight.requires_grad_(False)
    average = WeightAverage(model, decay=0.99)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(5.0)
        model[1].running_mean.fill_(7.0)
    start = average.module[0].weight.item()
    average.update(model)
    assert average.module[0].weight.item() == pytest.approx(0.1 * start + 0.9)
    assert average.module[2].weight.tolist() == [[5.0], [5.0]]
    assert average.module[1].running_mean.item() == 7.0
    assert not average.module.training


def test_replaced_folder_is_the_new_one_and_nothing_else_is_left(tmp_path: Path):
    for text in ("one", "two"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(text)
        replace_folder(tmp_path / "new", tmp_path / "last")
        assert (tmp_path / "last" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_table_forgets_the_rows_after_the_step_it_resumes_from(tmp_path: Path):
    table = Table(tmp_path / "log.csv", ["step", "mel"], 0)
    for step in (2, 4, 6):
        table.add({"step": step, "mel": step / 2})
    steps, values = Table(tmp_path / "log.csv", ["step", "mel"], 4).series("mel")
    assert steps.tolist() == [2, 4]
    assert values.tolist() == [1.0, 2.0]
