"""Tokenizers that commands work with, and the record that says which one made a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from audiotok.errors import CodesError, OptionError

if TYPE_CHECKING:
    from audiotok.tokenizer import AudioTokenizer

# Digits of a fingerprint that tell two apart for the eye.
_SHOWN = 12


def load_tokenizer(
    name: str, layout: str | None = None, device: str | None = None, options: dict[str, Any] | None = None
) -> AudioTokenizer:
    """`AutoAudioTokenizer.from_pretrained`, with a sentence for a device that is not there."""
    from audiotok import AutoAudioTokenizer

    _check_device(device)
    return AutoAudioTokenizer.from_pretrained(name, layout=layout, device=device, **(options or {}))


def _check_device(device: str | None) -> None:
    import numpy  # noqa: F401  first: torch would swallow a Ctrl-C while it loads NumPy, and fail in a strange way
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise OptionError(
            f"device={device!r} cannot be used here ({reason}): choose cpu, or a device that PyTorch finds on this "
            "machine."
        ) from error


@dataclass(frozen=True)
class Origin:
    """What made a file of codes or ids: everything that `from_pretrained` needs to make it again.

    Attributes:
        tokenizer: the name it was loaded by.
        layout, options: as it had them.
        fingerprint: of the tokenizer with these.
        codebook_sizes: entries of each codebook, whatever the layout.
        sampling_rate: of `audio_length`, Hz.
        audiotok_version: that wrote the file.
    """

    tokenizer: str
    layout: str
    options: dict[str, Any]
    fingerprint: str
    codebook_sizes: list[int]
    sampling_rate: int
    audiotok_version: str

    @classmethod
    def of(cls, tokenizer: AudioTokenizer) -> Origin:
        from audiotok import __version__

        return cls(
            tokenizer=tokenizer.name_or_path,
            layout=tokenizer.layout.name,
            options=tokenizer.options,
            fingerprint=tokenizer.fingerprint,
            codebook_sizes=list(tokenizer.codec.facts.codebook_sizes),
            sampling_rate=tokenizer.sampling_rate,
            audiotok_version=__version__,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, file: str) -> Origin:
        """The record in the header of `file`.

        Raises:
            CodesError: it is no such record.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise CodesError(
                f"The header of {file} is damaged ({error}): it must be a JSON object with the keys "
                f"{', '.join(field.name for field in fields(cls))}."
            ) from error


class TokenizerShelf:
    """Loads the tokenizer that decodes a file, once for many files.

    Args:
        name: as `--tokenizer` gave it; None for the one that each file names.
        layout: of ids that do not name theirs.
        device, options: as for `load_tokenizer`; the options of a file go under those given.
        force: decode what another tokenizer made.
    """

    def __init__(self, name: str | None, layout: str | None, device: str | None, force: bool) -> None:
        self.name, self.layout, self.device, self.force = name, layout, device, force
        self._loaded: dict[str, AudioTokenizer] = {}

    def tokenizer_for(self, origin: Origin | None, file: str) -> AudioTokenizer:
        """The tokenizer that made `file`, in the layout of the file.

        Raises:
            OptionError: neither the file nor the command says which tokenizer, or the layouts differ.
            CodesError: the tokenizer is another one than that of the file.
        """
        if origin is None:
            return self._tokenizer_of_nameless(file)
        if self.layout not in (None, origin.layout):
            raise OptionError(
                f"--layout {self.layout} was given, but {file} is in layout {origin.layout}: leave it out."
            )
        tokenizer = self._load(self.name or origin.tokenizer)
        try:
            same = type(tokenizer)(
                tokenizer.codec, tokenizer.feature_extractor, origin.layout, origin.options, tokenizer.name_or_path
            )
            found = same.fingerprint
        except OptionError:  # a layout or an option that this codec does not have
            same, found = tokenizer, tokenizer.fingerprint
        if found != origin.fingerprint and not self.force:
            raise CodesError(
                f"{file} was made by {origin.tokenizer} (fingerprint {origin.fingerprint[:_SHOWN]}...), not by "
                f"{tokenizer.name_or_path} as it is now (fingerprint {found[:_SHOWN]}...): name the right one with "
                "--tokenizer; --force decodes all the same, to other sounds."
            )
        return same

    def _tokenizer_of_nameless(self, file: str) -> AudioTokenizer:
        if self.name is None:
            raise OptionError(f"{file} does not say which tokenizer made it: name it with --tokenizer.")
        tokenizer = self._load(self.name)
        return tokenizer if self.layout is None else tokenizer.with_layout(self.layout)

    def _load(self, name: str) -> AudioTokenizer:
        if name not in self._loaded:
            self._loaded[name] = load_tokenizer(name, device=self.device)
        return self._loaded[name]
