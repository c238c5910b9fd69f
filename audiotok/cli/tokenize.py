"""`audiotok tokenize`: a corpus → its codes on disk, exactly once, with any number of processes."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audiotok.cli import options as cli
from audiotok.cli.corpus_report import Display, show_plan, tell
from audiotok.cli.loading import load_tokenizer
from audiotok.cli.options import DEFAULT_TOKENIZER
from audiotok.cli.reporting import Meter, Report
from audiotok.errors import OptionError, OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from audiotok.integrations.corpus_launch import Launch, Stop
    from audiotok.integrations.corpus_run import CorpusRun

INTERRUPTED = 130
EXAMPLES = """\b
Examples:
  audiotok tokenize recordings/ --model audiotok/auv-mini --output-dir codes
  audiotok tokenize corpus.csv --audio-column path --id-column utt --output-dir codes
  audiotok tokenize 'shards/*.tar' --output-dir s3://bucket/codes --num-processes 8
  audiotok tokenize owner/dataset --split train --output-dir codes --min-duration 0.5
  torchrun --nproc_per_node 8 -m audiotok tokenize recordings/ --output-dir codes --batch-seconds 120

\b
Stopped, killed or out of space: the same command goes on where it was; with another number of processes, or a source
that has grown, as well. Every clip ends up once, as a row of codes/data/*.parquet or in codes/errors.jsonl.
"""


def tokenize(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder or glob of recordings, a manifest (.csv, .tsv, .jsonl, .parquet), a dataset (save_to_disk, "
            "or owner/name), WebDataset .tar files; or a URL."
        ),
    ],
    output_dir: Annotated[
        str, typer.Option("--output-dir", "-o", metavar="DIR", help="The corpus: a folder or a URL.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME", help="A tokenizer: bundled, a folder or a hub repository.")
    ] = DEFAULT_TOKENIZER,
    domain: cli.Domain = None,
    option: cli.Options = None,
    chunk_length_s: cli.ChunkLength = None,
    context_s: cli.Context = None,
    downmix: cli.Downmix = None,
    audio_column: Annotated[str | None, typer.Option(metavar="NAME", help="Of a manifest or dataset.")] = None,
    id_column: Annotated[str | None, typer.Option(metavar="NAME", help="Of a manifest or dataset.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="Columns that pass through. Default: all but the audio.")
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Of the source, where it has any; in names of shards.")
    ] = "",
    audio_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where a manifest's paths lead; / allows every path.")
    ] = None,
    min_duration: Annotated[float | None, typer.Option(metavar="SECONDS", help="Leave out what is shorter.")] = None,
    max_duration: Annotated[float | None, typer.Option(metavar="SECONDS", help="Leave out what is longer.")] = None,
    min_sampling_rate: Annotated[
        int | None, typer.Option(metavar="HZ", help="Leave out what was sampled lower.")
    ] = None,
    max_silence: Annotated[float | None, typer.Option(metavar="SHARE", help="Leave out what is more silent.")] = None,
    num_processes: Annotated[
        int | None, typer.Option(metavar="N", help="On this machine. Default: one a GPU, or one a CPU core.")
    ] = None,
    num_workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads that decode recordings, a process. Default: 2; 8 with a GPU."),
    ] = None,
    batch_seconds: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Of audio in a batch. Default: 240 on a GPU; clip by clip on a CPU."),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify/--no-certify", help="Make codes of batches that could have flipped again alone.")
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="bfloat16 or float16: faster on a GPU; says how many codes it changes."),
    ] = None,
    partitions: Annotated[
        int | None, typer.Option(metavar="N", help="Of a new corpus, for life. Default: 16, or 4 a process.")
    ] = None,
    shard_clips: Annotated[int, typer.Option(metavar="N", help="Most rows of a shard.")] = 4096,
    shard_seconds: Annotated[float, typer.Option(metavar="SECONDS", help="Of audio, after which a shard ends.")] = 3600,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N clips of the source.")] = None,
    max_errors: Annotated[
        int | None, typer.Option(metavar="N", help="Stop when more clips fail. Default: never.")
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try again what failed before.")] = False,
    save_weights: Annotated[
        bool, typer.Option("--save-weights", help="Put the codec's weights into the corpus's folder tokenizer.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. Default: all GPUs, or the CPU.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; loads no model.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the corpus that is there, and start anew.")
    ] = False,
    as_json: cli.AsJson = False,
    quiet: cli.Quiet = False,
) -> None:
    """Turn a corpus into codes, once, resumably."""
    from audiotok.integrations.corpus_launch import Launch, Stop, is_led, share_of_environment
    from audiotok.integrations.corpus_pipeline import batch_seconds_of, num_workers_of
    from audiotok.integrations.corpus_plan import FirstClips
    from audiotok.integrations.corpus_precision import check_dtype, measure_flips
    from audiotok.integrations.corpus_record import Filters, Settings, partitions_of
    from audiotok.integrations.corpus_run import CorpusRun, remove_corpus
    from audiotok.integrations.sources import open_source

    report = Report(quiet, as_json)
    check_dtype(dtype)
    listed = open_source(
        source,
        audio_column=audio_column,
        id_column=id_column,
        columns=None if columns is None else [name for name in columns.split(",") if name],
        split=split or None,
        audio_root=audio_root,
    )
    if limit is not None:
        listed = FirstClips(listed, limit)
    launch = Launch.plan(num_processes, device)
    if overwrite and not is_led():
        if share_of_environment() is not None:
            raise OptionError(
                "--overwrite does not fit torchrun and accelerate, whose processes would remove each other's work: "
                "remove the folder first."
            )
        remove_corpus(output_dir)
    settings = Settings(
        split=split or "train",
        downmix=cli.parse_downmix(downmix),
        certify=certify,
        filters=Filters(min_duration, max_duration, min_sampling_rate, max_silence),
        partitions=partitions or partitions_of(output_dir) or max(16, 4 * launch.share.world_size),
        shard_clips=shard_clips,
        shard_seconds=shard_seconds,
    )
    if dry_run:
        show_plan(report, listed, settings, launch, output_dir)
        return
    with Stop() as stop:
        if launch.leads:
            given = [] if partitions else ["--partitions", str(settings.partitions)]
            _lead(report, [*sys.argv[1:], *given], launch, stop, output_dir)
            return
        with report.progress("loading") as meter:
            wanted = cli.codec_options(option, domain, chunk_length_s, context_s)
            tokenizer = load_tokenizer(model, None, launch.device, wanted | ({"dtype": dtype} if dtype else {}))
            precision = None
            if dtype not in (None, "float32") and launch.share.rank == 0:
                meter.begin(f"measuring {dtype}")
                exact = load_tokenizer(model, None, launch.device, wanted)
                precision = measure_flips(listed, exact, tokenizer, settings.downmix)
                meter.begin("loading")
            run = CorpusRun(
                listed,
                tokenizer,
                output_dir,
                settings,
                launch.share,
                batch_seconds_of(tokenizer.codec.device, batch_seconds),
                num_workers_of(tokenizer.codec.device, num_workers),
                max_errors,
                retry_errors,
                save_weights,
                precision,
                must_stop=stop,
            )
            outcome = _work(run, meter, launch)
    if is_led():
        sys.stdout.write(json.dumps({"outcome": outcome}) + "\n")
        sys.stdout.flush()
    else:
        tell(report, outcome, output_dir, _again(sys.argv[1:]))
    if outcome["stopped"]:
        raise typer.Exit(INTERRUPTED)


def _work(run: CorpusRun, meter: Meter, launch: Launch) -> dict[str, Any]:
    """One process: its share of the corpus."""
    import torch

    from audiotok.integrations.corpus_launch import is_led

    if launch.device == "cpu":
        torch.set_num_threads(1)  # one process a core
    run.watch = Display(None if is_led() else meter).one
    return asdict(run.run())


def _lead(report: Report, arguments: Sequence[str], launch: Launch, stop: Stop, output: str) -> None:
    """Processes of this machine, each with its share."""
    from audiotok.integrations.corpus_launch import lead

    with report.progress("loading") as meter:
        led = lead(arguments, launch, Display(meter).led, stop)
    outcomes = [one.outcome for one in led if one.outcome]
    finished = next((outcome for outcome in outcomes if outcome["finished"]), None)
    # A process that had not loaded yet when Ctrl-C was passed on to it ends without a word.
    stopped = finished is None and (stop() or any(outcome["stopped"] for outcome in outcomes))
    dead = [one for one in led if one.outcome is None]
    if dead and not stopped:
        codes = sorted({one.process.returncode for one in dead})
        if codes[0] > 0 and len(codes) == 1:  # it said why itself
            raise typer.Exit(codes[0])
        ranks = ", ".join(str(one.rank) for one in dead)
        raise OutputError(
            f"The processes {ranks} of {len(led)} died (exit codes {codes}); what they wrote stays. Run the same "
            "command again, with fewer processes if memory was short."
        )
    summary = finished or {"finished": False, "stopped": stopped, "totals": None}
    tell(report, summary, output, _again(sys.argv[1:]))
    if stopped:
        raise typer.Exit(INTERRUPTED)


def _again(arguments: Sequence[str]) -> str:
    return shlex.join(["audiotok", *(one for one in arguments if one != "--overwrite")])
