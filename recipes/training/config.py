"""The YAML of a training run as dataclasses: every key typed, every unknown key refused.

One file describes one checkpoint. `load_config` reads it, applies `--set key=value` overrides and checks it;
the rest of the recipe only ever sees a `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from audiotok.auto import FAMILIES
from audiotok.codec import AudioCodec
from audiotok.errors import ConfigError, check_choice
from audiotok.recipes.training.strict import apply_override, build

# Losses that the recipe computes; a codec adds its own (`AudioCodec.loss_names`).
LOSS_NAMES = (
    "mel",
    "mel_convergence",
    "stft",
    "waveform",
    "spread",
    "correlation",
    "adversarial",
    "feature_matching",
    "distillation",
)


@dataclass
class CodecSection:
    """Which codec is trained: the family's name and the keys of its config class.

    Attributes:
        start: weights before the first step: "random", or "lapped", which spares a codec of waveforms its first hours;
            see `audiotok.recipes.training.lapped_start`.
    """

    family: str = "auv"
    config: dict[str, Any] = field(default_factory=dict)
    start: str = "random"


@dataclass
class DataSection:
    """What a batch is made of.

    Attributes:
        domains: value of the metadata's `domain` column -> the codec's domain (its code range).
        domain_weights: share of each metadata domain among the crops; inside a domain clips count by duration.
        crop_seconds: length of a crop.
        batch_size: crops per process and forward pass.
        speed_copies: metadata domain -> factors of copies resampled into the cache (pitch and tempo move).
        gain_db: each crop is scaled by a gain drawn from +- this.
        flip_polarity: multiply half of the crops by -1.
        mix_probability: how often a second crop of the same domain is added.
        mix_level_db: range of the second crop's gain.
        min_peak: crops below this peak are drawn again, a few times.
        validation_fraction: share of speakers or recordings that never enter training.
        num_workers: processes that cut crops; 0 cuts them in the training process.
    """

    domains: dict[str, str] = field(default_factory=dict)
    domain_weights: dict[str, float] = field(default_factory=dict)
    crop_seconds: float = 1.0
    batch_size: int = 8
    speed_copies: dict[str, list[float]] = field(default_factory=dict)
    gain_db: float = 6.0
    flip_polarity: bool = True
    mix_probability: float = 0.0
    mix_level_db: list[float] = field(default_factory=lambda: [-15.0, -3.0])
    min_peak: float = 1e-3
    validation_fraction: float = 0.05
    num_workers: int = 0


@dataclass
class OptimizerSection:
    """AdamW, gradient clipping and the moving average of the weights."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass
class CodebookSection:
    """How the rows of the book learn.

    Attributes:
        update: `ema` (rows follow the latents) or `gradient` (rows follow the loss `codebook`).
        decay: of the moving sums, per forward pass.
        revive_after: forward passes without a hit after which a row is replaced by a latent; 0 = never.
        revive_until: share of the stage after which nothing is revived any more.
        fit_frames: latents per group of the k-means fit; groups are the code ranges, narrowest first.
        fit_iterations: k-means iterations per group.
    """

    update: str = "ema"
    decay: float = 0.99
    revive_after: int = 800
    revive_until: float = 0.8
    fit_frames: int = 90_000
    fit_iterations: int = 6


@dataclass
class StageSection:
    """One stretch of training with its own loss weights and learning rate.

    Attributes:
        latent_noise: largest standard deviation of the noise that stands in for the quantizer (drawn per clip);
            null searches the book.
        fit_codebook: k-means on the latents before the stage's first step.
        warmup_steps, flat_fraction, final_fraction: the rate climbs linearly, stays until `flat_fraction` of
            the stage and falls linearly to `final_fraction` of itself.
        discriminator_warmup: steps at the start in which only the discriminators learn.
        frozen: parts of the codec that stay as they are in this stage, by name: `encoder`, `quantizer`.
        domain_weights: instead of those under `data`, in this stage.
        forward: further keywords of the codec's `forward` in this stage, as `level: 6.0` of VRVQ.
    """

    name: str = ""
    steps: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    flat_fraction: float = 1.0
    final_fraction: float = 1.0
    latent_noise: float | None = None
    fit_codebook: bool = False
    frozen: list[str] = field(default_factory=list)
    discriminator_warmup: int = 0
    loss_weights: dict[str, float] = field(default_factory=dict)
    domain_weights: dict[str, float] | None = None
    forward: dict[str, Any] = field(default_factory=dict)


@dataclass
class AdversarialSection:
    """Discriminators; built when a stage that weighs `adversarial` or `feature_matching` begins.

    Attributes:
        clips, crop_seconds: the part of each batch that they see (their cost is several times the codec's).
        every: a discriminator update every so many steps.
    """

    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])
    period_channels: int = 8
    fft_sizes: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    fft_channels: int = 12
    learning_rate: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.8, 0.99])
    clips: int = 4
    crop_seconds: float = 0.5
    every: int = 1


@dataclass
class TeacherSection:
    """A frozen transformers model (folder or hub name) and which of its hidden states teaches."""

    model: str = ""
    layer: int = -1


@dataclass
class DistillationSection:
    """Who teaches; loaded when a stage that weighs `distillation` begins.

    Attributes:
        teachers: frozen transformers models by the codec's domain.
        codec: in place of them, another codec of the same family, by folder or name, where the family can learn from
            one (a causal APCodec from a centred one of the same sizes).
    """

    teachers: dict[str, TeacherSection] = field(default_factory=dict)
    codec: str = ""


@dataclass
class ValidationSection:
    """When and on what the moving average is judged.

    Attributes:
        every_steps: validation interval; the stage's last step always validates.
        clips: held-out clips, spread over the domains by their share.
        seconds: how much of each clip.
        intelligibility: STOI and ESTOI of the speech clips (needs pystoi).
        best_by: which figure decides what weights are `best`: mel_distance, stoi or estoi.
        samples_every: `curves.png`, audio and spectrograms at validations of every so many steps; 0 = never.
        samples: clips to write.
    """

    every_steps: int = 500
    clips: int = 32
    seconds: float = 3.0
    intelligibility: bool = True
    best_by: str = "mel_distance"
    samples_every: int = 2000
    samples: int = 3


@dataclass
class TrainConfig:
    """A whole run."""

    seed: int = 0
    mixed_precision: str = "no"
    gradient_accumulation: int = 1
    log_every: int = 20
    checkpoint_every_minutes: float = 5.0
    codec: CodecSection = field(default_factory=CodecSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    codebook: CodebookSection = field(default_factory=CodebookSection)
    adversarial: AdversarialSection = field(default_factory=AdversarialSection)
    distillation: DistillationSection = field(default_factory=DistillationSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    stages: list[StageSection] = field(default_factory=list)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply `a.b.c=value` overrides, check everything.

    Raises:
        ConfigError: no YAML, an unknown key (with a suggestion), a wrong type, or values that make no sense together.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration {path} could not be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration {path} must hold keys and values, not {type(values).__name__}.")
    for override in overrides:
        apply_override(values, override)
    config = build(TrainConfig, values)
    _check(config)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values, as written beside a checkpoint."""
    return dataclasses.asdict(config)


def _check(config: TrainConfig) -> None:
    check_choice("codec.family", config.codec.family, FAMILIES)
    check_choice("codec.start", config.codec.start, ("random", "lapped"))
    check_choice("mixed_precision", config.mixed_precision, ("no", "bf16", "fp16"))
    check_choice("codebook.update", config.codebook.update, ("ema", "gradient"))
    data = config.data
    for name in ("crop_seconds", "batch_size"):
        if getattr(data, name) <= 0:
            raise ConfigError(f"data.{name}={getattr(data, name)} is not legal: it must be above 0.")
    if not 0 <= data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={data.validation_fraction} is not legal: 0 <= fraction < 1.")
    _check_domains(config)
    best_by = config.validation.best_by
    check_choice("validation.best_by", best_by, ("mel_distance", "stoi", "estoi"))
    if best_by != "mel_distance" and not config.validation.intelligibility:
        raise ConfigError(f"validation.best_by={best_by} needs validation.intelligibility=true.")
    names = [stage.name for stage in config.stages]
    if not any(stage.steps > 0 for stage in config.stages) or not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"stages={names}: each needs a name of its own, and one at least 1 step.")
    for stage in config.stages:
        _check_stage(stage, config)


def _check_domains(config: TrainConfig) -> None:
    groups = [config.data.domain_weights, config.data.speed_copies]
    groups += [stage.domain_weights for stage in config.stages if stage.domain_weights]
    for name in (name for group in groups for name in group):
        check_choice("a domain under data or stages", name, config.data.domains)
    if not any(weight > 0 for weight in config.data.domain_weights.values()):
        raise ConfigError("data.domain_weights must give at least one domain a weight above 0.")


def _check_stage(stage: StageSection, config: TrainConfig) -> None:
    where, model = f"stages.{stage.name}", FAMILIES[config.codec.family].load("Model")
    legal = (*LOSS_NAMES, *model.loss_names)
    for name in stage.forward:
        check_choice(f"a keyword under {where}.forward", name, inspect.signature(model.forward).parameters)
    for name in stage.loss_weights:
        check_choice(f"a loss under {where}.loss_weights", name, legal)
    weighted = [name for name, weight in stage.loss_weights.items() if weight]
    if not weighted:
        raise ConfigError(f"{where} weighs no loss: give loss_weights for some of {', '.join(legal)}.")
    searchless = stage.latent_noise is not None
    if searchless and (stage.fit_codebook or "commitment" in weighted or "codebook" in weighted):
        raise ConfigError(
            f"{where}: with latent_noise no code is searched, so there is no commitment, codebook or fit_codebook."
        )
    if "distillation" in weighted:
        _check_distillation(where, model, config.distillation)


def _check_distillation(where: str, model: type[AudioCodec], section: DistillationSection) -> None:
    if bool(section.teachers) == bool(section.codec):
        raise ConfigError(
            f"{where} weighs distillation: name models under distillation.teachers, or a codec as distillation.codec; "
            "one of the two."
        )
    if section.codec and not hasattr(model, "distillation_targets"):
        raise ConfigError(f"distillation.codec: {model.__name__} learns from distillation.teachers alone.")
