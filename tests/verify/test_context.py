"""Layouts whose ranks share sequences, packed and not, against one process; every fault of them is caught and named."""

import pytest

from support.pool import pool
from verify.verify_cases import check, leave_out_each, save_models, settings, told

PACKED = {"sample_packing": True}
GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}


def shared(size: int, mode: str, **keys: object) -> dict[str, object]:
    return {"context_parallel_size": size, "context_parallel_mode": mode, **keys}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


LAYOUTS = {
    "1d ring 2, gather": (2, shared(2, "ring")),
    "1d ulysses 2, gather, packed": (2, shared(2, "ulysses") | PACKED),
    "1d ring 2 × ulysses 2, gather, packed": (4, shared(4, "ring", ulysses_size=2) | PACKED),
    "1d ulysses 4, gather": (4, shared(4, "auto")),
    "1d shard 2 × exchange 2, gather, packed": (4, shared(2, "exchange", dp_shard_size=2) | PACKED),
    "1d exchange 2 × col 2, gather, packed": (4, shared(2, "exchange", tensor_parallel_size=2) | PACKED),
    "2d row 2 × col 2, gather, sequences over row by exchange, packed": (4, GRID | PACKED | {"micro_batch_size": 1}),
    "2d ring 2 × row 2, gather, sequences over row": (
        4,
        shared(2, "ring", tensor_parallel_mode="2d", tensor_parallel_mesh={"row": 2}, micro_batch_size=1),
    ),
    "1d col 2, gather, packed": (2, PACKED | {"tensor_parallel_size": 2}),
}
LARGE = {
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
    "2d exchange 2 × row 2 × col 2, summa, sequences over row, packed": (
        8,
        shared(2, "exchange", **GRID, tensor_parallel_schedule="summa", micro_batch_size=1) | PACKED,
    ),
}


def check_layout(models, layout, world, keys):
    for result in pool(world).run(check, settings(models["llama"], **keys)):
        assert result.name == layout and result.ok and not result.diagnosis
        exact, training = result.comparisons
        assert max(exact.errors.values()) <= 1e-12 < max(training.errors.values()) <= training.tolerance
        assert all(check.calls == check.formula_calls > 0 for check in result.traffic)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_shares_sequences_passes(models, layout):
    check_layout(models, layout, *LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE)
def test_a_layout_of_eight_ranks_passes(models, layout):
    check_layout(models, layout, *LARGE[layout])


def test_packed_rows_of_dropout_pass_at_full_size(models):
    keys = settings(models["gpt2"], **PACKED, tensor_parallel_size=2, sequence_len=24)
    (result, _) = pool(2).run(check, keys, True)
    assert result.ok, result.diagnosis


@pytest.mark.parametrize(
    "fault", ["positions_not_permuted", "documents_forgotten", "a_tile_left_out", "keys_of_the_wrong_owner"]
)
def test_a_fault_in_attention_is_named(models, fault):
    message = pool(4).run(told, settings(models["llama"], **shared(4, "exchange", ulysses_size=1), **PACKED), fault)[0]
    assert message.startswith("1d exchange 4, gather, packed: not the numbers of one process\n")
    assert "first wrong: the input of layers.0.attention.out, forward of micro-batch 1" in message


LEFT_OUT = {
    "ring × ulysses": (shared(4, "ring", ulysses_size=2) | PACKED, {"ring", "ulysses", "ring·ulysses"}),
    "exchange, data ranks of other documents": (
        shared(2, "exchange", dp_shard_size=2) | PACKED,
        {"ring", "shard·ring"},
    ),
    "one row over row": (GRID | PACKED | {"micro_batch_size": 1}, {"row", "col", "row·col"}),
}


@pytest.mark.parametrize("layout", LEFT_OUT)
def test_leaving_out_any_collective_is_caught(models, layout):
    keys, axes = LEFT_OUT[layout]
    found = pool(4).run(leave_out_each, settings(models["llama"], **keys))[0]
    assert {axis for _, axis, _ in found} == axes
    assert {kind for kind, *_ in found} & {"all_to_all", "send", "receive"}
    assert [which for *which, caught in found if not caught] == []
