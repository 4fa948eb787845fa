"""Counted traffic under FSDP2 equals the closed form exactly, on every rank; accumulation repeats gathers alone."""

import math

import pytest
import torch

from distributed.test_data import LAYOUTS
from plan.data_cases import data_traffic
from support.pool import pool
from tessera.layout.shape import Fsdp
from tessera.sizes.schedule import Schedule

DEFAULT, KEPT, ONE_UNIT = Fsdp(), Fsdp(reshard=False), Fsdp(by_layer=False)


def traffic(layout, name="llama", asked=DEFAULT, micro_batches=2, compute=torch.float32, **options):
    """What rank 0 counts, after every rank's count has been held against the formula."""
    sizes = LAYOUTS[layout]
    run = pool(math.prod(sizes.values())).run
    for counted, formula in (found := run(_with_options, name, sizes, asked, micro_batches, compute, options)):
        assert counted == formula
    return found[0][0]


def _with_options(name, sizes, asked, micro_batches, compute, options):
    return data_traffic(name, sizes, asked, micro_batches, compute, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_formula(layout):
    traffic(layout, "gpt2 tied", KEPT, compute=torch.bfloat16, recompute=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_the_formula_with_weights_gathered_again(layout):
    traffic(layout)


def test_loops_and_weights_cut_over_depth_equal_the_formula():
    for name in ("summa", "cannon"):
        traffic("fsdp 2 × 2d 2×2", fsdp=("shard",), weights_over=("row",), schedule=Schedule(name))
    traffic("fsdp 2 × 2.5d 2×1×2", fsdp=("shard", "depth", "row"))
    traffic("fsdp 2 × tp 2", "llama q/k norm", ONE_UNIT)


@pytest.mark.parametrize("layout", ["hsdp 2×2", "fsdp 2 × 2d 2×2"])
def test_accumulation_repeats_gathers_alone_and_none_where_weights_are_kept(layout):
    data = {axis for axis, _ in traffic(layout)} - {"col"}
    for asked, gathers in ((Fsdp(), 3), (KEPT, 1)):
        one, three = (traffic(layout, asked=asked, micro_batches=count) for count in (1, 3))
        for (axis, kind), (calls, received) in one.items():
            if axis in data:
                times = gathers if kind == "all_gather" else 1
                assert three[axis, kind] == (times * calls, times * received), (asked, axis, kind)


@pytest.mark.parametrize("layout", ["hsdp 2×2", pytest.param("fsdp 2 × 2d 2×2", marks=pytest.mark.slow)])
def test_sums_after_each_micro_batch_repeat_with_them(layout):
    data = {axis for axis, _ in traffic(layout)} - {"col"}
    one, three = (traffic(layout, asked=Fsdp(sync_each_batch=True), micro_batches=count) for count in (1, 3))
    for (axis, kind), (calls, received) in one.items():
        if axis in data and kind != "all_reduce":
            assert three[axis, kind] == (3 * calls, 3 * received), (axis, kind)
    once = traffic(layout, micro_batches=3)
    scattered = [key for key in once if key[0] in data and key[1] == "reduce_scatter"]
    assert scattered and all(three[key][1] == 3 * once[key][1] for key in scattered)
