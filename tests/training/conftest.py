"""A small corpus and its cache, one for all tests: do not change them; and the smallest configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiotok.recipes.training.config import TrainConfig, load_config
from audiotok.recipes.training.corpus import Corpus, open_corpus
from training.helpers import RATE, TINY, write_metadata


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audiofolder: 4 speakers, 3 pieces of music, 3 sounds; several rates, one stereo, one very short clip."""
    root = tmp_path_factory.mktemp("audiofolder")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(14):
        domain = ("speech", "music", "sound")[number % 3]
        rate = (16_000, 22_050, 8_000)[number % 3]
        samples = 0.2 * rng.standard_normal((round((0.1 if number == 13 else 1.2) * rate), 1 + number % 2))
        samples *= np.sin(np.arange(len(samples)) * 8 / rate)[:, None] ** 2
        soundfile.write(root / f"{number}.wav", samples, rate)
        speaker = f"s{number % 4}" if domain == "speech" else ""
        rows.append({"file_name": f"{number}.wav", "domain": domain, "speaker": speaker, "recording": f"r{number}"})
    write_metadata(root, rows)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(folder: Path, cache: Path) -> Corpus:
    return open_corpus(folder, cache, RATE, {"speech": [0.89]})


@pytest.fixture
def tiny() -> TrainConfig:
    return load_config(TINY)
