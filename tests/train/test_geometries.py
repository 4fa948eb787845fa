"""Three steps of the trainer in every geometry and schedule against transformers and torch.optim in a plain loop."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.config.schema import TrainConfig
from tessera.core.mesh import Mesh
from tessera.plan.traffic import step_transfers, totals
from tessera.train.run import model_of
from tessera.train.settings import parallel_for, step_shape
from train.runs import THREE_STEPS, Metrics, Workshop, exported, metrics, run
from train.test_parity import SAME, SAME_WEIGHTS, check, without_key_bias, worst_difference

SHARD = {"tensor_parallel_depth_weights": "shard"}


def mesh(mode: str, **axes: int) -> dict[str, Any]:
    return {"tensor_parallel_mode": mode, "tensor_parallel_mesh": axes, "micro_batch_size": 8}


def size(mode: str, ranks: int) -> dict[str, Any]:
    return {"tensor_parallel_mode": mode, "tensor_parallel_size": ranks, "micro_batch_size": 8}


def schedule(name: str) -> dict[str, Any]:
    kind, _, slices = name.partition(" ")
    return {"tensor_parallel_slices": int(slices)} if kind == "slices" else {"tensor_parallel_schedule": kind}


LAYOUTS = {
    "2d 2×2": size("2d", 4),
    "2d 1×4": mesh("2d", row=1, col=4),
    "2d 4×1": mesh("2d", row=4, col=1),
    "2d 2×3": size("2d", 6) | {"micro_batch_size": 6},
    "2.5d 2×2×2": size("2.5d", 8),
    "2.5d 2×2×2 shard": size("2.5d", 8) | SHARD,
    "2.5d 2×1×2": size("2.5d", 4),
    "2.5d 2×2×1 shard": mesh("2.5d", depth=2, row=2) | SHARD,
    "3d 2×2×2": size("3d", 8),
    "3d 1×2×4": mesh("3d", inner=1, row=2, col=4),
    "3d 2×1×2": mesh("3d", inner=2, row=1, col=2),
    "3d 2×1×2 by heads": mesh("3d", inner=2, row=1, col=2) | {"micro_batch_size": 3},
}
MODELS = {"untied": "llama {}", "tied": "llama {} tied", "gpt2": "gpt2 {}", "qwen3": "qwen3 {}"}
# Of each layout and schedule the models that always run and, after the bar, those that only run among the slow ones.
# The first are a covering: every layout, and every pair of mode, kind of schedule and model (`test_the_list_covers`);
# that each layout with each schedule computes what one process does is proven in float64 in tests/distributed.
RUNS = {
    ("2d 2×2", "gather"): "tied | untied gpt2 qwen3",
    ("2d 1×4", "gather"): "untied | tied gpt2",
    ("2d 4×1", "gather"): "gpt2 | untied tied",
    ("2d 2×3", "gather"): "untied | tied gpt2",
    ("2.5d 2×2×2", "gather"): "| untied tied gpt2 qwen3",
    ("2.5d 2×2×2 shard", "gather"): "untied | tied gpt2",
    ("3d 2×2×2", "gather"): "| untied tied gpt2",
    ("3d 1×2×4", "gather"): "gpt2 | untied tied",
    ("3d 2×1×2", "gather"): "untied | qwen3 tied gpt2",
    ("3d 2×1×2 by heads", "gather"): "qwen3 | tied gpt2",
    ("2d 2×2", "summa"): "tied qwen3 | untied gpt2",
    ("2d 2×2", "cannon"): "gpt2 qwen3 | untied tied",
    ("2d 2×2", "slices 2"): "gpt2 | untied tied",
    ("2d 2×2", "slices 4"): "untied | tied gpt2",
    ("2.5d 2×2×2", "summa"): "gpt2 | untied tied",
    ("2.5d 2×2×2", "cannon"): "untied | tied gpt2",
    ("2.5d 2×2×2", "slices 2"): "| untied tied gpt2",
    ("2.5d 2×2×2", "slices 4"): "| untied tied gpt2",
    ("2.5d 2×2×1 shard", "slices 2"): "tied",
    ("2.5d 2×1×2", "slices 4"): "qwen3 | gpt2",
    ("3d 2×2×2", "summa"): "untied | tied gpt2",
    ("3d 2×2×2", "cannon"): "tied | untied gpt2",
    ("3d 2×2×2", "slices 2"): "| untied tied gpt2",
    ("3d 2×2×2", "slices 4"): "| untied tied gpt2",
    ("3d 2×1×2 by heads", "slices 4"): "tied",
}
LOOPS = {"summa": {"broadcast", "reduce"}, "cannon": {"shift"}}


def settings_of(workshop: Workshop, folder: Any, layout: str, name: str, model: str, **changes: Any) -> dict[str, Any]:
    return workshop.settings(model, folder, **THREE_STEPS | LAYOUTS[layout] | schedule(name) | changes)


def calls(folder: Any) -> dict[tuple[str, str], int]:
    """Of the first rank in the last step of a run, by axis and kind."""
    collectives = json.loads((folder / "summary.json").read_text())["collectives"]
    return {(row["axis"], row["kind"]): row["calls"] for row in collectives}


def calls_by_formula(settings: dict[str, Any], name: str) -> dict[tuple[str, str], int]:
    """The same for the schedule `name`, whatever the settings say of it."""
    config, (kind, _, slices) = TrainConfig.model_validate(settings), name.partition(" ")
    asked = {"name": "gather", "slices": int(slices)} if kind == "slices" else {"name": kind, "slices": 1}
    model, mesh = model_of(config), Mesh(config.mesh_sizes, rank=0)
    parallel = parallel_for(config, model, mesh, replace(config.schedule, **asked))
    rows = step_transfers(model, step_shape(config, parallel), parallel)
    return {key: count for key, (count, _) in totals(rows).items()}


def check_schedule(settings: dict[str, Any], name: str) -> None:
    """That this one ran: no other makes these calls."""
    met, schedules = calls(Path(settings["output_dir"])), {"gather", "slices 2", "slices 4", name}
    assert {kind for _, kind in met} & set.union(*LOOPS.values()) == LOOPS.get(name, set()), "another schedule ran"
    assert [s for s in sorted(schedules) if calls_by_formula(settings, s) == met] == [name], "other calls"


def runs() -> Iterator[Any]:
    for (layout, name), kinds in RUNS.items():
        always, _, slow = kinds.partition("|")
        size = "96" if layout == "2d 2×3" else "64"
        for kind in always.split():
            yield pytest.param(layout, name, MODELS[kind].format(size))
        for kind in slow.split():
            yield pytest.param(layout, name, MODELS[kind].format(size), marks=pytest.mark.slow)


@pytest.mark.parametrize(("layout", "name", "model"), list(runs()), ids=str)
def test_a_run_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, layout, name, model):
    settings = settings_of(workshop, tmp_path / "run", layout, name, model)
    check(settings, run(settings), plain(model, **THREE_STEPS, micro_batch_size=settings["micro_batch_size"]))
    check_schedule(settings, name)


@pytest.mark.parametrize(
    ("layout", "model"),
    [("3d 2×1×2", "qwen2 64"), ("2d 2×2", "qwen2 64 tied"), ("3d 2×1×2", "mistral 64")],
)
def test_a_family_near_llama_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, layout, model):
    settings = settings_of(workshop, tmp_path / "run", layout, "gather", model)
    check(settings, run(settings), plain(model, **THREE_STEPS, micro_batch_size=settings["micro_batch_size"]))


IN_EVERY_SCHEDULE = ("2d 2×2", "2.5d 2×2×2", "3d 2×2×2")
GATHERED = ("2d 1×4", "2d 4×1", "2d 2×3", "2.5d 2×2×2 shard", "3d 1×2×4", "3d 2×1×2")


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *product(IN_EVERY_SCHEDULE, ("gather", "summa", "cannon", "slices 2", "slices 4")),
        *((layout, "gather") for layout in GATHERED),
    ],
)
def test_the_list_leaves_nothing_out(layout, name):
    assert {"untied", "tied", "gpt2"} <= set(RUNS.get((layout, name), "").split())


def test_the_list_covers_what_always_runs():
    always = [
        (layout, layout.partition(" ")[0], name.partition(" ")[0], model)
        for (layout, name), models in RUNS.items()
        for model in models.partition("|")[0].split()
    ]
    layouts, *factors = map(set, zip(*always, strict=True))
    assert layouts == set(LAYOUTS)
    assert factors == [{"2d", "2.5d", "3d"}, {"gather", "summa", "cannon", "slices"}, set(MODELS)]
    for one, other in combinations(range(3), 2):
        pairs = {(case[1 + one], case[1 + other]) for case in always}
        assert pairs == set(product(factors[one], factors[other]))


SMOOTHING = {"label_smoothing_factor": 0.1}
RECOMPUTED = {"gradient_checkpointing": True}
ONE_EPOCH = {"max_steps": None, "warmup_steps": 1}  # 26 rows do not fill its last step
KEPT = {"tensor_parallel_keep_gathered": True}
AT_ONCE = {f"tensor_parallel_{switch}": False for switch in ("prefetch", "defer", "overlap")}


@pytest.mark.parametrize(
    ("layout", "name", "model", "own"),
    [
        ("2d 2×2", "gather", "llama 64 biases", {}),
        ("2d 2×2", "cannon", "llama 64 biases", {}),
        ("2.5d 2×1×2", "slices 2", "llama 64 biases", KEPT),
        ("3d 2×1×2", "gather", "gpt2 64", KEPT),
        ("3d 2×1×2 by heads", "gather", "llama 64 biases", AT_ONCE),
    ],
)
def test_everything_else_at_once_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, layout, name, model, own):
    """Label smoothing, recomputed layers, a last step that the rows do not fill."""
    settings = settings_of(
        workshop, tmp_path / "run", layout, name, model, **SMOOTHING, **RECOMPUTED, **ONE_EPOCH, **own
    )
    batch = settings["micro_batch_size"]
    found = run(settings)
    check(settings, found, plain(model, micro_batch_size=batch, **SMOOTHING, **ONE_EPOCH))
    check_schedule(settings, name)
    assert worst_difference(found, plain(model, micro_batch_size=batch, **ONE_EPOCH)) > 100 * SAME


# ---- What transformers has no like of: one process is the reference

COURSE = {"micro_batch_size": 4, "max_steps": 4, "save_steps": 2, "val_set_size": 5, "eval_steps": 2, "shuffle": True}
COURSE |= {"warmup_steps": 2}


@pytest.fixture(scope="module")
def alone(workshop, tmp_path_factory):
    """A run with dropout and evaluation in one process."""
    settings = workshop.settings("gpt2 64 dropout", tmp_path_factory.mktemp("alone") / "run", **COURSE)
    return run(settings), exported(settings)


def numbers(found: Metrics, key: str) -> list[float]:
    return [line[key] for line in found if key in line]


@pytest.mark.parametrize(
    ("layout", "name"),
    [("2d 2×2", "summa"), ("2.5d 2×2×1 shard", "gather"), ("3d 2×1×2", "gather")],
)
def test_dropout_evaluation_and_resume(workshop: Workshop, alone, tmp_path, layout, name):
    """Those of one process; and a run that goes on from its own checkpoint is bit for bit the whole one."""
    settings = settings_of(workshop, tmp_path / "whole", layout, name, "gpt2 64 dropout", **COURSE)
    found, (want, weights) = run(settings), alone
    assert len(numbers(found, "eval_loss")) == 2
    for key in ("loss", "grad_norm", "eval_loss"):
        assert numbers(found, key) == pytest.approx(numbers(want, key), rel=SAME), key
    ours, theirs = without_key_bias(exported(settings)), without_key_bias(weights)
    assert max((ours[n] - w).norm() / w.norm() for n, w in theirs.items()) <= SAME_WEIGHTS

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed = settings | {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": True}
    again = run(resumed)
    assert [line["step"] for line in again] == [1, 2, 3, 4] and metrics(settings) != again
    for key in ("loss", "grad_norm", "eval_loss"):
        assert numbers(again, key) == numbers(found, key), key
    whole = exported(settings)
    assert all(torch.equal(tensor, whole[n]) for n, tensor in exported(resumed).items())


@pytest.mark.parametrize(
    ("layout", "name"),
    [("2d 2×2", "gather"), ("2d 2×2", "cannon"), ("2.5d 2×2×1 shard", "slices 2"), ("3d 2×1×2", "gather")],
)
def test_bf16_is_close_and_keeps_float32_parameters(workshop: Workshop, plain, tmp_path, layout, name):
    settings = settings_of(workshop, tmp_path / "run", layout, name, "llama 64", bf16=True)
    found, want = run(settings), plain("llama 64", **THREE_STEPS, micro_batch_size=8)
    assert numbers(found, "loss") == pytest.approx(want.losses, rel=0.02)
    assert worst_difference(found, want) > SAME, "this was not bfloat16"
    assert {tensor.dtype for tensor in exported(settings).values()} == {torch.float32}


def test_the_difference_of_another_batch_would_be_seen(workshop: Workshop, plain, tmp_path):
    settings = settings_of(workshop, tmp_path / "run", "2d 2×2", "gather", "llama 64")
    assert worst_difference(run(settings), plain("llama 64", **THREE_STEPS, micro_batch_size=3)) > 100 * SAME
