"""What the command lines of recipes share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from audiotok.errors import CheckpointError, OutputExistsError, OutputNotWritableError
from audiotok.recipes.command_line import Overwrite, check_outputs, run_command, write_json, write_text


def command(
    fail: Annotated[bool, typer.Option("--fail")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Fail, or say what was typed."""
    if fail:
        raise CheckpointError("no such thing: name another.")
    typer.echo(f"overwrite={overwrite}")


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["recipe", *words])
    with pytest.raises(SystemExit) as end:
        run_command(command, "Examples: recipe --fail")
    return int(end.value.code or 0)


def test_an_error_is_one_line_and_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert ended(monkeypatch, "--fail") == CheckpointError.exit_code == 5
    assert capsys.readouterr() == ("", "error: no such thing: name another.\n")


def test_options_and_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert ended(monkeypatch, "--overwrite") == 0
    assert capsys.readouterr().out == "overwrite=True\n"
    assert ended(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "Fail, or say what was typed." in text and "Examples: recipe --fail" in text
    assert ended(monkeypatch, "--none") == 2


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe"])

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(broken)


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    taken = tmp_path / "taken.json"
    taken.touch()
    check_outputs([None, tmp_path / "new.json"], overwrite=False)
    check_outputs([taken], overwrite=True)
    with pytest.raises(OutputExistsError, match=r"taken\.json exists.*--overwrite"):
        check_outputs([None, taken], overwrite=False)
    with pytest.raises(OutputNotWritableError, match="nowhere is no folder"):
        check_outputs([tmp_path / "nowhere" / "new.json"], overwrite=True)


def test_reports(tmp_path: Path) -> None:
    write_text(None, "nowhere to write")
    write_json(tmp_path / "report.json", {"kHz": "½", "share": None})
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == '{\n "kHz": "½",\n "share": null\n}\n'
    with pytest.raises(OutputNotWritableError, match="could not be written"):
        write_text(tmp_path, "a folder is there")
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "nan.json", float("nan"))
    assert not (tmp_path / "nan.json").exists()
