"""What a run leaves in words and numbers: first lines, a record of each step, resolved_config.yaml, summary.json."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tessera.checkpoint.state import Best
from tessera.config.load import dump_config
from tessera.core import device as devices
from tessera.core.axes import AXES, DATA_AXES
from tessera.core.collectives import Recorder, all_gather, largest
from tessera.core.errors import cut_short
from tessera.core.text import counted
from tessera.data.batch import MicroBatch
from tessera.data.stream_loader import StreamLoader
from tessera.engine.step import StepResult
from tessera.nn.parameter import parameter_elements
from tessera.plan.flops import step_flops
from tessera.train.announce import mesh_lines
from tessera.train.build import Built
from tessera.train.card import is_ours, model_card
from tessera.train.events import perplexity
from tessera.train.kernel import attention_line
from tessera.train.notes import CARD, PLOT, RESOLVED, SUMMARY, Notes
from tessera.train.plots import plot_loss, read_metrics
from tessera.train.saved import saver_lines

LESS = "the traffic given below is that of training all"


class Records:
    """The records of one run; every rank makes them, the first one has `notes` and writes."""

    def __init__(self, built: Built, notes: Notes | None) -> None:
        self.built, self.notes = built, notes
        self._memory: float | None = None
        given, device = built.run.config.device_peak_tflops, built.mesh.device
        self._peak = given * 1e12 if given else devices.peak_flops(device, built.model.parallel.compute)
        self._collectives: list[dict[str, Any]] = []
        self.beside: dict[str, Any] = {}
        """What was predicted and what was measured, on the first rank of a run that was predicted."""
        self.handed_out: Best | None = None
        """The evaluation of the checkpoint whose model is handed out; None: that of the last step is."""

    def first_lines(self) -> list[str]:
        """What the run says of itself before its first step."""
        run, parallel, loader = self.built.run, self.built.model.parallel, self.built.loader
        parameters = sum(p.numel() for p in self.built.model.parameters())
        trained = sum(p.numel() for p in self.built.model.parameters() if p.requires_grad)
        computing = devices.dtype_name(parallel.compute)
        begun = f"from {run.resume}" if run.resume else "from the start"
        model = f"model: {run.model.family}, {parameters:,} parameters"
        lines = [
            *self.built.said,
            f"{model}, schedule {parallel.schedule}, computing in {computing}",
            *([f"{trained:,} of them are trained (unfrozen_parameters); {LESS}"] if trained < parameters else []),
            attention_line(run.model, parallel, run.config.sequence_len, packed=run.config.sample_packing),
            *mesh_lines(run.config, run.model, parallel),
            *saver_lines(run.config, run.model, parallel),
            *self._packing(),
            *self._positions(),
            f"run: {counted(self.built.total_steps, 'step')} of {counted(loader.samples_per_step, 'row')}, {begun}; "
            f"{counted(self.built.warmup, 'step')} of warm-up, {run.config.lr_scheduler}",
        ]
        if self._peak is None:
            device = devices.describe(parallel.mesh.device)
            lines.append(f"no MFU: the peak of {device} in {computing} is not known (device_peak_tflops gives it)")
        return lines

    def _positions(self) -> list[str]:
        """That rows are longer than the base model was made for; axolotl raises its positions too."""
        run = self.built.run
        if not run.longer_than_known:
            return []
        length, known = run.config.sequence_len, run.model.max_positions
        return [
            f"warning: sequence_len {length} is more than the {known} positions that base_model was made for "
            f"(max_position_embeddings); the final model's config.json will say {length}"
        ]

    def _packing(self) -> list[str]:
        """How full the rows of packed samples are, of the first epoch."""
        loader, manifest = self.built.loader, self.built.prepared.manifest
        if isinstance(loader, StreamLoader) or not loader.packed:
            return []
        rows, length = loader.samples_per_epoch, self.built.run.config.sequence_len
        full = manifest.train_tokens / (rows * length)
        return [f"packing: {manifest.train_rows:,} samples in {rows:,} rows of {length}, {full:.1%} full"]

    def step(
        self, result: StepResult, rate: float, seconds: float, recorder: Recorder, batches: Sequence[MicroBatch]
    ) -> dict[str, Any]:
        """The line of metrics.jsonl. Memory is a maximum over ranks, taken on logging steps only.

        `batches` are those of this rank; of every data rank they have the same shapes.
        """
        mesh, loader, progress = self.built.mesh, self.built.loader, self.built.progress
        self._collectives = recorder.table()
        if progress.step % self.built.run.config.logging_steps == 0 or self._memory is None:
            own = torch.tensor(float(devices.peak_memory_bytes(mesh.device)), device=mesh.device)
            self._memory = largest(own, mesh.group(AXES)).item() / 2**30
        return {
            "step": progress.step,
            "loss": result.loss if result.finite else None,
            "grad_norm": result.grad_norm if result.finite else None,
            "skipped_steps": progress.skipped,
            "learning_rate": rate,
            "epoch": round(loader.epoch(progress.step), 6),
            "tokens": progress.tokens,
            "tokens_per_second": result.tokens / seconds,
            "step_seconds": seconds,
            "mfu": self._mfu(batches, seconds),
            "memory_gib": self._memory,
            "communicated_bytes": recorder.bytes_by_axis(),
        }

    def _mfu(self, batches: Sequence[MicroBatch], seconds: float) -> float | None:
        """The share of all devices' peak that the model's arithmetic is (plan/flops.py); padding counts as tokens.

        Other data ranks are taken to have documents as long as this one's.
        """
        if self._peak is None:
            return None
        mesh, lengths = self.built.mesh, [length for batch in batches for length in batch.document_lengths]
        done = step_flops(self.built.run.model, lengths) * mesh.size(DATA_AXES)
        return done / (seconds * self._peak * mesh.world)

    def write_config(self) -> None:
        """Write resolved_config.yaml: every key as it came to hold."""
        if self.notes is None:
            return
        parallel = self.built.model.parallel
        held = {
            "save_dtype": self.built.run.save_dtype,
            "bf16": "full" if parallel.dtype is torch.bfloat16 else parallel.compute is torch.bfloat16,
            "warmup_steps": self.built.warmup,
            "tensor_parallel_schedule": parallel.schedule.name,
            "tensor_parallel_slices": parallel.schedule.slices,
        }
        resolved = self.built.run.config.model_copy(update=held)
        self.notes.write(RESOLVED, dump_config(resolved))

    def write_summary(self) -> None:
        """Write summary.json: what ranks held, the collectives of a step, what was predicted. Every rank calls it."""
        model, mesh = self.built.model, self.built.mesh
        own = [parameter_elements(model), devices.peak_memory_bytes(mesh.device)]
        held = all_gather(torch.tensor([own], device=mesh.device), 0, mesh.group(AXES)).tolist()
        summary = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "ranks": [{"parameters": count, "peak_memory_bytes": peak} for count, peak in held],
            "collectives": self._collectives,
            **self.beside,
        }
        if self.notes is not None:
            self.notes.write(SUMMARY, json.dumps(summary, indent=1) + "\n")

    def write_rest(self, dtype: str | None) -> None:
        """What lies beside a model that was handed out in `dtype` (None: was not). Every rank calls it."""
        self.write_summary()
        plotted = self.write_plot()
        if dtype is None or self.notes is None:
            return
        file = self.notes.folder / CARD
        if is_ours(file):
            self._write_made(CARD, lambda: model_card(self.built, dtype, self._last(), plotted))
        else:
            self.notes.say(f"{file} is there already and not from a run: it stays, no model card is written")

    def write_plot(self) -> bool:
        """Write loss.png of all steps so far, on the first rank; whether it was made."""
        return self.notes is not None and self._write_made(PLOT, lambda: plot_loss(self._records()))

    def _write_made(self, name: str, make: Callable[[], str | bytes]) -> bool:
        """Write what `make` gives. What it raises is told and does no harm: the file is worth less than the run."""
        assert self.notes is not None
        try:
            content = make()
        except Exception as error:  # of a drawing library, or of metrics.jsonl that others have changed
            self.notes.say(f"{name} was not made: {cut_short(error, 300)}")
            return False
        self.notes.write(name, content)
        return True

    def _records(self) -> list[dict[str, Any]]:
        assert self.notes is not None
        return read_metrics(self.notes.folder)

    def _last(self) -> dict[str, Any]:
        """The last loss, eval_loss and eval_ppl of the run; or of an earlier step's model its own, with `best_step`."""
        last = {key: value for record in self._records() for key, value in record.items() if value is not None}
        if (best := self.handed_out) is None:
            return last
        own = {"eval_loss": best.eval_loss, "eval_ppl": perplexity(best.eval_loss), "best_step": best.step}
        return last | own | {"loss": None}
