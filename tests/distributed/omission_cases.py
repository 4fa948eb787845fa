"""Runs on every rank of a pool: one step of a small model, again and again, with one collective or another left out."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from distributed.model_cases import GPT2, LLAMA, batch_of, batches, build
from support.compare import error
from support.mesh import shared_mesh
from tessera.core.collectives import Record, Recorder
from tessera.core.mesh import Mesh
from tessera.engine.step import Step
from tessera.models.decoder import Decoder
from tessera.nn.parameter import named_specs, to_local

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "ffn_size": 48}
MODELS = {
    "llama": replace(LLAMA, num_kv_heads=2, **SMALL),
    "gpt2": replace(GPT2, num_kv_heads=4, **SMALL),
}


@dataclass(frozen=True)
class Case:
    """A model on a mesh, with a micro-batch of so many sequences and options of `model_cases.build`.

    `documents` are the lengths of those that it is packed of, row after row; none: each sequence of four tokens is one.
    """

    model: str
    sizes: dict[str, int] = field(hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    batch: int = 4
    documents: tuple[int, ...] = ()


class NoUpdate(torch.optim.Optimizer):
    """Leaves the weights as they are: what they would become follows from gradients and norm."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        pass


class Repeated:
    """The same step of a model, any number of times."""

    def __init__(self, model: Decoder, case: Case) -> None:
        length = sum(case.documents) // case.batch or 4
        self.model, self.data = model, batches(model.config, 1, size=case.batch, length=length)
        if case.documents:
            names = torch.arange(len(case.documents)).repeat_interleave(torch.tensor(case.documents))
            positions = torch.cat([torch.arange(n) for n in case.documents])
            (batch,) = self.data
            targets = batch.input_ids.roll(-1, 1)
            targets[:, 1::5] = -100
            documents, positions = names.view(case.batch, -1), positions.view(case.batch, -1)
            made = batch_of(batch.input_ids, targets)
            self.data = [replace(made, documents=documents, positions=positions)]
        self.step = Step(model, NoUpdate(model.parameters()), max_grad_norm=0.5, label_smoothing=0.1)

    def run(self) -> dict[str, torch.Tensor]:
        """Loss, norm, and this rank's shard of every gradient, clipped by that norm."""
        result = self.step(self.data, 0, 1e-2)
        numbers = {
            "loss": torch.tensor(result.loss, dtype=torch.float64),
            "norm": torch.tensor(result.grad_norm, dtype=torch.float64),
        }
        return numbers | {n: to_local(p.grad) for n, p in self.model.named_parameters()}


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The worst of all, some exact gradients being zero; not a number is the worst there is."""
    each = [error(found[n], w, 0.0 if w.dim() == 0 else wanted["norm"].item()) for n, w in wanted.items()]
    return max(float("inf") if e != e else e for e in each)


def place(record: Record) -> str:
    """Where a collective is issued: its kind and axes, and the lines of the package that led to it."""
    frame, lines = sys._getframe(), []
    while frame := frame.f_back:  # type: ignore[assignment]
        code = frame.f_code
        if "/tessera/" in code.co_filename and not code.co_filename.endswith("collectives.py"):
            lines.append(f"{code.co_qualname}:{frame.f_lineno}")
    return f"{record.kind} {record.axis}: {' < '.join(lines[:6])}"


@cache
def steps_of(case: Case) -> tuple[Repeated, dict[str, torch.Tensor]]:
    """The step on this rank, and what it should give."""
    mesh, options = shared_mesh(case.sizes), dict(case.options)
    ours = build(MODELS[case.model], mesh, options.pop("sequence_parallel", True), **options)
    slices = {n: spec.stored_slices(mesh) for n, _, spec in named_specs(ours)}
    whole = Repeated(build(MODELS[case.model], Mesh(rank=0)), case).run()
    mine = {n: value[slices[n]] if n in slices else value for n, value in whole.items()}
    step = Repeated(ours, case)
    step.run()  # which learns the order in which products ask for weights
    return step, mine


def collectives(case: Case) -> tuple[float, list[tuple[str, int]]]:
    """The error of the step; every collective in it, by place and how often it has been there before."""
    step, wanted = steps_of(case)
    places: list[str] = []
    with Recorder(delay=lambda record: places.append(place(record)) or 0.0):
        error = differences(step.run(), wanted)
    return error, [(at, places[:k].count(at)) for k, at in enumerate(places)]


def omissions(case: Case, chosen: list[tuple[str, int]]) -> list[float]:
    """The error of the step without each of these collectives. Ranks that have no such one run them all."""
    (step, wanted), (_, mine) = steps_of(case), collectives(case)
    errors = []
    for which in chosen:
        with Recorder(leave_out=mine.index(which) if which in mine else -1):
            errors.append(differences(step.run(), wanted))
    return errors
