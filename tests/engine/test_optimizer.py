"""AdamW beside torch's own; learning rates against transformers.get_scheduler, the length of a warm-up and of a run."""

import math

import pytest
import torch
import transformers

from engine.optimizer_cases import beside_torchs_own
from support.pool import pool
from tessera.engine.optimizer import SCHEDULES, learning_rate
from train.runs import Workshop, run

PEAK = 3e-4


def theirs(schedule: str, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = transformers.get_scheduler(schedule, optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (1, 7), (3, 50), (7, 7), (9, 7)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rate_equals_that_of_transformers(schedule, warmup, total):
    ours = [learning_rate(step, PEAK, schedule, warmup, total) for step in range(total)]
    assert ours == pytest.approx(theirs(schedule, warmup, total), rel=1e-14, abs=1e-20)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="unknown schedule 'polynomial'; there are cosine, linear"):
        learning_rate(0, PEAK, "polynomial", 0, 1)


@pytest.mark.parametrize(("ratio", "warmup"), [(0.0, 0), (0.21, 2), (0.4, 2), (0.41, 3)])
def test_a_warm_up_given_as_a_ratio_rounds_up(workshop: Workshop, tmp_path, ratio, warmup):
    own = {"warmup_ratio": ratio, "lr_scheduler": "linear", "learning_rate": PEAK}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    del settings["warmup_steps"]
    rates = [m["learning_rate"] for m in run(settings)]
    assert rates == pytest.approx(theirs("linear", warmup, 5), rel=1e-14)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_only_a_schedule_that_has_a_warm_up_takes_the_default_one(workshop: Workshop, tmp_path, schedule):
    settings = workshop.settings("llama", tmp_path / "run", lr_scheduler=schedule, learning_rate=PEAK, max_steps=3)
    del settings["warmup_steps"]
    rates = [m["learning_rate"] for m in run(settings)]
    first = PEAK if schedule == "constant" else 0.0
    assert rates == [first, PEAK, PEAK]


@pytest.mark.parametrize("epochs", [0.5, 1, 2])
def test_a_run_of_epochs_ends_with_its_last_row(workshop: Workshop, tmp_path, epochs):
    """26 rows, 6 a step: the last step is filled up with rows that count for nothing."""
    settings = workshop.settings("llama", tmp_path / "run", num_epochs=epochs, max_steps=None)
    found = run(settings)
    assert len(found) == math.ceil(epochs * 26 / 6)
    assert found[-1]["epoch"] == epochs
    assert found[0]["epoch"] == pytest.approx(6 / 26, abs=1e-6)
    if epochs >= 1:
        assert found[-1]["tokens"] == epochs * workshop.targets()


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch"])
def test_adamw_on_shards_is_torchs_own_bit_for_bit(name):
    found = pool(4).run(beside_torchs_own, name, {"row": 2, "col": 2}, torch.float32)
    assert found == [(True, True, 0)] * 4
