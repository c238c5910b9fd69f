"""Arguments and options that several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from audiotok.errors import OptionError

DEFAULT_TOKENIZER = "audiotok/auv-mini"


def complete_tokenizer(incomplete: str) -> list[str]:
    """Names of bundled and published checkpoints, for the shell."""
    from audiotok.auto import PUBLISHED, bundled

    return [name for name in (*bundled(), *PUBLISHED) if name.startswith(incomplete)]


def complete_family(incomplete: str) -> list[str]:
    """Names of codec families, for the shell."""
    from audiotok.auto import FAMILIES

    return [name for name in FAMILIES if name.startswith(incomplete)]


Tokenizer = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        "-t",
        metavar="NAME",
        help="A bundled name, a folder, a hub repository or a published checkpoint.",
        autocompletion=complete_tokenizer,
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Order of the ids; `audiotok info NAME` says which fit. Default: as saved."),
]
Domain = Annotated[
    str | None, typer.Option(metavar="NAME", help="Short for --option domain=NAME, where codecs have it.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the codec (see `audiotok info`), as from_pretrained takes it; may be repeated.",
    ),
]
ChunkLength = Annotated[
    float | None,
    typer.Option("--chunk-length-s", metavar="SECONDS", help="Work window by window. Default: only where needed."),
]
Context = Annotated[
    float | None, typer.Option("--context-s", metavar="SECONDS", help="Of audio on each side of a window.")
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. Default: cpu.")]
Downmix = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="For recordings with other channels than the codec: mean, a channel's index from 0, or repeat. "
        "Default: refuse them.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on the terminal but errors.")]


def codec_options(
    given: list[str] | None, domain: str | None, chunk_length_s: float | None, context_s: float | None
) -> dict[str, Any]:
    """`--option` and its short forms as keywords of `AutoAudioTokenizer.from_pretrained`.

    Raises:
        OptionError: not `key=value`, a key given twice, or one that has a flag of its own.
    """
    options = {"domain": domain, "chunk_length_s": chunk_length_s, "context_s": context_s}
    options = {key: value for key, value in options.items() if value is not None}
    for item in given or []:
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise OptionError(f"--option {item!r} is not legal: write key=value, such as --option domain=speech.")
        if key in ("layout", "device"):
            raise OptionError(f"--option {item!r} has a flag of its own: write --{key} {value}.")
        if key in options:
            raise OptionError(f"The option {key} is given twice: leave one of them out.")
        options[key] = _parse(value)
    return options


def _parse(value: str) -> Any:
    """Numbers, true, false, null and lists as JSON writes them; anything else is a string."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def parse_downmix(value: str | None) -> Any:
    """`--downmix` as `load_audio` takes it: an index becomes a number."""
    return int(value) if value is not None and value.isdecimal() else value
