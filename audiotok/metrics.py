"""How near a decoded waveform is to its reference, and how well a codebook is used.

Waveforms are float NumPy arrays or torch tensors, `[samples]` or `[channels, samples]`, both of one shape; a score
of several channels is the mean of theirs. PESQ and STOI judge speech only. No score is ever NaN: silence has the
value that each function states, and a score that does not exist for a clip raises `AudioInputError` (in `compare`:
is left out, with the reason in `Metrics.skipped`).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from audiotok.audio import as_samples, check_sampling_rate
from audiotok.errors import (
    AudioInputError,
    AudioShapeError,
    CodesError,
    MissingDependencyError,
    SamplingRateError,
    check_choice,
)

Samples = NDArray[np.float64]

# Ratios in dB are clamped to +-this: what silence and exact equality get in place of an infinity.
MAX_DB = 100.0
WIDE_BAND, NARROW_BAND = 16000, 8000  # Hz

# Speech quality and intelligibility


def pesq_wb(reference: Any, decoded: Any, sampling_rate: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), MOS-LQO of 1.04 to 4.64; higher is better.

    Rates above 16 kHz are resampled to it, lower ones refused. Recordings longer than 20 s are scored in equal pieces
    (the standard is meant for short clips, and its code overruns its tables beyond 50 utterances) and averaged
    over the pieces that hold speech. A silent decoded clip (100 dB or more below its reference) has 1.0.

    Raises:
        AudioInputError: no utterance in the reference, or a clip under a quarter of a second.
        MissingDependencyError: the package pesq is not installed.
    """
    return _pesq(reference, decoded, sampling_rate, WIDE_BAND)


def pesq_nb(reference: Any, decoded: Any, sampling_rate: int) -> float:
    """Narrow-band PESQ (ITU-T P.862 with the P.862.1 mapping) at 8 kHz, 1.02 to 4.55; otherwise as `pesq_wb`."""
    return _pesq(reference, decoded, sampling_rate, NARROW_BAND)


def stoi(reference: Any, decoded: Any, sampling_rate: int) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), about 0 to 1; higher is better.

    Sampling rates below 16 kHz are refused. A silent decoded clip has 0.0.

    Raises:
        AudioInputError: the reference is silent, or holds under 0.4 s of speech.
        MissingDependencyError: the package pystoi is not installed.
    """
    return _stoi(reference, decoded, sampling_rate, extended=False)


def estoi(reference: Any, decoded: Any, sampling_rate: int) -> float:
    """Extended STOI (Jensen and Taal 2016), which also sees modulated noise; otherwise as `stoi`."""
    return _stoi(reference, decoded, sampling_rate, extended=True)


# Any kind of sound


def si_sdr(reference: Any, decoded: Any, sampling_rate: int | None = None) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), means removed; higher is better.

    Clamped to +-100 dB, which are also the values of two equal clips (two silent ones included) and of a clip
    that is silent where the other is not. `sampling_rate` is not used.
    """
    return float(np.mean([_si_sdr(r, d) for r, d in zip(*_pair(reference, decoded), strict=True)]))


def mel_distance(reference: Any, decoded: Any, sampling_rate: int) -> float:
    """Mean absolute difference of log-mel spectra, in nepers; 0 is equal, lower is better.

    ln(mel magnitude + 1e-5), L1, mean over three resolutions: Hann windows of 32, 64 and 128 ms (512, 1024 and
    2048 samples at 16 kHz), hop a quarter, 40, 80 and 80 bands up to half the rate (HTK scale, triangles of height
    1). At other rates the windows keep their time, the magnitudes are scaled to what 16 kHz gives, and the number
    of bands grows with the mel scale, so that a band is as wide as at 16 kHz. Digital silence is the floor 1e-5.
    """
    pair = np.stack(_pair(reference, decoded))
    check_sampling_rate(sampling_rate)
    return float(np.mean([_mel_distance(pair, sampling_rate, *scale) for scale in _MEL_SCALES]))


def level_ratio(reference: Any, decoded: Any, sampling_rate: int | None = None) -> float:
    """RMS of the decoded clip over that of the reference, all channels together; 1 is equal.

    Clamped to 1e-5 ... 1e5 (one of the two silent); two silent clips have 1. `sampling_rate` is not used.
    """
    return 10 ** (level_ratio_db(reference, decoded) / 20)


def level_ratio_db(reference: Any, decoded: Any, sampling_rate: int | None = None) -> float:
    """`level_ratio` in dB: negative where the decoded clip is too quiet."""
    reference, decoded = _pair(reference, decoded)
    return _power_db(float(np.mean(decoded**2)), float(np.mean(reference**2)))


def band_bias(reference: Any, decoded: Any, sampling_rate: int) -> dict[float, float]:
    """How much too loud each third-octave band is: nominal centre in Hz → dB of long-term power, decoded over
    reference.

    Shows what a single score hides: a band raised by many dB is how a codec exploits a metric. Bands from 100 Hz to
    half the rate; those 60 dB or more below the reference's strongest are left out, so silence has none.
    """
    check_sampling_rate(sampling_rate)
    spectra = [_long_term_power(w, sampling_rate) for w in _pair(reference, decoded)]
    edges, centres = _third_octaves(sampling_rate)
    bins = np.linspace(0, sampling_rate / 2, len(spectra[0]))
    inside = (bins >= edges[:-1, None]) & (bins < edges[1:, None])
    powers = [inside @ spectrum for spectrum in spectra]
    heard = powers[0] > 1e-6 * powers[0].max(initial=0.0)
    return {centre: _power_db(float(d), float(r)) for centre, r, d, h in zip(centres, *powers, heard, strict=True) if h}


def worst_band_db(reference: Any, decoded: Any, sampling_rate: int) -> float:
    """The `band_bias` of the band that is furthest off, with its sign; 0 for a silent reference."""
    return max(band_bias(reference, decoded, sampling_rate).values(), key=abs, default=0.0)


# All of them at once


@dataclass(frozen=True)
class Metric:
    """One score: its function, and how a table shows it.

    Attributes:
        function: (reference, decoded, sampling_rate) → score.
        label: name for people.
        decimals: digits worth printing.
        unit: "dB" or nothing.
        higher_is_better: None where nearer to zero is better.
    """

    function: Callable[[Any, Any, int], float]
    label: str
    decimals: int
    unit: str = ""
    higher_is_better: bool | None = True

    def format(self, value: float) -> str:
        sign = "+" if self.unit == "dB" and self.higher_is_better is None else ""
        return f"{value:{sign}.{self.decimals}f}"


METRICS: dict[str, Metric] = {
    "pesq_wb": Metric(pesq_wb, "PESQ-WB", 3),
    "pesq_nb": Metric(pesq_nb, "PESQ-NB", 3),
    "stoi": Metric(stoi, "STOI", 3),
    "estoi": Metric(estoi, "ESTOI", 3),
    "mel_distance": Metric(mel_distance, "mel distance", 3, higher_is_better=False),
    "si_sdr": Metric(si_sdr, "SI-SDR", 1, "dB"),
    "level_ratio_db": Metric(level_ratio_db, "level", 1, "dB", None),
    "worst_band_db": Metric(worst_band_db, "worst band", 1, "dB", None),
}


class Metrics(dict[str, float]):
    """Name → score, in the order of `METRICS`; `skipped` says why others are missing (name → reason)."""

    def __init__(self, scores: dict[str, float], skipped: dict[str, str]) -> None:
        super().__init__(scores)
        self.skipped = skipped

    def rows(self) -> list[tuple[str, str]]:
        """(label, score or the reason why there is none) for a two-column table."""
        rows = [(METRICS[k].label, f"{METRICS[k].format(v)} {METRICS[k].unit}".rstrip()) for k, v in self.items()]
        return rows + [(METRICS[k].label, f"skipped: {reason}") for k, reason in self.skipped.items()]


def compare(reference: Any, decoded: Any, sampling_rate: int, metrics: Iterable[str] = METRICS) -> Metrics:
    """Every score of `metrics` that exists for this pair of waveforms.

    Args:
        reference: the recording, `[samples]` or `[channels, samples]`.
        decoded: same shape.
        sampling_rate: of both, Hz.
        metrics: names from `METRICS`; PESQ and STOI mean nothing for music.

    Raises:
        AudioInputError: waveforms that cannot be compared at all: other shapes, no samples, NaN, integers.
        OptionError: a name that is no metric.
    """
    _pair(reference, decoded)
    check_sampling_rate(sampling_rate)
    scores: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name in metrics:
        check_choice("metrics", name, METRICS)
        try:
            scores[name] = METRICS[name].function(reference, decoded, sampling_rate)
        except (AudioInputError, MissingDependencyError) as error:
            skipped[name] = str(error)
    return Metrics(scores, skipped)


# Codebooks


@dataclass(frozen=True)
class CodebookUse:
    """How many of a codebook's entries some codes use, and how evenly.

    Attributes:
        num_codes: codes counted.
        distinct: entries that occur.
        size: entries that could occur.
        share: distinct / size.
        entropy_bits: entropy of the entries' frequencies; at most log2(size), and at most log2(num_codes).
        perplexity: 2 ** entropy_bits, the number of equally used entries with that entropy.
    """

    num_codes: int
    distinct: int
    size: int
    share: float
    entropy_bits: float
    perplexity: float


def codebook_use(codes: Any, size: int) -> CodebookUse:
    """Count the entries of one codebook in integer `codes` of any shape, all in `[0, size)`.

    Raises:
        CodesError: no codes, codes that are no integers, or codes outside the codebook.
    """
    codes = np.asarray(codes).ravel()
    if codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise CodesError(f"{codes.size} codes of dtype {codes.dtype}: give at least one integer code.")
    if codes.min() < 0 or codes.max() >= size:
        raise CodesError(f"Codes lie in [{codes.min()}, {codes.max()}]: legal are 0 to {size - 1}.")
    counts = np.bincount(codes.astype(np.int64))
    frequencies = counts[counts > 0] / codes.size
    entropy = float(-(frequencies * np.log2(frequencies)).sum()) + 0.0  # + 0.0: a single entry has 0, not -0
    distinct = len(frequencies)
    return CodebookUse(codes.size, distinct, size, distinct / size, entropy, 2.0**entropy)


# Waveforms that come in


def _pair(reference: Any, decoded: Any) -> tuple[Samples, Samples]:
    """Both as `[channels, samples]` float64: a float32 FFT has more noise than the floor of the log-mels."""
    pair = as_samples(reference).astype(np.float64), as_samples(decoded).astype(np.float64)
    if pair[0].shape != pair[1].shape:
        raise AudioShapeError(
            f"reference is [channels, samples] = {list(pair[0].shape)}, decoded {list(pair[1].shape)}: only equal "
            "shapes compare. Decode with length= of the original, and resample both to one rate."
        )
    return pair


def _power_db(power: float, reference_power: float) -> float:
    """Ratio of two powers in dB, within +-MAX_DB; two zeros are equal."""
    if power == reference_power:
        return 0.0
    if power == 0 or reference_power == 0:
        return math.copysign(MAX_DB, power - reference_power)
    decibel = 10 * (math.log10(power) - math.log10(reference_power))
    return min(max(decibel, -MAX_DB), MAX_DB)


# How the speech scores are computed

# Utterances of PESQ and the gaps between them last 0.2 s or more, and its tables hold 50 of them.
_PESQ_PIECE_SECONDS = 20


def _pesq(reference: Any, decoded: Any, sampling_rate: int, rate: int) -> float:
    package = _optional_package("pesq")
    channels = zip(*_speech_pair(reference, decoded, sampling_rate, rate), strict=True)
    return float(np.mean([_pesq_mono(package, r, d, rate) for r, d in channels]))


def _pesq_mono(package: ModuleType, reference: Samples, decoded: Samples, rate: int) -> float:
    num_pieces = math.ceil(len(reference) / (_PESQ_PIECE_SECONDS * rate))
    pieces = zip(np.array_split(reference, num_pieces), np.array_split(decoded, num_pieces), strict=True)
    scores = [score for r, d in pieces if (score := _pesq_piece(package, r, d, rate)) is not None]
    if not scores:
        raise AudioInputError("PESQ does not exist for this clip: it finds no utterance in the reference.")
    return float(np.mean(scores))


def _pesq_piece(package: ModuleType, reference: Samples, decoded: Samples, rate: int) -> float | None:
    """MOS-LQO of at most 20 s of mono, None where the reference holds no utterance."""
    if np.ptp(reference) == 0:  # the package divides by the peak
        return None
    if _power_db(float(np.var(decoded)), float(np.var(reference))) <= -MAX_DB:
        return 1.0
    try:
        return package.pesq(rate, reference, decoded, "wb" if rate == WIDE_BAND else "nb")
    except package.NoUtterancesError:
        return None
    except package.BufferTooShortError as error:
        raise AudioInputError(
            f"PESQ needs a quarter of a second; this clip has {len(reference) / rate:.3f} s."
        ) from error


# STOI correlates over 30 windows of 25.6 ms with a hop of 12.8 ms.
_STOI_SECONDS = 0.4


def _stoi(reference: Any, decoded: Any, sampling_rate: int, extended: bool) -> float:
    package = _optional_package("pystoi")
    channels = zip(*_speech_pair(reference, decoded, sampling_rate, WIDE_BAND), strict=True)
    return float(np.mean([_stoi_mono(package, r, d, extended) for r, d in channels]))


def _stoi_mono(package: ModuleType, reference: Samples, decoded: Samples, extended: bool) -> float:
    too_short = f"STOI needs {_STOI_SECONDS} s of speech in the reference; this clip has less."
    if np.ptp(reference) == 0 or len(reference) < _STOI_SECONDS * WIDE_BAND:
        raise AudioInputError(too_short)
    if np.ptp(decoded) == 0:
        return 0.0
    with warnings.catch_warnings(), _fixed_numpy_seed():
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        try:
            return float(package.stoi(reference, decoded, WIDE_BAND, extended=extended))
        except RuntimeWarning as warning:  # else the package returns 1e-5
            raise AudioInputError(too_short) from warning


@contextmanager
def _fixed_numpy_seed() -> Generator[None]:
    """ESTOI dithers with NumPy's global generator, which decides the score of silent frames: same input, same score."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _speech_pair(reference: Any, decoded: Any, sampling_rate: int, rate: int) -> tuple[Samples, Samples]:
    """Both at `rate`."""
    reference, decoded = _pair(reference, decoded)
    if check_sampling_rate(sampling_rate) < rate:
        raise SamplingRateError(f"This score needs waveforms of {rate} Hz or more; these have {sampling_rate} Hz.")
    return _resample(reference, sampling_rate, rate), _resample(decoded, sampling_rate, rate)


def _resample(samples: Samples, sampling_rate: int, rate: int) -> Samples:
    if sampling_rate == rate:
        return samples
    silent = np.ptp(samples, axis=1, keepdims=True) == 0  # a constant stays silent: its ends would ring
    return soxr.resample(np.where(silent, 0.0, samples).T, sampling_rate, rate).T


def _optional_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f'{name} is not installed: pip install "audiotok[metrics]".') from error


# How the spectral scores are computed

# Window in ms and mel bands at 16 kHz.
_MEL_SCALES = ((32, 40), (64, 80), (128, 80))
_MEL_FLOOR = 1e-5
_FRAMES_PER_BLOCK = 1024


def _si_sdr(reference: Samples, decoded: Samples) -> float:
    silent = np.ptp(reference) == 0, np.ptp(decoded) == 0
    if any(silent):
        return MAX_DB if all(silent) else -MAX_DB
    reference, decoded = reference - reference.mean(), decoded - decoded.mean()
    target = (decoded @ reference) / (reference @ reference) * reference
    distortion = decoded - target
    return _power_db(target @ target, distortion @ distortion)


def _mel_distance(pair: Samples, sampling_rate: int, window_ms: int, bands: int) -> float:
    """Of `[2, channels, samples]`, at one resolution."""
    num_samples = _window_samples(sampling_rate, window_ms)
    filters = _mel_filters(sampling_rate, num_samples, bands)
    total, count = 0.0, 0
    for magnitudes in _magnitude_blocks(pair, num_samples):
        reference, decoded = np.log(magnitudes @ filters + _MEL_FLOOR)
        total += float(np.abs(reference - decoded).sum())
        count += reference.size
    return total / count


def _window_samples(sampling_rate: int, window_ms: int) -> int:
    """A multiple of four, so that the hop is exactly a quarter."""
    return max(4 * round(sampling_rate * window_ms / 4000), 4)


@cache
def _mel_filters(sampling_rate: int, num_samples: int, bands: int) -> Samples:
    """`[bins, bands]`, with the factor that makes magnitudes of any rate those of 16 kHz."""
    from transformers.audio_utils import hertz_to_mel, mel_filter_bank

    top = sampling_rate / 2
    bands = max(round(bands * hertz_to_mel(top, "htk") / hertz_to_mel(WIDE_BAND / 2, "htk")), 1)
    filters = mel_filter_bank(num_samples // 2 + 1, bands, 0.0, top, sampling_rate, norm=None, mel_scale="htk")
    return filters * (WIDE_BAND / sampling_rate)


def _magnitude_blocks(waveforms: Samples, num_samples: int) -> Iterator[Samples]:
    """Centred, reflect-padded STFT of `[..., samples]` → blocks `[..., frames, bins]`: an hour fits in memory."""
    edges = [(0, 0)] * (waveforms.ndim - 1) + [(num_samples // 2,) * 2]
    padded = np.pad(waveforms, edges, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, num_samples, axis=-1)[..., :: num_samples // 4, :]
    window = np.hanning(num_samples + 1)[:-1]
    for start in range(0, frames.shape[-2], _FRAMES_PER_BLOCK):
        yield np.abs(np.fft.rfft(frames[..., start : start + _FRAMES_PER_BLOCK, :] * window))


def _long_term_power(waveform: Samples, sampling_rate: int) -> Samples:
    """`[bins]`, power of `[channels, samples]` summed over channels and 128 ms frames."""
    blocks = _magnitude_blocks(waveform, _window_samples(sampling_rate, 128))
    return np.sum([(block**2).sum(axis=(0, 1)) for block in blocks], axis=0)


def _third_octaves(sampling_rate: int) -> tuple[Samples, list[float]]:
    """Band edges and nominal centres (IEC 61260, base ten), from 100 Hz up, below half the rate."""
    highest = math.floor(10 * math.log10(sampling_rate / 2000) - 0.5)
    exponents = np.arange(-10, highest + 1)
    edges = 1000 * 10 ** (np.arange(-10.5, highest + 1) / 10)
    nominal = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
    centres = [nominal[k % 10] * 10.0 ** (3 + k // 10) for k in exponents.tolist()]
    return edges, centres
