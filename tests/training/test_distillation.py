"""Distillation: a teacher's states guide the codec's, and the teacher stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.helpers import run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random HuBERT of a few thousand parameters, saved as a hub folder."""
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8, 8),
        conv_stride=(5, 8, 8), conv_kernel=(10, 8, 8), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    HubertModel(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(path)
    return path


def distil(teacher: Path) -> list[str]:
    weights = "{mel: 1.0, distillation: 1.0}"
    return [
        f"distillation={{teachers: {{speech: {{model: '{teacher}', layer: 1}}}}}}",
        f"stages.joint.loss_weights={weights}",
        "stages.continuous.steps=1",
    ]


def test_distillation_teaches_and_keeps_the_teacher_frozen(folder: Path, cache: Path, tmp_path: Path, teacher: Path):
    trainer = run(folder, cache, tmp_path, *distil(teacher), max_steps=4)
    comparison = trainer.distillation.comparison
    frozen = comparison.teachers["speech"]
    assert not frozen.model.training
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert [name for name, _ in comparison.named_parameters()] == ["maps.speech.weight", "maps.speech.bias"]
    state = torch.randn(2, 12, 16, requires_grad=True)
    audio = 0.1 * torch.randn(2, 1, 4000)
    comparison(state, audio, ["speech", "music"]).backward()
    assert state.grad[0].abs().sum() > 0
    assert state.grad[1].abs().sum() == 0  # a domain without a teacher
    assert comparison(state, audio, ["music", "music"]) == 0
    assert len(trainer.report.training.series("distillation")[1]) > 0


def test_distillation_resumes(folder: Path, cache: Path, tmp_path: Path, teacher: Path):
    whole = run(folder, cache, tmp_path / "whole", *distil(teacher), max_steps=4)
    run(folder, cache, tmp_path / "parts", *distil(teacher), max_steps=2)
    parts = run(folder, cache, tmp_path / "parts", *distil(teacher), resume=True, max_steps=4)
    for name in ("codec", "distillation"):
        modules = [getattr(t, name) if name == "codec" else t.distillation.comparison for t in (whole, parts)]
        states = [m.state_dict() for m in modules]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
