"""Memory savers change no number: models with them compute what one process computes without; attention runs once."""

from dataclasses import replace
from typing import Any

import pytest

from distributed.model_cases import GPT2, LLAMA, model_errors
from distributed.packing_cases import packing_error
from distributed.saver_cases import attention_calls
from nn.shards import label, world
from support.pool import pool
from tessera.layout.context import Context
from tessera.layout.shape import Savers
from tessera.sizes.schedule import Schedule

TOLERANCE = 1e-12
HIDDEN_DROPOUT = replace(GPT2, attention_dropout=0.0)
FSDP = {"fsdp": ("shard", "ring", "ulysses", "row"), "weights_over": ()}


def context(transport: str, chunks: int = 1) -> dict[str, Any]:
    return {**FSDP, "context": Context(transport, chunks)}


AGAIN = {"gradient_checkpointing": True}
SELECTIVE = {**AGAIN, "savers": Savers(attention_once=True)}
OFFLOAD = {**AGAIN, "savers": Savers(offload=True)}
ACTIVATIONS = {"savers": Savers(offload=True)}
TILES = {"savers": Savers(mlp_tiles=3)}
ALL = {**AGAIN, "savers": Savers(attention_once=True, offload=True, mlp_tiles=3)}
SAVERS = {
    "selective": SELECTIVE,
    "offload": OFFLOAD,
    "activations": ACTIVATIONS,
    "tiles": TILES,
    "tiles again": {**AGAIN, **TILES},
    "tiles as chosen, offload": {"savers": Savers(offload=True, mlp_tiles=None)},
    "all": ALL,
}

CASES = [  # model, mesh, options, savers, rows of a micro-batch
    ("llama", {}, {}, "all", 4),
    ("gpt2", {"col": 2}, {}, "all", 4),
    ("llama", {"ring": 2}, context("ring"), "selective", 1),
    ("llama tied", {"ring": 2, "col": 2}, context("exchange"), "tiles as chosen, offload", 1),
    ("llama", {"ulysses": 2}, context("exchange", 2), "selective", 1),
    (HIDDEN_DROPOUT, {"ulysses": 2, "col": 2}, context("ring", 2), "tiles again", 3),
    ("llama", {"shard": 2}, FSDP, "activations", 4),
    ("llama", {"inner": 2}, {}, "activations", 4),
]
LAYOUTS = [
    ({}, {}),
    ({"col": 2}, {}),
    ({"ring": 2}, context("ring")),
    ({"ring": 2, "col": 2}, context("exchange")),
    ({"ulysses": 2}, context("exchange")),
    ({"ring": 2, "ulysses": 2}, context("ring", 2)),
    ({"shard": 2}, FSDP),
]
ALL_CASES = [
    (model, sizes, options, savers, 2)
    for model in ("llama", HIDDEN_DROPOUT)
    for sizes, options in LAYOUTS
    for savers in SAVERS
]
SQUARE, CUBE = {"row": 2, "col": 2}, {"inner": 2, "row": 2, "col": 2}
GEOMETRIES = [
    (model, sizes, options, savers, 4)
    for model, sizes, options in (
        (LLAMA, SQUARE, {}),
        (LLAMA, {"depth": 2, **SQUARE}, {}),
        (replace(LLAMA, qk_norm=True), CUBE, {}),
        (GPT2, SQUARE, {"schedule": Schedule("summa")}),
        (GPT2, CUBE, {"schedule": Schedule("cannon")}),
        (LLAMA, SQUARE, {"schedule": Schedule(slices=2)}),
        (LLAMA, SQUARE, {"schedule": Schedule(keep=True)}),
        (LLAMA, {"shard": 2, **SQUARE}, FSDP),
    )
    for savers in SAVERS
]


def name_of(value: Any) -> str | None:
    if isinstance(value, dict):
        chosen = value.get("context")
        return label(value) if chosen is None else f"{chosen.transport} {chosen.chunks}"
    return value if isinstance(value, str) else None


def check(model, sizes, options, savers, rows):
    options = {**options, **SAVERS[savers]}
    for relative, worst, _ in pool(world(sizes)).run(model_errors, model, sizes, True, 2, 0.0, None, options, rows, 24):
        assert max(relative.values()) <= TOLERANCE, worst


@pytest.mark.parametrize(("model", "sizes", "options", "savers", "rows"), CASES, ids=name_of)
def test_savers_change_nothing(model, sizes, options, savers, rows):
    check(model, sizes, options, savers, rows)


def test_savers_change_nothing_where_rows_are_packed():
    for error, name in pool(1).run(packing_error, "llama", {}, SELECTIVE):
        assert error <= TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize(("model", "sizes", "options", "savers", "rows"), ALL_CASES + GEOMETRIES, ids=name_of)
def test_savers_change_nothing_anywhere(model, sizes, options, savers, rows):
    check(model, sizes, options, savers, rows)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"ring": 2}, context("ring")),
        ({"ring": 2}, context("exchange")),
        ({"ulysses": 2}, context("exchange")),
    ],
    ids=name_of,
)
def test_selective_runs_attention_and_its_communication_once(sizes, options):
    """Recomputed as a whole, a layer runs both again; selective, it calls what a layer calls that is not recomputed."""

    def calls(savers):
        return pool(world(sizes)).run(attention_calls, sizes, {**options, **savers})

    plain, again, selective = calls({}), calls(AGAIN), calls(SELECTIVE)
    assert selective == plain
    for (moved, kernels), (moved_again, kernels_again) in zip(plain, again, strict=True):
        assert kernels_again["cpu"] == 2 * kernels["cpu"] > 0 and kernels_again["backward"] == kernels["backward"]
        if sizes:
            assert sum(moved_again.values()) > sum(moved.values()) > 0
