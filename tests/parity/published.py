"""Files of published references, the converted codec of each case, its taps, and how tensors compare."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from audiotok.codec import AudioCodec, CodecConfig

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


def model_fixture(
    codec: str, model_class: type[AudioCodec], convert: Callable[[Golden, str], tuple[CodecConfig, dict[str, Tensor]]]
) -> Callable:
    """A fixture: `model(case)` → the converted codec in eval mode, made once.

    Args:
        codec: its folder of golden files.
        convert: these files and a case → our config and state dict.
    """
    made: dict[str, AudioCodec] = {}

    @pytest.fixture
    def model(golden: Callable) -> Callable[[str], AudioCodec]:
        def make(case: str) -> AudioCodec:
            if case not in made:
                config, state = convert(golden(codec), case)
                with torch.device("meta"):
                    empty = model_class(config)
                empty.load_state_dict(state, assign=True)
                made[case] = empty.eval()
            return made[case]

        return make

    return model


@contextmanager
def listening(modules: Mapping[str, nn.Module]) -> Generator[dict[str, Any]]:
    """Outputs of modules by name, or the first of several, kept while they run."""
    heard: dict[str, Any] = {}

    def keep(name: str) -> Callable:
        return lambda _m, _i, output: heard.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def close(found: Tensor, recorded: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, recorded, atol=atol, rtol=0)
