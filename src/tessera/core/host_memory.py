"""What layers save for their backward, in host memory meanwhile: copied out behind the forward, back ahead of need.

    forward of layer i     its tensors leave on a stream of their own, while layer i + 1 is computed
    backward of layer i    its tensors are there; those of layer i - 1 are on their way

On a GPU host memory is pinned, and a tensor's memory is free again when it has left: at most those of two layers are on
the device. On a CPU, where both are the same memory, tensors are copied all the same.
"""

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

LEAST = 1024
"""Bytes of a tensor below which it stays where it is."""


class _Moved:
    """The memory of one tensor, as a vector: on the host, and on its way back."""

    def __init__(self, flat: Tensor, layer: int, memory: "HostMemory") -> None:
        self.device, self.layer, self.uses, self.memory = flat.device, layer, 0, memory
        self.back: Tensor | None = None
        self.host: Tensor | None = self._leave(flat)

    def _leave(self, flat: Tensor) -> Tensor:
        stream = self.memory.stream
        if stream is None:
            with _disable_current_modes():  # what counts live tensors counts those of the device
                return flat.clone()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            return host.copy_(flat, non_blocking=True)

    def fetch(self) -> None:
        """Start the way back."""
        if self.back is not None or self.host is None:
            return
        stream = self.memory.stream
        if stream is None:
            self.back = self.host.clone()
            return
        computing = torch.cuda.current_stream(self.device)
        self.back = torch.empty_like(self.host, device=self.device, pin_memory=False)
        stream.wait_stream(computing)  # whose work may still read what this memory held before
        with torch.cuda.stream(stream):
            self.back.copy_(self.host, non_blocking=True)

    def take(self) -> Tensor:
        """The vector on its device; after the last use nothing of it is kept here."""
        self.fetch()
        assert self.back is not None
        back, self.uses = self.back, self.uses - 1
        if not self.uses:
            self.back = self.host = None
        return back


@dataclass(frozen=True)
class _View:
    """A saved tensor: its memory, and how it lies there."""

    moved: _Moved
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class _Leaving:
    """The tensors of one layer that are on their way out, and what says that they have left."""

    tensors: list[Tensor]
    event: Any = None


class HostMemory:
    """What the layers of one forward save, in host memory; made anew for each forward, and given to each layer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bytes = 0
        """So many have left the device."""
        self._layers: list[list[_Moved]] = []
        self._arrived: dict[int, Any] = {}
        self._leaving: deque[_Leaving] = deque()
        self._known: dict[tuple[Any, ...], _Moved] = {}
        self._staying: Collection[int] = ()

    @contextmanager
    def saving(self, staying: Collection[Tensor] = ()) -> Iterator[None]:
        """One layer's forward: what autograd saves in it leaves the device, but for views of `staying`, its weights."""
        self._let_go(but=1)
        self._layers.append([])
        self._leaving.append(_Leaving([]))
        self._staying = {x.untyped_storage()._cdata for x in staying}
        with saved_tensors_hooks(self.pack, self.unpack):
            yield
        self._staying = ()
        self._known.clear()
        if self.stream is not None:
            self._leaving[-1].event = self.stream.record_event()

    def _let_go(self, but: int = 0) -> None:
        """Of all layers `but` the last ones: what has left may be overwritten. Computation waits, the host does not."""
        while len(self._leaving) > but:
            left = self._leaving.popleft()
            if left.event is not None:
                torch.cuda.current_stream(self.device).wait_event(left.event)

    def pack(self, x: Tensor) -> Any:
        """What stands for `x` until `unpack`: `x` itself if it stays."""
        if x.nbytes < LEAST or isinstance(x, DTensor) or x.device.type != self.device.type:
            return x
        if x.untyped_storage()._cdata in self._staying or _casts_a_parameter(x):
            return x
        flat, stride = _flat(x.detach())
        key = (flat.untyped_storage()._cdata, flat.storage_offset(), flat.numel(), flat.dtype, x._version)
        moved = self._known.get(key)
        if moved is None:
            moved = _Moved(flat, len(self._layers) - 1, self)
            self._layers[-1].append(moved)
            self._leaving[-1].tensors.append(flat)  # which keeps the memory, and so the key
            self._known[key] = moved
            self.bytes += flat.nbytes
        moved.uses += 1
        return _View(moved, tuple(x.shape), stride)

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that `pack` was given."""
        if not isinstance(packed, _View):
            return packed
        layer = packed.moved.layer
        if layer not in self._arrived:
            self._let_go()
            self._fetch(layer)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[layer])
        x = packed.moved.take().as_strided(packed.shape, packed.stride)
        if layer and layer - 1 not in self._arrived:
            self._fetch(layer - 1)
        return x

    def _fetch(self, layer: int) -> None:
        for moved in self._layers[layer]:
            moved.fetch()
        self._arrived[layer] = None if self.stream is None else self.stream.record_event()
        self._layers[layer] = []


def _flat(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The memory of `x` as a vector, and the strides of `x` in it; a copy where elements share memory or gaps lie."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda dim: (dim[1], dim[0])):
        if size != 1 and stride != expected:
            return x.contiguous().view(-1), x.contiguous().stride()
        expected *= size
    return x.as_strided((x.numel(),), (1,)), x.stride()


def _casts_a_parameter(x: Tensor) -> bool:
    """Whether `x` is a parameter in another dtype."""
    node: Any = x.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return False
    source = node.next_functions[0][0]
    return source is not None and source.name() in ("torch::autograd::AccumulateGrad", "_LocalBackward")
