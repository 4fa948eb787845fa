"""What the planner says of a step, in the terms that the monitor measures.

    of the monitor          of the planner (plan/time.py)
    compute                 products, attention, elementwise, dispatch, contention, host, calibration
    communication by axes   exposed along them
    data                    none: it takes micro-batches to be there
    optimizer               optimizer
    idle                    bubble: it takes ranks to be equally fast, so that stages of a pipeline alone wait
    other                   step

    of the monitor          of the planner (plan/peak.py)
    states, gathered        the same
    activations             the same; with working where the peak is in the forward, of which all counts as activations
    other                   working, where the peak is in the backward or the update

A layer that runs again in the backward is in the planner's activations and in the monitor's other. Every term and every
kind of the planner is in one of the monitor's: their sums are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tessera.core.axes import AXES
from tessera.core.text import human
from tessera.monitor.slow import step_time

if TYPE_CHECKING:  # a rank that predicts nothing does without the planner
    from tessera.plan.recommend import Judged

OF_TERMS: Mapping[str, tuple[str, ...]] = {
    "compute": ("products", "attention", "elementwise", "dispatch", "contention", "host", "calibration"),
    "data": (),
    "optimizer": ("optimizer",),
    "idle": ("bubble",),
    "other": ("step",),
}
IN_FORWARD = ("begin of the forward", "loss")
"""Moments of a peak (plan/peak.py) that are in the forward: the loss forms its gradients there."""


@dataclass(frozen=True)
class Prediction:
    """A step of a run before it runs.

    `seconds` has the form that it has in metrics.jsonl, communication by axes in it; `kinds` bytes of the fullest rank
    by kind at its peak; `band` is half of the time's, as a share. `profile` names the machine's rates, which
    `tessera measure` has taken on this machine where `measured_here`. `planner`: seconds by the planner's own terms.
    """

    seconds: Mapping[str, Any]
    kinds: Mapping[str, int]
    band: float
    tokens_per_second: float
    profile: str
    measured_here: bool
    planner: Mapping[str, float]

    @classmethod
    def of(cls, judged: "Judged", *, measured_here: bool) -> "Prediction":
        """What the planner has judged."""
        time = judged.time.terms
        seconds: dict[str, Any] = {term: float(sum(time[part] for part in parts)) for term, parts in OF_TERMS.items()}
        seconds["communication"] = {_in_order(axis): float(spent) for axis, spent in judged.time.exposed.items()}
        peak = judged.peak
        working = "activations" if peak.moment in IN_FORWARD else "other"
        kinds = {"states": peak.states, "activations": peak.activations, "gathered": peak.gathered, "other": 0}
        kinds = {kind: int(size + peak.working * (kind == working)) for kind, size in kinds.items()}
        speed, profile = judged.tokens_per_second, judged.cluster.profile.name
        return cls(seconds, kinds, judged.band, speed, profile, measured_here, time)

    @property
    def step_seconds(self) -> float:
        """Seconds of the step: all terms together."""
        return step_time(self.seconds)

    @property
    def peak(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.kinds.values())

    def record(self) -> dict[str, Any]:
        """As it stands in events.jsonl and summary.json."""
        return {
            "step_seconds": self.step_seconds,
            "band": self.band,
            "tokens_per_second": self.tokens_per_second,
            "seconds": dict(self.seconds),
            "kinds_gib": {kind: size / 2**30 for kind, size in self.kinds.items()},
            "profile": self.profile,
            "measured_here": self.measured_here,
            "planner_seconds": dict(self.planner),
        }

    def __str__(self) -> str:
        """One line, e.g. "predicted: 9.02 ms a step ± 15%, 14,200 tokens/s, peak 1.2 GiB; profile x, measured here"."""
        origin = "measured here" if self.measured_here else "not measured here: run tessera measure"
        return (
            f"predicted: {milliseconds(self.step_seconds)} a step ± {self.band:.0%}, "
            f"{self.tokens_per_second:,.0f} tokens/s, peak {human(self.peak)}; profile {self.profile}, {origin}"
        )


def milliseconds(seconds: float, unit: str = " ms") -> str:
    """Three digits, e.g. "12.1 ms", "1,520 ms"."""
    shown = 1000 * seconds
    return (f"{shown:,.0f}" if shown >= 1000 else f"{shown:.3g}") + unit


def _in_order(axis: str) -> str:
    """The name of one or several axes as the monitor writes it, in the order of the mesh."""
    return "·".join(sorted(axis.split("·"), key=AXES.index))
