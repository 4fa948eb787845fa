"""A count of all that goes through the door to torch.distributed: one Record each, kept by every active Recorder."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tessera.core.clock import Clock, Mark

LABEL = "tessera: "
"""How the labels of this package begin in a profiler's trace."""

GATHER_WAIT, SUM_WAIT = "wait for a gather", "wait for sums"
"""Kinds of spans without a collective of their own: where FSDP2 waits, on a GPU's stream, for what it has issued."""


@dataclass(frozen=True)
class Record:
    """One collective, send or receive as it was handed to torch.distributed.

    `bytes` is the size of the whole tensor: what a gather returns, what a reduce-scatter, all-reduce or all-to-all
    takes, what a broadcast, reduce, shift, send or receive moves. `received` is what this rank receives when the
    collective runs as a ring, or, to and from a root, as a chain around it: an all-reduce passes every shard twice; the
    root of a broadcast receives nothing, nor does the rank after the root of a reduce, which starts the chain. An
    all-to-all receives all of its result but the part that this rank keeps; a send receives nothing.
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


class Span:
    """When this rank issued a collective and waited for it: marks of a clock, begin and end in turn.

    The first two are those of the issue, the others of waits; none at all where others shift and this rank does not.
    `peer` is the place in the group of the one rank that a message goes to or comes from, else None. `waited_for` is
    False where no other rank needs this one to come, as a receiver of a broadcast.
    """

    __slots__ = ("axes", "clock", "kind", "marks", "peer", "waited_for")

    def __init__(self, kind: str, axes: tuple[str, ...], clock: Clock, peer: int | None = None) -> None:
        self.kind, self.axes, self.clock, self.peer = kind, axes, clock, peer
        self.waited_for = True
        self.marks: list[Mark] = []

    def mark(self) -> None:
        self.marks.append(self.clock.mark())

    @contextmanager
    def within(self) -> Iterator[None]:
        """Mark the begin and the end."""
        self.mark()
        yield
        self.mark()


@dataclass(eq=False)  # two that counted the same are two: leaving `with` must not end the other
class Recorder:
    """Counts, while active (`with Recorder() as recorder:`), every collective that goes through this door.

    `leave_out` is the place in the list of one collective that is not performed, each rank going on with what it has
    alone: a test that still passes then does not test it. A peer waits for a message, so a send or receive that is left
    out carries zeros instead. `delay` gives the seconds by which a collective is slowed. `label` makes a context for
    each call and each wait from its name, such as `tessera: all_reduce shard+col`: a profiler's mark.
    `idle` are the places in the list before which others had something to shift and this rank had not.
    With a `clock`, `spans` says when each was issued and waited for. `made` is told of the tensor that each fills.
    """

    leave_out: int | None = None
    delay: Callable[[Record], float] | None = None
    clock: Clock | None = None
    made: Callable[[Record, Tensor], None] | None = None
    label: Callable[[str], AbstractContextManager[Any]] | None = None
    records: list[Record] = field(default_factory=list)
    events: list[tuple[str, Any]] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def __enter__(self) -> "Recorder":
        active.append(self)
        if self.label is not None:
            labels.append(self.label)
        return self

    def __exit__(self, *error: object) -> None:
        active.remove(self)
        if self.label is not None:
            labels.remove(self.label)

    def shifts_nothing(self, axes: tuple[str, ...]) -> None:
        """Others along `axes` shift something now, this rank does not."""
        self.idle.append(len(self.records))
        if self.clock is not None:
            self.spans.append(Span("shift", axes, self.clock))

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


def begin_span(kind: str, axes: tuple[str, ...], peer: int | None = None) -> Span | None:
    """Mark that this is about to be issued, for the recorder that times; None where none does."""
    for recorder in active:
        if recorder.clock is not None:
            span = Span(kind, axes, recorder.clock, peer)
            span.mark()
            recorder.spans.append(span)
            return span
    return None


# A plain list, not a context variable: on GPUs autograd runs backward, and its collectives, in threads of its own.
active: list[Recorder] = []
"""The recorders that count now."""
labels: list[Callable[[str], AbstractContextManager[Any]]] = []
"""Those of them that have one: every call and every wait looks here, and as a rule there is none."""
