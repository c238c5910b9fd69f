"""`audiotok push`: a finished corpus as a dataset of the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from audiotok.cli import options as cli
from audiotok.cli.reporting import Report, counted, table

MEGABYTE = 1e6
EXAMPLES = """\b
Examples:
  audiotok push codes owner/speech-codes --license cc-by-4.0 --dry-run     the card and the files, nothing is sent
  audiotok push codes owner/speech-codes --license cc-by-4.0 --private

\b
The license is that of the codes; that of the recordings has a say in it. Interrupted: the same command goes on.
What it needs to write: `hf auth login`, or the environment variable HF_TOKEN.
"""


def push(
    corpus: Annotated[str, typer.Argument(metavar="DIR", help="A finished corpus on this machine.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub; made if it is missing.")],
    license: Annotated[
        str, typer.Option("--license", metavar="NAME", help="As the hub names it: cc-by-4.0, cc0-1.0, other, unknown.")
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository. Default: the owner's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove shards that are only there, and replace the card.")
    ] = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Publish a finished corpus with a card."""
    from audiotok.integrations import corpus_card

    report = Report(quiet, as_json)
    with report.progress("counting") as meter:

        def watch(done: int, total: int) -> None:
            meter.update(done, "counting" if done < total else "uploading", total)

        if not dry_run:
            address = corpus_card.push(corpus, repo, license, private=private, overwrite=overwrite, watch=watch)
            report.result({"repo": repo, "address": address}, f"{corpus} is at {address}")
            return
        upload = corpus_card.prepare(corpus, repo, license, watch)
    rows = [[name, f"{size:,}"] for name, size in [*upload.files, (corpus_card.CARD, len(upload.card.encode()))]]
    summary = f"{repo}: {counted(len(rows), 'file')}, {upload.size / MEGABYTE:,.2f} MB; nothing was sent"
    report.result(upload.to_json(), upload.card, table(["file", "bytes"], rows, "lr"), summary)
