"""Runs on every rank of a pool: when a step issues its collectives and waits for them, and what that changes."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.model_cases import LLAMA, batches, build
from support.mesh import shared_mesh
from tessera.core.collectives import Recorder
from tessera.data.batch import MicroBatch
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.nn.parameter import to_local
from tessera.nn.tokens import Tokens
from tessera.product.gathered import distributed_product
from tessera.product.overlap import BACKWARD, FORWARD, Pass
from tessera.product.roles import Roles
from tessera.sizes.schedule import Schedule

# every product's weights have a size of their own, by which a record names them
CONFIG = replace(LLAMA, vocab_size=61, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=24)
WEIGHTS = {"qkv": 64 * 32, "out": 32 * 32, "gate·up": 48 * 32, "down": 24 * 32}


def made(sizes: dict[str, int], schedule: Schedule, **options: Any) -> Step:
    model = build(CONFIG, shared_mesh(sizes), schedule=schedule, **options)
    return Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-6, 0.1), max_grad_norm=0.5)


def gradients(step: Step) -> dict[str, torch.Tensor]:
    return {n: to_local(p.grad).clone() for n, p in step.model.named_parameters() if p.grad is not None}


def order(schedule: Schedule, micro_batches: int, options: dict[str, Any]) -> dict[str, list[str]]:
    """What happens along `row` in one step: to the weights of the layers' products, and to their gradients."""
    step = made({"row": 2}, schedule, **options)
    with Recorder() as recorder:
        step.gradients(batches(CONFIG, micro_batches, size=2, length=4), 0)
    names = {elements * 8 // schedule.slices: name for name, elements in WEIGHTS.items()}
    happened: dict[str, list[str]] = {"all_gather": [], "reduce_scatter": []}
    for what, record in recorder.events:
        if record.kind in happened and record.bytes in names:
            happened[record.kind].append(f"{what} {names[record.bytes]}")
    return happened


# ---------------------------------------------------------------------------------------------- nothing else changes


def runs(schedule: Schedule, sizes: dict[str, int], options: dict[str, Any]) -> tuple[dict[str, Any], Counter]:
    """The numbers of two steps of two micro-batches on this rank, and how often each collective ran."""
    step = made(sizes, schedule, **options)
    with Recorder() as recorder:
        results = [step(batches(CONFIG, 2, seed=index), index, 1e-2) for index in range(2)]
    numbers: dict[str, Any] = {f"{i}": torch.tensor([r.loss, r.grad_norm]) for i, r in enumerate(results)}
    numbers |= gradients(step) | {f"new {n}": to_local(p) for n, p in step.model.named_parameters()}
    return numbers, Counter((r.kind, r.axis, r.bytes) for r in recorder.records)


def changes(schedule: Schedule, other: Schedule, sizes: dict[str, int], options: dict[str, Any]) -> tuple[bool, dict]:
    """Whether both give the same bits; by how much the calls of the second exceed those of the first."""
    (one, calls), (two, others) = (runs(s, sizes, options) for s in (schedule, other))
    same = one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    difference = {key: others[key] - calls[key] for key in calls | others if others[key] != calls[key]}
    return same, difference


# ---------------------------------------------------------------------------------------------- what may come between


class Stop(Exception):
    """Raised in the middle of a step, on every rank alike."""


def stop(*ignored: Any) -> None:
    raise Stop


def evaluate(step: Step, batch: MicroBatch) -> None:
    with torch.no_grad():
        step.model(batch, 1.0)


def forward_alone(step: Step, batch: MicroBatch) -> None:
    step.model(batch, 1.0)


def broken_forward(step: Step, batch: MicroBatch) -> None:
    handle = step.model.layers["1"].mlp.register_forward_pre_hook(stop)
    _must_stop(lambda: forward_alone(step, batch))
    handle.remove()


def broken_backward(step: Step, batch: MicroBatch) -> None:
    def stop_its_gradient(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(stop)

    handle = step.model.layers["0"].register_forward_hook(stop_its_gradient)
    _must_stop(lambda: step.model(batch, 1.0).backward())
    handle.remove()
    step.model.zero_grad()


def both_forwards_first(step: Step, batch: MicroBatch) -> None:
    """Two losses of which the gradients are taken together."""
    step.model.zero_grad()  # sums of three depend on their order
    losses = [step.model(b, 1.0) for b in (batch, *batches(CONFIG, 1, seed=9))]
    sum(losses).backward()


def _must_stop(act: Any) -> None:
    try:
        act()
    except Stop:
        return
    raise AssertionError("nothing stopped")


BETWEEN = {
    "evaluation": evaluate,
    "a forward alone": forward_alone,
    "a forward that fails": broken_forward,
    "a backward that fails": broken_backward,
    "two forwards before a backward": both_forwards_first,
}


def interrupted(between: str, checkpointing: bool) -> list[bool]:
    """Whether numbers have the same bits with weights early and gradients late, step by step.

    After a step; after what comes `between`; after a step with a larger batch; and after one as the first.
    """
    steps = [
        made({"row": 2}, schedule, gradient_checkpointing=checkpointing)
        for schedule in (Schedule(), Schedule(prefetch=True, defer=True))
    ]
    same = []

    def compare() -> None:
        one, two = (gradients(step) for step in steps)
        same.append(one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one))

    for step in steps:
        step(batches(CONFIG, 2, seed=0), 0, 1e-2)
    compare()
    (batch,) = batches(CONFIG, 1, seed=5)
    for step in steps:
        BETWEEN[between](step, batch)
    compare()
    for index, size in ((1, 8), (2, 4)):
        for step in steps:
            step(batches(CONFIG, 3, seed=index, size=size), index, 1e-2)
        compare()
    return same


# ---------------------------------------------------------------------------------------------- passes in any order

IN_ORDER = ["F0", "B0", "F1", "B1", "F2", "B2"]


def run_passes(step: Step, actions: list[str], announced: list[Pass | None], seed: int) -> None:
    """Gradients of three micro-batches, their forwards (F0) and backwards (B0) begun as a pipeline begins them."""
    model, losses = step.model, {}
    model.zero_grad()
    every = batches(CONFIG, 3, seed, size=2, length=4)
    for action, then in zip(actions, announced, strict=True):
        kind, place = action[0], int(action[1])
        model.parallel.overlap.begin(PASSES[kind], then)
        if kind == "F":
            tokens = Tokens.of(every[place], model.parallel.streams, model.parallel.mesh)
            losses[place] = model.loss(model.run_layers(model.embed(tokens), tokens), tokens, 1.0)
        else:
            losses.pop(place).backward()


PASSES = {"F": FORWARD, "B": BACKWARD}


def mixed(actions: list[str], announced: list[Pass | None], checkpointing: bool) -> list[tuple[bool, int, list[str]]]:
    """For three steps of passes, mixed, moved early and late: whether the numbers are those of passes in order and
    moved at once, how many gathers more there were, and what happened to the weights along `row`."""
    schedules = Schedule(), Schedule(prefetch=True, defer=True)
    plain, early = (made({"row": 2}, schedule, gradient_checkpointing=checkpointing) for schedule in schedules)
    names, found = {elements * 8: name for name, elements in WEIGHTS.items()}, []
    for seed in range(3):
        with Recorder() as expected:
            run_passes(plain, IN_ORDER, [None] * 6, seed)
        with Recorder() as recorder:
            run_passes(early, actions, announced, seed)
        one, two = gradients(plain), gradients(early)
        same = one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
        gathers, others = (sum(r.kind == "all_gather" for r in of.records) for of in (recorder, expected))
        events = [
            f"{what} {names[record.bytes]}"
            for what, record in recorder.events
            if record.kind == "all_gather" and record.bytes in names
        ]
        found.append((same, gathers - others, events))
    return found


# ---------------------------------------------------------------------------------------------- one product


def backward_order(schedule: Schedule) -> list[str]:
    """What the backward of a product cut over N does, in order: collectives issued and awaited, and products."""
    roles = Roles(outputs=shared_mesh({"col": 2}).group(["col"]))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (y,) = distributed_product(x, [w], [None], roles, schedule)
    with Recorder() as recorder, Products(recorder, {8: "dX", 3: "dW"}):
        y.backward(torch.ones_like(y))
    return [f"{what} {r if isinstance(r, str) else r.kind}" for what, r in recorder.events]


class Products(TorchDispatchMode):
    """Puts each matrix product among the recorder's events, by the rows of its result."""

    def __init__(self, recorder: Recorder, names: dict[int, str]) -> None:
        super().__init__()
        self.recorder, self.names = recorder, names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.recorder.events.append(("product", self.names.get(result.shape[0], "")))
        return result
