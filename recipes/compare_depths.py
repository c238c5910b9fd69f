"""What a depth that varies is worth: a VRVQ beside itself at constant depth, at equal bits per second.

    python -m audiotok.recipes.compare_depths ./my-vrvq corpus/test --csv depths.csv --picture depths.png

One model codes every clip twice over: with the depth that importance gives, at several levels or bitrates, and with
the first n codebooks in every frame, n = 1 to all. A score over the bits that it took makes a curve of each, and at
the rate of each constant depth the curve of variable depth, interpolated between its two nearest points, says who is
better there.

Bits are counted twice: with the depth of each frame (3 bits for 8 codebooks), which who decodes must be told and a
constant depth need not, and of the codes alone, as if depths were free. Rates and scores are means over clips, each
over the time of its frames. A difference is the mean over clips of their own differences, with its standard error;
under two of these, whoever is better has a question mark.

`FOLDER` is an audiofolder, whose metadata says which clips are speech (those recorded at 16 kHz or more also get PESQ
and STOI), or any folder of recordings.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from audiotok import AudioCodec, VrvqModel
from audiotok.audio import load_audio
from audiotok.errors import MissingDependencyError, OptionError
from audiotok.metrics import compare
from audiotok.recipes import command_line as cli
from audiotok.recipes.benchmark_models import find_recordings, load_tokenizer
from audiotok.recipes.depth_curves import Setting, Trial, as_csv, draw, pair_of, skipped, summary, verdict_table
from audiotok.recipes.evaluate_codec import read_clips
from audiotok.recipes.evaluation_report import Clip

EXAMPLES = """Examples:

  python -m audiotok.recipes.compare_depths ./my-vrvq corpus/test --csv depths.csv --picture depths.png

  python -m audiotok.recipes.compare_depths ./my-vrvq voices --speech --bitrate 1500 --bitrate 2500 --bitrate 4000

  python -m audiotok.recipes.compare_depths ./my-vrvq corpus/test --limit 20 --seconds 4 --markdown depths.md
"""

# From one codebook in every frame to the most that training asks for.
LEVELS = (0.125, 0.25, 0.375, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 6.0)
PICTURES = (".png", ".svg", ".pdf")
SCORES, SPEECH_SCORES = ("mel_distance",), ("mel_distance", "pesq_wb", "stoi")


def variable_codec(codec: AudioCodec, name: str) -> VrvqModel:
    """The codec, if its depth varies.

    Raises:
        OptionError: it does not.
    """
    if not isinstance(codec, VrvqModel) or not codec.facts.variable_depth:
        raise OptionError(
            f"{name} is a {type(codec).__name__} of constant depth: give a VRVQ with variable_rate=true and without "
            "num_quantizers."
        )
    return codec


def settings_of(codec: VrvqModel, levels: Sequence[float], bitrates: Sequence[float]) -> list[Setting]:
    """Every constant depth, then the sweep of variable ones.

    Raises:
        OptionError: both levels and bitrates, or a value that no clip can have.
    """
    if levels and bitrates:
        raise OptionError("--level and --bitrate exclude each other: one curve is one kind of sweep.")
    constant = [Setting("num_quantizers", n) for n in range(1, codec.config.num_codebooks + 1)]
    sweep = [Setting("bitrate", b) for b in bitrates] or [Setting("level", v) for v in levels or LEVELS]
    for setting in sweep:
        codec.check_option_values({setting.option: setting.value})
    return constant + list(dict.fromkeys(sweep))


@torch.inference_mode()
def measure(
    codec: VrvqModel, waveform: np.ndarray, name: str, settings: Sequence[Setting], scores: Sequence[str]
) -> Iterator[Trial]:
    """Code one clip at each setting.

    Args:
        waveform: `[N]` float32 at the codec's rate.
        scores: names from `audiotok.metrics.METRICS`.

    Raises:
        OptionError: the clip cannot have a bitrate.
    """
    values = torch.from_numpy(waveform)[None, None].to(codec.device)
    mask = torch.ones_like(values[:, 0])
    for setting in settings:
        option: dict[str, Any] = {setting.option: setting.value}
        try:
            output = codec.encode(values, mask, **option)
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from error
        decoded = codec.decode(output)[0, 0].float().cpu().numpy()
        kept = output.audio_codes_mask[0]
        found = compare(waveform, decoded, codec.facts.sampling_rate, scores)
        yield Trial(name, setting, float(kept.sum() / kept.shape[1]), found)


def find_clips(folder: Path, speech: bool, limit: int) -> list[Clip]:
    """At most `limit` clips of each domain, spread evenly over them.

    Raises:
        AudioInputError: there are none, or a file cannot be read.
    """
    if any((folder / name).is_file() for name in ("metadata.csv", "metadata.jsonl")):
        clips = read_clips(folder)
    else:
        clips = [Clip(path, str(path.relative_to(folder)), "sound", "") for path in find_recordings([folder])]
    if speech:
        clips = [Clip(clip.path, clip.name, "speech", clip.source) for clip in clips]
    kept: list[Clip] = []
    for group in dict.fromkeys(clip.group for clip in clips):
        members = [clip for clip in clips if clip.group == group]
        places = np.linspace(0, len(members) - 1, min(limit, len(members))).round().astype(int)
        kept += [members[i] for i in places]
    return kept


def check_picture(path: Path | None) -> None:
    """Before the work, not after it; None is no picture.

    Raises:
        OptionError: the name says no format that can be drawn.
        MissingDependencyError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise OptionError(f"--picture {path} is not legal: end the name with {', '.join(PICTURES)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError('--picture needs matplotlib: pip install "audiotok[train]".')


def _scores_of(clip: Clip) -> Sequence[str]:
    return SPEECH_SCORES if clip.group == "speech" else SCORES


def _waveform(clip: Clip, codec: VrvqModel, seconds: float) -> np.ndarray:
    rate = codec.facts.sampling_rate
    return load_audio(clip.path, target_rate=rate, channels=1, downmix="mean").samples[0, : round(seconds * rate)]


# Command line


def run(
    name: Annotated[str, typer.Argument(help="VRVQ tokenizer, training config (.yaml), or vrvq-full: drawn weights.")],
    folder: Annotated[Path, typer.Argument(help="Held-out recordings; its metadata.csv, if any, names the speech.")],
    level: Annotated[list[float] | None, typer.Option(help="Level to sweep; repeat it. 0.125 to 6 by default.")] = None,
    bitrate: Annotated[
        list[float] | None, typer.Option(help="Bits per second of every clip, instead of levels; repeat it.")
    ] = None,
    speech: Annotated[bool, typer.Option("--speech", help="All recordings are speech: score PESQ and STOI.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Clips are cut to this length.")] = 6.0,
    limit: Annotated[int, typer.Option(min=1, help="Clips at most, of each domain, spread over all.")] = 40,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the points of all curves here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the curves here: .png, .svg or .pdf.")] = None,
    markdown: cli.MarkdownFile = None,
    device: cli.Device = "cpu",
    seed: cli.Seed = 0,
    overwrite: cli.Overwrite = False,
) -> None:
    """Compare a VRVQ's variable depth with constant depths at equal bits per second."""
    cli.check_outputs([csv_file, picture, markdown], overwrite)
    check_picture(picture)
    clips = find_clips(folder, speech, limit)
    codec = variable_codec(load_tokenizer(name, seed).to(device).codec, name)
    settings = settings_of(codec, level or (), bitrate or ())
    trials: list[Trial] = []
    for clip in track(clips, "comparing", console=Console(stderr=True)):
        trials += measure(codec, _waveform(clip, codec, seconds), clip.name, settings, _scores_of(clip))
    found = [pair for score in SPEECH_SCORES if (pair := pair_of(trials, score, codec.rate))]
    tables, lines = list(map(verdict_table, found)), [*map(summary, found), *skipped(trials)]
    console = Console()
    for table in tables:
        console.print(table.rich())
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    cli.write_text(csv_file, as_csv(found))
    cli.write_text(markdown, "\n".join([*(table.markdown() for table in tables), *(f"{line}\n" for line in lines)]))
    if picture is not None:
        draw(found, picture)


if __name__ == "__main__":
    cli.run_command(run, EXAMPLES)
