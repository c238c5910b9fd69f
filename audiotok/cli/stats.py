"""`audiotok stats`: what is in a tokenized corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from audiotok.cli import options as cli
from audiotok.cli.outputs import check_free, standard_output, whole_file
from audiotok.cli.reporting import Report, table

EXAMPLES = """\b
Examples:
  audiotok stats codes
  audiotok stats codes --page codes.html          one page of figures and plots, nothing beside it
  audiotok stats codes --json codes.json --page codes.png
  audiotok stats s3://bucket/codes --json - | jq .bits_per_second

\b
Bits a second count each id as log2 of the ids that the codec's default layout allows in its place; by entropy, as
often as each code comes. Neither loads the codec's weights.
"""

Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="A corpus that `audiotok tokenize` wrote: a folder or a URL.")
]
Split = Annotated[str | None, typer.Option(metavar="NAME", help="As in the names of shards. Default: all.")]
Unfinished = Annotated[
    bool, typer.Option("--allow-unfinished", help="Take what is there of a corpus whose run has not ended.")
]


def stats(
    corpus: Folder,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="The figures for machines; - is stdout.")
    ] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="The figures with plots: .html or .png.")] = None,
    split: Split = None,
    allow_unfinished: Unfinished = False,
    overwrite: cli.Overwrite = False,
    quiet: cli.Quiet = False,
) -> None:
    """Hours, codebook use, bits and ids a second of a corpus."""
    from audiotok.integrations import corpus_pages, corpus_stats

    to_stdout = json_file == "-"
    outputs = [page, None if to_stdout or json_file is None else Path(json_file)]
    for path in outputs:
        if path is not None:
            check_free(path, overwrite)
    if page is not None:
        corpus_pages.check_page(page.suffix)
    report = Report(quiet or to_stdout)
    with report.progress("counting", shares_terminal=to_stdout) as meter:
        found = corpus_stats.stats(
            corpus,
            split=split,
            allow_unfinished=allow_unfinished,
            watch=lambda done, total: meter.update(done, f"counting: {done:,} clips", total),
        )
        if page is not None:
            with whole_file(page, overwrite) as file:
                file.write(corpus_pages.page(found, page.suffix))
    data = (json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if to_stdout:
        standard_output().write(data)
    elif json_file is not None:
        with whole_file(Path(json_file), overwrite) as file:
            file.write(data)
    tables = corpus_pages.tables(found)
    report.result({}, *(table(heads, rows, "l" + "r" * (len(heads) - 1), title) for title, heads, rows in tables))
