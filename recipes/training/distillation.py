"""Teachers: frozen transformers models whose features the codec's decoder state learns to predict, per domain, or a
frozen codec of the same family whose states the codec's own learn to equal.

AUV (Chen et al., arXiv 2509.21968) distils one teacher a domain into its decoder. Which layers, projections and
weights were used is not published; here a linear map per domain and 1 - cosine similarity are used.
"""

from __future__ import annotations

import soxr
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel

from audiotok import AudioCodec, AutoAudioTokenizer
from audiotok.errors import ConfigError
from audiotok.recipes.training.config import DistillationSection, TeacherSection


class Teacher(nn.Module):
    """A frozen transformers audio model with its feature extractor: `[B, N]` -> a hidden state `[B, frames, D]`.

    Args:
        section: the model (folder or hub name) and the index of its hidden state.
        sampling_rate: of the waveforms; resampled to the rate that the teacher's feature extractor names.
    """

    def __init__(self, section: TeacherSection, sampling_rate: int) -> None:
        super().__init__()
        self.extractor = AutoFeatureExtractor.from_pretrained(section.model)
        self.model = AutoModel.from_pretrained(section.model).eval().requires_grad_(False)
        self.layer, self.sampling_rate = section.layer, sampling_rate

    @property
    def num_features(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        waves, rate = audio.float().cpu().numpy(), self.extractor.sampling_rate
        if rate != self.sampling_rate:
            waves = soxr.resample(waves.T, self.sampling_rate, rate).T
        inputs = self.extractor(list(waves), sampling_rate=rate, return_tensors="pt").to(audio.device)
        return self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]


class TeacherComparison(nn.Module):
    """1 - cosine between the linearly mapped state of the codec and the features of each clip's teacher.

    Only the maps are trained; they belong to the training state, not to the codec.
    """

    def __init__(self, teachers: dict[str, Teacher], num_features: int) -> None:
        super().__init__()
        self.teachers = teachers  # a plain dict: the frozen models stay out of the checkpoints
        self.maps = nn.ModuleDict({name: nn.Linear(num_features, t.num_features) for name, t in teachers.items()})

    def forward(self, state: Tensor, audio: Tensor, domains: list[str]) -> Tensor:
        """`state` `[B, T, D]`, `audio` `[B, 1, N]`; clips of a domain without a teacher count nothing."""
        similarities = []
        for name, teacher in self.teachers.items():
            clips = [i for i, domain in enumerate(domains) if domain == name]
            if clips:
                wanted = _resampled_frames(teacher(audio[clips, 0]), state.shape[1])
                got = self.maps[name](state[clips])
                similarities.append(F.cosine_similarity(got.float(), wanted.float(), dim=-1).flatten())
        if not similarities:
            return state.sum() * 0.0
        return 1 - torch.cat(similarities).mean()


def _resampled_frames(features: Tensor, num_frames: int) -> Tensor:
    """`[B, frames, D]` -> `[B, num_frames, D]` by linear interpolation in time."""
    moved = F.interpolate(features.transpose(1, 2), num_frames, mode="linear", align_corners=False)
    return moved.transpose(1, 2)


def load_codec_teacher(name: str, student: AudioCodec) -> AudioCodec:
    """The frozen codec of a folder or name, on the student's device.

    Raises:
        ConfigError: it is of another family, or what the student's `distillation_targets` says.
    """
    teacher = AutoAudioTokenizer.from_pretrained(name, device=student.device).codec
    if type(teacher) is not type(student):
        raise ConfigError(
            f"distillation.codec={name} is of class {type(teacher).__name__}: it must be a {type(student).__name__}."
        )
    student.distillation_targets(teacher, torch.zeros(1, 1, student.facts.hop_length, device=student.device))
    return teacher.requires_grad_(False)


class Distillation:
    """The teachers, and the maps with their optimizer."""

    def __init__(
        self, config: DistillationSection, accelerator: Accelerator, num_features: int, sampling_rate: int
    ) -> None:
        teachers = {
            name: Teacher(section, sampling_rate).to(accelerator.device) for name, section in config.teachers.items()
        }
        comparison = TeacherComparison(teachers, num_features)
        optimizer = torch.optim.AdamW(comparison.maps.parameters(), fused=True)
        self.comparison, self.optimizer = accelerator.prepare(comparison, optimizer)

    def update(self, learning_rate: float) -> None:
        """After the backward pass of a loss that holds the comparison."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
