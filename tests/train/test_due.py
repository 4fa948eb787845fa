"""When a run evaluates, saves and ends, beside transformers' own callbacks; the best checkpoint, and how it resumes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.trainer_callback import DefaultFlowCallback, EarlyStoppingCallback, TrainerControl

from support.pool import pool
from tessera.checkpoint.folder import read_checkpoint
from tessera.config.schema import TrainConfig
from tessera.train.due import Due
from train.on_rank import said_on_rank
from train.runs import Metrics, Workshop, exported, metrics, run

MINIMAL = {"base_model": "m", "datasets": [{"path": "a"}], "val_set_size": 2}


def due_of(total: int, **keys: Any) -> Due:
    return Due.of(TrainConfig.model_validate(MINIMAL | keys), total)


# ---- Beside transformers


@pytest.mark.parametrize("total", [1, 7, 10, 33])
@pytest.mark.parametrize("every", [1, 3, 0.1, 0.25, 1 / 3, 0.5, 0.99])
def test_steps_and_shares_are_those_of_transformers(total, every):
    due = due_of(total, eval_steps=every, save_steps=every)
    args = SimpleNamespace(
        logging_first_step=False, logging_strategy="no", eval_strategy="steps", save_strategy="steps", eval_delay=0
    )
    interval = every if every >= 1 else -(-total * every // 1)  # TrainerState.compute_steps
    state = SimpleNamespace(global_step=0, max_steps=total, logging_steps=1, eval_steps=interval, save_steps=interval)
    flow = DefaultFlowCallback()
    for step in range(1, total + 1):
        state.global_step = step
        control = flow.on_step_end(args, state, TrainerControl())
        assert due.evaluates(step, False) == control.should_evaluate, step
        assert due.saves(step, False, None, step == total) == control.should_save, step


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_is_that_of_transformers(patience, greater):
    losses = [3.0, 2.0, 2.0, 2.5, 1.5, 1.5, 1.6, 1.4, 1.7, 1.8, 1.9, 1.0]
    due, best = due_of(99, early_stopping_patience=patience, greater_is_better=greater), None
    theirs = EarlyStoppingCallback(patience)
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater)
    state = SimpleNamespace(best_metric=None)
    for step, loss in enumerate(losses, 1):
        control = TrainerControl()
        theirs.on_evaluate(args, state, control, {"eval_loss": loss})
        if state.best_metric is None or (loss > state.best_metric if greater else loss < state.best_metric):
            state.best_metric = loss  # Trainer._determine_best_metric
        best = due.judged(best, loss, step)
        assert best.eval_loss == state.best_metric
        assert due.ends_early(best) == control.should_training_stop, step
        if control.should_training_stop:
            break
    else:
        raise AssertionError("patience never ended")


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, [7]),
        ({"evals_per_epoch": 1, "num_epochs": 2}, [4, 7]),
        ({"evals_per_epoch": 2, "num_epochs": 2}, [2, 4, 6, 7]),
        ({"evals_per_epoch": 1, "num_epochs": 1}, [7]),
        ({"evals_per_epoch": 1, "num_epochs": 0.5}, [7]),
        ({"evals_per_epoch": 0}, [7]),
        ({"eval_strategy": "epoch"}, [3, 5, 7]),
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "logging_steps": 3}, [3, 6, 7]),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 7]),
    ],
    ids=str,
)
def test_evaluations_of_a_run_of_seven_steps(keys, steps):
    due = due_of(7, **keys)
    assert [step for step in range(1, 8) if due.evaluates(step, step in (3, 5))] == steps


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, [7]),
        ({"saves_per_epoch": 1, "num_epochs": 2}, [4, 7]),
        ({"saves_per_epoch": 0}, [7]),
        ({"save_strategy": "epoch"}, [3, 5, 7]),
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "best"}, [2, 6, 7]),
        ({"save_first_step": True, "save_steps": 5}, [1, 5, 7]),
        ({"load_best_model_at_end": True, "save_steps": 5}, [2, 5, 6, 7]),
    ],
    ids=str,
)
def test_checkpoints_of_a_run_of_seven_steps(keys, steps):
    """The evaluations after steps 2 and 6 are better than all before."""
    due, best = due_of(7, **keys), None
    found = []
    for step in range(1, 8):
        if step % 2 == 0:
            best = due.judged(best, {2: 2.0, 4: 3.0, 6: 1.0}[step], step)
        if due.saves(step, step in (3, 5), best, step == 7):
            found.append(step)
    assert found == steps


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({}, ""),
        ({"save_strategy": "best"}, "save_strategy"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"early_stopping_patience": 3}, "early_stopping_patience"),
        ({"early_stopping_patience": 0}, ""),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
    ],
)
def test_what_compares_evaluations(keys, key):
    assert TrainConfig.model_validate(MINIMAL | keys).compares_evaluations == key


# ---- Runs


def checkpoints(settings: dict[str, Any]) -> list[int]:
    return sorted(int(p.name.rpartition("-")[2]) for p in Path(settings["output_dir"]).glob("checkpoint-*"))


def evaluated(found: Metrics) -> list[int]:
    return [m["step"] for m in found if "eval_loss" in m]


def state(settings: dict[str, Any], step: int) -> Any:
    return json.loads((Path(settings["output_dir"]) / f"checkpoint-{step}" / "state.json").read_text())


EACH_STEP = {"val_set_size": 5, "eval_steps": 1, "save_steps": 1, "lr_scheduler": "constant", "warmup_steps": None}


def test_a_run_evaluates_and_saves_by_epochs(workshop: Workshop, tmp_path):
    """21 rows, 6 a step: steps 4 and 7 end an epoch, and half a run is 3.5 steps."""
    own = {"max_steps": -1, "num_epochs": 2, "val_set_size": 5}
    settings = workshop.settings("llama", tmp_path / "a", **own, evals_per_epoch=2, saves_per_epoch=1)
    found = run(settings)
    assert len(found) == 7 and evaluated(found) == [2, 4, 6, 7] and checkpoints(settings) == [4, 7]
    settings = workshop.settings("llama", tmp_path / "b", **own, eval_strategy="epoch", save_strategy="epoch")
    assert evaluated(run(settings)) == [4, 7] and checkpoints(settings) == [4, 7]
    settings = workshop.settings("llama", tmp_path / "c", **own, eval_strategy="no", save_steps=0.3, warmup_steps=0.3)
    found = run(settings)
    assert evaluated(found) == [] and checkpoints(settings) == [3, 6, 7]
    rates = [m["learning_rate"] for m in found]
    assert rates[:4] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3]) and rates[4] < 1e-3, "2.1 of 7 steps are 3"


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2, "dp_shard_size": 2}], ids=str)
def test_the_model_of_the_best_checkpoint_is_handed_out(workshop: Workshop, tmp_path, layout):
    """Where the greater loss is the better, an early step is the best."""
    own = EACH_STEP | layout | {"load_best_model_at_end": True, "save_total_limit": 1}
    settings = workshop.settings("llama", tmp_path / "run", **own, max_steps=4, greater_is_better=True)
    found = run(settings)
    losses = [m["eval_loss"] for m in found]
    top = 1 + losses.index(max(losses))
    assert top < 4 and min(losses) == losses[-1], "the losses do not fall in the end"
    assert checkpoints(settings) == [top, 4], "the newest stays, and the best"
    assert state(settings, 4)["best"] == {"eval_loss": max(losses), "step": top, "checkpoint": top, "worse": 4 - top}
    short = workshop.settings("llama", tmp_path / "short", **EACH_STEP | layout, max_steps=top)
    run(short)
    want, got = exported(short), exported(settings)
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    usual = workshop.settings("llama", tmp_path / "usual", **own, max_steps=4, metric_for_best_model="perplexity")
    run(usual)
    assert state(usual, 4)["best"]["step"] == 4 and checkpoints(usual) == [4]
    assert not torch.equal(exported(usual)["lm_head.weight"], got["lm_head.weight"])
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| eval_loss | {max(losses):.4g} |" in card and f"of step {top}: the best eval_loss" in card
    assert "| loss |" not in card, "that of the last step's model"
    # a finished run that is started again hands out the same model
    (tmp_path / "run" / "model.safetensors").unlink()
    said = pool(TrainConfig.model_validate(settings).world_size).run(
        said_on_rank, settings | {"resume_from_checkpoint": True}
    )[0]
    assert "this run is finished" in said and f"checkpoint-{top} is handed out" in said
    assert all(torch.equal(tensor, got[name]) for name, tensor in exported(settings).items())


def test_only_better_evaluations_are_saved(workshop: Workshop, tmp_path):
    own = EACH_STEP | {"save_strategy": "best", "max_steps": 4, "tensor_parallel_size": 2}
    del own["save_steps"]
    falling = workshop.settings("llama", tmp_path / "falling", **own)
    run(falling)
    assert checkpoints(falling) == [1, 2, 3, 4]
    rising = workshop.settings("llama", tmp_path / "rising", **own, greater_is_better=True)
    run(rising)
    assert checkpoints(rising) == [1, 4]


def test_patience_ends_a_run_and_a_resumed_one_alike(workshop: Workshop, tmp_path):
    """At a rate of zero no evaluation is better than the first: five more end the run after step 6."""
    own = EACH_STEP | {"learning_rate": 0.0, "early_stopping_patience": 5, "save_steps": 3, "max_steps": 9}
    settings = workshop.settings("llama", tmp_path / "run", **own, tensor_parallel_size=2)
    said = pool(2).run(said_on_rank, settings)[0]
    assert "ended after step 6 of 9: 5 evaluations in a row were not better than the best" in said
    assert len(metrics(settings)) == 6 and checkpoints(settings) == [3, 6]
    last = state(settings, 6)["best"]
    assert (last["step"], last["worse"]) == (1, 5)

    resumed = settings | {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": True}
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    assert len(run(resumed)) == 6 and state(resumed, 6)["best"] == last

    said = pool(2).run(said_on_rank, resumed)[0]
    assert "this run is finished" in said and len(metrics(resumed)) == 6
    assert len(run(resumed | {"early_stopping_patience": 7})) == 8, "more patience goes on"


def test_checkpoints_of_the_model_alone(workshop: Workshop, tmp_path):
    own = {"save_steps": 2, "max_steps": 4, "save_only_model": True, "tensor_parallel_size": 2}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    whole = run(settings)
    saved, metadata = read_checkpoint(tmp_path / "run" / "checkpoint-2")
    assert not saved.optimizer and {n.partition("/")[0] for n in metadata.state_dict_metadata} == {"model"}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    said = pool(2).run(said_on_rank, settings | {"resume_from_checkpoint": True})[0]
    assert "checkpoint-2 has no optimizer state, which starts from zero" in said
    again = metrics(settings)
    assert again[2]["loss"] == whole[2]["loss"] and again[3]["loss"] != whole[3]["loss"]
