"""Saving a tokenizer so that a fresh process loads the same one: files, fingerprint, model card, hub.

audio_tokenizer.json        class, layout, options, fingerprint, versions
config.json, model.safetensors      the codec, as transformers saves it
preprocessor_config.json    the feature extractor
README.md                   model card
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import audiotok
from audiotok.auto import FAMILIES, PUBLISHED, SUBFOLDER, TOKENIZER_FILE, bundled
from audiotok.conversion import read_config
from audiotok.errors import AudioTokError, OutputNotWritableError

if TYPE_CHECKING:
    from audiotok.codec import AudioCodec
    from audiotok.tokenizer import AudioTokenizer

# Raised whenever the same weights and options would give other ids or audio.
CODE_VERSION = 1
OURS = (TOKENIZER_FILE, "config.json", "model.safetensors", "preprocessor_config.json", "README.md")
SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
LICENSE_KEYS = ("license", "license_name", "license_link")  # of a card's front matter
# What authors state of published weights (`Published.licence`), as the hub names it; what is not here is not known.
STATED_LICENSES = {"MIT, code and weights": "mit"}
NEUTRAL = (".git", ".gitattributes", ".cache", "LICENSE", "CREDITS.md", "curves.png")


def fingerprint(tokenizer: AudioTokenizer, weights: str | None = None) -> str:
    """64 hex digits of everything that decides ids and audio: config, weights, dtype, layout, options.

    Args:
        weights: their digest, if it was just computed.
    """
    return _fingerprint(tokenizer, tokenizer.layout.name, tokenizer.options, weights)


def _fingerprint(tokenizer: AudioTokenizer, layout: Any, options: Mapping[str, Any], weights: str | None = None) -> str:
    """What the fingerprint would be with this layout and these options."""
    config = tokenizer.codec.config
    keys = sorted(config.own_keys() - set(config.training_keys))
    content = {
        "code": CODE_VERSION,
        "model_type": config.model_type,
        "config": {key: getattr(config, key) for key in keys},
        "weights": weights or weights_digest(tokenizer.codec),
        "layout": layout,
        "options": {key: value for key, value in options.items() if value is not None},
        "feature_extractor": [tokenizer.feature_extractor.sampling_rate, tokenizer.feature_extractor.hop_length],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weights_digest(codec: AudioCodec) -> str:
    """Hash of all tensors by name, dtype, shape and bytes.

    Computed each time, a third of a second for 120 million parameters: a cache could not tell that a weight was
    changed through `.data`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        if name.endswith("num_batches_tracked"):  # counts training steps, changes nothing
            continue
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tokenizer(tokenizer: AudioTokenizer, directory: Path, save_weights: bool = True) -> None:
    """Write the tokenizer into `directory`, or into its subfolder `audio_tokenizer` where another model lies.

    A Trainer saves its language model and then its tokenizer into one folder: their config.json and weights must
    not meet.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        target = directory if _is_ours(directory) else directory / SUBFOLDER
        target.mkdir(exist_ok=True)
        _write(tokenizer, target, save_weights)
    except OSError as error:
        raise OutputNotWritableError(f"{directory} cannot be written: {error}.") from error


def _is_ours(directory: Path) -> bool:
    """Whether the folder holds nothing but (at most) a tokenizer saved earlier, and files of a repository."""
    names = {path.name for path in directory.iterdir()} - set(NEUTRAL)
    shards = {name for name in names if SHARD.fullmatch(name)}
    if not names <= {*OURS, *shards}:
        return False
    if names <= {"README.md"}:
        return True
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in {f.model_type for f in FAMILIES.values()}


def _write(tokenizer: AudioTokenizer, target: Path, save_weights: bool) -> None:
    if save_weights:
        tokenizer.codec.save_pretrained(target)
    else:
        for old in target.glob("model*.safetensors*"):
            old.unlink()  # weights of an earlier tokenizer must not pass for this one's
        tokenizer.codec.config.save_pretrained(target)
    tokenizer.feature_extractor.save_pretrained(target)
    record = {
        "tokenizer_class": type(tokenizer).__name__,
        "layout": tokenizer.layout.name,
        "options": tokenizer.options,
        "dtype": str(tokenizer.codec.dtype).removeprefix("torch."),
        "name_or_path": tokenizer.name_or_path,
        "fingerprint": tokenizer.fingerprint,
        "audiotok_version": audiotok.__version__,
    }
    (target / TOKENIZER_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = target / "README.md"
    if not card.exists():
        card.write_text(model_card(tokenizer), encoding="utf-8")


def model_card(tokenizer: AudioTokenizer) -> str:
    """A README.md with the facts of the codec, its licence where that is known, and how to use it."""
    from huggingface_hub import ModelCardData

    facts = tokenizer.codec.facts
    family = next(f for f in FAMILIES.values() if f.model_type == tokenizer.codec.config.model_type)
    latency = getattr(tokenizer.codec.config, "latency_ms", None)
    rows = {
        "sampling rate": f"{facts.sampling_rate} Hz, {facts.channels} channel{'s' * (facts.channels > 1)}",
        "frames": f"{float(facts.frame_rate):g} a second (hop {facts.hop_length} samples)",
        "codebooks": ", ".join(f"{size:,}" for size in facts.codebook_sizes),
        "bits a second": f"{facts.bits_per_second():.0f}",
        "layout, ids a second": f"{tokenizer.layout.name}, {float(facts.ids_per_second(tokenizer.layout.name)):g}",
        **({"latency": f"{latency:g} ms (causal)"} if latency is not None else {}),
        "parameters": f"{tokenizer.codec.num_parameters():,}",
        "fingerprint": f"`{tokenizer.fingerprint}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    licence = licence_of(tokenizer)
    tags = ["audiotok", "audio-codec", "audio-tokenizer"]
    matter = ModelCardData(library_name="audiotok", pipeline_tag="audio-to-audio", tags=tags, **licence)
    missing = "Training data and figures" if licence else "Training data, licence and figures"
    return (
        f"---\n{matter.to_yaml()}\n---\n\n"
        f"# {tokenizer.name_or_path or family.prefix} as an audio tokenizer\n\n{family.title} ({family.paper}).\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom audiotok import AutoAudioTokenizer\n\n"
        'tok = AutoAudioTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n'
        'enc = tok("speech.wav", return_tensors="pt")\n'
        "wave = tok.decode(enc.input_ids[0], length=enc.audio_lengths[0])\n```\n\n"
        f"{missing}: to be filled in by whoever publishes these weights.\n"
    )


def licence_of(tokenizer: AudioTokenizer) -> dict[str, Any]:
    """What is known of the licence of a tokenizer's weights, as front matter of a model card; empty if nothing is.

    It is what the card beside the weights says, as long as the tokenizer still has the weights of that folder (whoever
    trains them further decides for themselves), or what the authors of published weights state.
    """
    name = tokenizer.name_or_path
    folder = _loaded_from(name)
    if folder is not None and _has_weights_of(tokenizer, folder):
        matter = _front_matter(folder / "README.md")
        known = {key: matter[key] for key in LICENSE_KEYS if matter.get(key)}
        if "://" not in str(known.get("license_link")):  # to a file of that folder
            known.pop("license_link", None)
        return known
    if folder is None and name in PUBLISHED and PUBLISHED[name].licence in STATED_LICENSES:
        return {"license": STATED_LICENSES[PUBLISHED[name].licence]}
    return {}


def _loaded_from(name: str) -> Path | None:
    """The folder on this disk that a name stands for, in the order in which `from_pretrained` looks."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if os.path.isdir(name):
        nested = Path(name) / SUBFOLDER
        return nested if (nested / TOKENIZER_FILE).is_file() else Path(name)
    for full, folder in bundled().items():
        if name in (full, folder.name):
            return folder
    try:
        file = try_to_load_from_cache(name, TOKENIZER_FILE)
    except HFValidationError:  # no name of a repository
        return None
    return Path(file).parent if isinstance(file, str) else None


def _has_weights_of(tokenizer: AudioTokenizer, folder: Path) -> bool:
    """Whether the tokenizer is the one saved in `folder`, but for layout and options."""
    try:
        saved = read_config(folder / TOKENIZER_FILE)
    except (OSError, AudioTokError):  # the folder was changed since
        return False
    return saved.get("fingerprint") == _fingerprint(tokenizer, saved.get("layout"), saved.get("options") or {})


def _front_matter(card: Path) -> Mapping[str, Any]:
    """What stands between the --- of a model card; nothing where that is no card, or a damaged one."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def push_tokenizer(
    tokenizer: AudioTokenizer,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload audio tokenizer",
    create_pr: bool = False,
) -> str:
    """Upload what `save_tokenizer` writes; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)
