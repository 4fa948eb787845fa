"""A checkpoint saved in any layout goes on in any other: numbers, samples and model as if nothing had changed.

The rows of a step are the same eight in every layout, in whatever micro-batches; dropout is on, and the vocabulary of
509 is cut unevenly.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint.test_saving import flip
from support.pool import pool
from tessera.checkpoint.convert import convert
from tessera.checkpoint.folder import read_state, verify
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from train.faults_on_rank import samples_on_rank
from train.runs import Metrics, Workshop, exported, metrics, run
from train.test_parity import without_key_bias

SAME = 2e-5
SAVED, LAST = 3, 6  # 48 of 26 rows: the order of a second epoch too


def rows(micro: int, steps: int) -> dict[str, Any]:
    """Rows of a micro-batch on each data rank, and micro-batches of a step."""
    return {"micro_batch_size": micro, "gradient_accumulation_steps": steps}


def tensor(mode: str, ranks: int) -> dict[str, Any]:
    return {"tensor_parallel_mode": mode, "tensor_parallel_size": ranks}


ALONE = "one process"
LAYOUTS: dict[str, dict[str, Any]] = {
    ALONE: rows(2, 4),
    "1d 4": tensor("1d", 4) | rows(4, 2),
    "2d 2×2": tensor("2d", 4) | rows(8, 1),
    "2.5d 2×2×2": tensor("2.5d", 8) | rows(8, 1),
    "3d 2×2×2": tensor("3d", 8) | rows(8, 1),
    "fsdp 2 × 1d 2": {"dp_shard_size": 2} | tensor("1d", 2) | rows(2, 2),
    "hsdp 2×2": {"dp_shard_size": 2, "dp_replicate_size": 2} | rows(2, 1),
}
SHARED: dict[str, dict[str, Any]] = {  # ranks share sequences; attention drops nothing there
    "ring 2 × 1d 2": {"context_parallel_size": 2, "context_parallel_mode": "ring"} | tensor("1d", 2) | rows(4, 2),
    "exchange 2 × ulysses 2": {"context_parallel_size": 4, "ulysses_size": 2} | rows(2, 4),
    "2d 2×2, shared rows": tensor("2d", 4) | rows(1, 8),
}
SLOW = pytest.mark.slow
LAYOUT_KEYS = ("tensor_parallel_", "dp_", "context_parallel_", "ulysses_")
TIED = [  # the rest of what is peculiar to it: one tensor for embedding and head, gated, rotary, grouped
    pytest.param(ALONE, "2.5d 2×2×2", marks=SLOW),
    pytest.param("2d 2×2", "fsdp 2 × 1d 2", marks=SLOW),
    pytest.param("fsdp 2 × 1d 2", "3d 2×2×2", marks=SLOW),
    pytest.param("2d 2×2", "hsdp 2×2", marks=SLOW),
    ("ring 2 × 1d 2", "fsdp 2 × 1d 2"),
    pytest.param("fsdp 2 × 1d 2", "exchange 2 × ulysses 2", marks=SLOW),
    pytest.param("exchange 2 × ulysses 2", "2d 2×2, shared rows", marks=SLOW),
    pytest.param("2d 2×2, shared rows", "ring 2 × 1d 2", marks=SLOW),
]
MODELS = ("gpt2 64 dropout one layer", "llama 64 tied")


@pytest.fixture(scope="module")
def whole(workshop: Workshop, tmp_path_factory):
    """The settings of an uninterrupted run of a model in a layout, with a checkpoint midway; made when asked for."""

    @cache
    def of(layout: str, model: str = MODELS[0]) -> dict[str, Any]:
        output = tmp_path_factory.mktemp("whole") / "run"
        own = {"max_steps": LAST, "save_steps": SAVED, "shuffle": True, "check_replicas_steps": 1}
        settings = workshop.settings(model, output, **(LAYOUTS | SHARED)[layout] | own)
        run(settings)
        return settings

    return of


def saved(settings: dict[str, Any]) -> Path:
    return Path(settings["output_dir"]) / f"checkpoint-{SAVED}"


def gone_on(settings: dict[str, Any], layout: str, folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run that goes on in `layout` from a checkpoint."""
    others = {key: value for key, value in settings.items() if not key.startswith(LAYOUT_KEYS)}
    own = {"resume_from_checkpoint": str(folder), "output_dir": str(output), "save_steps": None}
    own |= {"check_replicas_steps": 100}
    return others | (LAYOUTS | SHARED)[layout] | own | changes


def worst(found: Metrics, want: Metrics) -> float:
    """The largest relative difference of losses and gradient norms."""
    assert [(m["step"], m["tokens"], m["epoch"]) for m in found] == [(m["step"], m["tokens"], m["epoch"]) for m in want]
    return max(abs(f[k] - w[k]) / w[k] for f, w in zip(found, want, strict=True) for k in ("loss", "grad_norm"))


def apart(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative difference of two models' tensors."""
    assert found.keys() == want.keys()
    found, want = without_key_bias(found), without_key_bias(want)
    return max(((found[name] - tensor).norm() / tensor.norm()).item() for name, tensor in want.items())


# ---- The same numbers and the same model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uninterrupted_runs_are_the_same_in_every_layout(whole, layout):
    assert worst(metrics(whole(layout)), metrics(whole(ALONE))) <= SAME


def every_pair():
    """All of them; without the slow ones each layout is gone on from, and in, by the next and by one process."""
    names = list(LAYOUTS)
    for place, then in enumerate(names):
        for now in names:
            near = now in (ALONE, names[(place + 1) % len(names)])
            yield pytest.param(then, now, marks=[] if near else [pytest.mark.slow])


@pytest.mark.parametrize(("then", "now"), list(every_pair()))
def test_a_run_goes_on_in_any_layout(whole, tmp_path, then, now):
    settings = gone_on(whole(then), now, saved(whole(then)), tmp_path / "run")
    assert worst(run(settings), metrics(whole(ALONE))[SAVED:]) <= SAME
    assert apart(exported(settings), exported(whole(ALONE))) <= SAME


@pytest.mark.parametrize(("then", "now"), TIED)
def test_a_tied_llama_goes_on_in_another_layout(whole, tmp_path, then, now):
    begun = whole(then, MODELS[1])
    settings = gone_on(begun, now, saved(begun), tmp_path / "run")
    assert worst(run(settings), metrics(whole(ALONE, MODELS[1]))[SAVED:]) <= SAME
    assert apart(exported(settings), exported(whole(ALONE, MODELS[1]))) <= SAME


def converted(settings: dict[str, Any], target: Path) -> dict[str, Tensor]:
    convert(saved(settings), target)
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_saves_the_same_model(whole, tmp_path, layout):
    """Updates have been made of other sums; within float32's rounding they are the same."""
    want = converted(whole(ALONE), tmp_path / "alone")
    assert apart(converted(whole(layout), tmp_path / "other"), want) <= 1e-6
    assert apart(exported(whole(layout)), want) > 1e-3, "there were no updates that could differ"


@pytest.mark.slow
@pytest.mark.parametrize("now", LAYOUTS)
def test_every_layout_hands_out_a_checkpoint_to_the_last_bit(whole, tmp_path, now):
    """No step is left to do: what was read in one layout is gathered and written in another."""
    then = whole("fsdp 2 × 1d 2")
    settings = gone_on(then, now, saved(then), tmp_path / "run", max_steps=SAVED)
    run(settings)
    want = converted(then, tmp_path / "converted")
    assert all(torch.equal(found, want[name]) for name, found in exported(settings).items())


def test_a_flipped_bit_is_found_in_every_file_of_a_cut_run(whole, tmp_path):
    folder = tmp_path / f"checkpoint-{SAVED}"
    shutil.copytree(saved(whole("fsdp 2 × 1d 2")), folder)
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if name.endswith(".distcp")] == [f"__{rank}_0.distcp" for rank in range(4)]
    for name in names:
        place = (folder / name).stat().st_size // 2
        flip(folder / name, place, 3)
        with pytest.raises(UserError, match=f"{name} (is damaged|does not match)|SHA256SUMS: "):
            read_state(folder)
            verify(folder)
        flip(folder / name, place, 3)
    verify(folder)


# ---- The same samples, when a step takes another number of them

ROWS = 77
LEGS: dict[str, list[tuple[dict[str, Any], int | None]]] = {
    "fsdp 2, one process, hsdp 2×2": [
        ({"dp_shard_size": 2} | rows(2, 2), 3),  # 8 rows a step: 24
        (rows(2, 2), 5),  # 4 rows a step: 32
        (LAYOUTS["hsdp 2×2"] | rows(2, 2), None),  # 16 rows a step: 48, 64, and 13 are left
    ],
    "hsdp 2×2, 2d 2×2, fsdp 2 × 1d 2": [
        (LAYOUTS["hsdp 2×2"] | rows(1, 3), 1),  # 12
        (tensor("2d", 4) | rows(6, 1), 4),  # 30
        (LAYOUTS["fsdp 2 × 1d 2"] | rows(5, 2), None),  # 50, 70, and 7 are left
    ],
}


def save_numbered_rows(path: Path) -> Path:
    """Rows of several lengths, each beginning with a token of its own; padding is token 0."""
    lines = (json.dumps({"input_ids": [row + 1, *range(400, 402 + row % 7)]}) for row in range(ROWS))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def rows_seen(settings: dict[str, Any], stop_at: int | None) -> list[tuple[int, int, int]]:
    """(step, place, row) in the order of the stream, over all ranks; ranks that share rows must agree on them."""
    told = pool(TrainConfig.model_validate(settings).world_size).run(samples_on_rank, settings, stop_at)
    every = sorted(set().union(*told))
    assert len({(step, place) for step, place, _ in every}) == len(every), "two rows at one place"
    return every


@pytest.mark.parametrize("legs", LEGS)
def test_each_sample_of_an_epoch_is_seen_once_whatever_the_data_ranks(workshop: Workshop, tmp_path, legs):
    """A run stopped twice goes on with other data ranks and rows a step, in the order of a run that never stopped."""
    data = {"datasets": [{"path": str(save_numbered_rows(tmp_path / "rows.jsonl"))}], "max_steps": None}
    settings = workshop.settings(MODELS[0], tmp_path / "run", shuffle=True, num_epochs=1, **data)
    found = []
    for place, (layout, stop_at) in enumerate(LEGS[legs]):
        found += rows_seen(settings | layout | {"resume_from_checkpoint": place > 0}, stop_at)
    steps = [m["step"] for m in metrics(settings)]
    assert steps == list(range(1, len(steps) + 1)) == sorted({step for step, _, _ in found})
    assert metrics(settings)[-1]["epoch"] == 1
    stream = [row for _, _, row in found if row]
    assert sorted(stream) == list(range(1, ROWS + 1))
    alone = rows_seen(settings | rows(7, 1) | {"output_dir": str(tmp_path / "alone")}, None)
    assert stream == [row for _, _, row in alone if row] != sorted(stream)
