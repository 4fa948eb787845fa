"""The keys that say when a run is saved, which checkpoint is its best, and from which one it goes on."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tessera.config.sections.section import LocalPath, Section
from tessera.config.sections.steps import StepsOrShare
from tessera.core.errors import UserError
from tessera.sizes import bounds


def yaml_no(value: object) -> object:
    """YAML reads a bare `no` as false."""
    return "no" if value is False else value


def _full_name(value: object) -> object:
    """`loss` is the loss of evaluation, as in transformers."""
    return f"eval_{value}" if value in ("loss", "ppl", "perplexity") else value


class CheckpointKeys(Section):
    """When checkpoints are written, and which one the run resumes from."""

    save_strategy: Annotated[Literal["no", "steps", "epoch", "best"], BeforeValidator(yaml_no)] = Field(
        "steps",
        description="steps: a checkpoint every save_steps; epoch: at the end of each epoch; best: after each "
        "evaluation that is better than all before. Each of them also saves the last step. no: none at all, unless "
        "the run is asked to stop.",
    )
    save_steps: StepsOrShare | None = Field(
        None,
        gt=0,
        le=bounds.STEPS,
        description="Optimizer steps between checkpoints; a number below 1 is a share of all steps, rounded up. "
        "Unset: only the last step is saved, not every 500 steps as in transformers.",
    )
    saves_per_epoch: int | None = Field(
        None,
        ge=0,
        le=bounds.STEPS,
        description="Checkpoints an epoch, instead of save_steps: all steps / (saves_per_epoch · num_epochs) lie "
        "between two. 0: as unset.",
    )
    save_first_step: bool = Field(
        False, description="Save the first step too, to see early that a checkpoint can be written."
    )
    save_total_limit: int | None = Field(
        None,
        ge=1,
        le=bounds.STEPS,
        description="Checkpoints kept: the newest, and the best where evaluations are compared. Unset: all.",
    )
    save_only_model: bool = Field(
        False,
        description="Checkpoints without the optimizer's state, a third of the size: a run that resumes from one "
        "starts its optimizer from zero.",
    )
    save_async: bool = Field(
        True,
        description="Write a checkpoint while training goes on, from a copy of model and optimizer in host memory.",
    )
    metric_for_best_model: Annotated[
        Literal["eval_loss", "eval_ppl", "eval_perplexity"] | None, BeforeValidator(_full_name)
    ] = Field(
        None,
        description="The number by which evaluations are compared: eval_loss, or its exponential eval_ppl. Unset: "
        "eval_loss where a key needs it.",
    )
    greater_is_better: bool | None = Field(
        None, description="Whether the greater metric_for_best_model is the better. Unset: the smaller is."
    )
    load_best_model_at_end: bool = Field(
        False,
        description="Hand out the model of the best checkpoint instead of the last step's. Whatever save_strategy "
        "says, a checkpoint is written after each evaluation that is better than all before.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=0,
        le=bounds.STEPS,
        description="End the run when this many evaluations in a row are not better than the best one. 0: never.",
    )
    resume_from_checkpoint: LocalPath | bool | None = Field(
        None, description="A checkpoint-N folder to go on from; true: the latest whole one in output_dir."
    )
    auto_resume_from_checkpoints: bool = Field(
        False, description="Go on from the latest whole checkpoint in output_dir if there is one."
    )

    @property
    def compares_evaluations(self) -> str:
        """The key for which evaluations are compared; empty where none is."""
        asked = {
            "save_strategy": self.save_strategy == "best",
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience,
            "metric_for_best_model": self.metric_for_best_model,
        }
        return next((key for key, value in asked.items() if value), "")

    @model_validator(mode="after")
    def _steps_are_given_only_to_a_strategy_that_saves(self) -> Self:
        for key in ("save_steps", "saves_per_epoch"):
            value = getattr(self, key)
            if self.save_strategy != "steps" and value:
                reason = f"save_strategy is {self.save_strategy}"
                raise UserError(key, value, reason, "leave one of the two out")
        if self.saves_per_epoch and self.save_steps is not None:
            raise UserError("saves_per_epoch", self.saves_per_epoch, "save_steps is given too", "give one of the two")
        if self.save_first_step and self.save_strategy == "no":
            raise UserError("save_first_step", True, "save_strategy is no", "leave one of the two out")
        if self.load_best_model_at_end and self.save_strategy == "no":
            hint = "write save_strategy: best, or leave load_best_model_at_end out"
            raise UserError("load_best_model_at_end", True, "no checkpoint is saved", hint)
        return self
