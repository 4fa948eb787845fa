"""The one door to torch.distributed: collectives along a group of mesh axes, and a recorder of them.

    all_gather(x, dim)       concatenate the shards of every rank along `dim`, in rank order
    reduce_scatter(x, dim)   sum over the ranks, each keeping its shard along `dim`      (the conjugate of all_gather)
    all_reduce(x)            sum over the ranks, each keeping all of it                  (in place)
    broadcast(x, root)       every rank receives the root's x
    reduce(x, root)          sum over the ranks, which the root keeps                    (the conjugate of broadcast)
    shift(x, by)             every rank receives the x of the rank `by` places further, around the ring

Each has a `start_` form that issues the collective and returns a `Pending`; `wait()` gives the result. A group of None
(an axis of size 1) costs nothing: the argument comes back.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.core.mesh import Group

# torch 2.13 renamed them; 2.11 has only the old names.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Record:
    """One collective as it was handed to torch.distributed.

    `bytes` is the size of the whole tensor: what a gather returns, what a reduce-scatter or all-reduce takes, what a
    broadcast, reduce or shift moves. `received` is what this rank receives when the collective runs as a ring, or, to
    and from a root, as a chain around it: an all-reduce passes every shard twice; the root of a broadcast receives
    nothing, nor does the rank after the root of a reduce, which starts the chain.
    """

    kind: str
    axes: tuple[str, ...]
    ranks: int
    bytes: int
    received: int

    @property
    def axis(self) -> str:
        """The axes as one name, for tables and logs."""
        return "·".join(self.axes)


@dataclass(eq=False)  # two that counted the same are two: leaving `with` must not end the other
class Recorder:
    """Counts, while active (`with Recorder() as recorder:`), every collective that goes through this door.

    `leave_out` is the place in the list of one collective that is not performed, each rank going on with what it has
    alone: a test that still passes then does not test it. `delay` gives the seconds by which a collective is slowed.
    `idle` are the places in the list before which others had something to shift and this rank had not.
    """

    leave_out: int | None = None
    delay: Callable[[Record], float] | None = None
    records: list[Record] = field(default_factory=list)
    events: list[tuple[str, Any]] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)

    def __enter__(self) -> "Recorder":
        _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _active.remove(self)

    def bytes_by_axis(self) -> dict[str, int]:
        """Bytes handed over (see `Record.bytes`), summed by axis."""
        total: dict[str, int] = {}
        for record in self.records:
            total[record.axis] = total.get(record.axis, 0) + record.bytes
        return total

    def table(self) -> list[dict[str, Any]]:
        """Calls and bytes by axis and kind."""
        counts = Counter((r.axis, r.kind) for r in self.records)
        handed: Counter[tuple[str, str]] = Counter()
        for record in self.records:
            handed[record.axis, record.kind] += record.bytes
        return [{"axis": a, "kind": k, "calls": n, "bytes": handed[a, k]} for (a, k), n in sorted(counts.items())]


def totals(records: Iterable[Record]) -> dict[tuple[str, str], tuple[int, int]]:
    """(axis, kind) → calls and bytes received, as `plan.traffic.totals` gives them by formula."""
    calls: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    for record in records:
        calls[record.axis, record.kind] += 1
        received[record.axis, record.kind] += record.received
    return {key: (calls[key], received[key]) for key in sorted(calls)}


# A plain list, not a context variable: on GPUs autograd runs backward, and its collectives, in threads of its own.
_active: list[Recorder] = []


class Pending:
    """A collective on its way: `wait()` blocks until it is done and returns the result."""

    def __init__(self, result: Tensor, work: Any = None, record: Record | None = None) -> None:
        self._result, self.work, self._record = result, work, record

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            for recorder in _active:
                recorder.events.append(("wait", self._record))
            self.work = None
        return self._result


def _issue(
    kind: str, group: Group, whole: Tensor, result: Tensor, call: Callable[[], Any], root: int | None = None
) -> Pending:
    """Record the collective and perform it, unless a recorder asks to leave it out."""
    size = whole.numel() * whole.element_size()
    if root is not None:  # the one rank that receives nothing
        received = 0 if group.rank == root else size
    elif kind == "shift":
        received = size
    else:
        received = (2 if kind == "all_reduce" else 1) * size * (group.size - 1) // group.size
    record = Record(kind, group.axes, group.size, size, received)
    performed = True
    for recorder in _active:
        performed &= recorder.leave_out != len(recorder.records)
        recorder.records.append(record)
        recorder.events.append(("issue", record))
        if recorder.delay is not None:
            time.sleep(recorder.delay(record))
    return Pending(result, call() if performed else None, record)


def _leaving_out() -> bool:
    """Whether some collective may not be performed: its result must be the same wrong value each time."""
    return any(r.leave_out is not None for r in _active)


def _dim_first(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).contiguous()


def start_all_gather(x: Tensor, dim: int, group: Group | None) -> Pending:
    """Issue `all_gather`; shards are equal, the result is `group.size` times as long along `dim`."""
    if group is None:
        return Pending(x)
    shard = _dim_first(x.detach(), dim)
    whole = shard.new_empty(group.size * shard.shape[0], *shard.shape[1:])
    if _leaving_out():
        whole.zero_()
    return _issue(
        "all_gather",
        group,
        whole,
        whole.movedim(0, dim),
        lambda: _all_gather(whole, shard, group=group.process_group, async_op=True),
    )


def start_reduce_scatter(x: Tensor, dim: int, group: Group | None) -> Pending:
    """Issue `reduce_scatter`; the length along `dim` divides by `group.size`."""
    if group is None:
        return Pending(x)
    whole = _dim_first(x.detach(), dim)
    if whole.shape[0] % group.size:
        raise ValueError(f"dim {dim} of {tuple(x.shape)} does not divide by the {group.size} ranks along {group.axes}")
    shard = torch.empty_like(whole[: whole.shape[0] // group.size])
    if _leaving_out():
        shard.copy_(whole.chunk(group.size)[group.rank])
    return _issue(
        "reduce_scatter",
        group,
        whole,
        shard.movedim(0, dim),
        lambda: _reduce_scatter(shard, whole, group=group.process_group, async_op=True),
    )


def gathered(own: object, ranks: int) -> list[Any]:
    """A small object of every one of the run's `ranks`, in rank order. Not counted: no step does it."""
    everyone: list[Any] = [own]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, own)
    return everyone


def gather_into(whole: Tensor, shard: Tensor, group: Group, async_op: bool) -> Any:
    """`all_gather` along dim 0 between memory that FSDP2 owns; returns torch's handle when `async_op`, as it waits."""
    if _leaving_out():
        own = shard.clone()  # a part of `whole` already
        whole.zero_()
        shard.copy_(own)
    call = lambda: _all_gather(whole, shard, group=group.process_group, async_op=async_op)  # noqa: E731
    return _issue("all_gather", group, whole, whole, call).work


def reduce_scatter_into(shard: Tensor, whole: Tensor, group: Group, async_op: bool) -> Any:
    """`reduce_scatter` along dim 0 between memory that FSDP2 owns; returns as `gather_into`."""
    if _leaving_out():
        shard.copy_(whole.view(group.size, -1)[group.rank].view_as(shard))
    call = lambda: _reduce_scatter(shard, whole, group=group.process_group, async_op=async_op)  # noqa: E731
    return _issue("reduce_scatter", group, whole, shard, call).work


def start_all_reduce(x: Tensor, group: Group | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Issue `all_reduce`, in place when `x` is contiguous: hand over a tensor nobody else reads."""
    if group is None:
        return Pending(x)
    whole = x.detach().contiguous()
    return _issue(
        "all_reduce",
        group,
        whole,
        whole,
        lambda: dist.all_reduce(whole, op, group=group.process_group, async_op=True),
    )


def start_broadcast(x: Tensor, root: int, group: Group | None) -> Pending:
    """Issue `broadcast` from the rank in place `root` of the group; x has one shape on all ranks."""
    if group is None:
        return Pending(x)
    # `data`, not detach(): gloo writes a GPU's tensor back on the root too, and autograd may have saved x
    whole = x.data.contiguous() if group.rank == root else torch.empty_like(x, memory_format=torch.contiguous_format)
    if group.rank != root and _leaving_out():
        whole.zero_()
    process_group = group.process_group
    call = lambda: dist.broadcast(whole, group=process_group, group_src=root, async_op=True)  # noqa: E731
    return _issue("broadcast", group, whole, whole, call, root=root)


def start_reduce_to(x: Tensor, root: int, group: Group | None) -> Pending:
    """Issue `reduce` to the rank in place `root`; what the others get is nothing to read. Hand over x for good."""
    if group is None:
        return Pending(x)
    whole, process_group = x.detach().contiguous(), group.process_group
    call = lambda: dist.reduce(whole, group=process_group, group_dst=root, async_op=True)  # noqa: E731
    return _issue("reduce", group, whole, whole, call, root=(root + 1) % group.size)


class _Exchange:
    """A send and a receive as one piece of work; holds what is sent until it has gone."""

    def __init__(self, works: list[Any], sent: Tensor) -> None:
        self.works, self.sent = works, sent

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def start_shift(x: Tensor, by: int, group: Group | None) -> Pending:
    """Issue `shift`: receive from the rank `by` places further along the ring, send to the one as far behind."""
    if group is None or by % group.size == 0:
        for recorder in _active if group is not None else ():
            recorder.idle.append(len(recorder.records))
        return Pending(x)
    sent, received = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if _leaving_out():
        received.copy_(sent)
    process_group, source, target = group.process_group, (group.rank + by) % group.size, (group.rank - by) % group.size

    def call() -> _Exchange:
        send = dist.P2POp(dist.isend, sent, group=process_group, group_peer=target)
        receive = dist.P2POp(dist.irecv, received, group=process_group, group_peer=source)
        return _Exchange(dist.batch_isend_irecv([send, receive]), sent)

    return _issue("shift", group, sent, received, call)


def all_gather(x: Tensor, dim: int, group: Group | None) -> Tensor:
    """Concatenate the shards of every rank of `group` along `dim`, in rank order."""
    return start_all_gather(x, dim, group).wait()


def reduce_scatter(x: Tensor, dim: int, group: Group | None) -> Tensor:
    """Sum over the ranks of `group`, each keeping its shard along `dim`."""
    return start_reduce_scatter(x, dim, group).wait()


def all_reduce(x: Tensor, group: Group | None) -> Tensor:
    """Sum over the ranks of `group`, in place when `x` is contiguous."""
    return start_all_reduce(x, group).wait()


def largest(x: Tensor, group: Group | None) -> Tensor:
    """The elementwise maximum over the ranks of `group`, in place when `x` is contiguous."""
    return start_all_reduce(x, group, dist.ReduceOp.MAX).wait()
