"""Give a codec another quantizer: QINCo2, trained on the latents of any autoencoder that this package knows.

    python -m audiotok.recipes.fit_quantizer audiotok/auv-mini --data corpus --output runs/auv-qinco2

The codec stays as it is; its encoder and decoder, with the new quantizer between them, become a QinCodec tokenizer
in OUTPUT/tokenizer that `AutoAudioTokenizer` loads. Clips of held-out speakers and recordings then tell what was
gained over residual quantization (RQ) at equal bits: RQ as it is usually searched (greedily), RQ with a beam, RQ that
was fitted and is searched with a beam, and QINCo2 with one beam and with several.

OUTPUT/latents          the latents of the training, validation and test clips; encoded once
OUTPUT/rq*.safetensors  fitted tables
OUTPUT/state.pt         the training of QINCo2 after its last whole epoch
OUTPUT/tokenizer        the result
OUTPUT/report.json, report.md, curves.csv, curves.png

Ctrl-C leaves all of it as it is; the same command with --resume goes on, to the result of an undisturbed run.
With --until N the training pauses after epoch N and is compared as it stands: a state that is further is not trained
any more.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from safetensors.torch import load_file, save_file

from audiotok import AudioTokenizer, AutoAudioTokenizer, QinCodecAudioTokenizer, QinCodecModel
from audiotok.errors import AudioInputError, CheckpointError, CheckpointNotFoundError, OptionError, OutputExistsError
from audiotok.quantizers import FitProgress, FitSettings, QINCo2, ResidualQuantizer, fit, fit_residual_quantizer
from audiotok.recipes.command_line import Device, run_command, write_json, write_text
from audiotok.recipes.training.corpus import Clip, Corpus, default_cache, hold_out, open_corpus
from audiotok.recipes.training.latent_store import LatentStore
from audiotok.recipes.training.quantizer_comparison import (
    Comparison,
    Contender,
    compare_quantizers,
    curve_csv,
    draw,
    rate_table,
    step_table,
)

EXAMPLES = """Examples:

  python -m audiotok.recipes.fit_quantizer audiotok/auv-mini --data corpus --output runs/auv-qinco2

  python -m audiotok.recipes.fit_quantizer runs/qincodec/ema --data corpus --output runs/qincodec/quantized --codes 8

  python -m audiotok.recipes.fit_quantizer audiotok/auv-mini --data corpus --output runs/auv-rq --type rq

  python -m audiotok.recipes.fit_quantizer audiotok/auv-mini --data corpus --output runs/auv-qinco2 --resume

  python -m audiotok.recipes.fit_quantizer audiotok/auv-mini --data corpus --output runs/auv-qinco2 --resume --until 1
"""

INTERRUPTED = 130


@dataclass(frozen=True)
class Plan:
    """What decides the result of a run; written to OUTPUT/plan.json, and compared when a run goes on.

    Attributes:
        model: what the autoencoder is taken from.
        held_out: share of speakers and recordings that nothing is fitted to, half of them to choose the best epoch.
        quantizer: the config block of QINCo2.
        fitting: of QINCo2.
        kmeans_vectors, fitting_beam: of the residual quantizers; the beam of the one that is fitted with a beam.
    """

    model: str
    held_out: float
    quantizer: dict[str, Any]
    fitting: dict[str, Any]
    kmeans_vectors: int
    fitting_beam: int


class QuantizerFit:
    """One run: everything is opened by the constructor, then `run()` tells the story.

    Args:
        plan: of the run.
        data: the audiofolder.
        output: the run's folder.
        resume: go on with what is there.
        until: the last epoch of this call; None is the plan's last.
    """

    def __init__(
        self,
        plan: Plan,
        data: Path,
        output: Path,
        cache: Path,
        resume: bool,
        device: str = "cpu",
        until: int | None = None,
    ) -> None:
        self.plan, self.output, self.console = plan, output, Console()
        self.fitting = FitSettings(**plan.fitting)
        if until is not None:
            self.fitting = dataclasses.replace(self.fitting, num_epochs=min(until, self.fitting.num_epochs))
        self.source: AudioTokenizer = AutoAudioTokenizer.from_pretrained(plan.model, device=device)
        if self.source.codec.facts.channels != 1:
            raise AudioInputError(f"{plan.model} has {self.source.codec.facts.channels} channels: it must be mono.")
        self.codec = QinCodecModel.around(self.source.codec, plan.quantizer)
        self._open_output(resume)
        self.corpus: Corpus = open_corpus(data, cache, self.codec.facts.sampling_rate, {}, self._bar)
        training, held_out = hold_out(self.corpus.clips, plan.held_out)
        validation, test = hold_out(held_out, plan.held_out / 2)  # of the same numbers, the smaller half
        self.clips = {"training": training, "validation": validation, "test": test}
        for name, clips in self.clips.items():
            if not clips:
                raise OptionError(f"There are no {name} clips: {len(self.corpus.clips)} in all, raise --held-out.")

    def _open_output(self, resume: bool) -> None:
        """Refuse to mix two runs; a run that goes on must have the same plan."""
        path, plan = self.output / "plan.json", json.loads(json.dumps(dataclasses.asdict(self.plan)))
        if not resume:
            if self.output.exists() and any(self.output.iterdir()):
                raise OutputExistsError(f"{self.output} is not empty: go on with --resume, or name another folder.")
            self.output.mkdir(parents=True, exist_ok=True)
            write_json(path, plan)
        if not path.is_file():
            raise CheckpointNotFoundError(f"{self.output} holds no run to go on with: start without --resume.")
        before = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in plan if before.get(key) != plan[key]]:
            raise CheckpointError(
                f"{self.output} was begun with other values of {', '.join(differing)}: go on with those in {path}."
            )

    def _bar(self, items: list[Any], label: str) -> Iterable[Any]:
        return track(items, label, console=self.console)

    # The story

    def run(self, rates: list[int], test_clips: int, test_seconds: float, own_codes: bool = True) -> Comparison:
        """Fit what is not fitted yet, save the tokenizer, compare (`own_codes`: with the codec's), write the report."""
        vectors = {name: self._latents(name) for name in ("training", "validation")}
        self._say(f"{len(vectors['training']):,} latents of {vectors['training'].shape[1]} dimensions to fit to")
        plain = self._fit_rq("rq", vectors["training"], 1)
        with_beam = self._fit_rq("rq_beam", vectors["training"], self.plan.fitting_beam)
        quantizer = self.codec.quantizer
        if isinstance(quantizer, QINCo2):
            self._fit_qinco2(quantizer, vectors, with_beam)
        else:
            quantizer.load_state_dict((with_beam if quantizer.beam_size > 1 else plain).state_dict())
        self._save_tokenizer()
        samples = round(test_seconds * self.corpus.sampling_rate)
        waves = [self.corpus.audio(clip, 0, samples) for clip in self._test(test_clips)]
        found = self._compare(plain, with_beam, rates, waves, own_codes)
        self._report(found)
        return found

    def _latents(self, name: str) -> np.ndarray:
        about = {"autoencoder": self.source.fingerprint, "corpus": self.corpus.path.name}
        store = LatentStore(self.output / "latents" / name, about)
        return store.collect(self.codec, self.corpus, self.clips[name], self._bar)

    def _fit_rq(self, name: str, vectors: np.ndarray, beam_size: int) -> ResidualQuantizer:
        """Tables by k-means, fitted greedily or with a beam, from the file where they are there."""
        block, path = self.codec.config.quantizer_block, self.output / f"{name}.safetensors"
        rq = ResidualQuantizer(self.codec.config.latent_dim, block.num_quantizers, block.codebook_size, beam_size)
        if path.is_file():
            rq.load_state_dict(load_file(path))
            return rq.eval()
        # A beam multiplies the residuals, so it gets so many vectors fewer.
        first = torch.from_numpy(np.array(vectors[: self.plan.kmeans_vectors // beam_size]))
        with self._progress(name) as (bar, task):

            def report(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            fit_residual_quantizer(rq, first, training_beam_size=beam_size, seed=0, progress=report)
        unfinished = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in rq.state_dict().items()}, unfinished)
        unfinished.replace(path)
        return rq

    def _fit_qinco2(self, quantizer: QINCo2, vectors: dict[str, np.ndarray], start: ResidualQuantizer) -> None:
        with self._progress("qinco2") as (bar, task):

            def report(now: FitProgress) -> None:
                bar.update(task, completed=now.done, total=now.total)
                if now.report is not None:
                    epoch, variance = now.report, self._validation_variance(vectors["validation"], quantizer)
                    snr = 10 * np.log10(variance / epoch.validation_mse)
                    bar.console.print(
                        f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, validation SNR {snr:.2f} dB, "
                        f"{epoch.replaced_codes} unused codes moved",
                        highlight=False,
                    )

            result = fit(
                quantizer,
                vectors["training"],
                validation=vectors["validation"],
                residual=start,
                settings=self.fitting,
                state_file=self.output / "state.pt",
                progress=report,
            )
        self._say(f"epoch {result.best_epoch} of {len(result.history) - 1} was the best on validation clips")

    @staticmethod
    def _validation_variance(vectors: np.ndarray, quantizer: QINCo2) -> float:
        """Of the vectors as the quantizer normalises them."""
        return float(np.var(vectors, axis=0).mean()) / float(quantizer.data_std) ** 2

    def _save_tokenizer(self) -> None:
        name = f"{Path(self.plan.model).name} with {self.plan.quantizer['type'].upper()}"
        QinCodecAudioTokenizer(self.codec, name=name).save_pretrained(self.output / "tokenizer")

    def _compare(
        self,
        plain: ResidualQuantizer,
        with_beam: ResidualQuantizer,
        rates: list[int],
        waves: list[np.ndarray],
        own_codes: bool,
    ) -> Comparison:
        block = self.codec.config.quantizer_block
        beam = max(block.beam_size, 2)
        contenders = [
            Contender("RQ, greedy", plain, {"beam_size": 1}),
            Contender(f"RQ, beam {beam}", plain, {"beam_size": beam}),
            Contender(f"RQ, beam {4 * beam}", plain, {"beam_size": 4 * beam}),
            Contender(f"RQ fitted with a beam, beam {beam}", with_beam, {"beam_size": beam}),
            Contender(f"RQ fitted with a beam, beam {4 * beam}", with_beam, {"beam_size": 4 * beam}),
        ]
        if isinstance(self.codec.quantizer, QINCo2):
            contenders += [
                Contender(f"QINCo2, beam {size}", self.codec.quantizer, {"beam_size": size})
                for size in (1, beam, 4 * beam)
            ]
        source = self.source if own_codes and not isinstance(self.source.codec, QinCodecModel) else None
        return compare_quantizers(self.codec, contenders, rates, waves, source, self._bar)

    def _test(self, count: int) -> list[Clip]:
        """`count` test clips, spread evenly over all of them, which are sorted by domain."""
        clips = sorted(self.clips["test"], key=lambda clip: (clip.domain, clip.file_name))
        return [clips[i] for i in np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int)]

    def _report(self, found: Comparison) -> None:
        tables = [rate_table(found), step_table(found)]
        for table in tables:
            self.console.print(table.rich())
        write_text(self.output / "report.md", "\n".join(table.markdown() for table in tables))
        report = {"plan": dataclasses.asdict(self.plan), "threads": torch.get_num_threads()}
        write_json(self.output / "report.json", report | {"comparison": dataclasses.asdict(found)})
        write_text(self.output / "curves.csv", curve_csv(found))
        draw(found, self.output / "curves.png")
        self._say(f"the tokenizer is in {self.output / 'tokenizer'}")

    # For people

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _progress(self, label: str) -> _Bar:
        return _Bar(self.console, label)


class _Bar:
    """A progress bar that ends with its block."""

    def __init__(self, console: Console, label: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self.label = label

    def __enter__(self) -> tuple[Progress, TaskID]:
        self.bar.start()
        return self.bar, self.bar.add_task(self.label, total=None)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


# Command line


def run(
    model: Annotated[str, typer.Argument(help="Name or folder of the tokenizer whose autoencoder is taken.")],
    data: Annotated[Path, typer.Option(help="Audiofolder: metadata.csv with file_name and domain.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    codes: Annotated[int, typer.Option(min=1, help="Codes a frame: steps of the quantizer.")] = 4,
    codebook_size: Annotated[int, typer.Option(min=2, help="Codewords of each step.")] = 256,
    kind: Annotated[str, typer.Option("--type", help="qinco2, or rq for the baseline as a tokenizer.")] = "qinco2",
    num_blocks: Annotated[int, typer.Option(min=1, help="Residual blocks of each step's network.")] = 2,
    embedding_dim: Annotated[int, typer.Option(min=1, help="Its width outside the blocks.")] = 128,
    hidden_dim: Annotated[int, typer.Option(min=1, help="Its width inside the blocks.")] = 256,
    beam: Annotated[int, typer.Option(min=1, help="Beams of the tokenizer's search.")] = 8,
    candidates: Annotated[int, typer.Option(min=1, help="Codewords that each beam tries.")] = 16,
    fitting_beam: Annotated[int, typer.Option(min=1, help="Beams while fitting.")] = 4,
    fitting_candidates: Annotated[int, typer.Option(min=1, help="Candidates while fitting.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Of QINCo2's training; the learning rate falls over all.")] = 30,
    vectors_per_epoch: Annotated[int | None, typer.Option(min=1, help="A window that slides; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Vectors an update.")] = 1024,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of QINCo2's training, at its highest.")] = 8e-4,
    kmeans_vectors: Annotated[int, typer.Option(min=1, help="Vectors that tables are fitted to.")] = 200_000,
    rate: Annotated[
        list[int] | None, typer.Option(help="Codes a frame to compare at; repeat it. Default: each quarter of --codes.")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of speakers and recordings.")] = 0.1,
    test_clips: Annotated[int, typer.Option(min=1, help="Held-out clips to compare on, at most.")] = 40,
    test_seconds: Annotated[float, typer.Option(min=0.1, help="How much of each.")] = 6.0,
    own_codes: Annotated[
        bool, typer.Option(help="Compare with the codec's own codes; not where it was trained without any.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in OUTPUT.")] = False,
    until: Annotated[int | None, typer.Option(min=1, help="Pause after this epoch, and compare what there is.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where resampled corpora are kept.")] = None,
    device: Device = "cpu",
) -> None:
    """Fit QINCo2 to the latents of a codec, compare it with residual quantization, and save the tokenizer."""
    rates = sorted(set(rate or [-(-codes * quarter // 4) for quarter in range(1, 5)]))
    if not 1 <= rates[0] <= rates[-1] <= codes:
        raise OptionError(f"--rate {rates} is not legal: 1 to {codes} codes a frame.")
    block: dict[str, Any] = {
        "type": kind, "num_quantizers": codes, "codebook_size": codebook_size, "beam_size": beam
    }  # fmt: skip
    if kind != "rq":
        network = {"num_blocks": num_blocks, "embedding_dim": embedding_dim, "hidden_dim": hidden_dim}
        block |= {**network, "num_candidates": candidates}
    warmup = min(3.0, epochs / 10)
    fitting = FitSettings(
        num_epochs=epochs,
        patience=epochs,
        vectors_per_epoch=vectors_per_epoch,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_epochs=warmup,
        decay_epochs=epochs - warmup,
        num_candidates=fitting_candidates,
        beam_size=fitting_beam,
    )
    plan = Plan(model, held_out, block, dataclasses.asdict(fitting), kmeans_vectors, fitting_beam)
    try:
        fitted = QuantizerFit(plan, data, output, cache or default_cache(), resume, device, until)
        fitted.run(rates, test_clips, test_seconds, own_codes)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command with --resume goes on from what is in {output}", err=True)
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    run_command(run, EXAMPLES)
