"""The training recipe and every family: each bundled YAML, with a codec of some thousand parameters, learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conformance.codecs_table import APCODEC, APCODEC_CAUSAL, MELCAP, QINCO2, QINCODEC, VRVQ

from audiotok import ApCodecAudioTokenizer, ApCodecConfig, ApCodecModel, AutoAudioTokenizer
from training.helpers import CONFIGS, run

CENTRED = {**APCODEC, "response_norm": False, "num_hidden_layers": 1}
# YAML → the keys of a tiny codec, and the stage that is shown to learn.
TINY_CODECS: dict[str, tuple[dict[str, Any], str]] = {
    "vrvq_mini": ({**VRVQ, "decoder_hidden_size": 32, "level_min": 0.5, "level_max": 2.0}, "joint"),
    "apcodec_mini": (CENTRED, "joint"),
    "apcodec_causal_mini": ({**APCODEC, **APCODEC_CAUSAL}, "joint"),
    "melcap_mini": ({**MELCAP, "normalize_latents": True}, "joint"),
    "qincodec_vocos": ({**QINCODEC, "sampling_rate": 8000, "quantizer": QINCO2}, "autoencoder"),
}
STEPS = 300


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_CODECS)
def test_each_yaml_trains(name: str, folder: Path, cache: Path, tmp_path: Path) -> None:
    keys, stage = TINY_CODECS[name]
    torch.manual_seed(0)
    ApCodecAudioTokenizer(ApCodecModel(ApCodecConfig(**CENTRED))).save_pretrained(tmp_path / "teacher")
    others = [s["name"] for s in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["stages"] if s["name"] != stage]
    trainer = run(
        folder,
        cache,
        tmp_path / "run",
        f"codec.config={yaml.safe_dump(keys, default_flow_style=True).strip()}",
        *(["distillation.codec=" + str(tmp_path / "teacher")] if "causal" in name else []),
        *(f"stages.{other}.steps={5 if other in ('continuous', 'whole') else 0}" for other in others),
        f"stages.{stage}.steps={STEPS}",
        "data.crop_seconds=0.25",
        "data.batch_size=4",
        "validation.every_steps=150",
        "validation.clips=3",
        "validation.intelligibility=false",
        "codebook.fit_frames=2000",
        "log_every=1",
        config=CONFIGS / f"{name}.yaml",
    )
    losses = np.array(trainer.report.training.series("mel")[1][-STEPS:])
    assert np.isfinite(losses).all()
    assert losses[-50:].mean() < 0.9 * losses[:20].mean()
    assert AutoAudioTokenizer.from_pretrained(tmp_path / "run" / "ema").codec.facts == trainer.codec.facts
