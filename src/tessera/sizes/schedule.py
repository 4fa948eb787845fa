"""Schedules: how the operands of a product move.

gather   one collective for each operand; with S slices, S panels, each gathered while the last one multiplies
summa    panels broadcast along rows and columns of the grid (van de Geijn & Watts 1997)
cannon   operands skewed, then shifted to the neighbour (Cannon 1969)
"""

from dataclasses import dataclass

LOOPS = ("summa", "cannon")
SCHEDULES = ("gather", *LOOPS)


@dataclass(frozen=True)
class Schedule:
    """How operands move. All schedules give the same numbers.

    `slices` cuts a gathered product into so many panels. The switches are those of the gathered product: `keep` saves
    gathered X and W for the backward instead of gathering them again; `prefetch` gathers the weights of the next
    product before this one multiplies; `defer` waits for the sum of a weight's gradient after the next one is issued;
    `overlap` lets the sum of the input's gradient travel during the product of the weight's.
    """

    name: str = "gather"
    slices: int = 1
    keep: bool = False
    prefetch: bool = False
    defer: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.name!r}; there are {', '.join(SCHEDULES)}")
        if self.slices < 1 or self.name != "gather" and (self.slices > 1 or self.keep):
            raise ValueError(f"{self}: the loops move one panel at a time; slices and keep are for gather")

    @property
    def in_panels(self) -> bool:
        """Whether products run panel by panel (product/panels.py) instead of as one (product/gathered.py)."""
        return self.name != "gather" or self.slices > 1

    def __str__(self) -> str:
        return f"slices {self.slices}" if self.slices > 1 else self.name


GATHER = Schedule()
