"""Which figures a validation gives."""

from __future__ import annotations

import pytest
import torch
from conformance.codecs_table import new_codec

from audiotok.recipes.training.validation import Validator


@pytest.mark.parametrize("intelligibility", [True, False])
def test_speech_is_scored_as_speech_in_codecs_without_domains(intelligibility: bool) -> None:
    """What a recording is, the corpus says; what the codec calls it decides nothing but the search."""
    codec = new_codec("vrvq", sampling_rate=16000)
    rate = codec.facts.sampling_rate
    loudness = torch.rand(40, generator=torch.Generator().manual_seed(0)).repeat_interleave(rate // 20)
    audio = (loudness * torch.randn(len(loudness), generator=torch.Generator().manual_seed(1)))[None, None]
    clips = [(audio, "speech", "all"), (audio, "music", "all")]
    figures, outputs = Validator(clips, rate, intelligibility)(codec, True)
    assert len(outputs) == 2 and outputs[0].shape == audio.shape
    assert {"mel_distance", "level_ratio_db", "distinct_codes"} <= figures.keys()
    assert ({"stoi", "estoi"} <= figures.keys()) == intelligibility
