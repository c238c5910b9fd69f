"""How runs keep out of each other's way in one folder.

Each process locks a file of its own, `.run/rank-<r>-of-<W>.lock`, and refuses to work where a process of the same
rank, or of another division W, is at work. The system frees the lock with its process, however that ends: there are
no stale locks. A process whose leader was killed is about to end, and is waited for.

In an object store there are no locks: one run at a time is up to the user there.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from audiotok.errors import OutputExistsError, OutputNotWritableError
from audiotok.integrations.corpus_storage import RUN, UNFINISHED, CorpusFiles, LocalFiles

PATIENCE_S = 2.0  # another process may look at the same lock, for an instant
ORPHAN_PATIENCE_S = 120.0  # a process without a leader finishes the clip in hand, and writes what it holds
# Set for processes that another one leads: its process id.
LED = "AUDIOTOK_LED"


@contextmanager
def sole_run(files: CorpusFiles, rank: int, world_size: int) -> Iterator[None]:
    """Hold the lock of this rank, and clear away what killed processes left unfinished.

    Raises:
        OutputExistsError: another run is at work; it is named.
        OutputNotWritableError: the folder cannot be made.
    """
    if not isinstance(files, LocalFiles):
        yield
        return
    folder = files.folder / RUN
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputNotWritableError(f"{folder} cannot be made ({error.strerror}): check the folder.") from error
    mine = folder / f"rank-{rank:05d}-of-{world_size:05d}.lock"
    lock = _acquired(mine, files)
    try:
        mine.with_suffix(".json").write_text(json.dumps(_myself()))
        for other in sorted(folder.glob("rank-*.lock")):
            if _division(other.stem) != world_size:
                _acquired(other, files).release()
        _clear(files, mine.stem, world_size)
        files.writer = mine.stem
        yield
    finally:
        lock.release()


def _acquired(path: Path, files: LocalFiles) -> FileLock:
    """The lock, once whoever is ending has let go of it."""
    lock, began = FileLock(path), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=PATIENCE_S)
            return lock
        except Timeout:
            owner = _owner(path)
            if not _is_orphan(owner) or time.monotonic() - began > ORPHAN_PATIENCE_S:
                who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "unknown"
                raise OutputExistsError(
                    f"Another run is at work in {files.place} ({who}; {path.stem}): wait for it, stop it, or write to "
                    "another folder."
                ) from None


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "leader": int(os.environ[LED]) if LED in os.environ else None,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(lock: Path) -> dict[str, Any]:
    """What the owner of a lock says of itself; nothing where it had no time to."""
    try:
        return json.loads(lock.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}


def _is_orphan(owner: dict[str, Any]) -> bool:
    """Whether another process of this machine led the owner, and is dead."""
    if owner.get("leader") is None or owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["leader"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _clear(files: LocalFiles, mine: str, world_size: int) -> None:
    """Remove unfinished files of processes that are dead: of my rank before me, and of every other division."""
    for left in (files.folder / UNFINISHED).glob("rank-*"):
        owner = "-".join(left.name.split("-")[:4])
        if owner == mine or _division(owner) != world_size:
            left.unlink(missing_ok=True)


def _division(name: str) -> int:
    """W of `rank-<r>-of-<W>`."""
    return int(name.rpartition("-")[2])
