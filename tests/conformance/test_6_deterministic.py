"""Law 6: same input, same ids: across calls, threads, processes, and after any other call.

Other processes are in law 5, whose fresh process has another seed and gives the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from audiotok.errors import AudioTokError
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import clip


@pytest.fixture
def wave(facts: CodecFacts) -> np.ndarray:
    return clip(facts, 60 * facts.hop_length + 3, seed=5)


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever number of threads a test sets, the next one starts as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def answer(tok: AudioTokenizer, wave: np.ndarray) -> tuple[list[int], torch.Tensor]:
    encoded = tok(wave, tok.sampling_rate)
    return encoded.input_ids, tok.decode(encoded.input_ids, encoded.audio_lengths)


def test_calls_repeat(tok: AudioTokenizer, wave: np.ndarray) -> None:
    ids, audio = answer(tok, wave)
    for _ in range(3):
        again, heard = answer(tok, wave)
        assert again == ids
        assert torch.equal(heard, audio)


def test_threads_change_no_id(tok: AudioTokenizer, wave: np.ndarray, threads: None) -> None:
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(answer(tok, wave))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5)


def test_other_calls_leave_nothing_behind(tok: AudioTokenizer, facts: CodecFacts, wave: np.ndarray) -> None:
    ids, audio = answer(tok, wave)
    kept = wave.copy()
    others = [clip(facts, n, seed) for seed, n in enumerate((1, 70 * facts.hop_length, 3 * facts.hop_length + 1))]
    tok(others, facts.sampling_rate, batch_size=3, certify=False)
    tok(others[1], facts.sampling_rate, chunk_length_s=20 * facts.hop_length / facts.sampling_rate)
    tok.codec(torch.from_numpy(others[1])[None])
    with pytest.raises(AudioTokError):
        tok(np.full((facts.channels, 99), np.nan, np.float32), facts.sampling_rate)
    with pytest.raises(AudioTokError):
        tok.decode([tok.vocab_size])
    again, heard = answer(tok, wave)
    assert again == ids
    assert torch.equal(heard, audio)
    assert np.array_equal(wave, kept), "the caller's array is not written to"


def test_the_state_of_the_caller_does_not_matter(tok: AudioTokenizer, wave: np.ndarray) -> None:
    """Seeds, grad mode, inference mode; and the caller's random stream goes on as if nothing had happened."""
    ids, audio = answer(tok, wave)
    torch.manual_seed(1)
    expected_stream = torch.rand(3)
    torch.manual_seed(1)
    for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with mode:
            again, heard = answer(tok, wave)
        assert again == ids
        assert torch.equal(heard, audio)
        assert not heard.requires_grad
    assert torch.equal(torch.rand(3), expected_stream)


def test_what_is_decoded_may_be_used_in_training(tok: AudioTokenizer, wave: np.ndarray) -> None:
    """No inference tensors leave the tokenizer: autograd refuses them."""
    _, audio = answer(tok, wave)
    scale = torch.ones(1, requires_grad=True)
    (audio * scale).square().sum().backward()
    assert scale.grad is not None


def test_a_codec_in_training_mode_is_put_back_to_eval(tok: AudioTokenizer, wave: np.ndarray) -> None:
    """A tokenizer is never in training mode, whatever its codec was in before."""
    ids, _ = answer(tok, wave)
    codec = tok.codec.train()
    assert answer(type(tok)(codec), wave)[0] == ids
    assert not codec.training
