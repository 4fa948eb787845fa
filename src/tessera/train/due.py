"""When a run evaluates and saves, in steps of the run; which of its evaluations is the best; and when it has enough."""

from dataclasses import dataclass, replace
from typing import Self

from tessera.checkpoint.state import Best
from tessera.config.schema import TrainConfig
from tessera.config.sections.steps import in_steps


@dataclass(frozen=True)
class Due:
    """The keys of a run of `total` steps that say when something is due.

    `eval_every` and `save_every` are steps between two evaluations and checkpoints; None: not counted in steps.
    """

    total: int
    eval_strategy: str
    save_strategy: str
    eval_every: int | None = None
    save_every: int | None = None
    patience: int = 0
    greater_is_better: bool = False
    saves_first: bool = False
    saves_best: bool = False

    @classmethod
    def of(cls, config: TrainConfig, total: int) -> Self:
        """What `config` says, for a run of `total` steps."""
        counted = "steps" if config.eval_steps or config.evals_per_epoch else "end"
        strategy = config.eval_strategy or counted
        evals = _every(config.eval_steps, config.evals_per_epoch, config.num_epochs, total)
        if strategy == "steps" and counted == "end":
            evals = config.logging_steps
        saves = _every(config.save_steps, config.saves_per_epoch, config.num_epochs, total)
        patience, greater = config.early_stopping_patience or 0, bool(config.greater_is_better)
        first, best = config.save_first_step, config.load_best_model_at_end
        return cls(total, strategy, config.save_strategy, evals, saves, patience, greater, first, best)

    def evaluates(self, step: int, epoch_ends: bool) -> bool:
        """Whether the rows held out are evaluated after `step`: after the last one always, unless never."""
        if self.eval_strategy == "no":
            return False
        counted = self.eval_strategy == "steps" and self.eval_every is not None and step % self.eval_every == 0
        return counted or step == self.total or self.eval_strategy == "epoch" and epoch_ends

    def saves(self, step: int, epoch_ends: bool, best: Best | None, last: bool) -> bool:
        """Whether a checkpoint is due after `step`: after the `last` one always, unless no checkpoints are wanted."""
        is_best = best is not None and best.step == step
        due = {
            "no": False,
            "steps": self.save_every is not None and step % self.save_every == 0,
            "epoch": epoch_ends,
            "best": is_best,
        }
        asked = last or self.saves_first and step == 1 or self.saves_best and is_best
        return due[self.save_strategy] or asked and self.save_strategy != "no"

    def judged(self, best: Best | None, eval_loss: float, step: int) -> Best:
        """The best evaluation, now that the one after `step` gave `eval_loss`."""
        if best is None:
            return Best(eval_loss, step)
        better = eval_loss > best.eval_loss if self.greater_is_better else eval_loss < best.eval_loss
        return Best(eval_loss, step, best.checkpoint) if better else replace(best, worse=best.worse + 1)

    def ends_early(self, best: Best | None) -> bool:
        """Whether `early_stopping_patience` evaluations in a row were not better than the best."""
        return bool(self.patience) and best is not None and best.worse >= self.patience


def _every(steps: float | None, per_epoch: int | None, epochs: float, total: int) -> int | None:
    """Steps between two, from either key; per epoch as in axolotl: a share of all steps, whatever ends the run."""
    share = 1 / (per_epoch * epochs) if per_epoch else steps
    return None if share is None or per_epoch and share >= 1 else in_steps(share, total)
