"""How fast a rank computes: matrix products by shape, operators that memory bounds, attention, the host's dispatch.

Where ranks share the cores of a machine, everything is measured once more with several of them computing at once, each
with as many threads as a run of so many ranks gives it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from tessera.core.device import cores_here
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.step import Step
from tessera.layout.resolve import parallel_of
from tessera.layout.shape import StepShape
from tessera.measure.timing import Timed, Timer, powers_to
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.attend import attend
from tessera.nn.mask import Mask
from tessera.nn.parameter import to_local
from tessera.plan.fitted import Attended, Fitted, Multiplied, fitted_attention, fitted_product
from tessera.plan.work import step_work
from tessera.sizes.rules import TensorParallel

T = TypeVar("T")
Shape = tuple[int, int, int]
"""Tokens, outputs and inputs of a linear layer."""


@dataclass(frozen=True)
class Sizes:
    """What is computed: shapes of products, elements of a long array and of an activation, attention's (B, H, S, Q).

    The last of these is the one that several ranks do at once.
    """

    products: Sequence[Shape]
    long: int
    activation: int
    attention: Sequence[tuple[int, int, int, int]]


ON_CPU = Sizes(
    [(64, 256, 256), (256, 256, 256), (1024, 256, 256), (512, 512, 512), (128, 1024, 1024), (1024, 1024, 1024)],
    2**23,
    2**20,
    [(8, 8, 128, 16), (8, 8, 256, 64), (1, 8, 1024, 32), (1, 8, 1024, 80), (2, 8, 512, 64)],
)
QUICK_ON_CPU = Sizes(
    [(64, 128, 128), (256, 256, 256), (512, 512, 512)], 2**22, 2**18, [(4, 4, 64, 16), (1, 4, 256, 64)]
)
ON_GPU = Sizes(
    [(8192, 128, 8192), (8192, 512, 4096), (8192, 1024, 8192), (512, 4096, 4096), (2048, 2048, 2048)]
    + [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 14336, 4096)],
    2**28,
    2**26,
    [(16, 16, 512, 64), (2, 16, 4096, 64), (1, 16, 8192, 128), (2, 16, 4096, 128)],
)
QUICK_ON_GPU = Sizes([(8192, 512, 4096), (2048, 2048, 2048), (8192, 8192, 8192)], 2**27, 2**24, [(1, 16, 4096, 128)])


@dataclass(frozen=True)
class Computed:
    """What one rank alone takes, and by what (`shared`, by kind and ranks) that grows with several at once.

    `products` by shape, for the mean of its forward and the two products of its backward; `bandwidth` bytes/s of a sum
    of long arrays; `efficiency`: the share of it that operators with new results reach; `attended` by (B, H, S, Q),
    forward and backward, and `attention`, what was fitted to it; `dispatch` seconds of an operator. `host`: bytes/s
    between the device and host memory one way, the slower of the two; `host_memory`: bytes/s that the process moves
    within host memory.
    """

    dtype: torch.dtype
    products: dict[Shape, Timed]
    fitted: Fitted
    bandwidth: float
    efficiency: float
    attended: dict[tuple[int, int, int, int], Timed]
    attention: Fitted
    dispatch: float
    host: float
    host_memory: float
    spreads: dict[str, float] = field(default_factory=dict)
    shared: dict[str, dict[int, float]] = field(default_factory=dict)


def measured_compute(timer: Timer, sizes: Sizes, here: int, threads: int | None) -> Computed:
    """Measure on the ranks of the timer's mesh, `here` of them on each machine.

    On CPUs each has `threads`, however many compute at once (None: its part of the cores).
    """
    mesh, gpu = timer.mesh, timer.mesh.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    work = _Work(mesh.device, dtype, sizes)

    def each(calls: Mapping[T, Callable[[], object]], ranks: int = 1) -> dict[T, Timed]:
        """On the first `ranks` of each machine while the others wait; GPUs share nothing, so all compute."""
        computes = gpu or mesh.rank % here < ranks
        with nullcontext() if gpu else _threads(threads or max(1, cores_here() // ranks)):
            return dict(zip(calls, timer.each([call if computes else None for call in calls.values()]), strict=True))

    products = each({shape: _product(mesh.device, dtype, shape) for shape in sizes.products})
    kinds = work.kinds()
    alone = each(kinds)
    fitted = fitted_product([Multiplied(shape, timed.seconds) for shape, timed in products.items()])
    bandwidth = 3 * sizes.long * dtype.itemsize / alone["long"].seconds
    efficiency = 5 * sizes.activation * dtype.itemsize / alone["memory"].seconds / bandwidth
    attended = each({shape: work.attention(shape) for shape in sizes.attention})
    shared: dict[str, dict[int, float]] = {}
    together = {kind: kinds[kind] for kind in ("product", "memory", "attention", "dispatch")}
    for ranks in () if gpu else powers_to(here):
        took = alone if ranks == 1 else each(together, ranks)
        for kind in together:
            shared.setdefault(kind, {})[ranks] = took[kind].seconds / alone[kind].seconds
    return Computed(
        dtype,
        products,
        fitted,
        bandwidth,
        min(1.0, efficiency),
        attended,
        fitted_attention([Attended(shape, timed.seconds) for shape, timed in attended.items()]),
        alone["dispatch"].seconds / work.operators,
        sizes.activation * dtype.itemsize / max(alone["out"].seconds, alone["back"].seconds),
        3 * sizes.activation * dtype.itemsize / alone["host"].seconds,
        {kind: timed.spread for kind, timed in alone.items()},
        shared,
    )


def middle_product(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Callable[[], Tensor]:
    """The product of the middle one of the shapes, forward or backward in turn."""
    return _product(device, dtype, _middle(sizes.products))


def _middle(shapes: Sequence[Shape]) -> Shape:
    return sorted(shapes, key=math.prod)[len(shapes) // 2]


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, device=device, dtype=dtype, generator=generator)


def _product(device: torch.device, dtype: torch.dtype, shape: Shape) -> Callable[[], Tensor]:
    """One of the three products of a linear layer in turn, so that a call is their mean."""
    tokens, outputs, inputs = shape
    x, w = _random(device, dtype, tokens, inputs), _random(device, dtype, outputs, inputs)
    dy = _random(device, dtype, tokens, outputs)
    turns = itertools.cycle([lambda: x @ w.t(), lambda: dy @ w, lambda: dy.t() @ x])
    return lambda: next(turns)()


class _Work:
    """Calls that compute on random numbers of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self.tiny = _TinyStep(device, dtype)
        self.operators = self.tiny.operators

    def random(self, *shape: int) -> Tensor:
        return _random(self.device, self.dtype, *shape)

    def kinds(self) -> dict[str, Callable[[], object]]:
        """What is measured beside products of every shape, by kind."""
        sizes = self.sizes
        a, b = self.random(sizes.long), self.random(sizes.long)
        c, gate, up = torch.empty_like(a), self.random(sizes.activation), self.random(sizes.activation)
        return {
            "long": lambda: torch.add(a, b, out=c),
            "memory": lambda: silu(gate) * up,
            "product": _product(self.device, self.dtype, _middle(sizes.products)),
            "attention": self.attention(sizes.attention[-1]),
            "dispatch": self.tiny.run,
            **self._host(gate),
        }

    def _host(self, held: Tensor) -> dict[str, Callable[[], object]]:
        """A tensor of the device to host memory and back, and a sum within that memory."""
        host = torch.zeros_like(held, device="cpu", pin_memory=self.device.type == "cuda")
        back, other = torch.empty_like(held), torch.zeros_like(host)
        return {
            "out": lambda: host.copy_(held, non_blocking=True),
            "back": lambda: back.copy_(host, non_blocking=True),
            "host": lambda: torch.add(host, other, out=other),
        }

    def attention(self, sizes: tuple[int, int, int, int]) -> Callable[[], object]:
        """Forward and backward of causal attention of (B, H, S, Q)."""
        q, k, v = (self.random(*sizes).requires_grad_() for _ in range(3))
        mask, gradient = Mask(causal=True), self.random(*sizes)

        def call() -> None:
            out, _ = attend(q, k, v, mask)
            torch.autograd.grad(out, (q, k, v), gradient)

        return call


class _TinyStep:
    """Forward and backward of a decoder so small that a GPU waits for the host, and a CPU hardly computes."""

    MODEL = ModelConfig("llama", 64, 32, 2, 2, 2, 16, 64, 64)

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        parallel = parallel_of(TensorParallel(), Mesh({}, device, rank=0), 1, self.MODEL.dimensions, compute=dtype)
        decoder = Decoder(self.MODEL, parallel)
        for parameter in decoder.parameters():
            to_local(parameter).normal_(std=0.02, generator=torch.Generator(device).manual_seed(0))
        self.step = Step(decoder, torch.optim.SGD(decoder.parameters(), lr=0.0))  # it is not asked to update
        ids = torch.arange(16).reshape(1, 16)
        self.batch = MicroBatch(ids, ids, ids.numel())

    def run(self) -> None:
        self.step.gradients([self.batch], 0, self.batch.valid)

    @property
    def operators(self) -> int:
        """How many operators the planner counts in one run."""
        work = step_work(self.MODEL, StepShape(1, 16, 1, False), self.step.model.parallel, 1)
        return int(sum(work.operators.values()))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """This process computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
