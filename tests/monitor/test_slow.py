"""What has been slow for ten reports is told once, with the page that says what to do."""

from typing import Any

import pytest

from tessera.monitor.slow import Slow, slow_rank


def report(data: float = 0.0, excess: float = 0.0, rank: int = 3, whole_machine: bool = False) -> dict[str, Any]:
    seconds = {"compute": 0.8 - data, "data": data, "optimizer": 0.1, "other": 0.0, "idle": 0.0}
    slowest = {"rank": rank, "machine": "b", "excess_seconds": excess, "whole_machine": whole_machine}
    return {"seconds": seconds | {"communication": {"col": 0.1}}, "slowest": slowest}


@pytest.mark.parametrize(
    "slow, told",
    [
        (report(excess=0.11), "rank 3 takes 0.11 s a step longer than the others, for 10 reports by now"),
        (report(excess=0.5, whole_machine=True), "machine b takes 0.5 s a step longer than the others, for 10"),
        (report(data=0.25), "25% of a step's time is waiting for data, for 10 reports by now"),
    ],
)
def test_it_is_told_once_when_it_lasts(slow, told):
    follow = Slow()
    lines = [follow.step(slow) for _ in range(30)]
    assert [n for n, line in enumerate(lines, 1) if line] == [10] and lines[9][0].startswith(told)


@pytest.mark.parametrize("now_and_then", [report(), report(excess=0.5, rank=1), {"memory": {}, "slowest": None}])
def test_what_does_not_last_is_not_told(now_and_then):
    """A report without times, as of the step whose memory is counted, does not interrupt."""
    follow, counted = Slow(), "seconds" not in now_and_then
    lines = [follow.step(now_and_then if n % 9 == 8 else report(excess=0.5)) for n in range(40)]
    assert any(lines) == counted


def test_one_rank_is_never_slow():
    assert slow_rank(report() | {"slowest": None}) is None
