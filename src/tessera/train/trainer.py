"""Training from a config: builds the run on every rank, steps, logs, evaluates, saves, and hands out the model."""

import json
import math
import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tessera.checkpoint import folder as checkpoint_folder
from tessera.checkpoint import tensors as checkpoint
from tessera.checkpoint.resumed import differences
from tessera.checkpoint.saver import Saver
from tessera.core import device as devices
from tessera.core.axes import AXES, DATA_AXES
from tessera.core.collectives import Recorder, all_gather, all_reduce, gathered, largest
from tessera.core.errors import RunFailed, UserError
from tessera.data.loader import Loader
from tessera.data.prepare import TRAINED, Prepared, open_prepared
from tessera.data.samples import Split, open_rows
from tessera.engine.fsdp import build_decoder
from tessera.engine.gradients import first_copy
from tessera.engine.optimizer import build_optimizer, learning_rate
from tessera.engine.replicas import drifted
from tessera.engine.step import Step, StepResult
from tessera.layout.resolve import compute_dtype, fsdp_of, parallel_for
from tessera.layout.shape import length_multiple
from tessera.layout.streams import HIDDEN
from tessera.models.hub import export, load_weights
from tessera.nn.parameter import parameter_elements, to_local
from tessera.plan.tune import tune
from tessera.train.announce import mesh_lines
from tessera.train.links import run_mesh
from tessera.train.log import Log, Stopwatch
from tessera.train.preflight import Run, prepare_data, resolve

if TYPE_CHECKING:
    from tessera.config.schema import TrainConfig


SKIPPED_IN_A_ROW = 10
"""So many steps in a row whose numbers are not finite end a run that skips them: its weights will not mend."""


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors: optimizer steps done, targets trained on, and steps without update.

    `skipped` steps had a loss or gradient that was not finite, the last `in_a_row` of them one after another.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    in_a_row: int = 0


class StopRequest:
    """SIGINT and SIGTERM only raise a flag: the ranks agree on it at the end of a step, save, and exit."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        try:
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: nobody signals us here
            self._before = {}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


def train(config: "TrainConfig") -> None:
    """Run `config` on this rank: under torch's launcher one of many, else alone. Raises UserError or RunFailed."""
    device = devices.local_device()
    devices.prepare(device, tf32=config.tf32)
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        timeout = timedelta(minutes=config.group_timeout_minutes)
        dist.init_process_group(devices.backend(device), timeout=timeout)
    try:
        with StopRequest() as stop:
            Trainer(config, device).run(stop)
    finally:
        if started:
            dist.destroy_process_group()


class Trainer:
    """One rank of a run."""

    def __init__(self, config: "TrainConfig", device: torch.device) -> None:
        self.config = config
        self.output = Path(config.output_dir)
        self.resolved: Run = resolve(config)
        compute = compute_dtype(config, device)
        self.mesh = run_mesh(config, self.resolved.model, device, compute)
        self.first = self.mesh.rank == 0
        self._agree_on_resume()
        self.prepared: Prepared = self._prepare()
        auto = config.tensor_parallel_schedule == "auto"
        tuning = tune(config, self.resolved.model, self.mesh, compute) if auto else None
        self.tuned = tuning.lines() if tuning else []
        parallel = parallel_for(config, self.mesh, tuning.schedule if tuning else None, compute=compute)
        self.model = build_decoder(
            self.resolved.model, parallel, fsdp_of(config), gradient_checkpointing=config.gradient_checkpointing
        )
        self.optimizer = build_optimizer(
            self.model,
            config.optimizer,
            (config.adam_beta1, config.adam_beta2),
            config.adam_epsilon,
            config.weight_decay,
        )
        self.step = Step(
            self.model,
            self.optimizer,
            max_grad_norm=config.max_grad_norm,
            label_smoothing=config.label_smoothing_factor,
            seed=config.seed,
        )
        self.loader = self._loader("train", shuffle=config.shuffle)
        self.progress, resumed = self._start()
        self.total_steps = config.max_steps or self.loader.steps_for(config.num_epochs)
        if config.max_steps is None:
            self.loader.last_sample = self.loader.samples_for(config.num_epochs)
        self.warmup = config.warmup_steps
        if self.warmup is None:
            ratio = 0.0 if config.lr_scheduler == "constant" else config.warmup_ratio
            self.warmup = math.ceil(ratio * self.total_steps)
        if resumed:
            self._check_resumed(resumed)
        self._memory: float | None = None
        self.collectives: list[dict[str, Any]] = []

    def _agree_on_resume(self) -> None:
        """Raise UserError on every rank when they see different checkpoints: some would read one, others not."""
        seen = gathered(str(self.resolved.resume), self.mesh.world)
        if other := next((rank for rank, path in enumerate(seen) if path != seen[0]), None):
            reason = f"rank 0 would resume from {seen[0]}, rank {other} from {seen[other]}"
            raise UserError("output_dir", self.output, reason, "a disk that every machine sees")

    def _prepare(self) -> Prepared:
        """Rank 0 prepares the data (most often it finds it done), the others open what it wrote."""
        prepared = prepare_data(self.config, self.resolved) if self.first else None
        if self.mesh.world > 1:
            dist.barrier()
        return prepared or open_prepared(self.output / "prepared")

    def _loader(self, split: Split, *, shuffle: bool) -> Loader:
        config = self.config
        multiple = length_multiple(config.micro_batch_size, self.model.residual, self.mesh)
        return Loader(
            open_rows(self.prepared.folder, split),
            config.micro_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
            shuffle,
            multiple,
            data_rank=self.mesh.index(DATA_AXES),
            data_ranks=self.mesh.size(DATA_AXES),
        )

    def _start(self) -> tuple[Progress, dict[str, Any] | None]:
        """Weights from the checkpoint to resume, whose state is given too, from the model's safetensors, or random."""
        if self.resolved.resume is not None:
            state = checkpoint.load(self.resolved.resume, self.model, self.optimizer)
            if not state["optimizer"] and self.first:
                print(f"{self.resolved.resume} has no optimizer state, which starts from zero", flush=True)
            self.loader.start_at(state["step"], state["samples"])
            return Progress(state["step"], state["tokens"], state["skipped"]), state
        if self.config.random_init:
            self.model.initialize(self.config.seed)
        else:
            load_weights(self.model, self.resolved.folder)
        return Progress(), None

    def _check_resumed(self, state: dict[str, Any]) -> None:
        """Say, by key, what changes the course of a resumed run or its numbers; UserError when it is past its end."""
        last = self.loader.last_sample
        if state["step"] > self.total_steps or last is not None and state["samples"] > last:
            whole = f"{self.total_steps} steps" if last is None else f"{last} rows"
            made = f"{state['step']} steps, {state['samples']} rows"
            reason = f"the run is {whole} long, the checkpoint was made after {made}"
            raise UserError("resume_from_checkpoint", self.resolved.resume, reason, "raise max_steps or num_epochs")
        now = self.config.model_dump(mode="json") | self._course()
        defaults = {key: field.get_default() for key, field in type(self.config).model_fields.items()}
        for line in differences(state["config"] | state["course"], now, defaults) if self.first else []:
            print(line, flush=True)

    def _course(self) -> dict[str, Any]:
        """What follows from the settings, and the order of samples and the learning rate from it."""
        return {
            "samples_per_step": self.loader.samples_per_step,
            "data": self.prepared.manifest.key,
            "steps": self.total_steps,
            "warmup_steps": self.warmup,
            "computing_in": devices.dtype_name(self.model.parallel.compute),
        }

    def run(self, stop: StopRequest) -> None:
        """Train to the last step or until asked to stop; then hand out the model, or leave a checkpoint."""
        config = self.config
        if self.first:
            self._write_config()
            self._set_aside()
        log = Log(self.output, self.total_steps, self.progress.step, config.logging_steps, self.first)
        self.saver = Saver(
            self.output,
            config.save_total_limit,
            asynchronous=config.save_async,
            timeout=timedelta(minutes=config.group_timeout_minutes),
            say=log.say,
        )
        try:
            self._say_start(log)
            if self._steps(log, stop):
                self._finish(log)
        finally:
            self.saver.close()
            log.close()

    def _steps(self, log: Log, stop: StopRequest) -> bool:
        """Every remaining step; False when stopped before the last one."""
        config, watch = self.config, Stopwatch()
        while self.progress.step < self.total_steps:
            index = self.progress.step
            rate = learning_rate(index, config.learning_rate, config.lr_scheduler, self.warmup or 0, self.total_steps)
            with Recorder() as recorder:
                result = self.step(self.loader.step_batches(index), index, rate, stop=lambda: stop.asked)
            self._count_skipped(result, index + 1)
            self.progress.step += 1
            self.progress.tokens += result.tokens if result.finite else 0
            record = self._record(result, rate, watch.lap(), recorder)
            self.collectives = recorder.table()
            step, done = self.progress.step, self.progress.step == self.total_steps
            saving = config.save_steps and step % config.save_steps == 0 or result.stop and not done
            self._check_replicas(always=done or bool(saving))
            if self.prepared.manifest.eval_rows and (done or config.eval_steps and step % config.eval_steps == 0):
                record["eval_loss"] = self._evaluate()
                if not math.isfinite(record["eval_loss"]):
                    raise self._diverged(step, f"held-out loss {record['eval_loss']}")
            log.step(record)
            if saving:
                folder = self._save()
                if result.stop and not done:
                    self.saver.finish()
                    log.say(f"stopped after step {step}; saved {folder}")
                    return False
            watch.lap()
        return True

    def _count_skipped(self, result: StepResult, step: int) -> None:
        """Count a step that changed no weight because a number was not finite, or end the run."""
        progress = self.progress
        progress.in_a_row = 0 if result.finite else progress.in_a_row + 1
        if result.finite:
            return
        progress.skipped += 1
        if self.config.nonfinite_step == "stop" or progress.in_a_row == SKIPPED_IN_A_ROW:
            found = f"loss {result.loss}, gradient norm {result.grad_norm}; the weights were not updated"
            found += f" in {progress.in_a_row} steps in a row" if progress.in_a_row > 1 else ""
            raise self._diverged(step, found)

    def _record(self, result: StepResult, rate: float, seconds: float, recorder: Recorder) -> dict[str, Any]:
        """The line of metrics.jsonl. Memory is a maximum over ranks, taken on logging steps only."""
        step, seen = self.progress.step, self.loader.samples_before(self.progress.step)
        if step % self.config.logging_steps == 0 or self._memory is None:
            own = torch.tensor(float(devices.peak_memory_bytes(self.mesh.device)), device=self.mesh.device)
            self._memory = largest(own, self.mesh.group(AXES)).item() / 2**30
        return {
            "step": step,
            "loss": result.loss if result.finite else None,
            "grad_norm": result.grad_norm if result.finite else None,
            "skipped_steps": self.progress.skipped,
            "learning_rate": rate,
            "epoch": round(seen / self.loader.samples_per_epoch, 6),
            "tokens": self.progress.tokens,
            "tokens_per_second": result.tokens / seconds,
            "step_seconds": seconds,
            "memory_gib": self._memory,
            "communicated_bytes": recorder.bytes_by_axis(),
        }

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The mean loss over the held-out rows."""
        batches = self._loader("eval", shuffle=False).eval_batches()
        total, valid = torch.zeros(2, dtype=torch.float64, device=self.mesh.device), 0
        for batch in batches:
            total[0] += self.model(batch.to(self.mesh.device), 1.0)
            valid += batch.valid
        total[1] = valid
        for place, cut in enumerate(((*DATA_AXES, *HIDDEN.tokens), DATA_AXES)):
            if not first_copy(self.mesh, cut):
                total[place] = 0
        loss, count = all_reduce(total, self.mesh.group(AXES)).tolist()
        return loss / max(1, count)

    def _save(self) -> Path:
        """Save a checkpoint, in the background if `save_async`; the path that it will have."""
        self._check_weights()
        progress, source = self.progress, self._source()
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "samples": self.loader.samples_before(progress.step),
            "seed": self.config.seed,
            "skipped": progress.skipped,
            "course": self._course(),
            "config": self.config.model_dump(mode="json"),
            "source": source | {key: str(source[key].resolve()) for key in ("folder", "tokenizer") if source[key]},
        }
        return self.saver.save(self.model, self.optimizer, state)

    def _source(self) -> dict[str, Any]:
        """What goes beside the weights: the folders of config.json and tokenizer (or None), config.json's changes."""
        manifest = self.prepared.manifest
        # a config.json without weights says nothing of the tokenizer that was trained here
        marks = {"bos_token_id": manifest.eos_token_id, "eos_token_id": manifest.eos_token_id}
        return {
            "folder": self.resolved.folder,
            "tokenizer": self.prepared.tokenizer_folder,
            "config_changes": marks if manifest.tokenizer == TRAINED else {},
        }

    def _finish(self, log: Log) -> None:
        self._check_weights()
        self.saver.wait()  # a save that is in flight, or about to fail, holds disk space that the model may need
        source = self._source()
        export(
            self.model,
            self.output,
            source["folder"],
            tokenizer=source["tokenizer"],
            config_changes=source["config_changes"],
        )
        self._summarise()
        if self.mesh.world > 1:
            dist.barrier()  # no rank leaves before the folder is whole
        log.say(f"model written to {self.output}")
        self.saver.finish()

    def _summarise(self) -> None:
        """Write summary.json: what each rank held, and the collectives of a step."""
        own = [parameter_elements(self.model), devices.peak_memory_bytes(self.mesh.device)]
        held = all_gather(torch.tensor([own], device=self.mesh.device), 0, self.mesh.group(AXES)).tolist()
        summary = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "ranks": [{"parameters": count, "peak_memory_bytes": peak} for count, peak in held],
            "collectives": self.collectives,
        }
        if self.first:
            (self.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def _check_replicas(self, always: bool) -> None:
        """Now and then, and before weights are saved or handed out: raise RunFailed when copies of them differ."""
        every, step = self.config.check_replicas_steps, self.progress.step
        if every is None or self.mesh.world == 1 or step % every and not always:
            return
        if lines := drifted(self.model, self.mesh):
            more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise RunFailed(
                f"step {step}: copies of the same weights differ\n  " + "\n  ".join(lines[:5]) + more + "\n"
                f"  a rank missed an update or its memory is faulty; last good checkpoint: {self._last_checkpoint()}"
            )

    def _last_checkpoint(self) -> str:
        self.saver.wait()
        return str(checkpoint_folder.latest(self.output) or "none was saved (save_steps)")

    @torch.no_grad()
    def _check_weights(self) -> None:
        """No weights that are not finite are saved or handed out; a finite step may still have made them so."""
        spoilt = sum((~torch.isfinite(to_local(p))).any().double() for p in self.model.parameters())
        spoilt = torch.as_tensor(spoilt, dtype=torch.float64, device=self.mesh.device)
        if all_reduce(spoilt, self.mesh.group(AXES)).item():
            raise self._diverged(self.progress.step, "the update made weights that are not finite; they were not saved")

    def _set_aside(self) -> None:
        """Checkpoints that this run does not continue (it began anew, or further back) get another name."""
        resume = self.resolved.resume
        continued = resume is not None and resume.resolve().parent == self.output.resolve()
        for path in checkpoint_folder.set_aside(self.output, self.progress.step if continued else 0):
            print(f"a checkpoint that this run does not continue is now {path}", flush=True)

    def _diverged(self, step: int, found: str) -> RunFailed:
        """The run's end at a loss or gradient that is not finite, with what usually causes it."""
        config = self.config
        return RunFailed(
            f"step {step}: {found}\n"
            f"  likely causes: a learning rate too high (learning_rate: {config.learning_rate}), too short a warm-up "
            f"({self.warmup} steps), no clipping (max_grad_norm: {config.max_grad_norm}), or precision "
            f"(bf16: {config.bf16}, computing in {devices.dtype_name(self.model.parallel.compute)})\n"
            f"  last good checkpoint: {self._last_checkpoint()}"
        )

    def _write_config(self) -> None:
        from tessera.config.load import dump_config

        self.output.mkdir(parents=True, exist_ok=True)
        parallel = self.model.parallel
        held = {
            "bf16": parallel.compute is torch.bfloat16,
            "warmup_steps": self.warmup,
            "tensor_parallel_schedule": parallel.schedule.name,
            "tensor_parallel_slices": parallel.schedule.slices,
        }
        resolved = self.config.model_copy(update=held)
        (self.output / "resolved_config.yaml").write_text(dump_config(resolved))

    def _say_start(self, log: Log) -> None:
        parallel = self.model.parallel
        parameters = sum(p.numel() for p in self.model.parameters())
        held = f"{self.resolved.model.family}, {parameters:,} parameters"
        said = f"{held}, schedule {parallel.schedule}, computing in {devices.dtype_name(parallel.compute)}"
        for line in (*self.tuned, said, *mesh_lines(self.config, self.resolved.model, parallel)):
            log.say(line)
        begun = f"from {self.resolved.resume}" if self.resolved.resume else "from the start"
        log.say(
            f"{self.total_steps} steps of {self.loader.samples_per_step} rows, {begun}; "
            f"{self.warmup} steps of warm-up, {self.config.lr_scheduler}"
        )
