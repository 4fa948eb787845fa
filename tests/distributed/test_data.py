"""Data axes under FSDP2, with and without tensor axes, against one process in float64."""

from typing import Any

import pytest

from distributed.model_cases import model_errors
from support.pool import pool
from tessera.parallel.data import Fsdp
from tessera.schedule import Schedule

LAYOUTS: dict[str, dict[str, int]] = {
    "fsdp 2": {"shard": 2},
    "ddp 2": {"replicate": 2},
    "fsdp 2 × tp 2": {"shard": 2, "col": 2},
    "hsdp 2×2": {"replicate": 2, "shard": 2},
    "hsdp 2×2 × tp 2": {"replicate": 2, "shard": 2, "col": 2},
    "fsdp 2 × 2d 2×2": {"shard": 2, "row": 2, "col": 2},
    "fsdp 2 × 2.5d 2×1×2": {"shard": 2, "depth": 2, "col": 2},
    "fsdp 2 × 3d 2×1×2": {"shard": 2, "inner": 2, "col": 2},
}
SIZE = 8  # sequences of a micro-batch, of all data ranks
TOLERANCE = 1e-12


def errors(name: str, sizes: dict[str, int], sequence_parallel: bool = True, **options: Any) -> dict[str, float]:
    """The worst of all ranks."""
    world = 1
    for size in sizes.values():
        world *= size
    options = {"fsdp": ("shard", "row"), "weights_over": ()} | options
    smoothing, leave_out = options.pop("smoothing", 0.0), options.pop("leave_out", None)
    found = pool(world).run(model_errors, name, sizes, sequence_parallel, 2, smoothing, leave_out, options, SIZE)
    return {key: max(worst[key] for worst, _, _ in found) for key in found[0][0]}


def check(name: str, sizes: dict[str, int], sequence_parallel: bool = True, **options: Any) -> None:
    found = errors(name, sizes, sequence_parallel, **options)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("model", ["llama", "gpt2 tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_equals_one_process(layout, model):
    """Loss, norm, every gradient, updated weights; dropout in GPT-2, two micro-batches, vocabulary 509."""
    check(model, LAYOUTS[layout])


@pytest.mark.parametrize(
    "asked",
    [Fsdp(reshard=False), Fsdp(prefetch=True), Fsdp(offload=True), Fsdp(by_layer=False)],
    ids=["weights kept", "prefetch", "offload", "one unit"],
)
@pytest.mark.parametrize("layout", ["hsdp 2×2", "fsdp 2 × tp 2"])
def test_switches_change_no_number(layout, asked):
    check("llama tied", LAYOUTS[layout], asked=asked)


@pytest.mark.parametrize("layout", ["fsdp 2 × tp 2", "fsdp 2 × 2d 2×2"])
def test_recomputed_layers_change_no_number(layout):
    check("gpt2", LAYOUTS[layout], gradient_checkpointing=True)


def test_without_sequence_parallelism_and_with_smoothing_and_head_norms():
    check("llama q/k norm", LAYOUTS["fsdp 2 × tp 2"], sequence_parallel=False, smoothing=0.1)
    check("llama q/k norm", LAYOUTS["fsdp 2 × 3d 2×1×2"])


@pytest.mark.parametrize("name", ["summa", "cannon"])
def test_loops_keep_their_own_leg_along_row(name):
    options = {"fsdp": ("shard",), "weights_over": ("row",), "schedule": Schedule(name)}
    check("llama", LAYOUTS["fsdp 2 × 2d 2×2"], **options)


def test_slices_and_weights_cut_over_depth():
    check("llama", LAYOUTS["fsdp 2 × 2d 2×2"], schedule=Schedule(slices=2))
    check("llama", LAYOUTS["fsdp 2 × 2.5d 2×1×2"], fsdp=("shard", "depth", "row"))
