"""A page of very many steps: read in bounded memory, decimated with its spikes, under 5 MB."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from report.made_runs import Elements, make_run, monitored, of_ranks, reported

ROOT = Path(__file__).parents[2]
AXES = ("replicate", "shard", "ring", "ulysses", "inner", "depth", "row", "col", "shard·ring")
LIMIT = 5_000_000
"""Bytes of a page."""


def large_run(folder: Path, steps: int, spike: int) -> Path:
    """A run over nine axes with one loss that stands out; numbers have as many digits as measured ones."""
    make_run(folder, [])
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "monitor.jsonl").open("w") as monitor:
        monitor.write(json.dumps({"ranks": 64, "mesh": {"col": 64}, "machines": [f"n{n}" for n in range(64)]}) + "\n")
        for number in range(1, steps + 1):
            noise = (number * 0.6180339887498949) % 1
            record = monitored(number) if number % 10 == 0 else monitored(number, seconds={}, memory={}, slowest=None)
            record |= {
                "loss": 99.5 if number == spike else 2 + noise,
                "grad_norm": 1 + noise / 3,
                "mfu": 0.4 + noise / 9,
            }
            record |= {"step_seconds": 0.1 + noise / 30, "tokens_per_second": 1e5 + 1e3 * noise}
            record["communicated_bytes"] = dict.fromkeys(AXES, 10**8)
            if number % 10 == 0:
                record["seconds"]["communication"] = {axis: noise / (7 + n) for n, axis in enumerate(AXES)}
                record["seconds"] |= {"compute": 0.05 + noise / 70, "data": noise / 900}
            if number % 500 == 0:
                record["eval_loss"] = 2 + noise
                monitor.write(json.dumps(of_ranks(number, [0.05 + noise / 50] * 64)) + "\n")
            metrics.write(json.dumps(record) + "\n")
    return folder


def check(page, size: int, steps: int, spike: int) -> None:
    loss = page.chart("Loss, nats a token")["lines"][0]
    assert (spike, 99.5) in zip(loss["steps"], loss["values"], strict=True)
    assert loss["steps"][0] <= 1024 and loss["steps"][-1] == steps
    assert 1000 < len(loss["steps"]) <= 2049
    for at, value in zip(loss["steps"], loss["values"], strict=True):
        assert at == spike or value == 2 + (at * 0.6180339887498949) % 1
    assert size < LIMIT, size
    drawn = [path for name, a in page.elements if name == "path" and (path := a.get("d")) is not None]
    assert min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn[1])) < 20  # the spike, near the top
    assert any(str(a.get("class")).startswith("band") for name, a in page.elements if name == "path")


def test_ten_thousand_steps_two_runs(tmp_path):
    """No more points than a million have, and the pages of two runs together stay small."""
    first = large_run(tmp_path / "one", 10_000, 4_321)
    second = Path(shutil.copytree(first, tmp_path / "two"))
    page = reported(first, second)
    check(page, (first / "compared.html").stat().st_size, 10_000, 4_321)
    assert "of each 16 steps" in page.text


def test_a_thousand_steps_are_all_shown(tmp_path):
    page = reported(large_run(tmp_path / "run", 1_000, 500))
    assert page.chart("Loss, nats a token")["lines"][0]["steps"] == list(range(1, 1_001))


MEASURED = """
import resource, sys
from pathlib import Path
from tessera.cli.report import report
small, large = map(Path, sys.argv[1:])
report([small], None, False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report([large], None, False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_million_steps_take_the_memory_of_ten_thousand(tmp_path):
    small, large = large_run(tmp_path / "small", 20_000, 4_321), large_run(tmp_path / "large", 1_000_000, 765_432)
    command = [sys.executable, "-c", MEASURED, str(small), str(large)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 100 * 1024, "KiB more than the small one took"
    text = (large / "report.html").read_text()
    check(Elements(text), len(text.encode()), 1_000_000, 765_432)
