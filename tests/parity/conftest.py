"""Vectors of published references: some lie beside these tests, all of them in the shared folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from published import Golden


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], Golden]:
    """`golden("auv")` → its files; a test that needs more than the bundled ones skips without the shared folder."""
    return lambda codec: Golden(codec, lambda: request.getfixturevalue("shared"))


@pytest.fixture
def inference() -> Iterator[None]:
    """The test runs without gradients."""
    with torch.inference_mode():
        yield
