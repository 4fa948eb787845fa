"""AdamW beside torch's own; learning rates against transformers.get_scheduler, the length of a warm-up and of a run."""

import math
from typing import Any

import pytest
import torch
import transformers

from engine.optimizer_cases import beside_torchs_own
from support.pool import pool
from tessera.config.schema import TrainConfig
from tessera.engine.rates import learning_rates
from tessera.train.settings import rates
from train.runs import Workshop, run

PEAK = 3e-4


def theirs(schedule: str, warmup: int, total: int, options: dict[str, Any] | None = None) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = transformers.get_scheduler(schedule, optimizer, warmup, total, options)
    rates = []
    for step in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if step + 1 < total:  # a polynomial has no rate after its end
            scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (1, 7), (3, 50), (7, 7), (9, 7)])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("linear", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
        ("inverse_sqrt", {"timescale": 5}),
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.3}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.3, "warmup_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 2, "min_lr_ratio": 0.1}),
    ],
    ids=str,
)
def test_every_rate_equals_that_of_transformers(schedule, options, warmup, total):
    rates = learning_rates(PEAK, schedule, warmup, total, options)
    ours = [rates(step) for step in range(total)]
    assert ours == pytest.approx(theirs(schedule, warmup, total, options), rel=1e-14, abs=1e-20)
    assert [rates(step) for step in reversed(range(total))] == ours[::-1], "the rate is not one of the step alone"


@pytest.mark.parametrize("schedule", ["cosine", "rex"])
def test_a_rate_that_ends_above_zero(schedule):
    """axolotl's cosine_min_lr_ratio: the same as transformers' min_lr_rate."""
    rates = learning_rates(PEAK, schedule, 3, 50, lowest=0.1)
    ours = [rates(step) for step in range(50)]
    assert ours[3] == PEAK and ours[:3] == [0, PEAK / 3, PEAK * 2 / 3]
    assert rates(50) == pytest.approx(0.1 * PEAK)
    if schedule == "cosine":
        assert ours == pytest.approx(theirs("cosine_with_min_lr", 3, 50, {"min_lr_rate": 0.1}), rel=1e-14)
    else:  # (1 - t) / (0.1 + 0.9 (1 - t)) of what is above the lowest rate, half way
        middle = learning_rates(PEAK, schedule, 0, 100, lowest=0.1)(50)
        assert middle == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 / 0.55))


def test_a_rate_that_is_constant_in_the_end():
    """axolotl's cosine_constant_lr_ratio: a cosine over that share of the steps, then its lowest."""
    rates = learning_rates(PEAK, "cosine", 3, 50, lowest=0.1, constant=0.8)
    ours = [rates(step) for step in range(50)]
    assert ours[:40] == pytest.approx(theirs("cosine_with_min_lr", 3, 40, {"min_lr_rate": 0.1}), rel=1e-14)
    assert ours[40:] == pytest.approx([0.1 * PEAK] * 10)


@pytest.mark.parametrize(
    ("schedule", "options", "reason"),
    [
        ("polynomial", {"foo": 1}, "polynomial got an unexpected keyword argument 'foo'"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
        ("warmup_stable_decay", {}, "missing 1 required positional argument: 'num_decay_steps'"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("cosine", {"num_cycles": "many"}, "could not convert string to float: 'many'"),
        ("polynomial", {"power": "a"}, "unsupported operand"),
        ("inverse_sqrt", {"timescale": -5}, "division by zero"),
        ("polynomial", {"lr_end": float("-inf")}, "no finite rate at step 2"),
        ("constant", {"foo": 1}, "constant has no options"),
        ("wavy", {}, "wavy"),
    ],
)
def test_options_that_a_schedule_does_not_take_are_named(schedule, options, reason):
    """Before the first step: also those that count only after the warm-up."""
    with pytest.raises(ValueError, match=reason):
        learning_rates(PEAK, schedule, 1, 10, options)


@pytest.mark.parametrize(
    ("keys", "own"),
    [
        ({"cosine_min_lr_ratio": 0.1}, {"lowest": 0.1}),
        ({"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.8}, {"lowest": 0.1, "constant": 0.8}),
        ({"lr_scheduler": "rex", "cosine_min_lr_ratio": 0.1}, {"lowest": 0.1}),
        ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}}, {"options": {"power": 3.0}}),
    ],
    ids=str,
)
def test_the_keys_of_a_schedule_reach_it(keys, own):
    minimal = {"base_model": "m", "datasets": [{"path": "a"}], "learning_rate": PEAK}
    config = TrainConfig.model_validate(minimal | keys)
    ours, wanted = rates(config, 3, 50), learning_rates(PEAK, config.lr_scheduler, 3, 50, **own)
    usual = learning_rates(PEAK, config.lr_scheduler, 3, 50)
    assert [ours(step) for step in range(50)] == [wanted(step) for step in range(50)]
    assert [ours(step) for step in range(50)] != [usual(step) for step in range(50)]


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
