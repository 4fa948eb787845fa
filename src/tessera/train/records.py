"""What a run leaves in words and numbers: first lines, a record of each step, resolved_config.yaml, summary.json."""

import json
from typing import Any

import torch

from tessera.config.load import dump_config
from tessera.core import device as devices
from tessera.core.axes import AXES
from tessera.core.collectives import Recorder, all_gather, largest
from tessera.engine.step import StepResult
from tessera.nn.parameter import parameter_elements
from tessera.train.announce import mesh_lines
from tessera.train.build import Built
from tessera.train.kernel import attention_line
from tessera.train.notes import RESOLVED, SUMMARY, Notes

LESS = "the traffic given below is that of training all"


class Records:
    """The records of one run; every rank makes them, the first one has `notes` and writes."""

    def __init__(self, built: Built, notes: Notes | None) -> None:
        self.built, self.notes = built, notes
        self._memory: float | None = None
        self._collectives: list[dict[str, Any]] = []

    def first_lines(self) -> list[str]:
        """What the run says of itself before its first step."""
        run, parallel, loader = self.built.run, self.built.model.parallel, self.built.loader
        parameters = sum(p.numel() for p in self.built.model.parameters())
        trained = sum(p.numel() for p in self.built.model.parameters() if p.requires_grad)
        computing = devices.dtype_name(parallel.compute)
        begun = f"from {run.resume}" if run.resume else "from the start"
        return [
            *self.built.said,
            f"{run.model.family}, {parameters:,} parameters, schedule {parallel.schedule}, computing in {computing}",
            *([f"{trained:,} of them are trained (unfrozen_parameters); {LESS}"] if trained < parameters else []),
            attention_line(run.model, parallel, run.config.sequence_len, packed=run.config.sample_packing),
            *mesh_lines(run.config, run.model, parallel),
            *self._packing(),
            f"{self.built.total_steps} steps of {loader.samples_per_step} rows, {begun}; "
            f"{self.built.warmup} steps of warm-up, {run.config.lr_scheduler}",
        ]

    def _packing(self) -> list[str]:
        """How full the rows of packed samples are, of the first epoch."""
        loader, manifest = self.built.loader, self.built.prepared.manifest
        if not loader.packed:
            return []
        rows, length = loader.samples_per_epoch, self.built.run.config.sequence_len
        full = manifest.train_tokens / (rows * length)
        return [f"packing: {manifest.train_rows:,} samples in {rows:,} rows of {length}, {full:.1%} full"]

    def step(self, result: StepResult, rate: float, seconds: float, recorder: Recorder) -> dict[str, Any]:
        """The line of metrics.jsonl. Memory is a maximum over ranks, taken on logging steps only."""
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
            "memory_gib": self._memory,
            "communicated_bytes": recorder.bytes_by_axis(),
        }

    def write_config(self) -> None:
        """Write resolved_config.yaml: every key as it came to hold."""
        if self.notes is None:
            return
        parallel = self.built.model.parallel
        held = {
            "bf16": "full" if parallel.dtype is torch.bfloat16 else parallel.compute is torch.bfloat16,
            "warmup_steps": self.built.warmup,
            "tensor_parallel_schedule": parallel.schedule.name,
            "tensor_parallel_slices": parallel.schedule.slices,
        }
        resolved = self.built.run.config.model_copy(update=held)
        self.notes.write(RESOLVED, dump_config(resolved))

    def write_summary(self) -> None:
        """Write summary.json: what each rank held, and the collectives of a step. Every rank calls it."""
        model, mesh = self.built.model, self.built.mesh
        own = [parameter_elements(model), devices.peak_memory_bytes(mesh.device)]
        held = all_gather(torch.tensor([own], device=mesh.device), 0, mesh.group(AXES)).tolist()
        summary = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "ranks": [{"parameters": count, "peak_memory_bytes": peak} for count, peak in held],
            "collectives": self._collectives,
        }
        if self.notes is not None:
            self.notes.write(SUMMARY, json.dumps(summary, indent=1) + "\n")
