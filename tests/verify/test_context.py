"""Layouts whose ranks share sequences, packed and not, against one process; every fault of them is caught and named."""

import pytest

from support.pool import pool
from tessera.verify.check import count_collectives
from verify.verify_cases import (
    case_of,
    check,
    collectives_of,
    diagnoses,
    leave_out_each,
    save_models,
    settings,
    told,
)

PACKED = {"sample_packing": True}
GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}


def shared(size: int, mode: str, **keys: object) -> dict[str, object]:
    return {"context_parallel_size": size, "context_parallel_mode": mode, **keys}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


LAYOUTS = {
    "1d ring 2 × ulysses 2, gather, packed": (4, shared(4, "ring", ulysses_size=2) | PACKED),
    "1d shard 2 × exchange 2, gather, packed": (4, shared(2, "exchange", dp_shard_size=2) | PACKED),
    "2d row 2 × col 2, gather, sequences over row by exchange, packed": (4, GRID | PACKED | {"micro_batch_size": 1}),
    "1d col 2, gather, packed": (2, PACKED | {"tensor_parallel_size": 2}),
}
MORE = {
    "1d ulysses 2, gather, packed": (2, shared(2, "ulysses") | PACKED),
    "1d exchange 2 × col 2, gather, packed": (4, shared(2, "exchange", tensor_parallel_size=2) | PACKED),
    "1d replicate 2 × ring 2 × ulysses 2, gather, packed": (
        8,
        shared(4, "ring", ulysses_size=2, dp_replicate_size=2) | PACKED,
    ),
    "2.5d exchange 2 × depth 2 × col 2, gather, packed": (
        8,
        shared(2, "exchange", tensor_parallel_mode="2.5d", tensor_parallel_mesh={"depth": 2, "col": 2}) | PACKED,
    ),
    "3d ring 2 × inner 2 × row 2, gather, heads over inner, sequences over row, packed": (
        8,
        shared(2, "ring", tensor_parallel_mode="3d", tensor_parallel_mesh={"inner": 2, "row": 2}, micro_batch_size=1)
        | PACKED,
    ),
    "3d inner 3 × row 2, gather, sequences over row·inner by exchange, packed": (
        6,
        {"tensor_parallel_mode": "3d", "tensor_parallel_mesh": {"inner": 3, "row": 2}, "micro_batch_size": 1} | PACKED,
    ),
    "2d exchange 2 × row 2 × col 2, summa, sequences over row, packed": (
        8,
        shared(2, "exchange", **GRID, tensor_parallel_schedule="summa", micro_batch_size=1) | PACKED,
    ),
}
SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in MORE]


@pytest.mark.parametrize("layout", [*LAYOUTS, *SLOW])
def test_a_layout_of_shared_or_packed_sequences_passes(models, layout):
    world, keys = (LAYOUTS | MORE)[layout]
    for result in pool(world).run(check, settings(models["llama"], **keys)):
        assert result.name == layout and result.ok and not result.diagnosis
        exact, training = result.comparisons
        assert max(exact.errors.values()) <= 1e-12 < max(training.errors.values()) <= training.tolerance
        assert all(check.calls == check.formula_calls > 0 for check in result.traffic)


def test_packed_rows_with_dropout_pass_at_full_size(models):
    keys = settings(models["gpt2"], **PACKED, tensor_parallel_size=2, sequence_len=24)
    result, _ = pool(2).run(check, keys, True)
    assert result.ok, result.diagnosis


@pytest.mark.slow
def test_shared_sequences_pass_at_full_size(models):
    keys = settings(models["llama"], **PACKED, **shared(2, "exchange"), sequence_len=48)
    result, _ = pool(2).run(check, keys, True)
    assert result.ok, result.diagnosis


FAULTS = {
    "positions_not_permuted": 2,
    "documents_forgotten": 2,
    "a_tile_left_out": 2,
    "keys_of_the_wrong_owner": 4,  # of two ranks there is one other owner
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_attention_is_named(models, fault):
    world = FAULTS[fault]
    keys = shared(world, "exchange", ulysses_size=1) | PACKED
    message = pool(world).run(told, settings(models["llama"], **keys), fault)[0]
    assert message.startswith(f"1d exchange {world}, gather, packed: not the numbers of one process\n")
    assert "first wrong: the input of layers.0.attention.out, forward of micro-batch 1" in message


def test_keys_that_are_not_sent_are_named(models):
    keys = shared(2, "exchange", dp_shard_size=2) | PACKED
    first, *_ = pool(4).run(diagnoses, settings(models["llama"], **keys), ("all_to_all",))[0]
    _, axis, (_, where, likely) = first
    assert axis == "ring" and "the input of layers.0.attention.out" in where
    assert "likely missing: all_to_all of k·v over ring (attention, forward)" in likely


LEFT_OUT = {
    "ring": (2, shared(2, "ring") | PACKED, {"ring"}),
    "exchange, data ranks of other documents": (
        4,
        shared(2, "exchange", dp_shard_size=2) | PACKED,
        {"ring", "shard·ring"},
    ),
    "ring × ulysses": (4, shared(4, "ring", ulysses_size=2) | PACKED, {"ring", "ulysses", "ring·ulysses"}),
    "one row over row": (4, GRID | PACKED | {"micro_batch_size": 1}, {"row", "col", "row·col"}),
}
LARGE = [pytest.param(layout, marks=pytest.mark.slow) for layout in ("ring × ulysses", "one row over row")]


@pytest.mark.parametrize("layout", ["ring", "exchange, data ranks of other documents", *LARGE])
def test_leaving_out_any_collective_is_caught(models, layout):
    world, keys, axes = LEFT_OUT[layout]
    found = pool(world).run(leave_out_each, settings(models["llama"], **keys))[0]
    assert {axis for _, axis, _ in found} == axes
    assert {kind for kind, *_ in found} & {"all_to_all", "send", "receive"}
    assert [which for *which, caught in found if not caught] == []


def test_collectives_are_numbered_as_the_formula_counts_them(models):
    """So that `--inject` is refused before a rank starts, of ranks whose documents ask for more or less."""
    keys = settings(models["llama"], **shared(2, "exchange", dp_shard_size=2), **PACKED)
    case = case_of(keys, layers=1, micro_batches=1)
    assert count_collectives(case) == len(pool(4).run(collectives_of, keys)[0])
