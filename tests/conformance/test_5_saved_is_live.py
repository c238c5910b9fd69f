"""Law 5: what is loaded in a fresh process, from the folder alone, gives the same ids, audio and fingerprint."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from audiotok import AutoAudioTokenizer
from audiotok.codec import AudioCodec
from audiotok.facts import CodecFacts
from audiotok.tokenizer import AudioTokenizer
from conformance.codecs_table import (
    EXCLUSIVE,
    OPTION_VALUES,
    TABLE,
    clip,
    layouts_of,
    new_codec,
    shared_codec,
    tokenizer_of,
)

TESTS = Path(__file__).parents[1]
# One fresh process for all codecs: importing transformers takes most of the time.
CHILD = """
import json, sys
from pathlib import Path
import torch
from audiotok import AutoAudioTokenizer, auto
from conformance.test_5_saved_is_live import answers
from conformance.toy_codecs import TOY_FAMILIES

torch.manual_seed(1)
auto.FAMILIES.update(TOY_FAMILIES)
loaded = {path.name: AutoAudioTokenizer.from_pretrained(path) for path in sorted(Path(sys.argv[1]).iterdir())}
print(json.dumps({name: answers(tok) for name, tok in loaded.items()}))
"""


def answers(tok: AudioTokenizer) -> dict[str, Any]:
    """What must be the same everywhere: ids, samples as text without loss, fingerprint, layout, options."""
    facts = tok.codec.facts
    wave = clip(facts, 40 * facts.hop_length + 5, seed=9)
    encoded = tok(wave, facts.sampling_rate)
    audio = tok.decode(encoded.input_ids, encoded.audio_lengths)
    return {
        "class": type(tok).__name__,
        "ids": encoded.input_ids,
        "audio": audio.numpy().tobytes().hex(),
        "fingerprint": tok.fingerprint,
        "layout": tok.layout.name,
        "options": tok.options,
        "facts": repr(facts),
        "extractor": tok.feature_extractor.to_dict(),
    }


@pytest.fixture(scope="module")
def saved() -> dict[str, AudioTokenizer]:
    """Every codec with its default layout, and once more with its last layout and options of its own."""
    toks = {}
    for name in TABLE:
        codec = shared_codec(name)
        options = {option: OPTION_VALUES[option][0] for option in codec.encode_options if option not in EXCLUSIVE}
        toks[name] = tokenizer_of(codec)
        toks[f"{name}+options"] = tokenizer_of(codec, layouts_of(codec.facts)[-1], options)
    return toks


@pytest.fixture(scope="module")
def fresh_process(
    saved: dict[str, AudioTokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    for name, tok in saved.items():
        tok.save_pretrained(folder / name)
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "loading says nothing"
    return json.loads(done.stdout)


@pytest.mark.parametrize("suffix", ["", "+options"])
def test_a_fresh_process_answers_the_same(
    saved: dict[str, AudioTokenizer], fresh_process: dict[str, dict[str, Any]], codec_name: str, suffix: str
) -> None:
    name = codec_name + suffix
    assert fresh_process[name] == json.loads(json.dumps(answers(saved[name])))


def test_every_tensor_comes_back(codec: AudioCodec, tmp_path: Path) -> None:
    tokenizer_of(codec).save_pretrained(tmp_path / "x")
    loaded = AutoAudioTokenizer.from_pretrained(tmp_path / "x").codec
    assert_same_state(loaded, codec)
    assert not loaded.training


def assert_same_state(one: AudioCodec, other: AudioCodec) -> None:
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name


def test_saving_twice_gives_the_same_files(tok: AudioTokenizer, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path / "one")
    AutoAudioTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        one, two = path.read_text("latin-1"), (tmp_path / "two" / path.name).read_text("latin-1")
        # The name it was loaded from is told to people, and changes nothing.
        assert one.replace("a-name", "") == two.replace(str(tmp_path / "one"), ""), path.name


# The fingerprint changes if and only if an id or the audio could change.


def test_another_layout_is_another_fingerprint(tok: AudioTokenizer, facts: CodecFacts) -> None:
    fingerprints = [tok.with_layout(layout).fingerprint for layout in layouts_of(facts)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprints[0] == tok.fingerprint
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in fingerprints)


def test_another_option_is_another_fingerprint(codec: AudioCodec) -> None:
    variants: list[dict[str, Any]] = [{}, {"chunk_length_s": 20.0}, {"chunk_length_s": 20.0, "context_s": 2.0}]
    variants += [{option: value} for option in codec.encode_options for value in OPTION_VALUES[option]]
    fingerprints = [tokenizer_of(codec, None, options).fingerprint for options in variants]
    assert len(set(fingerprints)) == len(variants)


def test_options_that_say_the_default_are_no_options(codec: AudioCodec) -> None:
    defaults = dict.fromkeys((*codec.encode_options, "chunk_length_s", "context_s"))
    assert tokenizer_of(codec, None, defaults).fingerprint == tokenizer_of(codec).fingerprint


def test_one_number_in_any_tensor_is_another_fingerprint(codec_name: str) -> None:
    codec = new_codec(codec_name)
    tok = tokenizer_of(codec)
    before = tok.fingerprint
    state = {name: t for name, t in codec.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in list(state.items())[:: 1 + len(state) // 10]:
        value = tensor.flatten()[-1].item()
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        assert tok.fingerprint != before, name
        with torch.no_grad():
            tensor.view(-1)[-1] = value
        assert tok.fingerprint == before, name


def test_a_weight_changed_behind_autograds_back_is_another_fingerprint(codec_name: str) -> None:
    """`parameter.data` has a version counter of its own: much code writes through it."""
    codec = new_codec(codec_name)
    tok = tokenizer_of(codec)
    before = tok.fingerprint
    next(codec.parameters()).data.add_(1)
    assert tok.fingerprint != before


def test_a_new_codec_in_the_memory_of_an_old_one_has_its_own_fingerprint() -> None:
    fingerprints = set()
    for i in range(4):
        codec = new_codec("toy_rvq")
        with torch.no_grad():
            next(codec.parameters()).view(-1)[0] = float(i)
        fingerprints.add(tokenizer_of(codec).fingerprint)
        del codec
        gc.collect()
    assert len(fingerprints) == 4


def test_another_dtype_is_another_fingerprint(tok: AudioTokenizer, codec_name: str) -> None:
    assert tokenizer_of(new_codec(codec_name).to(torch.bfloat16)).fingerprint != tok.fingerprint


def test_another_config_is_another_fingerprint(tok: AudioTokenizer) -> None:
    """Every key of the family counts, but for those that only training reads."""
    other = copy.deepcopy(tok)
    config = other.codec.config
    for key in sorted(config.own_keys()):
        value = getattr(config, key)
        setattr(config, key, "another value")
        assert (other.fingerprint == tok.fingerprint) == (key in config.training_keys), key
        setattr(config, key, value)
    assert other.fingerprint == tok.fingerprint


def test_what_changes_no_id_changes_no_fingerprint(tok: AudioTokenizer, facts: CodecFacts, tmp_path: Path) -> None:
    before = tok.fingerprint
    same = copy.deepcopy(tok)
    same.name_or_path = "another-name"
    same.codec.config.name_or_path = "somewhere/else"
    same.codec.config.transformers_version = "0.0.0"
    assert same.fingerprint == before
    same.to("cpu")
    same.codec.requires_grad_(False)
    assert same.fingerprint == before
    list(same.encoder(batch_size=4, certify=False).encode([clip(facts, 99)], facts.sampling_rate))
    same.decode(same(clip(facts, 500), facts.sampling_rate).input_ids)
    assert same.fingerprint == before
    same.save_pretrained(tmp_path / "x")
    assert AutoAudioTokenizer.from_pretrained(tmp_path / "x").fingerprint == before


@pytest.mark.parametrize("key, value", [("output_hidden_states", True), ("id2label", {0: "a"}), ("return_dict", False)])
def test_keys_of_every_transformers_config_change_no_fingerprint(tok: AudioTokenizer, key: str, value: Any) -> None:
    same = copy.deepcopy(tok)
    setattr(same.codec.config, key, value)
    assert same.fingerprint == tok.fingerprint


def test_what_only_training_reads_changes_no_fingerprint() -> None:
    codec = shared_codec("auv")
    before = tokenizer_of(codec).fingerprint
    assert tokenizer_of(new_codec("auv", commitment_cost=0.5)).fingerprint == before
    assert tokenizer_of(new_codec("auv", distill_depth=0)).fingerprint == before


def test_the_folder_says_its_fingerprint(tok: AudioTokenizer, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path / "x")
    assert json.loads((tmp_path / "x" / "audio_tokenizer.json").read_text())["fingerprint"] == tok.fingerprint
