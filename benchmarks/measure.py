"""Instruments, the same for every contender: step times, live tensors, collectives, time by operator."""

import contextlib
import gc
import resource
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::mv")
MIB = 2**20


@dataclass(frozen=True)
class StepTime:
    """One step on one rank: wall and CPU seconds (all threads of the process), loss and gradient norm."""

    wall: float
    cpu: float
    loss: float
    norm: float


Step = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Inspection:
    """What extra, uncounted steps of one rank showed. Bytes and seconds are of one step."""

    calls: dict[str, int]
    payload: dict[str, int]
    peak_bytes: int
    max_rss_bytes: int
    seconds: dict[str, float]
    total_seconds: float

    @property
    def product_share(self) -> float:
        return sum(self.seconds.get(name, 0.0) for name in PRODUCTS) / self.total_seconds


def timed(step: Step) -> StepTime:
    wall, cpu = time.perf_counter(), time.process_time()
    loss, norm = step()
    return StepTime(time.perf_counter() - wall, time.process_time() - cpu, loss, norm)


class LiveTensors(TorchDispatchMode):
    """Peak bytes of live tensor storages, and every collective handed to torch.distributed, while entered.

    A storage counts from the operator that returns it until it is freed; those alive on entry count from the
    start. A collective's payload is the larger of what it takes and what it returns: the whole tensor for
    all-gather, reduce-scatter and all-reduce alike. Scratch memory inside a C++ kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.current = 0
        self.peak = 0
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __enter__(self) -> "LiveTensors":
        gc.collect()
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):  # isinstance would run the properties of lazy proxies
                self._add(thing)
                if thing.is_leaf and thing.grad is not None:
                    self._add(thing.grad)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # its local operators come through here
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name:
            self._count(name, args, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _count(self, name: str, args: Any, result: Any) -> None:
        kind = name.split(".")[0].strip("_")
        sizes = [sum(x.nbytes for x in tree_leaves(a) if isinstance(x, Tensor)) for a in (*args, result)]
        self.calls[kind] += 1
        self.payload[kind] += max(sizes)

    def _add(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.elem
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            weakref.finalize(storage, self._free, key)
        self.current += size - self.live.get(key, 0)
        self.live[key] = size
        self.peak = max(self.peak, self.current)

    def _free(self, key: int) -> None:
        self.current -= self.live.pop(key, 0)


def reset_max_rss() -> None:
    """Forget the peak resident set so far, where the system can (Linux): loading is not part of the step."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def inspect(step: Step) -> Inspection:
    """One extra step under `LiveTensors`, then two under the profiler, of which the faster is kept."""
    max_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with LiveTensors() as seen:
        step()
    total, seconds = min((_profiled(step) for _ in range(2)), key=lambda found: found[0])
    return Inspection(dict(seen.calls), dict(seen.payload), seen.peak, max_rss_bytes, seconds, total)


def _profiled(step: Step) -> tuple[float, dict[str, float]]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        total = time.perf_counter() - start
    return total, {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
