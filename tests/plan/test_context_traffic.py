"""Counted traffic of shared sequences equals the closed form exactly, on every rank, for random documents."""

import math
from dataclasses import replace

import pytest
import torch

from plan.context_cases import LENGTH, MODELS, Case, parallel_of, shape_of, traffic_of
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.shape import Savers
from tessera.models.anatomy import anatomy_of
from tessera.nn.context.cut import streams_of
from tessera.plan.count import counted_step
from tessera.plan.sequences import attention_moves
from tessera.plan.traffic import received_bytes, step_transfers, totals
from tessera.sizes.context import ContextParallel, Surroundings, received

BF16 = torch.bfloat16
JOINED = {"rows": 1, "joined": True}
TWO = [
    Case("windows", {"ring": 2}),
    Case("windows", {"ring": 2}, "ring"),
    Case("kv 6:3", {"ulysses": 2}, recompute=True),
    Case("llama", {"ring": 2}, "ring", seed=None, recompute=True, micro_batches=2),
    Case("gpt2", {"ring": 2}, compute=BF16),
    Case("gpt2", {"ring": 2}, "ring", compute=BF16),
    Case("kv 6:3", {"ulysses": 2}, chunks=3),
    Case("llama", {"ring": 2}, "ring", recompute=True, savers=Savers(attention_once=True)),
    Case("llama", {"ulysses": 2}, recompute=True, chunks=4, savers=Savers(attention_once=True)),
]
FOUR = [
    Case("llama", {"ring": 4}, seed=1),
    Case("windows", {"ring": 4}, "ring", micro_batches=3),
    Case("llama", {"ring": 2, "ulysses": 2}),
    Case("windows", {"ring": 2, "ulysses": 2}, "ring", recompute=True),
    Case("llama", {"ring": 2, "col": 2}, "ring"),
    Case("gpt2", {"ulysses": 2, "col": 2}),
    Case("llama", {"shard": 2, "ring": 2}),
    Case("windows", {"row": 2, "col": 2}, **JOINED),
    Case("llama", {"row": 2, "col": 2}, "ring", **JOINED),
    Case("kv 6:3", {"inner": 2, "row": 2}, recompute=True, **JOINED),
    Case("windows", {"inner": 2, "col": 2}, "ring", rows=3, joined=True),
    Case("windows", {"ring": 2, "ulysses": 2}, "ring", recompute=True, chunks=2),
    Case("gpt2", {"ring": 2, "col": 2}, recompute=True, savers=Savers(attention_once=True, mlp_tiles=3)),
]
EIGHT = [
    Case("windows", {"ring": 8}, "ring"),
    Case("windows", {"ring": 8}),
    Case("llama", {"ring": 2, "row": 2, "col": 2}),
    Case("llama", {"ring": 2, "row": 2, "col": 2}, "ring", **JOINED),
    Case("windows", {"ring": 2, "ulysses": 2, "col": 2}, "ring", recompute=True, micro_batches=2),
    Case("llama", {"shard": 2, "ring": 2, "col": 2}, "ring"),
    Case("gpt2", {"replicate": 2, "ring": 2, "ulysses": 2}, compute=BF16),
    Case("llama", {"depth": 2, "ring": 2, "col": 2}, rows=2),
    Case("kv 6:3", {"inner": 2, "row": 2, "col": 2}, **JOINED),
    Case("windows", {"ring": 2, "inner": 2, "row": 2}, "ring", **JOINED),
    Case("kv 6:3", {"ulysses": 2, "inner": 2, "row": 2}, **JOINED),
]


def check(cases):
    for rank, found in enumerate(pool(math.prod(cases[0].sizes.values())).run(traffic_of, cases)):
        for case, (counted, formula) in zip(cases, found, strict=True):
            assert counted == formula, f"{case}, rank {rank}"


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["2 ranks", "4 ranks"])
def test_counts_of_real_ranks_equal_the_formula(cases):
    check(cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT, ids=str)
def test_counts_of_eight_ranks_equal_the_formula(case):
    check([case])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_counts_of_other_documents(seed):
    check([replace(case, seed=seed + 10, micro_batches=2) for case in TWO[:2]])
    check([replace(case, seed=seed + 10) for case in FOUR[:4]])


def formula(case, rank=1):
    parallel = parallel_of(case, Mesh(case.sizes, rank=rank))
    return step_transfers(MODELS[case.model], shape_of(case), parallel)


def attention(case, rank=1):
    """What attention moves between ranks, by what and phase: bytes received in a step."""
    moved = {}
    for each in formula(case, rank):
        if each.site == "attention" and each.axis in ("ring", "ulysses"):
            key = each.phase, each.what
            moved[key] = moved.get(key, 0) + each.times * each.received
    return moved


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", {"shard": 2, "ring": 2, "ulysses": 2, "col": 2}, "ring", rows=1),
        pytest.param(Case("windows", {"ring": 4}, recompute=True), marks=pytest.mark.slow),
        # 32 ranks in four dimensions, as docs/quick-reference.md has them
        pytest.param(
            Case("gpt2", {"replicate": 2, "shard": 2, "ulysses": 2, "col": 4}, rows=1), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_fake_world_counts_the_same(case):
    parallel = parallel_of(case, Mesh(case.sizes, rank=1))
    counted = counted_step(MODELS[case.model], shape_of(case), parallel)
    assert counted.totals == totals(formula(case))


def test_one_document_moves_what_zigzag_reads():
    """Of a row of 48 tokens each of 2 owners has a quarter at either end, or the half between."""
    one = {"seed": None, "rows": 1}
    token = 2 * 2 * 8 * 8  # k and v of 2 heads of 8 features in float64
    reads = (24, 12)  # the first owner's last quarter sees the half; the half sees the first quarter
    for rank in (0, 1):
        layers = 2
        own, other = (layers * token * n for n in (reads[rank], reads[1 - rank]))
        exchanged = {("forward", "k·v"): own, ("backward", "k·v"): own, ("backward", "dk·dv"): other}
        assert attention(Case("llama", {"ring": 2}, **one), rank) == exchanged
        assert attention(Case("llama", {"ring": 2}, "ring", **one), rank) == exchanged


@pytest.mark.parametrize("model, ulysses", [("llama", 1), ("llama", 2), ("llama", 4), ("kv 6:3", 1), ("kv 6:3", 2)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_auto_compares_what_the_busiest_rank_receives(model, ulysses, chunks):
    """Of one document on 4 ranks; sizes/context.py has it without a plan."""
    if (heads := MODELS[model].num_heads // ulysses) % chunks or chunks > 1 and ulysses == 1:
        pytest.skip(f"{heads} heads are not cut in {chunks}")
    sizes = {"ring": 4 // ulysses, "ulysses": ulysses}
    case = Case(model, sizes, rows=1, seed=None, chunks=chunks)
    busiest = max(sum(attention(case, rank).values()) for rank in range(4))
    asked = ContextParallel(4, chunks=chunks)
    around = Surroundings(MODELS[model].num_heads, MODELS[model].num_kv_heads, MODELS[model].head_dim)
    layers, tokens, element = MODELS[model].num_layers, LENGTH // 4, 8
    assert busiest == layers * tokens * element * around.head_dim * sum(received(asked, ulysses, around))


def test_a_ring_carries_sums_in_float32_and_an_exchange_in_the_compute_dtype():
    one = {"seed": None, "rows": 1, "compute": BF16}
    exchanged, ring = (attention(Case("llama", {"ring": 2}, transport, **one)) for transport in ("exchange", "ring"))
    assert ring["forward", "k·v"] == exchanged["forward", "k·v"]
    assert ring["backward", "dk·dv"] == 2 * exchanged["backward", "dk·dv"]


def test_ulysses_moves_less_with_more_ranks_and_repeats_few_heads():
    tokens = 2 * LENGTH
    for ranks in (2, 4):
        moved = attention(Case("llama", {"ulysses": ranks}))
        heads = {2: 2, 4: 4}[ranks]  # kv heads, each repeated where ranks are more
        assert moved["forward", "q"] == 2 * 8 * 8 * 8 * (tokens // ranks) * (ranks - 1) // ranks
        assert moved["forward", "k·v"] == 2 * 2 * heads * 8 * 8 * (tokens // ranks) * (ranks - 1) // ranks
        assert moved["backward", "dresult"] == moved["forward", "result"] == moved["forward", "q"]


def test_nobody_calls_where_nobody_reads():
    """Each row of two is a document, and each of two owners has one of them whole."""
    for transport in ("exchange", "ring"):
        case = Case("llama", {"row": 2}, transport, rows=2, seed=None, joined=True)
        assert not [each for each in formula(case) if each.site == "attention"]
    assert attention(Case("llama", {"ring": 2}, rows=2, seed=None)) == {}


@pytest.mark.parametrize("transport", ["exchange", "ring"])
def test_a_shorter_window_moves_less(transport):
    case = Case("windows", {"ring": 4}, transport, seed=None)
    parallel, model = parallel_of(case, Mesh(case.sizes, rank=1)), MODELS["windows"]
    (stream,) = streams_of(shape_of(case).document_starts[0], case.rows * LENGTH, parallel, model.windows)
    kinds = {layer[0].attention.window: layer[0].attention for layer in anatomy_of(model).layers}
    moved = {
        window: sum(move.received for move in attention_moves(attention, stream, 24, parallel))
        for window, attention in kinds.items()
    }
    assert 0 < 2 * moved[5] < 2 * moved[17] < 2.5 * moved[None]


def test_recompute_moves_once_more_in_the_forward():
    case = Case("llama", {"ring": 2, "ulysses": 2}, "ring")
    again = attention(replace(case, recompute=True))
    assert again == {key: n * (2 if key[0] == "forward" else 1) for key, n in attention(case).items()}


def test_a_formula_without_documents_would_be_far_off():
    packed, unpacked = (received_bytes(formula(Case("llama", {"ring": 4}, seed=seed))) for seed in (0, None))
    assert packed != unpacked
