"""The keys of the profiler, which says where the time of a few steps went."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tessera.config.sections.section import Section
from tessera.core.errors import UserError
from tessera.sizes import bounds

_STEPS = 3
_WARM = 2
"""Steps of a run that are slower than those after them: memory is taken, libraries choose their algorithms."""


class ProfilerKeys(Section):
    """Which steps are profiled, and on which ranks."""

    use_profiler: bool | None = Field(
        None,
        description="Record a few steps with torch's profiler: a trace of each and a table of where the time went, in "
        "output_dir/profile. Unset: when profiler_steps is given; false: never.",
    )
    profiler_steps: int | None = Field(
        None,
        ge=1,
        le=bounds.PROFILED,
        description=f"Optimizer steps that are profiled. Unset, with use_profiler: {_STEPS}.",
    )
    profiler_steps_start: int | None = Field(
        None,
        ge=0,
        le=bounds.STEPS,
        description=f"Optimizer steps of the run before the first one that is profiled. Unset: {_WARM} from where the "
        "run begins or goes on, fewer in a short run.",
    )
    profiler_ranks: Literal["first", "all"] = Field(
        "first", description="Which ranks write a trace and a table: the first alone, or each its own."
    )

    @model_validator(mode="after")
    def _what_is_profiled_is_said_only_where_something_is(self) -> Self:
        if self.use_profiler is None and self.profiler_steps is None:
            for key, nothing in (("profiler_steps_start", (None, 0)), ("profiler_ranks", ("first",))):
                if (value := getattr(self, key)) not in nothing:
                    raise UserError(key, value, "nothing is profiled", "write use_profiler: true, or leave it out")
        return self

    def profiled(self, done: int, total: int, rank: int) -> range:
        """The numbers of the steps that this rank profiles in a run with `done` of its `total` steps; often none."""
        asked = self.use_profiler or self.use_profiler is None and self.profiler_steps
        if not asked or rank and self.profiler_ranks == "first":
            return range(0)
        count, start = self.profiler_steps or _STEPS, self.profiler_steps_start
        if start is None:
            start = max(done, min(done + _WARM, total - count))
        return range(max(start, done) + 1, min(start + count, total) + 1)
