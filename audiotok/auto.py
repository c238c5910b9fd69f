"""`AutoAudioTokenizer` and the table of families: a name, a folder or a hub repository → the right tokenizer.

Weights are read from safetensors, or from PyTorch files with `weights_only=True`; no code from a repository is ever
executed.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audiotok.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    OptionError,
    UnsafeCheckpointError,
)

if TYPE_CHECKING:
    import torch

    from audiotok.codec import AudioCodec
    from audiotok.tokenizer import AudioTokenizer

CHECKPOINTS = Path(__file__).parent / "checkpoints"
TOKENIZER_FILE = "audio_tokenizer.json"
# Where a tokenizer lies in a folder that holds another model (a Trainer's checkpoint).
SUBFOLDER = "audio_tokenizer"


@dataclass(frozen=True)
class Published:
    """A published checkpoint in its own format: files of a hub repository, and what is known of its licence.

    Attributes:
        family: which conversion reads it.
        files: of weights, in the order in which the conversion takes them.
        licence: what its authors state of the weights.
        config: the file that describes the model, where there is one.
    """

    family: str
    files: tuple[str, ...]
    licence: str
    config: str | None = None


@dataclass(frozen=True)
class Family:
    """Names of a family's classes; nothing is imported before one is used."""

    name: str
    model_type: str
    prefix: str
    title: str
    paper: str
    published: Mapping[str, Published] = field(default_factory=dict)

    def load(self, suffix: str) -> Any:
        """The class `<prefix><suffix>`, e.g. "Model" → AuvModel."""
        return getattr(importlib.import_module(f"audiotok.codecs.{self.name}"), self.prefix + suffix)

    def conversion(self) -> Any:
        return importlib.import_module(f"audiotok.codecs.{self.name}.conversion_{self.name}")


_UNKNOWN_LICENCE = "code MIT; licence of the weights not stated: ask its authors before redistributing"

FAMILIES: dict[str, Family] = {
    "auv": Family(
        name="auv",
        model_type="audiotok_auv",
        prefix="Auv",
        title="AUV: one nested codebook for speech, vocal, music and sound",
        paper="arXiv 2509.21968",
        published={
            "SWivid/AUV": Published("auv", ("auv.pt",), _UNKNOWN_LICENCE),
            "voidful/llm-codec": Published(
                "auv", ("llm-codec.pt",), "licence of the weights not stated: ask its authors"
            ),
        },
    ),
    "qincodec": Family(
        name="qincodec",
        model_type="audiotok_qincodec",
        prefix="QinCodec",
        title="QinCodec: a continuous autoencoder, ours or another codec's, with QINCo2 trained on its latents",
        paper="arXiv 2503.19597",
    ),
    "vrvq": Family(
        name="vrvq",
        model_type="audiotok_vrvq",
        prefix="Vrvq",
        title="VRVQ: a Descript Audio Codec that keeps as many codebooks a frame as the sound needs",
        paper="arXiv 2410.06016",
    ),
    "melcap": Family(
        name="melcap",
        model_type="audiotok_melcap",
        prefix="MelCap",
        title="MelCap: one codebook on a grid of mel rows and time columns, and a vocoder",
        paper="arXiv 2510.01903",
        published={
            "jingyi49/MelCap": Published(
                "melcap",
                (
                    "cp_8_vgg3/vae_00620000",
                    "logs96_decoder_ld/lightning_logs/version_0/checkpoints/last.ckpt",
                ),
                "MIT, code and weights",
                "logs96_decoder_ld/lightning_logs/version_0/config.yaml",
            ),
        },
    ),
    "apcodec": Family(
        name="apcodec",
        model_type="audiotok_apcodec",
        prefix="ApCodec",
        title="APCodec: amplitude and phase spectra coded side by side; causal for streaming",
        paper="arXiv 2402.10533",
    ),
}
PUBLISHED: dict[str, Published] = {
    repo: file for family in FAMILIES.values() for repo, file in family.published.items()
}


@cache
def register() -> None:
    """Teach transformers' Auto classes our codecs; done by itself at the first use of `AutoAudioTokenizer`."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

    for family in FAMILIES.values():
        config = family.load("Config")
        AutoConfig.register(family.model_type, config)
        AutoModel.register(config, family.load("Model"))
        AutoModelForAudioTokenization.register(config, family.load("Model"))
        AutoFeatureExtractor.register(config, family.load("FeatureExtractor"))


def bundled() -> dict[str, Path]:
    """Names and folders of the checkpoints that come with the package."""
    return {f"audiotok/{folder.parent.name}": folder.parent for folder in sorted(CHECKPOINTS.glob("*/config.json"))}


class AutoAudioTokenizer:
    """Makes the tokenizer of any checkpoint; not instantiated itself."""

    def __init__(self) -> None:
        raise OptionError("AutoAudioTokenizer is not instantiated: call AutoAudioTokenizer.from_pretrained(name).")

    @staticmethod
    def from_pretrained(
        name: str | os.PathLike,
        *,
        layout: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> AudioTokenizer:
        """Load a tokenizer.

        Args:
            name: a bundled name ("audiotok/auv-mini"), a folder, a hub repository, or a published checkpoint in
                its own format ("SWivid/AUV").
            layout: of ids; None for the one saved, or the codec's default.
            device: where the codec runs.
            dtype: what the codec computes in; None for the one the tokenizer was saved with, which is float32 unless
                another was asked for. Other dtypes change codes and are part of the fingerprint.
            revision, cache_dir, token, local_files_only: of the hub, as in transformers.
            options: defaults of what changes ids (`domain=`, `chunk_length_s=`, ...); saved with the tokenizer.

        Raises:
            CheckpointNotFoundError: no such name, here or in the hub cache.
            CheckpointError: what lies there does not fit, or would need code of its own.
        """
        register()
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        if (folder := _resolve(str(name), hub)) is None:
            published = PUBLISHED[str(name)]
            family = FAMILIES[published.family]
            files = [_from_hub(str(name), hub, file) for file in published.files]
            config = None if published.config is None else _from_hub(str(name), hub, published.config)
            codec = load_published(family, files, config).to(_dtype(dtype))
            tokenizer = family.load("AudioTokenizer")(codec, None, layout, options, str(name))
        else:
            tokenizer = _load_folder(folder, str(name), layout, dtype, options)
        return tokenizer if device is None else _to_device(tokenizer, device)


def load_published(family: Family, files: list[Path], config_file: Path | None) -> AudioCodec:
    """A codec in float32 from weight files in the published format, through the family's strict key map."""
    import torch

    config, state = family.conversion().convert(files, config_file)
    with torch.device("meta"):
        model = family.load("Model")(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _resolve(name: str, hub: dict[str, Any]) -> Path | None:
    """The folder on this disk that a name stands for; None for a checkpoint in its published format."""
    if os.path.isdir(name):
        nested = Path(name) / SUBFOLDER
        return nested if (nested / TOKENIZER_FILE).is_file() else Path(name)
    if os.path.exists(name):
        raise CheckpointNotFoundError(
            f"{name} is a file: give the folder of a checkpoint, or turn published weights into one with "
            "`audiotok convert`."
        )
    for full, folder in bundled().items():
        if name in (full, folder.name):
            return folder
    if name in PUBLISHED:
        return None
    known = [*bundled(), *PUBLISHED]
    if name.count("/") != 1 or name.startswith(("/", ".", "audiotok/")):
        raise CheckpointNotFoundError(
            f"There is no folder and no checkpoint {name!r}.{_suggestion(name)} Known names: "
            f"{', '.join(known)}; or give a folder or a hub repository (owner/name)."
        )
    return _from_hub(name, hub, None)


def _from_hub(repo: str, hub: dict[str, Any], file: str | None) -> Path:
    """A file of a hub repository, or a snapshot of its configs and safetensors, from the cache where it is there."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, **hub))
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors", "README.md"], **hub))
    except LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repo} is not in the hub cache and could not be fetched (no network, or offline mode). Fetch it once "
            f"with `hf download {repo}` where there is a network.{_suggestion(repo)}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointNotFoundError(
            f"{repo} could not be fetched from the hub: {str(error).splitlines()[0]}.{_suggestion(repo)}"
        ) from error


def _load_folder(
    folder: Path, name: str, layout: str | None, dtype: str | torch.dtype | None, options: dict[str, Any]
) -> AudioTokenizer:
    from safetensors import SafetensorError

    from audiotok.conversion import read_config

    family = _family_of(folder)
    saved = read_config(folder / TOKENIZER_FILE) if (folder / TOKENIZER_FILE).is_file() else {}
    if not any(folder.glob("*.safetensors")):
        raise CheckpointNotFoundError(
            f"{folder} has a configuration but no weights (*.safetensors): load the tokenizer that it was saved "
            f"from ({saved.get('name_or_path') or 'unknown'}), or save it again with its weights."
        )
    try:
        codec = family.load("Model").from_pretrained(
            folder, dtype=_dtype(dtype or saved.get("dtype")), use_safetensors=True, local_files_only=True
        )
    except SafetensorError as error:
        raise CheckpointError(f"The safetensors files in {folder} are damaged: {error}. Fetch them again.") from error
    extractor = None
    if (folder / "preprocessor_config.json").is_file():
        read_config(folder / "preprocessor_config.json")  # a damaged file is named
        extractor = family.load("FeatureExtractor").from_pretrained(folder, local_files_only=True)
    return family.load("AudioTokenizer")(
        codec, extractor, layout or saved.get("layout"), {**saved.get("options", {}), **options}, name
    )


def _family_of(folder: Path) -> Family:
    from audiotok.conversion import read_config

    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{folder} holds no config.json: give the folder that save_pretrained or `audiotok convert` wrote."
        )
    config = read_config(path)
    for family in FAMILIES.values():
        if config.get("model_type") == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    if "auto_map" in config:
        raise UnsafeCheckpointError(
            f"{folder} needs code of its own ({', '.join(map(str, config['auto_map'].values()))}), which audiotok "
            f"never executes. Model types it knows: {known}."
        )
    raise CheckpointError(f"{path} is of model type {json.dumps(config.get('model_type'))}: audiotok knows {known}.")


def _to_device(tokenizer: AudioTokenizer, device: str | torch.device) -> AudioTokenizer:
    try:
        return tokenizer.to(device)
    except (RuntimeError, AssertionError) as error:
        import torch

        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise OptionError(
            f"device={str(device)!r} is not to be had here: choose one of {', '.join(here)} "
            f'("cuda" needs a GPU; {str(error).splitlines()[0]}).'
        ) from error


def _suggestion(name: str) -> str:
    """` Did you mean ...?`: the known name nearest to `name`, by the whole or by its last part, in any case."""
    known = {known.lower(): known for known in [*bundled(), *PUBLISHED]}
    known |= {key.rpartition("/")[2]: value for key, value in known.items()}
    near = difflib.get_close_matches(name.lower(), known, n=1) or difflib.get_close_matches(
        name.lower().rpartition("/")[2], known, n=1
    )
    return f' Did you mean "{known[near[0]]}"?' if near and known[near[0]] != name else ""


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype is None:
        return torch.float32
    if dtype in names.values():
        return dtype  # ty: ignore[invalid-explicit-return]
    if dtype in names:
        return names[str(dtype)]
    raise OptionError(f"dtype={dtype!r} is not legal: choose one of {', '.join(names)}.")
