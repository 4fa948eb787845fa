"""Counts of one optimizer step: what a recorder sees on real ranks, or on one rank of a fake world, and by formula."""

from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from distributed.model_cases import GPT2, LLAMA, batch_of
from support.mesh import shared_mesh
from tessera.core.collectives import Recorder, totals
from tessera.core.live_memory import PeakMemory
from tessera.core.mesh import Mesh
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.streams import HIDDEN, HIDDEN_BY_HEADS, Layout, residual_layout
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.plan.count import fake_world, make_state
from tessera.sizes.schedule import Schedule

MODELS = {
    "llama": LLAMA,
    "llama tied, kv 8": replace(LLAMA, tied=True, num_kv_heads=8),
    "llama q/k norm": replace(LLAMA, qk_norm=True),
    "gpt2": GPT2,
    "gpt2 tied, kv 4": replace(GPT2, tied=True, head_bias=False, num_kv_heads=4),
}
BULKY = replace(GPT2, vocab_size=1023, hidden_size=512, num_layers=1, ffn_size=1536, max_positions=1024)
"""Over two ranks of col: MLP and positions above 1 MiB, attention below; of the words 1 MiB on the first rank only."""
SHAPE = StepShape(batch=8, sequence=6)
EVERYTHING = StepShape(batch=8, sequence=6, micro_batches=2, recompute=True, label_smoothing=True)


@dataclass(frozen=True)
class Case:
    """How one step runs; `sizes` of the mesh."""

    sizes: dict[str, int]
    schedule: Schedule = Schedule()
    sequence_parallel: bool = True
    attention: Layout = HIDDEN
    weights_over: tuple[str, ...] = ("row",)
    shape: StepShape = SHAPE
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = field(default=None)

    def parallel(self, mesh: Mesh) -> Parallel:
        residual = residual_layout(self.sequence_parallel, self.schedule.name)
        compute = self.compute or self.dtype
        return Parallel(mesh, residual, self.dtype, compute, self.schedule, self.attention, self.weights_over)

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}{size}" for axis, size in self.sizes.items())
        words = [sizes, str(self.schedule)]
        words += ["kept"] if self.schedule.keep else []
        words += ["early"] if self.schedule.prefetch else []
        words += [] if self.sequence_parallel else ["no-sp"]
        words += ["by heads"] if self.attention is HIDDEN_BY_HEADS else []
        words += ["weights over depth"] if "depth" in self.weights_over else []
        words += [str(self.compute)] if self.compute else []
        return " ".join(words)


def held_elements(model: ModelConfig, parallel: Parallel) -> dict[str, int]:
    """Elements that a rank holds, of matrices, and of vectors (and learned positions) along each stream's features."""
    held = Counter()
    for parameters, times in anatomy_of(model).units(parallel):
        for _, _, spec in parameters:
            along = (
                "residual"
                if spec.acts_on == parallel.residual and spec.cuts[-1] == parallel.residual.features
                else "hidden"
            )
            kind = "matrices" if len(spec.shape) > 1 and all(spec.cuts) else along
            held[kind] += times * prod(spec.stored_shape(parallel.mesh))
    return dict(held)


def run_step(model: ModelConfig, case: Case, mesh: Mesh, steps: int = 1) -> tuple[Any, Decoder]:
    """The totals of the last of `steps` optimizer steps, and the model."""
    decoder = Decoder(model, case.parallel(mesh), gradient_checkpointing=case.shape.recompute, savers=case.shape.savers)
    decoder.initialize(seed=5)
    optimizer = build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0)
    step = Step(decoder, optimizer, max_grad_norm=1.0, label_smoothing=0.1 if case.shape.label_smoothing else 0.0)
    generator = torch.Generator().manual_seed(3)
    size = (case.shape.batch, case.shape.sequence)
    batches = [batch_of(*torch.randint(0, model.vocab_size, (2, *size), generator=generator))]
    for index in range(steps):
        with Recorder() as recorder:
            step(batches * case.shape.micro_batches, index, 1e-3)
    return totals(recorder.records), decoder


def counted_on_ranks(model: ModelConfig, cases: list[Case]) -> list[Any]:
    """On a rank of a pool: the totals of each case; twice where weights come early, as their order is learnt first."""
    return [run_step(model, case, shared_mesh(case.sizes), 2 if case.schedule.prefetch else 1)[0] for case in cases]


def counted_in_fake_world(model: ModelConfig, case: Case, rank: int) -> Any:
    """The totals of `rank`, in this process; tensors have data."""
    with fake_world(case.sizes, rank) as mesh:
        return run_step(model, case, mesh)[0]


def memory_on_ranks(model: ModelConfig, case: Case) -> tuple[int, int]:
    """On a rank of a pool: bytes alive from the forward to the backward, and the peak, of any step but the first."""
    mesh, live = shared_mesh(case.sizes), []
    with PeakMemory() as memory:
        decoder = Decoder(model, case.parallel(mesh))
        decoder.initialize(seed=5)
        optimizer = build_optimizer(decoder, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0)
        step = Step(decoder, optimizer, max_grad_norm=1.0)
        make_state(decoder, optimizer)
        ids = torch.zeros(case.shape.batch, case.shape.sequence, dtype=torch.int64)
        before = memory.peak = memory.current
        decoder.register_forward_hook(lambda *_: live.append(memory.current))
        step([batch_of(ids, ids)], 0, 1e-3)
    return live[0] - before, memory.peak
