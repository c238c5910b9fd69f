"""What `save_pretrained` and `push_to_hub` write, and what they leave alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conformance.codecs_table import PUBLISHED, clip, new_codec, shared_codec, tokenizer_of
from conformance.helpers import refused
from safetensors.torch import load_file, save_file

from audiotok import AutoAudioTokenizer, __version__
from audiotok.errors import CheckpointNotFoundError, OutputNotWritableError
from audiotok.saving import model_card
from audiotok.tokenizer import AudioTokenizer

FILES = {"audio_tokenizer.json", "config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
WAVE = clip(shared_codec("auv").facts, 1000)


@pytest.fixture(scope="module")
def tok() -> AudioTokenizer:
    return tokenizer_of(shared_codec("auv"), None, {"domain": "speech"})


@pytest.fixture(scope="module")
def other() -> AudioTokenizer:
    """Another codec of the same family."""
    return tokenizer_of(shared_codec("auv_stages"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files(tok: AudioTokenizer, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path / "some" / "where" / "new")
    folder = tmp_path / "some" / "where" / "new"
    assert names(folder) == FILES
    record = {
        "tokenizer_class": "AuvAudioTokenizer",
        "layout": "interleaved",
        "options": {"domain": "speech"},
        "name_or_path": "a-name",
        "fingerprint": tok.fingerprint,
        "audiotok_version": __version__,
    }
    assert json.loads((folder / "audio_tokenizer.json").read_text()).items() >= record.items()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "audiotok_auv"
    assert config["hidden_size"] == 48
    assert json.loads((folder / "preprocessor_config.json").read_text())["sampling_rate"] == 16_000
    assert load_file(folder / "model.safetensors").keys() == tok.codec.state_dict().keys()


def test_a_folder_of_ours_is_written_over(tok: AudioTokenizer, other: AudioTokenizer, tmp_path: Path) -> None:
    other.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    tok.save_pretrained(str(tmp_path))
    assert names(tmp_path) == FILES
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert AutoAudioTokenizer.from_pretrained(tmp_path).fingerprint == tok.fingerprint


@pytest.mark.parametrize("neutral", [".git", "LICENSE", ".gitattributes"])
def test_files_of_a_repository_are_no_other_model(tok: AudioTokenizer, tmp_path: Path, neutral: str) -> None:
    (tmp_path / neutral).write_text("kept")
    tok.save_pretrained(tmp_path)
    assert names(tmp_path) == FILES | {neutral}


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "x"},
        {"config.json": '{"model_type": "llama"}', "generation_config.json": "{}", "training_args.bin": "x"},
        {"config.json": '{"model_type": "llama"}', "model-00001-of-00002.safetensors": "x"},
        {"config.json": "{", "model.safetensors": "x"},
        {"config.json": '["no object"]'},
        {"model.safetensors": "somebody's weights, without a config"},
        {"model-00001-of-00002.safetensors": "x", "optimizer.pt": "x"},
        {"notes.txt": "x"},
    ],
    ids=lambda files: "+".join(files),
)
def test_another_model_is_never_touched(tok: AudioTokenizer, tmp_path: Path, files: dict[str, str]) -> None:
    """The tokenizer goes into a folder of its own, and is found there."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tok.save_pretrained(tmp_path)
    assert names(tmp_path) == {*files, "audio_tokenizer"}
    assert {name: (tmp_path / name).read_text() for name in files} == files
    assert names(tmp_path / "audio_tokenizer") == FILES
    assert AutoAudioTokenizer.from_pretrained(tmp_path).fingerprint == tok.fingerprint
    tok.save_pretrained(tmp_path)
    assert names(tmp_path) == {*files, "audio_tokenizer"}


def test_without_weights(tok: AudioTokenizer, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path, save_weights=False)
    assert names(tmp_path) == FILES - {"model.safetensors"}
    with refused(CheckpointNotFoundError, tmp_path, "a-name"):
        AutoAudioTokenizer.from_pretrained(tmp_path)


def test_without_weights_over_the_weights_of_another(
    tok: AudioTokenizer, other: AudioTokenizer, tmp_path: Path
) -> None:
    """The old weights must not pass for those of the new tokenizer."""
    other.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path, save_weights=False)
    with pytest.raises(CheckpointNotFoundError):
        AutoAudioTokenizer.from_pretrained(tmp_path)


def test_sharded_weights_load(tok: AudioTokenizer, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tok.codec.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert AutoAudioTokenizer.from_pretrained(tmp_path).fingerprint == tok.fingerprint
    tok.save_pretrained(tmp_path)
    assert not (tmp_path / "audio_tokenizer").exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_card_states_the_facts(name: str, tmp_path: Path) -> None:
    tok = tokenizer_of(shared_codec(name))
    facts = tok.codec.facts
    card = model_card(tok)
    assert card.startswith("---\nlibrary_name: audiotok\n")
    for word in (
        f"{facts.sampling_rate} Hz",
        f"hop {facts.hop_length}",
        f"{facts.bits_per_second():.0f}",
        f"{tok.codec.num_parameters():,}",
        tok.fingerprint,
        "AutoAudioTokenizer.from_pretrained",
        *(f"{size:,}" for size in facts.codebook_sizes),
    ):
        assert word in card
    code = card.split("```python\n")[1].split("```")[0]
    tok.save_pretrained(tmp_path / "x")
    compile(code, "README.md", "exec")


def test_weights_survive_a_change_after_saving(tmp_path: Path) -> None:
    """Files hold what the codec was when it was saved."""
    codec = new_codec("auv")
    tok = tokenizer_of(codec)
    before = tok.fingerprint
    tok.save_pretrained(tmp_path)
    with torch.no_grad():
        next(codec.parameters()).add_(1)
    assert AutoAudioTokenizer.from_pretrained(tmp_path).fingerprint == before != tok.fingerprint


def test_a_fingerprint_that_does_not_fit_the_weights(tok: AudioTokenizer, tmp_path: Path) -> None:
    """Another file under the saved name: the loaded tokenizer says its own fingerprint, not the recorded one."""
    tok.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    assert AutoAudioTokenizer.from_pretrained(tmp_path).fingerprint != tok.fingerprint


def test_a_full_disk(tok: AudioTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tok.codec, "save_pretrained", full)
    with refused(OutputNotWritableError, tmp_path / "new", "No space left on device"):
        tok.save_pretrained(tmp_path / "new")


# The hub


class FakeApi:
    """Keeps what would be uploaded."""

    uploads: dict[str, Any]

    def __init__(self, token: str | bool | None = None) -> None:
        FakeApi.uploads = {"token": token}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        FakeApi.uploads.update(repo=repo_id, **options)
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, folder_path: str, **options: Any) -> Any:
        shutil.copytree(folder_path, FakeApi.target)
        FakeApi.uploads.update(options)
        return type("Commit", (), {"commit_url": "https://hub/me/my-codec/commit/1"})


def test_push_to_hub(tok: AudioTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "target", tmp_path / "hub", raising=False)
    address = tok.push_to_hub("my-codec", private=True, token="t", commit_message="First")
    assert address == "https://hub/me/my-codec/commit/1"
    assert FakeApi.uploads["repo"] == "my-codec"
    assert FakeApi.uploads["repo_id"] == "me/my-codec"
    assert (FakeApi.uploads["private"], FakeApi.uploads["exist_ok"]) == (True, True)
    assert FakeApi.uploads["commit_message"] == "First"
    assert names(tmp_path / "hub") == FILES
    assert AutoAudioTokenizer.from_pretrained(tmp_path / "hub").fingerprint == tok.fingerprint
