"""Vector quantizers: one idea a file. Names are resolved at first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audiotok.quantizers.implicit import QINCo2 as QINCo2
    from audiotok.quantizers.implicit import QINCo2Losses as QINCo2Losses
    from audiotok.quantizers.implicit_fit import FitProgress as FitProgress
    from audiotok.quantizers.implicit_fit import FitResult as FitResult
    from audiotok.quantizers.implicit_fit import FitSettings as FitSettings
    from audiotok.quantizers.implicit_fit import fit as fit
    from audiotok.quantizers.residual_kmeans import ResidualQuantizer as ResidualQuantizer
    from audiotok.quantizers.residual_kmeans import fit_residual_quantizer as fit_residual_quantizer

# Public name -> the module that defines it.
_HOME = {
    "QINCo2": "audiotok.quantizers.implicit",
    "QINCo2Losses": "audiotok.quantizers.implicit",
    "FitProgress": "audiotok.quantizers.implicit_fit",
    "FitResult": "audiotok.quantizers.implicit_fit",
    "FitSettings": "audiotok.quantizers.implicit_fit",
    "fit": "audiotok.quantizers.implicit_fit",
    "ResidualQuantizer": "audiotok.quantizers.residual_kmeans",
    "fit_residual_quantizer": "audiotok.quantizers.residual_kmeans",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'audiotok.quantizers' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
