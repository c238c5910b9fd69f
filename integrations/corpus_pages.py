"""The figures of a corpus as a picture, and as one page of HTML that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from audiotok.errors import MissingDependencyError, OptionError
from audiotok.integrations.corpus_stats import CorpusStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png")
_HOURS, _USE, _LIMIT, _CONTEXT = "#1f4e79", "#5b2a86", "#b8b8b8", ("#bcd2e8", "#6f9bc8", "#1f4e79")
_POINTS = 400  # of a curve
_MINUTES_FROM = 300.0  # seconds
_DPI = 150
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.made { color: #666; margin-top: .2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { font-weight: 600; border-bottom: 1px solid #bbb; }
img { max-width: 100%; margin-top: 1rem; }
"""


def check_page(suffix: str) -> None:
    """Before the work, not after it.

    Raises:
        OptionError: no suffix of a page.
        MissingDependencyError: matplotlib is not installed.
    """
    if suffix.lower() not in SUFFIXES:
        raise OptionError(f"A page cannot be a {suffix or 'file without a suffix'}: choose {' or '.join(SUFFIXES)}.")
    _figure_class()


def page(stats: CorpusStats, suffix: str) -> bytes:
    """The figures as a file of that kind: ".html" or ".png". Raises as `check_page`."""
    check_page(suffix)
    buffer = io.BytesIO()
    stats_figure(stats).savefig(buffer, format="png", dpi=_DPI)
    if suffix.lower() == ".png":
        return buffer.getvalue()
    return _html(stats, base64.b64encode(buffer.getvalue()).decode()).encode()


# Tables, for the page, the terminal and the card


Table = tuple[str, list[str], list[list[str]]]  # title, heads, rows


def tables(stats: CorpusStats) -> list[Table]:
    """Everything that people want to know, as text."""
    return [_overview(stats), _layouts(stats), _codebooks(stats), _lengths(stats)]


def _overview(stats: CorpusStats) -> Table:
    rows = [
        ("hours", f"{stats.hours:,.2f}"),
        ("clips", f"{stats.clips:,}"),
        *([("clips that failed", f"{stats.failures:,}")] if stats.failures else []),
        *([("clips left out by filters", f"{stats.filtered:,}")] if stats.filtered else []),
        ("frames", f"{stats.frames:,}"),
        ("codes", f"{stats.codes:,}"),
        ("bits a second", f"{stats.bits_per_second:,.1f}"),
        ("bits a second, by entropy", f"{stats.entropy_per_second:,.1f}"),
        *([("codes a frame", f"{stats.codes / stats.frames:.2f}")] if stats.depths else []),
    ]
    return "In all" + ("" if stats.finished else " (not finished)"), ["", ""], [list(row) for row in rows]


def _layouts(stats: CorpusStats) -> Table:
    contexts = list(stats.layouts[0].seconds_in)
    rows = [
        [one.layout, str(one.streams), f"{one.positions_per_second:,.2f}", f"{one.positions:,}"]
        + [f"{seconds:,.1f} s" for seconds in one.seconds_in.values()]
        for one in stats.layouts
    ]
    heads = ["layout", "streams", "positions a second", "positions", *(f"in {context:,}" for context in contexts)]
    return "Audio that fits a language model's context", heads, rows


def _codebooks(stats: CorpusStats) -> Table:
    rows = [
        [
            str(i),
            f"{book.size:,}",
            f"{book.used:,}",
            f"{book.used / book.size:.1%}",
            f"{book.entropy:.3f}",
            f"{book.perplexity:,.1f}",
            f"{book.most_common:.2%}",
        ]
        for i, book in enumerate(stats.codebooks)
    ]
    return "Codebooks", ["codebook", "entries", "used", "", "entropy, bits", "perplexity", "most common"], rows


def _lengths(stats: CorpusStats) -> Table:
    lengths = stats.lengths
    named = {f"{quantile:.0%}": value for quantile, value in lengths.quantiles.items()}
    values = {"shortest": lengths.shortest, **named, "longest": lengths.longest, "mean": lengths.mean}
    return "Length of clips, seconds", list(values), [[f"{value:,.2f}" for value in values.values()]]


def _html(stats: CorpusStats, picture: str) -> str:
    title = f"{stats.corpus}: {stats.hours:,.1f} hours as codes"
    parts = "".join(f"<h2>{html.escape(name)}</h2>{_html_table(heads, rows)}" for name, heads, rows in tables(stats))
    made = f"{stats.tokenizer}, fingerprint {stats.fingerprint}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>"
        f'<p class="made">made by {html.escape(made)}</p>'
        f'<img alt="lengths, codebooks and layouts" src="data:image/png;base64,{picture}">{parts}</body></html>\n'
    )


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in heads)}</tr>" if any(heads) else ""
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


# The picture


def stats_figure(stats: CorpusStats) -> Figure:
    """Lengths of clips, use and entropy of codebooks, and audio in a context.

    Returns:
        A figure of its own, known to no pyplot.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = _figure_class()(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(
        f"{stats.tokenizer}: {stats.hours:,.1f} hours, {stats.clips:,} clips, {stats.codes:,} codes",
        fontsize=13,
        fontweight="bold",
        parse_math=False,
    )
    _draw_lengths(axes[0, 0], stats)
    _draw_use(axes[0, 1], stats)
    third = _draw_depths if stats.depths else _draw_coverage if len(stats.counts) == 1 else _draw_entropy
    third(axes[1, 0], stats)
    _draw_contexts(axes[1, 1], stats)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _figure_class() -> type[Figure]:
    """matplotlib's `Figure` by itself: it draws with Agg and leaves the caller's backend alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'matplotlib is not installed, and pages need it: pip install "audiotok[train]".'
        ) from error
    return Figure


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=11)


def _draw_lengths(ax: Axes, stats: CorpusStats) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    lengths = stats.lengths
    ax.stairs(np.array(lengths.hours) / sum(lengths.hours), lengths.edges, fill=True, color=_HOURS, alpha=0.85)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("length of a clip, s")
    ax.set_ylabel("share of the audio")
    median = lengths.quantiles[0.5]
    is_right = median**2 > lengths.edges[0] * lengths.edges[-1]
    ax.axvline(median, color="black", linewidth=1, linestyle=":")
    ax.annotate(
        f" median clip {median:,.1f} s ", (median, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9,
        ha="right" if is_right else "left",
    )  # fmt: skip
    _title(ax, "Audio by the length of clips")


def _draw_use(ax: Axes, stats: CorpusStats) -> None:
    """How often the entries come, the most common first, beside equal use."""
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    colours = colormaps["viridis"](np.linspace(0, 0.9, len(stats.counts)))
    for i, (counts, colour) in enumerate(zip(stats.counts, colours, strict=True)):
        shares = np.sort(counts)[::-1] / max(counts.sum(), 1)
        shares = shares[shares > 0]
        ranks = np.unique(np.geomspace(1, max(len(shares), 1), _POINTS).astype(int))
        ax.loglog(ranks, shares[ranks - 1], color=colour if len(stats.counts) > 1 else _USE, label=f"codebook {i}")
    for size in {book.size for book in stats.codebooks}:
        ax.loglog([1, size], [1 / size] * 2, color=_LIMIT, linestyle="--", linewidth=1, zorder=0)
    ax.plot([], [], color=_LIMIT, linestyle="--", linewidth=1, label="equal use")
    least = min(counts[counts > 0].min() / counts.sum() for counts in stats.counts if counts.any())
    most = max(book.most_common for book in stats.codebooks)
    top = np.ceil(np.log10(most) + 0.1)
    ax.set_ylim(10 ** min(np.floor(np.log10(least) - 0.1), top - 2), 10**top)  # whole decades, two of them or more
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("entries, the most common first")
    ax.set_ylabel("share of codes")
    if len(stats.counts) <= 12:
        ax.legend(fontsize=8, frameon=False, loc="lower left", ncols=2 if len(stats.counts) > 4 else 1)
    _title(ax, "Use of the codebooks")


def _draw_coverage(ax: Axes, stats: CorpusStats) -> None:
    """Of one codebook: how much of the corpus how few entries make up."""
    (counts,), (book,) = stats.counts, stats.codebooks
    covered = np.append(0, np.cumsum(np.sort(counts)[::-1]) / counts.sum())
    places = np.unique(np.linspace(0, book.size, _POINTS).astype(int))
    ax.plot(places / book.size, covered[places], color=_USE)
    ax.plot([0, 1], [0, 1], color=_LIMIT, linestyle="--", linewidth=1, zorder=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("entries, the most common first")
    ax.set_ylabel("share of codes that they make up")
    _title(ax, f"Entropy of single codes: {book.entropy:.2f} of {np.log2(book.size):.2f} bits")


def _draw_entropy(ax: Axes, stats: CorpusStats) -> None:
    """Of several codebooks, each beside the bits of its codes."""
    from matplotlib.ticker import MaxNLocator

    places, entropies = np.arange(len(stats.codebooks)), [book.entropy for book in stats.codebooks]
    most = [np.log2(book.size) for book in stats.codebooks]
    ax.bar(places, most, color="none", edgecolor=_LIMIT, linewidth=1.2, label="bits of a code", width=0.7)
    bars = ax.bar(places, entropies, color=_USE, label="entropy", width=0.7)
    if len(places) <= 16:
        ax.bar_label(bars, [f"{value:.2f}" for value in entropies], padding=-13, color="white", fontsize=8)
    ax.set_ylim(0, max(most) * 1.2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    ax.set_xlabel("codebook")
    ax.set_ylabel("bits")
    ax.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
    _title(ax, "Entropy of single codes")


def _draw_depths(ax: Axes, stats: CorpusStats) -> None:
    depths = np.array(stats.depths)
    ax.bar(np.arange(1, len(depths) + 1), depths / depths.sum(), color=_USE, width=0.8)
    ax.set_xticks(np.arange(1, len(depths) + 1))
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("codes in a frame")
    ax.set_ylabel("share of frames")
    _title(ax, f"Depth of frames: {stats.codes / stats.frames:.2f} codes in the mean")


def _draw_contexts(ax: Axes, stats: CorpusStats) -> None:
    contexts = list(stats.layouts[0].seconds_in)
    longest, height = max(max(one.seconds_in.values()) for one in stats.layouts), 0.8 / len(contexts)
    unit, name = (60, "minutes") if longest > _MINUTES_FROM else (1, "seconds")
    for i, (context, colour) in enumerate(zip(contexts, _CONTEXT, strict=True)):
        places = np.arange(len(stats.layouts)) + (i - (len(contexts) - 1) / 2) * height
        values = [one.seconds_in[context] / unit for one in stats.layouts]
        label = f"{context:,}" + " positions" * (context == contexts[-1])
        bars = ax.barh(places, values, height, color=colour, label=label)
        ax.bar_label(bars, [f"{value:,.3g}" for value in values], padding=3, fontsize=8)
    ax.set_yticks(np.arange(len(stats.layouts)), [one.layout for one in stats.layouts])
    ax.set_ylim(len(stats.layouts) - 0.5, -0.5)
    ax.set_xlim(0, 1.12 * longest / unit)
    ax.set_xlabel(f"{name} of audio")
    # Above the bars, which may be anywhere.
    ax.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3, columnspacing=1.2)
    _title(ax, "Audio in a context of")
