"""Draw how codes become ids, with the layouts themselves: `python -m audiotok.recipes.draw_layouts OUT.png`.

Three codebooks of four frames; colour is the codebook, the number in a cell is its frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from audiotok.layouts import get_layout
from audiotok.recipes.command_line import run_command
from audiotok.vocabulary import AudioVocabulary

COLOURS = ("#2b6cb0", "#dd8452", "#55a868")
PAD_COLOUR = "#d0d0d0"
NUM_FRAMES, BOOK_SIZE = 4, 10

# (title, layout, frames per code of each codebook, codes in each frame)
ROWS = (
    ("interleaved: frame by frame, coarse to fine", "interleaved", (1, 1, 1), None),
    ("coarse_first: all of codebook 0, then 1, then 2", "coarse_first", (1, 1, 1), None),
    ("variable: a frame ends where the next id belongs to codebook 0", "variable", (1, 1, 1), (3, 1, 2, 3)),
    ("multirate: each coarse code with the finer ones under it", "multirate", (4, 2, 1), None),
    ("parallel: one stream a codebook", "parallel", (1, 1, 1), None),
    ("delay: each codebook one step later, padding in the corners", "delay", (1, 1, 1), None),
)


def ids_of(layout: str, strides: tuple[int, ...], depths: tuple[int, ...] | None) -> tuple[np.ndarray, AudioVocabulary]:
    """Ids `[S, L]` whose code is the number of its frame."""
    vocabulary = AudioVocabulary((BOOK_SIZE,) * len(strides))
    frames = NUM_FRAMES if max(strides) == 1 else 2 * strides[0]
    codes = [np.arange(frames // stride) for stride in strides]
    fitted = get_layout(layout, vocabulary, strides, depths is not None)
    if max(strides) > 1:
        ids = fitted.codes_to_ids(codes)
    elif depths is None:
        ids = fitted.codes_to_ids(np.stack(codes))
    else:
        active = np.arange(len(strides))[:, None] < np.array(depths)
        ids = fitted.codes_to_ids(np.stack(codes) * active, np.array(depths))
    return np.atleast_2d(ids), vocabulary


def draw_cells(axes: Axes, ids: np.ndarray, vocabulary: AudioVocabulary) -> None:
    """One square an id, streams from top to bottom."""
    for (stream, step), id_ in np.ndenumerate(ids):
        is_pad = id_ == vocabulary.pad_token_id
        colour = PAD_COLOUR if is_pad else COLOURS[int(vocabulary.codebook_of(id_))]
        axes.add_patch(_square(step, stream, colour))
        label = "" if is_pad else str(int(id_) % BOOK_SIZE)
        axes.text(step + 0.5, stream + 0.52, label, ha="center", va="center", color="white", fontsize=9, weight="bold")
    axes.set_xlim(0, 14.2)
    axes.set_ylim(len(ids), 0)
    axes.set_aspect("equal")
    axes.axis("off")


def _square(step: int, stream: int, colour: str) -> Rectangle:
    return Rectangle((step + 0.04, stream + 0.04), 0.92, 0.92, facecolor=colour, edgecolor="none")


def layouts_figure() -> Figure:
    drawn = [(title, *ids_of(layout, strides, depths)) for title, layout, strides, depths in ROWS]
    heights = [len(ids) + 0.9 for _, ids, _ in drawn]
    figure = Figure(figsize=(8.2, 0.55 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(drawn), 1, gridspec_kw={"height_ratios": heights})
    for axes, (title, ids, vocabulary) in zip(all_axes, drawn, strict=True):
        draw_cells(axes, ids, vocabulary)
        axes.set_title(title, loc="left", fontsize=10)
    legend = [_square(0, 0, colour) for colour in (*COLOURS, PAD_COLOUR)]
    names = [*(f"codebook {q}" for q in range(len(COLOURS))), "<|audio_pad|>"]
    figure.legend(legend, names, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def main(output: Annotated[Path, typer.Argument(help="PNG or SVG to write.")]) -> None:
    """Write the picture of README."""
    layouts_figure().savefig(output, dpi=110)


if __name__ == "__main__":
    run_command(main)
