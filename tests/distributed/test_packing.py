"""Packed samples compute what single ones do, in every geometry; no document sees another."""

import pytest

from distributed.data_cases import FSDP
from distributed.packing_cases import MODELS, ROWS, leaks, packing_error
from nn.shards import label, world
from support.pool import pool
from tessera.layout.streams import HIDDEN_BY_HEADS
from tessera.sizes.schedule import Schedule

TOLERANCE = 1e-12
SLOW = pytest.mark.slow
BY_HEADS = {"attention": HIDDEN_BY_HEADS}
CASES = [
    ("llama", {}, {}),
    ("gpt2", {}, {}),
    ("llama", {"col": 2}, {}),
    ("llama tied", {"col": 2}, {"sequence_parallel": False}),
    ("llama tied", {"row": 2, "col": 2}, {}),
    ("gpt2", {"row": 2, "col": 2}, {"gradient_checkpointing": True}),
    ("gpt2", {"depth": 2, "col": 2}, {}),
    ("llama", {"inner": 2, "col": 2}, {}),
    ("llama tied", {"inner": 2, "col": 2}, BY_HEADS),
    ("llama", {"shard": 2, "col": 2}, FSDP),
    ("llama", {"row": 2, "col": 2}, {"schedule": Schedule("summa")}),
    pytest.param("gpt2", {"col": 2}, {}, marks=SLOW),
    pytest.param("llama", {"depth": 2, "row": 2, "col": 2}, {}, marks=SLOW),
    pytest.param("gpt2", {"inner": 2, "row": 2, "col": 2}, {}, marks=SLOW),
    pytest.param("gpt2", {"shard": 2, "col": 2}, FSDP, marks=SLOW),
]


@pytest.mark.parametrize("name, sizes, options", CASES, ids=lambda value: label(value))
def test_packed_samples_have_the_loss_and_the_gradients_of_single_ones(name, sizes, options):
    """Dropout of the residual stream included: its masks know documents and positions, not rows."""
    for error, worst in pool(world(sizes)).run(packing_error, name, sizes, options):
        assert error <= TOLERANCE, worst


@pytest.mark.parametrize("forget", ["positions", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_forgetting_a_vector_lies_far_outside(name, forget):
    ((error, _),) = pool(1).run(packing_error, name, {}, {}, forget)
    assert (error > 1e-3) == (name == "gpt2" or forget == "documents")  # rotary scores depend on distances alone


@pytest.mark.parametrize("sizes, options", [({}, {}), ({"col": 2}, {}), ({"inner": 2}, BY_HEADS)], ids=str)
@pytest.mark.parametrize("row, document", [(0, 0), (1, 1), (4, 2)])
def test_other_tokens_in_a_document_change_no_bit_of_another(sizes, options, row, document):
    place = sum(map(len, ROWS[:row])) + document
    found = pool(world(sizes)).run(leaks, sizes, options, row, document)
    changed = {name for rank in found for name, differs in enumerate(rank) if differs}
    assert changed == {place}
