import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import Inspection, LiveTensors, StepTime
from benchmarks.report import Outcome, render_shape
from benchmarks.workload import SHAPES, batch

ROOT = Path(__file__).parents[2]


def outcome(name: str, loss: float, norm: float = 1.0) -> Outcome:
    made = Outcome(CONTENDERS[name])
    made.add_steps([[StepTime(2.0, 1.0, loss, norm)], [StepTime(3.0, 0.5, loss, norm)]])
    made.inspections = [Inspection({"allreduce": 3}, {"allreduce": 10**6}, 2**20, 2**21, {"aten::mm": 0.5}, 1.0)]
    return made


def test_parameter_counts():
    assert SHAPES["8k"].parameters == 20_189_696
    assert SHAPES["32k"].parameters == 20_189_696 + 2 * 512 * (32000 - 8192)


def test_batches_follow_from_their_number():
    shape = SHAPES["tiny"]
    assert torch.equal(batch(shape, 3), batch(shape, 3))
    assert not torch.equal(batch(shape, 3), batch(shape, 2))


def test_peak_counts_what_lives_together():
    kept = torch.zeros(1000)  # alive on entry: counts from the start
    with LiveTensors() as seen:
        base = seen.current
        for _ in range(3):
            torch.zeros(5000)  # freed at once: never two of them together
        view = kept.view(10, 100)  # no storage of its own
        two = [torch.zeros(1000), torch.zeros(1000)]
    assert base >= kept.nbytes
    assert seen.peak - base == 5000 * 4
    assert seen.current - base == 2 * 1000 * 4
    assert len(two) == 2 and view.numel() == 1000


def test_payload_is_the_whole_tensor():
    if dist.is_initialized():
        pytest.skip("torch.distributed is in use here")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard, whole = torch.ones(100), torch.empty(100)
        with LiveTensors() as seen:
            dist.all_reduce(shard)
            dist.all_gather([whole], shard)
            dist.all_gather([whole], shard)
    finally:
        dist.destroy_process_group()
    assert sum(seen.calls.values()) == 3
    assert sum(seen.payload.values()) == 3 * 400


def test_report_marks_a_loss_that_differs_and_a_contender_that_is_missing():
    missing = Outcome(CONTENDERS["torch-tp"], error="it broke")
    same, other, nan = (outcome("tessera-2", loss) for loss in (8.00001, 8.01, math.nan))
    replicas_counted = outcome("tessera-2", 8.0, norm=1.01)
    text = render_shape(SHAPES["tiny"], [outcome("transformers", 8.0), same, missing])
    assert "DIFFERS" not in text
    assert "missing: **torch-tp**: it broke" in text
    assert "| 3.000" in text and "| 1.000" in text  # the slowest rank's wall, the busiest rank's CPU
    for wrong in (other, nan, replicas_counted):
        assert "DIFFERS" in render_shape(SHAPES["tiny"], [outcome("transformers", 8.0), wrong])


def test_a_run_writes_its_report(tmp_path: Path):
    command = [sys.executable, "benchmarks/bench.py", "--shapes", "tiny", "--rounds", "1", "--steps", "1"]
    command += ["--only", "transformers", "--output", str(tmp_path / "report.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report in done.stdout
    assert "| transformers | 1 " in report and "missing" not in report
