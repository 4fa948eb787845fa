"""The profiler of a run: which steps, what it writes, whose time is whose, and that it ends no run."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from monitor.profile_cases import delayed, failing, limited
from support.pool import pool
from tessera.config.load import make_config
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.monitor.profile import Profiler
from train.on_rank import said_on_rank
from train.runs import Workshop, metrics

KINDS = {"products", "attention", "elementwise", "copies", "other", "python"}
MINIMAL = {"base_model": "./my-llama", "datasets": [{"path": "a.jsonl"}]}


def read(file: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_text())


def labels(file: Path) -> set[str]:
    return {event["name"] for event in read(file)["traceEvents"] if event["name"].startswith("tessera: ")}


def check_sum(summary: dict[str, Any]) -> None:
    """All kinds of work took time, none twice: they are the step within a millionth."""
    seconds = dict(summary["seconds"])
    along = seconds.pop("communication")
    assert {kind for kind, s in seconds.items() if s > 0} == KINDS
    assert sum(seconds.values()) + sum(along.values()) == pytest.approx(summary["step_seconds"], rel=1e-6)


# ---- Which steps


@pytest.mark.parametrize(
    ("keys", "done", "total", "steps"),
    [
        ({}, 0, 10, []),
        ({"use_profiler": True}, 0, 10, [3, 4, 5]),
        ({"use_profiler": True}, 6, 10, [8, 9, 10]),
        ({"use_profiler": True}, 100, 200, [103, 104, 105]),
        ({"use_profiler": True}, 0, 4, [2, 3, 4]),
        ({"use_profiler": True}, 0, 2, [1, 2]),
        ({"profiler_steps": 2}, 0, 10, [3, 4]),
        ({"profiler_steps": 2, "profiler_steps_start": 0}, 0, 10, [1, 2]),
        ({"profiler_steps": 2, "profiler_steps_start": 7}, 0, 10, [8, 9]),
        ({"profiler_steps": 2, "profiler_steps_start": 7}, 8, 10, [9]),
        ({"profiler_steps": 2, "profiler_steps_start": 7}, 9, 10, []),
        ({"use_profiler": False, "profiler_steps": 2}, 0, 10, []),
    ],
)
def test_which_steps_are_profiled(keys, done, total, steps):
    config = make_config(MINIMAL | keys)[0]
    assert [*config.profiled(done, total, 0)] == steps
    assert not config.profiled(done, total, 1)
    if steps:
        assert [*make_config(MINIMAL | keys | {"profiler_ranks": "all"})[0].profiled(done, total, 1)] == steps


@pytest.mark.parametrize("keys", [{"profiler_steps_start": 5}, {"profiler_ranks": "all"}])
def test_a_key_of_the_profiler_without_the_profiler_is_refused(keys):
    with pytest.raises(UserError, match="nothing is profiled\n.*use_profiler: true"):
        make_config(MINIMAL | keys)
    make_config(MINIMAL | keys | {"use_profiler": False})
    make_config(MINIMAL | {"profiler_steps": None, "profiler_steps_start": 0})  # as axolotl's own defaults


# ---- Of a run


def test_a_run_of_two_ranks_leaves_traces_and_tables_of_each(workshop: Workshop, tmp_path):
    own = {"tensor_parallel_size": 2, "profiler_steps": 2, "profiler_ranks": "all"}
    settings = workshop.settings("llama 64", tmp_path / "run", **own)
    said = pool(2, gloo=True).run(said_on_rank, settings)[0]
    folder = tmp_path / "run" / "profile"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"rank-{r}-step-{s}.json.gz" for r in (0, 1) for s in (3, 4)} | {
        f"summary{rank}.{kind}" for rank in ("", "-rank-1") for kind in ("json", "txt")
    }
    assert (folder / "summary.txt").read_text() in said
    for rank, name in enumerate(("summary", "summary-rank-1")):
        summary = read(folder / f"{name}.json")
        assert (summary["rank"], summary["steps"]) == (rank, [3, 4])
        assert summary["seconds"]["communication"].keys() == {"col"}
        check_sum(summary)
    found = labels(folder / "rank-0-step-4.json.gz")
    assert {"tessera: step 4", "tessera: all_gather col", "tessera: reduce_scatter col", "tessera: wait col"} <= found
    assert not any(name.startswith("tessera: step") for name in found - {"tessera: step 4"}), "a trace has one step"


def test_a_late_collective_is_time_along_its_axis(workshop: Workshop, tmp_path):
    own = {"tensor_parallel_size": 2, "dp_shard_size": 2, "gradient_checkpointing": True, "max_steps": 1}
    settings = workshop.settings("llama 64", tmp_path / "run", use_profiler=True, **own)
    pool(4, gloo=True).run(delayed, settings, "shard·col", 3.0)
    summary = read(tmp_path / "run/profile/summary.json")
    check_sum(summary)
    along = summary["seconds"]["communication"]
    assert along.keys() == metrics(settings)[0]["communicated_bytes"].keys() == {"shard", "col", "shard·col"}
    assert along["shard·col"] > 3.0, "one call a step, which no other kind has: all of them are the step"
    assert "communication along shard·col" in (tmp_path / "run/profile/summary.txt").read_text()


def test_a_run_without_the_profiler_has_none(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=1)
    said = pool(1).run(failing, settings, "tessera.monitor.profile.profile")[0]
    assert "broken" not in said and not (tmp_path / "run/profile").exists()


@pytest.mark.parametrize("where", ["profile", "spent", "gzip.compress"])
def test_a_profiler_that_fails_is_told_once_and_ends_no_run(workshop: Workshop, tmp_path, where):
    settings = workshop.settings("llama", tmp_path / "run", use_profiler=True)
    said = pool(1).run(failing, settings, f"tessera.monitor.profile.{where}")[0]
    assert "model written" in said and len(metrics(settings)) == 5
    assert said.count("the profiler failed on rank 0, the run goes on without it: it is broken") == 1


def test_traces_that_would_be_too_large_are_not_kept(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", use_profiler=True)
    said = pool(1).run(limited, settings, 1000)[0]
    assert said.count("all may have 1000 B (rank 0): it is not kept, and no further step is profiled") == 1
    assert "model written" in said and not [*(tmp_path / "run/profile").iterdir()]


def test_an_error_of_the_step_is_raised_and_leaves_no_profiler_running(tmp_path):
    profiler = Profiler(tmp_path, range(1, 3), Mesh({}, torch.device("cpu"), 0))
    with pytest.raises(KeyError, match="the step"), profiler.step(1):
        raise KeyError("the step")
    assert not (tmp_path / "profile").exists()
    with profile(activities=[ProfilerActivity.CPU]) as other:  # torch has one at a time
        torch.ones(3).add_(1)
    assert "aten::add_" in {event.name for event in other.events()}


def test_traces_of_an_older_run_make_room(tmp_path):
    (tmp_path / "profile").mkdir()
    for name in ("rank-0-step-90.json.gz", "rank-1-step-90.json.gz"):
        (tmp_path / "profile" / name).touch()
    profiler = Profiler(tmp_path, range(2, 3), Mesh({}, torch.device("cpu"), 0), say=lambda line: None)
    for number in (1, 2, 3):
        with profiler.step(number):
            torch.ones(3).add_(1)
    left = {path.name for path in (tmp_path / "profile").glob("*.gz")}
    assert left == {"rank-0-step-2.json.gz", "rank-1-step-90.json.gz"}
