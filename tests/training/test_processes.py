"""Training in processes of its own: signals, several processes, errors."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from audiotok import AuvModel
from training.helpers import TINY, run


def start(
    folder: Path, cache: Path, output: Path, *arguments: str, launcher: tuple[str, ...] = ("-m",)
) -> subprocess.Popen[str]:
    command = [
        sys.executable, *launcher, "audiotok.recipes.train_codec", str(TINY), "--data", str(folder),
        "--cache", str(cache), "--output", str(output), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_resumes(folder: Path, cache: Path, tmp_path: Path, number: signal.Signals):
    process = start(folder, cache, tmp_path, "--set", "stages.continuous.steps=100000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.csv").is_file() or len((tmp_path / "log.csv").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, text
    resumed = run(folder, cache, tmp_path, resume=True, max_steps=1)  # loads it; there are no steps left to do
    assert resumed.progress.step >= 4
    with (tmp_path / "log.csv").open() as file:
        assert all(int(row["step"]) <= resumed.progress.step for row in csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_train_one_codec(folder: Path, cache: Path, tmp_path: Path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    process = start(folder, cache, tmp_path, "--set", "validation.samples_every=0", launcher=launcher)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {path.name for path in (tmp_path / "last").iterdir()}
    rows = AuvModel.from_pretrained(tmp_path / "best").codebook_embeddings()[0]
    assert torch.allclose(rows.norm(dim=1), torch.ones(64), atol=1e-5)


@pytest.mark.slow
def test_the_command_refuses_with_one_line(folder: Path, cache: Path, tmp_path: Path):
    process = start(folder, cache, tmp_path, "--set", "sead=1")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 5
    assert text.strip().splitlines() == [text.strip()]
    assert 'Did you mean "seed"?' in text
