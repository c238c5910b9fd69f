"""What the commands of a corpus say: a plan, how far a run is, and what came of it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from audiotok.cli.reporting import Meter, Report, counted

if TYPE_CHECKING:
    from audiotok.integrations.corpus_launch import Launch, Led
    from audiotok.integrations.corpus_record import Settings
    from audiotok.integrations.corpus_run import Progress
    from audiotok.integrations.sources import Source

PROBED = 64  # recordings whose headers a plan reads, to guess the hours
EVERY_S = 1.0


def show_plan(report: Report, source: Source, settings: Settings, launch: Launch, output: str) -> None:
    """`--dry-run`: what would be done, without a model."""
    from audiotok.integrations.corpus_plan import deal
    from audiotok.integrations.corpus_shards import Shards
    from audiotok.integrations.corpus_storage import corpus_files

    with report.progress("listing") as meter:
        census, parts = deal(
            source,
            settings.partitions,
            range(settings.partitions),
            lambda count: meter.update(count, f"listing: {count:,} clips"),
        )
        done = sum(len(ids) for ids in _ids_done(Shards(corpus_files(output), settings.split)))
    seconds, probed = _probe(source, parts)
    plan = {
        "source": source.describe(),
        "clips": census.total,
        "rows_done": done,
        "hours_about": round(seconds * census.total / probed / 3600, 3) if probed else None,
        "processes": launch.share.world_size,
        "device": launch.device,
        "partitions": settings.partitions,
        "clips_of_a_process": [
            int(sum(census.counts[p] for p in range(rank, settings.partitions, launch.share.world_size)))
            for rank in range(launch.share.world_size)
        ],
        "output": output,
    }
    report.result(plan, _table(_plan(plan)))


def _plan(plan: dict[str, Any]) -> dict[str, str]:
    hours, clips = plan["hours_about"], plan["clips_of_a_process"]
    processes = counted(plan["processes"], "process")
    about = "" if hours is None else f", about {hours:,.2f} h by the headers of some"
    return {
        "source": f"{plan['source']['path']} ({plan['source']['kind']}): {counted(plan['clips'], 'clip')}{about}",
        "columns": ", ".join(plan["source"].get("columns") or ["none but the id"]),
        "done": f"{counted(plan['rows_done'], 'row')} are in {plan['output']}",
        "work": f"{processes} on {plan['device']}, {min(clips):,} to {max(clips):,} clips each",
        "partitions": str(plan["partitions"]),
    }


def _ids_done(shards: Any) -> list[Any]:
    return [shards.ids(names) for names in shards.list().values()]


def _probe(source: Source, parts: list[Any]) -> tuple[float, int]:
    """Seconds of some recordings by their headers, and how many they are."""
    from audiotok.audio import probe
    from audiotok.errors import AudioTokError

    seconds, count = 0.0, 0
    for part in parts:
        for clip in part.clips.slice(0, -(-PROBED // len(parts))).to_pylist():
            try:
                duration = probe(source.open(clip["locator"])).duration
            except AudioTokError:
                continue
            if duration is not None:
                seconds, count = seconds + duration, count + 1
    return seconds, count


class Display:
    """How far a process, or those that it leads, are; on one line, or as JSON for the leader."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter, self._phase, self._told = meter, "", 0.0

    def one(self, progress: Progress) -> None:
        self.all([asdict(progress)], progress.phase == "done")

    def led(self, processes: list[Led]) -> None:
        self.all([one.progress for one in processes if one.progress])

    def all(self, progress: list[dict[str, Any]], now: bool = False) -> None:
        if not progress or (time.monotonic() - self._told < EVERY_S and not now):
            return
        self._told = time.monotonic()
        if self._meter is None:  # led by another process
            sys.stdout.write(json.dumps({"progress": progress[0]}) + "\n")
            sys.stdout.flush()
            return
        total, clips = sum(p["total"] for p in progress), sum(p["clips"] for p in progress)
        hours, failures = sum(p["seconds"] for p in progress) / 3600, sum(p["failures"] for p in progress)
        elapsed = max(time.time() - min(p["began"] for p in progress), 1e-3)
        if total and self._phase != "encoding":
            self._phase = "encoding"
            self._meter.begin("encoding", total)
        ranks = " ".join(f"{p['clips'] / p['total']:.0%}" for p in progress if p["total"]) if len(progress) > 1 else ""
        failed = f", {counted(failures, 'failure')}" if failures else ""
        text = f"{clips:,} of {total:,} clips, {hours:.2f} h at {3600 * hours / elapsed:.0f} h an hour{failed}"
        if not total:
            text = f"listing: {max(p['listed'] for p in progress):,} clips"
        self._meter.update(clips, f"{text} {f'[{ranks}]' if ranks else ''}", total or None)


def tell(report: Report, outcome: dict[str, Any], output: str, command: str) -> None:
    """The summary of a run."""
    totals = outcome["totals"]
    if outcome["stopped"]:
        report.note(f"stopped; what is encoded stays. The same command goes on:  {command}")
    elif not outcome["finished"]:
        report.note("this process is done; the corpus is finished when the others are")
    tables = [] if totals is None else [_table(_summary(totals, output) | _precision(outcome["precision"]))]
    report.result(outcome | {"output": output}, *tables)


def _summary(totals: dict[str, Any], output: str) -> dict[str, str]:
    certified, hours = totals["certified"], totals["hours"]
    length = f"{hours:,.2f} h" if hours >= 0.1 else f"{3600 * hours:,.1f} s"
    failed = totals["failures"] + totals["filtered"]
    rows = {
        "corpus": f"{counted(totals['rows'], 'clip')}, {length}, in {counted(totals['shards'], 'shard')}: {output}",
        "codes": f"{totals['codes']:,}, {counted(totals['frames'], 'frame')}",
        "codebook use": ", ".join(f"{share:.1%}" for share in totals["codebook_use"]),
    }
    if certified["reencoded"] or certified["smallest_margin"] is not None:
        share = certified["reencoded"] / max(certified["clips"], 1)
        rows["certified"] = (
            f"{share:.2%} of the clips encoded again alone; smallest margin {certified['smallest_margin']:.2g}"
        )
    if failed:
        left_out = f", {totals['filtered']:,} left out by filters" if totals["filtered"] else ""
        rows["not in it"] = f"{counted(totals['failures'], 'failure')}{left_out}: see errors.jsonl"
    return rows


def _precision(flips: dict[str, Any] | None) -> dict[str, str]:
    if flips is None:
        return {}
    share, of = flips["flipped"] / max(flips["codes"], 1), counted(flips["clips"], "clip")
    return {flips["dtype"]: f"{share:.2%} of {counted(flips['codes'], 'code')} of {of} are others than in float32"}


def _table(rows: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
