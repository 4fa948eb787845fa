"""Live bytes, counted exactly."""

import torch

from core.core_cases import step_peak
from support.pool import pool
from tessera.core.live_memory import PeakMemory
from tessera.nn.parameter import parameter_elements

KIB = 1024


def kib(count=1):
    return torch.zeros(count * KIB, dtype=torch.uint8)


def test_a_tensor_counts_until_it_is_freed():
    with PeakMemory() as memory:
        assert memory.current == memory.peak == 0
        a = kib(3)
        assert memory.current == memory.peak == 3 * KIB
        b = kib(2)
        del a
        assert (memory.current, memory.peak) == (2 * KIB, 5 * KIB)
        a = kib(1)
        assert (memory.current, memory.peak) == (3 * KIB, 5 * KIB)
        del a, b
        assert (memory.current, memory.peak) == (0, 5 * KIB)


def test_a_storage_counts_as_large_as_it_was_made():
    with PeakMemory() as memory:
        a = kib(4)
        a.untyped_storage().resize_(0)
        assert (memory.current, memory.peak) == (0, 4 * KIB)
        a.untyped_storage().resize_(6 * KIB)
        assert (memory.current, memory.peak) == (6 * KIB, 6 * KIB)
        del a
        assert memory.current == 0
    before = kib()
    before.untyped_storage().resize_(0)
    assert memory.current == 0


def test_views_count_once_and_keep_what_they_view():
    with PeakMemory() as memory:
        a = kib(4)
        b, c = a.view(4, KIB), a[:10]
        a.add_(1)
        assert memory.current == memory.peak == 4 * KIB
        del a, b
        assert memory.current == 4 * KIB, "c still shows 10 bytes of it"
        del c
        assert memory.current == 0


def test_what_autograd_saves_is_alive():
    weight = torch.ones(KIB, requires_grad=True)
    with PeakMemory() as memory:
        y = (weight * 2).exp()  # exp keeps its result
        total = y.sum()
        del y
        kept = memory.current
        total.backward()
        gone = memory.current
    assert kept >= 4 * KIB + 4 and gone < kept + 4 * KIB
    assert weight.grad is not None


def test_temporaries_inside_an_expression_are_seen():
    with PeakMemory() as memory:
        x = kib(1)
        y = (x + 1) + (x + 2) + 3
    assert memory.peak == 4 * KIB and y.numel() == KIB


def test_a_step_needs_less_at_two_ranks():
    (alone, left) = step_peak({})
    assert left == 0
    for peak, left in pool(2, gloo=True).run(step_peak, {"col": 2}):
        assert left == 0
        assert 0.4 * alone < peak < 0.75 * alone, (peak, alone)


def test_parameters_of_a_rank():
    layer = torch.nn.Linear(3, 5)
    assert parameter_elements(layer) == 20
