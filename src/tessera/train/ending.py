"""What a run leaves at its end, whatever goes wrong then: the model, or else a checkpoint, or else the weights."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from tessera.checkpoint.saver import Saver
from tessera.core.collectives import gathered
from tessera.core.errors import RunFailed
from tessera.core.exhausted import RAN_OUT
from tessera.train.build import Built
from tessera.train.ended import advice
from tessera.train.kept import dtype_out, hand_out
from tessera.train.notes import Notes


class Ending:
    """The end of a run on one rank. `save` begins to write a checkpoint of the steps done, and returns its path."""

    def __init__(
        self, built: Built, notes: Notes | None, saver: Saver, say: Callable[[str], None], save: Callable[[], Path]
    ) -> None:
        self.built, self.notes, self.saver, self.say, self.save = built, notes, saver, say, save
        self.step = built.progress.step
        self.best: Path | None = None
        """The checkpoint whose weights the model has taken in place of the last step's."""

    def leave(self) -> list[str]:
        """Stopped before the last step: leave a checkpoint, or else the weights. Returns what went wrong."""
        failed, step = self._folder_again(), self.step
        folder = self.save()
        self.saver.wait()
        if self.saver.failure is None:
            self.say(f"stopped after step {step}; saved {folder}")
            return [*failed, *([f"stopped after step {step}; saved {folder}"] if failed else [])]
        beside = self.built.output / f"model-after-step-{step}"
        not_handed_out = hand_out(self.built, dtype_out(self.built), beside)
        kept = f"the weights are lost: {not_handed_out}" if not_handed_out else f"the weights alone are in {beside}"
        return [*failed, f"stopped after step {step}: {self.saver.failure}", kept]

    def finish(self, write_rest: Callable[[str | None], None]) -> list[str]:
        """After the last step: hand out the model, or else leave a checkpoint. Returns what went wrong.

        `write_rest` writes what lies beside the model, and is given the model's dtype, or None where there is none.
        """
        failed, dtype = self._folder_again(), dtype_out(self.built)
        not_handed_out = hand_out(self.built, dtype)
        if not_handed_out:
            failed += [f"the model was not written: {not_handed_out}", *self._keep_a_checkpoint()]
        write_rest(None if not_handed_out else dtype)
        if self.built.mesh.world > 1:
            dist.barrier()  # no rank leaves before the folder is whole
        if not not_handed_out:
            self.say(f"model written to {self.built.output} in {dtype}{self._whose(dtype)}")
        self.saver.wait()
        if self.saver.failure is not None:
            failed += [
                self.saver.failure,
                *([] if not_handed_out else [f"the model is written to {self.built.output}"]),
            ]
        return failed

    def _whose(self, dtype: str) -> str:
        """Why the model is in `dtype`, where save_dtype does not say it."""
        config = self.built.run.config
        if dtype != self.built.run.save_dtype:
            return f": its weights are too large for {self.built.run.save_dtype}"
        return "" if config.save_dtype or config.random_init else ", as base_model (save_dtype chooses another)"

    def _keep_a_checkpoint(self) -> list[str]:
        """Where the model cannot be handed out: a checkpoint of this step, and what it is good for."""
        folder = self.built.output / f"checkpoint-{self.step}"
        if self.saver.newest() != folder:
            if self.best is not None:  # these weights and the optimizer are of two steps
                return [
                    f"  its weights are kept in {self.best}: write it elsewhere with tessera convert {self.best} FOLDER"
                ]
            self.save()
            self.saver.wait()
        if self.saver.failure is not None:
            start = self.saver.newest() or "the start"
            return [f"  the trained weights are not kept: free space and start again, which goes on from {start}"]
        return [
            f"  the trained weights are kept in {folder}: run it again with resume_from_checkpoint: true to write the",
            f"  model, or write it elsewhere with tessera convert {folder} FOLDER",
        ]

    def _folder_again(self) -> list[str]:
        """Make output_dir again where it has gone, so that what can be saved is. Says so, on the first rank."""
        if self.notes is None or not self.notes.lost_folder:
            return []
        with suppress(OSError):  # then saving fails too, which all ranks learn
            self.notes.make_folder()
        return [
            f"{self.built.output} was removed or renamed while the run was going: what it had written there is gone"
        ]

    def fail(self, failed: list[str]) -> None:
        """Raise RunFailed, on every rank with what the first one knows, when something went wrong."""
        if self.notes is not None:
            failed += filter(None, [self.notes.missing()])
        if any(RAN_OUT in line for line in failed):
            failed += advice(self.built.run, self.built.mesh.device, copies=True)
        if failed := gathered(failed, self.built.mesh.world)[0]:
            raise RunFailed("\n".join(failed))
