"""Published step times, read from where they lie beside a checkout; they are not part of the project."""

import csv
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from benchmarks.published import gpt

from tessera.core.mesh import Mesh
from tessera.layout.resolve import parallel_of
from tessera.layout.shape import StepShape
from tessera.plan.calibrate import Run, place_of
from tessera.plan.machine import Curve, Profile
from tessera.plan.time import Pipeline
from tessera.plan.work import machines_of, step_work
from tessera.sizes.rules import TensorParallel

A100 = Profile(
    "A100",
    "A100",
    "",
    "",
    8,
    80 * 2**30,
    {"float16": 312e12},
    product_flops=271e12,
    product_half=64,
    attention_flops=60e12,
    memory_bandwidth=2.04e12,
    memory_efficiency=0.5,
    dispatch_seconds=1.2e-5,
    inside={"any": Curve(3e-5, 6e-6, 0.0, 200e9)},
    between={"any": Curve(6e-5, 1e-5, 0.0, 23e9)},
    overlap=0.3,
    contention=1.0,
    step_seconds=1e-3,
    score_bytes=4.0,
)
"""Where calibration starts: the vendor's and commonly measured figures of an A100 and of attention without flash."""


def folder() -> Path:
    """Where the data are; skips the test where they are not."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    found = Path(os.environ.get("TESSERA_VALIDATION_DATA") or beside)
    if not found.is_dir():
        pytest.skip(f"no validation data in {found}; TESSERA_VALIDATION_DATA names their folder")
    return found


@cache
def rows(name: str) -> list[dict[str, str]]:
    with open(folder() / name) as file:
        return list(csv.DictReader(file))


def run_of(row: dict[str, str]) -> Run:
    """A row of vtrain's tables: float16, every layer computed again, 1F1B, no sequence parallelism."""
    numbers = {key: int(float(row[key])) for key in ("tp", "dp", "pp", "hidden", "heads", "layers", "seq_len")}
    tp, dp, pp, width, heads, layers, length = numbers.values()
    batch = int(row["micro_batch"])
    mesh = Mesh({"replicate": dp, "col": tp, "pp": pp}, rank=0)
    model, tensor = gpt(width, heads, layers // pp, length), TensorParallel("1d", tp, sequence_parallel=False)
    parallel = parallel_of(tensor, mesh, batch, model.dimensions, dtype=torch.float16)
    shape = StepShape(batch, length, int(row["global_batch_seqs"]) // (batch * dp), recompute=True)
    work = step_work(model, shape, parallel, 8)
    stages = Pipeline(pp, machines_of(("pp",), mesh, 8), batch * length * width * 2)
    place = tuple(map(float, place_of(model, shape, parallel, pp)[0]))
    return Run(work, place, float(row["iter_ms"]) / 1e3, stages)
