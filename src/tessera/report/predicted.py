"""What a run expected of its steps, as events.jsonl and summary.json have it."""

from dataclasses import dataclass, field

from tessera.core.errors import cut_short
from tessera.core.json_lines import nested, number
from tessera.report.metrics import KINDS, MOST_AXES, TERMS


@dataclass(frozen=True)
class Predicted:
    """`seconds` of a step by term as `Metrics.seconds` names them, `kinds` of memory at the peak (GiB).

    `band`: half of the time's, as a share. `measured_here`: the profile was measured on the machine of the run.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, float] = field(default_factory=dict)
    band: float | None = None
    profile: str = ""
    measured_here: bool = False

    def __bool__(self) -> bool:
        return bool(self.seconds or self.kinds)


def predicted(given: object) -> Predicted:
    """The prediction that an object holds, one without numbers where it holds none."""
    found, profile = nested(given), nested(given).get("profile")
    by_term, by_kind = nested(found.get("seconds")), nested(found.get("kinds_gib"))
    seconds = {term: value for term in TERMS if (value := number(by_term.get(term))) is not None}
    for axis, spent in list(nested(by_term.get("communication")).items())[:MOST_AXES]:
        if (value := number(spent)) is not None:
            seconds[f"communication over {cut_short(axis, 60)}"] = value
    kinds = {kind: value for kind in KINDS if (value := number(by_kind.get(kind))) is not None}
    name = cut_short(profile, 100) if isinstance(profile, str) else ""
    return Predicted(seconds, kinds, number(found.get("band")), name, found.get("measured_here") is True)
