"""What a run must remember: averaged weights, progress, and checkpoints that are whole or not there."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from audiotok.codec import AudioCodec, CodecConfig
from audiotok.errors import CheckpointError, CheckpointNotFoundError


class WeightAverage:
    """Exponential moving average of the trained weights; buffers and rows that no gradient trains are copied.

    The average starts as a plain mean (decay (s + 1) / (s + 10) until `decay` is smaller), so early steps fade.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (self.num_updates + 1) / (self.num_updates + 10))
        for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            if theirs.requires_grad:
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.num_updates = state["num_updates"]


@dataclass
class Progress:
    """Where a run stands. `step` counts finished optimizer steps and is also the sampler's position."""

    step: int = 0
    best_score: float | None = None
    fitted_stages: list[str] = field(default_factory=list)
    seconds: float = 0.0
    audio_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what stood there survives as `path.old` until the new one is in place."""
    old = path.with_name(path.name + ".old")
    _sync(new)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


class Checkpoints:
    """The folders of a run: `last` holds everything, `ema` and `best` hold averaged weights.

    Args:
        run: the run's folder.
        codec: config of the codec; a checkpoint of another codec is refused.
    """

    ABOUT = "run.json"

    def __init__(self, run: Path, accelerator: Accelerator, codec: CodecConfig) -> None:
        self.run, self.accelerator = run, accelerator
        values = {"family": codec.model_type, **{key: getattr(codec, key) for key in sorted(codec.own_keys())}}
        self.codec = json.loads(json.dumps(values))  # as it reads back: lists for tuples

    def find(self) -> Path | None:
        """`last`, or the one before it if the run died between two renames; None where there is neither."""
        return next((self.run / name for name in ("last", "last.old") if (self.run / name).is_dir()), None)

    def parts(self) -> list[str]:
        """Names of the extra networks that the checkpoint holds, in the order in which they were built.

        Raises:
            CheckpointNotFoundError: nothing to resume from.
            CheckpointError: it holds another codec.
        """
        found = self.find()
        if found is None:
            raise CheckpointNotFoundError(f"{self.run} holds no checkpoint to resume from: start without --resume.")
        about = json.loads((found / self.ABOUT).read_text(encoding="utf-8"))
        if about["codec"] != self.codec:
            other = [key for key in self.codec if about["codec"].get(key) != self.codec[key]]
            raise CheckpointError(
                f"{found} holds a codec with other values of {', '.join(other)}: resume with the config of its run."
            )
        return about["parts"]

    def load(self) -> None:
        self.accelerator.load_state(str(self.find()))

    def save(self, parts: list[str]) -> None:
        """Write `last`; every process takes part, since each has random states of its own."""
        unfinished = self.run / "last.unfinished"
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            about = {"codec": self.codec, "parts": parts}
            (unfinished / self.ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")
            replace_folder(unfinished, self.run / "last")

    def export(self, name: str, model: AudioCodec) -> None:
        """`model.save_pretrained` into the folder `name`, whole or not at all."""
        unfinished = self.run / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        replace_folder(unfinished, self.run / name)
