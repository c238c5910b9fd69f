"""`AutoAudioTokenizer`: bundled names, folders, the hub's cache, published checkpoints, and what it refuses."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.codecs_table import clip, new_codec, shared_codec, tokenizer_of
from conformance.helpers import refused
from huggingface_hub import constants
from safetensors.numpy import load_file

from audiotok import AutoAudioTokenizer, AuvAudioTokenizer, auto
from audiotok.conversion import read_weights
from audiotok.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    OptionError,
    UnsafeCheckpointError,
)
from audiotok.tokenizer import AudioTokenizer

RATE = 16_000
WAVE = clip(shared_codec("auv").facts, 1000)
EVIL = "import pathlib; pathlib.Path('{marker}').write_text('code was executed')"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1, which is read when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tok() -> AudioTokenizer:
    return tokenizer_of(shared_codec("auv"))


@pytest.fixture(scope="module")
def saved(tok: AudioTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by `save_pretrained`: copy it before you change it."""
    folder = tmp_path_factory.mktemp("saved") / "auv"
    tok.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder."""
    return Path(shutil.copytree(saved, tmp_path / "auv"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cache_of(cache: Path, repo: str, files: dict[str, Path], commit: str = "c0ffee" * 6 + "beef") -> Path:
    """Lay files out as the hub's cache does: blobs, a snapshot of links, a ref; returns the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, (name, source) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:064x}"
        os.link(source, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


# Bundled names


@pytest.mark.skipif(not auto.bundled(), reason="no bundled checkpoint yet")
def test_bundled_names(offline: None) -> None:
    """Also by the last part of the name alone, without a network, wherever the process stands."""
    for name, where in auto.bundled().items():
        tok = AutoAudioTokenizer.from_pretrained(name)
        assert name == f"audiotok/{where.name}"
        assert tok.name_or_path == name
        enc = tok(clip(tok.codec.facts, tok.sampling_rate), tok.sampling_rate)
        audio = tok.decode(enc.input_ids, enc.audio_lengths)
        assert audio.shape == (tok.codec.facts.channels, tok.codec.facts.output_length(enc.audio_lengths))
        assert AutoAudioTokenizer.from_pretrained(where.name).fingerprint == tok.fingerprint
        record = json.loads((where / "audio_tokenizer.json").read_text())
        assert record["fingerprint"] == tok.fingerprint


@pytest.mark.skipif(not auto.bundled(), reason="no bundled checkpoint yet")
def test_nearly_bundled_names(offline: None) -> None:
    name = next(iter(auto.bundled()))
    for near in (name[:-1], name.replace("audiotok/", "audiotok/x"), name.removeprefix("audiotok/")[:-1]):
        with refused(CheckpointNotFoundError, repr(near), f'Did you mean "{name}"?', "SWivid/AUV", "folder"):
            AutoAudioTokenizer.from_pretrained(near)


# Folders


def test_a_folder(tok: AudioTokenizer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    for name in (saved, str(saved), "auv", f"{saved}/"):
        loaded = AutoAudioTokenizer.from_pretrained(name)
        assert type(loaded) is AuvAudioTokenizer
        assert loaded.fingerprint == tok.fingerprint
        assert loaded(WAVE, RATE).input_ids == tok(WAVE, RATE).input_ids


def test_a_folder_before_any_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the disk is meant, even where a published checkpoint has the same name."""
    shutil.copytree(saved, tmp_path / "SWivid" / "AUV")
    monkeypatch.chdir(tmp_path)
    assert AutoAudioTokenizer.from_pretrained("SWivid/AUV").codec.config.hidden_size == 48


def test_options_become_defaults_and_are_saved(saved: Path, tmp_path: Path) -> None:
    given = {"domain": "speech", "chunk_length_s": 20.0}
    loaded = AutoAudioTokenizer.from_pretrained(saved, layout="delay", **given)
    assert (loaded.layout.name, loaded.options) == ("delay", given)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoAudioTokenizer.from_pretrained(tmp_path / "again")
    assert (again.layout.name, again.options) == ("delay", given)
    assert again.fingerprint == loaded.fingerprint
    other = AutoAudioTokenizer.from_pretrained(tmp_path / "again", layout="interleaved", domain="other")
    assert (other.layout.name, other.options) == ("interleaved", {**given, "domain": "other"})
    none = AutoAudioTokenizer.from_pretrained(tmp_path / "again", domain=None, chunk_length_s=None)
    assert none(WAVE, RATE).input_ids == AutoAudioTokenizer.from_pretrained(saved, layout="delay")(WAVE, RATE).input_ids


def test_precision_is_float32_unless_asked_otherwise(folder: Path) -> None:
    new_codec("auv").to(torch.bfloat16).save_pretrained(folder)
    assert AutoAudioTokenizer.from_pretrained(folder).codec.dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        loaded = AutoAudioTokenizer.from_pretrained(folder, dtype=dtype, device="cpu")
        assert loaded.codec.dtype == torch.bfloat16
        assert len(loaded(WAVE, RATE).input_ids) == 32


def test_a_dtype_that_was_asked_for_is_saved_with_the_tokenizer(saved: Path, tmp_path: Path) -> None:
    """It changes ids, as a layout does: what is loaded again must be the same tokenizer."""
    coarse = AutoAudioTokenizer.from_pretrained(saved, dtype="bfloat16")
    coarse.save_pretrained(tmp_path / "coarse")
    again = AutoAudioTokenizer.from_pretrained(tmp_path / "coarse")
    assert again.codec.dtype == torch.bfloat16
    assert again.fingerprint == coarse.fingerprint
    assert AutoAudioTokenizer.from_pretrained(tmp_path / "coarse", dtype="float32").codec.dtype == torch.float32


def test_only_weights_and_config_are_needed(folder: Path, tok: AudioTokenizer) -> None:
    (folder / "audio_tokenizer.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    assert AutoAudioTokenizer.from_pretrained(folder).fingerprint == tok.fingerprint


def test_the_named_class_loads_its_own_family(saved: Path) -> None:
    class OtherAudioTokenizer(AudioTokenizer): ...

    assert type(AuvAudioTokenizer.from_pretrained(saved)) is AuvAudioTokenizer
    assert type(AudioTokenizer.from_pretrained(saved)) is AuvAudioTokenizer
    with refused(OptionError, saved, "AuvAudioTokenizer", "OtherAudioTokenizer", "AutoAudioTokenizer"):
        OtherAudioTokenizer.from_pretrained(saved)


def test_it_is_no_object() -> None:
    with refused(OptionError, "AutoAudioTokenizer.from_pretrained(name)"):
        AutoAudioTokenizer()


# The hub's cache


def test_a_repository_in_the_cache(offline: None, saved: Path, tok: AudioTokenizer, tmp_path: Path) -> None:
    snapshot = cache_of(tmp_path, "someone/their-codec", {path.name: path for path in saved.iterdir()})
    loaded = AutoAudioTokenizer.from_pretrained("someone/their-codec", cache_dir=tmp_path)
    assert loaded.name_or_path == "someone/their-codec"
    assert loaded.fingerprint == tok.fingerprint
    by_commit = AutoAudioTokenizer.from_pretrained(
        "someone/their-codec", cache_dir=tmp_path, revision=snapshot.name, local_files_only=True
    )
    assert by_commit.fingerprint == tok.fingerprint
    with refused(CheckpointNotFoundError, "someone/their-codec", "not in the hub cache"):
        AutoAudioTokenizer.from_pretrained("someone/their-codec", cache_dir=tmp_path, revision="v2")


@pytest.mark.parametrize(
    "name, words",
    [
        ("SWivid/AVU", ['Did you mean "SWivid/AUV"?', "hf download"]),
        ("swivid/auv", ['Did you mean "SWivid/AUV"?']),
        ("nobody/nothing", ["nobody/nothing", "not in the hub cache", "no network", "hf download nobody/nothing"]),
        ("SWivid/AUV", ["SWivid/AUV", "hf download SWivid/AUV"]),
        ("a/b/c", ["'a/b/c'", "SWivid/AUV", "owner/name"]),
        ("", ["''", "owner/name"]),
        ("./missing", ["./missing", "folder"]),
        ("/no/such/folder", ["/no/such/folder", "folder"]),
        ("bad name/with space", ["bad name/with space", "alphanumeric"]),
        ("x" * 300 + "/y", ["96"]),
    ],
)
def test_names_that_lead_nowhere(offline: None, tmp_path: Path, name: str, words: list[str]) -> None:
    with refused(CheckpointNotFoundError, *words) as _, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        AutoAudioTokenizer.from_pretrained(name, cache_dir=tmp_path / "cache")


def test_a_right_name_is_not_suggested_for_itself(offline: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        AutoAudioTokenizer.from_pretrained("SWivid/AUV", cache_dir=tmp_path)
    assert "Did you mean" not in str(caught.value)


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """A hub that knows no repository."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["nobody/nothing", "voidful/llm-codec"])
def test_a_hub_without_that_repository(empty_hub: None, tmp_path: Path, name: str) -> None:
    with refused(CheckpointNotFoundError, name, "404") as _, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        AutoAudioTokenizer.from_pretrained(name, cache_dir=tmp_path / "cache")


# Published checkpoints, in their own format. They have no config: only the full size will do.


@pytest.fixture(scope="module")
def published_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`auv.pt` as it is published (491 MB), with weights drawn by the recipe of the parity vectors."""
    spec = importlib.util.spec_from_file_location("recipe", shared / "golden" / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    weights = recipe.load(shared / "golden" / "auv" / "full" / "recipe.json")
    path = tmp_path_factory.mktemp("published") / "auv.pt"
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("repo, file", [("SWivid/AUV", "auv.pt"), ("voidful/llm-codec", "llm-codec.pt")])
def test_published_checkpoints(
    offline: None, shared: Path, published_file: Path, tmp_path: Path, repo: str, file: str
) -> None:
    cache_of(tmp_path, repo, {file: published_file})
    tok = AutoAudioTokenizer.from_pretrained(repo, cache_dir=tmp_path)
    assert (type(tok), tok.name_or_path, tok.vocab_size) == (AuvAudioTokenizer, repo, 20_483)
    vectors = load_file(shared / "golden" / "auv" / "full" / "vectors.safetensors")
    waves = torch.from_numpy(vectors["input"])
    with torch.inference_mode():
        output = tok.codec.encode(waves[:, None])
        audio = tok.codec.decode(output.audio_codes)
    np.testing.assert_array_equal(output.audio_codes.numpy(), vectors["codes"].transpose(1, 0, 2))
    np.testing.assert_allclose(audio.numpy(), vectors["audio_from_codes"], rtol=0, atol=2e-5)
    enc = tok(waves[0].numpy(), RATE)
    assert tok.decode(enc.input_ids, enc.audio_lengths).shape == (1, waves.shape[-1])


# Folders and files that are refused


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with refused(CheckpointNotFoundError, folder / "config.json", "is a file", "folder", "audiotok convert"):
        AutoAudioTokenizer.from_pretrained(folder / "config.json")


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(shared_codec("auv").state_dict(), folder / "pytorch_model.bin")
    with refused(CheckpointNotFoundError, folder, "no weights", "*.safetensors", "a-name"):
        AutoAudioTokenizer.from_pretrained(folder)


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with refused(CheckpointNotFoundError, folder, "no config.json", "audiotok convert"):
        AutoAudioTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["encodec", "audiotok_avu", None])
def test_a_foreign_model_type(folder: Path, model_type: str | None) -> None:
    change_json(folder / "config.json", model_type=model_type)
    with refused(CheckpointError, folder / "config.json", json.dumps(model_type), "audiotok_auv"):
        AutoAudioTokenizer.from_pretrained(folder)


def damage_json(path: Path) -> None:
    path.write_text("{")


def cut_weights(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "file, damage, error",
    [
        ("config.json", damage_json, ConfigError),
        ("audio_tokenizer.json", damage_json, ConfigError),
        ("preprocessor_config.json", damage_json, ConfigError),
        ("safetensors", cut_weights, CheckpointError),
        ("safetensors", empty, CheckpointError),
    ],
)
def test_damaged_files(folder: Path, file: str, damage: Callable[[Path], None], error: type[Exception]) -> None:
    damage(folder / file if file.endswith(".json") else folder / "model.safetensors")
    with refused(error, file):
        AutoAudioTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layout": "delya"}, ["delya", 'Did you mean "delay"?']),
        ({"domian": "speech"}, ["domian", 'Did you mean "domain"?']),
        ({"domain": "speeech"}, ["speeech", 'Did you mean "speech"?']),
        ({"chunk_length_s": -3}, ["chunk_length_s=-3", "positive"]),
        ({"dtype": "float31"}, ["float31", "float32, bfloat16, float16"]),
        ({"dtype": torch.int8}, ["int8", "float32, bfloat16, float16"]),
        ({"device": "gpu"}, ["gpu", "cpu", "cuda"]),
        ({"device": "cuda:99"}, ["cuda:99", "cpu"]),
    ],
)
def test_options_are_checked_on_loading(saved: Path, options: dict[str, Any], words: list[str]) -> None:
    """Not at the first recording, hours later on another machine."""
    with refused(OptionError, *words):
        AutoAudioTokenizer.from_pretrained(saved, **options)


# No code from a checkpoint is ever executed


def test_a_checkpoint_that_needs_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "modeling_evil.py").write_text(EVIL.format(marker=marker))
    change_json(folder / "config.json", model_type="evil", auto_map={"AutoModel": "modeling_evil.Evil"})
    with refused(UnsafeCheckpointError, folder, "modeling_evil.Evil", "never executes", "audiotok_auv"):
        AutoAudioTokenizer.from_pretrained(folder)
    assert not marker.exists()


def test_code_beside_a_checkpoint_of_ours_is_not_read(folder: Path, tmp_path: Path, tok: AudioTokenizer) -> None:
    """An auto_map in a config of our own type is nothing to us."""
    marker = tmp_path / "marker"
    (folder / "modeling_evil.py").write_text(EVIL.format(marker=marker))
    change_json(folder / "config.json", auto_map={"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.C"})
    change_json(folder / "preprocessor_config.json", auto_map={"AutoFeatureExtractor": "modeling_evil.E"})
    assert AutoAudioTokenizer.from_pretrained(folder)(WAVE, RATE).input_ids == tok(WAVE, RATE).input_ids
    assert not marker.exists()


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (EVIL.format(marker=self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, legacy: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "auv.pt"
    torch.save({"weight": torch.zeros(3), "x": Evil(marker)}, path, _use_new_zipfile_serialization=not legacy)
    with refused(UnsafeCheckpointError, path, "execute its code", "safetensors"):
        read_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle would have run"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weight_files_that_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    with refused(CheckpointNotFoundError, tmp_path / f"none{suffix}"):
        read_weights(tmp_path / f"none{suffix}")
    damaged = tmp_path / f"damaged{suffix}"
    for content in (b"", b"no weights at all", bytes(1000)):
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"damaged{suffix}"):
            read_weights(damaged)


def test_a_pickle_of_something_else_than_tensors(tmp_path: Path) -> None:
    for content in ([torch.zeros(3)], {"a": {"b": torch.zeros(3)}}, {"epoch": 3}):
        torch.save(content, tmp_path / "x.pt")
        with refused(CheckpointError, tmp_path / "x.pt", "flat state dict"):
            read_weights(tmp_path / "x.pt")
