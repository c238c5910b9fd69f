"""`audiotok demo`: three recordings that come with the package, there and back with the bundled checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.loading import load_tokenizer
from audiotok.cli.options import DEFAULT_TOKENIZER
from audiotok.cli.outputs import new_folder
from audiotok.cli.reporting import Report, table
from audiotok.cli.roundtrip import ResultFiles, RoundTrip

RECORDINGS = Path(__file__).parents[1] / "assets" / "demo"
SPEECH_ONLY = ("pesq_wb", "pesq_nb", "stoi", "estoi")
EXAMPLES = """\b
Examples:
  audiotok demo
  audiotok demo --output listen --overwrite

\b
Sources and licences of the recordings are in the package, audiotok/assets/demo/CREDITS.md.
"""


def demo(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where decoded sounds, scores and pictures go.")
    ] = "audiotok-demo",
    tokenizer: cli.Tokenizer = DEFAULT_TOKENIZER,
    device: cli.Device = None,
    overwrite: cli.Overwrite = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Speech, music and sound there and back: no files needed."""
    report = Report(quiet, as_json)
    recordings = sorted(RECORDINGS.glob("*.flac"), reverse=True)  # speech first
    clips: list[dict[str, Any]] = []
    with new_folder(Path(output)) as folder, report.progress() as meter:
        places = {path: ResultFiles.named(folder, path.stem) for path in recordings}
        for files in places.values():
            files.check_free(overwrite)
        tok = load_tokenizer(tokenizer, device=device)
        for path, files in places.items():
            result = RoundTrip.of(tok, path.name, path, "mean", meter, _metrics_for(path))
            files.write(result, f"{path.name} through {tok.name_or_path}", overwrite)
            clips.append(result.describe(tok) | {"input": path.name, "files": files.describe()})
    rates = f"{clips[0]['ids_per_second']:g} ids and {clips[0]['bits_per_second']:,.0f} bits a second"
    report.result({"clips": clips}, _table(clips, f"{tok.name_or_path}: {rates}"))
    report.note(f"wrote decoded sounds, scores and pictures to {output}")


def _metrics_for(recording: Path) -> list[str]:
    """Scores of speech quality mean nothing for other sounds."""
    from audiotok.metrics import METRICS

    return [name for name in METRICS if recording.name.startswith("speech") or name not in SPEECH_ONLY]


def _table(clips: list[dict[str, Any]], title: str) -> Any:
    """A column a recording, a row a score."""
    from audiotok.metrics import METRICS

    rows = [
        ["seconds", *(f"{clip['duration']:.2f}" for clip in clips)],
        ["ids", *(f"{clip['num_ids']:,}" for clip in clips)],
    ]
    for name, metric in METRICS.items():
        scores = [metric.format(clip["metrics"][name]) if name in clip["metrics"] else "–" for clip in clips]
        rows.append([f"{metric.label}, {metric.unit}" if metric.unit else metric.label, *scores])
    return table(["", *(clip["input"] for clip in clips)], rows, "l" + "r" * len(clips), title)
