"""Which stage a step belongs to, and its learning rate: pure functions of the step, so nothing of it is saved."""

from __future__ import annotations

from dataclasses import dataclass

from audiotok.recipes.training.config import StageSection, TrainConfig


@dataclass(frozen=True)
class Moment:
    """A step seen from its stage: `step` counts from the stage's start."""

    stage: StageSection
    step: int

    @property
    def progress(self) -> float:
        """Share of the stage that lies behind, in [0, 1)."""
        return self.step / self.stage.steps

    @property
    def is_last(self) -> bool:
        return self.step == self.stage.steps - 1

    @property
    def learning_rate_factor(self) -> float:
        """Linear warm-up, flat until `flat_fraction`, then linear to `final_fraction`."""
        stage = self.stage
        warm_up = min(1.0, (self.step + 1) / max(stage.warmup_steps, 1))
        falling = max(0.0, self.progress - stage.flat_fraction) / max(1 - stage.flat_fraction, 1e-9)
        return warm_up * (1 - falling * (1 - stage.final_fraction))

    @property
    def learning_rate(self) -> float:
        return self.stage.learning_rate * self.learning_rate_factor

    @property
    def quantizes(self) -> bool:
        return self.stage.latent_noise is None

    def weighs(self, *losses: str) -> bool:
        """Whether the stage gives any of these losses a weight."""
        return any(self.stage.loss_weights.get(loss, 0.0) for loss in losses)


class Schedule:
    """The stages laid end to end; those of 0 steps are left out."""

    def __init__(self, config: TrainConfig) -> None:
        self.stages = [stage for stage in config.stages if stage.steps > 0]
        self.total_steps = sum(stage.steps for stage in self.stages)
        self.domain_weights = config.data.domain_weights
        self.micro_batches = config.gradient_accumulation

    def at(self, step: int) -> Moment:
        for stage in self.stages:
            if step < stage.steps:
                return Moment(stage, step)
            step -= stage.steps
        raise IndexError(f"Step {step} lies beyond the last stage.")

    def batch_weights(self, batch: int) -> dict[str, float]:
        """Share of each metadata domain in a batch, counted over all micro-batches of the run."""
        return self.at(batch // self.micro_batches).stage.domain_weights or self.domain_weights
