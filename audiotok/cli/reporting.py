"""What a command says: results on stdout; progress, notes, warnings and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from audiotok.errors import AudioTokError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Work that is done by then shows no bar.
PATIENCE_S = 2.0
# Columns of tables that go into a file or a pipe, which have no width of their own.
PIPE_WIDTH = 120


def complain(message: str, kind: str = "error") -> None:
    """One line on stderr, whatever the message holds."""
    colour = typer.colors.RED if kind == "error" else typer.colors.YELLOW
    typer.echo(f"{typer.style(f'{kind}:', fg=colour)} {' '.join(message.split())}", err=True)


def wants_traceback() -> bool:
    return os.environ.get("AUDIOTOK_TRACEBACK", "0") not in ("", "0")


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural * (number != 1)}"


def seconds_done(name: str, done: float, total: float | None) -> str:
    """A recording and how far it is: "talk.wav: 95 of 10,800 s", without the end where that is not known."""
    if not done:
        return name
    return f"{name}: {done:,.0f} s" if total is None else f"{name}: {done:,.0f} of {total:,.0f} s"


class Meter:
    """The line of progress of one command, which does one step after another."""

    def __init__(self, bar: Progress, step: str) -> None:
        self._bar, self._task = bar, bar.add_task(step, total=None)

    def begin(self, step: str, total: float | None = None) -> None:
        """The next step; `total` says how much there is of it, None where that is not known."""
        self._bar.remove_task(self._task)  # rich can neither forget a total nor start a clock anew
        self._task = self._bar.add_task(step, total=total)

    def update(self, done: float, step: str | None = None, total: float | None = None) -> None:
        """How much of the step is done; `step` and `total` where there is something new to say of them."""
        self._bar.update(self._task, completed=done, description=step, total=total)


class Report:
    """The output of one command.

    Args:
        quiet: no progress, notes or tables; errors are shown all the same.
        as_json: the result is one JSON object on stdout instead of tables.

    Attributes:
        failures: `{"id", "error", "message"}` of what failed while the rest went on.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.failures: list[dict[str, str]] = []
        self._exit_code = 0

    def note(self, text: str) -> None:
        """A line for people on stderr."""
        if not self.quiet and not self.as_json:
            typer.echo(text, err=True)

    def failed(self, name: str, error: AudioTokError) -> None:
        """Say what failed, and remember it for `finish`."""
        message = str(error)
        if wants_traceback():
            traceback.print_exception(error)
        complain(message if name in message else f"{name}: {message}")
        self.failures.append({"id": name, "error": type(error).__name__, "message": message})
        self._exit_code = self._exit_code or error.exit_code

    def finish(self) -> None:
        """Leave with the exit code of the first failure, if anything failed."""
        if self._exit_code:
            raise typer.Exit(self._exit_code)

    def result(self, data: Mapping[str, Any], *tables: Any) -> None:
        """The command's result, for machines or for people."""
        if self.as_json:
            typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))
        elif not self.quiet:
            console = _console(sys.stdout.isatty())
            for table in tables:
                console.print(table)

    @contextmanager
    def progress(self, step: str = "loading", shares_terminal: bool = False) -> Generator[Meter]:
        """A bar on stderr for work that takes over two seconds, gone when it is done.

        Args:
            step: what is done first.
            shares_terminal: the result goes to stdout meanwhile; no bar where both are one terminal.
        """
        from rich import progress

        console = _console(sys.stderr.isatty(), stderr=True)
        hidden = self.quiet or not console.is_terminal or (shares_terminal and sys.stdout.isatty())
        bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # ids on their way to a file must not land in the bar's terminal
            disable=hidden,
        )
        starter = threading.Timer(PATIENCE_S, bar.start)
        starter.daemon = True
        starter.start()
        try:
            yield Meter(bar, step)
        finally:
            starter.cancel()
            starter.join()  # a bar that starts now would never be stopped
            bar.stop()


def _console(is_terminal: bool, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, width=None if is_terminal else PIPE_WIDTH)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], justify: str = "", title: Any = None) -> Any:
    """A table of text; `justify` has one letter a column, l or r (left where it ends)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = None if title is None else Text(title)  # a name may hold what looks like markup
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns))
    for name, side in zip(columns, justify.ljust(len(columns), "l"), strict=True):
        grid.add_column(Text(name), justify="right" if side == "r" else "left", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid
