"""Steps whose numbers are not finite: they change nothing, are counted, and end a run when there are too many."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from support.pool import pool
from tessera.checkpoint.folder import read_state, read_sums
from train.faults_on_rank import spoilt_on_rank
from train.runs import Metrics, Workshop, metrics, run

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "1d 2": {"tensor_parallel_size": 2},
    "fsdp 2": {"dp_shard_size": 2, "micro_batch_size": 2},
    "hsdp 2×2": {"dp_shard_size": 2, "dp_replicate_size": 2, "micro_batch_size": 1},
    "2.5d 2×1×2": {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 4, "micro_batch_size": 4},
}
WORLDS = {"one process": 1, "1d 2": 2, "fsdp 2": 2, "hsdp 2×2": 4, "2.5d 2×1×2": 4}


def skipping(workshop: Workshop, output: Path, layout: str, **changes: Any) -> dict[str, Any]:
    own = {"nonfinite_step": "skip", "lr_scheduler": "constant", "check_replicas_steps": 1, "max_steps": 4}
    settings = workshop.settings("llama 64", output, **own | LAYOUTS[layout] | changes)
    del settings["warmup_steps"]
    return settings


def tensors(settings: dict[str, Any], step: int) -> dict[str, str]:
    """The sums of what the ranks wrote of model and optimizer after a step."""
    sums = read_sums(Path(settings["output_dir"]) / f"checkpoint-{step}")
    return {name: digest for name, digest in sums.items() if name.endswith(".distcp")}


def losses(found: Metrics) -> list[tuple[float, float]]:
    return [(m["loss"], m["grad_norm"]) for m in found]


def without_rows(path: Path, rows: Path, first: int, count: int) -> dict[str, Any]:
    lines = rows.read_text().splitlines(True)
    path.write_text("".join(lines[:first] + lines[first + count :]))
    return {"datasets": [{"path": str(path)}]}


@pytest.mark.parametrize(
    ("layout", "factor"),
    [
        *((layout, math.nan) for layout in LAYOUTS),
        ("one process", math.inf),
        ("1d 2", math.inf),
        *(pytest.param(layout, math.inf, marks=pytest.mark.slow) for layout in ("fsdp 2", "hsdp 2×2", "2.5d 2×1×2")),
    ],
)
def test_a_skipped_step_changes_nothing_and_the_next_takes_the_next_rows(workshop: Workshop, tmp_path, layout, factor):
    """As if its rows had never been in the data; weights and optimizer stay bit for bit."""
    settings, world = skipping(workshop, tmp_path / "run", layout, save_steps=1), WORLDS[layout]
    said = pool(world).run(spoilt_on_rank, settings, {2}, world - 1, factor)
    found = metrics(settings)
    assert "step 2 of 4 · not finite, skipped (1 so far) · lr 1.00e-03" in said[0] and not any(
        "Failed" in s for s in said
    )
    assert [(m["step"], m["skipped_steps"]) for m in found] == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert (found[1]["loss"], found[1]["grad_norm"]) == (None, None)
    assert tensors(settings, 1) == tensors(settings, 2) != tensors(settings, 3)
    assert read_state(tmp_path / "run/checkpoint-4").skipped == 1

    data_ranks = settings.get("dp_shard_size", 1) * settings.get("dp_replicate_size", 1)
    step = settings["micro_batch_size"] * settings["gradient_accumulation_steps"] * data_ranks
    fewer = without_rows(tmp_path / "rows.jsonl", workshop.rows, step, step)
    again = run(settings | fewer | {"output_dir": str(tmp_path / "fewer"), "max_steps": 3})
    assert losses(again) == losses([found[0], *found[2:]])


@pytest.mark.parametrize("layout", ["one process", "fsdp 2"])
def test_the_count_survives_a_resume(workshop: Workshop, tmp_path, layout):
    settings, world = skipping(workshop, tmp_path / "run", layout, save_steps=2), WORLDS[layout]
    pool(world).run(spoilt_on_rank, settings | {"max_steps": 2}, {1, 2}, 0)
    assert read_state(tmp_path / "run/checkpoint-2").skipped == 2
    pool(world).run(spoilt_on_rank, settings | {"resume_from_checkpoint": True}, {4}, 0)
    assert [m["skipped_steps"] for m in metrics(settings)] == [1, 2, 2, 3]
    assert [m["loss"] is None for m in metrics(settings)] == [True, True, False, True]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert '"loss": null, "grad_norm": null' in lines[0] and all(json.loads(line) for line in lines)


@pytest.mark.parametrize("layout", ["one process", "1d 2", "fsdp 2"])
def test_stop_ends_the_run_at_such_a_step(workshop: Workshop, tmp_path, layout):
    settings = skipping(workshop, tmp_path / "run", layout, nonfinite_step="stop", save_steps=1)
    said = pool(WORLDS[layout]).run(spoilt_on_rank, settings, {3}, WORLDS[layout] - 1)
    for text in said:
        # one that is not finite is enough: under 1d every rank has the same loss, and only the first one's counts
        assert re.search(r"RunFailed: step 3: loss \S+, gradient norm nan; the weights were not updated\n", text), text
        assert text.endswith(f"last good checkpoint: {tmp_path}/run/checkpoint-2\n")
    assert [m["step"] for m in metrics(settings)] == [1, 2]


@pytest.mark.parametrize("layout", ["one process", "1d 2"])
def test_ten_in_a_row_end_a_run_that_skips_and_nine_do_not(workshop: Workshop, tmp_path, layout):
    settings, world = skipping(workshop, tmp_path / "run", layout, max_steps=22), WORLDS[layout]
    said = pool(world).run(spoilt_on_rank, settings, {*range(2, 11), *range(12, 30)}, world - 1)
    told = r"RunFailed: step 21: loss \S+, gradient norm nan; the weights were not updated in 10 steps in a row\n"
    assert all(re.search(told, text) for text in said)
    found = metrics(settings)
    assert [m["step"] for m in found if m["loss"] is not None] == [1, 11]
    assert (found[-1]["step"], found[-1]["skipped_steps"]) == (20, 18)
