"""A real run says what takes longer in it: which axis, which rank, the loader, the optimizer, the save."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from monitor.delayed_on_rank import (
    DELAY,
    Delays,
    delayed_on_rank,
    failing_on_rank,
    leaking_on_rank,
    virtually_delayed_on_rank,
)
from monitor.virtual import SAVE
from support.pool import pool
from tessera.config.schema import TrainConfig
from tessera.monitor.counted import COUNTED_STEP
from tessera.monitor.timeline import BESIDE
from train.runs import Workshop, metrics

SLOW = 1
"""The rank that alone is delayed, where there are several."""
LAYOUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "1 rank": ({}, []),
    "1d": ({"tensor_parallel_size": 2}, ["col"]),
    "2d": ({"tensor_parallel_size": 4, "tensor_parallel_mode": "2d"}, ["row", "col"]),
    "FSDP 2 × TP 2": ({"dp_shard_size": 2, "tensor_parallel_size": 2}, ["shard", "col"]),
    "ring": ({"context_parallel_size": 2, "context_parallel_mode": "ring"}, ["ring"]),
}
FIRST_USUAL = COUNTED_STEP + 1
"""The first step that is as others are."""


def measured(output: Path) -> dict[int, dict[str, list[float]]]:
    """By step the seconds of each rank, by term and axis."""
    found = {}
    for line in (output / "monitor.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "seconds" in record:
            seconds = dict(record["seconds"])
            found[record["step"]] = seconds.pop("communication") | seconds
    return found


def delays_of(axes: list[str], ranks: int) -> Delays:
    """From the step after the first usual one: a delay along each axis, of one rank's forward, and of loader, optimizer
    and save, on every rank and on one alone."""
    one = min(SLOW, ranks - 1)
    of = [*((axis, None) for axis in axes), ("forward", one), ("loader", None), ("optimizer", None), ("save", None)]
    of += [("loader", one), ("optimizer", one)] if ranks > 1 else []
    return {FIRST_USUAL + 1 + index: delay for index, delay in enumerate(of)}


def expected(delay: tuple[str, int | None], ranks: int) -> dict[tuple[str, int], float]:
    """By term and rank the seconds more that a delay is: where it is, and idle ones of ranks that wait for it."""
    what, alone = delay
    term = "compute" if what == "forward" else "data" if what == "loader" else what
    usual = SAVE if what == "save" else 0.0  # one step alone is saved
    more = {(term, rank): DELAY + usual for rank in range(ranks) if alone in (None, rank)}
    # ranks meet after an update only when the step's time has been taken
    waiting = alone is not None and what != "optimizer"
    return more | {("idle", rank): DELAY for rank in range(ranks) if waiting and rank != alone}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_delay_is_reported_where_it_is_and_nowhere_else(workshop: Workshop, tmp_path, name):
    """In virtual time, which is the same on every machine: within 1% of the delay. Terms add up on every rank."""
    layout, axes = LAYOUTS[name]
    ranks = TrainConfig.model_validate(workshop.settings("llama", tmp_path / "run", **layout)).world_size
    delays = delays_of(axes, ranks)
    (saved,) = (step for step, (what, _) in delays.items() if what == "save")
    own = {"max_steps": max(delays) + 2, "save_strategy": "steps", "save_steps": saved, "save_async": False}
    settings = workshop.settings("llama", tmp_path / "run", **layout, **own)
    taken = pool(ranks).run(virtually_delayed_on_rank, settings, delays, tmp_path / "messages")
    found = measured(tmp_path / "run")
    assert taken[0][FIRST_USUAL - 1] <= DELAY / 3
    more: dict[tuple[int, str, int], float] = {}
    for step, delay in delays.items():
        line = step + (delay[0] == "save")  # which comes after its step's line
        more |= {(line, *place): seconds for place, seconds in expected(delay, ranks).items()}
    for step in range(FIRST_USUAL, max(found) + 1):
        for term, of_ranks in found[step].items():
            usual = found[FIRST_USUAL][term]
            right = [usual[rank] + more.get((step, term, rank), 0.0) for rank in range(ranks)]
            assert of_ranks == pytest.approx(right, abs=0.01 * DELAY), (step, delays.get(step), term)
        for rank in range(ranks):
            terms = sum(found[step][term][rank] for term in found[step] if term not in BESIDE)
            assert terms == pytest.approx(taken[rank][step - 1], rel=1e-3), (step, rank)
    if ranks > 1:
        slow = {line["step"]: line.get("slowest") for line in metrics(settings)}
        for step, (what, rank) in delays.items():
            if rank is not None:
                assert slow[step]["rank"] == rank, what
                assert slow[step]["excess_seconds"] == pytest.approx(DELAY, rel=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_in_real_time_reports_at_least_its_delays(workshop: Workshop, tmp_path, name):
    """What sleeps takes at least so long, however busy the machine; and of most steps no more than 2% is in no term."""
    layout, axes = LAYOUTS[name]
    delays: Delays = {FIRST_USUAL: ("forward", 0)}
    if axes:
        delays[FIRST_USUAL + 1] = (axes[0], None)
    settings = workshop.settings("llama", tmp_path / "run", **layout, max_steps=FIRST_USUAL + 4)
    pool(TrainConfig.model_validate(settings).world_size).run(delayed_on_rank, settings, delays)
    found = measured(tmp_path / "run")
    assert found[FIRST_USUAL]["compute"][0] > 0.99 * DELAY
    if axes:  # whoever comes last of all ranks is not idle
        assert max(found[FIRST_USUAL + 1][axes[0]]) > 0.99 * DELAY
    missing = []
    for line in metrics(settings):
        if "seconds" in line:
            terms = sum(of_ranks[0] for term, of_ranks in found[line["step"]].items() if term not in BESIDE)
            missing.append(abs(terms - line["step_seconds"]) / line["step_seconds"])
        else:
            assert line["step"] == COUNTED_STEP and "kinds_gib" in line["memory"]
    assert median(missing) < 0.02


@pytest.mark.parametrize("every", [2, 3])
def test_a_line_has_the_steps_since_the_last_one_but_for_the_counted_step(workshop: Workshop, tmp_path, every):
    """Step 1 is delayed and counts; step 2, whose memory is counted, does not, delayed though it is."""
    settings = workshop.settings("llama", tmp_path / "run", max_steps=2 * every, logging_steps=every)
    delays = {1: ("optimizer", None), 2: ("optimizer", None)}
    pool(1).run(virtually_delayed_on_rank, settings, delays, tmp_path / "messages")
    found = measured(tmp_path / "run")
    assert list(found) == [every, 2 * every]
    usual = found[2 * every]["optimizer"][0]
    assert found[every]["optimizer"][0] == pytest.approx(usual + DELAY / (every - 1), rel=1e-3)
    assert 0 < usual < 0.1 * DELAY


def test_a_monitor_that_fails_ends_no_run(workshop: Workshop, tmp_path):
    """On one of two ranks: the others go on without it, and the first says which it was."""
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=5)
    pool(2).run(failing_on_rank, settings, 4, 1)
    assert [line["step"] for line in metrics(settings)] == [1, 2, 3, 4, 5]
    lines = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (warning,) = [line["text"] for line in lines if line["kind"] == "warning"]
    assert "rank 1: the monitor failed" in warning and "no clock" in warning
    found = measured(tmp_path / "run")
    assert found[5]["compute"][0] > 0 and found[5]["compute"][1] == 0


def test_a_leak_is_named_within_50_steps(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", dp_shard_size=2, max_steps=50, logging_steps=5)
    pool(2).run(leaking_on_rank, settings, 1)
    lines = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    warnings = [line["text"] for line in lines if line["kind"] == "warning"]
    (warning,) = [text for text in warnings if "memory grows" in text]  # it is larger than predicted, too
    assert warning.startswith("warning: rank 1: memory grows by 1") and "MiB a step" in warning
    assert "tensors 512 × 512 (float32)" in warning and "docs/debugging/out-of-memory.md" in warning


def test_without_a_monitor_nothing_of_it_runs(workshop: Workshop, tmp_path, monkeypatch):
    from tessera.core import clock
    from tessera.monitor import monitor, timeline

    def never(*args: Any, **how: Any) -> Any:
        raise AssertionError("the monitor runs")

    for owner, name in ((monitor.Monitor, "__init__"), (timeline.Timeline, "enter"), (clock.HostClock, "mark")):
        monkeypatch.setattr(owner, name, never)
    settings = workshop.settings("llama", tmp_path / "run", max_steps=3, monitor=False)
    pool(1).run(delayed_on_rank, settings, {})
    assert [line["step"] for line in metrics(settings)] == [1, 2, 3]
    assert all("seconds" not in line and "memory" not in line for line in metrics(settings))
    assert not (tmp_path / "run/monitor.jsonl").exists()
