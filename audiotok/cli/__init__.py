"""The command line: `main` is the entry point of `audiotok` and `python -m audiotok`.

Nothing heavy is imported before a command runs, so that `--help` and shell completion answer at once. Each command
calls what Python users call; what is here is arguments, files, pipes and messages.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        from audiotok.cli.app import run  # takes a moment: Ctrl-C may come here already

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
