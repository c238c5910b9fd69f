"""Fixtures of the laws: each test runs once for every codec of the table."""

from __future__ import annotations

import pytest

from audiotok.codec import AudioCodec
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import TABLE, shared_codec, tokenizer_of
from conformance.toy_codecs import known_toys

__all__ = ["known_toys"]

# Module scope throughout: hypothesis runs many examples with one set of fixtures, and nothing here is changed.


@pytest.fixture(params=TABLE, scope="module")
def codec_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def codec(codec_name: str) -> AudioCodec:
    """The codec of this name, one for all tests: do not change it."""
    return shared_codec(codec_name)


@pytest.fixture(scope="module")
def facts(codec: AudioCodec) -> CodecFacts:
    return codec.facts


@pytest.fixture(scope="module")
def tok(codec: AudioCodec) -> AudioTokenizer:
    return tokenizer_of(codec)
