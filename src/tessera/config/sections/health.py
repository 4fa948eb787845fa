"""The keys that say what a run does when something goes wrong."""

from typing import Literal

from pydantic import Field

from tessera.config.sections.section import Section
from tessera.sizes import bounds


class HealthKeys(Section):
    """What is checked during a run, and what ends it."""

    nonfinite_step: Literal["stop", "skip"] = Field(
        "stop",
        description="A step whose loss or gradient is not finite never changes weights; it ends the run, or is skipped "
        "and counted (10 in a row end it).",
    )
    check_replicas_steps: int | None = Field(
        100,
        ge=1,
        le=bounds.STEPS,
        description="Optimizer steps between comparisons, by hash, of weights that several ranks hold alike; they are "
        "compared before each save too. null: never.",
    )
