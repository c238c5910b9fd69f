"""The benchmark runs in seconds with tiny settings, its rival is right, and what it says can be parsed."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conformance.codecs_table import PUBLISHED, clip, shared_codec, tokenizer_of
from typer.testing import CliRunner

from audiotok import AuvAudioTokenizer, AuvConfig
from audiotok.errors import AudioInputError, CheckpointNotFoundError, OptionError, OutputExistsError
from audiotok.recipes import benchmark as bench
from audiotok.recipes import measure_margins as margins
from audiotok.recipes.benchmark_measures import (
    encode_alone,
    measure_codec,
    measure_in_turn,
    measure_layouts,
    measure_memory,
    measure_precision,
    peak_memory,
)
from audiotok.recipes.benchmark_models import cut_to_equal, draw_codec, load_tokenizer, recorded_clips, synthetic_clips
from audiotok.recipes.plain.auv import PlainAuv

TINY = str(Path(bench.__file__).parent / "configs" / "auv_tiny_test.yaml")
HEADS = {"num_layers": 2, "num_attention_heads": 3, "head_dim": 8, "conv_kernel_size": 7}
SMALL = {"sampling_rate": 8000, "hop_length": 20, "hidden_size": 32, "codebook_size": 96, "domain_ranges": None}
CONFIGS = {
    "released structure": {"encoder_config": HEADS, "decoder_config": HEADS},
    "options": {
        "encoder_config": {**HEADS, "qk_norm": True, "causal_conv": True, "conv_kernel_size": 6},
        "decoder_config": {**HEADS, "qk_norm": True, "qk_norm_scale": 6.0},
        "codebook_size": [96, 64],
        "codebook_dim": 6,
    },
    "no projections": {"encoder_config": HEADS, "decoder_config": HEADS, "codebook_dim": 32},
    "bundled structure": {
        "encoder_config": {"num_layers": 2, "block_type": "convnext", "conv_kernel_size": 7},
        "decoder_config": {"num_layers": 2, "block_type": "convnext", "conv_kernel_size": 7},
        "sampling_rate": 16000,
        "hop_length": 320,
        "input_features": ["log_magnitude", "subframe_mel"],
        "standardize_features": True,
        "normalize_latents": True,
    },
}


def run(tmp_path: Path, *options: str) -> tuple[dict, str, str]:
    """The command line with files for both reports; their contents and what was printed."""
    app = typer.Typer()
    app.command()(bench.run)
    files = [tmp_path / "report.json", tmp_path / "report.md"]
    words = [TINY, "--quick", "--no-memory", "--json", str(files[0]), "--markdown", str(files[1]), *options]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(files[0].read_text()), files[1].read_text(), result.output


# The whole


def test_quick_run_agrees_and_can_be_parsed(tmp_path: Path) -> None:
    report, markdown, printed = run(tmp_path)
    rows = report["codecs"]
    assert {(r["direction"], r["lengths"], r["clips"]) for r in rows} == {
        (direction, lengths, clips)
        for direction in ("encode", "decode")
        for lengths, clips in (("equal", 1), ("equal", 2), ("ragged", 2))
    }
    for row in rows:
        assert row["ours_equal"] and row["plain_differing"] == 0 and row["batched_differing"] == 0
        assert row["ratio"] == pytest.approx(row["plain"]["wall"] / row["ours"]["wall"])
        assert row["audio_seconds"] > 0 and row["total"] > 0
    assert all(row["equal"] and row["to_ids"] > 0 for row in report["layouts"])
    assert [row["variant"] for row in report["precision"]] == ["bfloat16 autocast", "bfloat16 weights"]
    assert all(0 <= row["differing"] <= row["codes"] for row in report["precision"])
    assert report["about"]["settings"]["threads"] == 1 and report["about"]["data"] == "synthetic"
    assert "| auv_tiny_test, encode 1 equal |" in markdown and "NO" not in markdown
    assert "Layouts" in printed


def test_recordings_may_be_given(tmp_path: Path, write_audio: object) -> None:
    rng = np.random.default_rng(0)
    for i, (samples, rate) in enumerate(((9000, 16000), (20000, 22050), (3000, 8000))):
        write_audio(f"{i}.wav", rng.normal(size=(1 + i % 2, samples)) * 0.1, rate)
    report, _, _ = run(tmp_path, "--data", str(tmp_path), "--no-layouts", "--no-precision")
    assert report["about"]["data"] == tmp_path.name
    assert all(row["ours_equal"] for row in report["codecs"])
    assert report["layouts"] == report["precision"] == []


def test_a_wrong_code_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(TINY)
    right = PlainAuv.encode

    def wrong(self: PlainAuv, clips: list) -> list:
        codes = right(self, clips)
        codes[-1][0, 0] += 1
        return codes

    monkeypatch.setattr(PlainAuv, "encode", wrong)
    (row, _) = measure_codec("tiny", tokenizer, {"equal": [synthetic_clips([0.2], 16000)]}, 1)
    assert row.plain_differing == 1 and row.ours_equal


# The rival


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_rival_gives_the_same_codes_and_audio(name: str) -> None:
    codec = draw_codec(AuvConfig(**{**SMALL, **CONFIGS[name]}))
    clips = synthetic_clips([0.3, 0.11, 0.203, 0.002], codec.config.sampling_rate)
    plain = PlainAuv(codec)
    expected = encode_alone(codec, clips)
    for group in ([0, 1, 2, 3], [1], [0, 0]):
        codes = plain.encode([torch.from_numpy(clips[i]) for i in group])
        assert all(np.array_equal(found.numpy(), expected[i]) for found, i in zip(codes, group, strict=True))
        for audio, i in zip(plain.decode(codes), group, strict=True):
            with torch.inference_mode():
                alone = codec.decode(torch.from_numpy(expected[i])[None])[0, 0]
            torch.testing.assert_close(audio, alone, atol=1e-5, rtol=0)


WITHOUT_RIVAL = {"apcodec_causal": "causal", "qincodec_rq": '"rq"'}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in WITHOUT_RIVAL])
def test_every_family_has_a_rival_with_the_same_codes_and_audio(name: str) -> None:
    """Ragged clips, encoded and decoded by the tokenizer, by its codec in one batch, and by the rival."""
    codec = shared_codec(name)
    rate = codec.facts.sampling_rate
    clips = [clip(codec.facts, samples, seed=samples)[0] for samples in (rate // 2, rate // 5 + 3, 40)]
    for row in measure_codec(name, tokenizer_of(codec), {"ragged": [clips]}, 1):
        assert row.ours_equal, row.direction
        assert row.plain_differing <= row.total / 500, row.direction  # a near-tie may fall the other way
        assert row.batched_differing <= row.total / 500, row.direction
        assert row.total > 0


@pytest.mark.parametrize(("name", "reason"), WITHOUT_RIVAL.items())
def test_variants_that_nobody_published_are_refused(name: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        next(measure_codec(name, tokenizer_of(shared_codec(name)), {}, 1))


def test_a_codec_without_a_rival_is_refused() -> None:
    tokenizer = load_tokenizer(TINY)
    tokenizer.codec = torch.nn.Linear(1, 1)
    with pytest.raises(OptionError, match=r"Linear has no plain rival.*AuvModel"):
        next(measure_codec("x", tokenizer, {}, 1))


# Models and clips


def test_drawn_weights_are_the_same_for_the_same_seed_and_use_the_codebook() -> None:
    config = AuvConfig(**{**SMALL, **CONFIGS["released structure"]})
    state = torch.get_rng_state()
    first, second, other = draw_codec(config, 1), draw_codec(config, 1), draw_codec(config, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.quantizer.stages[0].codebook.weight, other.quantizer.stages[0].codebook.weight)
    (codes,) = encode_alone(first, synthetic_clips([1.0], 8000, seed=5))
    assert len(np.unique(codes)) > 40


def test_unknown_training_config_is_refused() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no\.yaml"):
        load_tokenizer("no.yaml")


def test_clips() -> None:
    clips = synthetic_clips([0.1, 0.25], 16000)
    assert [len(clip) for clip in clips] == [1600, 4000]
    assert all(0.05 < np.abs(clip).max() <= 0.5 and clip.dtype == np.float32 for clip in clips)
    assert all(np.array_equal(a, b) for a, b in zip(clips, synthetic_clips([0.1, 0.25], 16000), strict=True))
    equal = cut_to_equal(clips, 2000)
    assert np.array_equal(equal[0], np.concatenate([clips[0], clips[0][:400]])) and len(equal[1]) == 2000


def test_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioInputError, match="no recordings"):
        recorded_clips(tmp_path, 1, 1.0, 16000)


# Measures


def test_rivals_take_turns() -> None:
    order: list[str] = []
    runs = {"slow": lambda: (order.append("slow"), time.sleep(0.01)), "quick": lambda: order.append("quick")}
    times = measure_in_turn(runs, 3)
    assert order == ["slow", "quick", "slow", "quick", "quick", "slow", "slow", "quick"]
    assert times["slow"].wall >= 0.01 > times["quick"].wall
    assert times["slow"].cpu < times["slow"].wall  # asleep, not at work


def test_layout_rows() -> None:
    rows = list(measure_layouts(64, 1))
    assert [row.layout for row in rows].count("interleaved") == 2 and len({row.layout for row in rows}) == 6
    assert all(row.equal and min(row.to_ids, row.to_codes, row.copy, row.loop) > 0 for row in rows)


def test_what_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    codec = load_tokenizer(TINY).codec
    rows = list(measure_precision("tiny", codec, synthetic_clips([0.2], 16000), 1, compiled=True))
    assert rows[-1].variant == "torch.compile" and rows[-1].error == "no compiler" and rows[-1].codes is None
    assert rows[0].error is None and rows[0].speedup > 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory()
    assert np.ones(2**24).sum() > 0  # 128 MiB
    assert before + 60 < peak_memory() < 64 * 1024


@pytest.mark.slow
def test_memory_in_fresh_processes() -> None:
    rows = list(measure_memory(TINY, 1.0, 1))
    assert [row.direction for row in rows] == ["encode", "decode"]
    for row in rows:
        assert 50 < row.loaded <= row.peak <= row.peak_twice
        assert row.per_minute == pytest.approx(60 * (row.peak_twice - row.peak))


# The command line


@pytest.mark.parametrize("batches", ["", "1,x", "0,4", "4;8"])
def test_bad_batches_are_refused(batches: str) -> None:
    with pytest.raises(OptionError, match="whole numbers from 1"):
        bench.run(batches=batches)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        bench.run(models=[TINY], quick=True, json_file=file)
    assert file.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(OptionError, match="sees no GPU"):
        bench.run(models=[TINY], quick=True, device="cuda")


# Margins


def encoded(codes: list[int], gaps: list[float]) -> margins.Encoded:
    return margins.Encoded(np.array([codes]), np.array([gaps]))


def test_bound_covers_flips_and_movements() -> None:
    movement = margins.Movement("batch of 2")
    movement.add(
        encoded([1, 2, 3, 4], [0.5, 0.1, 50.0, math.inf]), encoded([1, 2, 3, 4], [0.5001, 0.1, 51.0, math.inf])
    )
    assert movement.near == pytest.approx(1e-4) and movement.relative == pytest.approx(0.02)
    assert (movement.codes, movement.flip_margins) == (4, [])
    assert margins.bound_of([movement]) == pytest.approx(8e-4)
    movement.add(encoded([1, 2], [0.002, 0.9]), encoded([7, 2], [0.003, 0.9]))
    assert (movement.codes, movement.flip_margins) == (6, [0.003])
    assert margins.bound_of([movement, margins.Movement("other")]) == pytest.approx(0.024)


def test_every_shape_gives_the_codes_of_each_clip() -> None:
    codec = load_tokenizer(TINY).codec
    threads = torch.get_num_threads()
    clips = synthetic_clips([0.5, 2.7, 1.0, 0.31, 1.4], 16000)
    (found,) = margins.measure(codec, clips, minutes=1)
    assert torch.get_num_threads() == threads
    assert len(found) == 10 and {m.shape for m in found} >= {
        "windows of 2 s",
        "batch of 16, ragged",
        "alone, 2 threads",
    }
    frames = sum(codec.facts.num_frames(len(clip)) for clip in clips)
    assert all(m.codes == (5 * 50 if "equal" in m.shape else frames) for m in found)
    assert all(len(m.flip_margins) == 0 and m.near < 1e-3 for m in found)
    assert next(m for m in found if m.shape == "alone, padded").near == 0
    assert len(margins.table(found).rows) == 10


def test_a_shape_that_is_not_masked_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = draw_codec(AuvConfig(**{**SMALL, **CONFIGS["released structure"]}))
    monkeypatch.setattr("audiotok.codecs.auv.modeling_auv.valid_frames", lambda frames, device: None)
    (found,) = margins.measure(codec, synthetic_clips([0.5, 0.2], 8000), minutes=1)
    assert next(m for m in found if m.shape == "batch of 2, ragged").flip_margins


def test_margins_from_the_command_line(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(margins.run)
    file = tmp_path / "margins.json"
    result = CliRunner().invoke(app, [TINY, "--limit", "3", "--seconds", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["bound"] >= 8 * max(shape["near"] for shape in report["shapes"])
    assert 'margin_bounds = {("cpu", torch.float32):' in result.output


def test_tokenizers_are_of_the_family() -> None:
    assert isinstance(load_tokenizer(TINY), AuvAudioTokenizer)
