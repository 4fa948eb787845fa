"""Memory where ranks share sequences: saved activations by closed form, and peaks that fall as ranks are added."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from distributed.model_cases import GPT2, LLAMA
from plan.context_cases import MODELS, Case, parallel_of, shape_of
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.streams import residual_layout
from tessera.plan.count import counted_step
from tessera.plan.memory import saved_bytes, state_bytes
from tessera.plan.scratch import scratch_bytes

BF16 = torch.bfloat16
STEADY = replace(GPT2, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
SMALL_CHANGE = 64  # bytes: the loss, and which heads a rank takes

SAVED = [
    Case("llama", {"ring": 2}, "ring"),
    Case("kv 6:3", {"ulysses": 2}, compute=BF16),
    Case("steady", {"ulysses": 2, "col": 2}, compute=BF16),
    Case("llama", {"ring": 2, "col": 2}, recompute=True),
    Case("llama", {"row": 2, "col": 2}, rows=1, joined=True, compute=BF16),
    Case("steady", {"shard": 2, "ring": 2}),
]
SAVED_TOO = [
    Case("kv 6:3", {"ring": 2, "ulysses": 2}, "ring"),
    Case("steady", {"row": 2, "col": 2}, "ring", rows=1, joined=True),
    Case("steady", {"ring": 2}, compute=BF16, recompute=True),
    Case("llama", {"ulysses": 4}),
    Case("llama", {"ring": 2, "row": 2}, compute=BF16),
    Case("windows", {"ring": 4}),
]


@pytest.mark.parametrize("case", [*SAVED, *(pytest.param(case, marks=pytest.mark.slow) for case in SAVED_TOO)], ids=str)
def test_saved_activations_equal_the_closed_form(case):
    model = STEADY if case.model == "steady" else MODELS[case.model]
    parallel, shape = parallel_of(case, Mesh(case.sizes, rank=1)), shape_of(case)
    memory = counted_step(model, shape, parallel).memory
    assert 0 <= memory.activations - saved_bytes(model, shape, parallel) <= SMALL_CHANGE
    steps = memory.optimizer - 2 * memory.parameters  # one count of steps for each parameter
    assert memory.states - steps == state_bytes(model, parallel)


# activations dominate: more tokens than features, few words
LONG = replace(LLAMA, num_layers=6, vocab_size=64, num_kv_heads=4, max_positions=8192)
SHAPE = StepShape(batch=1, sequence=4096)
WAYS = {
    "exchange 2": Case("", {"ring": 2}),
    "ring 4": Case("", {"ring": 4}, "ring"),
    "ulysses 4": Case("", {"ulysses": 4}),
    "ring 2": Case("", {"ring": 2}, "ring"),
    "ulysses 2": Case("", {"ulysses": 2}),
    "exchange 4": Case("", {"ring": 4}),
    "ring 2 × ulysses 2": Case("", {"ring": 2, "ulysses": 2}, "ring"),
}
ALWAYS = ("exchange 2", "ring 4")


@cache
def peak(way):
    sizes = WAYS[way].sizes if way else {}
    parallel = parallel_of(replace(WAYS[way], compute=torch.float32), Mesh(sizes, rank=0)) if way else None
    return counted_step(LONG, SHAPE, parallel or Parallel(Mesh(rank=0), residual_layout(True))).memory


@pytest.mark.parametrize("way", [w if w in ALWAYS else pytest.param(w, marks=pytest.mark.slow) for w in WAYS])
def test_peaks_fall_as_ranks_are_added(way):
    """One document; what is saved for the backward, and the peak of a step in which that is nearly all."""
    ranks, alone, memory = math.prod(WAYS[way].sizes.values()), peak(""), peak(way)
    assert alone.activations > 0.9 * alone.peak
    assert memory.activations == pytest.approx(alone.activations / ranks, rel=0.1)
    assert memory.peak == pytest.approx(alone.peak / ranks, rel=0.1)


def test_scratch_falls_as_ranks_are_added():
    layouts = {n: parallel_of(Case("", {"ring": n, "col": 2}), Mesh({"ring": n, "col": 2}, rank=0)) for n in (1, 2, 4)}
    alone, two, four = (scratch_bytes(LONG, SHAPE.tokens, layouts[n]) for n in (1, 2, 4))
    assert alone == 2 * two == 4 * four > 0
