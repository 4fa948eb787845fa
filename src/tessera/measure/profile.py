"""What was measured, as a profile for the planner and as lines for a person."""

import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tessera.core import device as devices
from tessera.core.collectives import gathered
from tessera.core.mesh import Mesh
from tessera.core.text import counted, human, table_lines
from tessera.doctor.links import pair_table
from tessera.doctor.pairs import Measured as MeasuredPairs
from tessera.measure.compute import Computed
from tessera.measure.links import Linked, Overlap
from tessera.plan.cluster import shipped_for
from tessera.plan.fitted import Fitted
from tessera.plan.machine import Curve, Profile

BUSY = 0.25
"""The typical spread above which a person is told."""


@dataclass(frozen=True)
class Here:
    """Where it was measured: the device, the software, the day (ISO), ranks in all and on each machine.

    `devices`: what tells each GPU of the first machine from others, in the order of ranks; none for CPUs.
    """

    hardware: str
    gpu: bool
    stack: str
    date: str
    ranks: int
    per_machine: int
    memory_bytes: int
    host_bytes: int
    devices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Names the profile and its file."""
        text = f"{self.hardware} {counted(self.ranks, 'rank')} {self.stack} {self.date}"
        return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")

    def __str__(self) -> str:
        cores = "" if self.gpu else f", {os.cpu_count()} cores"
        return f"tessera measure, {counted(self.ranks, 'rank')}, {self.hardware}{cores}, {self.stack}, {self.date}"


def here(mesh: Mesh, per_machine: int, date: str) -> Here:
    """Of this process. On CPUs a rank has its part of the machine's memory."""
    device = mesh.device
    host = devices.host_memory_bytes() // per_machine
    memory = devices.memory_bytes(device)
    gpu = device.type == "cuda"
    own = gathered(devices.identity(device), mesh.world)[:per_machine]
    known = tuple(name for name in own if name is not None)
    memory = host if memory is None else memory
    stack = devices.stack(gpu=gpu)
    return Here(devices.hardware(device), gpu, stack, date, mesh.world, per_machine, memory, host, known)


def profile_of(computed: Computed, linked: Linked, pairs: MeasuredPairs | None, where: Here) -> Profile:
    """The profile. What one rank or one machine cannot measure is that of the shipped profile of the device."""
    base = shipped_for(where.hardware, where.gpu)
    sources = dict.fromkeys(_FIGURES, f"measured: {where}")
    sources |= {"peak_flops": "the vendor's data sheet", "step_seconds": "not measured: nothing beside"}
    sources["error"] = "the band of a measured profile, or the typical spread of what was measured where that is wider"
    inside = _curves(linked.curves.get("inside"))
    if inside is None:
        sources["inside"] = (
            f"not measured with one rank: as {base.name}" if base else "none: one device exchanges nothing"
        )
        inside = base.inside if base else {"any": Curve(0.0, 0.0, 0.0, computed.bandwidth)}
    between = _curves(linked.curves.get("between"))
    if between is None:
        sources["between"] = f"not measured on one machine: as {base.name if base else 'inside'}"
        between = base.between if base else inside
    overlap = linked.overlap or Overlap(Profile.overlap, Profile.contention)
    if linked.overlap is None:
        sources |= dict.fromkeys(("overlap", "contention"), "not measured with one rank: the default")
    flops, half = computed.fitted.value
    attention, attention_half, score = computed.attention.value
    return Profile(
        name=where.name,
        device=where.hardware,
        stack=where.stack,
        date=where.date,
        devices_per_machine=where.per_machine if linked.calls or base is None else base.devices_per_machine,
        memory_bytes=where.memory_bytes,
        peak_flops=dict(base.peak_flops) if base else {},
        product_flops=flops,
        product_half=half,
        attention_flops=attention,
        attention_half=attention_half,
        score_seconds=score,
        memory_bandwidth=computed.bandwidth,
        memory_efficiency=computed.efficiency,
        dispatch_seconds=computed.dispatch,
        host_bandwidth=computed.host,
        host_memory_bandwidth=computed.host_memory,
        host_memory_bytes=where.host_bytes,
        inside=inside,
        between=between,
        overlap=overlap.hidden,
        contention=overlap.contention,
        pair_bandwidth=base.pair_bandwidth if base and not linked.calls else None,
        error=max(Profile.error, min(1.0, disturbance(computed, linked))),
        asynchronous=where.gpu,
        measured=True,
        devices=where.devices,
        shared=computed.shared | ({"links": linked.shared} if linked.shared else {}),
        pairs=tuple((pair.first, pair.second, pair.rate) for pair in pairs.pairs) if pairs else (),
        sources=sources,
    )


def disturbance(computed: Computed, linked: Linked) -> float:
    """The median of all spreads: how much what else the machine did has disturbed the measurement."""
    timed = [*computed.products.values(), *(call.timed for call in linked.calls)]
    return statistics.median([*(each.spread for each in timed), *computed.spreads.values()])


_ABOUT = ("name", "device", "devices", "stack", "date", "measured", "sources", "asynchronous")
_NOT_MEASURED = ("pair_bandwidth", "residuals", "score_bytes")
_FIGURES = [each.name for each in fields(Profile) if each.name not in _ABOUT + _NOT_MEASURED]


def _curves(fitted: Mapping[str, Fitted[Curve]] | None) -> Mapping[str, Curve] | None:
    if not fitted:
        return None
    return {kind: found.value for kind, found in fitted.items()} | {"any": fitted["all_gather"].value}


def lines(profile: Profile, computed: Computed, linked: Linked, pairs: MeasuredPairs | None) -> list[str]:
    """Tables of all that was measured, each with its spread: how far the middle half of the rounds lies apart."""
    told = [f"{profile.device}, {profile.stack}, {devices.dtype_name(computed.dtype)}", "", "matrix products"]
    rows = [["tokens", "outputs", "inputs", "GFLOP/s", "ms", "spread"]]
    for shape, timed in computed.products.items():
        flops = 2 * shape[0] * shape[1] * shape[2] / timed.seconds
        rows.append([*map(str, shape), f"{flops / 1e9:,.0f}", f"{1e3 * timed.seconds:.3g}", f"{timed.spread:.0%}"])
    told += table_lines(rows)
    told.append(
        f"  fit: {profile.product_flops / 1e9:,.0f} GFLOP/s · d / (d + {profile.product_half:.0f}), d the least size; "
        f"error {computed.fitted.mean_error:.0%} on average, at most {computed.fitted.largest_error:.0%}"
    )
    told += ["", "causal attention, forward and backward", *_attention_lines(profile, computed)]
    spread = computed.spreads
    told += ["", "beside products"]
    told += table_lines(
        [
            ["memory, long arrays", f"{computed.bandwidth / 1e9:.3g} GB/s", f"spread {spread['long']:.0%}"],
            ["operators with new results", f"{computed.efficiency:.0%} of it", f"spread {spread['memory']:.0%}"],
            ["between device and host memory", f"{computed.host / 1e9:.3g} GB/s", f"spread {spread['out']:.0%}"],
            ["within host memory", f"{computed.host_memory / 1e9:.3g} GB/s", f"spread {spread['host']:.0%}"],
            ["an operator's dispatch", f"{1e6 * computed.dispatch:.3g} µs", f"spread {spread['dispatch']:.0%}"],
        ]
    )
    told += _shared_lines(profile)
    told += _link_lines(linked)
    if pairs is not None and len(pairs.ends) > 1:
        table = pair_table(pairs)
        told += ["", table.title, *table_lines(table.rows)]
    if (apart := disturbance(computed, linked)) > BUSY:
        told += [
            "",
            f"rounds differ by {apart:.0%} where they should be alike: measure again when the machine is idle",
        ]
    return told


def _attention_lines(profile: Profile, computed: Computed) -> list[str]:
    rows = [["rows", "heads", "tokens", "features", "GFLOP/s", "ms", "spread"]]
    for shape, timed in computed.attended.items():
        batch, heads, tokens, features = shape
        flops = 7 * batch * heads * tokens**2 * features / timed.seconds
        rows.append([*map(str, shape), f"{flops / 1e9:,.0f}", f"{1e3 * timed.seconds:.3g}", f"{timed.spread:.0%}"])
    rate, half, pair = profile.attention_flops / 1e9, profile.attention_half, 1e9 * profile.score_seconds
    _, mean, largest = computed.attention
    fit = f"  fit: {rate:,.0f} GFLOP/s · k / (k + {half:.0f}), k the keys of a query, and {pair:.3g} ns a pair; "
    return [*table_lines(rows), f"{fit}error {mean:.0%} on average, at most {largest:.0%}"]


def _shared_lines(profile: Profile) -> list[str]:
    """By what everything takes longer with several ranks at once."""
    if not profile.shared:
        return []
    counts = sorted({count for factors in profile.shared.values() for count in factors})
    rows = [["", *(f"{count} at once" for count in counts)]]
    for what, factors in profile.shared.items():
        rows.append([what, *(f"× {factors[count]:.2f}" if count in factors else "" for count in counts)])
    return ["", "ranks share the cores: what takes longer (links: beside all ranks at it)", *table_lines(rows)]


def _link_lines(linked: Linked) -> list[str]:
    told: list[str] = []
    for level, curves in linked.curves.items():
        told += ["", f"collectives {level} {'a machine' if level == 'inside' else 'machines'}"]
        own = [call for call in linked.calls if call.level == level]
        rows = [["", level == "inside" and "ranks" or "machines", "received", "µs", "GB/s", "spread"]]
        for call in own:
            seconds = call.timed.seconds
            rate = f"{call.received / seconds / 1e9:.3g}"
            rows.append(
                [
                    call.kind,
                    str(call.steps),
                    human(call.received),
                    f"{1e6 * seconds:,.0f}",
                    rate,
                    f"{call.timed.spread:.0%}",
                ]
            )
        told += table_lines(rows)
        rows = [["fit", "alpha µs", "hop µs", "root ns/√B", "GB/s", "mean error"]]
        for kind, (curve, mean, _) in curves.items():
            numbers = [1e6 * curve.alpha_seconds, 1e6 * curve.hop_seconds, 1e9 * curve.root_seconds]
            rows.append(
                [kind, *(f"{number:.3g}" for number in numbers), f"{curve.bytes_per_second / 1e9:.3g}", f"{mean:.0%}"]
            )
        told += table_lines(rows)
    if linked.overlap is not None:
        hidden, slower = linked.overlap.hidden, linked.overlap.contention
        told += [
            "",
            f"an all-reduce beside products: {hidden:.0%} of it hidden, the products {slower:.2f} times slower",
        ]
    return told
