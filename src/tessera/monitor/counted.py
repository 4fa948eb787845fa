"""Which steps of a run are counted whole by kind of memory: the second one, and later ones as memory changes."""

from collections.abc import Sequence

COUNTED_STEP = 2
"""The first of them: the first that has the optimizer's state from its begin."""
APART, MOST_APART = 50, 100
"""Steps from one to the next: to count makes a step slower by a quarter (docs/monitoring.md), of 50 steps 0.5%."""
RISE = 1.01
"""What a rank's peak has risen by when a step is counted before it is due."""


class CountedSteps:
    """Every rank makes the same calls with the same numbers, so that all count the same steps.

    E.g. with a report after every step, and a peak that rises at step 60 and no more: steps 2, 61, 161, 261, ...
    """

    def __init__(self) -> None:
        self._last, self._next = 0, COUNTED_STEP
        self._peaks: list[int] = []

    def next_is(self, step: int) -> bool:
        """Whether `step`, which begins now, is to be counted."""
        if step < self._next:
            return False
        self._last, self._next, self._peaks = step, step + MOST_APART, []
        return True

    def reported(self, step: int, peaks: Sequence[int]) -> None:
        """After `step` the peak bytes of the ranks so far were these."""
        if not self._peaks:
            self._peaks = [*peaks]
        elif any(now > RISE * before for now, before in zip(peaks, self._peaks, strict=True)):
            self._next = min(self._next, max(step + 1, self._last + APART))
