"""Training: the steps of a run on one rank, with what is logged, evaluated, saved and handed out on the way."""

import math
import os
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tessera.checkpoint.lock import Share
from tessera.checkpoint.saver import Saver
from tessera.checkpoint.tensors import load_model
from tessera.core import device as devices
from tessera.core.errors import RunFailed, UserError
from tessera.core.writing import writing
from tessera.monitor.profile import Profiler
from tessera.train.build import build, rates_of
from tessera.train.due import Due
from tessera.train.ended import failing_in_words
from tessera.train.ending import Ending
from tessera.train.evaluate import evaluate
from tessera.train.events import Events
from tessera.train.files import Files
from tessera.train.health import Health
from tessera.train.kept import run_state, set_aside
from tessera.train.measure import Measure
from tessera.train.notes import Notes
from tessera.train.progress import Stopwatch, Terminal
from tessera.train.records import Records
from tessera.train.run import Run
from tessera.train.stop import StopRequest
from tessera.train.trackers.all import Trackers
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
        self.config, self.stop, self.share = run.config, stop, share
        self.built = build(run, device)
        self.progress, self.output = self.built.progress, self.built.output
        self.due = Due.of(run.config, self.built.total_steps)
        self.notes: Notes | None = None
        config, steps, timeout = run.config, self.built.total_steps, timedelta(minutes=run.config.group_timeout_minutes)
        self.events = Events(steps, self.progress.step, config.logging_steps)
        with writing(self.output):
            if self.built.first:
                self.output.mkdir(parents=True, exist_ok=True)
                set_aside(self.built)
                self.notes = Notes(self.output, check=share.check)
                first_step = self.progress.step
                self.events.sinks += [Files(self.notes, first_step), Terminal(steps, first_step)]
        self.measure = Measure(where, self.built.step, self.events, config.monitor)
        self.records = Records(self.built, self.notes)
        numbers = config.profiled(self.progress.step, steps, self.built.mesh.rank)
        self.profiler = Profiler(self.output, numbers, self.built.mesh, check=share.check, say=self.events.say)
        keep, beside = config.save_total_limit, config.save_async
        told: dict[str, Any] = {"say": self.events.say, "saved": self.events.saved, "check": share.check}
        self.saver = Saver(self.output, keep, asynchronous=beside, timeout=timeout, **told)
        self.health = Health(self.built, self.saver.newest)

    def run(self) -> None:
        """Train to the last step or until asked to stop; then hand out the model, or leave a checkpoint."""
        try:
            self.records.write_config()
            for line in self.records.first_lines():
                self.events.say(line)
            if self.built.first:
                self.events.sinks.append(Trackers(self.config, self.output, self.progress.step, self.events.say))
            if self._done():
                self.events.say("this run is finished: no step is left, the model is written again")
            else:
                self.measure.predict(self.config, self.built.run.model)
            done, ending = self._steps(), Ending(self.built, self.notes, self.saver, self.events.say, self._save)
            failed = self._finish(ending) if done else ending.leave()
            if not done:
                self.records.write_plot()
            ending.fail(failed)
            self.events.ended("finished" if done else f"stopped after step {self.progress.step}")
        except Exception as error:
            with suppress(RunFailed):  # where another run has the folder by now
                self.saver.wait()
                self.events.ended(str(error)[:2000] or type(error).__name__)
            raise
        finally:
            self.saver.close()
            self.built.close()
            self.events.close()

    def _steps(self) -> bool:
        """Every remaining step; False when stopped before the last one."""
        total, watch, rates = self.built.total_steps, Stopwatch(), rates_of(self.built)
        held_out = self.built.held_out if self.built.prepared.manifest.eval_rows else None
        while not self._done():
            index = self.progress.step
            self.measure.enter("data", index + 1)
            rate = rates(index)
            with self.profiler.step(index + 1) as profiled:
                with self.measure.step(index + 1, profiled) as recorder:
                    batches = self.built.loader.step_batches(index)
                    result = self.built.step(batches, index, rate, stop=self._asked_to_stop)
                seconds = watch.lap()
                self.measure.end(index + 1)
            self.health.count_skipped(result, index + 1)
            self.share.check()
            self.progress.step += 1
            self.progress.tokens += result.tokens if result.finite else 0
            record = self.records.step(result, rate, seconds, recorder, batches)
            self.measure.report(record)
            step, epoch_ends = self.progress.step, self._epoch_ends()
            if held_out is not None and self.due.evaluates(step, epoch_ends):
                record["eval_loss"] = self._evaluate()
            done = self._done()
            stopping = result.stop and not done
            saving = self.due.saves(step, epoch_ends, self.progress.best, done)
            self.health.check_replicas(always=done or stopping or saving)
            self.events.step(record)
            if stopping:
                self._compare()
                return False
            if saving:
                self._save(last=done)
            watch.lap()
        self._compare()
        if self.progress.step < total:
            evaluations = f"{self.due.patience} evaluations in a row were not better than the best"
            self.events.say(f"ended after step {self.progress.step} of {total}: {evaluations}")
        return True

    def _compare(self) -> None:
        """Say what has taken more than was predicted; the summary has both."""
        if self.measure.beside is not None:
            self.records.beside = self.measure.beside.record()
            for line in self.records.beside["more_than_predicted"]:
                self.events.warn(line)

    def _done(self) -> bool:
        """Whether no step is left."""
        return self.progress.step == self.built.total_steps or self.due.ends_early(self.progress.best)

    def _epoch_ends(self) -> bool:
        """Whether the step just done was the last one of an epoch."""
        step = self.progress.step
        epochs, before = (int(self.built.loader.epoch(n)) for n in (step, step - 1))
        return epochs > before

    def _evaluate(self) -> float:
        """eval_loss now; what it says of the best checkpoint is kept in the progress."""
        with self.measure.during("evaluation"):
            loss, step = evaluate(self.built), self.progress.step
        if not math.isfinite(loss):
            raise self.health.diverged(step, f"eval_loss {loss}")
        if self.config.compares_evaluations:
            self.progress.best = self.due.judged(self.progress.best, loss, step)
        return loss

    def _asked_to_stop(self) -> bool:
        return self.stop.asked or self.notes is not None and self.notes.lost_folder

    def _save(self, *, last: bool = True) -> Path:
        best, model, optimizer = self.progress.best, self.built.model, self.built.step.optimizer
        with self.measure.during("save"):
            self.health.check_weights()
            if best is not None and best.step == self.progress.step:
                self.progress.best = replace(best, checkpoint=best.step)
            return self.saver.save(model, optimizer, run_state(self.built), last=last)

    def _finish(self, ending: Ending) -> list[str]:
        """After the last step."""
        self.health.check_weights()
        self.share.check()
        self.saver.wait()  # one that is in flight, or about to fail, holds disk space that the model may need
        failed = self._load_best(ending)
        self.measure.enter("export")
        return [*failed, *ending.finish(self.records.write_rest)]

    def _load_best(self, ending: Ending) -> list[str]:
        """Take the weights of the best checkpoint where they are asked for. Returns what went wrong."""
        best, run = self.progress.best, self.built.run
        if not self.config.load_best_model_at_end or best is None or best.checkpoint == self.progress.step:
            return []
        name = f"checkpoint-{best.checkpoint}"
        # a run that goes on from another folder's checkpoint has its best there, until it makes a better one
        places = [self.output, *([run.resume.parent] if run.resume else [])]
        try:
            folder = next(place / name for place in places if (place / name).is_dir())
            load_model(folder, self.built.model)
        except (StopIteration, UserError) as error:
            reason = error.reason if isinstance(error, UserError) else "is not there"
            name = "none was saved after it" if best.checkpoint is None else f"{name}, {reason}"
            return [
                f"the best checkpoint (eval_loss {best.eval_loss:.4f}): {name}; the last step's model is handed out"
            ]
        self.records.handed_out, ending.best = best, folder
        self.events.say(f"the model of {folder} is handed out: its eval_loss was the best, {best.eval_loss:.4f}")
        return []
