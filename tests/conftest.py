"""Fixtures that every test file may use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import settings

# Same examples in every run and no deadline: a slow machine is not a bug. To search further:
# pytest --hypothesis-profile=default
settings.register_profile("audiotok", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("audiotok")

# As the child processes of tests, and as `make` sets it: the last bits of a sound may depend on the number of threads.
torch.set_num_threads(1)

WriteAudio = Callable[..., Path]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real recordings and published references, beside the repository or at $AUDIOTOK_SHARED."""
    folder = Path(os.environ.get("AUDIOTOK_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set AUDIOTOK_SHARED)")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def write_audio(tmp_path: Path) -> WriteAudio:
    """Write `[N]` or `[C, N]` samples with soundfile; the suffix says the format (wav, flac, ogg, mp3)."""

    def write(
        name: str, samples: np.ndarray, sampling_rate: int, subtype: str | None = None, **options: object
    ) -> Path:
        path = tmp_path / name
        soundfile.write(path, np.asarray(samples).T, sampling_rate, subtype=subtype, **options)
        return path

    return write


@pytest.fixture
def without_root() -> Callable[[], AbstractContextManager[None]]:
    """`with without_root():` runs without root's right to do everything, if the tests run as root."""

    @contextmanager
    def as_nobody() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return as_nobody


@pytest.fixture
def interrupted_after() -> Callable[[float], AbstractContextManager[None]]:
    """`with interrupted_after(seconds):` raises KeyboardInterrupt in the block, as Ctrl-C would."""

    @contextmanager
    def timer(seconds: float) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return timer
