"""The keys that say how large a step is and how many steps a run has."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from tessera.config.sections.section import Section
from tessera.sizes import bounds


def _no_limit(value: object) -> object:
    """transformers writes -1 for no limit."""
    return None if value == -1 and type(value) is int else value


class BatchKeys(Section):
    """The size of a step and the length of the run."""

    micro_batch_size: int = Field(
        1, ge=1, le=bounds.ROWS, description="Rows in one forward and backward of a model replica."
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=bounds.MICRO_BATCHES,
        description="Micro batches whose gradients are summed before one optimizer step.",
    )
    num_epochs: float = Field(
        1, gt=0, le=bounds.EPOCHS, description="Passes over the data; max_steps, when given, decides instead."
    )
    max_steps: Annotated[int | None, BeforeValidator(_no_limit)] = Field(
        None, ge=1, le=bounds.STEPS, description="Optimizer steps of the run. Unset or -1: from num_epochs."
    )
