"""Law 8: bad ids, codes, options, configs and checkpoints raise their own error, with a sentence that helps.

Each test names the words that the sentence must hold: the value found, what is legal, what to do. Bad audio has tests
of its own, and so have the names and folders that `AutoAudioTokenizer` takes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from audiotok import AutoAudioTokenizer
from audiotok.codec import AudioCodec
from audiotok.errors import (
    CodesError,
    ConfigError,
    IncompleteFrameError,
    InvalidIdError,
    OptionError,
    OutputNotWritableError,
    SpecialTokenError,
    TokenError,
    WeightMismatchError,
)
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import TABLE, clip, family, layouts_of, tokenizer_of
from conformance.helpers import alone, padded, refused, streams


@pytest.fixture
def wave(facts: CodecFacts) -> np.ndarray:
    return clip(facts, 6 * facts.hop_length * facts.frame_multiple)


@pytest.fixture
def ids(tok: AudioTokenizer, wave: np.ndarray) -> list[int]:
    return tok(wave, tok.sampling_rate).input_ids


@pytest.fixture
def codes(codec: AudioCodec, wave: np.ndarray) -> Tensor | list[Tensor]:
    return codec.encode(*alone(wave)).audio_codes


# Ids


def test_ids_out_of_range(tok: AudioTokenizer, ids: list[int]) -> None:
    for illegal in (tok.vocab_size, tok.vocab_size + 10_000, -1):
        with refused(InvalidIdError, illegal, "position 3", "ids", "Check"):
            tok.decode([*ids[:3], illegal, *ids[4:]])


def test_ids_of_another_codec(tok: AudioTokenizer) -> None:
    with refused(InvalidIdError, 65_535, tok.vocab_size, "come from this codec"):
        tok.decode([65_535, 12_288])


def test_ids_in_a_place_of_another_codebook(tok: AudioTokenizer, facts: CodecFacts, ids: list[int]) -> None:
    if facts.num_codebooks == 1 or facts.shared_codebook:
        return
    last = int(tok.vocabulary.offsets[-1])
    with refused(InvalidIdError, last, "position 0", "codebook 0", "takes"):
        tok.decode([last, *ids[1:]])


def test_an_odd_number_of_ids(tok: AudioTokenizer, facts: CodecFacts, ids: list[int]) -> None:
    for layout in layouts_of(facts):
        laid = tok.with_layout(layout)
        if facts.num_codebooks == 1 or facts.variable_depth or laid.layout.is_2d:
            continue
        laid_ids = laid.codes_to_ids(tok.ids_to_codes(ids))
        with refused(IncompleteFrameError, len(laid_ids) - 1, layout, "next. Give the missing ids, or cut"):
            laid.decode(laid_ids[:-1])


def test_special_tokens_inside(tok: AudioTokenizer, ids: list[int]) -> None:
    for special in tok.all_special_ids:
        with refused(SpecialTokenError, tok.convert_ids_to_tokens(special), special, "position 2", "Cut"):
            tok.decode([*ids[:2], special, *ids[2:]])


def test_ids_that_are_no_sequence_of_whole_numbers(tok: AudioTokenizer) -> None:
    with refused(InvalidIdError, "float64", "whole numbers"):
        tok.decode([0.5, 1.0])
    for nothing in ("abc", None, 3, [[1, 2], [3, 4]], [[1, 2], [3]]):
        with pytest.raises(TokenError):
            tok.decode(nothing)


def test_lengths_that_do_not_fit(tok: AudioTokenizer, facts: CodecFacts, ids: list[int], wave: np.ndarray) -> None:
    """The sentence says exactly which lengths these frames stand for."""
    frames = facts.num_frames(wave.shape[1])
    most = facts.held_samples(frames)
    least = most - facts.frame_multiple * facts.hop_length + 1
    assert tok.decode(ids, length=least).shape[1] == facts.output_length(least)
    for length in (least - 1, most + 1, -1):
        with refused(CodesError, f"length={length}", f"{frames} frames", f"{least} to {most} samples"):
            tok.decode(ids, length=length)
    with refused(CodesError, "length=5", "0 frames"):
        tok.decode([], length=5)


def test_as_many_lengths_as_clips(tok: AudioTokenizer, ids: list[int]) -> None:
    with refused(OptionError, "1", "2"):
        tok.batch_decode([ids, ids], [99])


# Codes


def with_row(codes: Tensor | list[Tensor], row: int, stream: Tensor) -> Tensor | list[Tensor]:
    """The same codes with another stream in one place."""
    rows = [*streams(codes)[:row], stream, *streams(codes)[row + 1 :]]
    return rows if isinstance(codes, list) else torch.stack(rows, dim=1)


def test_codes_of_a_wrong_dtype(codec: AudioCodec, codes: Tensor | list[Tensor]) -> None:
    for dtype in (torch.float32, torch.bool, torch.complex64):
        wrong = [c.to(dtype) for c in codes] if isinstance(codes, list) else codes.to(dtype)
        with refused(CodesError, dtype, "integers"):
            codec.decode(wrong)


def test_codes_of_every_integer_dtype_are_codes(codec: AudioCodec, codes: Tensor | list[Tensor]) -> None:
    """A corpus on disk holds uint16 and uint32."""
    expected = codec.decode(codes)
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32):
        if max(codec.facts.codebook_sizes) > torch.iinfo(dtype).max:
            continue
        same = [c.to(dtype) for c in codes] if isinstance(codes, list) else codes.to(dtype)
        assert torch.equal(codec.decode(same), expected)


def test_codes_out_of_range(codec: AudioCodec, facts: CodecFacts, codes: Tensor | list[Tensor]) -> None:
    for row, size in enumerate(facts.codebook_sizes):
        for illegal in (size, -1):
            stream = streams(codes)[row].clone()
            stream[0, -1] = illegal
            with refused(CodesError, illegal, f"codebook {row}", f"0 to {size - 1}"):
                codec.decode(with_row(codes, row, stream))


def test_codes_of_a_wrong_shape(codec: AudioCodec, facts: CodecFacts, codes: Tensor | list[Tensor]) -> None:
    if isinstance(codes, list):
        with refused(CodesError, "Tensor", "list"):
            codec.decode(codes[0][:, None])
        with refused(CodesError, facts.num_codebooks):
            codec.decode([*codes, codes[-1]])
        with refused(CodesError, codes[-1].shape[1] - 1):
            codec.decode([*codes[:-1], codes[-1][:, 1:]])
        return
    with refused(CodesError, "list", "[B, Q, T]"):
        codec.decode(list(codes.unbind(1)))
    with refused(CodesError, tuple(codes[0].shape), "[clips, codebooks, frames]"):
        codec.decode(codes[0])
    with refused(CodesError, facts.num_codebooks):
        codec.decode(torch.cat([codes, codes[:, :1]], dim=1))


def test_codes_that_are_no_tensors(codec: AudioCodec, codes: Tensor | list[Tensor]) -> None:
    arrays = [c.numpy() for c in codes] if isinstance(codes, list) else codes.numpy()
    for wrong in (arrays, None, "codes"):
        with refused(CodesError):
            codec.decode(wrong)


def test_no_frames_and_no_clips(codec: AudioCodec, codes: Tensor | list[Tensor]) -> None:
    """No frames are refused, or decode to no samples; nothing else."""
    none = [c[:, :0] for c in codes] if isinstance(codes, list) else codes[..., :0]
    nobody = [c[:0] for c in codes] if isinstance(codes, list) else codes[:0]
    for empty in (none, nobody):
        with refused(CodesError):
            codec.decode(empty)


def test_lengths_of_a_batch(codec: AudioCodec, facts: CodecFacts, codes: Tensor | list[Tensor]) -> None:
    most = streams(codes)[0].shape[1] * facts.codebook_strides[0] * facts.hop_length
    far = most + 3 * facts.hop_length * facts.frame_multiple
    for illegal in (0, -5, far):
        with refused(CodesError, f"{illegal} samples", "frames hold at most"):
            codec.decode(codes, lengths=[illegal])
    for count in (0, 2):
        with refused(CodesError, count, 1):
            codec.decode(codes, lengths=[most] * count)


def test_codes_that_no_layout_takes(tok: AudioTokenizer, facts: CodecFacts) -> None:
    lengths = [4 * facts.frame_multiple // stride for stride in facts.codebook_strides]
    rows: Any = [np.zeros(n, np.int64) for n in lengths]
    depths = np.ones(4, np.int64) if facts.variable_depth else None
    join = list if facts.frame_multiple > 1 else np.stack
    assert tok.codes_to_ids(join(rows), depths).size
    with refused(CodesError, "float", "whole numbers"):
        tok.codes_to_ids(join([row.astype(float) for row in rows]), depths)
    with refused(CodesError, "shape"):
        tok.codes_to_ids(join([*rows, rows[-1]]), depths)
    rows[-1][-1] = facts.codebook_sizes[-1]
    with refused(CodesError, facts.codebook_sizes[-1], f"codebook {facts.num_codebooks - 1}", "check"):
        tok.codes_to_ids(join(rows), None if depths is None else depths * facts.num_codebooks)


def test_depths(tok: AudioTokenizer, facts: CodecFacts) -> None:
    codes = np.zeros((facts.num_codebooks, 4), np.int64)
    if not facts.variable_depth:
        if facts.frame_multiple == 1:
            with refused(CodesError, "depths", "leave"):
                tok.codes_to_ids(codes, np.ones(4, np.int64))
        return
    with refused(CodesError, "depths"):
        tok.codes_to_ids(codes)
    for illegal in (0, facts.num_codebooks + 1):
        with refused(CodesError, f"Depth {illegal} of frame 1", f"1 to {facts.num_codebooks}"):
            tok.codes_to_ids(codes, np.array([1, illegal, 1, 1]))
    codes[1, 2] = 1
    with refused(CodesError, "Code 1 of codebook 1 at frame 2", "beyond the depth", "set it to 0"):
        tok.codes_to_ids(codes, np.ones(4, np.int64))


def test_padding_masks(codec: AudioCodec, facts: CodecFacts, wave: np.ndarray) -> None:
    values, mask = padded([wave, wave])
    with refused(CodesError, (2, values.shape[-1] - 1), values.shape[-1]):
        codec.encode(values, mask[:, 1:])
    with refused(CodesError, 1, 2):
        codec.encode(values, mask[:1])
    left = mask.clone()
    left[1, 0] = 0
    with refused(CodesError, "right"):
        codec.encode(values, left)
    with refused(CodesError, "at least one"):
        codec.encode(values, mask * torch.tensor([[1], [0]]))


# Options


def test_unknown_options(tok: AudioTokenizer, wave: np.ndarray) -> None:
    legal = (*tok.codec.encode_options, "chunk_length_s", "context_s")
    for option in legal:
        near = option[:2] + option[3:]
        with refused(OptionError, type(tok).__name__, f'"{near}"', f'Did you mean "{option}"?', *legal):
            tok(wave, tok.sampling_rate, **{near: 1})
        with refused(OptionError, f'"{near}"', option):
            tokenizer_of(tok.codec, None, {near: 1})
    with refused(OptionError, "temperature", "Legal here"):
        tok.codec.encode(*alone(wave), temperature=1)
    with refused(OptionError, "temperature", "Legal here"):
        tok.codec.decode(tok.codec.encode(*alone(wave)), temperature=1)


def test_illegal_values_of_options(tok: AudioTokenizer, facts: CodecFacts, wave: np.ndarray) -> None:
    for option in tok.codec.encode_options:
        for illegal in ("no such value", 99, [1, 2, 3]):
            with refused(OptionError, option):
                tok(wave, facts.sampling_rate, **{option: illegal})
    for length in (-1, 0, math.nan, math.inf, "a minute"):
        with refused(OptionError, "chunk_length_s", length, "positive"):
            tok(wave, facts.sampling_rate, chunk_length_s=length)
    for length in (-1, math.nan, "a second"):
        with refused(OptionError, "context_s", length):
            tok(wave, facts.sampling_rate, chunk_length_s=1, context_s=length)
    for size in (0, -1, "many", 1.5):
        with refused(OptionError, "batch_size", size, "at least 1"):
            tok(wave, facts.sampling_rate, batch_size=size)
    with refused(OptionError, "partial_frame", "cut", "keep", "drop"):
        tok.codec.encode(*alone(wave), partial_frame="cut")


def test_one_value_a_clip_and_no_other_number_of_them(tok: AudioTokenizer, facts: CodecFacts, wave: np.ndarray) -> None:
    for option in tok.codec.encode_options:
        for batch_size in (1, 2):
            with refused(OptionError, option):
                tok([wave] * 4, facts.sampling_rate, batch_size=batch_size, **{option: [0.5, 0.5]})


def test_layouts(tok: AudioTokenizer, facts: CodecFacts) -> None:
    with refused(OptionError, "layout='interleavd'", 'Did you mean "interleaved"?', "delay", "multirate"):
        tok.with_layout("interleavd")
    misfit = "interleaved" if facts.variable_depth or facts.frame_multiple > 1 else "variable"
    with refused(OptionError, misfit, "does not fit", *layouts_of(facts)):
        tok.with_layout(misfit)


def test_nothing_is_left_behind(tok: AudioTokenizer, facts: CodecFacts, wave: np.ndarray, ids: list[int]) -> None:
    """Refused calls change neither the tokenizer nor what it answers."""
    before = tok.fingerprint, dict(tok.options)
    with refused(OptionError):
        tok(wave, facts.sampling_rate, chunk_length_s=-1)
    with refused(OptionError):
        tok([wave, wave], facts.sampling_rate, return_tensors="tf")
    assert (tok.fingerprint, dict(tok.options)) == before
    assert tok(wave, facts.sampling_rate).input_ids == ids


# Configs and checkpoints


def test_unknown_config_keys(codec_name: str, tok: AudioTokenizer, tmp_path: Path) -> None:
    config = TABLE[codec_name]
    key = sorted(config.own_keys())[0]
    near = key[:-2] + key[-1]
    with refused(ConfigError, type(config).__name__, f'"{near}"', f'Did you mean "{key}"?', *config.own_keys()):
        type(config)(**{near: 1})
    tok.save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(path.read_text().replace(f'"{key}"', f'"{near}"'))
    with refused(ConfigError, near, key):
        AutoAudioTokenizer.from_pretrained(tmp_path / "x")


@pytest.mark.parametrize("what", ["missing", "not known", "misshapen"])
def test_weights_that_do_not_fit(tok: AudioTokenizer, codec_name: str, tmp_path: Path, what: str) -> None:
    tok.save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[len(weights) // 2]
    if what == "missing":
        del weights[name]
    elif what == "not known":
        name = "encoder.extra.weight"
        weights[name] = torch.zeros(3)
    else:
        weights[name] = torch.cat([weights[name].flatten(), torch.zeros(1)])
    save_file(weights, path, {"format": "pt"})
    model = family(TABLE[codec_name]).load("Model")
    for load in (AutoAudioTokenizer.from_pretrained, model.from_pretrained):
        with refused(WeightMismatchError, f"1 {what}", name, "config"):
            load(tmp_path / "x")


def test_many_misfits_are_counted_not_listed(tok: AudioTokenizer, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    weights = load_file(path)
    save_file({f"theirs.{name}": tensor for name, tensor in weights.items()}, path, {"format": "pt"})
    with refused(WeightMismatchError, f"{len(weights)} missing", f"{len(weights)} not known", "more") as caught:
        AutoAudioTokenizer.from_pretrained(tmp_path / "x")
    assert caught is None


def test_folders_that_cannot_be_written(tok: AudioTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "below"):
        with refused(OutputNotWritableError, folder):
            tok.save_pretrained(folder)
    assert file.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [file]
