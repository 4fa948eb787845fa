"""The memory of a step, verified: the trainer's own step on tensors without data, in a world of one process.

The step of a model of few layers is traced at two depths, each layer as wide as it is; what a deeper model holds at
each place of its step, in the loss say, or in the backward of its first layer, follows from the two, for what is alive
there grows by the same with each layer. Of all places the one with the most is the peak.
"""

import io
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.core.collectives import Record, Recorder
from tessera.core.live_memory import SitedMemory
from tessera.engine.optimizer import BITSANDBYTES, TORCHAO, Optimizer, build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.models.decoder import Decoder
from tessera.nn.parameter import to_local
from tessera.plan.count import batches_of, built, fake_world, make_state
from tessera.plan.ledger import KINDS
from tessera.plan.peak import Peak
from tessera.plan.update import ADAMW, Update

BRINGING = ("all_gather", "all_to_all", "broadcast", "shift", "receive")
"""The collectives whose results are gathered operands."""
SHOWN = 400
"""So many changes before the peak, and after it, make a timeline."""


class Moment(NamedTuple):
    """What is alive after one change, bytes by kind; `event` says what was made or dropped there."""

    event: str
    alive: dict[str, int]


@dataclass(frozen=True)
class TracedMemory:
    """The peak of a traced step, and what is alive around it; `layers` are those that were traced."""

    peak: Peak
    timeline: list[Moment]
    layers: int


@dataclass(frozen=True)
class _Trace:
    """One traced step: of each place of it what is alive when most is, and the timeline around the peak."""

    places: dict[str, dict[str, int]]
    timeline: list[Moment]


def traced_memory(
    model: ModelConfig,
    shape: StepShape,
    parallel: Parallel,
    *,
    offload: bool = False,
    update: Update = ADAMW,
) -> TracedMemory:
    """The peak of one step as the rank of `parallel.mesh`; the arguments are those of `plan.peak.peak_bytes`.

    More than two micro-batches hold no more than two; where weights are kept, more than three no more than three.
    Raises RuntimeError in a process that is a rank of a real world.
    """
    if update.name in (*TORCHAO, *BITSANDBYTES):  # whose kernels take no tensors without data
        traced = traced_memory(model, shape, parallel, offload=offload)
        other = 0 if offload else update.moment_bytes(model, parallel) - ADAMW.moment_bytes(model, parallel)
        peak = replace(traced.peak, states=traced.peak.states + int(other))
        return replace(traced, peak=peak, timeline=[_with_states(moment, int(other)) for moment in traced.timeline])
    most = 2 if shape.reshard else 3
    if shape.micro_batches > most:
        shape = replace(shape, micro_batches=most, documents=shape.documents[:most])
    depths = _depths(model)
    traces = [_trace(replace(model, num_layers=depth), shape, parallel, offload, update) for depth in depths]
    last = traces[-1]
    places = last.places
    if len(traces) > 1:
        further = (model.num_layers - depths[1]) / (depths[1] - depths[0])
        places = {
            name: {kind: round(alive[kind] + (alive[kind] - traces[0].places[name][kind]) * further) for kind in KINDS}
            for name, alive in last.places.items()
            if name in traces[0].places
        }
    where = max(places, key=lambda name: sum(places[name].values()))
    peak = Peak(**places[where], moment=where)
    return TracedMemory(peak, _at_depth(last, places[where], where), depths[-1])


def _with_states(moment: Moment, more: int) -> Moment:
    """The same with so many bytes more of states."""
    return moment._replace(alive=moment.alive | {"states": moment.alive["states"] + more})


def _depths(model: ModelConfig) -> list[int]:
    """The two depths to trace; or the model's own where it is hardly deeper. Kinds of layers come as in the model."""
    period = len(model.layer_kinds)
    first = 2 * (period + 1)
    first += (model.num_layers - first) % period
    second = first + max(period, 2 - 2 % period)
    return [model.num_layers] if model.num_layers <= second else [first, second]


def _at_depth(trace: _Trace, peak: dict[str, int], where: str) -> list[Moment]:
    """The timeline of the deepest trace, with what the layers beyond hold at the peak added to each kind."""
    more = {kind: peak[kind] - trace.places[where][kind] for kind in KINDS}
    return [Moment(event, {kind: alive[kind] + more[kind] for kind in KINDS}) for event, alive in trace.timeline]


def _trace(model: ModelConfig, shape: StepShape, parallel: Parallel, offload: bool, update: Update) -> _Trace:
    sizes = {axis: size for axis, size in parallel.mesh.sizes.items() if size > 1}
    with fake_world(sizes, parallel.mesh.rank) as mesh:
        parallel = replace(parallel, mesh=mesh)
        with built(model, shape, parallel, SitedMemory()) as (decoder, memory):
            # on a GPU torch updates all parameters together, as `foreach` asks for where there is none
            together = {"foreach": True} if update.name == "sgd" else {}
            optimizer = build_optimizer(decoder, update.name, (0.9, 0.95), 1e-8, 0.1, {**update.options, **together})
            step = Step(decoder, optimizer, max_grad_norm=1.0, label_smoothing=0.1 if shape.label_smoothing else 0.0)
            batches = batches_of(shape)
            make_state(decoder, optimizer)
            if parallel.schedule.prefetch:
                step.gradients(batches[:1], 0)
                optimizer.zero_grad(set_to_none=True)
            since = len(memory.changes)
            kinds = _Kinds(memory, decoder, optimizer)
            step.entered = lambda phase: memory.mark("update") if phase == "optimizer" else None
            memory.mark("begin of the forward")
            with _marked(decoder, memory, kinds), Recorder() as recorder:
                recorder.made = kinds.brought
                step(batches, 0, 1e-3)
            kinds.label_states(decoder, optimizer)
            return _read(memory, kinds.final(since), since, offload)


class _Kinds:
    """The kind of each storage, by number."""

    def __init__(self, memory: SitedMemory, decoder: Decoder, optimizer: Optimizer) -> None:
        self.memory, self.kinds = memory, defaultdict[int, str](lambda: "working")
        self.forwards: list[tuple[int, int]] = []
        self.label_states(decoder, optimizer)
        self.states = set(self.kinds)

    def label_states(self, decoder: Decoder, optimizer: Optimizer) -> None:
        """Parameters, gradients and moments as they are now."""
        for parameter in decoder.parameters():
            self._label(to_local(parameter), "states")
            if parameter.grad is not None:
                self._label(to_local(parameter.grad), "states")
        for value in _tensors_of(optimizer):
            self._label(value, "states")

    def brought(self, record: Record, tensor: Tensor) -> None:
        """A collective fills this tensor."""
        if record.kind in BRINGING:
            self._label(tensor, "gathered")

    def _label(self, tensor: Tensor, kind: str) -> None:
        number = self.memory.number(tensor)
        if number is not None:
            self.kinds[number] = kind

    def final(self, since: int) -> list[str]:
        """Of every storage: what a forward has made and left is an activation, what is resized later is gathered."""
        made: dict[int, int] = {}
        gone: dict[int, int] = {}
        for place, (number, grown) in enumerate(self.memory.changes):
            if number not in made:
                made[number] = place
            elif grown > 0 and place >= since and number not in self.states:
                self.kinds[number] = "gathered"  # FSDP2 keeps whole weights so, without memory while they are cut
            if grown < 0:
                gone[number] = place
        for number, place in made.items():
            for first, end in self.forwards:
                if first <= place < end <= gone.get(number, end) and self.kinds[number] == "working":
                    self.kinds[number] = "activations"
        return [self.kinds[number] for number in range(len(self.memory.sites))]


def _tensors_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """An optimizer's state, and that of the optimizers inside it."""
    for inside in (optimizer, getattr(optimizer, "inner", None), getattr(optimizer, "adamw", None)):
        for state in inside.state.values() if inside is not None else ():
            yield from (to_local(value) for value in state.values() if isinstance(value, Tensor))


@contextmanager
def _marked(decoder: Decoder, memory: SitedMemory, kinds: _Kinds) -> Iterator[None]:
    """Mark where each layer's forward and backward begin, the loss, and what comes after the first layer's backward."""
    layers, period = list(decoder.layers.values()), len(decoder.config.layer_kinds)
    near, begun = period + 1, [0]

    def place(index: int) -> str:
        if index < near:
            return f"layer {index}"
        from_end = len(layers) - index
        if from_end > near:
            return "a layer between"
        return "the last layer" if from_end == 1 else f"layer {from_end} from the end"

    def begin(*_: Any) -> None:
        begun[0] = len(memory.changes)
        memory.mark("begin of the forward")

    def end(_: Any, __: Any, loss: Tensor) -> None:
        kinds.forwards.append((begun[0], len(memory.changes)))
        memory.mark("backward of the loss")

    hooks = [decoder.register_forward_pre_hook(begin), decoder.register_forward_hook(end)]
    for index, layer in enumerate(layers):

        def before(_: Any, arguments: tuple[Any, ...], index: int = index) -> None:
            if torch.is_grad_enabled():
                memory.mark(f"forward of {place(index)}")
                if index == 0 and arguments[0].requires_grad:
                    arguments[0].register_hook(lambda _: memory.mark("backward of the embedding"))

        def after(_: Any, __: Any, result: Tensor, index: int = index) -> None:
            if index == len(layers) - 1:
                memory.mark("loss")
            if result.requires_grad:
                result.register_hook(lambda _: memory.mark(f"backward of {place(index)}"))

        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read(memory: SitedMemory, kinds: list[str], since: int, offload: bool) -> _Trace:
    """What is alive at each place, and around the peak; with `offload` states are not on the device."""
    marks = iter([*memory.marks, (len(memory.changes) + 1, "")])
    following, name, where = next(marks), "", ""
    now, most, places = dict.fromkeys(KINDS, 0), 0, dict[str, dict[str, int]]()
    moments: list[Moment] = []
    peak_at = 0
    for index, (number, grown) in enumerate(memory.changes):
        while index >= following[0]:
            where, following = following[1], next(marks)
        if not (offload and kinds[number] == "states"):
            now[kinds[number]] += grown
        if index < since:
            continue
        total = sum(now.values())
        if total > sum(places.get(where, {}).values()) or where not in places:
            places[where] = dict(now)
        name = memory.sites[number]
        moments.append(Moment(f"{where}: {name if grown > 0 else f'{name}, dropped'}", dict(now)))
        if total > most:
            most, peak_at = total, len(moments) - 1
    return _Trace(places, moments[max(0, peak_at - SHOWN) : peak_at + SHOWN])


def plot_timeline(traced: TracedMemory, path: Path | None = None, device_bytes: int | None = None) -> bytes:
    """What is alive around the peak, GiB by kind one upon another, as a PNG; written to `path` if there is one.

    `device_bytes` is drawn as a line. The horizontal axis counts tensors made and dropped.
    """
    # slow to import, and for drawing alone; without pyplot, which would choose a window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.89, 0.8))
    counts = range(len(traced.timeline))
    layers = [[moment.alive[kind] / 2**30 for moment in traced.timeline] for kind in KINDS]
    axes.stackplot(counts, layers, labels=KINDS, step="post")
    totals = [sum(moment.alive.values()) for moment in traced.timeline]
    highest = totals.index(max(totals))
    axes.axvline(highest, color="black", linewidth=0.8)
    axes.set(xlabel="tensors made and dropped", ylabel="GiB", xlim=(0, max(1, len(totals) - 1)))
    axes.set_title(f"{traced.peak.total / 2**30:.2f} GiB at the peak, {traced.peak.moment}", fontsize=10)
    if device_bytes is not None:
        axes.axhline(device_bytes / 2**30, color="grey", linestyle="--", linewidth=1, label="of the device")
    axes.legend(loc="lower left")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    if path is not None:
        path.write_bytes(file.getvalue())
    return file.getvalue()
