"""How far rounding moves the codes of a codec: the measurement behind `AudioCodec.margin_bounds`.

    python -m audiotok.recipes.measure_margins auv-mini --data corpus/test
    python -m audiotok.recipes.measure_margins auv-full --minutes 20 --json margins.json

Each clip is encoded alone (batch 1, one thread, float32: the canonical shape), and then in every other shape in which
it may meet the same model: padded, in batches of equal and of ragged lengths, with two threads, and in windows where
the receptive field is finite. All of these have the same codes but for rounding. What is compared is the margin of each
code, (distance of the runner-up - smallest distance) / smallest distance: a code can flip only where rounding moves it
by as much as it is.

The bound is 8 times the largest margin at which a code flipped, or 8 times the furthest that a margin below 1 moved,
whichever is larger: a code with a larger margin in a batch is safe to be that of the clip alone. (Margins of 1 and more
are left out of the second: a winner that is next to its latent has a distance near 0, and a margin that moves a lot
but never down to 0.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from audiotok import AudioCodec, AuvModel
from audiotok.recipes import command_line as cli
from audiotok.recipes.benchmark_models import (
    Waveform,
    cut_to_equal,
    load_tokenizer,
    recorded_clips,
    synthetic_clips,
)
from audiotok.recipes.evaluation_report import Table
from audiotok.windows import Windowing, encode_windows

SAFETY_FACTOR = 8.0
# Margins from here on are so far from a tie that their own movement says nothing.
NEAR = 1.0
BATCHES = (2, 4, 16)
WINDOW_S = 2.0


@dataclass(frozen=True)
class Encoded:
    """One clip in one shape: codes and margins `[Q, T]`; unit directions searched with `[T, d]`, if known."""

    codes: np.ndarray
    margins: np.ndarray
    directions: np.ndarray | None = None


@dataclass
class Movement:
    """What one shape moved, over all clips so far.

    Attributes:
        shape: its name.
        codes: compared.
        flip_margins: of each code that differed, the larger one of its two margins.
        near: the furthest that a margin below 1 moved.
        relative: the furthest that a margin moved, as a share of it.
        direction: the furthest that a searched direction moved; squared distances move by up to twice this.
    """

    shape: str
    codes: int = 0
    flip_margins: list[float] = field(default_factory=list)
    near: float = 0.0
    relative: float = 0.0
    direction: float | None = None

    @property
    def bound(self) -> float:
        return SAFETY_FACTOR * max([self.near, *self.flip_margins])

    def add(self, alone: Encoded, other: Encoded) -> None:
        """Compare a clip with itself alone."""
        finite = np.isfinite(alone.margins)  # a range of one code has no runner-up
        before, after = alone.margins[finite], other.margins[finite]
        flipped = (alone.codes != other.codes)[finite]
        self.codes += alone.codes.size
        self.flip_margins += np.maximum(before, after)[flipped].tolist()
        moved = np.abs(after - before)[~flipped]
        near = np.minimum(before, after)[~flipped] < NEAR
        self.near = max(self.near, float(moved[near].max(initial=0.0)))
        self.relative = max(self.relative, float((moved / before[~flipped].clip(min=1e-9)).max(initial=0.0)))
        if alone.directions is not None and other.directions is not None:
            furthest = float(np.linalg.norm(other.directions - alone.directions, axis=1).max(initial=0.0))
            self.direction = max(self.direction or 0.0, furthest)


# Shapes


Shape = Callable[[Sequence[Waveform]], list[Encoded]]


def shapes(codec: AudioCodec) -> dict[str, tuple[str, Shape]]:
    """Name → lengths of the clips ("ragged" or "equal"), and what encodes them in that shape."""
    found: dict[str, tuple[str, Shape]] = {
        "alone, padded": ("ragged", lambda clips: [_encode(codec, [c], len(c) + 7777)[0] for c in clips]),
    }
    for size in BATCHES:
        for lengths in ("equal", "ragged"):
            found[f"batch of {size}, {lengths}"] = (lengths, lambda clips, n=size: _in_batches(codec, clips, n))
    if codec.device.type == "cpu":
        found["alone, 2 threads"] = ("ragged", lambda clips: _in_threads(2, lambda: _in_batches(codec, clips, 1)))
        found["batch of 4, ragged, 2 threads"] = (
            "ragged",
            lambda clips: _in_threads(2, lambda: _in_batches(codec, clips, 4)),
        )
    if codec.facts.receptive_field_samples is not None:
        found[f"windows of {WINDOW_S:g} s"] = ("ragged", lambda clips: [_windows(codec, clip) for clip in clips])
    return found


def _in_batches(codec: AudioCodec, clips: Sequence[Waveform], size: int) -> list[Encoded]:
    return [one for i in range(0, len(clips), size) for one in _encode(codec, clips[i : i + size])]


@torch.inference_mode()
def _encode(codec: AudioCodec, clips: Sequence[Waveform], total: int = 0) -> list[Encoded]:
    """One masked batch, of at least `total` samples."""
    total = max([total, *map(len, clips)])
    values = torch.stack([F.pad(torch.from_numpy(clip), (0, total - len(clip))) for clip in clips])[:, None]
    mask = torch.arange(total) < torch.tensor([len(clip) for clip in clips])[:, None]
    with _searched(codec) as directions:
        output = codec.encode(values.to(codec.device), mask.long().to(codec.device), return_margins=True)
    frames = [codec.facts.num_frames(len(clip)) for clip in clips]
    return [
        Encoded(
            output.audio_codes[i, :, :n].cpu().numpy(),
            output.margins[i, :, :n].cpu().numpy(),
            directions[0][i, :n].cpu().numpy() if directions else None,
        )
        for i, n in enumerate(frames)
    ]


@contextmanager
def _searched(codec: AudioCodec) -> Iterator[list[Tensor]]:
    """The unit directions `[B, T, d]` that the first codebook of an AUV is searched with."""
    seen: list[Tensor] = []
    if not isinstance(codec, AuvModel):
        yield seen
        return

    def keep(quantizer: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(F.normalize(quantizer.project_in(inputs[0]), dim=1).transpose(1, 2))

    handle = codec.quantizer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _in_threads(count: int, encode: Callable[[], list[Encoded]]) -> list[Encoded]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return encode()
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _windows(codec: AudioCodec, clip: Waveform) -> Encoded:
    """Window by window, with as much context as the receptive field asks for."""
    rest = [clip]

    def read(samples: int) -> np.ndarray:
        taken, rest[0] = rest[0][:samples], rest[0][samples:]
        return taken[None]

    def encode(values: Tensor, mask: Tensor) -> Any:
        return codec.encode(values.to(codec.device), mask.to(codec.device), return_margins=True)

    windowing = Windowing.from_seconds(codec.facts, WINDOW_S, 0.0, codec.facts.receptive_field_samples)
    pieces = list(encode_windows(codec, read, windowing, encode))
    codes, margins = (torch.cat([getattr(p, key)[0] for p in pieces], dim=1) for key in ("audio_codes", "margins"))
    return Encoded(codes.cpu().numpy(), margins.cpu().numpy())


# Measuring


def measure(codec: AudioCodec, clips: Sequence[Waveform], minutes: float = 5.0) -> Iterator[list[Movement]]:
    """Compare clip after clip, in groups of the largest batch; yields the movements so far, until time is over.

    Args:
        codec: float32, in eval mode.
    """
    found = shapes(codec)
    movements = {name: Movement(name) for name in found}
    start, threads = time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for first in range(0, len(clips), max(BATCHES)):
            group = clips[first : first + max(BATCHES)]
            middle = sorted(map(len, group))[len(group) // 2]
            groups = {"ragged": group, "equal": cut_to_equal(group, middle)}
            alone = {lengths: _in_batches(codec, same, 1) for lengths, same in groups.items()}
            for name, (lengths, encode) in found.items():
                for reference, other in zip(alone[lengths], encode(groups[lengths]), strict=True):
                    movements[name].add(reference, other)
            yield list(movements.values())
            if time.monotonic() - start > 60 * minutes:
                return
    finally:
        torch.set_num_threads(threads)


def bound_of(movements: Sequence[Movement]) -> float:
    """The smallest margin that is safe, over all shapes."""
    return max(movement.bound for movement in movements)


def table(movements: Sequence[Movement]) -> Table:
    rows = [
        [
            m.shape,
            str(m.codes),
            str(len(m.flip_margins)),
            f"{max(m.flip_margins):.1e}" if m.flip_margins else "–",
            f"{m.near:.1e}",
            f"{m.relative:.1e}",
            "–" if m.direction is None else f"{m.direction:.1e}",
        ]
        for m in movements
    ]
    header = "shape|codes|flips|largest flip margin|near margin moved|margin moved, relative|direction moved"
    return Table("Each clip in other shapes than alone", header.split("|"), rows)


# Command line


def run(
    name: Annotated[
        str, typer.Argument(help="Tokenizer, training config (.yaml), or auv-full and so on: drawn weights.")
    ],
    data: Annotated[Path | None, typer.Option(help="Folder of recordings; synthetic clips without it.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no further group of 16 clips after this time.")] = 5.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the longest clip.")] = 8.0,
    limit: Annotated[int, typer.Option(min=1, help="Clips at most.")] = 1000,
    device: cli.Device = "cpu",
    seed: cli.Seed = 0,
    json_file: cli.JsonFile = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Measure how far rounding moves codes, and print the bound for `AudioCodec.margin_bounds`."""
    cli.check_outputs([json_file], overwrite)
    codec = load_tokenizer(name, seed).to(device).codec
    rate, progress = codec.facts.sampling_rate, Console(stderr=True)
    if data is not None:
        clips = recorded_clips(data, limit, seconds, rate, seed)
    else:
        spread = 10 ** np.random.default_rng(seed).uniform(-1, 0, size=min(limit, 64))
        clips = synthetic_clips((seconds * spread).tolist(), rate, seed)
    movements: list[Movement] = []
    for movements in measure(codec, clips, minutes):
        progress.print(f"{movements[0].codes} codes, bound {bound_of(movements):.1e}", style="dim", highlight=False)
    Console().print(table(movements).rich())
    key = f'("{codec.device.type}", {codec.dtype})'
    typer.echo(f"margin_bounds = {{{key}: {bound_of(movements):.1e}}}  # {movements[0].codes} codes, {name}")
    report = {"name": name, "bound": bound_of(movements), "safety_factor": SAFETY_FACTOR}
    cli.write_json(json_file, report | {"shapes": [asdict(movement) for movement in movements]})


if __name__ == "__main__":
    cli.run_command(run)
