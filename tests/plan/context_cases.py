"""Runs on every rank of a pool: what a step hands over where ranks share sequences, and the closed form of it."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distributed.model_cases import GPT2, LLAMA, build
from support.mesh import shared_mesh
from tessera.core.axes import DATA_AXES
from tessera.core.collectives import Recorder
from tessera.core.collectives import totals as counted
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.context import Context
from tessera.layout.parallel import Parallel
from tessera.layout.shape import Savers, StepShape
from tessera.layout.streams import HIDDEN, Layout, residual_layout
from tessera.models.config import LayerKind
from tessera.plan.traffic import step_transfers, totals

LENGTH = 48
MODELS = {
    "llama": LLAMA,
    "windows": replace(LLAMA, num_layers=3, layer_kinds=(LayerKind(5), LayerKind(), LayerKind(17))),
    "kv 6:3": replace(LLAMA, num_heads=6, num_kv_heads=3, qk_norm=True),
    "gpt2": replace(GPT2, attention_dropout=0.0),
    "one layer": replace(LLAMA, num_layers=1),
}
FSDP = {"fsdp": ("shard", "ring", "ulysses", "row"), "weights_over": ()}


@dataclass(frozen=True)
class Case:
    """A model on a mesh with sequence axes or `joined` rows; `rows` of a data rank, packed by `seed`."""

    model: str
    sizes: dict[str, int]
    transport: str = "exchange"
    rows: int = 2
    seed: int | None = 0
    joined: bool = False
    attention: Layout = HIDDEN
    recompute: bool = False
    chunks: int = 1
    savers: Savers = Savers()
    micro_batches: int = 1
    compute: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Options of `model_cases.build`."""
        shared = FSDP if {"shard", "ring", "ulysses"} & set(self.sizes) else {}
        context = Context(self.transport, self.chunks, self.joined)
        dtype = torch.float32 if self.compute == torch.bfloat16 else self.compute
        return (
            shared
            | {"context": context, "attention": self.attention, "dtype": dtype, "compute": self.compute}
            | self.options
        )

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}{size}" for axis, size in self.sizes.items())
        words = [self.model, sizes, self.transport, f"{self.rows} rows", f"documents {self.seed}"]
        words += ["joined"] if self.joined else []
        words += ["recompute"] if self.recompute else []
        words += [f"in {self.chunks} groups"] if self.chunks > 1 else []
        words += [str(self.savers)] if self.savers != Savers() else []
        words += [str(self.compute)] if self.compute != torch.float64 else []
        return " ".join(words)


def packed(rows: int, length: int, seed: int | None, first: int = 0) -> MicroBatch:
    """Rows of documents of random lengths, many of them short; `seed` None: each row is one document."""
    draw = torch.Generator().manual_seed(first)
    ids = torch.randint(0, 509, (rows, length), generator=draw)
    if seed is None:
        return MicroBatch(ids, ids.roll(-1, 1), ids.numel())
    dice, documents, positions = random.Random(seed * 1000 + first), [], []
    for row in range(rows):
        lengths: list[int] = []
        while sum(lengths) < length:
            lengths.append(min(length - sum(lengths), dice.choice([1, 2, 3, 7, 19, length])))
        documents.append(torch.cat([torch.full((n,), 100 * row + place) for place, n in enumerate(lengths)]))
        positions.append(torch.cat([torch.arange(n) for n in lengths]))
    return MicroBatch(ids, ids.roll(-1, 1), ids.numel(), 0, torch.stack(positions), torch.stack(documents))


def batches_of(case: Case, data_rank: int = 0) -> list[MicroBatch]:
    """The micro-batches of a step on a data rank."""
    return [packed(case.rows, LENGTH, case.seed, 10 * data_rank + n) for n in range(case.micro_batches)]


def shape_of(case: Case, data_rank: int = 0) -> StepShape:
    documents = tuple(batch.document_starts for batch in batches_of(case, data_rank))
    return StepShape(case.rows, LENGTH, case.micro_batches, case.recompute, documents=documents, savers=case.savers)


def parallel_of(case: Case, mesh: Mesh) -> Parallel:
    return Parallel(mesh, residual_layout(True), **case.settings())


def traffic(case: Case) -> tuple[Any, Any]:
    """(axis, kind) → calls and bytes received, counted in one step and by formula."""
    mesh, config = shared_mesh(case.sizes), MODELS[case.model]
    model = build(config, mesh, gradient_checkpointing=case.recompute, savers=case.savers, **case.settings())
    step = Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0), max_grad_norm=1.0)
    data_rank = mesh.index(DATA_AXES)
    with Recorder() as recorder:
        step(batches_of(case, data_rank), 0, 1e-3)
    return counted(recorder.records), totals(step_transfers(config, shape_of(case, data_rank), model.parallel))


def traffic_of(cases: list[Case]) -> list[tuple[Any, Any]]:
    return [traffic(case) for case in cases]
