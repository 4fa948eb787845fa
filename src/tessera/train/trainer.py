"""Training: the steps of a run on one rank, with what is logged, evaluated, saved and handed out on the way."""

import math
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tessera.checkpoint.lock import Share
from tessera.checkpoint.saver import Saver
from tessera.core import device as devices
from tessera.core.collectives import Recorder, gathered
from tessera.core.errors import RunFailed
from tessera.core.exhausted import RAN_OUT
from tessera.core.writing import writing
from tessera.engine.optimizer import learning_rate
from tessera.train.build import build
from tessera.train.ended import advice, failing_in_words
from tessera.train.evaluate import evaluate
from tessera.train.health import Health
from tessera.train.kept import hand_out, run_state, set_aside
from tessera.train.log import Log, Stopwatch
from tessera.train.notes import Notes
from tessera.train.records import Records
from tessera.train.run import Run
from tessera.train.stop import StopRequest
from tessera.train.where import Where


def train(run: Run, store: dist.Store | None = None) -> None:
    """Do `run` on this rank: under a launcher one of many, else alone. Raises UserError or RunFailed.

    `store`: where the ranks find one another; unless given, as the launcher's environment says.
    """
    device = devices.local_device()
    devices.prepare(device, tf32=run.config.tf32)
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        how: dict[str, Any] = {}
        timeout = timedelta(minutes=run.config.group_timeout_minutes)
        if store is not None:
            store.set_timeout(timeout)
            how = {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group(devices.backend(device), timeout=timeout, **how)
    try:
        with (
            StopRequest() as stop,
            Share(Path(run.config.output_dir), run.lock) as share,
            failing_in_words(run, device) as where,
        ):
            Trainer(run, device, stop, share, where).run()
    finally:
        if started:
            dist.destroy_process_group()


class Trainer:
    """One rank of a run."""

    def __init__(self, run: Run, device: torch.device, stop: StopRequest, share: Share, where: Where) -> None:
        self.config, self.stop, self.share, self.where = run.config, stop, share, where
        self.built = build(run, device)
        self.built.step.entered = where.enter
        self.progress, self.output = self.built.progress, self.built.output
        self.notes: Notes | None = None
        config, steps, timeout = run.config, self.built.total_steps, timedelta(minutes=run.config.group_timeout_minutes)
        with writing(self.output):
            if self.built.first:
                self.output.mkdir(parents=True, exist_ok=True)
                set_aside(self.built)
                self.notes = Notes(self.output)
            self.log = Log(self.notes, steps, self.progress.step, config.logging_steps)
        self.records = Records(self.built, self.notes)
        keep, beside = config.save_total_limit, config.save_async
        self.saver = Saver(self.output, keep, asynchronous=beside, timeout=timeout, say=self.log.say, check=share.check)
        self.health = Health(self.built, self.saver.newest)

    def run(self) -> None:
        """Train to the last step or until asked to stop; then hand out the model, or leave a checkpoint."""
        try:
            self.records.write_config()
            for line in self.records.first_lines():
                self.log.say(line)
            if self.progress.step == self.built.total_steps:
                self.log.say("this run is finished: no step is left, the model is written again")
            failed = self._finish() if self._steps() else self._leave()
            if self.notes is not None:
                failed += filter(None, [self.notes.missing()])
            if any(RAN_OUT in line for line in failed):
                failed += advice(self.built.run, self.built.mesh.device, copies=True)
            if failed := gathered(failed, self.built.mesh.world)[0]:  # every rank ends with what the first one knows
                raise RunFailed("\n".join(failed))
        finally:
            self.saver.close()
            self.log.close()

    def _steps(self) -> bool:
        """Every remaining step; False when stopped before the last one."""
        config, total, warmup, watch = self.config, self.built.total_steps, self.built.warmup, Stopwatch()
        held_out = self.built.held_out if self.built.prepared.manifest.eval_rows else None
        while self.progress.step < total:
            index = self.progress.step
            self.where.enter("data", index + 1)
            rate = learning_rate(index, config.learning_rate, config.lr_scheduler, warmup, total)
            with Recorder() as recorder:
                batches = self.built.loader.step_batches(index)
                result = self.built.step(batches, index, rate, stop=self._asked_to_stop)
            self.health.count_skipped(result, index + 1)
            self.share.check()
            self.progress.step += 1
            self.progress.tokens += result.tokens if result.finite else 0
            record = self.records.step(result, rate, watch.lap(), recorder)
            step, done = self.progress.step, self.progress.step == total
            stopping = result.stop and not done
            saving = self._saves_after(step)
            self.health.check_replicas(always=done or stopping or saving)
            if held_out is not None and (done or config.eval_steps and step % config.eval_steps == 0):
                self.where.enter("evaluation")
                record["eval_loss"] = evaluate(self.built)
                if not math.isfinite(record["eval_loss"]):
                    raise self.health.diverged(step, f"held-out loss {record['eval_loss']}")
            self.log.step(record)
            if stopping:
                return False
            if saving:
                self._save(last=done)
            watch.lap()
        return True

    def _saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due: after the last step always, unless no checkpoints are wanted."""
        config, loader = self.config, self.built.loader
        epochs, before = (loader.samples_before(n) // loader.samples_per_epoch for n in (step, step - 1))
        due = {
            "no": False,
            "steps": config.save_steps is not None and step % config.save_steps == 0,
            "epoch": epochs > before,
        }
        return due[config.save_strategy] or step == self.built.total_steps and config.save_strategy != "no"

    def _asked_to_stop(self) -> bool:
        return self.stop.asked or self.notes is not None and self.notes.lost_folder

    def _save(self, *, last: bool = True) -> Path:
        self.where.enter("save")
        self.health.check_weights()
        return self.saver.save(self.built.model, self.built.step.optimizer, run_state(self.built), last=last)

    def _leave(self) -> list[str]:
        """Stopped before the last step: leave a checkpoint, or else the weights. Returns what went wrong."""
        failed, step = self._folder_again(), self.progress.step
        folder = self._save()
        self.saver.wait()
        if self.saver.failure is None:
            self.log.say(f"stopped after step {step}; saved {folder}")
            return [*failed, *([f"stopped after step {step}; saved {folder}"] if failed else [])]
        beside = self.output / f"model-after-step-{step}"
        not_handed_out = hand_out(self.built, beside)
        kept = f"the weights are lost: {not_handed_out}" if not_handed_out else f"the weights alone are in {beside}"
        return [*failed, f"stopped after step {step}: {self.saver.failure}", kept]

    def _finish(self) -> list[str]:
        """After the last step: hand out the model, or else leave a checkpoint. Returns what went wrong."""
        self.health.check_weights()
        self.share.check()
        self.saver.wait()  # a save that is in flight, or about to fail, holds disk space that the model may need
        failed = self._folder_again()
        self.where.enter("export")
        not_handed_out = hand_out(self.built)
        if not_handed_out:
            failed += [f"the model was not written: {not_handed_out}", *self._keep_a_checkpoint()]
        self.records.write_summary()
        if self.built.mesh.world > 1:
            dist.barrier()  # no rank leaves before the folder is whole
        if not not_handed_out:
            self.log.say(f"model written to {self.output}")
        self.saver.wait()
        if self.saver.failure is not None:
            failed += [self.saver.failure, *([] if not_handed_out else [f"the model is written to {self.output}"])]
        return failed

    def _keep_a_checkpoint(self) -> list[str]:
        """Where the model cannot be handed out: a checkpoint of this step, and what it is good for."""
        folder = self.output / f"checkpoint-{self.progress.step}"
        if self.saver.newest() != folder:
            self._save()
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
        return [f"{self.output} was removed or renamed while the run was going: what it had written there is gone"]
