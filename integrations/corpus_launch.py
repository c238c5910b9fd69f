"""How many processes a run has, which of them this one is, and how one process leads others.

`torchrun` and `accelerate launch` say it in the environment; on one machine `audiotok tokenize` starts its own
processes and says it the same way. Those it starts watch its end of a pipe: where the leader dies, they finish the
shard in hand and end as well.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audiotok.errors import OptionError
from audiotok.integrations.corpus_lock import LED
from audiotok.integrations.corpus_run import Share


def share_of_environment() -> Share | None:
    """What torchrun, accelerate or a leader says; None where this process is on its own.

    Raises:
        OptionError: they say half of it, or what cannot be.
    """
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world_size is None:
        return None
    try:
        return Share(int(rank or ""), int(world_size or ""))
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(
            f"RANK={rank!r} and WORLD_SIZE={world_size!r} in the environment do not say which process of how many this "
            "is: start it by torchrun or accelerate launch, or unset both."
        ) from error


def is_led() -> bool:
    return LED in os.environ


@dataclass(frozen=True)
class Launch:
    """Where and as what this process works.

    Attributes:
        share: of the work.
        device: of the model.
        leads: this process only starts `share.world_size` others.
    """

    share: Share
    device: str
    leads: bool

    @classmethod
    def plan(cls, num_processes: int | None, device: str | None) -> Launch:
        """
        Args:
            num_processes: as asked for; None for one a GPU, or one a CPU core.
            device: as asked for; None for GPUs where there are any.

        Raises:
            OptionError: processes were asked for twice.
        """
        import torch

        gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
        share = share_of_environment()
        if share is None:
            count = num_processes or (gpus or _num_cores())
            if device is not None and device not in ("cpu", "cuda"):
                count = num_processes or 1
            name = device or ("cuda" if gpus else "cpu")
            return cls(Share(0, count), "cuda:0" if name == "cuda" and count == 1 else name, leads=count > 1)
        if num_processes is not None and not is_led():
            raise OptionError(
                f"--num-processes {num_processes} was given to a process of torchrun or accelerate, which starts them "
                f"already ({share.world_size} in all): leave it out."
            )
        local = int(os.environ.get("LOCAL_RANK", share.rank))
        if not gpus:
            return cls(share, device or "cpu", leads=False)
        return cls(share, f"cuda:{local % gpus}", leads=False)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Stop:
    """Ctrl-C, SIGTERM, or the leader's end: asked by the run before each clip. The second Ctrl-C ends at once.

    `with Stop() as stop:`; after it signals do what they did before.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __call__(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        if is_led():
            threading.Thread(target=self._watch_leader, name="audiotok-leader", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    def _watch_leader(self) -> None:
        """Nothing ever comes through the pipe but its end. (Not sys.stdin: the interpreter wants its lock to end.)"""
        while os.read(0, 1):
            pass
        self._asked.set()


@dataclass
class Led:
    """A process that works, as its leader sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    progress: dict[str, Any]
    outcome: dict[str, Any] | None = None


def lead(
    arguments: Sequence[str], launch: Launch, watch: Callable[[list[Led]], None], stop: Callable[[], bool]
) -> list[Led]:
    """Start the processes of a run with this command line, and wait for them.

    Args:
        arguments: of `audiotok`.
        watch: is told how far they are, a few times a second.
        stop: asked as often; once it says True, they are told to finish what is in hand.
    """
    led = [_start(arguments, rank, launch) for rank in range(launch.share.world_size)]
    complaints: set[bytes] = set()
    readers = [
        *(threading.Thread(target=_listen, args=(one,), daemon=True) for one in led),
        *(threading.Thread(target=_pass_on, args=(one, complaints), daemon=True) for one in led),
    ]
    for reader in readers:
        reader.start()
    told = False
    try:
        while any(reader.is_alive() for reader in readers):
            for reader in readers:
                reader.join(0.3 / len(readers))
            watch(led)
            if stop() and not told:
                told = True
                for one in led:
                    one.process.send_signal(signal.SIGINT)
    except KeyboardInterrupt:
        for one in led:
            one.process.kill()
        raise
    finally:
        for one in led:
            one.process.wait()
    return led


def _start(arguments: Sequence[str], rank: int, launch: Launch) -> Led:
    environment = os.environ | {
        LED: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(launch.share.world_size),
    }
    if launch.device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "audiotok", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the leader alone, who passes it on
    )
    return Led(rank, process, {})


def _listen(one: Led) -> None:
    """One JSON object a line: how far the process is, and at its end what came of it."""
    assert one.process.stdout is not None
    for line in one.process.stdout:
        said = json.loads(line)
        one.progress = said.get("progress", one.progress)
        one.outcome = said.get("outcome", one.outcome)


def _pass_on(one: Led, said: set[bytes]) -> None:
    """What a process complains of, unless another one has said the same."""
    assert one.process.stderr is not None
    for line in one.process.stderr:
        if line not in said:
            said.add(line)
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()
