"""Codecs with their layouts, for the tests of layouts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from audiotok.layouts import Layout, LayoutCodes, get_layout, layout_names
from audiotok.vocabulary import AudioVocabulary

# The books of the drawings, and codes for them.
CODES = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
TENS = AudioVocabulary((10, 10, 10))


class Case(NamedTuple):
    """A codec and one of the layouts that fit it."""

    name: str
    sizes: tuple[int, ...]
    shared: bool = False
    strides: tuple[int, ...] | None = None
    variable_depth: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.sizes}" + " shared" * self.shared + (f" {self.strides}" if self.strides else "")

    @property
    def vocabulary(self) -> AudioVocabulary:
        return AudioVocabulary(self.sizes, self.shared)

    @property
    def layout(self) -> Layout:
        return get_layout(self.name, self.vocabulary, self.strides, self.variable_depth)

    def random_codes(self, num_coarse: int, rng: np.random.Generator) -> tuple[Any, np.ndarray | None]:
        """Codes (and depths) of `num_coarse` coarse frames."""
        strides = self.strides or (1,) * len(self.sizes)
        rows = [rng.integers(0, k, num_coarse * strides[0] // s) for k, s in zip(self.sizes, strides, strict=True)]
        if self.strides:
            return rows, None
        if not self.variable_depth:
            return np.stack(rows), None
        depths = rng.integers(1, len(rows) + 1, num_coarse)
        return np.stack(rows) * (np.arange(len(rows))[:, None] < depths), depths


def all_layouts_of(sizes: tuple[int, ...], shared: bool = False, strides: tuple[int, ...] | None = None) -> list[Case]:
    """A case for each layout that fits, those of a variable-depth codec with the same books included."""
    names = layout_names(AudioVocabulary(sizes, shared), strides)
    cases = [Case(name, sizes, shared, strides) for name in names]
    if not strides and (not shared or len(sizes) == 1):
        cases.append(Case("variable", sizes, shared, variable_depth=True))
    return cases


CASES = [
    *all_layouts_of((10, 10, 10)),
    *all_layouts_of((7,)),
    *all_layouts_of((1, 1)),
    *all_layouts_of((3, 300, 2, 70_000)),
    *all_layouts_of((5, 5, 5, 5), shared=True),
    *all_layouts_of((5,), shared=True),
    *all_layouts_of((4, 4, 4), strides=(4, 2, 1)),
    *all_layouts_of((4, 3, 2), strides=(6, 2, 2)),
    *all_layouts_of((9, 9), shared=True, strides=(3, 1)),
    *all_layouts_of((9,), strides=(2,)),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def assert_same(decoded: LayoutCodes, codes: Any, depths: np.ndarray | None) -> None:
    assert len(decoded.codes) == len(codes)
    for row, expected in zip(decoded.codes, codes, strict=True):
        assert row.dtype == np.int64
        np.testing.assert_array_equal(row, expected)
    assert (decoded.depths is None) == (depths is None)
    if depths is not None:
        np.testing.assert_array_equal(decoded.depths, depths)
