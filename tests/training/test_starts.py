"""Starts that spare training hours: lapped transforms as strides, residual books fitted to latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from audiotok import ApCodecConfig, ApCodecModel, VrvqConfig, VrvqModel
from audiotok.errors import ConfigError, OptionError
from audiotok.quantizers.vector import ResidualVectorQuantizer
from audiotok.recipes.training.lapped_start import check_lapped, lapped_basis, lapped_start
from audiotok.recipes.training.losses import waveform_error
from audiotok.recipes.training.residual_books import check_fittable, fit_residual_books
from training.helpers import CONFIGS, run

SIZES = {"sampling_rate": 16000, "num_codebooks": 4, "codebook_size": 64, "importance_channels": [16]}
WIDE = {**SIZES, "encoder_hidden_size": 16, "decoder_hidden_size": 128}


def low_passed_noise(clips: int, samples: int) -> Tensor:
    """Noise whose upper half is 40 dB down, as recordings are."""
    noise = torch.randn(clips, 1, samples, generator=torch.Generator().manual_seed(0))
    return 0.1 * F.avg_pool1d(noise, 9, 1, 4)


def vrvq(**keys: object) -> VrvqModel:
    torch.manual_seed(0)
    return VrvqModel(VrvqConfig(**keys)).eval()


@torch.no_grad()
def error_without_codes(codec: VrvqModel, audio: Tensor) -> float:
    out = codec(audio, latent_noise=torch.zeros(len(audio)))
    return waveform_error(out.audio_values, audio).item()


@pytest.mark.parametrize("bands", [2, 4, 8])
def test_basis_is_orthonormal_with_itself_and_with_its_neighbours(bands: int):
    basis = lapped_basis(bands)
    torch.testing.assert_close(basis @ basis.T, torch.eye(bands), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis[:, bands:] @ basis[:, :bands].T, torch.zeros(bands, bands), atol=1e-6, rtol=0)


def test_lapped_start_gives_back_what_there_is_room_for():
    """16 channels doubled twice, with strides of 2 and 4: 64 channels, 8 of which would do."""
    codec, audio = vrvq(**WIDE, downsampling_ratios=[2, 4], upsampling_ratios=[4, 2]), low_passed_noise(4, 4096)
    assert error_without_codes(codec, audio) > 0.9
    lapped_start(codec, audio)
    assert error_without_codes(codec, audio) < 0.3


def test_lapped_start_keeps_the_channels_with_most_energy():
    """8 latents for 16 samples: half of the bands go, and with them the part of the noise that is hardly there."""
    keys = {**SIZES, "encoder_hidden_size": 2, "decoder_hidden_size": 64}
    codec = vrvq(**keys, downsampling_ratios=[4, 4], upsampling_ratios=[4, 4])
    audio = low_passed_noise(4, 4096)
    lapped_start(codec, audio)
    assert error_without_codes(codec, audio) < 0.35
    assert error_without_codes(codec, torch.randn(4, 1, 4096) * 0.1) > 0.5  # what it was not told to keep


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (lambda: vrvq(**WIDE, downsampling_ratios=[2, 4], upsampling_ratios=[2, 4]), "backwards"),
        (lambda: vrvq(**WIDE, downsampling_ratios=[2, 3], upsampling_ratios=[3, 2]), "even strides"),
        (
            lambda: vrvq(
                **SIZES,
                encoder_hidden_size=32,
                decoder_hidden_size=64,
                downsampling_ratios=[2, 2],
                upsampling_ratios=[2, 2],
            ),
            "no less than the 128",
        ),
        (lambda: torch.nn.Linear(2, 2), "not for Linear"),
    ],
)
def test_lapped_start_refuses_what_it_does_not_know(codec, message: str):
    with pytest.raises(ConfigError, match=message):
        check_lapped(codec())


@pytest.fixture
def latents() -> Tensor:
    """Directions around 16 centres in 6 of 24 dimensions, of many lengths."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(16, 6, generator=generator)
    chosen = centres[torch.randint(16, (4000,), generator=generator)]
    plane = torch.linalg.qr(torch.randn(24, 6, generator=generator))[0]
    return (chosen + 0.1 * torch.randn(4000, 6, generator=generator)) @ plane.T


@pytest.mark.parametrize("project", [True, False])
def test_every_stage_leaves_less(latents: Tensor, project: bool):
    quantizer = ResidualVectorQuantizer(24, [32, 32, 32], 6 if project else 24, project=project)
    left = fit_residual_books(quantizer, latents, 6, seed=0)
    assert left[0] < 0.1  # 32 rows for 16 centres
    assert left == sorted(left, reverse=True)
    with torch.no_grad():
        found = quantizer(latents.T[None]).quantized[0].T
    assert (found - latents).square().sum() / latents.square().sum() == pytest.approx(left[-1], rel=1e-3)


def test_more_rows_than_directions_leaves_no_row_without_a_length(latents: Tensor):
    quantizer = ResidualVectorQuantizer(24, [64], 6)
    fit_residual_books(quantizer, latents[:20], 2, seed=0)
    assert (quantizer.in_order[0].codebook.weight.norm(dim=1) > 0).all()


def test_only_residual_quantizers_by_direction_are_fitted():
    for options in ({"cosine": False}, {"normalize_latents": True}):
        with pytest.raises(ConfigError, match="leave it out"):
            check_fittable(ResidualVectorQuantizer(8, [4], 4, **options))
    check_fittable(ApCodecModel(ApCodecConfig(num_codebooks=2, trunk_size=16, intermediate_size=16)).quantizer)


def test_a_run_starts_lapped_fits_its_books_and_freezes_parts(folder: Path, cache: Path, tmp_path: Path):
    """From the YAML that is bundled, at a smaller width; a resumed run neither starts nor fits again."""
    keys = (
        "{sampling_rate: 16000, encoder_hidden_size: 8, downsampling_ratios: [4, 4, 4, 4], decoder_hidden_size: 128, "
        "upsampling_ratios: [4, 4, 4, 4], num_codebooks: 8, codebook_size: 128, importance_channels: [16]}"
    )
    settings = [
        f"codec.config={keys}", "stages.whole.steps=2", "stages.joint.steps=2",
        "data.batch_size=4", "codebook.fit_frames=3000", "validation.intelligibility=false", "validation.clips=2",
        "log_every=1",
    ]  # fmt: skip
    config = CONFIGS / "vrvq_mini.yaml"
    trainer = run(folder, cache, tmp_path / "run", *settings, config=config, max_steps=3)
    assert error_without_codes(trainer.codec, low_passed_noise(4, 4096)) < 0.6  # random weights give more than 1
    assert trainer.progress.fitted_stages == ["whole"]
    books = trainer.average.module.quantizer.state_dict()
    fresh = trainer.codec.quantizer.state_dict()
    assert all((books[key] - fresh[key]).abs().max() < 0.05 for key in books)  # the average has the fitted books
    frozen = {name: value.clone() for name, value in trainer.codec.encoder.state_dict().items()}
    resumed = run(folder, cache, tmp_path / "run", *settings, config=config, resume=True)
    whole = run(folder, cache, tmp_path / "whole", *settings, config=config)
    for key, value in whole.codec.state_dict().items():
        assert torch.equal(value, resumed.codec.state_dict()[key]), key
    assert all(torch.equal(value, resumed.codec.encoder.state_dict()[name]) for name, value in frozen.items())
    assert not torch.equal(trainer.codec.decoder.conv_in.weight_v, resumed.codec.decoder.conv_in.weight_v)


def test_parts_that_are_not_there_cannot_be_frozen(folder: Path, cache: Path, tmp_path: Path):
    with pytest.raises(OptionError, match="encodder"):
        run(folder, cache, tmp_path / "run", "stages.joint.frozen=[encodder]")
