"""Whole runs of a tiny codec, in this process."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from audiotok import AuvModel
from audiotok.errors import CheckpointError, CheckpointNotFoundError, OptionError, OutputExistsError
from audiotok.recipes import train_codec
from audiotok.recipes.train_codec import CodecTrainer
from audiotok.recipes.training.codebook import MovingAverageBook
from audiotok.recipes.training.latents import collect_latents
from training.helpers import run

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def finished(folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CodecTrainer, Tensors]:
    trainer = run(folder, cache, tmp_path_factory.mktemp("undisturbed"), "validation.samples_every=10")
    return trainer, {key: value.clone() for key, value in everything(trainer).items()}


@pytest.fixture(scope="module")
def undisturbed(finished: tuple[CodecTrainer, Tensors]) -> CodecTrainer:
    return finished[0]


def everything(trainer: CodecTrainer) -> Tensors:
    """All tensors that a run ends with, and the state of the generator."""
    parts = {
        "random": {"state": torch.get_rng_state()},
        "codec": trainer.codec.state_dict(),
        "average": trainer.average.module.state_dict(),
        "book": {"sums": trainer.book.sums, "unseen": trainer.book.unseen},
        "discriminators": trainer.adversary.discriminators.state_dict(),
    }
    for name, optimizer in (("optimizer", trainer.optimizer), ("judge", trainer.adversary.optimizer)):
        parts[name] = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}


@pytest.mark.parametrize("stop", [2, 5, 8])  # inside each stage: before the fit, after it, with discriminators
def test_ten_steps_are_the_same_in_one_go_and_in_two(
    folder: Path, cache: Path, tmp_path: Path, finished: tuple[CodecTrainer, Tensors], stop: int
):
    undisturbed, outcome = finished
    run(folder, cache, tmp_path, max_steps=stop)
    torch.manual_seed(99)
    resumed = run(folder, cache, tmp_path, resume=True)
    found = everything(resumed)
    assert found.keys() == outcome.keys()
    assert not [key for key in outcome if not torch.equal(outcome[key], found[key])]
    assert resumed.progress.best_score == undisturbed.progress.best_score


def test_a_run_leaves_weights_tables_curves_and_samples(undisturbed: CodecTrainer):
    output = undisturbed.output
    for name in ("best", "ema"):
        model = AuvModel.from_pretrained(output / name)
        assert torch.allclose(model.codebook_embeddings()[0].norm(dim=1), torch.ones(64), atol=1e-5)
    saved = AuvModel.from_pretrained(output / "ema").state_dict()
    assert all(torch.equal(saved[k], v) for k, v in undisturbed.average.module.state_dict().items())
    with (output / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "5", "7", "10"]
    assert rows[0]["distinct_codes"] == "" and int(rows[1]["distinct_codes"]) > 1
    assert all(np.isfinite(float(row["mel_distance"])) and row["level_ratio_db"] for row in rows)
    assert (output / "curves.png").stat().st_size > 1000
    assert (output / "samples" / "step_0000010" / "spectrograms.png").is_file()
    assert list((output / "samples" / "step_0000010").glob("*_decoded.flac"))
    assert not list(output.glob("*.unfinished")) and not list(output.glob("*.old"))


def test_training_moves_every_part_of_the_codec(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(folder, cache, tmp_path, max_steps=1)
    torch.manual_seed(0)
    fresh = AuvModel(trainer.codec.config).state_dict()
    trained = {name for name, p in trainer.codec.named_parameters() if p.requires_grad}
    still = [k for k in trained if torch.equal(fresh[k], trainer.codec.state_dict()[k])]
    assert not still


def test_the_book_is_fitted_once(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(train_codec, "collect_latents", lambda *given: calls.append(given) or collect_latents(*given))
    run(folder, cache, tmp_path, max_steps=5)
    run(folder, cache, tmp_path, resume=True, max_steps=7)
    assert len(calls) == 1


def test_the_mel_loss_falls(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(folder, cache, tmp_path, "stages.continuous.steps=24", "log_every=6", max_steps=24)
    _, mel = trainer.report.training.series("mel")
    assert mel[-1] < 0.9 * mel[0]


def test_domain_labels_drive_the_search(folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In training, speech teaches the first 32 rows only, and other domains the rest too."""
    codes: dict[str, list[int]] = {"speech": [], "music": [], "audio": []}
    update = MovingAverageBook.update

    def watch(book: MovingAverageBook, latents: Tensor, found: Tensor, domains: list[str], revive: bool) -> None:
        for domain, row in zip(domains, found, strict=True):
            codes[domain] += row.tolist()
        update(book, latents, found, domains, revive)

    monkeypatch.setattr(MovingAverageBook, "update", watch)
    run(folder, cache, tmp_path, max_steps=7)
    assert max(codes["speech"]) < 32
    assert max(codes["music"] + codes["audio"]) >= 32


def test_accumulated_gradients_and_a_gradient_trained_book(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(
        folder, cache, tmp_path,
        "gradient_accumulation=2", "codebook.update=gradient", "stages.joint.fit_codebook=false",
        "stages.joint.loss_weights={mel: 1.0, commitment: 0.25, codebook: 1.0}", max_steps=5,
    )  # fmt: skip
    assert trainer.book is None
    assert trainer.progress.audio_seconds == 5 * 2 * 4 * 0.25
    assert trainer.codec.quantizer.stages[0].codebook.weight.requires_grad


def test_bfloat16_runs(folder: Path, cache: Path, tmp_path: Path):
    trainer = run(folder, cache, tmp_path, "mixed_precision=bf16", max_steps=9)  # into the adversarial stage
    assert trainer.progress.step == 9
    assert all(p.dtype == torch.float32 for p in trainer.codec.parameters())


def test_runs_are_not_overwritten_nor_resumed_from_nothing_nor_with_another_codec(
    folder: Path, cache: Path, tmp_path: Path, undisturbed: CodecTrainer
):
    with pytest.raises(OutputExistsError, match="--resume"):
        run(folder, cache, undisturbed.output)
    with pytest.raises(CheckpointNotFoundError, match="without --resume"):
        run(folder, cache, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="hidden_size"):
        run(folder, cache, undisturbed.output, "codec.config.hidden_size=24", resume=True)


def test_a_run_that_died_between_two_renames_resumes(folder: Path, cache: Path, tmp_path: Path):
    run(folder, cache, tmp_path, max_steps=2)
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert run(folder, cache, tmp_path, resume=True, max_steps=3).progress.step == 3


def test_unknown_domains_of_the_codec_are_refused(folder: Path, cache: Path, tmp_path: Path):
    with pytest.raises(OptionError, match='Did you mean "music"'):
        run(folder, cache, tmp_path, "data.domains.music=musik")
