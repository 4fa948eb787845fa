"""Memory by kind sums to the peak that is tracked; a leak is told from what goes up and down."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from monitor.memory_cases import counted_on_rank
from support.pool import pool
from tessera.config.schema import TrainConfig
from tessera.core.recorder import Record
from tessera.monitor.counted import COUNTED_STEP, CountedSteps
from tessera.monitor.memory import Leak, MemoryByKind
from train.runs import Workshop, metrics

MIB = 2**20


def test_each_tensor_has_the_kind_of_its_phase_or_of_who_fills_it():
    weight = torch.ones(100)
    with MemoryByKind([weight]) as counted:
        counted.phase = "forward"
        kept, dropped = weight * 2, weight * 3
        brought = torch.zeros(50)
        counted.brought(Record("all_gather", ("col",), 2, 200, 100), brought)
        counted.brought(Record("all_reduce", ("col",), 2, 400, 400), kept)
        counted.phase = "backward"
        gradient = kept * 2
        del dropped
        more = torch.ones(10)
    counted.label(gradient, "states")
    assert counted.peak_by_kind() == {"states": 800, "activations": 800, "gathered": 200, "other": 0}
    assert counted.peak == 1800 and more.numel() == 10, "when `more` came, `dropped` had gone"


@pytest.mark.parametrize("seen_before", [True, False])
def test_what_gets_its_memory_back_is_gathered(seen_before):
    """As FSDP2 does with the weights that it gathers, in the counted step and in those before it."""
    whole = torch.ones(100)
    with MemoryByKind([whole] if seen_before else []) as counted:
        counted.phase = "forward"
        whole.untyped_storage().resize_(0)
        whole.untyped_storage().resize_(400)
        used = whole.view(50, 2) * 2
    assert counted.peak_by_kind() == {"states": 0, "activations": 400, "gathered": 400, "other": 0}
    assert used.numel() == 100


LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "2d": {"tensor_parallel_size": 4, "tensor_parallel_mode": "2d"},
    "FSDP 2 × TP 2": {"dp_shard_size": 2, "tensor_parallel_size": 2},
    "ring": {"context_parallel_size": 2, "context_parallel_mode": "ring"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_by_kind_sums_to_the_tracked_peak(workshop: Workshop, tmp_path, name):
    """Steps 2 and 3 have rows of one length. Nothing is gathered on one rank, and something on several."""
    own = LAYOUTS[name] | {"max_steps": 3, "pad_to_sequence_len": True}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    for (found,) in pool(TrainConfig.model_validate(settings).world_size).run(counted_on_rank, settings):
        assert found.step == COUNTED_STEP and sum(found.kinds.values()) == pytest.approx(found.peak, rel=0.01)
        assert found.before <= found.kinds["states"] <= found.before + found.gradients
        assert found.kinds["activations"] > 0 and (found.kinds["gathered"] > 0) == (name != "1 rank")
    told = metrics(settings)[1]["memory"]["kinds_gib"]
    assert set(told) == {"states", "activations", "gathered", "other"}


def test_memory_by_kind_follows_a_run_whose_rows_become_longer(workshop: Workshop, tmp_path):
    """Rows of 4 tokens up to step 4, of 30 from then on, and an evaluation between: step 6 is counted anew."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"input_ids": [7] * size, "labels": [7] * size}) + "\n" for size in [4] * 24 + [30] * 24)
    )
    own = {"datasets": [{"path": str(rows)}], "sequence_len": 32, "val_set_size": 2, "eval_steps": 5, "max_steps": 7}
    settings = workshop.settings("llama", tmp_path / "run", **own, tensor_parallel_size=2)
    for first, second in pool(2).run(counted_on_rank, settings, 4):
        assert (first.step, second.step) == (2, 6)
        for found in (first, second):
            assert sum(found.kinds.values()) == pytest.approx(found.peak, rel=0.01)
        assert second.kinds["activations"] > 3 * first.kinds["activations"]
        assert second.peak > 1.1 * first.peak, "what step 2 has would not be within 1% of it"
    told = {line["step"]: line["memory"].get("kinds_gib") for line in metrics(settings)}
    assert told[2] and told[6] and not (told[5] or told[7])


def counted_steps(peak: Callable[[int], int], steps: int, every: int = 1) -> list[int]:
    """The steps that are counted of a run in which the peak after each step is `peak` of it, on one of two ranks."""
    plan, found = CountedSteps(), []
    for step in range(1, steps + 1):
        if plan.next_is(step):
            found.append(step)
        if step % every == 0:
            plan.reported(step, [100 * MIB, peak(step)])
    return found


def test_steps_are_counted_by_kind_again_when_a_peak_rises_and_seldom():
    assert counted_steps(lambda step: 200 * MIB, 303) == [2, 102, 202, 302]
    assert counted_steps(lambda step: 200 * MIB + 3 * MIB * (step >= 60), 170) == [2, 61, 161]
    assert counted_steps(lambda step: 200 * MIB + 3 * MIB * (step >= 5), 160) == [2, 52, 152]
    assert counted_steps(lambda step: 200 * MIB + MIB * (step >= 60), 140) == [2, 102], "by less than 1%"
    assert counted_steps(lambda step: 2**step, 170) == [2, 52, 102, 152], "not more often, whatever happens"
    assert counted_steps(lambda step: 200 * MIB + 3 * MIB * (step >= 60), 170, every=25) == [2, 76]


def test_a_leak_among_ups_and_downs_is_found_once():
    leak, generator, kept = Leak(), random.Random(3), []
    found = []
    for step in range(1, 60):
        if step > 10:
            kept.append(torch.zeros(7, 3))
        held = 300 * MIB + max(0, step - 10) * MIB + generator.randrange(3 * MIB)
        found += [(step, told)] if (told := leak.step(held, step)) else []
    ((step, told),) = found
    growth, unit = re.match(r"memory grows by ([\d.]+) (.iB) a step", told).groups()
    assert step <= 60 and "tensors 7 × 3 (float32)" in told
    assert 0.7 < float(growth) / (1 if unit == "MiB" else 1024) < 1.3


@pytest.mark.parametrize("grows", [lambda step: 0, lambda step: 40 * (step > 20), lambda step: min(step, 12)])
def test_what_varies_jumps_once_or_settles_is_no_leak(grows):
    leak, generator = Leak(), random.Random(4)
    held = [300 * MIB + grows(step) * MIB + generator.randrange(8 * MIB) for step in range(100)]
    assert not [told for step, size in enumerate(held) if (told := leak.step(size, step))]
