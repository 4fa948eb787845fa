"""Ranks are numbered so that the fewest bytes leave a machine, and any such numbering computes the same."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from distributed.model_cases import LLAMA
from support.pool import pool
from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.core.axes import AXES
from tessera.core.mesh import Mesh
from tessera.plan.traffic import step_transfers
from tessera.train.announce import mesh_lines
from tessera.train.links import best_numbering, groups_that_leave, leaving, traffic
from tessera.train.settings import parallel_for, step_shape
from train.on_rank import numbering_on_machines, train_on_machines
from train.runs import THREE_STEPS, Workshop, metrics, run
from train.test_parity import check

GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}
CUBE = {"tensor_parallel_mode": "3d", "tensor_parallel_size": 8}
DEEP = {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 8, "tensor_parallel_depth": 2}
LLAMA_8B = replace(
    LLAMA,
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    vocab_size=128256,
)


def config_of(**keys: Any) -> TrainConfig:
    return make_config({"base_model": "x", "datasets": [{"path": "y"}], "micro_batch_size": 8} | keys)[0]


def rows_of(config: TrainConfig, model=LLAMA):
    parallel = parallel_for(config, model, Mesh(config.mesh_sizes, rank=0))
    return step_transfers(model, step_shape(config, parallel), parallel)


def bytes_out(config: TrainConfig, here: int, numbering: tuple[str, ...], model=LLAMA) -> int:
    """What machine 0 sends, rank by rank: to the next of each group's ring, when that is on another machine."""
    received, total = traffic(rows_of(config, model)), 0
    meshes = [Mesh(config.mesh_sizes, rank=r, numbering=numbering) for r in range(config.world_size)]
    for axes, count in received.items():
        for mesh in meshes[:here]:
            group = [m for m in meshes if all(m.coordinates[a] == mesh.coordinates[a] for a in AXES if a not in axes)]
            following = group[(group.index(mesh) + 1) % len(group)]
            total += count * (following.rank >= here)
    return total


def counted(*last: str) -> tuple[str, ...]:
    return (*(axis for axis in AXES if axis not in last), *last)


def best(config: TrainConfig, here: int, model=LLAMA) -> tuple[str, ...]:
    return best_numbering(config, model, here, torch.float32)


def test_large_weights_keep_row_inside_many_tokens_col():
    few, many = (config_of(**GRID, sequence_len=length) for length in (8, 1024))
    assert best(few, 2) == counted("col", "row") and best(many, 2) == AXES


def test_tensor_ranks_stay_together_beside_fsdp():
    """Along shard more bytes come to a rank, but of each of its groups a machine holds four ranks, of col's but one."""
    config = config_of(dp_shard_size=8, tensor_parallel_size=2, micro_batch_size=1, sequence_len=4096)
    received = traffic(rows_of(config, LLAMA_8B))
    assert received["shard",] > received["col",]
    assert best(config, 8, LLAMA_8B) == AXES


@pytest.mark.parametrize("here", [2, 4, 8])
@pytest.mark.parametrize("sequence", [8, 256])
@pytest.mark.parametrize(
    "layout", [GRID | {"dp_shard_size": 4}, CUBE | {"dp_shard_size": 2}, DEEP | {"dp_replicate_size": 2}], ids=str
)
def test_no_numbering_that_fits_sends_fewer_bytes(layout, sequence, here):
    config = config_of(**layout, sequence_len=sequence)
    groups = {row.axes for row in rows_of(config) if row.kind != "all_reduce"}
    chosen, present = best(config, here), Mesh(config.mesh_sizes, rank=0).present(AXES)
    assert sorted(chosen) == sorted(AXES)
    for axes in groups:
        assert [axis for axis in chosen if axis in axes] == list(axes)
    for order in itertools.permutations(present):
        mesh = Mesh(config.mesh_sizes, rank=0, numbering=counted(*order))
        assert leaving(traffic(rows_of(config)), mesh, here) == bytes_out(config, here, counted(*order))
        if all([axis for axis in order if axis in axes] == list(axes) for axes in groups):
            assert bytes_out(config, here, counted(*order)) >= bytes_out(config, here, chosen)


@pytest.mark.parametrize("here", [2, 3, 4, 6])
def test_groups_that_leave_are_those_with_ranks_elsewhere(here):
    sizes = {"shard": 2, "row": 3, "col": 2}
    for numbering in (AXES, counted("col", "row"), counted("row", "col", "shard")):
        meshes = [Mesh(sizes, rank=rank, numbering=numbering) for rank in range(12)]
        for axes in (("shard",), ("row",), ("col",), ("shard", "row"), ("row", "col")):
            groups: dict[Any, list[int]] = {}
            for mesh in meshes:
                groups.setdefault(tuple(mesh.coordinates[a] for a in AXES if a not in axes), []).append(mesh.rank)
            split = [g for g in groups.values() if any(r < here for r in g) and any(r >= here for r in g)]
            assert groups_that_leave(axes, meshes[0], here) == len(split)


def told(config: TrainConfig, here: int, numbering: tuple[str, ...]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(here))
        return mesh_lines(
            config, LLAMA, parallel_for(config, LLAMA, Mesh(config.mesh_sizes, rank=0, numbering=numbering))
        )


def test_the_numbering_is_told():
    config = config_of(**GRID, sequence_len=8)
    usual, chosen = (told(config, 2, numbering) for numbering in (AXES, counted("col", "row")))
    assert [line.split()[:4] for line in chosen[2:4]] == [["col", "2", "between", "machines"], ["row", "2", "in", "a"]]
    assert [line.split()[0] for line in usual[2:4]] == ["row", "col"]
    assert not any("numbered" in line for line in usual) and any("a machine sends" in line for line in usual)
    (line,) = [line for line in chosen if "numbered" in line]
    assert "ranks numbered as col · row; in the usual order" in line
    alone = config_of(dp_shard_size=16, sequence_len=8)
    assert best(alone, 8) == AXES and not any("numbered" in line for line in told(alone, 8, best(alone, 8)))


NUMBERED = {
    "2d": (GRID, 2, "col · row"),
    "summa": (GRID | {"tensor_parallel_schedule": "summa"}, 2, "col · row"),
    "3d": (CUBE, 4, "col · inner · row"),
    "2.5d, weights cut over depth": (DEEP | {"tensor_parallel_depth_weights": "shard"}, 4, "col · depth · row"),
    "fsdp 2 × 2d": (GRID | {"dp_shard_size": 2, "micro_batch_size": 4}, 4, "col · shard · row"),
}


@pytest.mark.parametrize("layout", NUMBERED)
def test_a_run_on_machines_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, layout):
    """Numbered in another order than the usual; its checkpoint goes on in one process."""
    keys, here, order = NUMBERED[layout]
    settings = workshop.settings(
        "gpt2 64", tmp_path / "run", **THREE_STEPS | {"micro_batch_size": 8, "save_steps": 2} | keys
    )
    said = pool(TrainConfig.model_validate(settings).world_size).run(train_on_machines, settings, here)[0]
    assert f"its ranks numbered as {order};" in said
    check(settings, metrics(settings), plain("gpt2 64", **THREE_STEPS, micro_batch_size=8))
    alone = workshop.settings("gpt2 64", tmp_path / "alone", **THREE_STEPS, micro_batch_size=8)
    resumed = run(alone | {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-2")})
    for found, expected in zip(resumed, metrics(settings)[2:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-5)


def test_machines_that_are_not_alike_keep_the_usual_order(workshop: Workshop, tmp_path):
    settings = workshop.settings("gpt2 64", tmp_path / "run", micro_batch_size=8, **GRID)
    for places, numbering in (((2, 2, 2, 2), counted("col", "row")), ((3, 3, 3, 1), AXES)):
        assert pool(4).run(numbering_on_machines, settings, places) == [numbering] * 4
