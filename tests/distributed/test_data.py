"""Data axes under FSDP2, with and without tensor axes, against one process in float64."""

from typing import Any

import pytest
import torch

from distributed.data_cases import embedding_gradient, read_by_ranks, saved_by_ranks
from distributed.model_cases import model_errors
from support.pool import pool
from tessera.layout.shape import Fsdp
from tessera.sizes.schedule import Schedule

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


@pytest.mark.parametrize("model", [pytest.param("llama", marks=pytest.mark.slow), "gpt2 tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_equals_one_process(layout, model):
    """Loss, norm, every gradient, updated weights; dropout in GPT-2, two micro-batches, vocabulary 509."""
    check(model, LAYOUTS[layout])


@pytest.mark.parametrize(
    "asked",
    [
        Fsdp(reshard=False),
        Fsdp(prefetch=True),
        Fsdp(offload=True),
        Fsdp(by_layer=False),
        Fsdp(sync_each_batch=True),
        pytest.param(Fsdp(reshard=False, sync_each_batch=True), marks=pytest.mark.slow),
        pytest.param(Fsdp(offload=True, sync_each_batch=True), marks=pytest.mark.slow),
    ],
    ids=["weights kept", "prefetch", "offload", "one unit", "each batch", "kept, each batch", "offload, each batch"],
)
@pytest.mark.parametrize("layout", [pytest.param("hsdp 2×2", marks=pytest.mark.slow), "fsdp 2 × tp 2"])
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


@pytest.mark.parametrize(("vocabulary", "sizes"), [(257, {"shard": 4, "col": 2}), (101, {"shard": 3, "col": 2})])
def test_a_vocabulary_cut_unevenly_twice_is_saved_and_read(vocabulary, sizes, tmp_path):
    """The shards of col are themselves cut at different places: 33 33 33 30 and 32 32 32 32 of 257 words."""
    world = sizes["shard"] * sizes["col"]
    pool(world).run(saved_by_ranks, vocabulary, sizes, tmp_path)
    assert max(pool(2).run(read_by_ranks, vocabulary, {"col": 2}, tmp_path)) == 0
    pool(2).run(saved_by_ranks, vocabulary, {"col": 2}, tmp_path / "other")
    assert max(pool(world).run(read_by_ranks, vocabulary, sizes, tmp_path / "other")) == 0


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    exact, ours = (pool(2).run(embedding_gradient, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert (ours - exact).norm() < 0.02 * exact.norm(), "added up in bfloat16 it is 8% off"
