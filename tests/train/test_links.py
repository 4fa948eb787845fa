"""Ranks are numbered so that the fewest bytes pass between machines, and any such numbering computes the same."""

import itertools
from typing import Any

import pytest

from distributed.model_cases import LLAMA
from support.pool import pool
from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.mesh import AXES, Mesh
from tessera.plan.words import step_rows
from tessera.train.announce import mesh_lines
from tessera.train.links import axis_order, between_machines, traffic
from tessera.train.preflight import parallel_for, step_shape
from train.on_rank import train_on_machines
from train.runs import Workshop, metrics, run
from train.test_parity import check

GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}
CUBE = {"tensor_parallel_mode": "3d", "tensor_parallel_size": 8}
DEEP = {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 8, "tensor_parallel_depth": 2}


def config_of(**keys: Any) -> TrainConfig:
    return make_config({"base_model": "x", "datasets": [{"path": "y"}], "micro_batch_size": 8} | keys)[0]


def passing(config: TrainConfig, here: int, order: tuple[str, ...]) -> int:
    mesh = Mesh(config.mesh_sizes, "meta", rank=0, order=order)
    return between_machines(traffic(config, LLAMA, parallel_for(config, mesh)), mesh, here)


def ordered(*last: str) -> tuple[str, ...]:
    return (*(axis for axis in AXES if axis not in last), *last)


def test_large_weights_keep_row_inside_many_tokens_col():
    few, many = (config_of(**GRID, sequence_len=length) for length in (8, 1024))
    assert axis_order(few, LLAMA, 2) == ordered("col", "row")
    assert axis_order(many, LLAMA, 2) == AXES
    assert passing(few, 2, ordered("col", "row")) < passing(few, 2, AXES)


@pytest.mark.parametrize("here", [2, 4, 8])
@pytest.mark.parametrize("sequence", [8, 256])
@pytest.mark.parametrize(
    "layout", [GRID | {"dp_shard_size": 4}, CUBE | {"dp_shard_size": 2}, DEEP | {"dp_replicate_size": 2}], ids=str
)
def test_no_order_that_fits_passes_fewer_bytes(layout, sequence, here):
    config = config_of(**layout, sequence_len=sequence)
    parallel = parallel_for(config, Mesh(config.mesh_sizes, rank=0))
    groups = {row.axes for row in step_rows(LLAMA, step_shape(config, parallel), parallel) if row.kind != "all_reduce"}
    chosen = axis_order(config, LLAMA, here)
    present = parallel.mesh.present(AXES)
    assert sorted(chosen) == sorted(AXES) and all(axis not in present for axis in chosen[: -len(present)])
    for axes in groups:
        assert [axis for axis in chosen if axis in axes] == list(axes)
    for order in itertools.permutations(present):
        if all([axis for axis in order if axis in axes] == list(axes) for axes in groups):
            assert passing(config, here, ordered(*order)) >= passing(config, here, chosen)


def test_the_order_is_told():
    config = config_of(**GRID, sequence_len=8)
    said = {}
    for order in (AXES, ordered("col", "row")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", "2")
            parallel = parallel_for(config, Mesh(config.mesh_sizes, rank=0, order=order))
            said[order] = mesh_lines(config, LLAMA, parallel)
    usual, chosen = said.values()
    assert [line.split()[:4] for line in chosen[2:4]] == [["col", "2", "between", "machines"], ["row", "2", "in", "a"]]
    assert [line.split()[0] for line in usual[2:4]] == ["row", "col"]
    assert not any("numbered" in line for line in usual)
    (line,) = [line for line in chosen if "numbered" in line]
    assert line.startswith("  ranks are numbered with row innermost: ") and "in the usual order" in line


NUMBERED = {
    "2d": (GRID, 2, "row"),
    "summa": (GRID | {"tensor_parallel_schedule": "summa"}, 2, "row"),
    "3d": (CUBE, 4, "inner · row"),
    "2.5d, weights cut over depth": (DEEP | {"tensor_parallel_depth_weights": "shard"}, 4, "depth · row"),
    "fsdp 2 × 2d": (GRID | {"dp_shard_size": 2, "micro_batch_size": 4}, 4, "shard · row"),
}


@pytest.mark.parametrize("layout", NUMBERED)
def test_a_run_on_machines_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, layout):
    """Numbered in another order than the usual; its checkpoint goes on in one process."""
    keys, here, inside = NUMBERED[layout]
    settings = workshop.settings("gpt2 64", tmp_path / "run", **{"micro_batch_size": 8, "save_steps": 3} | keys)
    said = pool(TrainConfig.model_validate(settings).world_size).run(train_on_machines, settings, here)[0]
    assert f"ranks are numbered with {inside} innermost" in said
    check(settings, metrics(settings), plain("gpt2 64", micro_batch_size=8))
    alone = workshop.settings("gpt2 64", tmp_path / "alone", micro_batch_size=8)
    resumed = run(alone | {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-3")})
    for found, expected in zip(resumed, metrics(settings)[3:], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-5)
