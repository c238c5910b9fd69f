"""How good the averaged weights are on held-out speakers and recordings.

A score that a loss could imitate is never shown alone: level and the band that is furthest off stand beside it.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from audiotok.codec import AudioCodec
from audiotok.errors import ConfigError, MissingDependencyError
from audiotok.metrics import codebook_use, compare
from audiotok.recipes.training.objective import forward_options

SOUND_METRICS = ("mel_distance", "level_ratio_db", "worst_band_db")
SPEECH_METRICS = ("stoi", "estoi")
COLUMNS = ("mel_distance", "stoi", "estoi", "distinct_codes", "code_entropy_bits", "level_ratio_db", "worst_band_db")
LOWER_IS_BETTER = ("mel_distance",)


class Validator:
    """Runs held-out clips through a codec and averages the figures over clips.

    Args:
        clips: triples (`[1, 1, N]`, domain of the recording, domain of the codec).
        intelligibility: STOI and ESTOI of the clips of the domain `speech`.
    """

    def __init__(self, clips: list[tuple[Tensor, str, str]], sampling_rate: int, intelligibility: bool) -> None:
        if not clips:
            raise ConfigError("No clip is held out: raise data.validation_fraction (0.05 is usual).")
        if intelligibility and importlib.util.find_spec("pystoi") is None:
            raise MissingDependencyError(
                "STOI needs the package pystoi: pip install 'audiotok[metrics]', or set "
                "validation.intelligibility=false."
            )
        self.clips, self.sampling_rate, self.intelligibility = clips, sampling_rate, intelligibility

    @torch.inference_mode()
    def __call__(self, model: AudioCodec, quantizes: bool) -> tuple[dict[str, float], list[Tensor]]:
        """(figures by column, reconstructions `[1, 1, N]` on the CPU). Without `quantizes` no code is searched."""
        scores: list[dict[str, float]] = []
        codes, outputs = [], []
        for audio, domain, codec_domain in self.clips:
            noise = None if quantizes else torch.zeros(1, device=model.device)
            out = model(audio.to(model.device), **forward_options(model, [codec_domain], noise))
            outputs.append(out.audio_values.float().cpu())
            scores.append(self._scores(audio, outputs[-1], domain))
            if quantizes:
                first_book = out.audio_codes if model.facts.shared_codebook else out.audio_codes[:, 0]
                codes.append(first_book.flatten().cpu())
        figures = {name: _mean(scores, name) for name in COLUMNS if any(name in row for row in scores)}
        if quantizes:
            use = codebook_use(torch.cat(codes), model.facts.codebook_sizes[0])
            figures |= {"distinct_codes": use.distinct, "code_entropy_bits": use.entropy_bits}
        return figures, outputs

    def _scores(self, target: Tensor, output: Tensor, domain: str) -> dict[str, float]:
        speech = self.intelligibility and domain == "speech"
        names = (*SOUND_METRICS, *(SPEECH_METRICS if speech else ()))
        return compare(target.flatten(), output.flatten(), self.sampling_rate, names)


def _mean(scores: list[dict[str, float]], name: str) -> float:
    return float(np.mean([row[name] for row in scores if name in row]))
