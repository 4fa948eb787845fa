"""A real run says what takes longer in it: which axis, which rank, the loader, the optimizer, the save."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from monitor.delayed_on_rank import DELAY, delayed_on_rank, failing_on_rank, leaking_on_rank
from support.pool import pool
from tessera.config.schema import TrainConfig
from train.runs import Workshop, metrics

TRIES = {5: "axis", 6: "rank", 7: "loader", 8: "optimizer", 9: "save", 11: "axis", 12: "rank", 13: "loader"}
TRIES |= {14: "optimizer", 15: "save"}
STEPS = 16
SLOW = 1
"""The rank whose forward is delayed."""
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "1 rank": ({}, ""),
    "1d": ({"tensor_parallel_size": 2}, "col"),
    "2d": ({"tensor_parallel_size": 4, "tensor_parallel_mode": "2d"}, "row"),
    "FSDP 2 × TP 2": ({"dp_shard_size": 2, "tensor_parallel_size": 2}, "shard"),
    "ring": ({"context_parallel_size": 2, "context_parallel_mode": "ring"}, "ring"),
}


def measured(output: Path) -> dict[int, dict[str, list[float]]]:
    """By step the seconds of each rank, by term and axis."""
    found = {}
    for line in (output / "monitor.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "seconds" in record:
            seconds = dict(record["seconds"])
            found[record["step"]] = seconds.pop("communication") | seconds
    return found


def misses(found: dict[int, dict[str, list[float]]], step: int, expected: dict[tuple[str, int], float]) -> list[str]:
    """The terms of ranks that are not what they usually are plus what is expected, within a fifth of the delay.

    What they usually are is the median of steps without a delay; as far as those are apart, more is allowed.
    """
    usual = [n for n in found if n > 2 and n not in TRIES and TRIES.get(n - 1) != "save"]
    told = []
    for term, of_ranks in found[step].items():
        for rank, seconds in enumerate(of_ranks):
            others = sorted(found[n][term][rank] for n in usual)
            off = seconds - median(others) - expected.get((term, rank), 0.0)
            if abs(off) > 0.2 * DELAY + others[-1] - others[0]:
                told.append(f"step {step}, rank {rank}, {term}: off by {off:.3f}, usually {others}")
    return told


def wrong(workshop: Workshop, output: Path, name: str) -> list[str]:
    """What a run in this layout, with delays, reports otherwise than it was."""
    layout, axis = LAYOUTS[name]
    own = layout | {"max_steps": STEPS, "save_steps": 3 * STEPS, "save_async": False}
    settings = workshop.settings("llama", output, **own)
    # what is no rank's or axis's takes one path whatever the layout
    kinds = ("axis", "rank") if layout else ("loader", "optimizer", "save")
    steps = {step: what for step, what in TRIES.items() if what in kinds}
    if "save" in kinds:
        settings |= {"save_strategy": "steps", "save_steps": 1}
    ranks = TrainConfig.model_validate(settings).world_size
    pool(ranks).run(delayed_on_rank, settings, steps, axis, SLOW)
    found, everyone = measured(output), range(ranks)
    expected: dict[str, dict[tuple[str, int], float]] = {
        "axis": {(axis, rank): DELAY for rank in everyone},
        "rank": {("compute" if rank == SLOW else "idle", rank): DELAY for rank in everyone},
        "loader": {("data", rank): DELAY for rank in everyone},
        "optimizer": {("optimizer", rank): DELAY for rank in everyone},
        "save": {("save", rank): DELAY for rank in everyone},
    }
    told = []
    for what in kinds:
        # of two tries one is enough: a machine that others use may stand still for a while
        missed = [misses(found, step + (what == "save"), expected[what]) for step in steps if steps[step] == what]
        told += missed[0] + missed[1] if all(missed) else []
    whole = taken = 0.0  # of rank 0, whose are the times of steps
    for line in metrics(settings):
        if "seconds" not in line:
            assert line["step"] == 2 and "kinds_gib" in line["memory"]
            continue
        terms = found[line["step"]]
        whole += sum(terms[term][0] for term in terms if term not in ("other", "save", "evaluation"))
        taken += line["step_seconds"]
    told += [] if whole == pytest.approx(taken, rel=0.02) else [f"terms have {whole} s of {taken} s"]
    slow = [line["slowest"] for line in metrics(settings) if steps.get(line["step"]) == "rank"]
    if slow and not any(s["rank"] == SLOW and s["excess_seconds"] == pytest.approx(DELAY, rel=0.2) for s in slow):
        told.append(f"the slowest are {slow}")
    return told


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_delay_is_reported_where_it_is(workshop: Workshop, tmp_path, name):
    """Real time on a machine that others use: of three runs one must be right in all."""
    told = []
    for attempt in range(3):
        told = wrong(workshop, tmp_path / f"run-{attempt}", name)
        if not told:
            break
    assert not told


@pytest.mark.parametrize("every", [2, 3])
def test_a_line_has_the_steps_since_the_last_one_but_for_the_counted_step(workshop: Workshop, tmp_path, every):
    """Step 1 is delayed and counts; step 2, whose memory is counted, does not, delayed though it is."""
    settings = workshop.settings("llama", tmp_path / "run", max_steps=2 * every, logging_steps=every)
    pool(1).run(delayed_on_rank, settings, {1: "optimizer", 2: "optimizer"}, "", 0)
    found = measured(tmp_path / "run")
    assert list(found) == [every, 2 * every]
    assert found[every]["optimizer"][0] == pytest.approx(DELAY / (every - 1), rel=0.2)
    assert found[2 * every]["optimizer"][0] < 0.2 * DELAY


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
    (warning,) = [line["text"] for line in lines if line["kind"] == "warning"]
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
    pool(1).run(delayed_on_rank, settings, {}, "", 0)
    assert [line["step"] for line in metrics(settings)] == [1, 2, 3]
    assert all("seconds" not in line and "memory" not in line for line in metrics(settings))
    assert not (tmp_path / "run/monitor.jsonl").exists()
