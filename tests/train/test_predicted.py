"""A run says what it should take, by the profile of its machine, and which term took more."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.pool import pool
from tessera.core.device import hardware
from tessera.plan.machine import Curve, Profile, shipped_profiles, written_profile
from train.on_rank import said_where_predicting_fails, said_with_profiles
from train.runs import Workshop, metrics

STEPS = {"max_steps": 9, "warmup_steps": 1, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
SLOW = "slower than predicted: "


def profile_here(name: str, seconds: float) -> Profile:
    """A made-up profile of this processor: a step takes so long, and next to nothing beside."""
    fast = {"any": Curve(1e-9, 0.0, 0.0, 1e15)}
    rates = {"product_flops": 1e17, "attention_flops": 1e17, "memory_bandwidth": 1e17, "dispatch_seconds": 0.0}
    own = replace(
        shipped_profiles()["H100"],
        name=name,
        device=hardware(torch.device("cpu")),
        devices_per_machine=2,
        peak_flops={},
    )
    return replace(own, **rates, inside=fast, between=fast, step_seconds=seconds, measured=True, error=0.15)


def run(workshop: Workshop, folder: Path, profile: Profile, **own: Any) -> tuple[str, list[dict], dict]:
    """What a run on a machine with this profile prints, its events, and its summary."""
    profiles = folder / "cache" / "tessera" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "own.json").write_text(written_profile(profile))
    settings = workshop.settings("llama", folder / "run", **STEPS | own)
    ranks = own.get("tensor_parallel_size", 1) * own.get("dp_shard_size", 1)
    said = pool(ranks).run(said_with_profiles, settings, str(folder / "cache"))[0]
    events = [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]
    return said, events, json.loads((folder / "run/summary.json").read_text())


@pytest.mark.parametrize("size, shard", [(1, 1), (2, 2)])
def test_a_run_that_is_slower_than_its_machine_says_which_term(workshop: Workshop, tmp_path, size, shard):
    """Of this machine everything was measured to take no time."""
    fast = profile_here("fast", 1e-6)
    said, events, summary = run(workshop, tmp_path, fast, tensor_parallel_size=size, dp_shard_size=shard)
    (start,) = [line for line in said.splitlines() if line.startswith("predicted: ")]
    assert "ms a step ± 15%" in start and start.endswith("; profile fast, measured here")
    (told,) = [event for event in events if event["kind"] == "predicted"]
    assert told["text"] == start and told["step"] == 0 and told["predicted"] == summary["predicted"]
    assert told["predicted"]["step_seconds"] < 1e-3
    warnings = [event["text"] for event in events if event["kind"] == "warning"]
    assert [SLOW in text for text in warnings] == [True], warnings  # and none on memory
    assert summary["more_than_predicted"] == [warnings[0].removeprefix("warning: ")]
    measured, lines = summary["measured"], metrics({"output_dir": tmp_path / "run"})
    assert measured["steps"] == 6  # of nine, three of which settle
    assert sorted(m["step_seconds"] for m in lines[3:])[2] <= measured["step_seconds"]
    worst = max(measured["seconds"], key=lambda term: measured["seconds"][term])
    assert f"most of it {worst} (" in warnings[0]
    # axes are called alike, and what was predicted is there to be compared with
    along = {axes for m in lines for axes in m.get("seconds", {}).get("communication", {})}
    assert along == set(told["predicted"]["seconds"]["communication"])
    assert measured["kinds_gib"].keys() == told["predicted"]["kinds_gib"].keys()
    assert all("predicted" not in m for m in lines)


def test_a_run_that_is_faster_says_nothing(workshop: Workshop, tmp_path):
    said, events, summary = run(workshop, tmp_path, profile_here("slow", 50.0))
    assert "predicted: 50,000 ms a step" in said and SLOW not in said
    assert summary["more_than_predicted"] == [] and not [e for e in events if e["kind"] == "warning"]


def test_on_a_machine_that_was_not_measured_no_run_is_called_slow(workshop: Workshop, tmp_path):
    """The profile is that of some processor, here one that is faster than any."""
    fast = replace(profile_here("fast", 1e-6), measured=False)
    said, _, summary = run(workshop, tmp_path, fast)
    (line,) = [line for line in said.splitlines() if line.startswith(("no prediction: ", "predicted: "))]
    assert line.endswith("profile fast, not measured here: run tessera measure") and SLOW not in said
    assert summary["predicted"]["measured_here"] is False and summary["more_than_predicted"] == []
    assert summary["measured"]["step_seconds"] > 2 * summary["predicted"]["step_seconds"]


def test_nothing_is_predicted_where_nothing_is_measured(workshop: Workshop, tmp_path):
    said, _, summary = run(workshop, tmp_path, profile_here("fast", 1e-6), max_steps=2, monitor=False)
    assert "predicted: " not in said and "prediction: " not in said and "predicted" not in summary


def test_a_prediction_that_fails_ends_no_run(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", **STEPS | {"max_steps": 2})
    said = pool(1).run(said_where_predicting_fails, settings)[0]
    assert "no prediction: no step at all\n" in said and "step 2 of 2" in said
