"""From a trace of torch's profiler to seconds by kind of work, which sum to the step's own time.

Without a device, the thread of the step is cut into pieces: each moment belongs to the outermost operator of a known
kind, or to the collective that was called or waited for, or to Python. With a device, its time is what counts:

    a kernel runs                 its operator's kind (of several at once the first of KINDS)
    only a collective runs        communication along its axes, which nothing hides
    nothing runs                  a gap; where no thread of the host is in an operator either, Python

Times are those of the trace, in µs; results are in seconds.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tessera.core.recorder import LABEL
from tessera.monitor.operators import COPIES, GAPS, KINDS, OTHER, PYTHON, kind_of, kind_of_kernel

STEP = f"{LABEL}step"
ALONG = "along "
"""How the kind of a collective begins: `along col`."""
_ON_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_COMMUNICATION = ("c10d::", "gloo:", "nccl:")
Event = dict[str, Any]
Amounts = defaultdict[str, float]


@dataclass
class Spent:
    """Where one step, or several, spent `step` seconds.

    By kind: `seconds`, which sum to `step`; `calls` of operators, or pieces of a device's work; `names`, the seconds of
    these by name; `hidden`, seconds of communication on a device while other work ran. A kind is one of KINDS, python,
    gaps, or `along AXIS` for the collectives along an axis.
    """

    step: float = 0.0
    seconds: Amounts = field(default_factory=lambda: defaultdict(float))
    calls: Amounts = field(default_factory=lambda: defaultdict(float))
    hidden: Amounts = field(default_factory=lambda: defaultdict(float))
    names: defaultdict[str, Amounts] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))


@dataclass(frozen=True)
class _Piece:
    """A part of a thread's time: what it did, by the `name` of which operator; `begins` where that operator does."""

    start: float
    end: float
    kind: str
    name: str
    begins: bool


def spent(trace: dict[str, Any]) -> Spent:
    """Where the step of a trace spent its time. Raises ValueError when the trace has no step's label."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [e for e in events if e.get("cat") == "user_annotation" and str(e["name"]).startswith(STEP)]
    if not steps:
        raise ValueError("the trace has no step: the profiler was stopped within it")
    step = steps[0]
    threads: defaultdict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _ON_HOST:
            threads[event["pid"], event["tid"]].append(event)
    pieces = {thread: list(_pieces(own)) for thread, own in threads.items()}
    start, end = step["ts"], step["ts"] + step["dur"]
    done = Spent(step=(end - start) / 1e6)
    device = [event for event in events if event.get("cat") in _ON_DEVICE]
    if device:
        _by_device(done, start, end, list(_device_work(device, events, pieces)), pieces.values())
    else:
        _by_thread(done, start, end, pieces[step["pid"], step["tid"]])
    return done


def _kind(event: Event) -> str:
    """The kind of one operator by itself."""
    name = str(event["name"])
    if event["cat"].startswith("cuda_"):
        return OTHER  # the host's part of a launch
    if name.startswith(LABEL) and not name.startswith(STEP):
        return ALONG + name.rpartition(" ")[2].replace("+", "·")
    if name.startswith(_COMMUNICATION):
        return f"{ALONG}no axis"
    return PYTHON if event["cat"] == "user_annotation" else kind_of(name)


def _pieces(events: list[Event]) -> Iterator[_Piece]:
    """The time of one thread, cut where an operator begins or ends; what lies between operators is Python."""
    stack: list[tuple[float, str, str]] = []  # end, kind, name
    now = begun = float("-inf")

    def piece(until: float) -> Iterator[_Piece]:
        if until > now:
            _, kind, name = stack[-1] if stack else (0.0, PYTHON, "")
            yield _Piece(now, until, kind, name, begun == now)

    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        while stack and stack[-1][0] <= start:
            yield from piece(stack[-1][0])
            now = max(now, stack.pop()[0])
        yield from piece(start)
        now = start
        above, kind, name = stack[-1] if stack else (end, PYTHON, "")
        if kind in (PYTHON, OTHER):
            kind, name, begun = _kind(event), str(event["name"]), now
        stack.append((min(end, above), kind, name))
    while stack:
        yield from piece(stack[-1][0])
        now = max(now, stack.pop()[0])
    yield _Piece(now, float("inf"), PYTHON, "", False)


def _by_thread(done: Spent, start: float, end: float, pieces: list[_Piece]) -> None:
    for piece in pieces:
        seconds = (min(piece.end, end) - max(piece.start, start)) / 1e6
        if seconds > 0:
            done.seconds[piece.kind] += seconds
            done.calls[piece.kind] += piece.begins
            done.names[piece.kind][piece.name] += seconds


# ---- With a device


def _device_work(
    device: Iterable[Event], events: Iterable[Event], pieces: dict[Any, list[_Piece]]
) -> Iterator[tuple[float, float, str, str]]:
    """Start, end, kind and name of what a device did; the kind is that of the operator which launched it."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if str(event.get("cat")).startswith("cuda_") and "correlation" in event.get("args", {})
    }
    starts = {thread: [piece.start for piece in own] for thread, own in pieces.items()}
    for event in device:
        kind, name = OTHER, str(event["name"])
        if launch := launches.get(event.get("args", {}).get("correlation")):
            thread = launch["pid"], launch["tid"]
            piece = pieces[thread][bisect_right(starts[thread], launch["ts"]) - 1]
            if piece.kind not in (PYTHON, OTHER):
                kind, name = piece.kind, piece.name
        if event["cat"] != "kernel" and not kind.startswith(ALONG):
            kind = COPIES
        elif kind == OTHER:
            kind = kind_of_kernel(name)
        yield event["ts"], event["ts"] + event["dur"], kind, name


def _by_device(
    done: Spent,
    start: float,
    end: float,
    work: list[tuple[float, float, str, str]],
    threads: Iterable[list[_Piece]],
) -> None:
    """Each moment of the step to one kind, by what runs then."""
    host = "host"
    changes = [(start, "", 0), (end, "", 0)]
    for begins, ends, kind, name in work:
        if ends > start and begins < end:
            changes += [(max(begins, start), kind, 1), (min(ends, end), kind, -1)]
            done.calls[kind] += 1
            done.names[kind][name] += (min(ends, end) - max(begins, start)) / 1e6
    for piece in (piece for thread in threads for piece in thread if piece.kind != PYTHON):
        if piece.end > start and piece.start < end:
            changes += [(max(piece.start, start), host, 1), (min(piece.end, end), host, -1)]
    changes.sort(key=lambda change: change[0])
    running: Counter[str] = Counter()
    now = start
    for moment, kind, by in changes:
        if moment > now:
            _give(done, running, (moment - now) / 1e6, PYTHON if not running[host] else GAPS)
            now = moment
        running[kind] += by


def _give(done: Spent, running: Counter[str], seconds: float, idle: str) -> None:
    """Give a moment to what a device does then, or else to `idle`."""
    axes = [kind for kind, count in running.items() if count and kind.startswith(ALONG)]
    work = [kind for kind in KINDS if running[kind]]
    done.seconds[[*work, *axes, idle][0]] += seconds
    for kind in axes if work else ():
        done.hidden[kind] += seconds
