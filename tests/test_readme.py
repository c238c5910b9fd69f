"""README's code works as written: Python blocks run, commands exist and their options are real."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "sh"]
DEMO = ROOT / "audiotok" / "assets" / "demo"
AUDIOTOK = Path(sys.executable).parent / "audiotok"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the recordings that README's examples name."""
    for name in ("speech.wav", "music.flac"):
        source = next(DEMO.glob(f"{name.split('.')[0]}_*.flac"))
        import soundfile

        audio, rate = soundfile.read(source)
        soundfile.write(tmp_path / name, audio, rate)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_has_examples() -> None:
    assert PYTHON and SHELL


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What README's `audiotok tokenize` writes, for what comes after it."""
    folder = tmp_path_factory.mktemp("corpus")
    command = ["tokenize", DEMO, "--model", "auv-mini", "--output-dir", folder / "codes", "--num-processes", "1"]
    subprocess.run([AUDIOTOK, *command], check=True, capture_output=True, timeout=300)
    return folder / "codes"


@pytest.mark.parametrize("code", PYTHON, ids=[f"python{i}" for i in range(len(PYTHON))])
def test_python_blocks_run(code: str, workplace: Path, corpus: Path) -> None:
    if '"codes"' in code:
        shutil.copytree(corpus, "codes")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def _commands() -> list[str]:
    lines = "\n".join(SHELL).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("audiotok ")]


@pytest.mark.parametrize("command", _commands())
def test_commands_run(command: str, workplace: Path, corpus: Path) -> None:
    """Each `audiotok ...` line, in order of appearance, in a folder of its own."""
    words = shlex.split(command)
    if words[2:3] == ["codes"]:
        shutil.copytree(corpus, "codes")
    if words[1] == "decode":  # its input is what the encode example writes
        subprocess.run([AUDIOTOK, "encode", "speech.wav", "--output", "codes.parquet"], check=True, timeout=300)
    done = subprocess.run([AUDIOTOK, *words[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in "\n".join(SHELL).splitlines():
        if line.startswith("make "):
            target = line.split()[1]
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
