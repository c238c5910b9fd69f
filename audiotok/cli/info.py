"""`audiotok list` and `audiotok info`: which tokenizers there are, and the facts of one."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.loading import load_tokenizer
from audiotok.cli.reporting import Report, table

if TYPE_CHECKING:
    from audiotok.codec import AudioCodec
    from audiotok.facts import CodecFacts
    from audiotok.tokenizer import AudioTokenizer

CONTEXTS = (4096, 8192, 32768)
UNKNOWN_LICENCE = "not stated"
LIST_EXAMPLES = """\b
Examples:
  audiotok list
  audiotok list --json
"""
INFO_EXAMPLES = """\b
Examples:
  audiotok info audiotok/auv-mini
  audiotok info ./my-checkpoint --layout delay --json
  audiotok info audiotok/auv-mini --domain speech     the fingerprint with this option
"""


def list_names(as_json: cli.AsJson = False) -> None:
    """Bundled and published tokenizers, families of codecs."""
    from audiotok.auto import FAMILIES, PUBLISHED, bundled

    data = {
        "bundled": [{"name": name, "folder": str(folder)} for name, folder in bundled().items()],
        "published": [
            {"name": name, "family": entry.family, "licence": entry.licence} for name, entry in PUBLISHED.items()
        ],
        "families": [
            {"name": family.name, "title": family.title, "paper": family.paper} for family in FAMILIES.values()
        ],
    }
    tables = [
        table(list(rows[0]), [list(row.values()) for row in rows], title=title)
        for title, rows in (
            ("Bundled: no network needed", data["bundled"]),
            ("Published: fetched from the hub at first use", data["published"]),
            ("Families: folders and hub repositories of these load too", data["families"]),
        )
        if rows
    ]
    Report(as_json=as_json).result(data, *tables)


def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A bundled name, a folder, a hub repository or a published checkpoint.",
            autocompletion=cli.complete_tokenizer,
        ),
    ],
    layout: cli.Layout = None,
    domain: cli.Domain = None,
    option: cli.Options = None,
    device: cli.Device = None,
    as_json: cli.AsJson = False,
) -> None:
    """Facts of a tokenizer: rates, layouts, exactness, licence."""
    report = Report(as_json=as_json)
    with report.progress():
        tok = load_tokenizer(name, layout, device, cli.codec_options(option, domain, None, None))
        data = describe(tok)
    report.result(data, table(["", ""], _rows(data)), _layout_table(data["layouts"]))


def describe(tok: AudioTokenizer) -> dict[str, Any]:
    """Everything that `info` says, as JSON values."""
    from audiotok.auto import FAMILIES

    codec, facts = tok.codec, tok.codec.facts
    family = next(f for f in FAMILIES.values() if f.model_type == codec.config.model_type)
    bound = codec.margin_bound(codec.dtype, codec.device)
    return {
        "name": tok.name_or_path,
        "family": f"{family.title} ({family.paper})",
        "licence": licence_of(tok.name_or_path),
        "parameters": codec.num_parameters(),
        "sampling_rate": facts.sampling_rate,
        "output_sampling_rate": facts.output_sampling_rate,
        "channels": facts.channels,
        "hop_length": facts.hop_length,
        "frame_rate": float(facts.frame_rate),
        "codebook_sizes": list(facts.codebook_sizes),
        "vocab_size": tok.vocab_size,
        "ids_per_second": float(facts.ids_per_second("interleaved")),
        "bits_per_second": facts.bits_per_second(),
        "variable_depth": facts.variable_depth,
        "is_causal": facts.is_causal,
        "latency_ms": getattr(codec.config, "latency_ms", None),
        "margin_bound": bound if math.isfinite(bound) else None,
        "batch_equals_alone": _batch_exactness(bound, f"{codec.device.type} {codec.dtype}"),
        "windows_equal_whole": _window_exactness(codec),
        "window_flips": None if facts.receptive_field_samples is not None else list(map(asdict, codec.window_flips)),
        "decoded_windows_equal_whole": _reach(facts, facts.decoder_reach_samples),
        "layouts": [_layout_facts(tok.with_layout(name)) for name in _layout_names(tok)],
        "layout": tok.layout.name,
        "options": tok.options,
        "legal_options": list(codec.encode_options),
        "fingerprint": tok.fingerprint,
    }


def _rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """`describe` for people."""
    rate, books = f"{data['sampling_rate']:,} Hz", data["codebook_sizes"]
    if data["output_sampling_rate"] != data["sampling_rate"]:
        rate += f" in, {data['output_sampling_rate']:,} Hz out"
    same = f"{len(books)} of {books[0]:,} codes" if len(set(books)) == 1 else ", ".join(f"{size:,}" for size in books)
    most = "at most " if data["variable_depth"] else ""
    return [
        ("name", data["name"]),
        ("codec", data["family"]),
        ("licence", data["licence"]),
        ("parameters", f"{data['parameters']:,}"),
        ("audio", f"{rate}, {data['channels']} channel{'s' * (data['channels'] > 1)}"),
        ("frames", f"{data['frame_rate']:g} a second, {data['hop_length']} samples each"),
        ("codebooks", same),
        ("vocabulary", f"{data['vocab_size']:,} ids, the last 3 of them special"),
        ("ids a second", f"{most}{data['ids_per_second']:g}"),
        ("bits a second", f"{most}{data['bits_per_second']:,.0f}"),
        ("causal", _causality(data)),
        ("batch = alone", data["batch_equals_alone"]),
        ("windows = whole", data["windows_equal_whole"]),
        *_flip_rows(data["window_flips"]),
        ("  on decoding", data["decoded_windows_equal_whole"]),
        ("layout", data["layout"]),
        ("options", ", ".join(f"{k}={v}" for k, v in data["options"].items()) or "none set"),
        ("  it knows", ", ".join(data["legal_options"]) or "none"),
        ("fingerprint", data["fingerprint"]),
    ]


def _causality(data: dict[str, Any]) -> str:
    if not data["is_causal"]:
        return "no"
    latency = data["latency_ms"]
    return "yes" if latency is None else f"yes, samples come out {latency:g} ms after they went in"


def _layout_table(layouts: list[dict[str, Any]]) -> Any:
    rows = [
        [
            row["layout"],
            str(row["streams"]),
            f"{row['positions_per_second']:g}",
            *(f"{seconds:,.1f} s" for seconds in row["seconds"].values()),
        ]
        for row in layouts
    ]
    columns = ["layout", "streams", "positions a second", *(f"in {size:,}" for size in CONTEXTS)]
    return table(columns, rows, "lrrrrr", "Audio that fits a language model's context")


def _batch_exactness(bound: float, where: str) -> str:
    if math.isinf(bound):
        return f"exact: no bound was measured on {where}, so each clip of a batch is encoded again alone"
    if bound == 0:
        return f"exact: each clip of a batch is computed by itself ({where})"
    return f"exact: certified, clips with a margin under {bound:g} are encoded again alone ({where})"


def _window_exactness(codec: AudioCodec) -> str:
    facts, reach = codec.facts, codec.facts.receptive_field_samples
    if reach is not None:
        return f"{_reach(facts, reach)}; not certified: another chunk_length_s may flip a near-tie"
    how_many = "these were measured" if codec.window_flips else "how many was not measured"
    change = "windows change codes, and another chunk_length_s changes other ones"
    return f"{_reach(facts, reach)}: {change} (not certified; {how_many})"


def _reach(facts: CodecFacts, reach: int | None) -> str:
    if reach is None:
        return "no: attends over the whole clip"
    return f"exact up to rounding: a frame depends on {reach / facts.sampling_rate:.3g} s on each side"


def _flip_rows(flips: list[dict[str, Any]] | None) -> list[tuple[str, str]]:
    """How many codes windows change, as its class states it; nothing where they change none (None)."""
    if flips is None:
        return []
    measured = [
        (
            f"  {flip['chunk_length_s']:g} s + {flip['context_s']:g} s a side",
            f"{100 * flip['share']:.3g} % of the codes differ ({flip['measured']})",
        )
        for flip in flips
    ]
    return measured or [("  measure it", "python -m audiotok.recipes.measure_windows NAME RECORDINGS")]


def _layout_names(tok: AudioTokenizer) -> tuple[str, ...]:
    from audiotok.layouts import layout_names

    return layout_names(tok.vocabulary, tok.codec.facts.codebook_strides, tok.codec.facts.variable_depth)


def _layout_facts(tok: AudioTokenizer) -> dict[str, Any]:
    """What its layout costs: positions of a language model's context per second, and seconds per context."""
    facts, layout = tok.codec.facts, tok.layout
    rate = float(facts.ids_per_second(layout.name))
    overhead = 0 if facts.variable_depth else layout.num_ids(0)  # positions of a clip of no frames
    return {
        "layout": layout.name,
        "streams": layout.num_streams,
        "positions_per_second": rate,
        "seconds": {str(size): (size - overhead) / rate for size in CONTEXTS},
    }


def licence_of(name: str) -> str:
    """What a checkpoint's card says of the licence of its weights, or what is known of a published one."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    from audiotok.auto import PUBLISHED, bundled

    if name in PUBLISHED:
        return PUBLISHED[name].licence
    by_name = bundled() | {folder.name: folder for folder in bundled().values()}
    if os.path.isdir(name) or name in by_name:  # in the order in which from_pretrained looks
        card: Any = (Path(name) if os.path.isdir(name) else by_name[name]) / "README.md"
    else:
        card = try_to_load_from_cache(name, "README.md")
    if not isinstance(card, str | os.PathLike) or not os.path.isfile(card):
        return UNKNOWN_LICENCE
    return ModelCard.load(card).data.get("license") or UNKNOWN_LICENCE
