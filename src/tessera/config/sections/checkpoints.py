"""The keys that say when a run is saved, and from which checkpoint it goes on."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tessera.config.sections.section import LocalPath, Section
from tessera.core.errors import UserError
from tessera.sizes import bounds


def _yaml_no(value: object) -> object:
    return "no" if value is False else value  # YAML reads a bare `no` as false


class CheckpointKeys(Section):
    """When checkpoints are written, and which one the run resumes from."""

    save_strategy: Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_yaml_no)] = Field(
        "steps",
        description="When checkpoints are written, besides that of the run's end: every save_steps (steps), or at the "
        "end of each epoch. no: none at all, but for a run that is asked to stop.",
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        le=bounds.STEPS,
        description="Optimizer steps between checkpoints. Unset: one at the end of the run.",
    )
    save_total_limit: int | None = Field(
        None, ge=1, le=bounds.STEPS, description="Checkpoints kept, the newest ones. Unset: all."
    )
    save_async: bool = Field(
        True,
        description="Write a checkpoint while training goes on, from a copy of model and optimizer in host memory.",
    )
    resume_from_checkpoint: LocalPath | bool | None = Field(
        None, description="A checkpoint-N folder to go on from; true: the latest whole one in output_dir."
    )
    auto_resume_from_checkpoints: bool = Field(
        False, description="Go on from the latest whole checkpoint in output_dir if there is one."
    )

    @model_validator(mode="after")
    def _steps_are_given_only_to_a_strategy_that_saves(self) -> Self:
        if self.save_strategy != "steps" and self.save_steps is not None:
            reason = f"save_strategy is {self.save_strategy}"
            raise UserError("save_steps", self.save_steps, reason, "leave one of the two out")
        return self
