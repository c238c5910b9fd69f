"""Help, shell completion, and what the command line imports before it works."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.helpers import COMMANDS, HEAVY, Result, process


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    """CPU time, since the clock of a busy machine says little."""
    code = (
        "import sys\n"
        "from audiotok.cli import main\n"
        "sys.argv[:] = ['audiotok', *sys.argv[1:]]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as error:\n"
        "    assert not error.code, error.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    for args in (["--help"], *([command, "--help"] for command in COMMANDS)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr.splitlines()[-1] == "[]", args
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0, args


def test_help_has_examples_and_exit_codes(cli: Callable[..., Result]) -> None:
    main = cli("--help").out.decode()
    assert all(re.search(rf"^  {command} ", main, re.MULTILINE) for command in COMMANDS)
    assert "Exit codes" in main and "130" in main
    for command in COMMANDS:
        text = cli(command, "--help").out.decode()
        assert f"Examples:\n    audiotok {command}" in text, command
        assert "--json" in text, command


def test_shell_completes_names() -> None:
    environment = os.environ | {"_AUDIOTOK_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    done = process(env=environment | {"COMP_WORDS": "audiotok info SWiv"})
    assert done.stdout.split() == [b"SWivid/AUV"], done.stderr


def test_both_names_start_it() -> None:
    assert process("--version").stdout.startswith(b"audiotok ")
    script = Path(sys.executable).with_name("audiotok")
    if not script.exists():
        pytest.skip("the package is not installed, only importable")
    assert subprocess.run([script, "--version"], capture_output=True).stdout.startswith(b"audiotok ")
