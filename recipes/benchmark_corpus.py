"""How fast the corpus engine is beside what it replaces, and whether it is exact, measured in one run on one machine.

    python -m audiotok.recipes.benchmark_corpus auv-mini --data corpus/test --markdown corpus.md
    python -m audiotok.recipes.benchmark_corpus --data corpus/test --quick

Tables: the speed of `audiotok tokenize` beside a plain `datasets.map`, the model alone and decoding alone, with the
codes compared; codes made in certified batches beside canonical ones; planning, writing and resuming of synthetic rows
with their memory; training windows; and, with --kills, rows after runs were killed.

It is no test with a time limit. A busy machine slows rivals that take turns, but those with the most threads most:
for figures that count, let nothing else run.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from audiotok.errors import OptionError
from audiotok.recipes import command_line as cli
from audiotok.recipes.benchmark_measures import Timing
from audiotok.recipes.benchmark_models import FULL, MINI, find_recordings, load_tokenizer
from audiotok.recipes.corpus_certainty import CertifyRow, measure_certainty
from audiotok.recipes.corpus_kills import KillsReport, measure_kills
from audiotok.recipes.corpus_measures import (
    ENGINE,
    MODEL_ONLY,
    READING,
    SpeedReport,
    in_fresh_processes,
    measure_speed,
    workload,
)
from audiotok.recipes.corpus_rows import (
    RowsReport,
    Stage,
    WindowsReport,
    WritingRow,
    measure_rows,
    measure_windows,
    measure_writing,
)
from audiotok.recipes.evaluation_report import Table

EXAMPLES = """Examples:

  python -m audiotok.recipes.benchmark_corpus --data corpus/test --quick

  python -m audiotok.recipes.benchmark_corpus auv-mini auv-full --data corpus/test --no-rows --no-windows

  python -m audiotok.recipes.benchmark_corpus --no-speed --no-certify --rows 10000 --rows 1000000 --json rows.json

  python -m audiotok.recipes.benchmark_corpus --data corpus/test --limit 40 --kills 1000 --no-speed --no-certify
"""
ROWS = [10_000, 100_000]
SHARD_ROWS = 4096


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        limit: recordings at most; None for all.
        processes: of the engine.
        batch_seconds: of audio in a certified batch.
        rows: of synthetic corpora.
        shard_rows: of the shards whose writing is timed.
        window_clips: drawn clips of 10 s that training windows are read from.
        kills: of processes at work.
    """

    limit: int | None = None
    repeats: int = 3
    processes: int = 1
    batch_seconds: float = 60.0
    rows: tuple[int, ...] = tuple(ROWS)
    shard_rows: int = SHARD_ROWS
    window_clips: int = 20_000
    kills: int = 0
    seed: int = 0

    def quick(self) -> Settings:
        """The same tables from far less work: a trial, not a measurement."""
        limit, kills = min(self.limit or 6, 6), min(self.kills, 2)
        return replace(
            self, limit=limit, repeats=1, batch_seconds=5.0, rows=(300,), shard_rows=64, window_clips=40, kills=kills
        )


@dataclass
class Report:
    """All that a run found, and where it ran."""

    about: dict[str, Any]
    speed: list[SpeedReport] = field(default_factory=list)
    certainty: list[tuple[str, CertifyRow]] = field(default_factory=list)
    kills: list[KillsReport] = field(default_factory=list)
    rows: list[RowsReport] = field(default_factory=list)
    writing: list[WritingRow] = field(default_factory=list)
    windows: list[WindowsReport] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """No code of a certified batch is another than the canonical one, and no kill cost a row."""
        certain = all(row.differing == 0 for _, row in self.certainty if row.way == "batches")
        return certain and all(report.exact for report in self.kills)

    def as_json(self) -> dict[str, Any]:
        names = ("kills", "rows", "writing", "windows")
        found: dict[str, Any] = {name: [asdict(one) for one in getattr(self, name)] for name in names}
        found["speed"] = [asdict(one) | {"ratios": {side: one.ratio(side) for side in one.sides}} for one in self.speed]
        found["certainty"] = [
            {"model": model, **asdict(row), "cost": row.cost, "cpu_cost": row.cpu_cost} for model, row in self.certainty
        ]
        return {"about": self.about, "exact": self.exact, **found}


@dataclass(frozen=True)
class Sections:
    """What is measured; kills where `Settings.kills` says so."""

    speed: bool = True
    certify: bool = True
    rows: bool = True
    windows: bool = True


def benchmark(
    report: Report, models: Sequence[str], recordings: Sequence[Path], settings: Settings, sections: Sections
) -> Iterator[str]:
    """Measure, and fill `report` section by section; yields what was done last."""
    if recordings:
        for model in models:
            yield from _on_recordings(report, model, recordings, settings, sections)
    if sections.rows:
        for count in settings.rows:
            report.rows.append(measure_rows(count))
            yield f"{count:,} rows"
        (report.writing,) = in_fresh_processes(measure_writing, [(settings.shard_rows, settings.repeats)])
        yield "writing"
    if sections.windows:
        report.windows += in_fresh_processes(measure_windows, [(settings.window_clips, settings.repeats)])
        yield "windows"


def _on_recordings(
    report: Report, model: str, recordings: Sequence[Path], settings: Settings, sections: Sections
) -> Iterator[str]:
    name, tokenizer = Path(model).stem, load_tokenizer(model, settings.seed)
    report.about["models"][name] = repr(tokenizer)
    with workload(tokenizer, recordings, settings.processes) as (load, folder):
        if sections.speed:
            report.speed.append(measure_speed(name, load, folder, settings.repeats))
            yield f"{name}: speed"
        if sections.certify:
            (rows,) = in_fresh_processes(measure_certainty, [(load, settings.batch_seconds, settings.repeats)])
            report.certainty += [(name, row) for row in rows]
            yield f"{name}: certainty"
        if settings.kills:
            call = (name, load, str(folder / "kills"), settings.kills, settings.seed)
            report.kills += in_fresh_processes(measure_kills, [call])
            yield f"{name}: {settings.kills} kills"


def _about(settings: Settings, data: Path | None, recordings: Sequence[Path]) -> dict[str, Any]:
    packages = ("audiotok", "torch", "transformers", "datasets", "pyarrow", "numpy", "soundfile", "soxr")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "data": None if data is None else f"{len(recordings)} recordings of {data.resolve().name}",
        "settings": asdict(settings),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "models": {},
    }


# Tables


def tables(report: Report) -> list[Table]:
    made = [
        _speed_table(report),
        _limits_table(report),
        _codes_table(report),
        _certainty_table(report),
        _kills_table(report),
    ]
    made += [_rows_table(report), _writing_table(report), _windows_table(report)]
    return [table for table in made if table.rows]


def _speed_table(report: Report) -> Table:
    rows = [
        [
            f"{one.model}, {side}",
            f"{one.rate(side):.1f}",
            f"{one.ratio(side):.2f}",
            f"{times.work:.2f}",
            f"{times.around:.2f}",
            f"{times.command:.2f}",
            f"{times.cpu:.2f}",
        ]
        for one in report.speed
        for side, times in one.sides.items()
    ]
    processes = report.about["settings"]["processes"]
    title = f"Speed, {processes} process{'es' * (processes > 1)} of one thread; plain recipes with torch's own threads"
    header = "side|audio-s per s|tokenize is times as fast|work, s|loading, s|whole command, s|CPU, s"
    return Table(title, header.split("|"), rows)


def _limits_table(report: Report) -> Table:
    """How near the engine is to what the cores can do at all: they decode recordings beside the model."""
    rows = []
    for one in report.speed:
        engine, model, reading = (one.rate(side) for side in (ENGINE, MODEL_ONLY, READING))
        both = 1 / (1 / model + 1 / reading)
        shares = [f"{engine / limit:.2f}" for limit in (model, both)]
        rows.append([one.model, *(f"{rate:.1f}" for rate in (engine, model, reading, both)), *shares])
    header = "codec|tokenize|model only|reading only|both on the same cores|of model only|of both"
    return Table("Limits, audio seconds per second", header.split("|"), rows)


def _codes_table(report: Report) -> Table:
    rows = [
        [
            one.model,
            *map(str, (one.clips, one.failed, f"{one.audio_seconds:.1f}", one.codes.total, one.codes.differing)),
            f"{one.codes.cut_codes} in {one.codes.cut_clips} clips",
        ]
        for one in report.speed
    ]
    header = "codec|clips|not read|audio, s|codes|differing|where plain lost a sample"
    return Table("Codes of audiotok tokenize and of the plain recipe", header.split("|"), rows)


def _certainty_table(report: Report) -> Table:
    rows = [
        [
            f"{model}, {row.way}, {row.threads} thread{'s' * (row.threads > 1)}",
            str(row.codes),
            str(row.differing),
            "–" if row.uncertified is None else str(row.uncertified),
            f"{row.reencoded} of {row.clips}",
            f"{row.certified.wall:.2f}",
            *("–" if cost is None else f"{100 * cost:+.1f} %" for cost in (row.cost, row.cpu_cost)),
            f"{100 * row.padding:.1f} %",
        ]
        for model, row in report.certainty
    ]
    header = "way|codes|other than canonical|without certifying|clips encoded again|seconds"
    header += "|cost of certifying|by CPU time|padding"
    seconds = report.about["settings"]["batch_seconds"]
    return Table(f"Certified codes, batches of {seconds:g} s of audio", header.split("|"), rows)


def _kills_table(report: Report) -> Table:
    rows = [
        [
            one.model,
            *map(str, (one.kills, one.corpora, one.rows, one.lost, one.repeated, one.changed)),
            f"{one.redone:.1f} (at worst {one.worst:.1f})",
            f"{one.seconds:.0f}",
        ]
        for one in report.kills
    ]
    header = "codec|kills|corpora|rows of each|lost|repeated|changed|clips redone a kill|seconds"
    return Table("Runs that were killed", header.split("|"), rows)


def _rows_table(report: Report) -> Table:
    rows = [
        [
            f"{one.rows:,}, {stage}",
            f"{times.seconds:.2f}",
            f"{1e6 * times.seconds / one.rows:.1f}",
            f"{times.loaded:.0f}",
            f"{times.peak:.0f}",
            f"{2**20 * (times.peak - times.loaded) / one.rows:.0f}",
        ]
        for one in report.rows
        for stage, times in _stages(one).items()
    ]
    header = "rows|seconds|microseconds a row|loaded, MiB|peak, MiB|bytes a row"
    return Table("Synthetic rows of 50 codes, one process, no model", header.split("|"), rows)


def _stages(one: RowsReport) -> dict[str, Stage]:
    return {"planning": one.planning, "planning and writing": one.writing, "resuming when finished": one.resuming}


def _writing_table(report: Report) -> Table:
    rows = [
        [
            f"{one.rows:,} rows of {one.codes_per_row} codes",
            *_millions(one.codes, one.shard),
            *_millions(one.codes, one.parquet),
            f"{one.size:.2f}",
        ]
        for one in report.writing
    ]
    header = "shard|to the disk|by CPU time|Parquet alone|by CPU time|bytes a code"
    return Table("Writing, million codes per second of one thread", header.split("|"), rows)


def _windows_table(report: Report) -> Table:
    rows = []
    for one in report.windows:
        ways = {"export to memmap": (one.ids, one.exporting), f"batches of {one.batch}": (one.read, one.batches)}
        ways |= {"items, as a DataLoader": (one.read, one.items), "copy of as much": (one.read, one.copy)}
        rows += [[f"{name}, {one.ids:,} ids", *_millions(ids, times)] for name, (ids, times) in ways.items()]
    window = f" of {report.windows[0].window} ids" if report.windows else ""
    return Table(f"Training windows{window}, million ids per second", ["what", "wall", "CPU time"], rows)


def _millions(count: int, times: Timing) -> list[str]:
    return [f"{count / times.wall / 1e6:.1f}", f"{count / times.cpu / 1e6:.1f}"]


# Command line


def run(
    models: Annotated[
        list[str] | None,
        typer.Argument(help=f"{', '.join(FULL)}, a training config (.yaml), or a tokenizer; default {MINI}."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of recordings.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Recordings at most, drawn with the seed.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times each side runs; the median counts.")] = 3,
    processes: Annotated[int | None, typer.Option(min=1, help="Of the engine. Default: one a core.")] = None,
    batch_seconds: Annotated[float, typer.Option(min=0.1, help="Of audio in a certified batch.")] = 60.0,
    rows: Annotated[list[int], typer.Option(min=1, help="Rows of a synthetic corpus; repeat it.")] = ROWS,
    kills: Annotated[int, typer.Option(min=0, help="Kill so many processes at work.")] = 0,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Beside plain recipes; needs --data.")] = True,
    certify: Annotated[bool, typer.Option("--certify/--no-certify", help="Certified batches; needs --data.")] = True,
    no_rows: Annotated[bool, typer.Option("--no-rows", help="Leave out synthetic rows and writing.")] = False,
    windows: Annotated[bool, typer.Option("--windows/--no-windows", help="Training windows.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="A trial; its figures mean nothing.")] = False,
    seed: cli.Seed = 0,
    json_file: cli.JsonFile = None,
    markdown: cli.MarkdownFile = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Measure `audiotok tokenize` beside what it replaces, with equality of codes checked in the same run."""
    cli.check_outputs([json_file, markdown], overwrite)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = Settings(limit, repeats, processes or cores, batch_seconds, tuple(rows), kills=kills, seed=seed)
    settings, sections = settings.quick() if quick else settings, Sections(speed, certify, not no_rows, windows)
    if data is None and (speed or certify or kills):
        raise OptionError(
            "Speed, certainty and kills need recordings: give a folder of them with --data, or leave these sections "
            "out with --no-speed --no-certify and without --kills."
        )
    recordings = [] if data is None else _drawn(data, settings.limit, seed)
    report, progress = Report(_about(settings, data, recordings)), Console(stderr=True)
    for done in benchmark(report, models or [MINI], recordings, settings, sections):
        progress.print(done, style="dim", highlight=False)
    found = tables(report)
    for table in found:
        Console().print(table.rich())
    cli.write_json(json_file, report.as_json())
    lines = [f"* {key}: {value}" for key, value in report.about.items() if key != "models"]
    cli.write_text(markdown, "\n".join([*lines, "", *(table.markdown() for table in found)]))
    if not report.exact:
        raise SystemExit(1)


def _drawn(data: Path, limit: int | None, seed: int) -> list[Path]:
    """Recordings of a folder in a drawn order, so that a limit takes some of every kind."""
    files = find_recordings([data])
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))[:limit]]


if __name__ == "__main__":
    cli.run_command(run, EXAMPLES)
