"""The share of codes that windows change is what comparing them by hand gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from audiotok import AuvAudioTokenizer, AuvConfig, AuvModel
from audiotok.encoding import ClipCodes
from audiotok.errors import AudioInputError, OptionError, OutputExistsError
from audiotok.recipes import measure_windows
from audiotok.recipes.benchmark_models import draw_codec, find_recordings, load_tokenizer, synthetic_clips
from audiotok.recipes.measure_windows import Comparison, clips_of, measure, parse_windows, stated, table
from audiotok.windows import WindowFlips

RATE, HOP = 8000, 20
TINY = str(Path(measure_windows.__file__).parent / "configs" / "auv_tiny_test.yaml")


@pytest.fixture(scope="module")
def attentive() -> AuvAudioTokenizer:
    """Attends over the whole clip; weights drawn at random, with diverse codes."""
    stack = {"num_layers": 2, "num_attention_heads": 3, "head_dim": 8, "conv_kernel_size": 7}
    config = AuvConfig(
        sampling_rate=RATE,
        hop_length=HOP,
        hidden_size=32,
        codebook_size=96,
        domain_ranges=None,
        encoder_config=stack,
        decoder_config=stack,
    )
    return AuvAudioTokenizer(draw_codec(config), name="attentive")


@torch.inference_mode()
def codes_of(codec: AuvModel, wave: np.ndarray) -> np.ndarray:
    return codec.encode(torch.from_numpy(wave)[None], torch.ones(1, wave.shape[1])).audio_codes[0].numpy()


def by_hand(codec: AuvModel, wave: np.ndarray, core: int, context: int) -> tuple[int, int]:
    """Codes that differ and codes in all; `core` and `context` in frames."""
    whole, start, found = codes_of(codec, wave), 0, []
    while True:
        first, last = max(0, start - context), start + core + context
        window = codes_of(codec, wave[:, first * HOP : last * HOP])[:, start - first :]
        if last * HOP >= wave.shape[1]:
            break
        found.append(window[:, :core])
        start += core
    windowed = np.concatenate([*found, window], axis=1)
    return int((windowed != whole).sum()), whole.size


def test_the_share_is_what_comparing_by_hand_gives(attentive: AuvAudioTokenizer) -> None:
    clips = [clip[None] for clip in synthetic_clips([3.0, 2.2, 0.5, 0.7512], RATE)]
    windows = [(0.5, 0.0), (0.5, 0.25), (2.0, 0.1)]
    *_, found = measure(attentive, clips, windows)
    for comparison, (chunk, context) in zip(found, windows, strict=True):
        core, more = round(chunk * RATE / HOP), round(context * RATE / HOP)
        longer = [clip for clip in clips if clip.shape[1] > (core + more) * HOP]
        differing, total = np.sum([by_hand(attentive.codec, clip, core, more) for clip in longer], axis=0)
        assert (comparison.clips, comparison.codes, comparison.differing) == (len(longer), total, differing)
        assert 0 < comparison.share < 1
    assert [comparison.clips for comparison in found] == [3, 3, 2]


def test_a_finite_receptive_field_changes_nothing() -> None:
    tokenizer = load_tokenizer(TINY)
    assert tokenizer.codec.facts.receptive_field_samples is not None
    clip = synthetic_clips([2.0], tokenizer.sampling_rate)[0][None]
    *_, (comparison,) = measure(tokenizer, [clip], [(0.3, 0.0)])
    assert (comparison.clips, comparison.codes, comparison.share) == (1, 100, 0.0)


def test_codes_are_compared_where_they_are_used() -> None:
    """Streams of several rates; and depths, whose unused codes are none."""
    coarse, fine = np.array([1, 2]), np.array([1, 2, 3, 4])
    comparison = Comparison(1.0, 0.0)
    comparison.add(ClipCodes([coarse, fine], 4), ClipCodes([np.array([1, 9]), fine], 4))
    assert (comparison.codes, comparison.differing) == (6, 1)
    codes = np.array([[1, 2, 3], [0, 5, 0]])
    comparison = Comparison(1.0, 0.0)
    comparison.add(ClipCodes(codes, 3, np.array([1, 2, 1])), ClipCodes(codes, 3, np.array([1, 2, 2])))
    assert (comparison.codes, comparison.differing) == (4, 1)


def test_what_is_stated_says_what_was_measured() -> None:
    comparison = Comparison(10.0, 1.0, 2, 3000, 371)
    words = "3,000 codes of 2 clips of up to 60 s, drawn weights"
    assert stated(comparison, "drawn weights", 60.0) == WindowFlips(10.0, 1.0, 0.124, words)
    assert stated(Comparison(10.0, 1.0), "", 60.0) is None
    assert [row[-1] for row in table([comparison, Comparison(1.0, 0.0)]).rows] == ["12.37 %", "–"]


# Clips


def test_clips_are_cut_or_joined(write_audio: Callable[..., Path], attentive: AuvAudioTokenizer) -> None:
    facts, counts = attentive.codec.facts, [5000, 12_000, 3000]
    files = [write_audio(f"{i}.wav", np.full(n, 0.1 * (i + 1)), RATE, "FLOAT") for i, n in enumerate(counts)]
    cut = list(clips_of(files, facts, 1.0, join=False))
    assert [clip.shape for clip in cut] == [(1, 5000), (1, 8000), (1, 3000)]
    joined = list(clips_of(files, facts, 1.0, join=True))
    assert [clip.shape for clip in joined] == [(1, 8000), (1, 8000)]
    expected = np.repeat(np.float32([0.1, 0.2, 0.3]), counts)[:16_000]
    np.testing.assert_allclose(np.concatenate(joined, axis=1)[0], expected, atol=1e-6)


def test_recordings_are_found_in_folders_and_named_alone(write_audio: Callable[..., Path], tmp_path: Path) -> None:
    files = [write_audio(name, np.zeros(9), RATE) for name in ("b.wav", "a.flac")]
    assert find_recordings([files[0], tmp_path]) == [files[0], files[1], files[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(AudioInputError, match="empty holds no recordings"):
        find_recordings([tmp_path, tmp_path / "empty"])


# The command line


def command(*words: object) -> Result:
    app = typer.Typer()
    app.command()(measure_windows.run)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_what_a_class_may_state(
    attentive: AuvAudioTokenizer, write_audio: Callable[..., Path], tmp_path: Path
) -> None:
    attentive.save_pretrained(tmp_path / "saved")
    clips = [clip[None] for clip in synthetic_clips([1.5, 0.7], RATE)]
    files = [write_audio(f"{i}.wav", clip, RATE, "FLOAT") for i, clip in enumerate(clips)]
    words = [tmp_path / "saved", *files, "--windows", "0.5:0.1", "--windows", "9:0", "--json", tmp_path / "found.json"]
    done = command(*words)
    assert done.exit_code == 0, done.output
    *_, expected = measure(attentive, clips, [(0.5, 0.1), (9.0, 0.0)])
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["fingerprint"] == attentive.fingerprint
    assert [(row["codes"], row["differing"], row["share"]) for row in report["windows"]] == [
        (comparison.codes, comparison.differing, comparison.share) for comparison in expected
    ]
    line = next(line for line in done.output.splitlines() if line.startswith("window_flips = "))
    flips = eval(line.removeprefix("window_flips = "), {"WindowFlips": WindowFlips})
    assert [(f.chunk_length_s, f.context_s, f.share) for f in flips] == [(0.5, 0.1, float(f"{expected[0].share:.3g}"))]
    assert "Codes that windows change" in done.output
    assert isinstance(command(*words).exception, OutputExistsError)


def test_clips_that_fit_into_a_window_measure_nothing(write_audio: Callable[..., Path]) -> None:
    done = command(TINY, write_audio("short.wav", np.zeros(4000), RATE))
    assert isinstance(done.exception, AudioInputError) and "--join" in str(done.exception)


@pytest.mark.parametrize("text", ["", "10", "10:", "a:b", "1:2:3"])
def test_bad_windows_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="as in 30:5"):
        parse_windows(text)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 0.0)])
def test_impossible_windows_are_refused_before_the_work(pair: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match="positive length"):
        next(measure(load_tokenizer(TINY), iter(()), [pair]))
