"""Layers of different kinds, and rows of several documents: on a mesh, in one process, and in plain torch."""

import pytest

from distributed.kinds_cases import PACKED_MODELS, PACKINGS, WINDOW, WINDOWED, packing_errors, windows_errors
from nn.shards import label, world
from support.pool import pool
from tessera.layout.streams import HIDDEN_BY_HEADS
from tessera.models.config import LayerKind
from tessera.sizes.schedule import Schedule

TOLERANCE = 1e-12
EVERY_SECOND = [None, WINDOW, None, WINDOW]


def test_kinds_repeat_from_layer_0_on():
    assert [WINDOWED.kind_of(layer).window for layer in range(4)] == EVERY_SECOND
    assert [LayerKind() for layer in range(3)] == [PACKED_MODELS["gpt2"].kind_of(layer) for layer in range(3)]


@pytest.mark.parametrize("sizes", [{}, {"col": 2}, {"inner": 2}], ids=label)
def test_windows_in_every_second_layer_equal_dense_attention(sizes):
    for errors in pool(world(sizes)).run(windows_errors, sizes, EVERY_SECOND, {}):
        assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(
    "windows",
    [[None] * 4, [WINDOW] * 4, EVERY_SECOND[::-1], [None, WINDOW + 1] * 2],
    ids=["none", "everywhere", "in the other layers", "one longer"],
)
def test_other_windows_lie_far_outside(windows):
    (errors,) = pool(1).run(windows_errors, {}, windows, {})
    assert min(errors.values()) > 1e-3


def test_windows_in_recomputed_layers_equal_dense_attention():
    options = {"schedule": Schedule(prefetch=True, defer=True), "gradient_checkpointing": True}
    for errors in pool(2).run(windows_errors, {"row": 2}, EVERY_SECOND, options):
        assert max(errors.values()) <= TOLERANCE, errors


CASES = [
    ({}, {}),
    ({"col": 2}, {}),
    ({"col": 2}, {"sequence_parallel": False}),
    ({"row": 2}, {}),
    ({"inner": 2}, {"attention": HIDDEN_BY_HEADS}),
]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("sizes, options", CASES, ids=str)
@pytest.mark.parametrize("name", PACKED_MODELS)
def test_numbers_do_not_depend_on_how_documents_are_packed(name, sizes, options, packing):
    """Dropout included: its masks know documents and positions, not rows."""
    for error, worst in pool(world(sizes)).run(packing_errors, name, sizes, packing, options):
        assert error <= TOLERANCE, worst


@pytest.mark.parametrize("forget", ["positions", "documents"])
@pytest.mark.parametrize("name", PACKED_MODELS)
def test_forgetting_a_vector_lies_far_outside(name, forget):
    ((error, _),) = pool(1).run(packing_errors, name, {}, "two rows of twelve", {}, forget)
    assert (error > 1e-3) == (name == "gpt2" or forget == "documents")  # rotary scores depend on distances alone
