"""How long a step takes on a machine, term by term: the work of a rank (plan/work.py) at the rates of a profile.

    products      Σ 2 M N K / (R d / (d + half)), d the least of M, N, K on the rank
    attention     its FLOPs at R k / (k + half), k the keys that a query sees, and what each pair of them takes
    elementwise   bytes at the share of the memory bandwidth that such operators reach
    dispatch      what the host takes longer to issue a phase than the device to run it
    exposed       of each axis: seconds of its collectives, less what overlaps: of those that may, what exceeds the
                  share `overlap` of the compute beside them
    contention    compute is slower while collectives run beside it
    host          bytes to host memory and back at the rate of that link, less what overlaps: with the collectives that
                  may it has the share `overlap` of the compute, for a gather waits for its shards, and a shard of
                  gradients for its reduce-scatter; what layers keep travels beside these. The device waits for all
                  gradients that are added up on the host, where two numbers are read and one is written
    bubble        stages of a pipeline wait (p − 1) times for a micro-batch, and for the stage with the logits
    optimizer     bytes at the memory bandwidth, of the device or of the host; products of muon
    step          what every step takes
    calibration   what measured runs of like shape took more or less than these terms (plan/calibrate.py)

Each term is a number of seconds, or an array of candidates.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera.core.arrays import larger, smaller
from tessera.models.anatomy import HEAD
from tessera.plan.host import HostTraffic
from tessera.plan.machine import Profile
from tessera.plan.numbering import Links, received_along
from tessera.plan.traffic import Transfer
from tessera.plan.work import PHASES, Moved, Multiplied, Phase, Work

SHARED = ("product", "attention", "memory", "dispatch", "links")
_PHASE: dict[str, Phase] = {phase: phase for phase in PHASES}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by term. `exposed` by axis; `collectives` are all of them, hidden or not.

    `error`: half of the band, as a share of the total.
    """

    products: Any
    attention: Any
    elementwise: Any
    dispatch: Any
    contention: Any
    host: Any
    bubble: Any
    optimizer: Any
    step: Any
    exposed: Mapping[str, Any]
    collectives: Mapping[str, Any]
    error: Any
    calibration: Any = 0.0

    @property
    def compute(self) -> Any:
        """Seconds in which the device computes for layers and head, or waits for the host."""
        return self.products + self.attention + self.elementwise + self.dispatch + self.contention

    @property
    def communication(self) -> Any:
        """Exposed seconds of all axes."""
        return sum(self.exposed.values())

    @property
    def total(self) -> Any:
        """Seconds of the step."""
        return (
            self.compute + self.communication + self.host + self.bubble + self.optimizer + self.step + self.calibration
        )

    @property
    def terms(self) -> dict[str, Any]:
        """Every term by name; they add up to the total."""
        exposed = {f"exposed along {axis}": seconds for axis, seconds in self.exposed.items()}
        names = ("products", "attention", "elementwise", "dispatch", "contention", "host")
        rest = {name: getattr(self, name) for name in (*names, "bubble", "optimizer", "step", "calibration")}
        return rest | exposed


@dataclass(frozen=True)
class Pipeline:
    """Stages of a pipeline in which 1F1B runs micro-batches: layers are cut over them, the last has the head too."""

    stages: Any = 1
    machines: Any = 1
    message_bytes: Any = 0


ONE_STAGE = Pipeline()


def step_time(work: Work, profile: Profile, pipeline: Pipeline = ONE_STAGE) -> StepTime:
    """The time of a step whose rank does `work`, of one stage where there are several."""
    rates = _AtOnce(profile, work)
    products = {phase: sum(rates.product(each) for each in work.products if each.phase == phase) for phase in PHASES}
    attention = {phase: rates.attend(work, phase) for phase in PHASES}
    bandwidth = rates.memory
    elementwise = {
        phase: (work.elementwise[phase] + profile.score_bytes * work.scores[phase]) / bandwidth for phase in PHASES
    }
    device = {phase: products[phase] + attention[phase] + elementwise[phase] for phase in PHASES}
    host = {phase: work.operators[phase] * rates.dispatch for phase in PHASES}
    collectives, exposed, hidden, beside = _communication(work.moved, device, attention, rates)
    of_axes = {phase: sum(seconds for (at, _), seconds in exposed.items() if at == phase) for phase in PHASES}
    copies = _exposed_copies(work.host, device, hidden, rates)
    busy = {phase: device[phase] + of_axes[phase] + copies[phase] if profile.asynchronous else 0.0 for phase in PHASES}
    waits = {phase: larger(host[phase] - busy[phase], 0.0) for phase in PHASES}
    of_head = sum(rates.product(each) for each in work.products if each.site == HEAD)
    along: defaultdict[str, Any] = defaultdict(float)
    for (_, axis), seconds in exposed.items():
        along[axis] += seconds
    in_layers = sum(device.values()) + sum(waits.values()) + along.get("col", 0.0) - of_head
    return StepTime(
        sum(products.values()),
        sum(attention.values()),
        sum(elementwise.values()),
        sum(waits.values()),
        (profile.contention - 1) * beside,
        sum(copies.values()) + work.host.waited / rates.host + 3 * work.host.waited / rates.host_memory,
        _bubble(work, profile, pipeline, in_layers, of_head),
        work.optimizer / bandwidth + work.optimizer_on_host / rates.host_memory + work.optimizer_flops / rates.multiply,
        profile.step_seconds,
        dict(along),
        collectives,
        profile.error,
    )


class _AtOnce:
    """The rates of a rank while so many ranks of its machine compute: on GPUs what one has, on shared cores less."""

    def __init__(self, profile: Profile, work: Work) -> None:
        self.profile, slower = profile, {what: profile.slowdown(what, work.on_machine) for what in SHARED}
        self.wiring = None
        if profile.devices and profile.pairs:
            received = received_along(each.transfer for each in work.moved)
            self.wiring = Links(profile.pairs, work.inside, received)
        self.multiply, self.links = profile.product_flops / slower["product"], slower["links"]
        self.attention = profile.attention_flops / slower["attention"]
        self.score = profile.score_seconds * slower["attention"]
        self.memory = profile.memory_efficiency * profile.memory_bandwidth / slower["memory"]
        self.dispatch = profile.dispatch_seconds * slower["dispatch"]
        self.host_memory = profile.host_memory_bandwidth
        self.host = min(profile.host_bandwidth, self.host_memory)  # every device of the machine copies at once

    def collective(self, transfer: Transfer, received: Any, ranks: Any, machines: Any) -> Any:
        """Seconds of a call in which a rank receives so many bytes, over the links that its group has."""
        links = self.wiring.share(transfer.axes) if self.wiring else 1.0
        return self.links * self.profile.collective_seconds(transfer.kind, received, ranks, machines, links)

    def attend(self, work: Work, phase: Phase) -> Any:
        """Seconds of attention: the fewer keys a query sees, the lower the rate."""
        flops = work.attention.get(phase, 0) + self.profile.attention_half * work.per_key.get(phase, 0)
        return flops / self.attention + self.score * work.scores.get(phase, 0)

    def product(self, product: Multiplied) -> Any:
        """Seconds of a product, at the rate that its least dim reaches."""
        least = smaller(smaller(product.m, product.n), product.k)
        return product.flops / (self.multiply * least / (least + self.profile.product_half))


def _exposed_copies(
    host: HostTraffic, device: Mapping[Phase, Any], hidden: Mapping[Phase, Any], rates: _AtOnce
) -> dict[Phase, Any]:
    """Seconds of copies to host memory and back that no compute hides, beside the `hidden` collectives of each phase;
    on a CPU all of them, where nothing runs beside it.
    """
    exposed, layers = {}, host.layers / rates.host
    for phase, moved in zip(PHASES, (host.forward, host.backward), strict=True):
        shards = moved / rates.host
        if not rates.profile.asynchronous:
            exposed[phase] = layers + shards
            continue
        room, collectives = rates.profile.overlap * device[phase], hidden[phase]
        together = shards + larger(collectives, layers)
        exposed[phase] = larger(together - room, 0.0) - larger(collectives - room, 0.0)
    return exposed


def _communication(
    moved: Sequence[Moved], device: Mapping[Phase, Any], attention: Mapping[Phase, Any], rates: _AtOnce
) -> tuple[dict[str, Any], dict[tuple[str, str], Any], dict[Phase, Any], Any]:
    """Seconds of collectives by axis, those of them that are exposed, those of each phase that may overlap with all of
    its compute, and seconds of compute beside some."""
    collectives: defaultdict[str, Any] = defaultdict(float)
    exposed: defaultdict[tuple[str, str], Any] = defaultdict(float)
    pools: defaultdict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for transfer, ranks, machines, hidden in moved:
        calls = transfer.calls * transfer.times
        each = transfer.received / larger(transfer.calls, 1)
        seconds = calls * rates.collective(transfer, each, ranks, machines)
        collectives[transfer.axis] += seconds
        if hidden and transfer.phase != "step":
            pool = pools[hidden, transfer.phase]
            pool[transfer.axis] = pool.get(transfer.axis, 0.0) + seconds
        else:
            exposed[transfer.phase, transfer.axis] += seconds
    beside: Any = 0.0
    for (under, phase), pool in pools.items():
        room = rates.profile.overlap * (attention if under == "attention" else device)[_PHASE[phase]]
        whole = sum(pool.values())
        hides = smaller(whole, room)
        beside = beside + hides
        for axis, seconds in pool.items():
            exposed[phase, axis] += seconds * (1 - hides / np.maximum(whole, 1e-12))
    with_compute = {phase: sum(pools["compute", phase].values()) for phase in PHASES}
    return dict(collectives), dict(exposed), with_compute, beside


def _bubble(work: Work, profile: Profile, pipeline: Pipeline, in_layers: Any, of_head: Any) -> Any:
    """Seconds that the stage of the rank waits for others: filling and emptying, the longer last stage, messages."""
    stages, batches = pipeline.stages, work.micro_batches
    if isinstance(stages, int) and stages == 1:
        return 0.0
    message = profile.collective_seconds("receive", pipeline.message_bytes, 2, pipeline.machines)
    return (stages - 1) * in_layers / batches + 2 * (batches + stages - 1) * np.where(stages > 1, message, 0.0)
