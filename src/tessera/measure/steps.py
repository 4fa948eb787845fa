"""Small real steps of training: what the rates of a machine's parts miss of a whole one is learned from these.

A step is more than its parts: ranks wait for one that has no core, caches hold what the step before has left, kernels
are fast at some shapes. So forward, backward and update of small decoders are timed in the layouts that a user has, and
the profile is brought to them (plan/calibrate.py).
"""

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from pydantic import TypeAdapter

from tessera.core import device as devices
from tessera.core.collectives import all_reduce, largest
from tessera.core.mesh import Mesh
from tessera.core.text import table_lines
from tessera.data.batch import MicroBatch
from tessera.engine.fsdp import build_decoder
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.shape import Fsdp
from tessera.models.config import ModelConfig
from tessera.nn.rope import RopeConfig
from tessera.plan.calibrate import Run, calibrated
from tessera.plan.choice import Layout, Training
from tessera.plan.machine import Profile
from tessera.plan.time import step_time


@dataclass(frozen=True)
class SmallStep:
    """A step to time: a model, `rows` of `length` tokens on all ranks together, a layout."""

    model: ModelConfig
    training: Training
    layout: Layout

    def run(self, seconds: float, per_machine: int) -> Run:
        """What the profile is brought to, where such a step took so long."""
        parallel = self.layout.parallel(self.model, self.training)
        shape = self.layout.shape(self.training, parallel)
        return Run.of(self.model, shape, parallel, per_machine, seconds)

    def __str__(self) -> str:
        model = self.model
        rows = f"{self.training.global_batch} × {self.training.sequence_len}"
        return f"{model.num_layers} × {model.hidden_size}, {rows} tokens: {self.layout}"


@dataclass(frozen=True)
class Size:
    """Of a model and its rows."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    rows: int
    length: int
    vocabulary: int

    @property
    def model(self) -> ModelConfig:
        ffn = 2 * self.hidden + 3 * self.hidden // 4
        sizes = (self.vocabulary, self.hidden, self.layers, self.heads, self.kv_heads, self.hidden // self.heads, ffn)
        return ModelConfig("llama", *sizes, self.length, rope=RopeConfig())


ON_CPU = (
    Size(96, 3, 8, 8, 8, 128, 1024),
    Size(224, 3, 8, 4, 4, 1024, 4096),
    Size(384, 3, 8, 4, 4, 512, 4096),
    Size(640, 2, 8, 8, 4, 256, 4096),
)
# at most 12 GB on one device, nearly all of them the states of the widest model
ON_GPU = (
    Size(1024, 4, 16, 8, 8, 1024, 32_000),
    Size(2048, 4, 16, 8, 4, 2048, 32_000),
    Size(4096, 2, 32, 8, 2, 4096, 32_000),
)


WARM = 2
"""Rounds before those that count: what is made once is made in them."""


def small_steps(ranks: int, gpu: bool, models: Sequence[Size] | None = None) -> list[SmallStep]:
    """The steps that are timed with so many ranks, of `models` or the usual ones."""
    dtype = "bfloat16" if gpu else "float32"
    found = []
    for size in models or (ON_GPU if gpu else ON_CPU):
        for sizes, recompute in _meshes(ranks):
            data = sizes.get("shard", 1)
            rows = -(-size.rows // data)
            training = Training(size.length, rows * data, dtype)
            found.append(SmallStep(size.model, training, Layout(sizes, rows, 1, recompute=recompute)))
    return found


def _meshes(ranks: int) -> Iterator[tuple[Mapping[str, int], str]]:
    """Each way to cut by itself, and some pairs of them; where ranks are no power of 2, which heads divide by, data."""
    if ranks == 1:
        yield from (({}, "false"), ({}, "true"))
        return
    yield {"shard": ranks}, "false"
    if ranks & (ranks - 1) or ranks > 8:
        return
    yield from (({axis: ranks}, "false") for axis in ("col", "row", "ring"))
    if ranks > 2:
        yield {"row": 2, "col": ranks // 2}, "true"
        yield {"shard": 2, "col": ranks // 2}, "false"
        yield {"depth": 2, "col": ranks // 2}, "false"


def timed_steps(steps: Sequence[SmallStep], mesh: Mesh, rounds: int) -> list[list[float]]:
    """Seconds of each step's rounds, of which each takes as long as the slowest rank; all ranks of `mesh` call.

    On CPUs the steps of a model take turns, so that what else the machine does meets all alike; on GPUs, where memory
    is scarce and nobody else computes, each runs by itself.
    """
    gpu = mesh.device.type == "cuda"
    found: list[list[float]] = []
    alike = ([step] for step in steps) if gpu else (list(own) for _, own in groupby(steps, lambda step: step.model))
    for together in alike:
        running = [_Running(step, mesh) for step in together]
        took = [[each.once(turn) for each in running] for turn in range(WARM + rounds)][WARM:]
        found += map(list, zip(*took, strict=True))
        del running
        gc.collect()  # layers and the order of their weights refer to one another
        if gpu:
            torch.cuda.empty_cache()
    return found


def lower_quartiles(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Of each step's rounds, as of all that is measured: what else the machine does makes some slow and none fast."""
    return [sorted(times)[len(times) // 4] for times in rounds]


class _Running:
    """A step on random tokens, forward to update."""

    def __init__(self, small: SmallStep, mesh: Mesh) -> None:
        self.mesh, self.group = mesh, mesh.group(mesh.present(mesh.numbering))
        own = Mesh(small.layout.sizes, mesh.device)
        parallel = small.layout.parallel(small.model, small.training, own)
        shape = small.layout.shape(small.training, parallel)
        decoder = build_decoder(
            small.model, parallel, Fsdp(), gradient_checkpointing=shape.recompute, savers=shape.savers
        )
        decoder.to_empty(device=mesh.device)
        decoder.initialize(seed=1)
        optimizer = build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.999), 1e-8, 0.01)
        self.step = Step(decoder, optimizer, max_grad_norm=1.0)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(small.model.vocab_size, (shape.batch, shape.sequence), generator=generator)
        self.batch = MicroBatch(ids, ids, ids.numel())

    def once(self, turn: int) -> float:
        """Seconds of the slowest rank, all having begun together."""
        device = self.mesh.device
        all_reduce(torch.zeros((), device=device), self.group).item()
        begun = time.perf_counter()
        self.step([self.batch], turn, 1e-4)
        devices.synchronize(device)
        own = torch.tensor([time.perf_counter() - begun], dtype=torch.float64, device=device)
        return float(largest(own, self.group)[0])


def brought(profile: Profile, runs: Mapping[str, Run], kind: str) -> tuple[Profile, list[str]]:
    """The profile brought to steps of this `kind`, by name; and a table of what it said of them before, and says now.

    The last column is off by what the others alone correct: about so far may a step be off that was not measured.
    """
    after = calibrated(profile, list(runs.values()), profile.name)
    assert after.residuals is not None
    seconds = np.array([run.seconds for run in runs.values()])
    before = np.log(seconds / [float(step_time(run.work, profile, run.pipeline).total) for run in runs.values()])
    missed, _ = after.residuals.at(np.asarray(after.residuals.places))
    logs = (before, np.asarray(after.residuals.logs) - missed, after.residuals.left_out)
    errors = [np.exp(-each) - 1 for each in logs]
    rows = [["", "ms", "by the rates", "brought to them", "by the others"]]
    for name, took, *shares in zip(runs, seconds, *errors, strict=True):
        rows.append([name, f"{1e3 * took:,.1f}", *(f"{share:+.0%}" for share in shares)])
    rows.append(["mean error", "", *(f"{np.abs(error).mean():.0%}" for error in errors)])
    source = f"{len(runs)} {kind}, which the rates were brought to"
    return replace(after, sources={**after.sources, "residuals": source}), [kind, *table_lines(rows)]


_SECONDS = TypeAdapter(list[float])


def written_seconds(seconds: Sequence[float]) -> str:
    """As JSON, which `read_seconds` reads."""
    return json.dumps(list(seconds))


def read_seconds(text: str) -> list[float]:
    """What `written_seconds` has written."""
    return _SECONDS.validate_json(text)
