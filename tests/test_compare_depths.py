"""Variable against constant depth: bits are what the codes cost, and who is better is what the scores say."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from matplotlib.image import imread
from typer.testing import CliRunner, Result

from audiotok import VrvqAudioTokenizer, VrvqConfig, VrvqModel
from audiotok.codecs.vrvq.rate_vrvq import DepthRate
from audiotok.errors import MissingDependencyError, OptionError, OutputExistsError
from audiotok.metrics import Metrics, mel_distance
from audiotok.recipes import compare_depths, measure_windows
from audiotok.recipes.benchmark_models import draw_codec, synthetic_clips
from audiotok.recipes.compare_depths import find_clips, measure, settings_of
from audiotok.recipes.depth_curves import COLUMNS, Curve, Pair, Setting, Trial, Verdict, as_csv, pair_of, verdicts

RATE, HOP, BOOKS = 16000, 320, 3
FRAME_RATE, CODE_BITS, SIDE_BITS = RATE / HOP, 5, 2
CONFIG = {
    "sampling_rate": RATE,
    "encoder_hidden_size": 4,
    "downsampling_ratios": [4, 8, 10],
    "decoder_hidden_size": 16,
    "upsampling_ratios": [10, 8, 4],
    "num_codebooks": BOOKS,
    "codebook_size": 32,
    "codebook_dim": 4,
    "importance_channels": [8],
}


@pytest.fixture(scope="module")
def codec() -> VrvqModel:
    """Weights drawn at random, with frames of every depth."""
    return draw_codec(VrvqConfig(**CONFIG))


@pytest.fixture(scope="module")
def trials(codec: VrvqModel) -> list[Trial]:
    """Three clips, by mel distance alone."""
    settings, clips = settings_of(codec, [64.0, 0.6, 1.0, 0.0], []), synthetic_clips([1.0, 0.7, 0.4], RATE)
    names = [f"clip {i}" for i in range(3)]
    return [
        t
        for clip, name in zip(clips, names, strict=True)
        for t in measure(codec, clip, name, settings, ["mel_distance"])
    ]


@pytest.fixture(scope="module")
def pair(codec: VrvqModel, trials: list[Trial]) -> Pair:
    found = pair_of(trials, "mel_distance", codec.rate)
    assert found is not None
    return found


# Bits


def test_equal_bits_are_equal(pair: Pair) -> None:
    """Importance at its limits is a constant depth: the same codes, bits and scores, but for what the depths cost."""
    constant, variable = pair.constant, pair.variable
    assert [str(s) for s in constant.settings] == ["num_quantizers=1", "num_quantizers=2", "num_quantizers=3"]
    assert [str(s) for s in variable.settings] == ["level=0", "level=0.6", "level=1", "level=64"]
    np.testing.assert_allclose(constant.rates, [FRAME_RATE * n * CODE_BITS for n in (1, 2, 3)])
    np.testing.assert_array_equal(constant.rates, constant.code_rates)
    for place in (0, -1):
        assert variable.code_rates[place] == constant.rates[place]
        np.testing.assert_array_equal(variable.values[place], constant.values[place])
    np.testing.assert_allclose(variable.rates - variable.code_rates, FRAME_RATE * SIDE_BITS)
    assert [v.winner for v in verdicts(pair, counted=False)][::2] == ["equal", "equal"]
    assert verdicts(pair, counted=True)[0].variable is None


@torch.inference_mode()
def test_rates_and_scores_are_what_the_codec_gives(codec: VrvqModel, pair: Pair) -> None:
    depths, scores = [], []
    for clip in synthetic_clips([1.0, 0.7, 0.4], RATE):
        values = torch.from_numpy(clip)[None, None]
        output = codec.encode(values, torch.ones(1, len(clip)), level=0.6)
        depths.append(float(output.audio_codes_mask.sum()) / -(-len(clip) // HOP))
        scores.append(mel_distance(clip, codec.decode(output)[0, 0].numpy(), RATE))
    assert 1 < np.mean(depths) < BOOKS
    assert pair.variable.mean_depths[1] == pytest.approx(np.mean(depths))
    assert pair.variable.rates[1] == pytest.approx(FRAME_RATE * (np.mean(depths) * CODE_BITS + SIDE_BITS))
    np.testing.assert_allclose(pair.variable.values[1], scores)


def test_every_clip_meets_a_bitrate(codec: VrvqModel) -> None:
    settings = [s for s in settings_of(codec, [], [500, 700]) if s.option == "bitrate"]
    for trial in measure(codec, synthetic_clips([3.0], RATE)[0], "clip", settings, ["mel_distance"]):
        found = FRAME_RATE * (trial.mean_depth * CODE_BITS + SIDE_BITS)
        assert found == pytest.approx(trial.setting.value, rel=0.02)


def test_a_bitrate_that_a_clip_cannot_have_names_the_clip(codec: VrvqModel) -> None:
    with pytest.raises(OptionError, match="tick: bitrate=500"):
        list(measure(codec, np.zeros(HOP, np.float32), "tick", [Setting("bitrate", 500)], ["mel_distance"]))


def test_bad_sweeps_are_refused_before_the_work(codec: VrvqModel) -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        settings_of(codec, [1.0], [500])
    with pytest.raises(OptionError, match="level=-1"):
        settings_of(codec, [1.0, -1.0], [])
    with pytest.raises(OptionError, match="bitrate=100"):
        settings_of(codec, [], [100])
    assert settings_of(codec, [2.0, 1.0, 2.0], [])[BOOKS:] == [Setting("level", 2.0), Setting("level", 1.0)]


# Curves and verdicts


def curve(rates: list[float], values: list[list[float]], side: float = 0.0) -> Curve:
    codes = np.array(rates, dtype=float)
    settings = [Setting("level", i) for i in range(len(rates))]
    return Curve(settings, codes / 100, codes + side, codes, np.array(values))


def test_a_curve_is_interpolated_between_its_points() -> None:
    found = curve([100, 200, 200, 400], [[1, 10], [2, 20], [2, 20], [4, 0]], side=50)
    np.testing.assert_allclose(found.at(150, counted=False), [1.5, 15])
    np.testing.assert_allclose(found.at(300, counted=False), [3, 10])
    np.testing.assert_allclose(found.at(400, counted=False), [4, 0])
    np.testing.assert_allclose(found.at(150, counted=True), [1, 10])
    assert found.at(401, counted=False) is None and found.at(149, counted=True) is None


@pytest.mark.parametrize(
    ("score", "constant", "variable", "error", "winner"),
    [
        ("mel_distance", 1.0, 0.9, 0.04, "variable"),
        ("mel_distance", 0.9, 1.0, 0.04, "constant"),
        ("pesq_wb", 2.0, 2.1, 0.04, "variable"),
        ("pesq_wb", 2.1, 2.0, 0.04, "constant"),
        ("pesq_wb", 2.1, 2.0, 0.06, "constant?"),
        ("stoi", 0.8, 0.9, float("inf"), "variable?"),
        ("stoi", 0.8, 0.8, 0.0, "equal"),
        ("stoi", 0.8, None, 0.0, "–"),
    ],
)
def test_who_is_better(score: str, constant: float, variable: float | None, error: float, winner: str) -> None:
    assert Verdict(score, constant, variable, error).winner == winner


def test_a_verdict_compares_clip_by_clip() -> None:
    """What all clips gain alike is sure, however different they are."""
    constant = curve([100, 200], [[1, 5, 9], [2, 6, 10]])
    found = Pair("stoi", constant, curve([50, 250], [[1, 5, 9], [3, 7, 12]]))
    first, second = verdicts(found, counted=False)
    assert (first.constant, first.variable) == (5, pytest.approx(5 + 7 / 3 / 4))
    assert second.variable == pytest.approx(5 + 7 / 3 * 0.75)
    differences = np.array([2, 2, 3]) * 0.75 - 1
    assert second.error == pytest.approx(differences.std(ddof=1) / np.sqrt(3))
    assert second.winner == "variable"


def test_clips_that_lack_a_score_anywhere_are_left_out_everywhere() -> None:
    def trial(clip: str, setting: Setting, depth: float, **scores: float) -> Trial:
        return Trial(clip, setting, depth, Metrics(scores, {}))

    one, level = Setting("num_quantizers", 1), Setting("level", 1.0)
    found = [trial("a", one, 1, stoi=0.5), trial("a", level, 1.5, stoi=0.6)]
    found += [trial("b", one, 1, stoi=0.7), trial("b", level, 2.5)]
    rate = DepthRate(FRAME_RATE, BOOKS, 32)
    pair = pair_of(found, "stoi", rate)
    assert pair is not None and pair.num_clips == 1
    assert pair.variable.mean_depths.tolist() == [1.5] and pair.variable.values.tolist() == [[0.6]]
    assert pair_of(found[2:], "stoi", rate) is None


def test_the_csv_holds_every_point(pair: Pair) -> None:
    header, *rows = csv.reader(as_csv([pair]).splitlines())
    assert tuple(header) == COLUMNS
    assert [row[2] for row in rows] == [str(s) for s in (*pair.constant.settings, *pair.variable.settings)]
    assert {tuple(row[:2]) for row in rows} == {("mel_distance", "constant"), ("mel_distance", "variable")}
    numbers = np.array([[float(cell) for cell in row[3:]] for row in rows])
    assert (numbers[:, 0] == 3).all()
    for column, name in enumerate(("mean_depths", "rates", "code_rates", "means"), 1):
        expected = np.concatenate([getattr(pair.constant, name), getattr(pair.variable, name)])
        np.testing.assert_allclose(numbers[:, column], expected, rtol=1e-5)


# Clips


def test_clips_are_spread_over_each_domain(tmp_path: Path, write_audio: Callable[..., Path]) -> None:
    rates = {"speech": 16000, "music": 8000}
    names = [f"{domain}_{i}.wav" for domain in rates for i in range(5)] + ["speech_low.wav"]
    for name in names:
        write_audio(name, np.zeros(800), 8000 if "low" in name else rates[name.split("_")[0]])
    assert len(find_clips(tmp_path, False, 100)) == 11
    rows = [f"{name},{name.split('_')[0]}" for name in names]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,domain", *rows]))
    found = [(clip.name, clip.group) for clip in find_clips(tmp_path, False, 2)]
    assert found == [
        ("speech_0.wav", "speech"),
        ("speech_4.wav", "speech"),
        ("speech_low.wav", "narrow-band speech"),
        ("music_0.wav", "music"),
        ("music_4.wav", "music"),
    ]
    assert {clip.group for clip in find_clips(tmp_path, True, 100)} == {"speech"}


# The command line


@pytest.fixture(scope="module")
def saved(codec: VrvqModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    VrvqAudioTokenizer(codec, name="tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def voices(write_audio: Callable[..., Path], tmp_path: Path) -> Path:
    (tmp_path / "voices").mkdir()
    for i, clip in enumerate(synthetic_clips([1.0, 0.7], RATE)):
        write_audio(f"voices/{i}.wav", clip, RATE)
    return tmp_path / "voices"


def command(*words: object) -> Result:
    app = typer.Typer()
    app.command()(compare_depths.run)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_curves_and_says_who_is_better(saved: Path, voices: Path, tmp_path: Path) -> None:
    table, picture, page = (tmp_path / name for name in ("depths.csv", "depths.png", "depths.md"))
    outputs = ["--csv", table, "--picture", picture, "--markdown", page]
    words = [saved, voices, "--speech", "--seconds", 1, "--level", 0.6, "--level", 2, *outputs]
    done = command(*words)
    assert done.exit_code == 0, done.output
    assert "comparing" in done.stderr and "comparing" not in done.stdout
    assert "mel distance at equal bits: 2 clips" in done.stdout and "variable depth is better at" in done.stdout
    assert page.read_text().count("### ") == done.stdout.count("at equal bits")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["score"] for row in rows} >= {"mel_distance", "stoi"}
    assert [row["setting"] for row in rows[:5]] == [
        *(f"num_quantizers={n + 1}" for n in range(BOOKS)), "level=0.6", "level=2"
    ]  # fmt: skip
    pixels = imread(picture)
    assert pixels.shape[1] > pixels.shape[0] and pixels.std() > 0.05
    assert isinstance(command(*words).exception, OutputExistsError)


def test_scores_of_speech_need_speech(saved: Path, voices: Path) -> None:
    done = command(saved, voices, "--limit", 1, "--level", 1)
    assert done.exit_code == 0, done.output
    assert "mel distance" in done.stdout and "STOI" not in done.stdout and "1 clips" in done.stdout


def test_a_missing_package_leaves_its_score_out(saved: Path, voices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pystoi", None)
    done = command(saved, voices, "--speech", "--limit", 1, "--level", 1)
    assert done.exit_code == 0, done.output
    assert "STOI leaves out 1 clips" in done.stdout and "pip install" in done.stdout


def test_codecs_of_constant_depth_are_refused(voices: Path, saved: Path, tmp_path: Path) -> None:
    auv = Path(measure_windows.__file__).parent / "configs" / "auv_tiny_test.yaml"
    constant = VrvqModel(VrvqConfig(**CONFIG, variable_rate=False))
    fixed = VrvqModel(VrvqConfig(**CONFIG, num_quantizers=2))
    for name, model in (("constant", constant), ("fixed", fixed)):
        VrvqAudioTokenizer(model).save_pretrained(tmp_path / name)
    for name in (auv, tmp_path / "constant", tmp_path / "fixed"):
        error = command(name, voices).exception
        assert isinstance(error, OptionError) and "of constant depth" in str(error) and str(name) in str(error)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    saved: Path, voices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = command(saved, voices, "--picture", tmp_path / "depths.txt").exception
    assert isinstance(error, OptionError) and ".png, .svg, .pdf" in str(error)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(command(saved, voices, "--picture", tmp_path / "a.png").exception, MissingDependencyError)
