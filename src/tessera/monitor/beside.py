"""What was measured of a run beside what was predicted, and which term is to blame where that is more."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from tessera.core.pages import OUT_OF_MEMORY, SLOW
from tessera.core.text import human
from tessera.monitor.predicted import Prediction, milliseconds

SETTLING = 3
"""Steps of a process that do not count: the first are slow, of the second memory is counted."""
ENOUGH = 5
"""Steps that count before anything is said of time."""
KEPT = 1000
"""The last steps, and the last reports, of which medians are taken."""
LARGER = 1.03
"""A peak is larger than predicted from so many times the prediction on,"""
FEW_BYTES = 2**20
"""and by more than this: what libraries take inside an operator is in no formula."""


class Beside:
    """Follows the records of a run on its first rank, beside its prediction."""

    def __init__(self, prediction: Prediction) -> None:
        self.prediction = prediction
        self._done = self._reported = 0  # steps of this process; those before the last report
        self._steps: deque[float] = deque(maxlen=KEPT)
        self._reports: deque[dict[str, float]] = deque(maxlen=KEPT)
        self._kinds: dict[str, float] = {}

    def step(self, record: Mapping[str, Any], profiled: bool) -> None:
        """Take the line of metrics.jsonl of the next step. A `profiled` step is slower than it would be."""
        self._done += 1
        if self._done > SETTLING and not profiled:
            self._steps.append(record["step_seconds"])
        self._kinds = record.get("memory", {}).get("kinds_gib") or self._kinds
        if "memory" not in record:
            return
        seconds, before = record.get("seconds"), self._reported
        self._reported = self._done
        if seconds and before >= SETTLING:  # none of the first steps is in it
            self._reports.append(by_name(seconds))

    @property
    def seconds(self) -> dict[str, float]:
        """The median seconds of a step by term, communication as `communication along col`; empty: not known yet."""
        terms = dict.fromkeys(term for report in self._reports for term in report)
        return {term: median(report.get(term, 0.0) for report in self._reports) for term in terms}

    def record(self) -> dict[str, Any]:
        """Both and what took more, as they stand in summary.json."""
        measured = {
            "step_seconds": median(self._steps) if self._steps else None,
            "steps": len(self._steps),
            "seconds": self.seconds,
            "kinds_gib": self._kinds,
        }
        return {"predicted": self.prediction.record(), "measured": measured, "more_than_predicted": self.more()}

    def more(self) -> list[str]:
        """A line on time and one on memory, where a run took more of it than was predicted, with the term."""
        return [line for line in (self._slower(), self._larger()) if line]

    def _slower(self) -> str | None:
        """None too where the profile was not measured on this machine: then the time is a guess."""
        expected = self.prediction
        if not expected.measured_here or len(self._steps) < ENOUGH:
            return None
        step = median(self._steps)
        if step <= expected.step_seconds * (1 + expected.band):
            return None
        told = f"{milliseconds(step)} a step against {milliseconds(expected.step_seconds, '')} ± {expected.band:.0%}"
        measured, predicted = self.seconds, by_name(expected.seconds)
        blamed = _most_above(measured, predicted)
        if blamed is not None:
            both = f"{milliseconds(measured[blamed], '')} against {milliseconds(predicted.get(blamed, 0.0))}"
            told += f"; most of it {blamed} ({both})"
        return f"slower than predicted: {told}; see {SLOW}"

    def _larger(self) -> str | None:
        predicted = _joined(self.prediction.kinds)
        measured = _joined({kind: size * 2**30 for kind, size in self._kinds.items()})
        held, expected = sum(measured.values()), sum(predicted.values())
        if held <= max(LARGER * expected, expected + FEW_BYTES):
            return None
        told = f"{human(held)} at the peak against {human(expected)}"
        blamed = _most_above(measured, predicted)
        if blamed is not None:
            told += f"; most of it {blamed} ({human(measured[blamed])} against {human(predicted.get(blamed, 0.0))})"
        return f"larger than predicted: {told}; see {OUT_OF_MEMORY}"


def by_name(seconds: Mapping[str, Any]) -> dict[str, float]:
    """The terms that make up a step, of an object in the form of `seconds` in metrics.jsonl, each under one name."""
    own = {term: seconds[term] for term in ("compute", "data", "optimizer", "idle", "other")}
    return own | {f"communication along {axes}": spent for axes, spent in seconds["communication"].items()}


def _joined(kinds: Mapping[str, float]) -> dict[str, float]:
    """The kinds that planner and monitor tell apart alike: what is an activation depends on when it was made."""
    both = sum(kinds.get(kind, 0.0) for kind in ("activations", "other"))
    return {kind: kinds.get(kind, 0.0) for kind in ("states", "gathered")} | {"activations and other": both}


def _most_above(measured: Mapping[str, float], predicted: Mapping[str, float]) -> str | None:
    """The part that is most above its prediction; None where no part is."""
    above = {name: value - predicted.get(name, 0.0) for name, value in measured.items()}
    most = max(above, key=above.__getitem__, default=None)
    return most if most is not None and above[most] > 0 else None
