"""The one door to torch.distributed: collectives along a group of mesh axes, each counted by recorder.py.

    all_gather(x, dim)       concatenate the shards of every rank along `dim`, in rank order
    reduce_scatter(x, dim)   sum over the ranks, each keeping its shard along `dim`      (the conjugate of all_gather)
    all_reduce(x)            sum over the ranks, each keeping all of it                  (in place)
    broadcast(x, root)       every rank receives the root's x
    reduce(x, root)          sum over the ranks, which the root keeps                    (the conjugate of broadcast)
    shift(x, by)             every rank receives the x of the rank `by` places further, around the ring
    all_to_all(x, sizes)     every rank sends each of the others its own rows of x
    exchange(messages)       some ranks send some others a tensor: sends and receives as one batch

Each has a `start_` form that issues the collective and returns a `Pending`; `wait()` gives the result. A group of None
(an axis of size 1) costs nothing: the argument comes back.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.core.mesh import Group
from tessera.core.recorder import LABEL, Record, Span, active, begin_span, labels
from tessera.core.recorder import Recorder as Recorder
from tessera.core.recorder import totals as totals

# torch 2.13 renamed them; 2.11 has only the old names.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective on its way: `wait()` blocks until it is done and returns the result."""

    def __init__(
        self, result: Tensor, work: Any = None, record: Record | None = None, span: Span | None = None
    ) -> None:
        self._result, self.work, self._record, self._span = result, work, record, span

    def wait(self, marked: bool = True) -> Tensor:
        """The result; where time is measured, this wait is in it unless `marked` is false."""
        if self.work is not None:
            with _labelled("wait", self._record.axes if self._record else ()), _marked(self._span if marked else None):
                self.work.wait()
            for recorder in active:
                recorder.events.append(("wait", self._record))
            self.work = None
        return self._result


_NOTHING: AbstractContextManager[None] = nullcontext()


def _labelled(what: str, axes: Sequence[str]) -> AbstractContextManager[Any]:
    """The mark that a profiler puts around a call or a wait: nothing unless one runs."""
    # the format of traces takes ASCII alone
    return labels[0](f"{LABEL}{what} {'+'.join(axes)}") if labels else _NOTHING


def _marked(span: Span | None) -> AbstractContextManager[None]:
    """Around a wait: its begin and end are marks of `span`, if there is one."""
    return _NOTHING if span is None else span.within()


def _record(kind: str, group: Group, size: int, received: int) -> tuple[Record, bool]:
    """Count what is issued now, of so many bytes; also whether it is to be performed: no recorder leaves it out."""
    record = Record(kind, group.axes, group.size, size, received)
    performed = True
    for recorder in active:
        performed &= recorder.leave_out != len(recorder.records)
        recorder.records.append(record)
        recorder.events.append(("issue", record))
        if recorder.delay is not None:
            time.sleep(recorder.delay(record))
    return record, performed


def _issue(
    kind: str, group: Group, whole: Tensor, result: Tensor, call: Callable[[], Any], received: int | None = None
) -> Pending:
    """Record the collective and perform it, unless a recorder asks to leave it out; `received` unless by the ring."""
    if received is None:
        received = (2 if kind == "all_reduce" else 1) * whole.nbytes * (group.size - 1) // group.size
    with _labelled(kind, group.axes):
        span = begin_span(kind, group.axes)
        if span is not None:
            span.waited_for = kind != "broadcast" or not received
        record, performed = _record(kind, group, whole.nbytes, received)
        _made(record, result)
        work = call() if performed else None
        if span is not None:
            span.mark()
    return Pending(result, work, record, span)


def _made(record: Record, result: Tensor) -> None:
    for recorder in active:
        if recorder.made is not None:
            recorder.made(record, result)


def _leaving_out() -> bool:
    """Whether some collective may not be performed: its result must be the same wrong value each time."""
    return any(r.leave_out is not None for r in active)


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
    call = lambda: _all_gather(whole, shard, group=group.process_group, async_op=True)  # noqa: E731
    return _issue("all_gather", group, whole, whole.movedim(0, dim), call)


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
    call = lambda: _reduce_scatter(shard, whole, group=group.process_group, async_op=True)  # noqa: E731
    return _issue("reduce_scatter", group, whole, shard.movedim(0, dim), call)


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
    call = lambda: dist.all_reduce(whole, op, group=group.process_group, async_op=True)  # noqa: E731
    return _issue("all_reduce", group, whole, whole, call)


def start_broadcast(x: Tensor, root: int, group: Group | None) -> Pending:
    """Issue `broadcast` from the rank in place `root` of the group; x has one shape on all ranks."""
    if group is None:
        return Pending(x)
    # `data`, not detach(): gloo writes a GPU's tensor back on the root too, and autograd may have saved x
    whole = x.data.contiguous() if group.rank == root else torch.empty_like(x, memory_format=torch.contiguous_format)
    if group.rank != root and _leaving_out():
        whole.zero_()
    call = lambda: dist.broadcast(whole, group=group.process_group, group_src=root, async_op=True)  # noqa: E731
    return _issue("broadcast", group, whole, whole, call, 0 if group.rank == root else whole.nbytes)


def start_reduce_to(x: Tensor, root: int, group: Group | None) -> Pending:
    """Issue `reduce` to the rank in place `root`; what the others get is nothing to read. Hand over x for good."""
    if group is None:
        return Pending(x)
    whole = x.detach().contiguous()
    call = lambda: dist.reduce(whole, group=group.process_group, group_dst=root, async_op=True)  # noqa: E731
    starts_the_chain = group.rank == (root + 1) % group.size
    return _issue("reduce", group, whole, whole, call, 0 if starts_the_chain else whole.nbytes)


class _Works:
    """Several pieces of work as one; holds what is sent until it has gone."""

    def __init__(self, works: list[Any], sent: Tensor) -> None:
        self.works, self.sent = works, sent

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _messages(sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group) -> list[Any]:
    """One batch of sends to and receives from places in the group; a piece of work for each, sends first."""
    peers = group.process_group
    batch = [dist.P2POp(dist.isend, x, group=peers, group_peer=to) for x, to in sends]
    batch += [dist.P2POp(dist.irecv, x, group=peers, group_peer=source) for x, source in receives]
    works = dist.batch_isend_irecv(batch)
    return works * (len(batch) // len(works))  # NCCL gives one for all of them


def start_shift(x: Tensor, by: int, group: Group | None) -> Pending:
    """Issue `shift`: receive from the rank `by` places further along the ring, send to the one as far behind."""
    if group is None or by % group.size == 0:
        if group is not None:
            for recorder in active:
                recorder.shifts_nothing(group.axes)
        return Pending(x)
    sent, received = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if _leaving_out():
        received.copy_(sent)
    source, target = (group.rank + by) % group.size, (group.rank - by) % group.size
    call = lambda: _Works(_messages([(sent, target)], [(received, source)], group), sent)  # noqa: E731
    return _issue("shift", group, sent, received, call, sent.nbytes)


def start_all_to_all(
    x: Tensor, sizes_sent: Sequence[int], sizes_received: Sequence[int], group: Group | None
) -> Pending:
    """Issue `all_to_all`: this rank's `sizes_sent[r]` rows of x, in rank order, go to the rank in place r of the group.

    The result has `sizes_received[r]` rows of each rank r, in rank order: what r sends, which must be of the same dtype
    and the same other dims; any size may be 0. E.g. along two ranks, where rank 0 sends sizes [1, 3] and rank 1 sends
    [2, 0], rank 0 receives [1, 2] and rank 1 [3, 0]. Raises ValueError for sizes that do not fit x or the group.
    """
    if group is None:
        return Pending(x)
    own, out, back = group.rank, list(sizes_sent), list(sizes_received)
    if not (len(out) == len(back) == group.size and sum(out) == x.shape[0] and out[own] == back[own]):
        given = f"sizes {out} sent and {back} received do not cut {tuple(x.shape)}"
        raise ValueError(f"{given} for the {group.size} ranks along {group.axes}, of which this is rank {own}")
    sent = x.detach().contiguous()
    kept, result = sent.split(out)[own], sent.new_empty(sum(back), *sent.shape[1:])
    if _leaving_out():
        result.zero_().split(back)[own].copy_(kept)
    peers = group.process_group
    call = lambda: dist.all_to_all_single(result, sent, back, out, group=peers, async_op=True)  # noqa: E731
    return _issue("all_to_all", group, sent, result, call, result.nbytes - kept.nbytes)


class _LeftOut:
    """A message that a recorder leaves out: it travels all the same, for its peer waits for it, and is zero."""

    def __init__(self, work: Any, memory: Tensor) -> None:
        self.work, self.memory = work, memory

    def wait(self) -> None:
        self.work.wait()
        self.memory.zero_()


def start_exchange(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group | None
) -> tuple[list[Pending], list[Pending]]:
    """Issue messages between single ranks as one batch: each (tensor, place in the group) of `sends` and `receives`.

    The tensor of a receive is the contiguous memory that the message fills; shape and dtype are as the sender's. E.g.
    the rank in place 0 calls `start_exchange([(x, 1)], [], group)`, the one in place 1
    `start_exchange([], [(memory, 0)], group)`; a rank without a message makes no call. Returns a Pending of each send
    and one of each receive; wait for sends too: one that is dropped before takes its message with it. Messages from one
    rank to another arrive in the order in which both name them. On NCCL all ranks must have used the group once before
    only some of them do.
    """
    if group is None or not (sends or receives):
        assert not (sends or receives), "one rank alone has nobody to exchange with"
        return [], []
    sent = [(x.detach().contiguous(), to) for x, to in sends]
    messages = [("send", x, to, 0) for x, to in sent] + [("receive", x, source, x.nbytes) for x, source in receives]
    counted, spans = [], []
    for kind, x, peer, received in messages:
        spans.append(begin_span(kind, group.axes, peer))
        counted.append(_record(kind, group, x.nbytes, received))
        if kind == "receive":
            _made(counted[-1][0], x)
        if (span := spans[-1]) is not None:
            span.mark()
    leaving = [(x if c[1] else torch.zeros_like(x), to) for (x, to), c in zip(sent, counted, strict=False)]
    with _labelled("exchange", group.axes), _marked(span):  # the last one's, for the batch
        works = _messages(leaving, receives, group)
    tensors = [x for x, _ in (*leaving, *receives)]
    pending = [
        Pending(x, work if performed else _LeftOut(work, x), record, own)
        for x, work, (record, performed), own in zip(tensors, works, counted, spans, strict=True)
    ]
    return pending[: len(sends)], pending[len(sends) :]


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


def all_to_all(x: Tensor, sizes_sent: Sequence[int], sizes_received: Sequence[int], group: Group | None) -> Tensor:
    """This rank's `sizes_received[r]` rows of the x of each rank r of `group`, in rank order."""
    return start_all_to_all(x, sizes_sent, sizes_received, group).wait()
