"""Train a codec: `python -m audiotok.recipes.train_codec CONFIG.yaml --data FOLDER --output RUN`.

Runs on a CPU, one GPU or several (`accelerate launch -m audiotok.recipes.train_codec ...`). RUN holds `last`
(everything that a resumed run needs), `ema` and `best` (averaged weights, for `from_pretrained`),
`log.csv`, `validation.csv`, `curves.png` and `samples/`. Ctrl-C or SIGTERM saves and leaves; the same command with
--resume goes on as if nothing had happened, bit for bit on the same machine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast, set_seed
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers.utils import logging as transformers_logging

from audiotok.auto import FAMILIES
from audiotok.codec import AudioCodec
from audiotok.errors import AudioTokError, ConfigError, OutputExistsError, check_choice
from audiotok.recipes.command_line import run_command
from audiotok.recipes.training.codebook import MovingAverageBook, fit_nested_book
from audiotok.recipes.training.config import TrainConfig, load_config, to_dict
from audiotok.recipes.training.corpus import default_cache, hold_out, open_corpus
from audiotok.recipes.training.data import CropDataset, batch_loader, validation_set
from audiotok.recipes.training.discriminators import Adversary
from audiotok.recipes.training.distillation import Distillation, load_codec_teacher
from audiotok.recipes.training.lapped_start import check_lapped, lapped_start
from audiotok.recipes.training.latents import collect_latents
from audiotok.recipes.training.objective import Objective, forward_options, takes_noise, weighted_sum
from audiotok.recipes.training.reporting import RunningMeans, RunReport, loss_columns
from audiotok.recipes.training.residual_books import check_fittable, fit_residual_books
from audiotok.recipes.training.schedule import Moment, Schedule
from audiotok.recipes.training.state import Checkpoints, Progress, WeightAverage
from audiotok.recipes.training.stopping import StopWatch
from audiotok.recipes.training.validation import COLUMNS, LOWER_IS_BETTER, Validator

START_CROPS = 64  # that a lapped start looks at


class CodecTrainer:
    """One run: everything is built from the config, then `train()` tells the story.

    Args:
        config: of the run.
        data: the audiofolder.
        output: the run's folder.
        cache: where resampled corpora are kept.
        resume: continue from `output/last`.
        max_steps, max_minutes: stop (and save) there, with the schedule unchanged.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Path,
        output: Path,
        cache: Path,
        resume: bool = False,
        max_steps: int | None = None,
        max_minutes: float | None = None,
    ) -> None:
        self.config, self.output, self.console = config, output, Console()
        self.schedule = Schedule(config)
        self.last_step = min(self.schedule.total_steps, max_steps or self.schedule.total_steps)
        self.max_minutes = max_minutes
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=self._may_leave_unused())],
        )
        set_seed(config.seed)
        self._build_codec()
        self._build_data(data, cache)
        self._open_run(resume)

    # Building

    def _may_leave_unused(self) -> bool:
        """Teachers of absent domains, a book that is not searched and frozen parts leave some without a gradient."""
        parts_rest = any(stage.frozen for stage in self.config.stages)
        return bool(self.config.distillation.teachers) or self.config.codebook.update == "gradient" or parts_rest

    def _build_codec(self) -> None:
        """The codec, its moving average, its book, its optimizer and its losses."""
        family = FAMILIES[self.config.codec.family]
        codec = family.load("Model")(family.load("Config")(**self.config.codec.config)).to(self.accelerator.device)
        self._check_stages(codec)
        self.codec, self.sampling_rate = codec, codec.facts.sampling_rate
        self.book = self._build_book()
        self.average = WeightAverage(codec, self.config.optimizer.ema_decay)
        settings = self.config.optimizer
        self.trained = [parameter for parameter in codec.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            self.trained, betas=tuple(settings.betas), weight_decay=settings.weight_decay, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(codec, optimizer)
        self.objective = Objective(self.sampling_rate).to(self.accelerator.device)
        self.adversary: Adversary | None = None
        self.distillation: Distillation | None = None
        self.codec_teacher: AudioCodec | None = None

    def _check_stages(self, codec: AudioCodec) -> None:
        """A stage with noise instead of a search needs a codec that can do without one."""
        searchless = [stage.name for stage in self.schedule.stages if stage.latent_noise is not None]
        if self.config.codec.start == "lapped":
            check_lapped(codec)
        for stage in self.schedule.stages:
            for part in stage.frozen:
                check_choice(f"a part under stages.{stage.name}.frozen", part, dict(codec.named_children()))
        if self.config.codebook.update == "gradient" and any(stage.fit_codebook for stage in self.schedule.stages):
            check_fittable(codec.quantizer)
        if searchless and not takes_noise(codec):
            raise ConfigError(
                f"stages.{searchless[0]}.latent_noise: {type(codec).__name__} always searches its codebooks; leave "
                "latent_noise out."
            )

    def _build_book(self) -> MovingAverageBook | None:
        """What moves the rows of the book; None where they follow their gradient."""
        ranges = getattr(self.codec.config, "domain_ranges", None) or {}
        self.ranges = {name: (start, end) for name, (start, end) in ranges.items()}
        self.ranges["all"] = (0, max(self.codec.facts.codebook_sizes))
        settings = self.config.codebook
        if settings.update == "gradient":
            return None
        facts = self.codec.facts
        if not (facts.num_codebooks == 1 or facts.shared_codebook) or not getattr(
            self.codec.config, "normalize_latents", False
        ):
            raise ConfigError("codebook.update=ema needs one codebook and normalize_latents=true; or use gradient.")
        rows = self.codec.quantizer.stages[0].codebook.weight.requires_grad_(False)
        reduce, gather = self.accelerator.reduce, self.accelerator.gather
        return MovingAverageBook(rows, self.ranges, settings.decay, settings.revive_after, reduce, gather)

    def _build_data(self, folder: Path, cache: Path) -> None:
        data, settings = self.config.data, self.config.validation
        for name in data.domains.values():
            check_choice("a codec domain under data.domains", name, self.ranges)
        with self.accelerator.local_main_process_first():
            corpus = open_corpus(folder, cache, self.sampling_rate, data.speed_copies, self._bar)
        training, held_out = hold_out(corpus.clips, data.validation_fraction)
        weights, process = self.schedule.batch_weights, self.accelerator.process_index
        self.dataset = CropDataset(corpus, training, data, weights, self.config.seed, process)
        clips = validation_set(corpus, held_out, data, settings.clips, settings.seconds)
        self.validator = Validator(clips, self.sampling_rate, settings.intelligibility)

    def _bar(self, items: list[Any], label: str) -> Iterator[Any]:
        return iter(track(items, label, console=self.console, disable=not self.accelerator.is_main_process))

    def _open_run(self, resume: bool) -> None:
        """Load `last` or make sure that nothing is overwritten; the random states come last, so nothing moves them."""
        self.checkpoints = Checkpoints(self.output, self.accelerator, self.codec.config)
        self.progress, self.parts = Progress(), []
        self.accelerator.register_for_checkpointing(self.progress, self.average, *([self.book] if self.book else []))
        if resume:
            for part in self.checkpoints.parts():
                self._build_part(part)
            self.checkpoints.load()
        elif self.checkpoints.find():
            raise OutputExistsError(f"{self.output} already holds a run: add --resume, or name another folder.")
        else:
            if self.config.codec.start == "lapped":
                self._start_lapped()
            set_seed(self.config.seed, device_specific=True)
        self.report = self._open_report() if self.accelerator.is_main_process else None

    def _start_lapped(self) -> None:
        """The same in every process: crops of the first step, drawn by the seed alone."""
        rng = np.random.default_rng(self.config.seed)
        names = self.dataset.draw_domains(rng, self.config.data.domain_weights, START_CROPS)
        crops = np.stack([self.dataset.augmented_crop(rng, name) for name in names])[:, None]
        lapped_start(self.codec, torch.from_numpy(crops).to(self.accelerator.device))
        self.average.module.load_state_dict(self.codec.state_dict())

    def _open_report(self) -> RunReport:
        self.output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        (self.output / "config.yaml").write_text(text, encoding="utf-8")
        losses = loss_columns(self.schedule.stages)
        done, total = self.progress.step, self.schedule.total_steps
        return RunReport(self.output, losses, list(COLUMNS), self.sampling_rate, done, total, self.console)

    def _build_part(self, part: str) -> None:
        """A further network, built when the first stage that needs it begins."""
        config, rate = self.config, self.sampling_rate
        if part == "adversary":
            self.adversary = Adversary(config.adversarial, self.accelerator, rate)
        else:
            width = self.codec.config.hidden_size
            self.distillation = Distillation(config.distillation, self.accelerator, width, rate)
        self.parts.append(part)

    # The story

    def train(self) -> int:
        """Train to the end, a limit or a signal; returns the signal's number, or 0."""
        watch = StopWatch(self.accelerator, self.max_minutes)
        self.saved_at = time.monotonic()
        self.means, self.entered = RunningMeans(), None
        for step, micro_batches in self._steps():
            moment = self.schedule.at(step)
            self._enter_stage(moment)
            began = time.monotonic()
            for batch in micro_batches:
                self._learn(batch, moment)
            self.average.update(self.codec)
            self._count(time.monotonic() - began)
            self._report(moment)
            if watch.must_stop():
                break
        self._save()
        return watch.signal

    def _steps(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(step, its micro-batches), from where the run stands."""
        count = self.config.gradient_accumulation
        start, stop = self.progress.step, self.last_step
        batches = iter(batch_loader(self.dataset, start * count, stop * count, self.config.data.num_workers))
        for step in range(start, stop):
            yield step, [next(batches) for _ in range(count)]

    def _enter_stage(self, moment: Moment) -> None:
        """What happens before a stage's first step, and again where a run resumes in its middle."""
        if moment.stage is self.entered:
            return
        self.entered = moment.stage
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for part in moment.stage.frozen:
            self.codec.get_submodule(part).requires_grad_(False)
        if moment.weighs("adversarial", "feature_matching") and self.adversary is None:
            self._build_part("adversary")
        if moment.weighs("distillation"):
            self._engage_teachers()
        if moment.stage.fit_codebook and moment.stage.name not in self.progress.fitted_stages:
            if self.book:
                self._fit_book(self.book)
            else:
                self._fit_residual_books()
            self.progress.fitted_stages.append(moment.stage.name)

    def _engage_teachers(self) -> None:
        section = self.config.distillation
        if section.codec and self.codec_teacher is None:
            self.codec_teacher = load_codec_teacher(section.codec, self.codec)  # frozen: no part of a checkpoint
        elif section.teachers and self.distillation is None:
            self._build_part("distillation")

    def _fit_book(self, book: MovingAverageBook) -> None:
        """k-means on latents of training crops; the first process fits, the others receive its rows."""
        settings, rows = self.config.codebook, book.weight
        fitted = torch.zeros_like(rows)
        if self.accelerator.is_main_process:
            with self.console.status("fitting the book"):
                latents = self._latents_to_fit(self.codec.quantizer.project_in)
                found = fit_nested_book(latents, self.ranges, len(rows), settings.fit_iterations, self.config.seed)
            fitted += found.to(rows)
        book.restart(self.accelerator.reduce(fitted))

    def _fit_residual_books(self) -> None:
        """Projections and books of every stage; the first process fits, the others receive what it found."""
        quantizer, settings = self.codec.quantizer, self.config.codebook
        if self.accelerator.is_main_process:
            with self.console.status("fitting the books"):
                latents = torch.cat(list(self._latents_to_fit(lambda found: found).values()))
                on_cpu = copy.deepcopy(quantizer).cpu()
                left = fit_residual_books(on_cpu, latents, settings.fit_iterations, self.config.seed)
            quantizer.load_state_dict(on_cpu.state_dict())
            self.console.print(f"books fitted; of the latents' energy, {left[0]:.0%} to {left[-1]:.0%} is left")
        for parameter in quantizer.parameters():
            broadcast(parameter.data)
        self.average.module.quantizer.load_state_dict(quantizer.state_dict())

    def _latents_to_fit(self, project: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        weights, frames = self.config.data.domain_weights, self.config.codebook.fit_frames
        return collect_latents(self.codec, self.dataset, self.ranges, weights, frames, self.accelerator, project)

    def _learn(self, batch: dict[str, Any], moment: Moment) -> None:
        """One forward and backward pass; the weights move where a step's micro-batches are complete."""
        self.model.train()
        audio, domains = batch["input_values"].to(self.accelerator.device), batch["domain"]
        with self.accelerator.accumulate(*self._networks()):
            options = forward_options(self.codec, domains, self._noise(moment, len(audio)))
            if self.codec_teacher is not None and moment.weighs("distillation"):
                options["distillation_targets"] = self.codec.distillation_targets(self.codec_teacher, audio)
            out = self.model(audio, **options, **moment.stage.forward)
            z = self.codec.quantizer.project_in(out.latents) if self.book or moment.weighs("spread") else None
            terms = self.objective(out, audio, z, moment.stage.loss_weights)
            terms |= self._criticism(audio, out.audio_values, moment)
            if self.distillation and moment.weighs("distillation"):
                terms["distillation"] = self.distillation.comparison(out.distillation_features, audio, domains)
            total = weighted_sum(terms, moment.stage.loss_weights)
            self.accelerator.backward(total)
            self._update_weights(moment)
        if self.book and moment.quantizes:
            revive = moment.progress < self.config.codebook.revive_until
            # One code a latent: those of one book, or of one that all streams share, stream by stream.
            self.book.update(z.detach(), out.audio_codes.flatten(1), domains, revive)
        self.means.add({"total": total, **terms})

    def _networks(self) -> list[torch.nn.Module]:
        extra = [self.adversary and self.adversary.discriminators, self.distillation and self.distillation.comparison]
        return [self.model, *(network for network in extra if network is not None)]

    def _noise(self, moment: Moment, count: int) -> Tensor | None:
        """A standard deviation per clip, or None where the book is searched."""
        if moment.quantizes:
            return None
        return (torch.rand(count) * moment.stage.latent_noise).to(self.accelerator.device)

    def _criticism(self, real: Tensor, fake: Tensor, moment: Moment) -> dict[str, Tensor]:
        """Let the discriminators learn, and (after their warm-up) say what they see."""
        if self.adversary is None or not moment.weighs("adversarial", "feature_matching"):
            return {}
        real, fake = self.adversary.excerpt(real, fake)
        if moment.step % self.config.adversarial.every == 0:
            self.means.add({"discriminator": self.adversary.learn(real, fake, moment.learning_rate_factor)})
        if moment.step < moment.stage.discriminator_warmup:
            return {}
        return {name: term for name, term in self.adversary.criticise(real, fake).items() if moment.weighs(name)}

    def _update_weights(self, moment: Moment) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = moment.learning_rate
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.trained, self.config.optimizer.clip_norm)
            self.means.add({"gradient_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.distillation and moment.weighs("distillation"):
            self.distillation.update(moment.learning_rate)

    # Counting, reporting, saving

    def _count(self, seconds: float) -> None:
        data = self.config.data
        crops = data.batch_size * self.config.gradient_accumulation * self.accelerator.num_processes
        self.progress.step += 1
        self.progress.seconds += seconds
        self.progress.audio_seconds += crops * data.crop_seconds
        self.means.add({"audio_seconds_per_second": torch.tensor(crops * data.crop_seconds / seconds)})

    def _report(self, moment: Moment) -> None:
        step, settings = self.progress.step, self.config.validation
        if step % self.config.log_every == 0 or moment.is_last:
            self._log(moment)
        if step % settings.every_steps == 0 or moment.is_last:
            self._validate(moment)
        if time.monotonic() - self.saved_at > self.config.checkpoint_every_minutes * 60:
            self._save()

    def _log(self, moment: Moment) -> None:
        means = self.means.take()
        if not np.isfinite(means["total"]):
            raise AudioTokError(
                f"The loss is {means['total']} at step {self.progress.step}: lower the learning rate and --resume "
                f"from {self.output / 'last'}."
            )
        if self.report:
            self.report.training_row({**self._where(moment), "learning_rate": moment.learning_rate, **means})

    def _where(self, moment: Moment) -> dict[str, Any]:
        seconds = round(self.progress.seconds, 1)
        return {"step": self.progress.step, "stage": moment.stage.name, "seconds": seconds}

    def _validate(self, moment: Moment) -> None:
        """Judge the averaged weights; keep them as `best` where they are the best quantized ones so far."""
        if self.report:
            figures, outputs = self.validator(self.average.module, moment.quantizes)
            self.report.validation_row({**self._where(moment), **figures})
            self._keep_best(figures, moment)
            every = self.config.validation.samples_every
            if every and (self.progress.step % every == 0 or moment.is_last):
                self.report.draw_curves()
                self.report.samples(self.progress.step, self.validator.clips, outputs, self.config.validation.samples)
        self.accelerator.wait_for_everyone()

    def _keep_best(self, figures: dict[str, float], moment: Moment) -> None:
        name, best = self.config.validation.best_by, self.progress.best_score
        score = -figures[name] if name in LOWER_IS_BETTER else figures[name]
        if moment.quantizes and (best is None or score > best):
            self.progress.best_score = score
            self.checkpoints.export("best", self.average.module)

    def _save(self) -> None:
        self.checkpoints.save(self.parts)
        if self.accelerator.is_main_process:
            self.checkpoints.export("ema", self.average.module)
        self.saved_at = time.monotonic()


def main(
    config: Annotated[Path, typer.Argument(help="YAML of the run.", exists=True, dir_okay=False)],
    data: Annotated[Path, typer.Option(help="Audiofolder: metadata.csv with file_name and domain.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from OUTPUT/last.")] = False,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this step.", min=1)] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.", min=0)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key.name=value, overrides the YAML.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where resampled corpora are kept.")] = None,
) -> None:
    """Train a codec and leave its averaged weights in OUTPUT/best."""
    transformers_logging.disable_progress_bar()
    run = load_config(config, settings or [])
    trainer = CodecTrainer(run, data, output, cache or default_cache(), resume, max_steps, max_minutes)
    stopped_by = trainer.train()
    raise typer.Exit(128 + stopped_by if stopped_by else 0)


if __name__ == "__main__":
    run_command(main)
