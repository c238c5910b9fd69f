"""QINCo2 fitted to the latents of a codec: what a run leaves behind, stopped anywhere and continued, and refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import typer
from qincodec_cases import auv

from audiotok import AutoAudioTokenizer, AuvAudioTokenizer, QinCodecModel
from audiotok.errors import CheckpointError, CheckpointNotFoundError, OptionError, OutputExistsError
from audiotok.quantizers import ResidualQuantizer, fit_residual_quantizer
from audiotok.recipes import fit_quantizer
from audiotok.recipes.training.corpus import open_corpus
from audiotok.recipes.training.latent_store import LatentStore, clip_latents
from audiotok.recipes.training.quantizer_comparison import Contender, compare_quantizers, rate_table, step_table

RATE = 16000
SMALL: dict[str, Any] = {
    "codes": 2,
    "codebook_size": 16,
    "num_blocks": 1,
    "embedding_dim": 12,
    "hidden_dim": 16,
    "beam": 3,
    "candidates": 8,
    "fitting_beam": 2,
    "fitting_candidates": 4,
    "epochs": 4,
    "batch_size": 64,
    "held_out": 0.4,
    "test_clips": 2,
    "test_seconds": 0.5,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty clips of ten speakers: tones of changing pitch in noise."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    lines = ["file_name,domain,speaker"]
    for number in range(20):
        time = np.arange(int(RATE * (0.6 + 0.1 * (number % 5)))) / RATE
        pitch = 150 + 40 * number + 60 * np.sin(2 * np.pi * (1 + number % 3) * time)
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.03 * rng.standard_normal(len(time))
        soundfile.write(folder / f"{number}.flac", wave, RATE)
        lines.append(f"{number}.flac,speech,{number // 2}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-auv"
    AuvAudioTokenizer(auv(), name="tiny-auv").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(corpus: Path, model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    fit_quantizer.run(str(model), corpus, output, cache=cache, **SMALL)
    return output


# A whole run


def test_a_run_leaves_a_tokenizer_and_a_report(finished: Path, model: Path) -> None:
    tok, source = AutoAudioTokenizer.from_pretrained(finished / "tokenizer"), AutoAudioTokenizer.from_pretrained(model)
    assert type(tok).__name__ == "QinCodecAudioTokenizer"
    assert tok.codec.facts.codebook_sizes == (16, 16)
    assert tok.sampling_rate == source.sampling_rate
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(9000) / RATE).astype(np.float32)
    encoded = tok(wave, RATE)
    assert tok.decode(encoded.input_ids, encoded.audio_lengths).shape == (1, 9000)
    with torch.inference_mode():  # the autoencoder is the source's, tensor by tensor
        theirs = source.codec.state_dict()
        assert all(torch.equal(tok.codec.autoencoder.codec.state_dict()[key], theirs[key]) for key in theirs)
    names = {path.name for path in finished.iterdir()}
    assert {"plan.json", "state.pt", "report.json", "report.md", "curves.csv", "curves.png", "latents"} <= names
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_compares_equal_bits(finished: Path) -> None:
    found = json.loads((finished / "report.json").read_text())["comparison"]
    outcomes = found["outcomes"]
    assert {outcome["codes"] for outcome in outcomes} == {1, 2}
    for outcome in outcomes:
        assert outcome["kilobits"] == pytest.approx(outcome["codes"] * 4 * 50 / 1000)
        assert len(outcome["mse_per_step"]) == outcome["codes"]
        assert outcome["encode_ms"] > 0
    names = [outcome["contender"] for outcome in outcomes if outcome["codes"] == 2]
    assert len(names) == len(set(names)) == 8
    assert {"RQ, greedy", "RQ, beam 3", "RQ fitted with a beam, beam 12", "QINCo2, beam 1", "QINCo2, beam 3"} <= set(
        names
    )
    assert found["own"][0].endswith("tiny-auv")
    with (finished / "curves.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert [line["quantizer"] for line in curve[:2]] == ["not quantized", f"{found['own'][0]}, its own codes"]
    points = [(line["quantizer"], int(line["codes"]), float(line["mel_distance"])) for line in curve[2:]]
    assert points == [(outcome["contender"], outcome["codes"], outcome["mel"]) for outcome in outcomes]
    text = (finished / "report.md").read_text()
    assert "not quantized" in text and "QINCo2, beam 3" in text and "mel distance" in text


def test_nothing_is_fitted_to_what_is_tested(finished: Path) -> None:
    """Speakers of the training, validation and test clips are others."""
    speakers = []
    for name in ("training", "validation"):
        lines = (finished / "latents" / name / "clips.jsonl").read_text().splitlines()[1:]
        speakers.append({int(Path(json.loads(line)["file_name"]).stem) // 2 for line in lines})
    assert all(speakers)
    assert not speakers[0] & speakers[1]
    assert len(speakers[0] | speakers[1]) < 10


def test_the_plain_baseline_as_a_tokenizer(corpus: Path, model: Path, cache: Path, tmp_path: Path) -> None:
    fit_quantizer.run(str(model), corpus, tmp_path / "rq", cache=cache, kind="rq", rate=[2], **SMALL)
    tok = AutoAudioTokenizer.from_pretrained(tmp_path / "rq" / "tokenizer")
    assert isinstance(tok.codec.quantizer, ResidualQuantizer)
    assert not (tmp_path / "rq" / "state.pt").exists()


def test_a_qincodec_gets_another_quantizer(corpus: Path, finished: Path, cache: Path, tmp_path: Path) -> None:
    source = finished / "tokenizer"
    fit_quantizer.run(str(source), corpus, tmp_path / "x", cache=cache, **{**SMALL, "codes": 3, "epochs": 1})
    tok = AutoAudioTokenizer.from_pretrained(tmp_path / "x" / "tokenizer")
    assert tok.codec.facts.codebook_sizes == (16, 16, 16)
    assert json.loads((tmp_path / "x" / "report.json").read_text())["comparison"]["own"] is None


# Stopped and continued


@pytest.mark.parametrize("where", ["encoding", "tables", "training"])
def test_a_stopped_run_goes_on_to_the_same_result(
    where: str, corpus: Path, model: Path, cache: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def interrupt(at: int) -> None:
        seen.append(at)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "encoding":
            module, name = "audiotok.recipes.training.latent_store", "clip_latents"
        elif where == "tables":
            module, name = "audiotok.quantizers.residual_kmeans", "kmeans_table"
        else:
            module, name = "audiotok.quantizers.implicit_fit", "replace_codes"
        real = getattr(sys.modules[module], name)
        patch.setattr(f"{module}.{name}", lambda *args, **more: (interrupt(0), real(*args, **more))[1])
        with pytest.raises(typer.Exit) as stopped:
            fit_quantizer.run(str(model), corpus, tmp_path / "x", cache=cache, **SMALL)
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "x" / "tokenizer").exists()
    fit_quantizer.run(str(model), corpus, tmp_path / "x", cache=cache, resume=True, **SMALL)
    found, expected = (
        json.loads((folder / "tokenizer" / "audio_tokenizer.json").read_text())["fingerprint"]
        for folder in (tmp_path / "x", finished)
    )
    assert found == expected


def test_a_paused_run_is_compared_as_it_stands(
    corpus: Path, model: Path, cache: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And trained no further; later it goes on to the result of an undisturbed run."""
    output, runs = tmp_path / "x", {"cache": cache, **SMALL}
    fit_quantizer.run(str(model), corpus, output, until=2, **runs)
    paused = torch.load(output / "state.pt", weights_only=True)
    assert len(paused["history"]) == 1 + 2
    with monkeypatch.context() as patch:
        patch.setattr("audiotok.quantizers.implicit_fit._Run.epoch", lambda run: pytest.fail("trained"))
        fit_quantizer.run(str(model), corpus, output, resume=True, until=1, **runs)
    tok = AutoAudioTokenizer.from_pretrained(output / "tokenizer")
    for key, tensor in tok.codec.quantizer.state_dict().items():
        assert torch.equal(tensor, paused["best"][key]), key
    fit_quantizer.run(str(model), corpus, output, resume=True, **runs)
    fingerprints = {AutoAudioTokenizer.from_pretrained(run / "tokenizer").fingerprint for run in (output, finished)}
    assert len(fingerprints) == 1


def test_runs_are_not_mixed(corpus: Path, model: Path, cache: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="--resume"):
        fit_quantizer.run(str(model), corpus, finished, cache=cache, **SMALL)
    with pytest.raises(CheckpointError, match="other values of quantizer"):
        fit_quantizer.run(str(model), corpus, finished, cache=cache, resume=True, **{**SMALL, "hidden_dim": 8})
    with pytest.raises(CheckpointNotFoundError, match="start without --resume"):
        fit_quantizer.run(str(model), corpus, tmp_path / "none", cache=cache, resume=True, **SMALL)
    with pytest.raises(OptionError, match=r"--rate \[5\].*1 to 2"):
        fit_quantizer.run(str(model), corpus, tmp_path / "new", cache=cache, rate=[5], **SMALL)
    with pytest.raises(OptionError, match="raise --held-out"):
        fit_quantizer.run(str(model), corpus, tmp_path / "other", cache=cache, **{**SMALL, "held_out": 0.0})


def test_help_shows_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "audiotok.recipes.fit_quantizer", "--help"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0
    for word in ("Examples", "audiotok/auv-mini --data corpus", "--resume", "--beam", "--epochs"):
        assert word in done.stdout


# The store of latents


@pytest.fixture
def codec() -> QinCodecModel:
    return QinCodecModel.around(auv(), {"type": "rq", "num_quantizers": 2, "codebook_size": 16})


def test_the_store_holds_the_latents_of_each_clip(
    corpus: Path, cache: Path, codec: QinCodecModel, tmp_path: Path
) -> None:
    clips = open_corpus(corpus, cache, RATE, {})
    store = LatentStore(tmp_path / "store", {"codec": "a"})
    vectors = store.collect(codec, clips, clips.clips, lambda items, _: items)
    lines = [json.loads(line) for line in (tmp_path / "store" / "clips.jsonl").read_text().splitlines()[1:]]
    assert len(vectors) == sum(codec.facts.num_frames(clip.length) for clip in clips.clips)
    assert sorted(line["file_name"] for line in lines) == sorted(clip.file_name for clip in clips.clips)
    assert [line["file_name"] for line in lines] != [clip.file_name for clip in clips.clips], "the order is mixed"
    start = 0
    for line in lines:
        clip = next(clip for clip in clips.clips if clip.file_name == line["file_name"])
        alone = clip_latents(codec, clips.audio(clip))
        np.testing.assert_array_equal(vectors[start : start + len(alone)], alone)
        start += len(alone)
    again = store.collect(codec, clips, clips.clips, lambda items, _: pytest.fail("nothing is missing"))
    np.testing.assert_array_equal(again, vectors)


@pytest.mark.parametrize("damage", ["a vector without its line", "half a vector", "half a line"])
def test_what_was_half_written_is_written_again(
    damage: str, corpus: Path, cache: Path, codec: QinCodecModel, tmp_path: Path
) -> None:
    clips = open_corpus(corpus, cache, RATE, {})
    expected = LatentStore(tmp_path / "whole", {}).collect(codec, clips, clips.clips, lambda items, _: items)
    store = LatentStore(tmp_path / "store", {})

    def stop(items: list[Any], _: str) -> Any:
        yield from items[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.collect(codec, clips, clips.clips, stop)
    if damage == "half a line":
        text = store.clips_file.read_text()
        store.clips_file.write_text(text[:-5])
    else:
        with store.vectors_file.open("ab") as file:
            file.write(b"\x01" * (32 if damage == "a vector without its line" else 5))
    np.testing.assert_array_equal(store.collect(codec, clips, clips.clips, lambda items, _: items), expected)


def test_a_store_of_another_codec_is_refused(corpus: Path, cache: Path, codec: QinCodecModel, tmp_path: Path) -> None:
    clips = open_corpus(corpus, cache, RATE, {})
    LatentStore(tmp_path, {"codec": "a"}).collect(codec, clips, clips.clips[:2], lambda items, _: items)
    for about, some in (({"codec": "b"}, clips.clips[:2]), ({"codec": "a"}, clips.clips[:3])):
        with pytest.raises(CheckpointError, match="another codec or other clips"):
            LatentStore(tmp_path, about).collect(codec, clips, some, lambda items, _: items)


# The comparison


def test_figures_of_the_comparison_are_those_of_the_tokenizer(codec: QinCodecModel, corpus: Path, cache: Path) -> None:
    """The same audio comes out of `encode` and `decode` of the codec that holds the quantizer."""
    clips = open_corpus(corpus, cache, RATE, {})
    waves = [clips.audio(clip) for clip in clips.clips[:2]]
    latents = torch.cat([torch.from_numpy(clip_latents(codec, wave)) for wave in waves])
    fit_residual_quantizer(codec.quantizer, latents)
    contender = Contender("RQ", codec.quantizer, {"beam_size": 2})
    found = compare_quantizers(codec, [contender], [1, 2], waves, None, lambda items, _: items)
    for outcome in found.outcomes:
        errors, distances = [], []
        for wave in waves:
            value, mask = torch.from_numpy(wave)[None, None], torch.ones(1, len(wave), dtype=torch.long)
            output = codec.encode(value, mask, beam_size=2, num_quantizers=outcome.codes)
            decoded = codec.decode(output)[0, 0].detach().numpy()
            distances.append(fit_quantizer_mel(wave, decoded))
            vectors = codec.quantizer.decode(output.audio_codes[0].T)
            errors.append((vectors - codec.latents(value, mask)[0].T).square().flatten().detach())
        assert outcome.mse_per_step[-1] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-4)
        assert outcome.mel == pytest.approx(np.mean(distances), rel=1e-4)
    assert found.outcomes[1].mse_per_step[1] < found.outcomes[0].mse_per_step[0]
    assert [row[1] for row in rate_table(found).rows] == ["–", "1", "2"]
    assert step_table(found).rows[0][0] == "RQ"


def fit_quantizer_mel(reference: np.ndarray, decoded: np.ndarray) -> float:
    from audiotok.metrics import mel_distance

    return mel_distance(reference, decoded, RATE)
