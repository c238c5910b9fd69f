"""Fixtures of the tests of corpora."""

from __future__ import annotations

from conformance.toy_codecs import known_toys

__all__ = ["known_toys"]
