"""When a run leaves before its last step: a signal or a time limit, seen alike by all its processes."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from accelerate import Accelerator


class StopWatch:
    """Starts counting, and listening for Ctrl-C and SIGTERM, when it is made.

    The first signal asks the run to end after its step, so that it can save; the second one ends it at once.

    Args:
        max_minutes: time limit; None for no limit.
    """

    def __init__(self, accelerator: Accelerator, max_minutes: float | None) -> None:
        self.accelerator = accelerator
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def must_stop(self) -> bool:
        """Whether any process was asked to stop or is out of time."""
        wants = bool(self.signal) or time.monotonic() > self.deadline
        if self.accelerator.num_processes == 1:
            return wants
        flag = torch.tensor(float(wants), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag) > 0)
