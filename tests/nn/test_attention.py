"""Attention against explicit softmax attention: every number of heads and kv heads, on every tensor axis."""

import itertools

import pytest
import torch

from nn.attention_cases import attention_errors, combinations
from nn.shards import label, world
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.attend import attend
from tessera.nn.attention import Attention, AttentionConfig
from tessera.nn.context.heads import kv_heads_of
from tessera.nn.mask import Mask

TOLERANCE = 1e-12


def check(sizes, *arguments):
    for results, _ in pool(world(sizes)).run(attention_errors, sizes, *arguments):
        for (heads, kv_heads), (errors, in_turns) in results.items():
            assert max(errors.values()) <= TOLERANCE, (heads, kv_heads, errors)
            assert (in_turns > 1e-2) == (1 < kv_heads < heads)
    return results


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all to all"])
@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("col", [2, 3, 4])
def test_attention_equals_softmax(col, sequence_parallel, causal):
    """Among them 2 kv heads over 4 ranks, 3 over 2 (queries of one rank read kv heads unequally often), 1 over all."""
    results = check({"col": col}, sequence_parallel, causal, causal)
    assert results.keys() == set(combinations(col)) and any(kv % col for _, kv in results)


@pytest.mark.parametrize("sizes", [{"inner": 2, "col": 2}, {"row": 2}, {"depth": 2, "col": 2}], ids=label)
def test_attention_equals_softmax_on_every_axis(sizes):
    check(sizes, True, True, True, 0.0, [(4, 1), (4, 2), (6, 3)])


@pytest.mark.parametrize("sizes", [{"col": 2}, {"col": 4}, {"inner": 2, "col": 2}], ids=label)
def test_attention_with_dropped_probabilities(sizes):
    for causal in (True, False):
        check(sizes, True, causal, True, 0.3, [(4, 1), (4, 2), (4, 4)])


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
def test_leaving_out_any_collective_is_seen(sequence_parallel):
    """With one kv head for two ranks, so that k and v are gathered."""
    run, sizes = pool(2).run, {"col": 2}
    arguments = (sizes, sequence_parallel, True, True, 0.0, [(2, 1)])
    _, kinds = run(attention_errors, *arguments)[0]
    assert len(kinds) == (8 if sequence_parallel else 4)
    for index, kind in enumerate(kinds):
        results = run(attention_errors, *arguments, index)
        worst = max(max(errors.values()) for r, _ in results for errors, _ in r.values())
        assert not worst <= 1e-6, f"leaving out {index} ({kind}) went unseen"


@pytest.mark.parametrize("col", [1, 2, 3, 4, 6])
def test_kv_heads_are_those_that_the_queries_read(col):
    for heads, kv_heads in combinations(col) + [(24, kv) for kv in (1, 2, 3, 4, 6, 8, 12, 24)]:
        local = heads // col
        for rank in range(col):
            mine = range(rank * local, (rank + 1) * local)
            chosen = kv_heads_of(mine, heads, kv_heads)
            assert local % len(chosen) == 0
            read = [chosen[i // (local // len(chosen))] for i in range(local)]  # what a grouped kernel reads
            assert read == [head // (heads // kv_heads) for head in mine]
            assert len(chosen) == len(set(chosen)) or len(chosen) == local


def test_kv_heads_are_not_repeated_without_need():
    assert kv_heads_of(range(0, 4), 8, 2) == [0]
    assert kv_heads_of(range(4, 8), 8, 4) == [2, 3]
    assert kv_heads_of(range(0, 3), 6, 3) == [0, 0, 1]
    assert kv_heads_of(range(3, 6), 6, 3) == [1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_takes_grouped_heads_in_every_dtype(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16, dtype=torch.float64) for heads in (4, 2, 2))
    wanted, _ = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), Mask(causal=True))
    rounded, _ = attend(q.to(dtype), k.to(dtype), v.to(dtype), Mask(causal=True))
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.double(), wanted, rtol=0, atol=2e-6 if dtype == torch.float32 else 4e-2)


def test_layouts_chain_in_every_mode():
    for sequence_parallel, heads in itertools.product((True, False), (2, 4)):
        residual = residual_layout(sequence_parallel)
        layer = Attention(AttentionConfig(8, heads, 2, 4), Parallel(Mesh(rank=0), residual), name="here")
        assert layer.input == layer.output == residual and layer.q.output == layer.out.input
