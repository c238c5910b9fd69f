"""The `audiotok` command: its subcommands, and how errors, warnings and signals leave it."""

from __future__ import annotations

import signal
import sys
import warnings
from typing import Annotated, Any, NoReturn, TextIO

import typer

from audiotok import __version__
from audiotok.cli import convert, decode, demo, encode, export, info, push, roundtrip, stats, tokenize, verify
from audiotok.cli.reporting import complain, wants_traceback
from audiotok.errors import AudioTokError

HELP = """Recordings to ids and back, with any neural audio codec.

\b
  audiotok encode talk.wav -o codes.parquet     recordings to codes (or to ids: -o ids.txt)
  audiotok decode codes.parquet -o talk.flac    and back
  audiotok tokenize corpus/ -o codes            a corpus, once, whatever stops it
  audiotok verify codes                         is it what it says?
  audiotok stats codes                          hours, bits, ids a second, use of the codebooks
  audiotok export codes -f memmap -o train      for a trainer: memmap, megatron, webdataset, arrow
  audiotok push codes owner/name                to the hub, with a dataset card
  audiotok roundtrip talk.wav                   listen, look and measure what a codec does

\b
Exit codes:
  0  done
  1  something else went wrong      4  ids or codes that no recording gives
  2  the command was typed wrongly  5  a checkpoint, or an option of one
  3  a recording cannot be used     6  a result cannot be written
  130  Ctrl-C; nothing partial is left behind

An error is one line on stderr; AUDIOTOK_TRACEBACK=1 shows where it came from.
"""

# Plain help: it shows examples as they are typed, and takes a third of the time of the framed one.
app = typer.Typer(
    name="audiotok",
    help=HELP,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("list", epilog=info.LIST_EXAMPLES)(info.list_names)
app.command("info", epilog=info.INFO_EXAMPLES)(info.info)
app.command("encode", epilog=encode.EXAMPLES)(encode.encode)
app.command("decode", epilog=decode.EXAMPLES)(decode.decode)
app.command("tokenize", epilog=tokenize.EXAMPLES)(tokenize.tokenize)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.command("stats", epilog=stats.EXAMPLES)(stats.stats)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("push", epilog=push.EXAMPLES)(push.push)
app.command("roundtrip", epilog=roundtrip.EXAMPLES)(roundtrip.roundtrip)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"audiotok {__version__}")
        raise typer.Exit()


@app.callback()
def _audiotok(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass  # only carries --version; the help of the group is HELP


def run() -> NoReturn:
    """Run the command in `sys.argv`; every error becomes one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]
    try:
        app(prog_name="audiotok")
    except AudioTokError as error:
        if wants_traceback():
            raise
        complain(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if wants_traceback():
            raise
        complain(f"unexpected {type(error).__name__}: {error} (AUDIOTOK_TRACEBACK=1 shows where it came from)")
        sys.exit(1)
    sys.exit(0)


def _terminate(number: int, frame: Any) -> NoReturn:
    """Leave as after Ctrl-C, so that what is half written is removed."""
    sys.exit(128 + number)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What it says, not where in the code it was said."""
    complain(str(message), "warning")
