"""`audiotok verify`: whether a corpus is what it says."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.loading import load_tokenizer
from audiotok.cli.reporting import Meter, Report, complain, counted
from audiotok.errors import CodesError

SHOWN = 20  # problems on the terminal; JSON has them all
EXAMPLES = """\b
Examples:
  audiotok verify codes
  audiotok verify codes --sample 100 --seed 1         another sample
  audiotok verify codes --sample 0                    no model, no recordings
  audiotok verify s3://bucket/codes --source recordings/ --model my-codec/

\b
Reads every shard: checksums, counts, ids, and whether the codes of each clip are as many as its samples give. Then it
encodes some clips again, and compares. The exit code is 4 where anything is not as it should be.
"""


def verify(
    corpus: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder or URL that `audiotok tokenize` wrote.", show_default=False)
    ],
    sample: Annotated[int, typer.Option(metavar="N", min=0, help="Clips that are encoded again.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Which clips.")] = 0,
    source: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Where the recordings are now. Default: where they were.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="Where the tokenizer is now. Default: its name.")
    ] = None,
    device: cli.Device = None,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Check a corpus, and encode some of it again."""
    from audiotok.integrations.corpus_checks import check_shards, source_of
    from audiotok.integrations.corpus_reading import Corpus
    from audiotok.integrations.sources import open_source

    report = Report(quiet, as_json)
    found = Corpus(corpus, allow_unfinished=True)
    with report.progress("reading shards") as meter:
        findings = check_shards(
            found, sample, seed, lambda done, total: meter.update(done, f"reading shards: {done} of {total}", total)
        )
        again: list[dict[str, Any]] = []
        if findings.sample and not findings.problems:
            meter.begin("loading")
            tokenizer = load_tokenizer(
                model or found.record.tokenizer["name"], None, device, found.record.tokenizer["options"]
            )
            recordings = open_source(source) if source else source_of(found)
            again = _encoded_again(meter, found, tokenizer, recordings, findings.sample)
    problems = [*findings.problems, *(_sentence(clip) for clip in again if clip["differing"])]
    for problem in problems[:SHOWN] if not as_json else []:
        complain(problem)
    equal = sum(not clip["differing"] for clip in again)
    if not found.record.finished:
        report.note("the corpus is not finished: what is there was checked")
    read = ", ".join(counted(getattr(findings, f"{noun}s"), noun) for noun in ("shard", "clip", "code"))
    report.note(f"{read} read; {equal} of {counted(len(again), 'clip')} encoded again with equal codes")
    report.result(
        {
            "corpus": corpus,
            "finished": found.record.finished,
            "shards": findings.shards,
            "clips": findings.clips,
            "codes": findings.codes,
            "problems": problems,
            "encoded_again": again,
        }
    )
    if problems:
        raise typer.Exit(CodesError.exit_code)


def _encoded_again(meter: Meter, corpus: Any, tokenizer: Any, source: Any, ids: list[str]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from audiotok.integrations.corpus_checks import encode_again

    meter.begin("encoding again", len(ids))
    done: list[dict[str, Any]] = []
    for clip in encode_again(corpus, tokenizer, source, ids):
        done.append(asdict(clip))
        meter.update(len(done), f"encoding again: {len(done)} of {len(ids)}")
    return done


def _sentence(clip: dict[str, Any]) -> str:
    if clip["differing"] < 0:
        return f"{clip['id']!r} has another number of codes than it is given now: has the recording changed?"
    return f"{clip['id']!r}: {clip['differing']:,} of {counted(clip['codes'], 'code')} are others now"
