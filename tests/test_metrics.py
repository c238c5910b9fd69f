"""Scores against independent formulas, known values, and every stated value for silence."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given
from hypothesis import strategies as st

from audiotok import metrics
from audiotok.errors import (
    AudioInputError,
    AudioShapeError,
    CodesError,
    EmptyAudioError,
    IntegerAudioError,
    MissingDependencyError,
    NonFiniteAudioError,
    OptionError,
    SamplingRateError,
)
from audiotok.metrics import METRICS, band_bias, codebook_use, compare

RATE = 16000


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    """Three seconds with what PESQ and STOI look for: a buzz of 120 Hz with moving formants, in syllables."""
    time = np.arange(3 * RATE) / RATE
    buzz = sum(np.sin(2 * np.pi * 120 * k * time) * np.exp(-(((k * 120 - 900) / 900) ** 2)) for k in range(1, 50))
    formant = 1 + 0.8 * np.sin(2 * np.pi * 1.7 * time)
    hiss = np.random.default_rng(1).standard_normal(len(time)) * (np.sin(2 * np.pi * 2.3 * time) > 0.6)
    syllables = np.clip(np.sin(2 * np.pi * 2.3 * time), 0, None)
    return (0.1 * (buzz * formant * syllables + 0.5 * hiss)).astype(np.float32)


def noise(seconds: float = 1.0, seed: int = 0, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def silence(seconds: float = 1.0) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def test_import_loads_no_model_library() -> None:
    code = "import sys, json, audiotok.metrics; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"torch", "transformers", "pesq", "pystoi"} & set(json.loads(run.stdout))


# SI-SDR


@given(snr=st.floats(-40, 60), gain=st.floats(0.01, 50), seed=st.integers(0, 9))
def test_si_sdr_of_orthogonal_noise_is_its_snr_at_any_gain(snr: float, gain: float, seed: int) -> None:
    signal, other = noise(0.1, seed).astype(np.float64), noise(0.1, seed + 10).astype(np.float64)
    signal -= signal.mean()
    other -= other.mean()
    other -= (other @ signal) / (signal @ signal) * signal
    other *= np.linalg.norm(signal) / np.linalg.norm(other) * 10 ** (-snr / 20)
    assert metrics.si_sdr(signal, gain * (signal + other)) == pytest.approx(snr, abs=0.01)


def test_si_sdr_ignores_offsets_and_sign() -> None:
    assert metrics.si_sdr(noise(), 0.5 - noise()) > 90


def test_si_sdr_of_silence_has_its_stated_values() -> None:
    constant = np.full(RATE, 0.3, np.float32)
    assert metrics.si_sdr(silence(), silence()) == 100.0
    assert metrics.si_sdr(noise(), silence()) == -100.0
    assert metrics.si_sdr(silence(), noise()) == -100.0
    assert metrics.si_sdr(noise(), noise()) == 100.0
    assert metrics.si_sdr(constant, noise()) == -100.0


# Level


def test_half_gain_is_minus_six_decibel() -> None:
    assert metrics.level_ratio_db(noise(), 0.5 * noise()) == pytest.approx(20 * math.log10(0.5))
    assert metrics.level_ratio(noise(), 0.5 * noise()) == pytest.approx(0.5)


def test_level_counts_all_channels_together() -> None:
    reference = np.stack([noise(), noise()])
    assert metrics.level_ratio(reference, reference * [[1.0], [0.0]]) == pytest.approx(math.sqrt(0.5))


def test_level_of_silence_has_its_stated_values() -> None:
    assert metrics.level_ratio_db(silence(), silence()) == 0.0
    assert metrics.level_ratio_db(noise(), silence()) == -100.0
    assert metrics.level_ratio_db(silence(), noise()) == 100.0
    assert metrics.level_ratio(noise(), silence()) == pytest.approx(1e-5)


# Mel distance


def independent_mel_distance(reference: np.ndarray, decoded: np.ndarray) -> float:
    """The definition at 16 kHz, with torch's STFT and the HTK formula written out."""

    def log_mel(waveform: np.ndarray, n_fft: int, bands: int) -> torch.Tensor:
        spectrum = torch.stft(
            torch.from_numpy(waveform).double(),
            n_fft,
            n_fft // 4,
            window=torch.hann_window(n_fft, dtype=torch.float64),
            pad_mode="reflect",
            return_complex=True,
        )
        top = 2595 * math.log10(1 + RATE / 2 / 700)
        edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
        bins = np.arange(n_fft // 2 + 1) * RATE / n_fft
        filters = [np.interp(bins, edges[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(bands)]
        return (torch.from_numpy(np.stack(filters)) @ spectrum.abs() + 1e-5).log()

    scales = ((512, 40), (1024, 80), (2048, 80))
    return float(np.mean([(log_mel(reference, *s) - log_mel(decoded, *s)).abs().mean() for s in scales]))


@pytest.mark.parametrize("decoded", [noise(1, 7, 0.02), silence(), noise() * 0.1], ids=["other", "silence", "quiet"])
def test_mel_distance_is_its_definition(decoded: np.ndarray) -> None:
    assert metrics.mel_distance(noise(), decoded, RATE) == pytest.approx(
        independent_mel_distance(noise(), decoded), rel=1e-9
    )


def test_mel_distance_of_equal_clips_and_of_a_gain() -> None:
    assert metrics.mel_distance(noise(), noise(), RATE) == 0.0
    assert metrics.mel_distance(silence(), silence(), RATE) == 0.0
    assert metrics.mel_distance(noise(), noise() / 2, RATE) == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000])
def test_mel_distance_means_the_same_at_other_rates(rate: int) -> None:
    """The bands that two rates share say the same, so distance times bands agrees where all else is silent."""
    narrow = soxr.resample(soxr.resample(noise(2), RATE, 7000), 7000, RATE)  # nothing above 3.5 kHz
    other = soxr.resample(narrow, RATE, rate)

    def total(waveform: np.ndarray, sampling_rate: int) -> float:
        bands = 2595 * math.log10(1 + sampling_rate / 1400)
        return metrics.mel_distance(waveform, np.zeros_like(waveform), sampling_rate) * bands

    assert total(other, rate) == pytest.approx(total(narrow, RATE), rel=0.03)


def test_long_clips_are_scored_in_blocks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.mel_distance(noise(), noise(1, 1), RATE), band_bias(noise(), noise(1, 1), RATE)
    monkeypatch.setattr(metrics, "_FRAMES_PER_BLOCK", 7)
    pieces = metrics.mel_distance(noise(), noise(1, 1), RATE), band_bias(noise(), noise(1, 1), RATE)
    assert pieces[0] == pytest.approx(whole[0])
    assert pieces[1] == pytest.approx(whole[1])


@pytest.mark.parametrize("samples", [1, 2, 100, 689])
def test_very_short_clips_have_spectral_scores(samples: int) -> None:
    found = compare(noise()[:samples], noise(1, 1)[:samples], RATE)
    assert {"mel_distance", "si_sdr", "level_ratio_db", "worst_band_db"} <= set(found)
    assert all(math.isfinite(value) for value in found.values())


# Band bias


def test_band_bias_finds_the_band_that_was_raised() -> None:
    spectrum = np.fft.rfft(noise(2))
    frequencies = np.fft.rfftfreq(2 * RATE, 1 / RATE)
    spectrum[(frequencies >= 891) & (frequencies < 1122)] *= 10 ** (12 / 20)
    bias = band_bias(noise(2), np.fft.irfft(spectrum), RATE)
    assert bias.pop(1000.0) == pytest.approx(12, abs=0.5)
    neighbours = {hz: abs(bias.pop(hz)) for hz in (800.0, 1250.0)}
    assert max(neighbours.values()) < 1.5
    assert max(map(abs, bias.values())) < 0.2


def test_bands_are_the_nominal_third_octaves_below_half_the_rate() -> None:
    at_8k = [100, 125, 160, 200, 250, 315, 400, 500, 630, 800, 1000, 1250, 1600, 2000, 2500, 3150]
    assert list(band_bias(noise(), noise(), 8000)) == pytest.approx(at_8k)
    assert list(band_bias(noise(), noise(), 44100))[-1] == 16000.0


def test_bands_that_the_reference_does_not_hold_are_left_out() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE) * np.hanning(RATE)
    bias = band_bias(tone, tone + noise(level=0.3), RATE)
    assert 1000.0 in bias
    assert 6300.0 not in bias
    assert band_bias(silence(), noise(), RATE) == {}
    assert metrics.worst_band_db(silence(), noise(), RATE) == 0.0
    assert set(band_bias(noise(), silence(), RATE).values()) == {-100.0}


# PESQ and STOI


def test_equal_speech_has_the_best_scores(voice: np.ndarray) -> None:
    found = compare(voice, voice, RATE)
    assert found.skipped == {}
    assert found["pesq_wb"] == pytest.approx(4.644, abs=0.001)  # the top of P.862.2
    assert found["pesq_nb"] == pytest.approx(4.549, abs=0.001)  # the top of P.862.1
    assert found["stoi"] == pytest.approx(1, abs=1e-6)
    assert found["estoi"] == pytest.approx(1, abs=1e-6)


def test_speech_scores_fall_with_noise(voice: np.ndarray) -> None:
    steps = [compare(voice, voice + noise(3, 5, level), RATE) for level in (0.001, 0.02, 0.2)]
    for name in ("pesq_wb", "pesq_nb", "stoi", "estoi"):
        scores = [step[name] for step in steps]
        assert scores[0] > scores[1] > scores[2], name


def test_speech_scores_at_other_rates_are_those_at_16_khz(voice: np.ndarray) -> None:
    noisy = voice + noise(3, 5, 0.01)
    at_48k = compare(soxr.resample(voice, RATE, 48000), soxr.resample(noisy, RATE, 48000), 48000)
    for name in ("pesq_wb", "pesq_nb", "stoi", "estoi"):
        assert at_48k[name] == pytest.approx(METRICS[name].function(voice, noisy, RATE), abs=0.03), name


def test_narrow_band_speech_has_narrow_band_pesq_only(voice: np.ndarray) -> None:
    found = compare(voice[::2], voice[::2], 8000)
    assert "pesq_nb" in found
    assert set(found.skipped) == {"pesq_wb", "stoi", "estoi"}
    with pytest.raises(SamplingRateError, match="16000 Hz or more"):
        metrics.pesq_wb(voice[::2], voice[::2], 8000)


def test_silent_speech_has_its_stated_values(voice: np.ndarray) -> None:
    quiet = np.zeros_like(voice)
    found = compare(voice, quiet, RATE, ("pesq_wb", "pesq_nb", "stoi", "estoi"))
    assert found == {"pesq_wb": 1.0, "pesq_nb": 1.0, "stoi": 0.0, "estoi": 0.0}
    for other in (voice, quiet):
        assert set(compare(quiet, other, RATE).skipped) == {"pesq_wb", "pesq_nb", "stoi", "estoi"}
    assert compare(voice, quiet + 0.3, RATE, found) == found  # an offset is no sound
    assert set(compare(quiet + 0.3, voice, RATE, found).skipped) == set(found)


def test_speech_scores_of_too_short_clips_do_not_exist(voice: np.ndarray) -> None:
    short = voice[3000:6000]
    with pytest.raises(AudioInputError, match="quarter of a second"):
        metrics.pesq_wb(short, short, RATE)
    with pytest.raises(AudioInputError, match=r"0\.4 s of speech"):
        metrics.stoi(short, short, RATE)
    mostly_silent = np.concatenate([short, np.zeros(RATE, np.float32)])
    with pytest.raises(AudioInputError, match=r"0\.4 s of speech"):  # the package says 1e-5
        metrics.stoi(mostly_silent, mostly_silent, RATE)


def test_pesq_takes_recordings_with_more_utterances_than_its_tables() -> None:
    """Bursts of 0.21 s: 60 of them in one piece overrun the package's tables of 50 and kill the process."""
    time = np.arange(26 * RATE) / RATE
    bursts = noise(26) * (time % 0.42 < 0.21)
    assert 1.0 < metrics.pesq_wb(bursts, bursts + noise(26, 1, 0.01), RATE) < 4.0


def test_pesq_of_a_long_recording_is_the_mean_of_its_pieces(voice: np.ndarray) -> None:
    long, degraded = np.tile(voice, 8), np.tile(voice, 8) + noise(24, 3, 0.01)
    halves = [metrics.pesq_wb(long[i : i + 12 * RATE], degraded[i : i + 12 * RATE], RATE) for i in (0, 12 * RATE)]
    assert metrics.pesq_wb(long, degraded, RATE) == pytest.approx(np.mean(halves))
    with_silence = np.concatenate([long[: 12 * RATE], np.zeros(12 * RATE, np.float32)])
    assert metrics.pesq_wb(with_silence, with_silence, RATE) == pytest.approx(4.644, abs=0.001)


def test_estoi_is_deterministic_and_leaves_numpys_generator_alone(voice: np.ndarray) -> None:
    """The package dithers with the global generator, and silent stretches score whatever the dither is."""
    gaps = voice * (np.arange(len(voice)) % RATE < RATE // 2)
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = metrics.estoi(voice, gaps, RATE)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert metrics.estoi(voice, gaps, RATE) == first


@pytest.mark.parametrize(("package", "names"), [("pesq", ("pesq_wb", "pesq_nb")), ("pystoi", ("stoi", "estoi"))])
def test_missing_packages_are_named_with_the_way_to_get_them(
    package: str, names: tuple[str, ...], voice: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in names:
        with pytest.raises(MissingDependencyError, match=rf'{package}.*pip install "audiotok\[metrics\]"'):
            METRICS[name].function(voice, voice, RATE)
    assert set(compare(voice, voice, RATE).skipped) == set(names)


# Waveforms that come in


def test_channels_are_averaged() -> None:
    reference, decoded = np.stack([noise(), noise(1, 1)]), np.stack([noise() / 2, noise(1, 1)])
    assert metrics.mel_distance(reference, decoded, RATE) == pytest.approx(math.log(2) / 2, rel=1e-4)
    assert metrics.si_sdr(reference, np.stack([noise(), silence()])) == 0.0  # the mean of +100 and -100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_score_as_arrays(dtype: torch.dtype) -> None:
    reference, decoded = torch.from_numpy(noise()).to(dtype), torch.from_numpy(noise(1, 1)).to(dtype)
    as_arrays = compare(reference.float().numpy(), decoded.float().numpy(), RATE, ("mel_distance", "si_sdr"))
    assert compare(reference.requires_grad_(), decoded, RATE, ("mel_distance", "si_sdr")) == as_arrays


@pytest.mark.parametrize(
    ("decoded", "error"),
    [
        (noise()[:-1], AudioShapeError),
        (np.stack([noise(), noise()]), AudioShapeError),
        (np.full(RATE, np.nan, np.float32), NonFiniteAudioError),
        (np.zeros(RATE, np.int16), IntegerAudioError),
        (np.zeros(0, np.float32), EmptyAudioError),
    ],
    ids=["length", "channels", "nan", "integer", "empty"],
)
def test_what_cannot_be_compared_is_refused(decoded: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        compare(noise(), decoded, RATE)
    for metric in METRICS.values():
        with pytest.raises(error):
            metric.function(noise(), decoded, RATE)


def test_unknown_metric_names_and_rates_are_refused() -> None:
    with pytest.raises(OptionError, match='Did you mean "pesq_wb"'):
        compare(noise(), noise(), RATE, ["pesq_bw"])
    for rate in (0, -16000, None):
        with pytest.raises(SamplingRateError):
            compare(noise(), noise(), rate)


def test_rows_show_every_score_or_the_reason_why_there_is_none() -> None:
    found = compare(noise(0.1), noise(0.1) / 2, RATE)
    rows = dict(found.rows())
    assert list(rows) == [*(METRICS[name].label for name in found), *(METRICS[name].label for name in found.skipped)]
    assert rows["level"] == "-6.0 dB"
    assert rows["mel distance"] == "0.693"
    assert rows["STOI"].startswith("skipped: STOI needs 0.4 s")


# Codebooks


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_uniform_use_has_the_perplexity_of_the_size(size: int) -> None:
    use = codebook_use(np.tile(np.arange(size), 3).reshape(3, size), size)
    assert (use.num_codes, use.distinct, use.share) == (3 * size, size, 1.0)
    assert use.entropy_bits == pytest.approx(math.log2(size))
    assert use.perplexity == pytest.approx(size)


@given(st.lists(st.integers(0, 40), min_size=1))
def test_codebook_use_counts(codes: list[int]) -> None:
    use = codebook_use(torch.tensor(codes), 64)
    frequencies = [n / len(codes) for n in Counter(codes).values()]
    assert use.distinct == len(set(codes))
    assert use.share == len(set(codes)) / 64
    assert use.entropy_bits == pytest.approx(sum(p * math.log2(1 / p) for p in frequencies), abs=1e-12)
    assert 1.0 <= use.perplexity <= use.distinct * (1 + 1e-12)


@pytest.mark.parametrize("codes", [[], [0.5], [-1], [8]], ids=["none", "float", "negative", "too large"])
def test_codes_that_are_no_codes_are_refused(codes: list[float]) -> None:
    with pytest.raises(CodesError):
        codebook_use(codes, 8)
