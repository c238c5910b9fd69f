"""Runs killed for real: `python -m corpus.killing WORK` in the folder tests; prints what it saw as JSON.

The codec is loaded once; each run is a fork of this process, which has one thread. A run is killed by SIGKILL either at
a step of its writing (before a file is opened, with half of it written, before it is flushed, renamed, ...) or after a
random time. Then it is started again, until it ends by itself, and its rows are compared with an undisturbed run's.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from audiotok.integrations import corpus_storage
from audiotok.integrations.corpus_pipeline import Pipeline
from audiotok.integrations.corpus_run import Share
from corpus.corpora import SMALL, corpus_run, errors_of, files_of, rows_as_bytes, rows_of, tiny_tokenizer

LINGERING_S = 0.004  # a clip takes so much longer, so that a random kill meets work
TOKENIZER = tiny_tokenizer()


class Steps:
    """Kills this process before the n-th thing that is done to a disk. In place of the module `os`."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def __getattr__(self, name: str) -> Any:
        if name in ("fsync", "replace", "open", "close"):
            self.step()
        return getattr(os, name)

    def open_file(self, path: Any, mode: str = "r") -> Any:
        self.step()
        file = builtins.open(path, mode)
        return HalfWriter(file, self) if "x" in mode else file


class HalfWriter:
    """A file that is killed with half of its bytes on the disk."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self.file, self.steps = file, steps

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.steps.step()
        self.file.write(data[len(data) // 2 :])

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def start(source: Path, output: Path, share: Share, steps: Steps | None = None, count: int | None = None) -> int:
    """Fork a run; it exits with 0 when its share is done."""
    if child := os.fork():
        return child
    status = 1
    try:
        if steps is not None:
            corpus_storage.os, corpus_storage.open = steps, steps.open_file
        if count is not None:
            count_clips(count)
        corpus_run(source, output, replace(SMALL), share, tokenizer=TOKENIZER, num_workers=1).run()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def count_clips(pipe: int) -> None:
    """A byte into the pipe for each clip that is encoded, which takes a little longer."""
    encode = Pipeline._encode_alone

    def counted(self: Pipeline, heard: Any) -> Any:
        time.sleep(LINGERING_S)
        done = encode(self, heard)
        os.write(pipe, b".")
        return done

    Pipeline._encode_alone = counted


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_every_step(source: Path, work: Path, undisturbed: bytes) -> dict[str, Any]:
    """One run a step; the step after the last one is a run that ends."""
    step = 0
    while True:
        output = work / f"step-{step}"
        killed = exit_code(start(source, output, Share(), Steps(step)))
        assert killed in (0, -signal.SIGKILL), killed
        rows_of(output)  # whatever is there is whole, and there once
        assert exit_code(start(source, output, Share())) == 0, f"after a kill at step {step}"
        assert rows_as_bytes(output) == undisturbed, f"other rows after a kill at step {step}"
        assert len(errors_of(output)) == 1
        assert not list((output / ".run/unfinished").iterdir()), f"something is left over after step {step}"
        if killed == 0:
            return {"steps": step}
        step += 1


def kill_at_random(source: Path, work: Path, undisturbed: bytes, kills: int, seed: int = 0) -> dict[str, Any]:
    """Runs with one or two processes, of which one or both are killed, until `kills` were."""
    rng, killed, corpora, worst = random.Random(seed), 0, 0, 0
    total = len(list(source.iterdir()))
    while killed < kills:
        output, mine = work / f"random-{corpora}", 0
        read, write = os.pipe()
        while True:
            world = rng.choice([1, 2])
            children = [start(source, output, Share(rank, world), count=write) for rank in range(world)]
            time.sleep(rng.uniform(0.02, 0.25))
            for child in children[: rng.choice([1, world])]:
                os.kill(child, signal.SIGKILL)
            codes = [exit_code(child) for child in children]
            assert set(codes) <= {0, -signal.SIGKILL}, codes
            mine += codes.count(-signal.SIGKILL)
            rows_of(output)
            if mine >= 4:
                break
        assert exit_code(start(source, output, Share(), count=write)) == 0
        assert rows_as_bytes(output) == undisturbed, f"other rows in {output}"
        assert len(errors_of(output)) == 1
        before = files_of(output)
        assert exit_code(start(source, output, Share(), count=write)) == 0
        assert files_of(output) == before, "a run over a finished corpus wrote"
        os.close(write)
        encoded = len(b"".join(iter(lambda read=read: os.read(read, 4096), b"")))
        os.close(read)
        worst = max(worst, -(-(encoded - total + 1) // mine))
        killed, corpora = killed + mine, corpora + 1
    return {"kills": killed, "corpora": corpora, "clips_redone_a_kill": worst}


def main(source: str, work: str, kills: int) -> None:
    place = Path(work)
    assert exit_code(start(Path(source), place / "undisturbed", Share())) == 0
    undisturbed = rows_as_bytes(place / "undisturbed")
    seen = {"rows": len(rows_of(place / "undisturbed"))}
    seen |= kill_at_every_step(Path(source), place, undisturbed)
    seen |= kill_at_random(Path(source), place, undisturbed, kills)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
