"""What the tests of training share."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from audiotok.recipes.train_codec import CodecTrainer
from audiotok.recipes.training.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
TINY = CONFIGS / "auv_tiny_test.yaml"
RATE = 16_000


def write_metadata(root: Path, rows: list[dict[str, str]]) -> None:
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(
    folder: Path,
    cache: Path,
    output: Path,
    *overrides: str,
    resume: bool = False,
    max_steps: int | None = None,
    config: Path = TINY,
) -> CodecTrainer:
    """Train the tiny codec to the end, or up to step `max_steps`; signals are handled as before afterwards."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()  # accelerate remembers the precision of the process's first run
    loaded = load_config(config, ["validation.samples_every=0", *overrides])  # pictures take longer than the training
    trainer = CodecTrainer(loaded, folder, output, cache, resume, max_steps)
    keep = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert trainer.train() == 0
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), keep, strict=True):
            signal.signal(number, handler)
    return trainer
