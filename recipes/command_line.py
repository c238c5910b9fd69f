"""What the command lines of recipes share: options, errors as one line, and reports that replace nothing unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from audiotok.errors import AudioTokError, OutputExistsError, OutputNotWritableError

Device = Annotated[str, typer.Option(help="Where the codec runs: cpu, cuda, cuda:1.")]
Seed = Annotated[int, typer.Option(help="Of drawn weights and clips.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything here.")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]


def run_command(command: Callable[..., None], examples: str = "") -> None:
    """Run a recipe with `sys.argv`; an `AudioTokError` becomes one line on stderr and its exit code.

    Args:
        command: its signature says the options, its docstring the help.
        examples: what the help ends with.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=examples)(command)
    try:
        app()
    except AudioTokError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def check_outputs(paths: list[Path | None], overwrite: bool) -> None:
    """Before the work, not after it; None is no output.

    Raises:
        OutputExistsError: a file is there and may not be replaced.
        OutputNotWritableError: its folder is missing.
    """
    for path in filter(None, paths):
        if path.exists() and not overwrite:
            raise OutputExistsError(f"{path} exists: choose another name, or replace it with --overwrite.")
        if not path.parent.is_dir():
            raise OutputNotWritableError(f"{path.parent} is no folder: make it first.")


def write_text(path: Path | None, text: str) -> None:
    """Write a report, where there is a place for it.

    Raises:
        OutputNotWritableError: the disk is full, or the place is no file.
    """
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputNotWritableError(f"{path} could not be written ({error}): choose another place.") from error


def write_json(path: Path | None, report: Any) -> None:
    """`write_text` for values of JSON: no NaN, no infinity."""
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
