"""How fast audiotok is beside what it replaces, measured in one run on one machine.

    python -m audiotok.recipes.benchmark --data corpus/test --markdown benchmark.md
    python -m audiotok.recipes.benchmark auv-mini --quick

Four tables: codecs, encoding and decoding clips of equal and of ragged lengths beside a plain eager implementation of
the same graph (see `recipes.plain`); layouts, ids per second beside a memory copy of the same bytes and a Python
loop; memory per minute of audio; and what a lower precision or compilation saves and how many codes it changes.

Codes are compared in the same run: those of audiotok must equal the codes of each clip encoded alone. This is no
test with a time limit: a busy machine slows both rivals, which take turns.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from audiotok.errors import OptionError
from audiotok.recipes import command_line as cli
from audiotok.recipes.benchmark_measures import (
    CodecRow,
    LayoutRow,
    MemoryRow,
    PrecisionRow,
    measure_codec,
    measure_layouts,
    measure_memory,
    measure_precision,
)
from audiotok.recipes.benchmark_models import (
    FULL,
    MINI,
    Waveform,
    cut_to_equal,
    load_tokenizer,
    recorded_clips,
    synthetic_clips,
)
from audiotok.recipes.evaluation_report import Table

EXAMPLES = """Examples:

  python -m audiotok.recipes.benchmark --quick

  python -m audiotok.recipes.benchmark auv-mini --data corpus/test --batches 1,8,32 --json speed.json

  python -m audiotok.recipes.benchmark melcap-full apcodec-full vrvq-full qincodec-full --batches 1,4 --no-layouts

  python -m audiotok.recipes.benchmark auv-full --device cuda --no-memory --markdown gpu.md
"""


@dataclass(frozen=True)
class Settings:
    """How much is measured; every number is an option of the command line."""

    batches: tuple[int, ...] = (1, 4, 16)
    seconds: float = 10.0
    repeats: int = 5
    threads: int = 1
    frames: int = 1_000_000
    memory_seconds: float = 60.0
    seed: int = 0

    def quick(self) -> Settings:
        """The same tables from far less work: a trial, not a measurement."""
        return Settings((1, 2), min(self.seconds, 1.0), 1, self.threads, 4000, 2.0, self.seed)


@dataclass
class Report:
    """All rows of a run, and where it ran."""

    about: dict[str, Any]
    codecs: list[CodecRow] = field(default_factory=list)
    layouts: list[LayoutRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    precision: list[PrecisionRow] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        rows = {name: [asdict(row) for row in getattr(self, name)] for name in ("layouts", "precision")}
        rows["codecs"] = [{**asdict(row), "ratio": row.ratio} for row in self.codecs]
        rows["memory"] = [{**asdict(row), "per_minute": row.per_minute} for row in self.memory]
        return {"about": self.about, **rows}


def workloads(data: Path | None, sampling_rate: int, settings: Settings) -> dict[str, list[list[Waveform]]]:
    """ "equal" and "ragged" → for each batch size the clips that are handed over at once.

    Equal clips last `seconds`. Ragged ones are recordings of up to that length, or synthetic ones between a tenth
    and the whole of it (logarithmically even).
    """
    count, length = max(settings.batches), round(settings.seconds * sampling_rate)
    if data is not None:
        clips = recorded_clips(data, count, settings.seconds, sampling_rate, settings.seed)
        clips = [clips[i % len(clips)] for i in range(count)]
    else:
        spread = 10 ** np.random.default_rng(settings.seed).uniform(-1, 0, size=count)
        clips = synthetic_clips((settings.seconds * spread).tolist(), sampling_rate, settings.seed)
    equal = cut_to_equal(clips, length)
    return {
        "equal": [equal[:n] for n in settings.batches],
        "ragged": [clips[:n] for n in settings.batches if n > 1],
    }


def benchmark(
    report: Report,
    models: list[str],
    settings: Settings,
    data: Path | None = None,
    device: str = "cpu",
    layouts: bool = True,
    memory: bool = True,
    precision: bool = True,
    compiled: bool = False,
) -> Iterator[str]:
    """Measure, and fill `report` row by row; yields what was done last."""
    torch.set_num_threads(settings.threads)
    for model in models:
        tokenizer, name = load_tokenizer(model, settings.seed).to(device), Path(model).stem
        report.about["models"][name] = repr(tokenizer)
        work = workloads(data, tokenizer.sampling_rate, settings)
        for row in measure_codec(name, tokenizer, work, settings.repeats):
            report.codecs.append(row)
            yield f"{name}: {row.direction} {row.clips} clips of {row.lengths} lengths"
        if precision:
            for found in measure_precision(name, tokenizer.codec, work["equal"][-1], settings.repeats, compiled):
                report.precision.append(found)
                yield f"{name}: {found.variant}"
        if memory:
            for used in measure_memory(model, settings.memory_seconds, settings.threads):
                report.memory.append(used)
                yield f"{name}: memory to {used.direction}"
    if layouts:
        for line in measure_layouts(settings.frames, settings.repeats, settings.seed):
            report.layouts.append(line)
            yield f"layout {line.layout}"


def _about(settings: Settings, data: Path | None, device: str) -> dict[str, Any]:
    packages = ("audiotok", "torch", "transformers", "numpy")
    on_gpu = device.startswith("cuda")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.platform(),
        "processor": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "dtype": "float32",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "data": "synthetic" if data is None else data.resolve().name,
        "settings": asdict(settings),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "models": {},
    }


# Tables


def tables(report: Report) -> list[Table]:
    made = [_codec_table(report), _precision_table(report), _memory_table(report), _layout_table(report)]
    return [table for table in made if table.rows]


def _codec_table(report: Report) -> Table:
    header = "codec|audio-s per s|plain|ratio|CPU ratio|one batch|codes equal|plain differs|one batch differs"
    rows = []
    for row in report.codecs:
        equal = "yes" if row.ours_equal else "NO"
        speeds = [row.audio_seconds / t.wall for t in (row.ours, row.plain, row.batched)]
        rows.append(
            [
                f"{row.model}, {row.direction} {row.clips} {row.lengths}",
                f"{speeds[0]:.1f}",
                f"{speeds[1]:.1f}",
                f"{row.ratio:.2f}",
                f"{row.plain.cpu / row.ours.cpu:.2f}",
                f"{speeds[2]:.1f}",
                equal,
                f"{row.plain_differing} of {row.total}",
                f"{row.batched_differing} of {row.total}",
            ]
        )
    threads = report.about["settings"]["threads"]
    return Table(f"Codecs, {threads} thread{'s' * (threads > 1)}, {report.about['device']}", header.split("|"), rows)


def _precision_table(report: Report) -> Table:
    rows = []
    for row in report.precision:
        name = f"{row.model}, {row.variant}"
        if row.error is not None or row.codes is None or row.differing is None:
            rows.append([name, "–", "–", f"not run: {row.error}"])
        else:
            share = f"{100 * row.differing / row.codes:.2f} %"
            rows.append([name, f"{row.speedup:.2f}", f"{row.differing} of {row.codes}", share])
    return Table("Encoding in another way than float32", ["codec", "speed-up", "codes that differ", "share"], rows)


def _memory_table(report: Report) -> Table:
    rows = [
        [
            f"{row.model}, {row.direction}",
            f"{row.loaded:.0f}",
            f"{row.peak:.0f}",
            f"{row.peak_twice:.0f}",
            f"{row.per_minute:.0f}",
        ]
        for row in report.memory
    ]
    seconds = report.about["settings"]["memory_seconds"]
    header = ["codec", "loaded", f"peak {seconds:g} s", f"peak {2 * seconds:g} s", "per minute"]
    return Table("Resident memory, MiB", header, rows)


def _layout_table(report: Report) -> Table:
    rows = [
        [
            f"{row.layout}, {row.codebooks} codebook{'s' * (row.codebooks > 1)}",
            f"{row.to_ids / 1e6:.0f}",
            f"{row.to_codes / 1e6:.0f}",
            f"{row.copy / 1e6:.0f}",
            f"{row.loop / 1e6:.0f}",
            f"{row.to_ids / row.copy:.2f}",
            f"{row.to_codes / row.copy:.2f}",
            "yes" if row.equal else "NO",
        ]
        for row in report.layouts
    ]
    header = "layout|codes to ids|ids to codes|copy|Python loop|to ids over copy|to codes over copy|codes equal"
    return Table("Layouts, million ids per second of CPU time", header.split("|"), rows)


# Command line


def run(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{', '.join(FULL)}, {MINI}, a training config (.yaml), or what from_pretrained takes; default auv."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of recordings; synthetic clips without it.")] = None,
    batches: Annotated[str, typer.Option(help="Clips handed over at once.")] = "1,4,16",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the longest clip.")] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Times each rival runs; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 1,
    device: cli.Device = "cpu",
    layouts: Annotated[bool, typer.Option(help="Measure codes to ids and back.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in fresh processes.")] = True,
    precision: Annotated[bool, typer.Option(help="Measure bfloat16 and the like.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile too (always on a GPU).")] = False,
    quick: Annotated[bool, typer.Option(help="A trial in seconds; its figures mean nothing.")] = False,
    seed: cli.Seed = 0,
    json_file: cli.JsonFile = None,
    markdown: cli.MarkdownFile = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Measure codecs and layouts beside what they replace, with equality of codes checked in the same run."""
    cli.check_outputs([json_file, markdown], overwrite)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError(f"device={device} is not there: this PyTorch sees no GPU. Leave --device out.")
    settings = Settings(_numbers(batches), seconds, repeats, threads, seed=seed)
    settings = settings.quick() if quick else settings
    report, progress = Report(_about(settings, data, device)), Console(stderr=True)
    chosen = models or ["auv-full", MINI]
    for done in benchmark(report, chosen, settings, data, device, layouts, memory, precision, compiled):
        progress.print(done, style="dim", highlight=False)
    found = tables(report)
    for table in found:
        Console().print(table.rich())
    cli.write_json(json_file, report.as_json())
    lines = [f"* {key}: {value}" for key, value in report.about.items() if key != "models"]
    cli.write_text(markdown, "\n".join([*lines, "", *(table.markdown() for table in found)]))
    if not all(row.ours_equal for row in report.codecs) or not all(row.equal for row in report.layouts):
        raise SystemExit(1)


def _numbers(text: str) -> tuple[int, ...]:
    """Batch sizes from "1,4,16"."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise OptionError(f"--batches {text} is not legal: give whole numbers from 1 on, as in 1,4,16.")
    return numbers


if __name__ == "__main__":
    cli.run_command(run, EXAMPLES)
