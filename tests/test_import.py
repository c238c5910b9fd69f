"""`import audiotok` costs next to nothing, and each part imports only what it may know of."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import audiotok

ROOT = Path(audiotok.__file__).parents[1]
# Third-party packages that `import audiotok` must not load; NumPy alone would take a third of the time allowed.
HEAVY = {"torch", "transformers", "numpy", "scipy", "datasets", "accelerate", "tokenizers", "safetensors"}
HEAVY |= {"huggingface_hub", "soundfile", "soxr", "pyarrow", "pandas", "typer", "rich", "yaml", "matplotlib", "sklearn"}


def in_fresh_process(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Cost


def test_import_is_light() -> None:
    found = in_fresh_process(
        "import json, sys, time\n"
        "start = time.process_time()\n"
        "import audiotok\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps({'seconds': seconds, 'modules': sorted(sys.modules)}))"
    )
    loaded = {module.partition(".")[0] for module in found["modules"]}
    assert not loaded & HEAVY
    assert {module for module in found["modules"] if module.startswith("audiotok.")} == set()
    assert found["seconds"] < 0.3


def test_names_are_listed_and_found() -> None:
    found = in_fresh_process(
        "import json, sys\n"
        "import audiotok\n"
        "listed = dir(audiotok)\n"
        "try:\n"
        "    audiotok.Nothing\n"
        "except AttributeError as error:\n"
        "    message = str(error)\n"
        "print(json.dumps({'listed': listed, 'message': message, 'torch': 'torch' in sys.modules}))"
    )
    assert sorted(audiotok.__all__) == found["listed"]
    assert "Nothing" in found["message"]
    assert not found["torch"]
    for name in audiotok.__all__:
        assert getattr(audiotok, name) is not None


@pytest.mark.parametrize("module", ["layouts", "vocabulary", "grammar", "errors"])
def test_the_id_space_needs_no_torch(module: str) -> None:
    found = in_fresh_process(
        f"import json, sys\nimport audiotok.{module}\nprint(json.dumps({{'modules': sorted(sys.modules)}}))"
    )
    loaded = {name.partition(".")[0] for name in found["modules"]}
    assert not loaded & (HEAVY - {"numpy"})


# Who may import whom


def modules(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """`(module, name, line)` of every import of a file, wherever in the file; name "" for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            yield from ((node.module or "", alias.name, node.lineno) for alias in node.names)


def offences(paths: list[Path], forbidden: set[str]) -> list[str]:
    """Imports of forbidden modules or of modules below them, as "file:line imports module"."""
    assert paths, "the rule must apply to something"
    found = []
    for path in paths:
        for module, name, line in imports(path):
            for candidate in (module, f"{module}.{name}"):
                if any(candidate == bad or candidate.startswith(f"{bad}.") for bad in forbidden):
                    found.append(f"{path.relative_to(ROOT)}:{line} imports {candidate}")
    return found


IDS = {"audiotok.layouts", "audiotok.vocabulary", "audiotok.grammar", "audiotok.tokenizer", "audiotok.batching"}
ABOVE = IDS | {"audiotok.prefix_tokenizer", "audiotok.encoding", "audiotok.auto", "audiotok.saving", "audiotok.cli"}
OUTSIDE = {"audiotok.integrations", "audiotok.recipes"}
JOINING = {"audiotok.tokenizer", "audiotok.prefix_tokenizer", "audiotok.encoding"}


def test_layouts_and_vocabulary_know_nothing_of_models() -> None:
    paths = modules("audiotok/layouts.py", "audiotok/vocabulary.py", "audiotok/grammar.py")
    own = {f"audiotok.{path.stem}" for path in [*modules("audiotok/*.py"), *modules("audiotok/*/__init__.py")]}
    own = {name for name in own if name not in ("audiotok.__init__",)}
    for path in paths:
        allowed = {"audiotok.errors", "audiotok.vocabulary", "audiotok.grammar"}
        assert offences([path], {"torch", "transformers"} | OUTSIDE | (own - allowed)) == []


def test_codecs_know_nothing_of_ids() -> None:
    """The tokenizer of a family is the one file that joins codec and ids; `__init__` only names its classes.

    How a long recording is encoded may be a matter of the family, too.
    """
    paths = modules(
        "audiotok/codec.py",
        "audiotok/facts.py",
        "audiotok/certified.py",
        "audiotok/prefixes.py",
        "audiotok/windows.py",
        "audiotok/conversion.py",
        "audiotok/quantizers/*.py",
        "audiotok/nn/*.py",
        "audiotok/codecs/*/*.py",
        "audiotok/codecs/*.py",
    )
    joins = {path for path in paths if path.name.startswith("tokenization_")}
    codecs = [path for path in paths if path not in joins and path.name != "__init__.py"]
    assert len(codecs) >= 10
    assert offences(codecs, ABOVE | OUTSIDE) == []
    assert offences(sorted(joins), (ABOVE | OUTSIDE) - JOINING) == []


def test_audio_knows_nothing_of_codecs() -> None:
    """Data flows one way: audio, features, codec, layout, ids."""
    paths = modules("audiotok/audio*.py", "audiotok/waveforms.py", "audiotok/features.py", "audiotok/errors.py")
    codecs = {"audiotok.codec", "audiotok.codecs", "audiotok.quantizers", "audiotok.nn", "audiotok.windows"}
    assert offences(paths, ABOVE | OUTSIDE | codecs) == []
    readers = [path for path in paths if path.name != "features.py"]
    assert offences(readers, {"audiotok.features", "torch", "transformers"}) == []


def test_layers_know_nothing_of_codecs() -> None:
    assert offences(modules("audiotok/nn/*.py"), {"audiotok.codec", "audiotok.codecs", "audiotok.quantizers"}) == []
    assert offences(modules("audiotok/quantizers/*.py"), {"audiotok.codec", "audiotok.codecs"}) == []


def test_the_library_never_imports_what_is_built_on_it() -> None:
    """Only the command line, which calls what users call, may use integrations and recipes."""
    library = [path for path in modules("audiotok/**/*.py") if "cli" not in path.parts and path.stem != "__main__"]
    assert offences(library, OUTSIDE | {"audiotok.cli"}) == []


def private_uses(path: Path) -> Iterator[str]:
    """Imports of private modules and names of audiotok, and private attributes of anything but the class itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for module, name, line in imports(path):
        parts = [*module.split("."), name]
        if parts[0] == "audiotok" and any(part.startswith("_") and part != "__version__" for part in parts):
            yield f"{path.relative_to(ROOT)}:{line} imports {module}.{name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        own = own or (isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super")
        if not own and ast.unparse(node) != "os._exit":  # public, for all its name
            yield f"{path.relative_to(ROOT)}:{node.lineno} uses .{node.attr}"


@pytest.mark.parametrize("folder", ["integrations", "recipes"])
def test_what_is_built_on_the_library_uses_its_public_names(folder: str) -> None:
    paths = modules(f"{folder}/**/*.py")
    assert paths
    assert [use for path in paths for use in private_uses(path)] == []


def test_integrations_and_recipes_do_not_need_the_command_line() -> None:
    assert offences(modules("integrations/**/*.py", "recipes/**/*.py"), {"audiotok.cli"}) == []


def test_the_rules_are_able_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of breaking them is seen."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import torch.nn\n"
        "from audiotok import layouts\n"
        "from audiotok.codec import _private\n"
        "def f(codec):\n"
        "    import audiotok.tokenizer as t\n"
        "    return codec._encode, codec.__class__, super()._fine\n"
    )
    assert offences([bad], {"torch"}) == ["bad.py:1 imports torch.nn", "bad.py:1 imports torch.nn."]
    assert len(offences([bad], IDS)) == 3
    assert list(private_uses(bad)) == ["bad.py:3 imports audiotok.codec._private", "bad.py:6 uses ._encode"]
