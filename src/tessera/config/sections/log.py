"""The keys that say how often a run reports and evaluates."""

from pydantic import Field

from tessera.config.sections.section import Section
from tessera.sizes import bounds


class LogKeys(Section):
    """How often the run prints a line, and how often it evaluates."""

    logging_steps: int = Field(
        1, ge=1, le=bounds.STEPS, description="Optimizer steps between two lines on the terminal."
    )
    eval_steps: int | None = Field(
        None, ge=1, le=bounds.STEPS, description="Optimizer steps between evaluations. Unset: once, at the end."
    )
