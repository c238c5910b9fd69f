"""How many codes windows change: the measurement behind `AudioCodec.window_flips`.

    python -m audiotok.recipes.measure_windows auv-full corpus/test --join --seconds 60 --limit 4

Each clip is encoded whole, and then in windows of `chunk_length_s` with `context_s` on each side, and the codes are
compared one by one. Where the receptive field is finite, only rounding can change one. Where a codec attends over
the whole clip, windows change many: how many depends on its weights, on the recordings and on the windows.

The share is no bound. Windows are not certified against the whole clip: another `chunk_length_s` can flip a near-tie
even where none was seen to differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from audiotok import AudioTokenizer, CodecFacts
from audiotok.audio import Waveform, load_audio
from audiotok.encoding import MAX_WHOLE_S, ClipCodes
from audiotok.errors import AudioInputError, OptionError
from audiotok.recipes import command_line as cli
from audiotok.recipes.benchmark_models import find_recordings, load_tokenizer
from audiotok.recipes.evaluation_report import Table
from audiotok.windows import WindowFlips

EXAMPLES = """Examples:

  python -m audiotok.recipes.measure_windows ./my-checkpoint long.flac longer.flac

  python -m audiotok.recipes.measure_windows SWivid/AUV corpus/test --join --windows 60:5 --windows 60:20

  python -m audiotok.recipes.measure_windows auv-full corpus/test --join --limit 4 --json windows.json
"""

# Seconds of windows and of their contexts.
WINDOWS = ["10:1", "10:5", "30:5", "60:5"]


@dataclass
class Comparison:
    """Windows of one kind, over all clips so far.

    Attributes:
        chunk_length_s, context_s: as the tokenizer takes them.
        clips: that are longer than one window; the others are encoded whole in any case.
        codes: of these clips, encoded whole.
        differing: of these codes, those that are others in windows.
    """

    chunk_length_s: float
    context_s: float
    clips: int = 0
    codes: int = 0
    differing: int = 0

    @property
    def share(self) -> float | None:
        """Of the codes that differ; None where no clip was long enough."""
        return self.differing / self.codes if self.codes else None

    def add(self, whole: ClipCodes, windowed: ClipCodes) -> None:
        """Compare a clip's codes with those of its windows."""
        self.clips += 1
        for before, after in zip(active_codes(whole), active_codes(windowed), strict=True):
            self.codes += int((before >= 0).sum())
            self.differing += int((before != after).sum())


def active_codes(clip: ClipCodes) -> list[np.ndarray]:
    """The codes of each codebook, -1 in frames that do not use it."""
    if clip.depths is None:
        return [np.asarray(row) for row in clip.codes]
    return [np.where(clip.depths > q, row, -1) for q, row in enumerate(clip.codes)]


def measure(
    tokenizer: AudioTokenizer, clips: Iterable[np.ndarray], windows: Sequence[tuple[float, float]]
) -> Iterator[list[Comparison]]:
    """Compare clip after clip; yields the comparisons so far, one for each of `windows`.

    Args:
        clips: `[C, N]` float32 at the codec's rate, short enough to be encoded whole.
        windows: pairs of `chunk_length_s` and `context_s`.

    Raises:
        OptionError: a pair that no windows can have.
    """
    facts = tokenizer.codec.facts
    alone = tokenizer.encoder(batch_size=1)
    encoders = [tokenizer.encoder(batch_size=1, chunk_length_s=chunk, context_s=more) for chunk, more in windows]
    comparisons = [Comparison(*pair) for pair in windows]
    for clip in clips:
        (whole,) = alone.encode_batch([clip])
        for encoder, comparison in zip(encoders, comparisons, strict=True):
            window = encoder.windowing
            if window and clip.shape[1] > (window.core + window.context) * facts.hop_length:
                (windowed,) = encoder.encode([Waveform(clip, facts.sampling_rate)])
                comparison.add(whole, windowed)
        yield comparisons


def clips_of(recordings: Iterable[Path], facts: CodecFacts, seconds: float, join: bool) -> Iterator[np.ndarray]:
    """Recordings as `[C, N]` at the codec's rate, cut to `seconds`; with `join` put end to end before that."""
    length, held = round(seconds * facts.sampling_rate), np.empty((facts.channels, 0), np.float32)
    downmix = "mean" if facts.channels == 1 else "repeat"
    for path in recordings:
        found = load_audio(path, target_rate=facts.sampling_rate, channels=facts.channels, downmix=downmix).samples
        if not join:
            yield found[:, :length]
            continue
        held = np.concatenate([held, found], axis=1)
        while held.shape[1] >= length:
            yield held[:, :length]
            held = held[:, length:]


# Report


def stated(comparison: Comparison, name: str, seconds: float) -> WindowFlips | None:
    """What the class of the codec `name` may state in `window_flips`; None where no clip was long enough.

    Args:
        seconds: length of the longest clip.
    """
    if comparison.share is None:
        return None
    measured = f"{comparison.codes:,} codes of {comparison.clips} clips of up to {seconds:g} s, {name}"
    return WindowFlips(comparison.chunk_length_s, comparison.context_s, float(f"{comparison.share:.3g}"), measured)


def table(comparisons: Sequence[Comparison]) -> Table:
    rows = [
        [
            f"{c.chunk_length_s:g} s, context {c.context_s:g} s",
            str(c.clips),
            str(c.codes),
            str(c.differing),
            "–" if c.share is None else f"{100 * c.share:.2f} %",
        ]
        for c in comparisons
    ]
    return Table("Codes that windows change", ["windows", "clips", "codes", "differing", "share"], rows)


# Command line


def run(
    name: Annotated[str, typer.Argument(help="Tokenizer, training config (.yaml), or auv-full: drawn weights.")],
    recordings: Annotated[list[Path], typer.Argument(help="Recordings, or folders of them.")],
    windows: Annotated[
        list[str], typer.Option(metavar="CHUNK:CONTEXT", help="Seconds of a window and on each side of it; repeat it.")
    ] = WINDOWS,
    seconds: Annotated[float, typer.Option(min=0.1, max=MAX_WHOLE_S, help="Clips are cut to this length.")] = 60.0,
    join: Annotated[bool, typer.Option("--join", help="Put recordings end to end first: for short ones.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Clips at most.")] = 16,
    device: cli.Device = "cpu",
    seed: cli.Seed = 0,
    json_file: cli.JsonFile = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Measure how many codes differ between whole clips and windows, and print what `window_flips` may state."""
    cli.check_outputs([json_file], overwrite)
    pairs = [parse_windows(text) for text in windows]
    files = find_recordings(recordings)
    order = np.random.default_rng(seed).permutation(len(files))
    tokenizer, progress = load_tokenizer(name, seed).to(device), Console(stderr=True)
    clips = islice(clips_of((files[i] for i in order), tokenizer.codec.facts, seconds, join), limit)
    comparisons: list[Comparison] = []
    for number, comparisons in enumerate(measure(tokenizer, clips, pairs), 1):
        shares = ", ".join(row[-1] for row in table(comparisons).rows)
        progress.print(f"clip {number}: {shares} so far", style="dim", highlight=False)
    if not any(comparison.clips for comparison in comparisons):
        raise AudioInputError("No clip is longer than a window: give longer recordings, shorter --windows, or --join.")
    Console().print(table(comparisons).rich())
    found = [flips for comparison in comparisons if (flips := stated(comparison, tokenizer.name_or_path, seconds))]
    typer.echo(f"window_flips = ({', '.join(map(repr, found))},)")
    cli.write_json(json_file, _report(tokenizer, comparisons))


def parse_windows(text: str) -> tuple[float, float]:
    """Seconds of a window and of its context from "30:5"."""
    try:
        chunk, context = map(float, text.split(":"))
    except ValueError as error:
        raise OptionError(f"--windows {text} is not legal: give CHUNK:CONTEXT in seconds, as in 30:5.") from error
    return chunk, context


def _report(tokenizer: AudioTokenizer, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    rows = [{**asdict(comparison), "share": comparison.share} for comparison in comparisons]
    reach = tokenizer.codec.facts.receptive_field_samples
    return {
        "name": tokenizer.name_or_path,
        "fingerprint": tokenizer.fingerprint,
        "receptive_field_samples": reach,
        "windows": rows,
    }


if __name__ == "__main__":
    cli.run_command(run, EXAMPLES)
