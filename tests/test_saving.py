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
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from audiotok import AutoAudioTokenizer, __version__, auto
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


# Its licence


def licence(card: str) -> dict[str, str]:
    return {key: value for key, value in ModelCard(card).data.to_dict().items() if key.startswith("license")}


@pytest.fixture
def licensed(tok: AudioTokenizer, tmp_path: Path) -> Path:
    """A tokenizer in a folder whose card was given a licence."""
    tok.save_pretrained(tmp_path / "licensed")
    give_licence(tmp_path / "licensed", "license: cc-by-4.0")
    return tmp_path / "licensed"


def give_licence(folder: Path, lines: str) -> None:
    card = (folder / "README.md").read_text()
    assert "license" not in card
    (folder / "README.md").write_text(card.replace("---\n", f"---\n{lines}\n", 1))


def test_a_licence_that_is_not_known_is_left_out(tok: AudioTokenizer) -> None:
    """`tok` has a name that no checkpoint has; a tokenizer made from a codec has none."""
    for name in ("a-name", "", "/no/such/folder", "owner/a name", "owner/not-in-the-cache"):
        card = model_card(type(tok)(tok.codec, name=name))
        assert licence(card) == {}
        assert "Training data, licence and figures: to be filled in" in card


@pytest.mark.parametrize(
    "lines", ["license: apache-2.0", "license: other\nlicense_name: mine\nlicense_link: https://mine.org/terms"]
)
def test_the_licence_of_a_folder_stays_with_its_weights(tok: AudioTokenizer, tmp_path: Path, lines: str) -> None:
    tok.save_pretrained(tmp_path / "a")
    give_licence(tmp_path / "a", lines)
    loaded = AutoAudioTokenizer.from_pretrained(tmp_path / "a", layout="coarse_first", domain="music")
    loaded.save_pretrained(tmp_path / "b")
    AutoAudioTokenizer.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    for folder in ("b", "c"):
        card = (tmp_path / folder / "README.md").read_text()
        assert licence(card) == dict(line.split(": ") for line in lines.splitlines())
        assert "Training data and figures: to be filled in" in card


def test_a_link_to_a_file_that_is_not_copied_is_left_out(tok: AudioTokenizer, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path)
    give_licence(tmp_path, "license: other\nlicense_name: mine\nlicense_link: LICENSE")
    card = model_card(AutoAudioTokenizer.from_pretrained(tmp_path))
    assert licence(card) == {"license": "other", "license_name": "mine"}


def test_other_weights_do_not_inherit_a_licence(licensed: Path) -> None:
    loaded = AutoAudioTokenizer.from_pretrained(licensed)
    assert licence(model_card(loaded)) == {"license": "cc-by-4.0"}
    with torch.no_grad():
        next(loaded.codec.parameters()).add_(1)
    assert licence(model_card(loaded)) == {}


def test_a_name_says_nothing_of_other_weights(tok: AudioTokenizer, other: AudioTokenizer, licensed: Path) -> None:
    assert licence(model_card(type(tok)(tok.codec, name=str(licensed)))) == {"license": "cc-by-4.0"}
    assert licence(model_card(type(tok)(other.codec, name=str(licensed)))) == {}


def test_the_licence_of_a_language_model_is_not_the_tokenizers(tok: AudioTokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "README.md").write_text("---\nlicense: llama3\n---\n")
    tok.save_pretrained(tmp_path)
    assert licence(model_card(AutoAudioTokenizer.from_pretrained(tmp_path))) == {}
    give_licence(tmp_path / "audio_tokenizer", "license: mit")
    assert licence(model_card(AutoAudioTokenizer.from_pretrained(tmp_path))) == {"license": "mit"}


@pytest.mark.parametrize(
    "card", ["no front matter", "---\n: [\n---\n", "---\n- license\n---\n", "---\nlicense:\n---\n", None]
)
def test_a_card_that_states_no_licence(licensed: Path, card: str | None) -> None:
    (licensed / "README.md").unlink()
    if card is not None:
        (licensed / "README.md").write_text(card)
    assert licence(model_card(AutoAudioTokenizer.from_pretrained(licensed))) == {}


def test_a_folder_that_was_emptied_since(licensed: Path) -> None:
    loaded = AutoAudioTokenizer.from_pretrained(licensed)
    (licensed / "audio_tokenizer.json").write_text("{")
    assert licence(model_card(loaded)) == {}
    shutil.rmtree(licensed)
    assert licence(model_card(loaded)) == {}


def test_the_licence_of_a_repository_in_the_cache(
    licensed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache" / "models--someone--their-codec"
    shutil.copytree(licensed, root / "snapshots" / "c0ffee")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loaded = AutoAudioTokenizer.from_pretrained(licensed)
    loaded.name_or_path = "someone/their-codec"
    assert licence(model_card(loaded)) == {"license": "cc-by-4.0"}


def test_the_licence_of_bundled_weights() -> None:
    for name, folder in auto.bundled().items():
        stated = licence((folder / "README.md").read_text())
        assert stated
        assert licence(model_card(AutoAudioTokenizer.from_pretrained(name))) == stated


@pytest.mark.parametrize("name", auto.PUBLISHED)
def test_the_licence_of_published_weights(tok: AudioTokenizer, name: str) -> None:
    """Stated by their authors, or left out."""
    card = model_card(type(tok)(tok.codec, name=name))
    assert bool(licence(card)) == ("not stated" not in auto.PUBLISHED[name].licence)


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
