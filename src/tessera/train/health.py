"""What must hold of a run while it goes: numbers are finite, copies of a weight are the same. Else it ends in words."""

from collections.abc import Callable
from pathlib import Path

import torch

from tessera.core import device as devices
from tessera.core.axes import AXES
from tessera.core.collectives import all_reduce
from tessera.core.errors import RunFailed
from tessera.core.pages import LOSS, RANKS_DISAGREE
from tessera.engine.replicas import drifted
from tessera.engine.step import StepResult
from tessera.nn.parameter import to_local
from tessera.train.build import Built

SKIPPED_IN_A_ROW = 10
"""So many steps in a row whose numbers are not finite end a run that skips them: its weights will not mend."""


class Health:
    """The checks of one run; `last_checkpoint` gives the newest whole one, or None. Each raises RunFailed."""

    def __init__(self, built: Built, last_checkpoint: Callable[[], Path | None]) -> None:
        self.built, self.last_checkpoint = built, last_checkpoint

    def count_skipped(self, result: StepResult, step: int) -> None:
        """Count a step that changed no weight because a number was not finite, or end the run."""
        progress = self.built.progress
        progress.in_a_row = 0 if result.finite else progress.in_a_row + 1
        if result.finite:
            return
        progress.skipped += 1
        if self.built.run.config.nonfinite_step == "stop" or progress.in_a_row == SKIPPED_IN_A_ROW:
            found = f"loss {result.loss}, gradient norm {result.grad_norm}; the weights were not updated"
            found += f" in {progress.in_a_row} steps in a row" if progress.in_a_row > 1 else ""
            raise self.diverged(step, found)

    def check_replicas(self, always: bool) -> None:
        """Now and then, and before weights are saved or handed out: copies of them are the same."""
        mesh, step = self.built.mesh, self.built.progress.step
        every = self.built.run.config.check_replicas_steps
        if every is None or mesh.world == 1 or step % every and not always:
            return
        if lines := drifted(self.built.model, mesh):
            more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise RunFailed(
                f"step {step}: copies of the same weights differ\n  " + "\n  ".join(lines[:5]) + more + "\n"
                f"  a rank missed an update or its memory is faulty; what to do: {RANKS_DISAGREE}\n"
                f"  last good checkpoint: {self._last_good()}"
            )

    @torch.no_grad()
    def check_weights(self) -> None:
        """No weights that are not finite are saved or handed out; a finite step may still have made them so."""
        mesh = self.built.mesh
        spoilt = sum((~torch.isfinite(to_local(p))).any().double() for p in self.built.model.parameters())
        spoilt = torch.as_tensor(spoilt, dtype=torch.float64, device=mesh.device)
        if all_reduce(spoilt, mesh.group(AXES)).item():
            found = "the update made weights that are not finite; they were not saved"
            raise self.diverged(self.built.progress.step, found)

    def diverged(self, step: int, found: str) -> RunFailed:
        """The run's end at a loss or gradient that is not finite, with what usually causes it."""
        config, computing = self.built.run.config, devices.dtype_name(self.built.model.parallel.compute)
        return RunFailed(
            f"step {step}: {found}\n"
            f"  likely causes: a learning rate too high (learning_rate: {config.learning_rate}), too short a warm-up "
            f"({self.built.warmup} steps), no clipping (max_grad_norm: {config.max_grad_norm}), or precision "
            f"(bf16: {config.bf16}, computing in {computing})\n"
            f"  what to do: {LOSS}\n"
            f"  last good checkpoint: {self._last_good()}"
        )

    def _last_good(self) -> str:
        return str(self.last_checkpoint() or "none was saved (save_steps)")
