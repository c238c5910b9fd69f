"""The picture of a round trip: both waveforms, both spectrograms and the ids between them, on one time axis.

Recordings of hours cost no more ink than short ones: waveforms are drawn as their envelope, and spectra are taken
at no more than `_COLUMNS` places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from audiotok.errors import AudioShapeError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2000  # about the picture's width in dots
_WINDOW_S = 0.032  # of the spectra
_RANGE_DB = 80.0  # below the loudest point of both spectrograms
_SILENCE_DB = -100.0  # a loudest point under this is drawn as the silence that it is
_ROWS = (1.0, 1.0, 1.7, 1.7, 1.6)
_ORIGINAL, _DECODED, _IDS = "#1f4e79", "#b3541e", "#5b2a86"


def roundtrip_figure(original: Any, decoded: Any, sampling_rate: int, codes: Any, title: str) -> Figure:
    """A recording, what came back, and the codes between.

    Args:
        original: `[C, N]` floats; several channels are drawn as their mean.
        decoded: same shape.
        sampling_rate: of both, Hz.
        codes: `[Q, T]` integers; a list of `[T_q]` for codebooks of different rates.
        title: one line above everything.

    Returns:
        A figure of its own, known to no pyplot; `figure.savefig(path)` draws it.

    Raises:
        AudioShapeError: the waveforms have different shapes, or no samples.
        MissingDependencyError: matplotlib is not installed.
    """
    figure_class = _figure_class()
    waves = [_mono(original), _mono(decoded)]
    if waves[0].shape != waves[1].shape or not waves[0].size:
        raise AudioShapeError(
            f"original has {len(waves[0])} samples, decoded {len(waves[1])}: give two waveforms of one length, with "
            "at least one sample."
        )
    duration = len(waves[0]) / sampling_rate
    figure = figure_class(figsize=(11, 8.5), dpi=130, layout="constrained")
    axes = figure.subplots(len(_ROWS), 1, sharex=True, height_ratios=_ROWS)
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    _draw_waveforms(axes[:2], waves, duration)
    _draw_spectrograms(axes[2:4], waves, sampling_rate)
    _draw_codes(axes[4], codes, duration)
    for name, ax in zip(("original", "decoded", "original", "decoded"), axes, strict=False):
        _label(ax, name)
    axes[-1].set_xlabel("time, s")
    axes[-1].set_xlim(0, duration)
    figure.align_ylabels(axes)
    return figure


def _figure_class() -> type[Figure]:
    """matplotlib's `Figure` by itself: it draws with Agg and leaves the caller's backend alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'matplotlib is not installed, and pictures need it: pip install "audiotok[train]".'
        ) from error
    return Figure


def _mono(waveform: Any) -> np.ndarray:
    samples = np.atleast_2d(np.asarray(waveform, dtype=np.float32))
    return samples.mean(axis=0)


def _label(ax: Axes, name: str) -> None:
    ax.set_title(name, loc="left", fontsize=10, pad=3)


def _draw_waveforms(axes: Sequence[Axes], waves: Sequence[np.ndarray], duration: float) -> None:
    """Both at one scale, so that a change of level shows."""
    peak = max(float(np.abs(wave).max()) for wave in waves) or 1.0
    for ax, wave, colour in zip(axes, waves, (_ORIGINAL, _DECODED), strict=True):
        low, high = _envelope(wave)
        times = np.linspace(0, duration, len(low))
        ax.fill_between(times, low, high, color=colour, linewidth=0.6)
        ax.set_ylim(-1.05 * peak, 1.05 * peak)
        ax.set_ylabel("amplitude")


def _envelope(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest sample of each of at most `_COLUMNS` stretches."""
    starts = np.unique(np.linspace(0, len(wave), min(len(wave), _COLUMNS), endpoint=False).astype(np.int64))
    return np.minimum.reduceat(wave, starts), np.maximum.reduceat(wave, starts)


def _draw_spectrograms(axes: Sequence[Axes], waves: Sequence[np.ndarray], sampling_rate: int) -> None:
    """In dB of one colour scale, whose zero is the loudest point of both."""
    levels = [_level_db(wave, sampling_rate) for wave in waves]
    top = max(_SILENCE_DB, *(float(level.max()) for level in levels))
    for ax, level in zip(axes, levels, strict=True):
        image = ax.imshow(
            level - top,
            origin="lower",
            aspect="auto",
            extent=(0, len(waves[0]) / sampling_rate, 0, sampling_rate / 2000),
            cmap="magma",
            vmin=-_RANGE_DB,
            vmax=0,
        )
        ax.set_ylabel("kHz")
    axes[0].figure.colorbar(image, ax=list(axes), pad=0.01, aspect=30, label="dB")


def _level_db(wave: np.ndarray, sampling_rate: int) -> np.ndarray:
    """`[bins, columns]`, the spectrum of windows around evenly spaced places of the clip; a full sine has 0 dB."""
    size = 2 * round(_WINDOW_S * sampling_rate / 2)
    columns = min(_COLUMNS, 1 + 8 * len(wave) // size)
    starts = ((np.arange(columns) + 0.5) * len(wave) / columns).astype(np.int64)
    window = np.hanning(size + 1)[:-1]
    frames = np.pad(wave, size // 2)[starts[:, None] + np.arange(size)]
    amplitude = np.abs(np.fft.rfft(frames * window)).T * 2 / window.sum()
    return 20 * np.log10(amplitude + 1e-10)


def _draw_codes(ax: Axes, codes: Any, duration: float) -> None:
    """One codebook as dots at the height of the code; several as an image, a row each, the coarsest on top."""
    from matplotlib.ticker import MaxNLocator

    rows = [np.asarray(row) for row in codes]
    if len(rows) == 1:
        times = (np.arange(len(rows[0])) + 0.5) * duration / max(len(rows[0]), 1)
        ax.plot(times, rows[0], ".", color=_IDS, markersize=4.5, markeredgewidth=0)
        ax.set_ylabel("id")
        ax.set_ylim(bottom=-0.04 * (rows[0].max(initial=0) + 1))  # low ids stand clear of the frame
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        _label(ax, f"ids ({len(rows[0]):,})")
        return
    frames = max(len(row) for row in rows)
    image = ax.imshow(
        np.stack([np.repeat(row, frames // len(row)) for row in rows]),
        aspect="auto",
        interpolation="nearest",
        extent=(0, duration, len(rows) - 0.5, -0.5),
        cmap="viridis",
    )
    ax.set_ylabel("codebook")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=12, label="code")
    _label(ax, f"codes ({len(rows)} codebooks, {sum(map(len, rows)):,} codes)")
