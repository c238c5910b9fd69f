"""The wheel holds everything: installed elsewhere, the CLI and the bundled checkpoint work from it alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words, env = [str(word) for word in command], {**kept, **environment}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git tracks, so that nothing lying about slips in."""
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def check_installed(python: Path, folder: Path) -> None:
    """From an empty folder: module homes, the CLI, the bundled checkpoint there and back."""
    home = run(python, "-c", "import audiotok.recipes, audiotok.integrations as i; print(i.__file__)", cwd=folder)
    assert str(python.parents[1]) in home
    assert "audiotok/auv-mini" in run(python.parent / "audiotok", "list", cwd=folder)
    code = (
        "import numpy as np; from audiotok import AutoAudioTokenizer as A;"
        "t = A.from_pretrained('audiotok/auv-mini'); e = t(np.zeros(5000, 'f'), sampling_rate=16000);"
        "print(t.decode(e.input_ids, length=e.audio_lengths).shape[1])"
    )
    assert run(python, "-c", code, cwd=folder, HF_HUB_OFFLINE="1").split()[-1] == "5000"
    for package, name in (("audiotok", "py.typed"), ("audiotok.recipes", "configs/auv_mini.yaml")):
        code = f"import importlib.resources as r; assert r.files('{package}').joinpath('{name}').is_file()"
        run(python, "-c", code, cwd=folder)


def test_wheel_installs_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """A new environment that sees this one's dependencies, but not this checkout."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    # A plain path line: the dependencies are found, the editable install's hook (a .pth file there) is not run.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    check_installed(python, tmp_path / "empty")


@pytest.mark.slow
def test_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Nothing but the wheel and what it asks for."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    check_installed(python, tmp_path / "empty")
