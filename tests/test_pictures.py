"""The picture of a round trip shows what is there: levels, frequencies, times and codes."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest

from audiotok.cli.pictures import roundtrip_figure
from audiotok.errors import AudioShapeError, MissingDependencyError

RATE = 16_000


def sine(hertz: float, seconds: float = 2.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)[None]


def draw(figure: object) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def test_five_panels_on_one_time_axis() -> None:
    wave = sine(1000)
    figure = roundtrip_figure(wave, wave, RATE, np.arange(100)[None], "a title")
    panels = figure.axes[:5]
    assert [ax.get_title(loc="left") for ax in panels] == ["original", "decoded", "original", "decoded", "ids (100)"]
    assert {ax.get_xlim() for ax in panels} == {(0.0, 2.0)}
    assert figure.get_suptitle() == "a title"
    assert draw(figure).startswith(b"\x89PNG")


def test_spectrograms_share_a_scale_and_show_the_frequency() -> None:
    loud, quiet = sine(1000), sine(3000, level=0.05)
    figure = roundtrip_figure(loud, quiet, RATE, np.zeros((1, 100), int), "")
    images = [ax.images[0] for ax in figure.axes[2:4]]
    assert images[0].get_clim() == images[1].get_clim() == (-80, 0)
    for image, hertz, level in zip(images, (1000, 3000), (0, -20), strict=True):
        power = np.asarray(image.get_array())
        middle = power[:, power.shape[1] // 2]
        _, _, low, high = image.get_extent()
        assert (low, high) == (0, RATE / 2000)
        assert np.argmax(middle) / (len(middle) - 1) * high == pytest.approx(hertz / 1000, abs=0.05)
        assert middle.max() == pytest.approx(level, abs=1)


def test_an_event_stands_at_its_time() -> None:
    wave = np.zeros((1, 4 * RATE))
    wave[0, 3 * RATE] = 1.0  # a click at 3 s
    figure = roundtrip_figure(wave, wave, RATE, np.zeros((1, 200), int), "")
    power = np.asarray(figure.axes[2].images[0].get_array()).max(axis=0)
    assert (np.argmax(power) + 0.5) / len(power) * 4 == pytest.approx(3, abs=0.02)
    outline = figure.axes[0].collections[0].get_paths()[0].vertices
    assert outline[np.argmax(outline[:, 1]), 0] == pytest.approx(3, abs=0.01)


def test_waveforms_share_a_scale() -> None:
    figure = roundtrip_figure(sine(100), sine(100, level=0.1), RATE, np.zeros((1, 100), int), "")
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim() == pytest.approx((-0.525, 0.525), rel=1e-3)


def test_one_codebook_is_dots_at_the_middle_of_frames() -> None:
    codes = np.array([[7, 20_000, 3, 12]])
    figure = roundtrip_figure(sine(100), sine(100), RATE, codes, "")
    times, heights = figure.axes[4].lines[0].get_data()
    np.testing.assert_allclose(times, [0.25, 0.75, 1.25, 1.75])
    np.testing.assert_array_equal(heights, codes[0])


def test_several_codebooks_are_an_image() -> None:
    codes = np.random.default_rng(0).integers(0, 64, (4, 100))
    figure = roundtrip_figure(sine(100), sine(100), RATE, codes, "")
    image = figure.axes[4].images[0]
    np.testing.assert_array_equal(image.get_array(), codes)
    left, right, bottom, top = image.get_extent()
    assert (left, right) == (0, 2) and top < bottom  # the coarsest codebook is on top
    assert draw(figure)


def test_codebooks_of_different_rates_are_stretched() -> None:
    codes = [np.array([1, 2]), np.array([3, 4, 5, 6])]
    figure = roundtrip_figure(sine(100), sine(100), RATE, codes, "")
    np.testing.assert_array_equal(figure.axes[4].images[0].get_array(), [[1, 1, 2, 2], [3, 4, 5, 6]])


@pytest.mark.parametrize(
    "wave",
    [np.zeros((1, RATE)), np.ones((1, 1)), np.ones((1, 7)), sine(100).repeat(2, axis=0)],
    ids=lambda w: str(w.shape),
)
def test_silence_a_single_sample_and_stereo_are_drawn(wave: np.ndarray) -> None:
    figure = roundtrip_figure(wave, wave, RATE, np.zeros((1, 1), int), "")
    assert draw(figure)
    if not wave.any():
        assert np.asarray(figure.axes[2].images[0].get_array()).max() <= -80  # black, not the colour of the loudest


def test_hours_cost_no_more_ink() -> None:
    wave = np.random.default_rng(0).standard_normal((1, 600 * RATE)).astype(np.float32)
    figure = roundtrip_figure(wave, wave, RATE, np.zeros((1, 600 * 50), int), "")
    assert figure.axes[2].images[0].get_array().shape[1] < 2100
    assert len(figure.axes[0].collections[0].get_paths()[0].vertices) < 4100


def test_waveforms_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(AudioShapeError, match="32000 samples, decoded 31999"):
        roundtrip_figure(sine(100), sine(100)[:, 1:], RATE, np.zeros((1, 1), int), "")
    with pytest.raises(AudioShapeError):
        roundtrip_figure(np.zeros((1, 0)), np.zeros((1, 0)), RATE, np.zeros((1, 0), int), "")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"audiotok\[train\]"):
        roundtrip_figure(sine(100), sine(100), RATE, np.zeros((1, 1), int), "")


def test_nothing_global_is_touched() -> None:
    code = (
        "import sys, matplotlib, numpy as np\n"
        "matplotlib.use('svg')\n"
        "from audiotok.cli.pictures import roundtrip_figure\n"
        "before = dict(matplotlib.rcParams)\n"
        "figure = roundtrip_figure(np.ones((1, 999)), np.ones((1, 999)), 8000, np.ones((1, 9), int), '')\n"
        "figure.savefig(sys.stdout.buffer, format='png')\n"
        "assert dict(matplotlib.rcParams) == before and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"\x89PNG")
