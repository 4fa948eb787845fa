"""Learning-rate schedules: the rate of a step is a function of the step alone, so that a resumed run goes on exactly.

The common ones are written here. For the others the factors are those that transformers' get_scheduler computes with;
it is imported only then, for it takes seconds.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "rex")
"""Written here; every other name is one of transformers."""
TRIED = 100
"""Steps after the warm-up of which the rate is computed when a run begins, beside the last: options that do not fit are
refused then."""


def learning_rates(
    peak: float,
    schedule: str,
    warmup: int,
    total: int,
    options: Mapping[str, Any] | None = None,
    lowest: float = 0.0,
    constant: float = 1.0,
) -> Callable[[int], float]:
    """The rate of each optimizer step (from 0): linear warm-up over `warmup` steps, then the schedule up to `total`.

    `options` are those of transformers for this schedule. cosine and rex end at `lowest` · `peak`, cosine after the
    share `constant` of all steps. `constant` has no warm-up, as in transformers. Raises ValueError for a schedule that
    there is not, or options that it does not take.
    """
    if schedule in SCHEDULES and not options:
        end = int(total * constant) if constant < 1 else total
        return lambda step: _own(step, peak, schedule, warmup, end, lowest)
    return _of_transformers(peak, schedule, warmup, total, dict(options or {}))


def _own(step: int, peak: float, schedule: str, warmup: int, total: int, lowest: float) -> float:
    if schedule == "constant":
        return peak
    if step < warmup:
        return peak * step / max(1, warmup)
    if schedule == "constant_with_warmup":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    left = max(0.0, 1 - progress)
    if schedule == "rex":  # Chen et al. 2022
        share = left / (0.1 + 0.9 * left)
    elif lowest:
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        share = max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * ((1 - lowest) * share + lowest)


def _of_transformers(
    peak: float, schedule: str, warmup: int, total: int, options: dict[str, Any]
) -> Callable[[int], float]:
    if schedule in SCHEDULES[2:]:
        raise ValueError(f"{schedule} has no options")
    import torch
    from transformers import get_scheduler

    # a schedule of transformers is a factor for each step, given to an optimizer that it never steps
    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    try:
        made = get_scheduler(schedule, nothing, warmup, total, options)
        factor = made.lr_lambdas[0]
        # an option may count only after the warm-up, or at the end
        tried = {step: factor(step) for step in (0, *range(warmup, min(total, warmup + TRIED)), max(0, total - 1))}
        wrong = next((step for step, value in tried.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise ValueError(f"{schedule} has no finite rate at step {wrong + 1}")
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{schedule} {str(error).partition('() ')[2] or error}") from error
    return lambda step: peak * factor(step)


def options_of(schedule: str) -> list[str]:
    """What the options of a schedule of transformers are called."""
    if schedule in SCHEDULES[2:]:
        return []
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    made: Any = TYPE_TO_SCHEDULER_FUNCTION.get(schedule)  # type: ignore[call-overload]
    return [name for name in inspect.signature(made).parameters if name not in given]
