"""What makes a run slow for long enough to be worth a word: one rank, or the data."""

from collections.abc import Mapping
from typing import Any

SLOW = 0.1
"""The share of a step's time from which something is slow."""
REPORTS = 10
"""So many reports one after another before it is told, once."""


def step_time(seconds: Mapping[str, Any]) -> float:
    """Seconds of a step, of the terms in a line of metrics.jsonl."""
    own = sum(seconds[term] for term in ("compute", "data", "optimizer", "other", "idle"))
    return own + sum(seconds["communication"].values())


def slow_rank(record: Mapping[str, Any]) -> str | None:
    """The rank or machine that takes longer than the others by much of a step, such as "rank 3"."""
    slowest = record["slowest"]
    if not slowest or slowest["excess_seconds"] < SLOW * step_time(record["seconds"]):
        return None
    return f"machine {slowest['machine']}" if slowest["whole_machine"] else f"rank {slowest['rank']}"


class Slow:
    """Follows the reports of a run."""

    def __init__(self) -> None:
        self._row: dict[str, int] = {}  # how many reports one after another have said it
        self._told: set[str] = set()

    def step(self, record: Mapping[str, Any]) -> list[str]:
        """Take the next line of metrics.jsonl with times; lines about what has been slow for long."""
        if not record.get("seconds"):
            return []
        now: dict[str, str] = {}
        if who := slow_rank(record):
            now[who] = f"{who} takes {record['slowest']['excess_seconds']:.2g} s a step longer than the others"
        share = record["seconds"]["data"] / max(step_time(record["seconds"]), 1e-9)
        if share >= SLOW:
            now["data"] = f"{share:.0%} of a step's time is waiting for data"
        self._row = {what: self._row.get(what, 0) + 1 for what in now}
        long = [what for what, times in self._row.items() if times >= REPORTS and what not in self._told]
        self._told.update(long)
        return [f"{now[what]}, for {REPORTS} reports by now" for what in long]
