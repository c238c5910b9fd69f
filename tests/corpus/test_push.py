"""What would be uploaded, and what is: the hub stands behind a fake of its client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from audiotok.errors import CodesError, OptionError, OutputExistsError, OutputNotWritableError
from audiotok.integrations.corpus import prepare, push, read
from corpus.after_fixtures import KINDS, Made, command, make_corpus

REPO = "me/speech-codes"


class Hub:
    """A repository as `HfApi` sees it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {".gitattributes": b""}
        self.calls: list[str] = []
        self.private: bool | None = None
        self.token: Any = None

    def __call__(self, token: Any = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo: str, *, private: bool | None, repo_type: str, exist_ok: bool) -> str:
        assert (repo, repo_type, exist_ok) == (REPO, "dataset", True)
        self.private = private
        self.calls.append("create_repo")
        return f"https://hub/datasets/{repo}"

    def list_repo_files(self, repo: str, *, repo_type: str) -> list[str]:
        return list(self.files)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        repo_type: str,
        allow_patterns: list[str],
        delete_patterns: list[str] | None,
        commit_message: str,
    ) -> None:
        assert (repo_id, repo_type) == (REPO, "dataset")
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = {str(path.relative_to(folder_path)): path for path in paths}
        chosen = set(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns))
        for name in huggingface_hub.utils.filter_repo_objects(list(self.files), allow_patterns=delete_patterns or []):
            del self.files[name]
        self.files |= {name: path.read_bytes() for name, path in names.items() if name in chosen}
        self.calls.append("upload_folder")

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, **options: Any) -> None:
        self.files[path_in_repo] = path_or_fileobj
        self.calls.append("upload_file")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = make_corpus(tmp_path / "codes", "apcodec")
    (made.folder / ".run").mkdir(exist_ok=True)
    (made.folder / ".run" / "rank-0.json").write_text("{}")
    (made.folder / "errors.jsonl").write_text('{"source": "/home/me/private.wav"}\n')
    (made.folder / "tokenizer").mkdir()
    (made.folder / "tokenizer" / "config.json").write_text("{}")
    return made


# What would be


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card(tmp_path: Path, kind: str) -> None:
    made = make_corpus(tmp_path / "codes", kind)
    card = prepare(made.folder, REPO, "cc-by-4.0").card
    matter = front_matter(card)
    assert matter["license"] == "cc-by-4.0"
    assert matter["size_categories"] == "n<1K"
    assert matter["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert f'corpus.read("hf://datasets/{REPO}", layout="' in card
    record = json.loads((made.folder / "audiotok.json").read_text())
    assert "a-name" in card and record["tokenizer"]["fingerprint"] in card
    assert "| hours |" in card and "| perplexity |" in card
    assert str(tmp_path) not in card
    for line in card.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_three_lines_of_the_card_read_a_corpus(made: Made) -> None:
    card = prepare(made.folder, REPO, "mit").card
    code = card.split("```python\n")[1].split("```")[0].replace(f"hf://datasets/{REPO}", str(made.folder))
    told: list[tuple] = []
    exec(compile(code, "card", "exec"), {"print": lambda *values: told.append(values)})
    assert [values[0] for values in told] == made.ids


def test_load_dataset_reads_the_front_matter(made: Made, tmp_path: Path) -> None:
    from datasets import load_dataset

    (made.folder / "README.md").write_text(prepare(made.folder, REPO, "mit").card)
    rows = load_dataset(str(made.folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == made.ids


def test_the_files(made: Made) -> None:
    upload = prepare(made.folder, REPO, "mit")
    shards = [f"data/train-{i:05d}-00000.parquet" for i in range(3)]
    assert [name for name, _ in upload.files] == ["tokenizer/config.json", *shards, "audiotok.json"]
    assert upload.size == sum((made.folder / name).stat().st_size for name, _ in upload.files)


def test_what_cannot_be_published(tmp_path: Path, made: Made, hub: Hub) -> None:
    unfinished = make_corpus(tmp_path / "unfinished", finished=False)
    for publish in (prepare, push):
        with pytest.raises(OptionError, match="is not finished"):
            publish(unfinished.folder, REPO, "mit")
        with pytest.raises(OptionError, match="The license is empty"):
            publish(made.folder, REPO, "")
        with pytest.raises(OptionError, match="is no name of a repository"):
            publish(made.folder, "me/a/b", "mit")
        with pytest.raises(CodesError, match="is no corpus"):
            publish(tmp_path, REPO, "mit")
    assert hub.calls == []


def test_a_corpus_elsewhere(made: Made) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(made.folder), "/published", recursive=True)
    with pytest.raises(OptionError, match="is not on this machine: copy it to a folder first"):
        prepare("memory://published", REPO, "mit")


# What is


def test_push(made: Made, hub: Hub, tmp_path: Path) -> None:
    address = push(made.folder, REPO, "mit", private=True, token="secret")
    assert address == f"https://hub/datasets/{REPO}"
    assert hub.calls == ["create_repo", "upload_folder", "upload_file"]
    assert (hub.private, hub.token) == (True, "secret")
    expected = {name for name, _ in prepare(made.folder, REPO, "mit").files} | {"README.md", ".gitattributes"}
    assert set(hub.files) == expected
    for name, data in hub.files.items():
        path = tmp_path / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert [row["id"] for row in read(tmp_path / "there")] == made.ids


def test_a_card_that_is_there_stays(made: Made, hub: Hub) -> None:
    hub.files["README.md"] = b"mine"
    push(made.folder, REPO, "mit")
    assert hub.files["README.md"] == b"mine"
    push(made.folder, REPO, "mit", overwrite=True)
    assert hub.files["README.md"] != b"mine"


def test_shards_of_another_corpus_are_not_mixed_in(made: Made, hub: Hub) -> None:
    other = {"data/train-00099-00000.parquet": b"other", "notes.txt": b"mine"}
    hub.files |= other
    with pytest.raises(OutputExistsError, match=r"holds 1 files in data/ .* \(data/train-00099"):
        push(made.folder, REPO, "mit")
    assert "upload_folder" not in hub.calls
    push(made.folder, REPO, "mit", overwrite=True)
    assert "data/train-00099-00000.parquet" not in hub.files
    assert hub.files["notes.txt"] == b"mine"


def no_network() -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    client_error = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    return client_error("no route")


@pytest.mark.parametrize("error", [lambda: OSError("broken pipe"), no_network])
def test_what_the_hub_says(made: Made, hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Callable) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error()

    monkeypatch.setattr(hub, "upload_folder", fail)
    with pytest.raises(OutputNotWritableError, match=r"me/speech-codes cannot be written .*`hf auth login`"):
        push(made.folder, REPO, "mit")


# The command


def test_a_dry_run_sends_nothing(made: Made, hub: Hub) -> None:
    shown = command("push", made.folder, REPO, "--license", "cc0-1.0", "--dry-run").stdout
    assert "license: cc0-1.0" in shown and "audiotok.json" in shown and "README.md" in shown
    assert "6 files" in shown and "nothing was sent" in shown
    said = json.loads(command("push", made.folder, REPO, "--license", "mit", "--dry-run", "--json").stdout)
    assert said["repo"] == REPO and len(said["files"]) == 5 and said["card"].startswith("---\n")
    assert hub.calls == []


def test_the_command(made: Made, hub: Hub) -> None:
    shown = command("push", made.folder, REPO, "--license", "mit", "--private").stdout
    assert f"https://hub/datasets/{REPO}" in shown
    assert hub.private is True
    assert command("push", made.folder, REPO, "--license", "mit", "-q").stdout == ""
    assert command("push", made.folder, REPO).exit_code == 2
