"""The table of profiled steps: in words for people, as JSON for programs."""

from collections.abc import Mapping
from typing import Any

from tessera.core.text import table_lines
from tessera.monitor.operators import ATTENTION, COPIES, ELEMENTWISE, GAPS, OTHER, PRODUCTS, PYTHON
from tessera.monitor.profiled import ALONG, Spent

WORDS = {
    PRODUCTS: "products",
    ATTENTION: "attention",
    ELEMENTWISE: "elementwise",
    COPIES: "memory copies",
    OTHER: "other operators",
    PYTHON: "Python",
    GAPS: "gaps",
}
_NAMES = 2
"""Operators that a line of the table names."""


def mean(taken: Mapping[int, Spent]) -> Spent:
    """The mean of several steps."""
    total = Spent(sum(one.step for one in taken.values()) / len(taken))
    for one in taken.values():
        pairs = [(total.seconds, one.seconds), (total.calls, one.calls), (total.hidden, one.hidden)]
        for into, values in [*pairs, *((total.names[kind], names) for kind, names in one.names.items())]:
            for key, value in values.items():
                into[key] += value / len(taken)
    return total


def _most(names: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(names.items(), key=lambda pair: -pair[1])[:count]


def as_json(rank: int, taken: Mapping[int, Spent]) -> dict[str, Any]:
    """The mean of the steps `taken` on a rank, in seconds a step: `seconds` and its communication sum to the step."""
    found = mean(taken)
    along = {kind.removeprefix(ALONG): s for kind, s in sorted(found.seconds.items()) if kind.startswith(ALONG)}
    return {
        "rank": rank,
        "steps": [*taken],
        "step_seconds": found.step,
        "seconds": {**{kind: found.seconds[kind] for kind in WORDS}, "communication": along},
        "hidden_communication_seconds": {kind.removeprefix(ALONG): s for kind, s in sorted(found.hidden.items())},
        "operators": {kind: dict(_most(names, 10)) for kind, names in found.names.items() if kind != PYTHON},
    }


def as_text(rank: int, taken: Mapping[int, Spent]) -> str:
    """The same as a table: a line for each kind of work that took time, communication by axis."""
    found, steps = mean(taken), [*taken]
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    kinds = [*WORDS]
    kinds[kinds.index(PYTHON) : kinds.index(PYTHON)] = sorted(k for k in found.seconds if k.startswith(ALONG))
    rows = [
        ("", "ms a step", "share", "calls", "most of it, ms"),
        *(_row(kind, found) for kind in kinds if found.seconds[kind]),
    ]
    rows.append(("sum", f"{1000 * sum(found.seconds.values()):.2f}", "100%", "", ""))
    title = f"rank {rank}, {which}: {1000 * found.step:.2f} ms a step under the profiler"
    return "\n".join([title, *table_lines(rows)]) + "\n"


def _row(kind: str, found: Spent) -> tuple[str, ...]:
    seconds, along = found.seconds[kind], kind.startswith(ALONG)
    named = kind not in (PYTHON, GAPS)
    most = [f"{name.removeprefix('tessera: ')} {1000 * s:.2f}" for name, s in _most(found.names[kind], _NAMES)]
    if hidden := found.hidden[kind]:
        most.append(f"and {1000 * hidden:.2f} while other work ran")
    return (
        f"communication {kind}" if along else WORDS[kind],
        f"{1000 * seconds:.2f}",
        f"{seconds / found.step:.1%}",
        f"{found.calls[kind]:.1f}".removesuffix(".0") if named else "",
        ", ".join(most) if named else "",
    )
