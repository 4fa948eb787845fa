"""Layouts against one process: the right ones pass, every fault is caught and named."""

import pytest

from support.pool import pool
from verify.verify_cases import (
    check,
    check_every_layout,
    diagnoses,
    leave_out_at_full_size,
    leave_out_each,
    save_models,
    settings,
    told,
)

GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}
LINE = {"tensor_parallel_size": 4}


def mesh(mode, **sizes):
    return {"tensor_parallel_mode": mode, "tensor_parallel_mesh": sizes}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


LAYOUTS = {
    "3d cube": (8, "gpt2", mesh("3d", inner=2, row=2, col=2)),
    "2.5d cut over depth": (4, "llama", mesh("2.5d", depth=2, row=2) | {"tensor_parallel_depth_weights": "shard"}),
    "summa, smoothing": (4, "gpt2", GRID | {"tensor_parallel_schedule": "summa", "label_smoothing_factor": 0.1}),
    "cannon, recomputed": (4, "llama", GRID | {"tensor_parallel_schedule": "cannon", "gradient_checkpointing": True}),
    "slices, bf16": (4, "llama", GRID | {"tensor_parallel_slices": 4, "bf16": True}),
    "heads over inner": (4, "llama", mesh("3d", inner=2, col=2) | {"micro_batch_size": 3}),
    "hsdp beside 1d": (8, "gpt2", {"dp_shard_size": 2, "dp_replicate_size": 2, "tensor_parallel_size": 2}),
    "fsdp beside 2.5d": (
        8,
        "llama",
        mesh("2.5d", depth=2, col=2) | {"dp_shard_size": 2, "gradient_checkpointing": True},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_layout_passes(models, layout):
    world, model, keys = LAYOUTS[layout]
    for result in pool(world).run(check, settings(models[model], **keys)):
        assert result.ok and not result.diagnosis
        exact, training = result.comparisons
        assert max(exact.errors.values()) <= 1e-12 < max(training.errors.values()) <= training.tolerance
        assert ("heads over inner" in result.name) == (layout == "heads over inner")
        assert all(check.calls == check.formula_calls > 0 for check in result.traffic)


def test_leaving_out_any_collective_is_caught(models):
    found = pool(4).run(leave_out_each, settings(models["llama"], **GRID))[0]
    assert {axis for _, axis, _ in found} == {"row", "col", "row·col"} and len(found) > 30
    assert [which for *which, caught in found if not caught] == []


FULL = {"sequence_len": 24}


@pytest.mark.slow
def test_a_collective_left_out_at_full_size_is_caught(models):
    """The miniature, where nothing is left out, is right, and that is said."""
    found = pool(4).run(leave_out_at_full_size, settings(models["llama"], **GRID, **FULL))[0]
    assert {axis for _, axis in found} == {"row", "col", "row·col"}
    assert {kind for kind, _ in found} == {"all_gather", "reduce_scatter", "all_reduce"}
    for which, result in found.items():
        assert result.comparisons[0].findings and not result.ok, which
        assert result.diagnosis == ["in miniature the layout is right: the fault shows at full size alone"], which


def test_a_fault_at_full_size_is_named_from_the_miniature(models):
    message = pool(4).run(told, settings(models["gpt2"], **LINE, **FULL), "bias_on_each_rank", True)[0]
    assert "first wrong: the output of layers.0.attention.out, forward of micro-batch 1" in message
    assert "each of the 4 ranks of col adds it; it is added once, after the sum over col" in message


def test_every_layout_of_a_world_leaves_data_axes_aside(models):
    results, _ = pool(2).run(check_every_layout, settings(models["llama"], dp_shard_size=2), 2)[0]
    assert results and all(result.ok and "shard" not in result.name for result in results)


def test_leaving_out_any_collective_of_fsdp_is_caught(models):
    for keys in ({"dp_replicate_size": 2}, {"tensor_parallel_size": 2}):
        found = pool(4).run(leave_out_each, settings(models["llama"], dp_shard_size=2, **keys))[0]
        axes = {"replicate", "replicate·shard"} if "dp_replicate_size" in keys else {"col", "shard·col"}
        assert {axis for _, axis, _ in found} == {"shard", *axes}
        assert [which for *which, caught in found if not caught] == []


def test_gradients_that_fsdp_does_not_sum_are_named(models):
    keys = settings(models["llama"], dp_shard_size=2, dp_replicate_size=2)
    for kind, axis in (("all_reduce", "replicate"), ("reduce_scatter", "shard")):
        found = [lines for _, along, lines in pool(4).run(diagnoses, keys, (kind,))[0] if along == axis]
        assert found
        for _, _, said, likely in found:
            assert f"own part along {axis}" in said
            assert likely.startswith(f"likely missing: {kind} of dW over {axis} (")


@pytest.mark.parametrize("kind, keys", [("reduce_scatter", {}), ("reduce", {"tensor_parallel_schedule": "summa"})])
def test_a_sum_left_out_is_named(models, kind, keys):
    """With its axis and its parameters, and no other collective beside it, but for the head's."""
    found = pool(4).run(diagnoses, settings(models["llama"], **GRID, **keys), (kind,))[0]
    assert len(found) >= 4
    for kind, axis, lines in found:
        parameter, *_, likely = lines
        assert parameter.startswith("parameter: ") and ".weight" in parameter
        assert f"{kind} of" in likely and f" over {axis} (" in likely
        if "head.weight" not in parameter:
            assert " or " not in likely, lines


def test_no_sum_over_depth_is_named(models):
    """Replicas drift, each with the gradients of its own sequences."""
    keys = settings(models["llama"], **mesh("2.5d", depth=2, col=2))
    message = pool(4).run(told, keys, "no_sum_over_depth")[0]
    assert "parameter: embedding.weight and " in message
    assert "that rank's own part along depth: it is not summed over depth" in message
    assert "likely missing: all_reduce of replicas over depth" in message


def test_norms_that_are_not_summed_are_named(models):
    message = pool(4).run(told, settings(models["llama"], **GRID), "norms_not_summed")[0]
    assert "parameter: layers.0.attention_norm.weight and 4 others" in message
    assert "likely missing: all_reduce of replicas over row·col" in message


def test_a_bias_added_on_each_rank_is_named(models):
    message = pool(4).run(told, settings(models["gpt2"], **LINE), "bias_on_each_rank")[0]
    assert "first wrong: the output of layers.0.attention.out, forward of micro-batch 1" in message
    assert "off by 3 times layers.0.attention.out.bias at every token" in message
    assert "each of the 4 ranks of col adds it; it is added once, after the sum over col" in message


def test_a_sum_that_is_never_asked_for_is_named_by_numbers_and_by_traffic(models):
    message = pool(4).run(told, settings(models["llama"], **LINE), "no_sum_over_col")[0]
    assert "parameter: layers.0.attention.out.weight" in message
    assert "likely missing: reduce_scatter of Y over col (attention out, forward)" in message
    assert "likely missing: reduce_scatter over col; reduce_scatter over col: " in message


def test_needless_traffic_is_told_though_the_numbers_are_right(models):
    message = pool(4).run(told, settings(models["llama"], **LINE), "gathered_for_nothing")[0]
    assert message.startswith("1d col 4, gather: other traffic than the formula has\n")
    assert "all_gather over col: " in message and "off by" not in message


def test_every_layout_of_four_ranks(models):
    results, said = pool(4).run(check_every_layout, settings(models["llama"]), 4, deadline=300)[0]
    names = [result.name for result in results]
    assert len(set(names)) == len(names) == 40 + 13
    for name in (
        "1d col 4, gather, no sequence parallel",
        "2d row 2 × col 2, cannon",
        "3d inner 4, summa, heads over inner",
        "1d ring 2 × ulysses 2, gather",
    ):
        assert name in names and name in said
    assert all(result.ok for result in results)
    assert max(map(len, said.splitlines())) <= 100
