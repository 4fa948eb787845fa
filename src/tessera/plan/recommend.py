"""Which layout, does it fit, how fast, and why: what `tessera plan` prints, as values.

plan       every layout of a cluster, the best ones and why the others lost
judge      one layout on a cluster: its memory, its time by term, what to turn where it does not fit
smallest   the smallest cluster that reaches so many tokens a second
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tessera.core.errors import UserError
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.models.shapes import known_shape, shape_of
from tessera.plan.buffers import library_bytes
from tessera.plan.calibrate import corrected, place_of
from tessera.plan.candidates import Found, buildable
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.fit import Verdict, fits
from tessera.plan.flops import step_flops
from tessera.plan.host import host_bytes, room_on_host
from tessera.plan.machine import Cluster, Profile
from tessera.plan.peak import Peak, peak_bytes
from tessera.plan.refusals import no_layout, too_large_for
from tessera.plan.search import fastest_too_large, search
from tessera.plan.time import StepTime, step_time
from tessera.plan.trace import TracedMemory, traced_memory
from tessera.plan.update import ADAMW
from tessera.plan.work import step_work
from tessera.sizes.bounds import ROWS, at_most, of_kind, whole_number
from tessera.sizes.numbers import either

TOP = 5
TRAINED = ("bfloat16", "float32")
LOOKED_AT = 500
DIFFERENCE = 0.005
"""The least difference, as a share of the step, that is named as a reason."""


@dataclass(frozen=True)
class Judged:
    """A layout on a cluster. `name` says it in words; `layout` where it is one that the search knows.

    `verdict`: fits, may fit, or does not fit; `lost`: why it is not the best; `buffers`: bytes of the communication
    library beside the peak (plan/buffers.py); `traced`: the memory of its step as the model's own code holds it
    (plan/trace.py), where that was asked for; `host_bytes`: what lies in host memory.
    """

    name: str
    devices: int
    training: Training
    cluster: Cluster
    peak: Peak
    time: StepTime
    flops: int
    verdict: str
    layout: Layout | None = None
    lost: str = ""
    buffers: int = 0
    traced: TracedMemory | None = None
    host_bytes: int = 0

    @property
    def bytes(self) -> int:
        """The peak of a device: the traced one where there is one, else that of the formula."""
        return int(self.peak.total if self.traced is None else self.traced.peak.total)

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return float(self.time.total)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.training.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """The model's FLOPs over what the devices' peak would do in that time (plan/flops.py)."""
        peak = self.cluster.profile.peak_flops.get(self.training.dtype, self.cluster.profile.product_flops)
        return self.flops / (self.seconds * self.devices * peak)

    @property
    def band(self) -> float:
        """Half of the band of the time, as a share."""
        return float(self.time.error)


def judge(model: ModelConfig, layout: Layout, cluster: Cluster, training: Training) -> Judged:
    """The memory and the time of a layout on rank 0, which holds the largest shards."""
    parallel = layout.parallel(model, training)
    shape = layout.shape(training, parallel)
    judged = judge_step(model, shape, parallel, cluster, training, str(layout), offload=layout.offload_params)
    return replace(judged, layout=layout)


def judge_step(
    model: ModelConfig,
    shape: StepShape,
    parallel: Parallel,
    cluster: Cluster,
    training: Training,
    name: str,
    *,
    offload: bool = False,
) -> Judged:
    """The same of a step as the trainer runs it, on the rank of `parallel.mesh`."""
    mesh, cluster = parallel.mesh, cluster.in_dtype(training.dtype)
    peak = peak_bytes(model, shape, parallel, offload=offload, update=training.update)
    work = step_work(model, shape, parallel, cluster.per_machine, offload=offload, update=training.update)
    buffers = library_bytes((each.transfer for each in work.moved), mesh, cluster.profile, cluster.per_machine)
    time = step_time(work, cluster.profile)
    time = _scalars(corrected(time, place_of(model, shape, parallel), cluster.profile))
    flops = step_flops(model, [training.sequence_len]) * training.global_batch
    host = int(host_bytes(model, shape, parallel, offload=offload, update=training.update))
    verdict = _verdict(int(peak.total), buffers, host, cluster.profile)
    return Judged(name, mesh.world, training, cluster, peak, time, flops, verdict, buffers=buffers, host_bytes=host)


def _verdict(peak: int, buffers: int, host: int, profile: Profile) -> Verdict:
    """Whether a step fits its device, and what it keeps on the host the host."""
    return fits(peak, profile.memory_bytes, buffers) if host <= room_on_host(profile) else "does not fit"


def traced(model: ModelConfig, judged: Judged) -> Judged:
    """With the memory of the model's own code at its own sizes, run on tensors without data. Takes seconds.

    Raises RuntimeError in a process that is a rank of a real world.
    """
    assert judged.layout is not None
    parallel = judged.layout.parallel(model, judged.training)
    shape = judged.layout.shape(judged.training, parallel)
    offload, update = judged.layout.offload_params, judged.training.update
    memory = traced_memory(model, shape, parallel, offload=offload, update=update)
    verdict = _verdict(int(memory.peak.total), judged.buffers, judged.host_bytes, judged.cluster.profile)
    return replace(judged, traced=memory, verdict=verdict)


def _scalars(time: StepTime) -> StepTime:
    """The same with plain numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return float(np.asarray(value).reshape(-1)[0])

    return StepTime(**{name: plain(value) for name, value in vars(time).items()})


@dataclass(frozen=True)
class Plan:
    """The best layouts of a cluster, the fastest first; `considered` layouts were compared.

    `too_large`: the fastest of those that do not fit, where it would be faster than the best. `config`: the keys of the
    file that the winner's are written over.
    """

    name: str
    model: ModelConfig
    cluster: Cluster
    training: Training
    considered: int
    choices: Sequence[Judged]
    too_large: Judged | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Judged:
        """The fastest that fits."""
        return self.choices[0]

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The keys of a config that trains the best layout."""
        placeholder = {"datasets": [{"path": "./data.jsonl", "type": "completion"}], "output_dir": "./outputs"}
        planned = {"base_model": base_model_of(self.name), "sequence_len": self.training.sequence_len}
        bf16 = self.training.dtype == "bfloat16"
        planned |= {"bf16": "full" if bf16 and self.training.stored == "bfloat16" else bf16} | self._optimizer
        given = {key: value for key, value in self.config.items() if key not in _LAYOUT_KEYS}
        assert self.best.layout is not None
        keys = placeholder | given | planned | self.best.layout.keys
        if kept := self._of_fsdp:
            keys["fsdp_config"] = kept | keys.get("fsdp_config", {})
        return keys

    @property
    def _of_fsdp(self) -> dict[str, Any]:
        """What the file asks of FSDP2 beside what a layout says of it."""
        given, said = self.config.get("fsdp_config"), ("reshard_after_forward", "offload_params", "sync_each_batch")
        kept = given.items() if isinstance(given, dict) else ()
        return {key: value for key, value in kept if str(key).removeprefix("fsdp_") not in said}

    @property
    def _optimizer(self) -> dict[str, Any]:
        """Its keys, as far as they are not of their default values."""
        name, options = self.training.optimizer, dict(self.training.optim_args)
        said = {} if name == ADAMW.name and "optimizer" not in self.config else {"optimizer": name}
        return said | ({"optim_args": options} if options else {})

    def to_yaml(self) -> str:
        """A config of the best layout, which `tessera train` takes once `datasets` names your data."""
        best = self.best
        said = [
            f"# {best.name}",
            f"# on {self.cluster}: {best.seconds:.3g} s a step ± {best.band:.0%}, "
            f"{best.tokens_per_second:,.0f} tokens/s, {best.bytes / 2**30:.1f} GiB a device ({best.verdict})",
        ]
        return "\n".join(said) + "\n" + yaml.safe_dump(self.keys, sort_keys=False, allow_unicode=True)


def base_model_of(name: str) -> str:
    """What `base_model` says of a model: the hub name of one that is known by another, else the name itself."""
    known = known_shape(name)
    return known.hub[0] if known is not None and known.hub else name


_LAYOUT_KEYS = (
    "dp_shard_size", "dp_replicate_size", "tensor_parallel_mode", "tensor_parallel_size", "tensor_parallel_mesh",
    "tensor_parallel_depth", "tensor_parallel_schedule", "tensor_parallel_slices", "context_parallel_size",
    "context_parallel_mode", "ulysses_size", "ulysses_chunks", "micro_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "fsdp_config", "activation_offloading", "sequence_parallel", "tiled_mlp",
    "tiled_mlp_num_shards", "optimizer", "optim_args",
)  # fmt: skip


def plan(
    model: str | Path | ModelConfig,
    cluster: str | Cluster,
    training: Training,
    *,
    top: int = TOP,
    trace: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """The best layouts for training `model` on all devices of `cluster`.

    `model` is a name, a size such as "70B", a folder, or a ModelConfig; `cluster` a text such as "2x8xH100". `config`:
    keys of a file, which `Plan.to_yaml` keeps. The memory of the first `trace` layouts is that of a traced step; one
    that does not fit then is left out. Raises UserError where nothing can be built, with the nearest that can.
    """
    of_kind("model", model, (str, Path, ModelConfig), 'a name, a size such as "70B", or a folder')
    of_kind("cluster", cluster, (str, Cluster), "for example 2x8xH100")
    of_kind("training", training, (Training,), "for example Training(4096, 256)")
    of_kind("config", {} if config is None else config, (Mapping,), "the keys of a file")
    top, trace = whole_number("top", top, 1), whole_number("trace", trace, 0)
    name = str(model) if isinstance(model, Path) else model
    return _verified(_compared(name, cluster, training, top, config), trace)


def check_dtype(key: str, dtype: str) -> None:
    """Raise UserError for a dtype of products that the trainer does not compute in."""
    if dtype not in TRAINED:
        raise UserError(key, dtype, "is none that the trainer computes in", either(TRAINED))


def _compared(
    model: str | ModelConfig, cluster: str | Cluster, training: Training, top: int, config: Mapping[str, Any] | None
) -> Plan:
    """The plan by closed forms."""
    name, model = (model, shape_of(model)) if isinstance(model, str) else (model.family, model)
    cluster = cluster_of(cluster) if isinstance(cluster, str) else cluster
    check_dtype("dtype", training.dtype)
    at_most("global_batch", training.global_batch, ROWS, "rows of a step")
    if cluster.devices < 1:
        raise UserError("--cluster", str(cluster), "names no number of machines", "2x8xH100, or --scaling 8,16,32")
    found = search(model, cluster.in_dtype(training.dtype), training)
    if not len(found):
        raise no_layout(model, cluster, training)
    chosen = _distinct(model, found, cluster, training, top)
    if not chosen:
        least = judge(model, found.layout(int(np.argmin(found.peak))), cluster, training)
        which = f"the smallest of {len(found):,} layouts"
        raise too_large_for(least.cluster, least.bytes, least.buffers, which, least.name)
    too_large, place = None, fastest_too_large(model, cluster, found)
    if place is not None:
        judged = judge(model, found.layout(place), cluster, training)
        faster = judged.seconds < chosen[0].seconds * (1 - DIFFERENCE)
        too_large = judged if faster and judged.verdict != "fits" else None
    return Plan(name, model, cluster, training, len(found), _explained(chosen), too_large, dict(config or {}))


def _verified(made: Plan, trace: int) -> Plan:
    """The plan with the first `trace` layouts traced, without those that then do not fit."""
    verified = [traced(made.model, judged) for judged in made.choices[:trace]]
    left = [judged for judged in [*verified, *made.choices[trace:]] if judged.verdict != "does not fit"]
    if not left:
        least = min(verified, key=lambda judged: judged.bytes)
        which = f"traced, the smallest of {len(verified)}"
        raise too_large_for(least.cluster, least.bytes, least.buffers, which, least.name)
    return replace(made, choices=_explained(left))


def _explained(choices: Sequence[Judged]) -> list[Judged]:
    """With what each after the first lost by."""
    best = replace(choices[0], lost="")
    return [best, *(replace(other, lost=why_slower(other, best)) for other in choices[1:])]


def _distinct(model: ModelConfig, found: Found, cluster: Cluster, training: Training, top: int) -> list[Judged]:
    """The fastest of each mesh, in order, as far as they fit when each is judged by itself.

    Of those that are equally fast the plainest comes first.
    """
    chosen: dict[tuple[tuple[str, int], ...], Judged] = {}
    for place in plainest_first(found):
        layout = found.layout(place)
        mesh = tuple(layout.sizes.items())
        if mesh in chosen:
            continue
        judged = judge(model, layout, cluster, training)
        if judged.verdict != "does not fit":
            chosen[mesh] = judged
        if len(chosen) == top:
            break
    return list(chosen.values())


def plainest_first(found: Found) -> Iterator[int]:
    """The places of what was timed, the fastest first, but of those that are as fast as the first the plainest."""
    timed = np.flatnonzero(np.isfinite(found.seconds))
    order = timed[np.argsort(found.seconds[timed], kind="stable")]
    near = order[found.seconds[order] <= found.seconds[order[:1]] * (1 + DIFFERENCE)][:LOOKED_AT]
    yield from sorted(map(int, near), key=lambda place: (found.layout(place).unusual, found.seconds[place]))
    yield from map(int, order[len(near) :])


def why_slower(other: Judged, best: Judged) -> str:
    """What costs `other` most against `best`, e.g. "+14% exposed along col"."""
    terms, base = other.time.terms, best.time.terms
    more = {name: (seconds - base.get(name, 0.0)) / best.seconds for name, seconds in terms.items()}
    name, share = max(more.items(), key=lambda item: item[1])
    memory = (other.bytes - best.bytes) / 2**30
    slower = other.seconds >= best.seconds * (1 + DIFFERENCE)
    said = [f"+{share:.1%} {name}"] if slower and share >= DIFFERENCE else ["as fast"]
    said += [f"{memory:+.1f} GiB"] if abs(memory) >= 1 else []
    return ", ".join(said)


def smallest(
    model: str | ModelConfig,
    cluster: Cluster,
    training: Training,
    tokens_per_second: float,
    devices: Sequence[int],
    *,
    top: int = TOP,
    trace: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of the smallest cluster that reaches the rate: of `devices`, ascending, then of whole machines between.

    The other arguments are those of `plan`. Raises UserError where none does.
    """
    known = shape_of(model) if isinstance(model, str) else model

    def fastest(count: int) -> Plan | None:
        try:
            return _compared(model, cluster.of(count), training, top, config)
        except UserError as error:
            if error.key != "--cluster":
                raise
            return None

    best, below, reaching = 0.0, 0, None
    for count in devices:
        if not buildable(known, count, training):
            continue
        found = fastest(count)
        best = max(best, found.best.tokens_per_second if found else 0.0)
        if found is not None and found.best.tokens_per_second >= tokens_per_second:
            reaching = found
            break
        below = count
    if reaching is None:
        reason = f"up to {max(devices)} devices reach {best:,.0f} tokens/s with {training.global_batch} rows a step"
        raise UserError("--target-tokens-per-second", tokens_per_second, reason, "a larger --global-batch, or less")
    machine = cluster.per_machine
    least, most = below // machine, count // machine
    while most - least > 1:  # machines; with fewer the rate is hardly ever higher
        between = (least + most) // 2
        found = fastest(between * machine) if buildable(known, between * machine, training) else None
        if found is not None and found.best.tokens_per_second >= tokens_per_second:
            most, reaching = between, found
        else:
            least = between
    return _verified(reaching, trace)
