"""The keys that say how often a run reports and evaluates."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tessera.config.sections.checkpoints import yaml_no
from tessera.config.sections.section import Section
from tessera.config.sections.steps import StepsOrShare
from tessera.core.errors import UserError
from tessera.sizes import bounds


class LogKeys(Section):
    """How often the run prints a line, and how often it evaluates."""

    logging_steps: int = Field(
        1, ge=1, le=bounds.STEPS, description="Optimizer steps between two lines on the terminal."
    )
    monitor: bool = Field(
        True,
        description="Measure where each step's time and memory go, on every rank: compute, communication by mesh axis, "
        "waiting for data and for slower ranks. The second step is counted whole by kind of memory, and takes longer.",
    )
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], BeforeValidator(yaml_no)] | None = Field(
        None,
        description="When eval_loss is measured on the rows held out. steps: every eval_steps, and at the end of the "
        "run; epoch: at the end of each epoch and of the run; no: never. Unset: steps where eval_steps or "
        "evals_per_epoch is given, else only at the end of the run.",
    )
    eval_steps: StepsOrShare | None = Field(
        None,
        gt=0,
        le=bounds.STEPS,
        description="Optimizer steps between evaluations; a number below 1 is a share of all steps, rounded up. "
        "Unset with eval_strategy: steps: logging_steps.",
    )
    evals_per_epoch: int | None = Field(
        None,
        ge=0,
        le=bounds.STEPS,
        description="Evaluations an epoch, instead of eval_steps: all steps / (evals_per_epoch · num_epochs) lie "
        "between two. 0: as unset.",
    )

    @model_validator(mode="after")
    def _evaluations_are_counted_in_one_way(self) -> Self:
        strategy = self.eval_strategy
        for key in ("eval_steps", "evals_per_epoch"):
            value = getattr(self, key)
            if value and strategy not in (None, "steps"):
                raise UserError(key, value, f"eval_strategy is {strategy}", "leave one of the two out")
        if self.evals_per_epoch and self.eval_steps is not None:
            raise UserError("evals_per_epoch", self.evals_per_epoch, "eval_steps is given too", "give one of the two")
        return self
