"""Copies of a weight that are not the same any more end the run and are named; comparing them costs next to nothing."""

from typing import Any

import pytest

from support.pool import pool
from train.faults_on_rank import altered_on_rank, compared_on_rank
from train.runs import Workshop, metrics

FSDP_TP = {"dp_shard_size": 2, "tensor_parallel_size": 2}
HSDP = {"dp_shard_size": 2, "dp_replicate_size": 2}
NORM, MATRIX = "layers.1.attention_norm.weight", "layers.0.mlp.up.weight"
FAULTS: dict[str, tuple[dict[str, Any], int, set[int], str, str]] = {
    "1d 2, a norm": ({"tensor_parallel_size": 2}, 2, {1}, NORM, "ranks 0, 1 hold different copies of the same part"),
    "1d 4, a norm": ({"tensor_parallel_size": 4}, 4, {1}, NORM, "rank 1 holds another copy than rank 0, 2, 3"),
    "1d 4, two of a norm": (
        {"tensor_parallel_size": 4},
        4,
        {1, 2},
        NORM,
        "ranks 0, 1, 2, 3 hold different copies of the same part",
    ),
    # ranks 0 and 2 hold the first half of it, 1 and 3 the second
    "hsdp 2×2, a matrix": (HSDP, 4, {3}, MATRIX, "ranks 1, 3 hold different copies of the same part"),
    "fsdp 2 × 1d 2, a norm": (FSDP_TP, 4, {2}, NORM, "ranks 2, 3 hold different copies of the same part"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_copy_that_changed_ends_the_run_at_the_next_comparison(workshop: Workshop, tmp_path, fault):
    layout, world, ranks, name, told = FAULTS[fault]
    settings = workshop.settings("llama 64", tmp_path / "run", check_replicas_steps=1, save_steps=1, **layout)
    said = pool(world).run(altered_on_rank, settings, 2, ranks, name)
    for text in said:
        assert f"RunFailed: step 2: copies of the same weights differ\n  {name}: {told}\n" in text, text
        assert f"last good checkpoint: {tmp_path}/run/checkpoint-1\n" in text
    assert [m["step"] for m in metrics(settings)] == [1]
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize(
    ("every", "saves", "step"), [(1, None, 2), (3, None, 3), (100, None, 5), (100, 4, 4), (3, 2, 2)]
)
def test_when_copies_are_compared(workshop: Workshop, tmp_path, every, saves, step):
    """At every so many steps, at the last one, and before each save: a checkpoint is never of copies that differ."""
    own = {"check_replicas_steps": every, "save_steps": saves} | HSDP
    settings = workshop.settings("llama 64", tmp_path / "run", **own)
    said = pool(4).run(altered_on_rank, settings, 2, {3}, MATRIX)
    assert all(f"RunFailed: step {step}: copies of the same weights differ\n  {MATRIX}: " in text for text in said)
    assert all("last good checkpoint: none was saved" in text for text in said)
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ({"tensor_parallel_size": 4}, 4),
        (FSDP_TP, 4),
        (HSDP, 4),
        pytest.param(
            {"tensor_parallel_size": 8, "tensor_parallel_mode": "2.5d", "micro_batch_size": 4},
            8,
            marks=pytest.mark.slow,
        ),
        ({"tensor_parallel_size": 8, "tensor_parallel_mode": "3d", "micro_batch_size": 4}, 8),
    ],
    ids=["1d 4", "fsdp 2 × 1d 2", "hsdp 2×2", "2.5d 2×2×2", "3d 2×2×2"],
)
def test_a_healthy_run_says_nothing_and_gathers_8_bytes_a_parameter(workshop: Workshop, tmp_path, layout, world):
    settings = workshop.settings("gpt2 64 dropout", tmp_path / "run", check_replicas_steps=2, **layout)
    for said, comparisons in pool(world).run(compared_on_rank, settings):
        assert "copies" not in said and "RunFailed" not in said
        assert len(comparisons) == 3  # after steps 2, 4 and 5, the last
        for parameters, moved in comparisons:
            assert parameters > 20 and moved == [("all_gather", world, 8 * parameters * world)]


def test_without_a_comparison_the_run_would_go_on(workshop: Workshop, tmp_path):
    """The tests above can fail: nothing else sees the change."""
    settings = workshop.settings("llama 64", tmp_path / "run", check_replicas_steps=None, **HSDP)
    said = pool(4).run(altered_on_rank, settings, 2, {3}, MATRIX)
    assert not any("RunFailed" in text for text in said) and (tmp_path / "run/model.safetensors").exists()
