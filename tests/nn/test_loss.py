"""The fused vocabulary-parallel loss against torch's cross entropy on full logits: value and every gradient."""

import math

import pytest
import torch

from nn.loss_cases import CASES, Case, T, bf16_errors, collectives_of, full_loss, loss_errors, targets_of, tied_errors
from nn.shards import drawer, label, parallel_of, world
from support.pool import pool
from tessera.core.live_memory import PeakMemory
from tessera.nn.linear import ColumnParallelLinear
from tessera.nn.loss import LossSpec, linear_cross_entropy
from tessera.product.roles import Roles

LAYOUTS = [
    ({"col": 2}, True),
    ({"col": 2}, False),
    ({"col": 4}, True),
    ({"col": 4}, False),
    ({"row": 2, "col": 2}, True),
    ({"inner": 2, "col": 2}, True),
]


@pytest.mark.parametrize(("sizes", "sequence_parallel"), [({}, True), *LAYOUTS], ids=label)
def test_loss_equals_torch(sizes, sequence_parallel):
    ranks = pool(world(sizes)).run(loss_errors, sizes, sequence_parallel) if sizes else [loss_errors({}, True)]
    for results, _ in ranks:
        for name, (errors, loss) in results.items():
            assert max(errors.values()) <= 1e-12, (name, errors)
            assert math.isfinite(loss) and (loss == 0) == name.startswith("no valid label"), name


def test_the_cases_differ_by_what_they_test():
    """Each wrong reading of a case is far outside the tolerance."""

    def loss(case, **changes):
        draw = drawer(7)
        w, b = draw(case.vocabulary, 16), draw(case.vocabulary)
        changed = Case(**(vars(case) | changes))
        return full_loss(case.scale * draw(T, 16), w, b if changed.bias else None, targets_of(case), changed).item()

    smoothed = CASES["smoothed"]
    assert abs(loss(smoothed) / loss(smoothed, smoothing=0.0) - 1) > 1e-3
    assert abs(loss(CASES["bias"]) / loss(CASES["bias"], bias=False) - 1) > 1e-2
    assert loss(CASES["large logits"]) > 1e3, "exponentials of these logits overflow"
    with_ignored = CASES["smoothed, bias, labels ignored"]
    assert abs(loss(with_ignored) / loss(with_ignored, denominator=float(T)) - 1) > 0.3
    assert (targets_of(CASES["labels on the first rank only"]) < 509 // 4).all()
    assert (targets_of(CASES["labels on the last rank only"]) > 509 * 3 // 4).all()


@pytest.mark.parametrize(("sizes", "sequence_parallel"), [*LAYOUTS[:2], LAYOUTS[5]], ids=label)
def test_leaving_out_any_collective_is_seen(sizes, sequence_parallel):
    run, names = pool(world(sizes)).run, ["smoothed, bias, labels ignored"]
    _, kinds = run(loss_errors, sizes, sequence_parallel, names)[0]
    assert kinds
    for index, kind in enumerate(kinds):
        results = run(loss_errors, sizes, sequence_parallel, names, index)
        worst = max(max(errors.values()) for r, _ in results for errors, _ in r.values())
        assert not worst <= 1e-3, f"leaving out {index} ({kind}) went unseen"


@pytest.mark.parametrize("vocabulary", [509, 7])
@pytest.mark.parametrize(("sizes", "sequence_parallel"), LAYOUTS, ids=label)
def test_tied_weight_gathers_both_gradients(sizes, sequence_parallel, vocabulary):
    for errors in pool(world(sizes)).run(tied_errors, vocabulary, sizes, sequence_parallel):
        assert errors["loss"] <= 1e-12 and errors["weight"] <= 1e-12, errors
        assert errors["head left out"] > 1e-2


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("smoothing", "floats"), [(0.0, 2), (0.1, 3)], ids=["plain", "smoothed"])
def test_one_chunk_exchanges_its_statistics_once(size, smoothing, floats):
    sizes, tokens = {"col": size}, 1024
    states, statistics = tokens * 4 * 8, size * tokens * floats * 8
    run = pool(size).run
    for records in run(collectives_of, sizes, True, tokens, 1024, smoothing, True):
        assert records == [("all_gather", states), ("all_gather", statistics), ("reduce_scatter", states)]
    for records in run(collectives_of, sizes, False, tokens, 1024, smoothing, True):
        assert records == [("all_gather", statistics), ("all_reduce", states)]
    for records in run(collectives_of, sizes, True, tokens, 1024, smoothing, False):
        assert records == [("all_gather", states), ("all_gather", statistics)], "evaluation moves no gradients"


def test_several_chunks_exchange_statistics_each():
    for records in pool(2).run(collectives_of, {"col": 2}, False, 10, 4, 0.0, True):
        assert records == [("all_gather", 2 * n * 2 * 8) for n in (4, 4, 2)] + [("all_reduce", 10 * 4 * 8)]


@pytest.mark.parametrize("size", [2, 4])
def test_loss_of_bf16_is_float32(size):
    for errors in pool(size).run(bf16_errors, {"col": size}):
        assert errors["loss"] <= 1e-5 and errors["loss in bf16"] > 1e-4, errors
        assert max(errors[n] for n in ("input gradient", "weight", "bias")) <= 1e-2, errors


def test_its_gradients_are_handed_out_once():
    head = ColumnParallelLinear(4, 8, parallel_of({}))
    torch.nn.init.normal_(head.weight)
    x, targets = torch.ones(2, 4, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2])
    constants = LossSpec(Roles(), slice(0, 8), 8, 2.0)
    loss = linear_cross_entropy(x, head.local("weight"), None, targets, constants)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_full_logits_never_exist():
    tokens, features, words, chunk = 512, 16, 512, 64
    head = ColumnParallelLinear(features, words, parallel_of({}, dtype=torch.float32))
    torch.nn.init.normal_(head.weight)
    x = torch.randn(tokens, features, requires_grad=True)
    targets = torch.randint(0, words, (tokens,))
    peaks = {}
    for chunk_tokens in (chunk, tokens):
        constants = LossSpec(Roles(), slice(0, words), words, float(tokens), chunk_tokens=chunk_tokens)
        with PeakMemory() as memory:
            linear_cross_entropy(x, head.local("weight"), None, targets, constants).backward()
        peaks[chunk_tokens] = memory.peak
    full = tokens * words * 4  # bytes of the logits; with one chunk their gradients take their place
    assert peaks[chunk] < full / 2 < full < peaks[tokens]
