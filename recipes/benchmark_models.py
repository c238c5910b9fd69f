"""What is benchmarked: codecs by name, with trained or drawn weights, and clips, recorded or synthetic.

`auv-full` and any training config (`*.yaml`) get weights drawn from a seed: speed and rounding do not need trained
ones. They are drawn so that codes are as spread as those of a trained codec: the projected latents are centred on
the codebook, and batch norms have statistics of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from audiotok import AudioTokenizer, AutoAudioTokenizer, AuvAudioTokenizer, AuvConfig, AuvModel
from audiotok.audio import load_audio
from audiotok.auto import bundled
from audiotok.errors import AudioInputError, CheckpointNotFoundError

Waveform = np.ndarray
"""Mono, `[N]` float32."""

FULL, MINI = "auv-full", "auv-mini"
MINI_CONFIG = Path(__file__).parent / "configs" / "auv_mini.yaml"
SUFFIXES = {".flac", ".wav", ".ogg", ".mp3", ".aiff", ".aif"}


def load_tokenizer(name: str, seed: int = 0) -> AudioTokenizer:
    """The tokenizer of a name.

    Args:
        name: "auv-full", the released configuration with drawn weights; "auv-mini", the bundled checkpoint or,
            where it is not bundled, its training config with drawn weights; a training config; else whatever
            `AutoAudioTokenizer` knows.
        seed: of drawn weights.
    """
    if name == FULL:
        return AuvAudioTokenizer(draw_auv(AuvConfig(), seed), name="auv-full, drawn weights")
    if name == MINI and f"audiotok/{MINI}" not in bundled():
        name = str(MINI_CONFIG)
    if name.endswith((".yaml", ".yml")):
        return AuvAudioTokenizer(draw_auv(_config_of(Path(name)), seed), name=f"{Path(name).stem}, drawn weights")
    return AutoAudioTokenizer.from_pretrained(name)


def _config_of(path: Path) -> AuvConfig:
    """The codec of a training config."""
    if not path.is_file():
        raise CheckpointNotFoundError(f"There is no training config {path}.")
    return AuvConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))["codec"]["config"])


@torch.no_grad()
def draw_auv(config: AuvConfig, seed: int = 0) -> AuvModel:
    """An `AuvModel` in eval mode with weights drawn from `seed`, and codes spread over the codebook."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = AuvModel(config).eval()
        for module in codec.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.7, 1.3)
    clips = synthetic_clips([2.0] * 4, config.sampling_rate, seed)
    latents = codec.latents(torch.from_numpy(np.stack(clips))[:, None])
    for stage in codec.quantizer.stages:
        if not isinstance(stage.in_proj, nn.Identity):
            stage.in_proj.bias -= stage.in_proj(latents.transpose(1, 2)).mean(dim=(0, 1))
    return codec


def synthetic_clips(seconds: Sequence[float], sampling_rate: int, seed: int = 0) -> list[Waveform]:
    """Chirps with slow envelopes over noise of varying level, one clip a length; the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [_chirps(rng, round(s * sampling_rate), sampling_rate) for s in seconds]


def _chirps(rng: np.random.Generator, samples: int, sampling_rate: int) -> Waveform:
    t = np.arange(samples) / sampling_rate
    wave = rng.normal(size=samples) * 0.03 * (1 + np.sin(2 * np.pi * rng.uniform(0.5, 2) * t))
    for _ in range(4):
        low, high = np.sort(rng.uniform(80, 0.35 * sampling_rate, size=2))
        angle = 2 * np.pi * (low * t + (high - low) * t**2 / (2 * max(t[-1], 1e-3)))
        wave += 0.1 * np.sin(2 * np.pi * rng.uniform(0.2, 1.5) * t) * np.sin(angle)
    return np.clip(wave, -0.5, 0.5).astype(np.float32)


def find_recordings(places: Sequence[Path]) -> list[Path]:
    """The files among `places`, and the recordings in the folders among them, sorted within each folder.

    Raises:
        AudioInputError: a folder holds no recordings.
    """
    files: list[Path] = []
    for place in places:
        found = [place]
        if place.is_dir():
            found = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise AudioInputError(f"{place} holds no recordings ({', '.join(sorted(SUFFIXES))}).")
        files += found
    return files


def recorded_clips(folder: Path, count: int, max_seconds: float, sampling_rate: int, seed: int = 0) -> list[Waveform]:
    """Up to `count` recordings below `folder`, drawn with the seed, mono, at the codec's rate and cut to length.

    Raises:
        AudioInputError: the folder holds no recordings.
    """
    files = find_recordings([folder])
    order = np.random.default_rng(seed).permutation(len(files))
    clips = []
    for i in order[:count]:
        recording = load_audio(files[i], target_rate=sampling_rate, channels=1, downmix="mean")
        clips.append(recording.samples[0, : round(max_seconds * sampling_rate)])
    return clips


def cut_to_equal(clips: Sequence[Waveform], samples: int) -> list[Waveform]:
    """Clips of exactly `samples` samples; shorter ones are repeated."""
    return [np.resize(clip, samples) for clip in clips]
