"""What is benchmarked: codecs by name, with trained or drawn weights, and clips, recorded or synthetic.

`auv-full`, `melcap-full` and so on, and any training config (`*.yaml`), get weights drawn from a seed: speed and
rounding do not need trained ones. They are drawn so that codes are as spread as those of a trained codec: the
projected latents are centred on the codebooks, and norms have statistics and gains of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from audiotok import AudioCodec, AudioTokenizer, AutoAudioTokenizer
from audiotok.audio import load_audio
from audiotok.auto import FAMILIES, bundled
from audiotok.codec import CodecConfig
from audiotok.codecs.melcap.modeling_melcap import GridQuantizer
from audiotok.codecs.vrvq.autoencoder_vrvq import ImportanceSubnet
from audiotok.errors import AudioInputError, CheckpointNotFoundError, check_choice
from audiotok.nn.convnext import GlobalResponseNorm
from audiotok.quantizers.successive import SuccessiveQuantizer
from audiotok.quantizers.vector import FactorizedVectorQuantizer

Waveform = np.ndarray
"""Mono, `[N]` float32."""

# The released configuration of each family, by the name of its benchmark.
FULL = {f"{name}-full": name for name in sorted(FAMILIES)}
MINI = "auv-mini"
MINI_CONFIG = Path(__file__).parent / "configs" / "auv_mini.yaml"
SUFFIXES = {".flac", ".wav", ".ogg", ".mp3", ".aiff", ".aif"}


def load_tokenizer(name: str, seed: int = 0) -> AudioTokenizer:
    """The tokenizer of a name.

    Args:
        name: "auv-full", "melcap-full" and so on, a released configuration with drawn weights; "auv-mini", the
            bundled checkpoint or, where it is not bundled, its training config with drawn weights; a training config;
            else whatever `AutoAudioTokenizer` knows.
        seed: of drawn weights.
    """
    if name in FULL:
        return _drawn(FULL[name], FAMILIES[FULL[name]].load("Config")(), seed, name)
    if name == MINI and f"audiotok/{MINI}" not in bundled():
        name = str(MINI_CONFIG)
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise CheckpointNotFoundError(f"There is no training config {path}.")
        block = yaml.safe_load(path.read_text(encoding="utf-8"))["codec"]
        family = block.get("family", "auv")
        check_choice("codec.family", family, FAMILIES)
        return _drawn(family, FAMILIES[family].load("Config")(**block["config"]), seed, path.stem)
    return AutoAudioTokenizer.from_pretrained(name)


def _drawn(family: str, config: CodecConfig, seed: int, name: str) -> AudioTokenizer:
    return FAMILIES[family].load("AudioTokenizer")(draw_codec(config, seed), name=f"{name}, drawn weights")


@torch.no_grad()
def draw_codec(config: CodecConfig, seed: int = 0) -> AudioCodec:
    """A codec in eval mode with weights drawn from `seed`, and codes spread over the codebooks."""
    family = next(f for f in FAMILIES.values() if f.model_type == config.model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = family.load("Model")(config).eval()
        for module in codec.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.7, 1.3)
            elif isinstance(module, GlobalResponseNorm):  # it starts as the identity
                module.gamma.uniform_(-0.5, 0.5)
                module.beta.uniform_(-0.1, 0.1)
    clips = np.stack(synthetic_clips([2.0] * 4, config.facts.sampling_rate, seed))[:, None]
    spread_codes(codec, torch.from_numpy(clips).repeat(1, config.facts.channels, 1))
    return codec


@torch.no_grad()
def spread_codes(codec: AudioCodec, probe: Tensor) -> None:
    """Shift what the codebooks are searched with to mean zero: the codes of drawn weights become diverse.

    Args:
        probe: `[B, C, N]`, what the means are taken of.
    """
    for stage in codec.modules():
        if isinstance(stage, GridQuantizer):  # searched with what the encoder ends in, without a projection
            codec.encoder.latent_proj.bias -= stage.project_in(codec.latents(probe)).mean(dim=(0, 2))
        elif isinstance(stage, FactorizedVectorQuantizer) and not isinstance(stage.in_proj, nn.Identity):
            stage.in_proj.bias -= _seen(codec, stage.in_proj, probe).flatten(0, -2).mean(dim=0)
        elif isinstance(stage, ImportanceSubnet):  # from hardly to fully important, so that frames show every depth
            last = stage.stages[-1].conv
            logits = _seen(codec, last, probe)
            scale = 1 / logits.std()
            last.weight_g *= scale
            last.bias.copy_(scale * (last.bias - logits.mean()))
        elif isinstance(stage, SuccessiveQuantizer):
            vectors = codec.latents(probe).transpose(1, 2).flatten(0, 1)
            stage.set_normalization(vectors.mean(dim=0), vectors.std())


def _seen(codec: AudioCodec, module: nn.Module, probe: Tensor) -> Tensor:
    """What a module puts out while `probe` is encoded."""
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    codec.encode(probe)
    hook.remove()
    return outputs[0]


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
