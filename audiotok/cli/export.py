"""`audiotok export`: a tokenized corpus in the format of a trainer."""

from __future__ import annotations

from typing import Annotated

import typer

from audiotok.cli import options as cli
from audiotok.cli.reporting import Report, counted, table
from audiotok.cli.stats import Folder, Split, Unfinished

MEGABYTE = 1 << 20
EXAMPLES = """\b
Examples:
  audiotok export codes --format memmap --layout interleaved --output-dir ids
  audiotok export codes --format memmap --layout delay --output-dir ids             rows of one id a codebook
  audiotok export codes --format megatron --bos --eos --output-dir ids              --data-path ids/ids
  audiotok export codes --format webdataset --output-dir tars --shard-size 1024     codes, and all columns
  audiotok export codes --format arrow --window 4096 --columns text --output-dir set

\b
Formats:
  memmap      one flat file of ids and offsets of documents; for TrainingWindows, nanoGPT and NumPy
  megatron    .bin and .idx of Megatron-LM's indexed dataset
  webdataset  tars of one sample a clip: codes, or ids with --layout
  arrow       a folder for datasets.load_from_disk

\b
Each has an export.json that says which tokenizer and layout the ids are of. Nothing partial is left behind, whatever
stops the export. Documents come in the order of a hash of the clips' ids, so neighbours there have nothing in common.
"""


def export(
    corpus: Folder,
    format: Annotated[
        str, typer.Option("--format", "-f", metavar="NAME", help="memmap, megatron, webdataset or arrow.")
    ],
    output_dir: Annotated[
        str, typer.Option("--output-dir", "-o", metavar="DIR", help="A folder that does not exist yet.")
    ],
    layout: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Order of the ids. Default: the codec's own; for webdataset, codes."),
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="A start token before each clip.")] = False,
    eos: Annotated[bool, typer.Option("--eos", help="An end token behind each clip.")] = False,
    window: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut clips of more than N ids, on edges of frames. Default: whole clips."),
    ] = None,
    shuffle: Annotated[int | None, typer.Option(metavar="SEED", help="Another order of shards and clips.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="That go along (webdataset, arrow). Default: the source's.")
    ] = None,
    shard_size: Annotated[int, typer.Option(metavar="MB", help="Of a file, about (webdataset, arrow).")] = 512,
    split: Split = None,
    allow_unfinished: Unfinished = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Write a corpus for a trainer: memmap, Megatron, WebDataset, Arrow."""
    from audiotok.integrations import export_formats

    report = Report(quiet, as_json)
    with report.progress("exporting") as meter:
        sidecar = export_formats.export(
            corpus,
            format,
            output_dir,
            layout=layout,
            bos=bos,
            eos=eos,
            window=window,
            shuffle=shuffle,
            split=split,
            columns=None if columns is None else [name for name in columns.split(",") if name],
            shard_size=shard_size * MEGABYTE,
            overwrite=overwrite,
            allow_unfinished=allow_unfinished,
            watch=lambda done, total: meter.update(done, f"exporting: {done:,} clips", total),
        )
    rows = [[key.replace("_", " "), _shown(value)] for key, value in sidecar.items() if value is not None]
    report.result(sidecar | {"output": output_dir}, table(["", ""], rows, title=f"{output_dir}, as {format}"))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(one)}" for key, one in value.items() if one not in ({}, None))
    if isinstance(value, list) and len(value) > 4 and isinstance(value[0], str):
        return f"{counted(len(value), 'file')}, {value[0]} to {value[-1]}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
