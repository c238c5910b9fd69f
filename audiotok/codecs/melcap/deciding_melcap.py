"""What no configuration states is decided by trial: the choice with which the weights reconstruct a recording.

The published files say nowhere which activation the picture's autoencoder has; and where no `config.yaml` comes with
them, nor how the head ends its inverse transform. A wrong activation yields noise, a wrong head shifts all that is
heard by half a hop of mel frames; so each choice encodes and decodes a recording of speech that comes with the
package, and the error of each is logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

import audiotok
from audiotok.audio import load_audio
from audiotok.codecs.melcap.configuration_melcap import ACTIVATIONS, HEAD_PADDINGS, MelCapConfig
from audiotok.codecs.melcap.modeling_melcap import MelCapModel, MelFrontEnd
from audiotok.errors import CheckpointError

logger = logging.get_logger(__name__)

CHOICES = {"hidden_act": ACTIVATIONS, "head_padding": HEAD_PADDINGS}
RECORDING = Path(audiotok.__file__).parent / "assets" / "demo" / "speech_ljspeech.flac"
SECONDS = 3.0
# What lies 60 dB and more under the loudest mel is silence to all.
RANGE = 7.0
# Of the error that a picture without any movement has: a reconstruction must be nearer to the recording.
RECONSTRUCTS = 0.7
# Two choices whose errors differ by less than this share are as good as each other.
TELLS_APART = 0.005


def decide(config: MelCapConfig, undecided: Sequence[str], state: Mapping[str, Tensor]) -> MelCapConfig:
    """`config` with the value of each of the `undecided` keys that reconstructs best.

    Args:
        state: weights, under our names.

    Raises:
        CheckpointError: no choice reconstructs, or two do equally well.
    """
    waveform = recording(config.sampling_rate)
    candidates = [
        replaced(config, **dict(zip(undecided, values, strict=True)))
        for values in product(*(CHOICES[key] for key in undecided))
    ]
    errors = [spectral_error(waveform, reconstruct(candidate, state, waveform), config) for candidate in candidates]
    names = [", ".join(f"{key}={getattr(candidate, key)}" for key in undecided) for candidate in candidates]
    chosen = choose(names, errors, RECONSTRUCTS * stillness(waveform, config), " and ".join(undecided))
    logger.warning(
        f"MelCap: no configuration states {' and '.join(undecided)}. {told(names, errors)}. Taken: {names[chosen]}."
    )
    return candidates[chosen]


def choose(names: Sequence[str], errors: Sequence[float], limit: float, undecided: str) -> int:
    """The place of the smallest of `errors`, which must be below `limit` and smaller than all others by a clear margin.

    Args:
        names: of the choices. undecided: what is chosen, in words.

    Raises:
        CheckpointError: none is, or two are as good as each other.
    """
    finite = [error if math.isfinite(error) else math.inf for error in errors]  # NaN has no place in an order
    best, runner_up = sorted(finite)[:2]
    if not best < limit:
        raise CheckpointError(
            f"No choice of {undecided} reconstructs a recording. {told(names, errors)}; at most {limit:.3f} is a "
            f"reconstruction. Are both files of one model? If so, state {undecided} in the configuration."
        )
    if runner_up < (1 + TELLS_APART) * best:
        raise CheckpointError(
            f"Reconstructions do not tell which {undecided} is right. {told(names, errors)}. State it in the "
            "configuration."
        )
    return finite.index(best)


def told(names: Sequence[str], errors: Sequence[float]) -> str:
    """The error of each choice, in words."""
    found = "; ".join(f"{name}: {error:.3f}" for name, error in zip(names, errors, strict=True))
    return f"Log-mel error on {RECORDING.name}: {found}"


def replaced(config: MelCapConfig, **values: str) -> MelCapConfig:
    """The same configuration with other values of some keys."""
    keys: dict[str, Any] = {key: getattr(config, key) for key in config.own_keys()} | values
    return MelCapConfig(**keys)


def recording(sampling_rate: int) -> Tensor:
    """Speech, `[1, 1, N]`."""
    found = load_audio(RECORDING, target_rate=sampling_rate, channels=1, downmix="mean")
    return torch.from_numpy(found.samples[None, :, : round(SECONDS * sampling_rate)])


@torch.inference_mode()
def reconstruct(config: MelCapConfig, state: Mapping[str, Tensor], waveform: Tensor) -> Tensor:
    """`[1, 1, N]` there and back."""
    with torch.device("meta"):
        codec = MelCapModel(config)
    codec.load_state_dict(state, strict=True, assign=True)
    return codec.eval().decode(codec.encode(waveform, torch.ones(1, waveform.shape[-1])))


def spectral_error(waveform: Tensor, reconstruction: Tensor, config: MelCapConfig) -> float:
    """Mean distance of the codec's own log-mels, in nepers, of two `[1, 1, N]`."""
    front_end = _front_end(config)
    wanted, got = front_end(waveform[0]), front_end(reconstruction[0])
    floor = wanted.max() - RANGE
    return float((wanted.clamp(min=floor) - got.clamp(min=floor)).abs().mean())


def stillness(waveform: Tensor, config: MelCapConfig) -> float:
    """The `spectral_error` of a picture that is its own mean over time throughout."""
    wanted = _front_end(config)(waveform[0])
    wanted = wanted.clamp(min=wanted.max() - RANGE)
    return float((wanted - wanted.mean(dim=-1, keepdim=True)).abs().mean())


def _front_end(config: MelCapConfig) -> MelFrontEnd:
    return MelFrontEnd(config.sampling_rate, config.n_fft, config.mel_hop_length, config.num_mel_bins, centred=True)
