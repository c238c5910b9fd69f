"""Saving a tokenizer so that a fresh process loads the same one: files, fingerprint, model card, hub.

audio_tokenizer.json        class, layout, options, fingerprint, versions
config.json, model.safetensors      the codec, as transformers saves it
preprocessor_config.json    the feature extractor
README.md                   model card
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import audiotok
from audiotok.auto import FAMILIES, SUBFOLDER, TOKENIZER_FILE
from audiotok.errors import OutputNotWritableError

if TYPE_CHECKING:
    from audiotok.codec import AudioCodec
    from audiotok.tokenizer import AudioTokenizer

# Raised whenever the same weights and options would give other ids or audio.
CODE_VERSION = 1
# What a codec's config.json holds that changes neither.
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "return_dict", "problem_type")
OURS = (TOKENIZER_FILE, "config.json", "model.safetensors", "preprocessor_config.json", "README.md")
NEUTRAL = (".git", ".gitattributes", ".cache", "LICENSE", "CREDITS.md", "curves.png")

_weights_cache: dict[int, tuple[tuple[Any, ...], str]] = {}


def fingerprint(tokenizer: AudioTokenizer) -> str:
    """64 hex digits of everything that decides ids and audio: config, weights, dtype, layout, options."""
    config = {key: value for key, value in tokenizer.codec.config.to_dict().items() if key not in VOLATILE}
    content = {
        "code": CODE_VERSION,
        "config": config,
        "weights": weights_digest(tokenizer.codec),
        "layout": tokenizer.layout.name,
        "options": tokenizer.options,
        "feature_extractor": [tokenizer.feature_extractor.sampling_rate, tokenizer.feature_extractor.hop_length],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weights_digest(codec: AudioCodec) -> str:
    """Hash of all tensors by name, dtype, shape and bytes; kept until a tensor changes."""
    state = {name: t for name, t in codec.state_dict().items() if not name.endswith("num_batches_tracked")}
    key = tuple((t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in state.values())
    known = _weights_cache.get(id(codec))
    if known and known[0] == key:
        return known[1]
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    _weights_cache.clear()  # one codec at a time is the usual case; ids of dead objects return
    _weights_cache[id(codec)] = (key, digest.hexdigest())
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
    """Whether the folder is empty, or holds nothing but a tokenizer saved earlier."""
    names = {path.name for path in directory.iterdir()} - set(NEUTRAL)
    if not names:
        return True
    if not names <= {*OURS, "model.safetensors.index.json"} and not any(
        n.startswith("model-") for n in names - {*OURS}
    ):
        return False
    config = directory / "config.json"
    types = {family.model_type for family in FAMILIES.values()}
    return not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") in types


def _write(tokenizer: AudioTokenizer, target: Path, save_weights: bool) -> None:
    if save_weights:
        tokenizer.codec.save_pretrained(target)
    else:
        tokenizer.codec.config.save_pretrained(target)
    tokenizer.feature_extractor.save_pretrained(target)
    record = {
        "tokenizer_class": type(tokenizer).__name__,
        "layout": tokenizer.layout.name,
        "options": tokenizer.options,
        "name_or_path": tokenizer.name_or_path,
        "fingerprint": tokenizer.fingerprint,
        "audiotok_version": audiotok.__version__,
    }
    (target / TOKENIZER_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = target / "README.md"
    if not card.exists():
        card.write_text(model_card(tokenizer), encoding="utf-8")


def model_card(tokenizer: AudioTokenizer) -> str:
    """A README.md with the facts of the codec, and how to use it."""
    facts = tokenizer.codec.facts
    family = next(f for f in FAMILIES.values() if f.model_type == tokenizer.codec.config.model_type)
    rows = {
        "sampling rate": f"{facts.sampling_rate} Hz, {facts.channels} channel{'s' * (facts.channels > 1)}",
        "frames": f"{float(facts.frame_rate):g} a second (hop {facts.hop_length} samples)",
        "codebooks": ", ".join(f"{size:,}" for size in facts.codebook_sizes),
        "bits a second": f"{facts.bits_per_second():.0f}",
        "layout, ids a second": f"{tokenizer.layout.name}, {float(facts.ids_per_second(tokenizer.layout.name)):g}",
        "parameters": f"{tokenizer.codec.num_parameters():,}",
        "fingerprint": f"`{tokenizer.fingerprint}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        "---\nlibrary_name: audiotok\npipeline_tag: audio-to-audio\ntags:\n- audiotok\n- audio-codec\n"
        "- audio-tokenizer\n---\n\n"
        f"# {tokenizer.name_or_path or family.prefix} as an audio tokenizer\n\n{family.title} ({family.paper}).\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom audiotok import AutoAudioTokenizer\n\n"
        'tok = AutoAudioTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n'
        'enc = tok("speech.wav", return_tensors="pt")\n'
        "wave = tok.decode(enc.input_ids[0], length=enc.audio_lengths[0])\n```\n\n"
        "Training data, licence and figures: to be filled in by whoever publishes these weights.\n"
    )


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
