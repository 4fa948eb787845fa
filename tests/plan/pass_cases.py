"""Runs on every rank of a pool: when attention's passes issue and compute, and what keys and values a rank holds."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any
from unittest import mock

from torch import Tensor

from distributed.model_cases import build
from plan.context_cases import LENGTH, MODELS, Case, batches_of
from support.mesh import shared_mesh
from tessera.core.collectives import Recorder
from tessera.core.live_memory import PeakMemory
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.nn.context import consume
from tessera.nn.context.exchange import Exchange
from tessera.nn.context.ring import Ring


def step_of(case: Case) -> Step:
    model = build(MODELS[case.model], shared_mesh(case.sizes), **case.settings())
    return Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0))


@contextmanager
def noted(events: list[tuple[str, Any]], waits: bool) -> Iterator[None]:
    """Notes tiles as they are computed, and where the next keys and values are asked for; `waits`: for all at once."""

    def tile(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            events.append(("tiles", None))
            return kernel(*arguments, **options)

        return run

    def start(kind: type, name: str) -> Any:
        original = getattr(kind, name)

        def run(*arguments: Any) -> Any:
            events.append(("begin", None))
            arriving = original(*arguments)
            events.append(("end", None))
            if waits:
                getattr(arriving, "wait", arriving)()
            return arriving

        return mock.patch.object(kind, name, run)

    with ExitStack() as stack:
        for name in ("tile_forward", "tile_backward"):
            stack.enter_context(mock.patch.object(consume, name, tile(getattr(consume, name))))
        stack.enter_context(start(Ring, "_pass_on"))
        stack.enter_context(start(Exchange, "_start"))
        yield


def order(case: Case, waits: bool = False) -> list[list[str]]:
    """Of each pass over keys and values: `next`, they are asked for; `there`, they are waited for; `tiles`."""
    step, passes, next_ones, asking = step_of(case), [], set(), False
    with Recorder() as recorder, noted(recorder.events, waits):
        step.gradients(batches_of(case), 0)
    happened: list[str] = []
    for what, record in recorder.events:
        if what in ("begin", "end"):
            asking = what == "begin"
        elif what == "tiles":
            happened.append("tiles")
        elif record.kind in ("receive", "all_to_all") and asking and what == "issue":
            next_ones.add(id(record))
            happened.append("next")
        elif what == "wait" and id(record) in next_ones:
            happened.append("there")
    collapsed = [name for name, _ in groupby(happened)]
    for place, name in enumerate(collapsed):  # a pass begins with keys on their way while none arrive
        if name == "next" and (not place or collapsed[place - 1] == "tiles"):
            passes.append([])
        passes[-1].append(name)
    return passes


class KeysAndValues(PeakMemory):
    """Counts tensors [T, 2, kv heads, D] alone: keys with values, or their gradients."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.like = (2, heads, head_dim)

    def _count(self, tensor: Tensor) -> None:
        if tensor.dim() == 4 and tensor.shape[1:] == self.like:
            super()._count(tensor)


def held(case: Case) -> tuple[float, float]:
    """The most keys and values held at once in the forward, and with their gradients in the backward: parts of all."""
    config, step = MODELS[case.model], step_of(case)
    forward = []
    with KeysAndValues(config.num_kv_heads, config.head_dim) as memory:
        step.model.register_forward_hook(lambda *_: forward.append(memory.peak))
        step.gradients(batches_of(case), 0)
    whole = case.rows * LENGTH * 2 * config.num_kv_heads * config.head_dim * case.compute.itemsize
    return forward[0] / whole, memory.peak / whole
