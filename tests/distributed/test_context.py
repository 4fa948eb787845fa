"""Models whose sequences lie over ranks compute what one process computes; no document sees another."""

from dataclasses import replace
from typing import Any

import pytest

from distributed.context_cases import empty_ranks, leaks_across, valid_tokens
from distributed.model_cases import GPT2, LLAMA, model_errors
from distributed.packing_cases import ROWS, packing_error
from nn.shards import label, world
from support.pool import pool
from tessera.layout.context import Context
from tessera.layout.streams import HIDDEN_BY_HEADS
from tessera.models.config import LayerKind
from tessera.sizes.schedule import Schedule

TOLERANCE = 1e-12
SLOW = pytest.mark.slow
FSDP = {"fsdp": ("shard", "ring", "ulysses", "row"), "weights_over": ()}
LOOP = {"fsdp": ("shard", "ring", "ulysses"), "schedule": Schedule("summa")}
HIDDEN_DROPOUT = replace(GPT2, attention_dropout=0.0)
WINDOWS = replace(LLAMA, layer_kinds=(LayerKind(3), LayerKind()))
SIX_HEADS = replace(LLAMA, num_heads=6, num_kv_heads=3)  # which do not divide by col · inner
CUBE = {"inner": 2, "row": 2, "col": 2}


def context(transport: str, base: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {**(FSDP if base is None else base), "context": Context(transport, **keys)}


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=SLOW)


JOINED = {"context": Context(joined=True)}
CASES = [
    # model, mesh, options, rows of a micro-batch
    ("llama", {"ring": 2}, context("ring"), 4),
    (WINDOWS, {"ring": 2}, context("exchange"), 1),
    ("llama tied", {"ring": 4}, context("ring"), 1),
    ("llama", {"ring": 2, "ulysses": 2}, context("exchange"), 1),
    (HIDDEN_DROPOUT, {"ulysses": 2, "col": 2}, {**context("exchange"), "gradient_checkpointing": True}, 1),
    ("llama", {"ring": 2, "col": 2}, context("ring"), 3),
    ("llama tied", {"shard": 2, "ring": 2}, context("exchange"), 2),
    ("llama", {"row": 2, "col": 2}, JOINED, 1),
    (SIX_HEADS, {"inner": 2, "row": 2}, JOINED, 1),
    (SIX_HEADS, CUBE, JOINED, 1),
    slow("llama tied", {"inner": 2, "col": 2}, {"context": Context("ring", joined=True)}, 1),
    slow(SIX_HEADS, CUBE, {"context": Context("ring", joined=True)}, 2),
    slow(SIX_HEADS, CUBE, JOINED | {"schedule": Schedule("summa")}, 3),
    slow(SIX_HEADS, {"ring": 2, "inner": 2, "row": 2}, context("ring", joined=True), 1),
    slow(SIX_HEADS, {"ulysses": 2, "inner": 2, "row": 2}, context("exchange", joined=True), 1),
    slow(HIDDEN_DROPOUT, {"shard": 2, "inner": 2, "col": 2}, context("exchange", joined=True), 1),
    slow("llama", {"ring": 2, "row": 2, "col": 2}, context("exchange", joined=True), 1),
    slow("llama", {"ring": 2, "row": 2, "col": 2}, context("ring"), 4),
    slow("llama", {"ulysses": 2, "row": 2, "col": 2}, context("exchange", joined=True), 1),
    slow("llama tied", {"ulysses": 2, "row": 2, "col": 2}, context("exchange"), 4),
    slow(HIDDEN_DROPOUT, {"ring": 2, "depth": 2, "row": 1, "col": 2}, context("exchange"), 2),
    slow(HIDDEN_DROPOUT, {"ring": 2, "depth": 2, "col": 2}, context("exchange", joined=True), 1),
    slow("llama", {"ring": 2, "inner": 2, "col": 2}, context("ring"), 2),
    slow("llama tied", {"ring": 2, "inner": 2, "col": 2}, {**context("exchange"), "attention": HIDDEN_BY_HEADS}, 1),
    slow("llama", {"ring": 2, "row": 2, "col": 2}, context("exchange", LOOP), 2),
    slow("llama", {"ring": 2, "row": 2, "col": 2}, context("exchange", LOOP, joined=True), 1),
    slow("llama", {"replicate": 2, "ring": 2, "col": 2}, context("exchange"), 2),
    slow("llama", {"depth": 2, "row": 2, "col": 2}, JOINED, 1),
    slow("llama", {"depth": 2, "row": 2, "col": 2}, JOINED, 3),
    *(
        slow(name, {**axes, **beside}, context(transport), 2)
        for name in ("llama", "llama tied", HIDDEN_DROPOUT)
        for transport, axes in (
            ("ring", {"ring": 2}),
            ("ring", {"ring": 4}),
            ("exchange", {"ring": 2}),
            ("exchange", {"ring": 4}),
            ("exchange", {"ulysses": 2}),
            ("ring", {"ring": 2, "ulysses": 2}),
            ("exchange", {"ring": 2, "ulysses": 2}),
        )
        for beside in ({}, {"col": 2}, {"shard": 2})
    ),
]


def case_id(value: Any) -> str:
    if isinstance(value, dict) and "context" in value:
        chosen = value["context"]
        return chosen.transport + (" joined" if chosen.joined else "")
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, dict):
        return label(value)
    return value.family + {WINDOWS: " windows", SIX_HEADS: " six heads"}.get(value, "")


@pytest.mark.parametrize("name, sizes, options, rows", CASES, ids=case_id)
def test_a_model_equals_one_process(name, sizes, options, rows):
    """Two steps: losses, norms, every gradient and weight; rows of 16 tokens, each a document."""
    size = rows * sizes.get("shard", 1) * sizes.get("replicate", 1)
    for relative, worst, _ in pool(world(sizes)).run(model_errors, name, sizes, True, 2, 0.0, None, options, size, 16):
        assert max(relative.values()) <= TOLERANCE, (worst, relative)


PACKED = [
    ("llama", {"ring": 2}, context("ring")),
    ("gpt2", {"ring": 4}, context("exchange")),
    ("llama tied", {"ring": 2, "ulysses": 2}, context("exchange")),
    ("llama", {"shard": 2, "ring": 2}, context("ring")),
    ("gpt2", {"ring": 2, "col": 2}, context("exchange")),
    ("llama", {"row": 2, "col": 2}, JOINED),
    slow("llama", {"inner": 2, "row": 2, "col": 2}, JOINED),
    slow("llama", {"ulysses": 4}, context("exchange")),
    slow("gpt2", {"ring": 2, "row": 2, "col": 2}, context("exchange")),
    slow("llama", {"ring": 2, "row": 2, "col": 2}, context("ring", joined=True)),
    slow("llama tied", {"ring": 2, "depth": 2, "col": 2}, context("exchange", joined=True)),
    slow("llama tied", {"ring": 2, "inner": 2, "col": 2}, context("ring")),
    slow("llama", {"shard": 2, "ring": 2, "col": 2}, context("exchange")),
    slow("llama", {"ring": 4, "ulysses": 2}, context("ring")),
]


@pytest.mark.parametrize("name, sizes, options", PACKED, ids=case_id)
def test_packed_rows_equal_single_samples(name, sizes, options):
    for error, worst in pool(world(sizes)).run(packing_error, name, sizes, options):
        assert error <= TOLERANCE, worst


LAYOUTS = [
    ({"ring": 2}, context("ring")),
    ({"ring": 2, "ulysses": 2}, context("exchange")),
    ({"row": 2, "col": 2}, JOINED),
    slow({"ring": 4}, context("exchange")),
    slow({"ring": 2, "col": 2}, context("exchange")),
]


@pytest.mark.parametrize("sizes, options", LAYOUTS, ids=case_id)
def test_other_tokens_in_a_document_change_no_bit_of_another(sizes, options):
    """Neither of an output nor of a gradient where the layers begin."""
    row, document = 1, 1
    found = pool(world(sizes)).run(leaks_across, sizes, options, row, document)
    for changed in zip(*found, strict=True):
        assert set().union(*changed) == {sum(map(len, ROWS[:row])) + document}


@pytest.mark.parametrize("sizes, options", [*LAYOUTS, ({"shard": 2, "ring": 2}, context("ring"))], ids=case_id)
def test_every_label_is_counted_once(sizes, options):
    for counted, want in pool(world(sizes)).run(valid_tokens, sizes, options):
        assert counted == want


@pytest.mark.parametrize("sizes, options", LAYOUTS, ids=case_id)
def test_ranks_without_a_label_have_gradients_all_the_same(sizes, options):
    found = pool(world(sizes)).run(empty_ranks, sizes, options)
    assert min(labels for _, _, labels in found) == 0 < max(labels for _, _, labels in found)
    for error, worst, _ in found:
        assert error <= TOLERANCE, worst
