"""`audiotok stats`: what is in a tokenized corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audiotok.cli import options as cli
from audiotok.cli.outputs import check_free, whole_file
from audiotok.cli.reporting import Report, table

EXAMPLES = """\b
Examples:
  audiotok stats codes
  audiotok stats codes --page codes.html          one page of figures and plots, nothing beside it
  audiotok stats codes --page codes.png
  audiotok stats s3://bucket/codes --json | jq .bits_per_second

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
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="The figures with plots: .html or .png.")] = None,
    split: Split = None,
    allow_unfinished: Unfinished = False,
    overwrite: cli.Overwrite = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Hours, codebook use, bits and ids a second of a corpus."""
    from audiotok.integrations import corpus_pages, corpus_stats

    if page is not None:
        check_free(page, overwrite)
        corpus_pages.check_page(page.suffix)
    report = Report(quiet, as_json)
    with report.progress("counting") as meter:
        found = corpus_stats.stats(
            corpus,
            split=split,
            allow_unfinished=allow_unfinished,
            watch=lambda done, total: meter.update(done, f"counting: {done:,} clips", total),
        )
        if page is not None:
            with whole_file(page, overwrite) as file:
                file.write(corpus_pages.page(found, page.suffix))
    tables = corpus_pages.tables(found)
    report.result(
        found.to_json(), *(table(heads, rows, "l" + "r" * (len(heads) - 1), title) for title, heads, rows in tables)
    )
