"""`AudioTokenizer` as users of transformers meet it: calls, padding, truncation, decoding, Trainer, datasets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conformance.codecs_table import clip, layouts_of, shared_codec, tokenizer_of
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from audiotok import AutoAudioTokenizer, AuvAudioTokenizer
from audiotok.encoding import ClipCodes
from audiotok.errors import EmptyAudioError, OptionError
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer

RATE = 16_000


@pytest.fixture(scope="module")
def tok() -> AudioTokenizer:
    """One codebook, hop 32."""
    return tokenizer_of(shared_codec("auv"))


@pytest.fixture(scope="module")
def deep() -> AudioTokenizer:
    """Two residual codebooks, hop 32, 8 kHz."""
    return tokenizer_of(shared_codec("auv_stages"))


def wave(num_samples: int, seed: int = 0) -> np.ndarray:
    facts: CodecFacts = shared_codec("auv").facts
    return clip(facts, num_samples, seed)[0]


WAVES = [wave(n, seed) for seed, n in enumerate((1000, 320, 33, 2000))]
FRAMES = [32, 10, 2, 63]


# What comes in


def test_one_recording_gives_one_clip(tok: AudioTokenizer) -> None:
    enc = tok(WAVES[0], RATE)
    assert isinstance(enc, BatchEncoding)
    assert list(enc.keys()) == ["input_ids", "attention_mask", "audio_lengths"]
    assert isinstance(enc.input_ids, list)
    assert isinstance(enc.input_ids[0], int)
    assert (len(enc.input_ids), enc.attention_mask, enc.audio_lengths) == (32, [1] * 32, 1000)


def test_a_list_gives_a_batch(tok: AudioTokenizer) -> None:
    enc = tok(WAVES, RATE)
    assert [len(ids) for ids in enc.input_ids] == FRAMES
    assert enc.audio_lengths == [1000, 320, 33, 2000]
    assert enc.input_ids[0] == tok(WAVES[0], RATE).input_ids
    assert tok([WAVES[0]], RATE).input_ids == [enc.input_ids[0]]
    assert tok(tuple(WAVES), RATE).input_ids == enc.input_ids


def test_every_kind_of_recording_gives_the_same_ids(tok: AudioTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, WAVES[0], RATE, subtype="FLOAT")
    expected = tok(path).input_ids
    assert expected == tok(WAVES[0], RATE).input_ids
    sources: list[Any] = [
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        {"array": WAVES[0], "sampling_rate": RATE},
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
    ]
    for source in sources:
        assert tok(source).input_ids == expected
    for array in (WAVES[0], torch.from_numpy(WAVES[0]), WAVES[0].tolist(), WAVES[0][None], WAVES[0].astype(float)):
        assert tok(array, sampling_rate=RATE).input_ids == expected
    assert tok(sources[:2] + sources[3:]).input_ids == [expected] * 5


def test_other_rates_and_channels(tok: AudioTokenizer) -> None:
    assert tok(wave(4410), 44_100).audio_lengths == 1600
    stereo = np.stack([WAVES[0], WAVES[0]])
    assert tok(stereo, RATE, downmix="mean").input_ids == tok(WAVES[0], RATE).input_ids
    assert tok(np.stack([WAVES[0], 0 * WAVES[0]]), RATE, downmix=0).input_ids == tok(WAVES[0], RATE).input_ids


@pytest.mark.parametrize("return_tensors", [None, "pt", "np"])
def test_no_recordings_at_all_are_refused(tok: AudioTokenizer, return_tensors: str | None) -> None:
    with pytest.raises(EmptyAudioError, match="no recordings"):
        tok([], RATE, return_tensors=return_tensors)


# Tensors and padding


@pytest.mark.parametrize("kind, array_type", [("pt", torch.Tensor), ("np", np.ndarray)])
def test_tensors(tok: AudioTokenizer, kind: str, array_type: type) -> None:
    single = tok(WAVES[0], RATE, return_tensors=kind)
    batch = tok(WAVES, RATE, padding=True, return_tensors=kind)
    for enc, rows in ((single, 1), (batch, 4)):
        assert all(isinstance(value, array_type) for value in enc.values())
        assert tuple(enc.input_ids.shape) == tuple(enc.attention_mask.shape)
        assert enc.input_ids.shape[0] == rows
        assert tuple(enc.audio_lengths.shape) == (rows,)
        assert all("int64" in str(value.dtype) for value in enc.values())
    if kind == "pt":
        assert batch.to("cpu").input_ids.device.type == "cpu"


@pytest.mark.parametrize(
    "padding, max_length, multiple, expected",
    [
        (True, None, None, 63),
        ("longest", None, None, 63),
        ("longest", None, 8, 64),
        ("longest", 5, None, 63),
        ("max_length", 70, None, 70),
        ("max_length", 70, 16, 80),
        ("max_length", 64, 64, 64),
    ],
)
def test_padding(
    tok: AudioTokenizer, padding: bool | str, max_length: int | None, multiple: int | None, expected: int
) -> None:
    enc = tok(WAVES, RATE, padding=padding, max_length=max_length, pad_to_multiple_of=multiple, return_tensors="pt")
    assert tuple(enc.input_ids.shape) == (4, expected)
    for ids, mask, frames, alone in zip(enc.input_ids, enc.attention_mask, FRAMES, WAVES, strict=True):
        assert ids[:frames].tolist() == tok(alone, RATE).input_ids
        assert (ids[frames:] == tok.pad_token_id).all()
        assert mask.tolist() == [1] * frames + [0] * (expected - frames)


@pytest.mark.parametrize("padding", [False, "do_not_pad"])
def test_no_padding(tok: AudioTokenizer, padding: bool | str) -> None:
    assert [len(ids) for ids in tok(WAVES, RATE, padding=padding).input_ids] == FRAMES
    with pytest.raises(OptionError, match=r"4 different lengths.*padding=True"):
        tok(WAVES, RATE, padding=padding, return_tensors="pt")


def test_what_padding_refuses(tok: AudioTokenizer) -> None:
    for options, words in (
        ({"padding": "longst"}, "padding='longst'.*longest"),
        ({"padding": "max_length"}, "needs max_length="),
        ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
        ({"padding": True, "pad_to_multiple_of": -8}, "pad_to_multiple_of=-8"),
        ({"return_tensors": "tf"}, "return_tensors='tf'.*pt"),
        ({"truncation": True}, "needs max_length="),
        ({"truncation": True, "max_length": -1}, "max_length=-1"),
        ({"truncation": True, "max_length": 1, "add_special_tokens": True}, "max_length=1"),
    ):
        with pytest.raises(OptionError, match=words):
            tok(WAVES, RATE, **options)


def test_pad_as_collators_call_it(tok: AudioTokenizer) -> None:
    examples = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = tok.pad(examples, return_tensors="pt")
    pad = tok.pad_token_id
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, pad, pad]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    columns = {"input_ids": [[1, 2, 3], [4]]}
    assert tok.pad(columns, return_tensors="np")["input_ids"].tolist() == batch["input_ids"].tolist()
    assert columns == {"input_ids": [[1, 2, 3], [4]]}
    assert "attention_mask" not in tok.pad(examples, return_attention_mask=False)
    kept = tok.pad([{"input_ids": [1], "attention_mask": [0]}, {"input_ids": [1, 2], "attention_mask": [1, 1]}])
    assert kept["attention_mask"] == [[0, 0], [1, 1]]


def test_pad_takes_one_example(tok: AudioTokenizer) -> None:
    """As every tokenizer of transformers does."""
    one = tok.pad({"input_ids": [1, 2, 3]}, padding="max_length", max_length=5)
    assert one["input_ids"] == [1, 2, 3, tok.pad_token_id, tok.pad_token_id]
    assert one["attention_mask"] == [1, 1, 1, 0, 0]


def test_pad_refuses_what_is_no_batch(tok: AudioTokenizer) -> None:
    for nothing in ([], [{"codes": [1]}], {"codes": [[1]]}):
        with pytest.raises(OptionError, match="input_ids"):
            tok.pad(nothing)


# Truncation


@pytest.mark.parametrize("max_length", [1, 2, 7, 8, 63, 64, 1000])
def test_truncation_keeps_whole_frames(deep: AudioTokenizer, max_length: int) -> None:
    whole = deep(WAVES, 8000)
    cut = deep(WAVES, 8000, truncation=True, max_length=max_length)
    for ids, kept, length, full in zip(
        whole.input_ids, cut.input_ids, cut.audio_lengths, whole.audio_lengths, strict=True
    ):
        frames = min(max_length, len(ids)) // 2
        assert kept == ids[: 2 * frames]
        assert length == min(full, frames * 32)
        assert deep.decode(kept, length).shape == (1, length)


@pytest.mark.parametrize("name", ["toy_multirate", "toy_depth", "toy_bands"])
def test_truncation_keeps_all_whole_frames_that_fit(name: str) -> None:
    codec = shared_codec(name)
    facts = codec.facts
    audio = clip(facts, 12 * facts.hop_length)
    for layout in layouts_of(facts):
        tok = tokenizer_of(codec, layout)
        [encoded] = tok.encode_audio([audio], facts.sampling_rate)
        prefixes = [ids_of_frames(tok, encoded, n) for n in range(0, 13, facts.frame_multiple)]
        sizes = [ids.shape[-1] for ids in prefixes]
        for max_length in range(sizes[0]):
            with pytest.raises(OptionError, match=f"max_length.*{sizes[0]}"):
                tok(audio, facts.sampling_rate, truncation=True, max_length=max_length)
        for max_length in range(sizes[0], sizes[-1] + 2):
            cut = tok(audio, facts.sampling_rate, truncation=True, max_length=max_length, return_tensors="np")
            expected = max(n for n, size in enumerate(sizes) if size <= max_length)
            np.testing.assert_array_equal(cut.input_ids[0], prefixes[expected])
            assert cut.audio_lengths[0] == expected * facts.frame_multiple * facts.hop_length
            decoded = tok.decode(cut.input_ids[0], cut.audio_lengths[0])
            assert decoded.shape[1] == facts.output_length(int(cut.audio_lengths[0]))


def ids_of_frames(tok: AudioTokenizer, encoded: ClipCodes, num_frames: int) -> np.ndarray:
    """Ids of the first frames of a clip."""
    if isinstance(encoded.codes, list):
        strides = tok.codec.facts.codebook_strides
        return tok.codes_to_ids([row[: num_frames // s] for row, s in zip(encoded.codes, strides, strict=True)])
    depths = None if encoded.depths is None else encoded.depths[:num_frames]
    return tok.codes_to_ids(encoded.codes[:, :num_frames], depths)


def test_truncation_counts_special_tokens(tok: AudioTokenizer) -> None:
    enc = tok(WAVES[0], RATE, truncation=True, max_length=10, add_special_tokens=True)
    assert len(enc.input_ids) == 10
    assert enc.audio_lengths == 8 * 32


# Special tokens


def test_special_tokens(tok: AudioTokenizer) -> None:
    assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id) == (320, 321, 322)
    assert tok.all_special_ids == [320, 321, 322]
    assert tok.vocab_size == len(tok) == 323
    bare = tok(WAVES[0], RATE).input_ids
    enc = tok(WAVES[0], RATE, add_special_tokens=True)
    assert enc.input_ids == [321, *bare, 322]
    assert enc.attention_mask == [1] * 34
    expected = tok.decode(bare, 1000)
    for ids in (enc.input_ids, [*enc.input_ids, 320, 320], [321, *bare], [*bare, 322], [*bare, 320]):
        assert torch.equal(tok.decode(ids, 1000), expected)
    np.testing.assert_array_equal(tok.ids_to_codes(enc.input_ids), tok.ids_to_codes(bare))
    with pytest.raises(OptionError, match="parallel"):
        tok.with_layout("parallel")(WAVES[0], RATE, add_special_tokens=True)


def test_token_strings(tok: AudioTokenizer, deep: AudioTokenizer) -> None:
    assert tok.convert_ids_to_tokens(17) == "<|a0_17|>"
    assert deep.convert_ids_to_tokens([0, 95, 96, 159, 160, 161, 162]) == [
        "<|a0_0|>",
        "<|a0_95|>",
        "<|a1_0|>",
        "<|a1_63|>",
        "<|audio_pad|>",
        "<|audio_start|>",
        "<|audio_end|>",
    ]
    ids = deep(WAVES[0], 8000, return_tensors="pt").input_ids[0]
    assert deep.convert_tokens_to_ids(deep.convert_ids_to_tokens(ids)) == ids.tolist()
    assert tok.convert_tokens_to_ids("<|audio_end|>") == tok.eos_token_id
    assert tok.convert_ids_to_tokens(torch.tensor([3])) == tok.convert_ids_to_tokens(np.array([3])) == ["<|a0_3|>"]


# Layouts


def test_another_layout_of_the_same_codec(deep: AudioTokenizer) -> None:
    for layout in layouts_of(deep.codec.facts):
        other = deep.with_layout(layout)
        assert type(other) is AuvAudioTokenizer
        assert other.codec is deep.codec
        assert other.layout.name == layout
        assert deep.layout.name == "interleaved"
        audio = other.decode(other(WAVES[0], 8000).input_ids, 1000)
        torch.testing.assert_close(audio, deep.decode(deep(WAVES[0], 8000).input_ids, 1000))


def test_options_stay_with_another_layout(deep: AudioTokenizer) -> None:
    restricted = tokenizer_of(deep.codec, None, {"domain": "speech"})
    assert restricted.with_layout("delay").options == {"domain": "speech"}


@pytest.mark.parametrize("layout", ["parallel", "delay"])
def test_two_dimensional_batches(deep: AudioTokenizer, layout: str) -> None:
    """Streams are padded at the end of time, and decode without padding gives each clip back."""
    laid = deep.with_layout(layout)
    late = 1 if layout == "delay" else 0
    single = laid(WAVES[0], 8000)
    assert np.shape(single.input_ids) == (2, 32 + late)
    assert len(single.attention_mask) == 32 + late
    batch = laid(WAVES, 8000, padding=True, return_tensors="pt")
    assert tuple(batch.input_ids.shape) == (4, 2, 63 + late)
    assert tuple(batch.attention_mask.shape) == (4, 63 + late)
    assert batch.attention_mask.sum(dim=1).tolist() == [frames + late for frames in FRAMES]
    for ids, mask, length, audio in zip(
        batch.input_ids, batch.attention_mask.bool(), batch.audio_lengths, WAVES, strict=True
    ):
        expected = laid.decode(laid(audio, 8000).input_ids, length)
        assert torch.equal(laid.decode(ids[:, mask], length), expected)
        assert torch.equal(laid.decode(ids, length), expected), "padding behind is left out"


@pytest.mark.parametrize("layout", ["interleaved", "coarse_first", "parallel", "delay"])
def test_batch_decode_undoes_a_padded_batch(deep: AudioTokenizer, layout: str) -> None:
    laid = deep.with_layout(layout)
    batch = laid(WAVES, 8000, padding=True, return_tensors="pt")
    decoded = laid.batch_decode(batch.input_ids, batch.audio_lengths)
    assert [tuple(audio.shape) for audio in decoded] == [(1, 1000), (1, 320), (1, 33), (1, 2000)]
    for audio, original in zip(decoded, WAVES, strict=True):
        alone = laid(original, 8000)
        assert torch.equal(audio, laid.decode(alone.input_ids, alone.audio_lengths))
    whole = laid.batch_decode(laid(WAVES, 8000).input_ids)
    assert [audio.shape[1] for audio in whole] == [32 * frames for frames in FRAMES]


def test_decode_of_any_kind_of_ids(tok: AudioTokenizer) -> None:
    ids = tok(WAVES[0], RATE).input_ids
    expected = tok.decode(ids)
    assert tuple(expected.shape) == (1, 1024)
    assert expected.dtype == torch.float32
    for same in (tuple(ids), np.array(ids), np.array(ids, np.uint16), torch.tensor(ids), torch.tensor(ids).int()):
        assert torch.equal(tok.decode(same), expected)
    assert torch.equal(tok.decode(ids, length=torch.tensor(1000)), expected[:, :1000])
    for nothing in ([], np.array([], np.int64), [tok.pad_token_id], [tok.bos_token_id, tok.eos_token_id]):
        assert tuple(tok.decode(nothing).shape) == (1, 0)


def test_decoding_piece_by_piece(tok: AudioTokenizer) -> None:
    ids = tok(WAVES[3], RATE).input_ids
    pieces = list(tok.decode_blocks(ids, 1999))
    assert torch.equal(torch.cat(pieces, dim=1), tok.decode(ids, 1999))


# Options


def test_one_domain_for_all_or_one_a_clip(tok: AudioTokenizer) -> None:
    free, speech, other = (
        [tok(audio, RATE, **options).input_ids for audio in WAVES]
        for options in ({}, {"domain": "speech"}, {"domain": "other"})
    )
    assert max(map(max, free)) >= 128 > max(map(max, speech))
    assert min(map(min, other)) >= 192
    assert tok(WAVES, RATE, domain="speech").input_ids == speech
    mixed = [speech[0], other[1], speech[2], other[3]]
    names = ["speech", "other", "speech", "other"]
    for batch_size in (1, 2, 4):
        assert tok(WAVES, RATE, domain=names, batch_size=batch_size).input_ids == mixed
        # None is no restriction, alone and among others.
        assert tok(WAVES, RATE, domain=None, batch_size=batch_size).input_ids == free
        found = tok(WAVES, RATE, domain=["speech", None, None, "other"], batch_size=batch_size).input_ids
        assert found == [speech[0], free[1], free[2], other[3]]


def test_options_of_the_tokenizer_are_defaults(tok: AudioTokenizer) -> None:
    speech = tokenizer_of(tok.codec, None, {"domain": "speech"})
    assert speech(WAVES[0], RATE).input_ids == tok(WAVES[0], RATE, domain="speech").input_ids
    assert speech(WAVES[0], RATE, domain="other").input_ids == tok(WAVES[0], RATE, domain="other").input_ids
    assert speech(WAVES[0], RATE, domain=None).input_ids == tok(WAVES[0], RATE).input_ids
    assert speech.options == {"domain": "speech"}


def test_one_form_for_people(tok: AudioTokenizer) -> None:
    for word in ("AuvAudioTokenizer", "16000 Hz", "500 ids/s", "interleaved", "323"):
        assert word in repr(tok)


# transformers' Trainer


@pytest.fixture(scope="module")
def corpus(tok: AudioTokenizer) -> Dataset:
    enc = tok([wave(600 + 90 * i, i) for i in range(8)], RATE, add_special_tokens=True)
    return Dataset.from_dict(dict(enc))


@pytest.mark.parametrize("collator", ["padding", "language modelling"])
def test_collators_of_transformers(tok: AudioTokenizer, corpus: Dataset, collator: str) -> None:
    collate = (
        DataCollatorWithPadding(tok, pad_to_multiple_of=8)
        if collator == "padding"
        else DataCollatorForLanguageModeling(tok, mlm=False)
    )
    batch = next(iter(DataLoader(corpus.remove_columns("audio_lengths"), batch_size=4, collate_fn=collate)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["input_ids"] != tok.pad_token_id, batch["attention_mask"].bool())
    if collator == "padding":
        assert batch["input_ids"].shape[1] % 8 == 0
    else:
        expected = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
        assert torch.equal(batch["labels"], expected)


def small_language_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("collator", ["padding", "language modelling"])
def test_trainer_end_to_end(tok: AudioTokenizer, corpus: Dataset, tmp_path: Path, collator: str) -> None:
    """Three steps; then the checkpoint holds the language model, and the tokenizer in a folder of its own."""
    model = small_language_model(tok.vocab_size)
    if collator == "padding":
        collate, columns = DataCollatorWithPadding(tok), corpus.map(lambda row: {"labels": row["input_ids"]})
    else:
        collate, columns = DataCollatorForLanguageModeling(tok, mlm=False), corpus
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        save_steps=3,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=columns, processing_class=tok)
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "llama"
    loaded = LlamaForCausalLM.from_pretrained(checkpoint)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert (checkpoint / "audio_tokenizer" / "audio_tokenizer.json").is_file()
    found = AutoAudioTokenizer.from_pretrained(checkpoint)
    assert found.fingerprint == tok.fingerprint
    assert found(WAVES[0], RATE).input_ids == tok(WAVES[0], RATE).input_ids


# datasets


def test_map_is_cached(tok: AudioTokenizer, tmp_path: Path) -> None:
    """The function's fingerprint is stable before and after a use of the tokenizer, and follows its options."""
    rows = Dataset.from_dict({"wave": [audio.tolist() for audio in WAVES[:3]]})
    rows.save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")

    def tokenize(tokenizer: AudioTokenizer) -> Dataset:
        return rows.map(lambda row: {"input_ids": tokenizer(row["wave"], RATE).input_ids})

    first = tokenize(tok)
    assert first["input_ids"][:] == [tok(audio, RATE).input_ids for audio in WAVES[:3]]
    again = tokenize(tok)
    assert again._fingerprint == first._fingerprint
    assert again.cache_files == first.cache_files != []
    restricted = tokenize(tokenizer_of(tok.codec, None, {"domain": "speech"}))
    assert restricted._fingerprint != first._fingerprint
    assert max(map(max, restricted["input_ids"][:])) < 128


def test_map_in_worker_processes(tok: AudioTokenizer) -> None:
    rows = Dataset.from_dict({"wave": [audio.tolist() for audio in WAVES[:2]]})
    mapped = rows.map(lambda row: {"input_ids": tok(row["wave"], RATE).input_ids}, num_proc=2)
    assert mapped["input_ids"][:] == [tok(audio, RATE).input_ids for audio in WAVES[:2]]
