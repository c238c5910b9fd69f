"""Vectors of published references: some lie beside these tests, all of them in the shared folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

BUNDLED = Path(__file__).parent / "data"


class Golden:
    """Files of the parity cases of one codec.

    Args:
        codec: its folder.
        shared: gives the shared folder, or skips the test.
    """

    def __init__(self, codec: str, shared: Callable[[], Path]) -> None:
        self.codec, self.shared = codec, shared

    def path(self, name: str) -> Path:
        """The bundled copy of `case/file`, else the one in the shared folder."""
        bundled = BUNDLED / self.codec / name
        return bundled if bundled.is_file() else self.shared() / "golden" / self.codec / name

    def config(self, case: str) -> dict[str, Any]:
        return json.loads(self.path(f"{case}/config.json").read_text())

    def vectors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path(f"{name}.safetensors"))

    def weights(self, case: str) -> dict[str, Tensor]:
        """Published tensors by their names; drawn where the case has a recipe in place of a file."""
        file = self.path(f"{case}/weights.safetensors")
        if file.is_file():
            return load_file(file)
        spec = importlib.util.spec_from_file_location("recipe", self.shared() / "golden" / "recipe.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        arrays = module.load(self.path(f"{case}/recipe.json"))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], Golden]:
    """`golden("auv")` → its files; a test that needs more than the bundled ones skips without the shared folder."""
    return lambda codec: Golden(codec, lambda: request.getfixturevalue("shared"))
