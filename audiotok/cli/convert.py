"""`audiotok convert`: published weights → a checkpoint folder of ours."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.reporting import Report, table
from audiotok.errors import AudioTokError, OutputExistsError, OutputNotWritableError, check_choice

EXAMPLES = """\b
Examples:
  audiotok convert --list
  audiotok convert auv auv.pt --output my-auv
  audiotok convert auv weights.safetensors --config config.json --output my-auv

\b
Every tensor must find its place: one that is missing, unknown or misshapen is named, and nothing is written.
PyTorch files are read with weights_only=True; no code from a checkpoint is ever executed.
"""


def convert(
    codec: Annotated[
        str | None, typer.Argument(metavar="CODEC", help="The family, such as auv.", autocompletion=cli.complete_family)
    ] = None,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Weights: .safetensors, or PyTorch files.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The published config.json. Default: that of the released model."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="The checkpoint.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show what can be converted.")] = False,
    overwrite: cli.Overwrite = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Published weights to a checkpoint folder."""
    from audiotok.auto import FAMILIES, load_published

    report = Report(quiet, as_json)
    if show_list:
        _show_list(report)
        return
    if codec is None or not files or output is None:
        raise typer.BadParameter("give CODEC, FILE... and --output FOLDER, or --list.")
    check_choice("CODEC", codec, FAMILIES)
    _check_folder(output, overwrite)
    with report.progress("converting"):
        family = FAMILIES[codec]
        tok = family.load("AudioTokenizer")(load_published(family, files, config))
        _save(tok, output)
    data = {
        "codec": codec,
        "output": str(output),
        "fingerprint": tok.fingerprint,
        "parameters": tok.codec.num_parameters(),
    }
    report.result(data) if as_json else report.note(f"{data['parameters']:,} parameters of {codec} written to {output}")


def _show_list(report: Report) -> None:
    """The families whose published format is understood, and where their weights are published."""
    from audiotok.auto import FAMILIES

    data, rows = [], []
    for family in FAMILIES.values():
        published = {repository: list(entry.files) for repository, entry in family.published.items()}
        data.append({"codec": family.name, "title": family.title, "paper": family.paper, "published": published})
        places = "\n".join(f"{repository}: {', '.join(files)}" for repository, files in published.items())
        rows.append([family.name, family.title, family.paper, places])
    report.result({"families": data}, table(["codec", "what", "paper", "published at"], rows))


def _check_folder(output: Path, overwrite: bool) -> None:
    """Before the work: a new name, an empty folder, or one whose files may be replaced."""
    if output.exists() and not output.is_dir():
        raise OutputNotWritableError(f"{output} is a file: give a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputExistsError(f"{output} is not empty: choose another folder, or replace its files with --overwrite.")
    if not output.absolute().parent.is_dir():
        raise OutputNotWritableError(f"{output.parent} is no folder: make it first.")


def _save(tok: Any, output: Path) -> None:
    """Save beside the folder and move it into its place when it is whole."""
    try:
        with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as beside:
            tok.save_pretrained(beside)
            output.mkdir(exist_ok=True)
            for file in Path(beside).iterdir():
                os.replace(file, output / file.name)
    except OSError as error:
        if isinstance(error, AudioTokError):
            raise
        raise OutputNotWritableError(f"{output} cannot be written ({error.strerror or error}).") from error
