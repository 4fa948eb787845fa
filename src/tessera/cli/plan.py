"""`tessera plan`: which layout, does it fit, how fast, why."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tessera.cli.advice import advice_on, gib, remedy_lines
from tessera.cli.quoted import tables
from tessera.cli.scaling import scaling
from tessera.cli.subject import NO_DATA
from tessera.config.load import make_config
from tessera.config.reader import parse_yaml
from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import check_target, read_text
from tessera.core.text import counted
from tessera.engine.optimizer import NAMES
from tessera.plan.choice import Training
from tessera.plan.cluster import cluster_of, profile_named
from tessera.plan.fit import memory_remedies, most_that_fits
from tessera.plan.host import room_on_host
from tessera.plan.machine import Cluster
from tessera.plan.one_product import cuts_of
from tessera.plan.recommend import Judged, Plan, check_dtype, plan, smallest
from tessera.plan.trace import plot_timeline
from tessera.sizes import bounds
from tessera.sizes.numbers import either


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    cluster: str
    sequence_len: int | None
    global_batch: int | None
    dtype: str | None
    optimizer: str | None
    config: Path | None
    top: int
    trace: int
    plot: Path | None
    matmul: str | None
    devices: int
    as_json: bool
    target: float | None
    tokens: str | None
    price: float | None
    profile: str | None
    overrides: Sequence[str]
    output: Path | None
    scaling: str | None = None
    tables: bool = False


def plan_command(subject: str | None, asked: Asked) -> None:
    """Plan a model, or judge a config, and print it."""
    if asked.tables:
        tables(asked.output)
        return
    if asked.matmul is not None:
        _print_cuts(asked.matmul, asked.devices)
        return
    if subject is None:
        raise UserError("MODEL", None, "is what to plan", "for example 8B, a folder, run.yaml; or --matmul M,N,K")
    if asked.tokens is not None:
        number_of_tokens(asked.tokens)  # refused before the search
    if asked.price is not None and not 0 <= asked.price < 1e15:
        raise UserError("--price", asked.price, "is no price of an hour", "for example 2.5")
    for key, path in (("--output", asked.output), ("--plot", asked.plot)):
        if path is not None and asked.scaling is None:
            check_target(path, key)
    profile = profile_named(asked.profile) if asked.profile else None
    cluster = cluster_of(asked.cluster, profile)
    if subject.endswith((".yaml", ".yml")):
        _judge(Path(subject), asked, cluster)
        return
    base, training = _asked_training(subject, asked)
    if asked.scaling is not None:
        scaling(subject, cluster, training, asked.scaling, asked.output)
        return
    if asked.target is not None:
        if not 0 < asked.target < 1e15:
            reason = "is no number of tokens a second"
            raise UserError("--target-tokens-per-second", asked.target, reason, "for example 100000")
        made = smallest(
            subject,
            cluster,
            training,
            asked.target,
            _growing(cluster),
            top=asked.top,
            trace=asked.trace,
            config=base,
        )
    else:
        made = plan(subject, cluster, training, top=asked.top, trace=asked.trace, config=base)
    if asked.plot is not None and made.best.traced is not None:
        plot_timeline(made.best.traced, asked.plot, cluster.profile.memory_bytes)
    if asked.output is not None:
        asked.output.write_text(made.to_yaml())
    if asked.as_json:
        terminal.say(json.dumps(as_json(made) | _lasting(made.best, asked), indent=1))
        return
    console = terminal.console(markup=False)
    title = f"{subject} on {made.cluster}: {made.considered:,} layouts of {made.cluster.devices} devices"
    console.print(_table(title, made.choices))
    for line in [*_named(made.choices), "", *explained(made.best), *_unfitting(made), *_duration(made.best, asked)]:
        console.print(line, soft_wrap=True)
    if asked.plot is not None:
        console.print(f"drawn into {asked.plot}: what is alive around the peak")
    if asked.output is not None:
        console.print(f"wrote {asked.output}")
    else:
        console.print("\n" + made.to_yaml(), soft_wrap=True)


def _print_cuts(sizes: str, devices: int) -> None:
    """The best mesh of each depth for one product, and the best of all."""
    words = sizes.split(",")
    numbers = [int(word) for word in words if word.strip().isdecimal() and 0 < int(word) <= bounds.TOKENS]
    if len(words) != 3 or len(numbers) != 3:
        raise UserError("--matmul", sizes, "are the rows M, outputs N and inputs K of a product", "8192,28672,8192")
    T, N, K = numbers
    cuts = cuts_of(T, N, K, devices)
    if not cuts:
        reason = f"no mesh of {devices} devices divides M, N and K"
        raise UserError("--devices", devices, reason, "a number whose factors divide all three")
    table = Table(title=f"Y[{T}, {N}] = X[{T}, {K}] W over {devices} devices: millions of elements received")
    for name in ("inner", "depth", "row", "col", "X", "W", "Y", "sum of dW over depth", "received", "held"):
        table.add_column(name, justify="right")
    best = {cut.depth: cut for cut in reversed(cuts)}  # the cuts are sorted, so the best of each depth comes last
    for cut in sorted(best.values(), key=lambda cut: cut.received):
        moved = (cut.x, cut.w, cut.y, cut.replicas, cut.received, cut.held)
        table.add_row(*map(str, cut[:4]), *(f"{elements / 1e6:.2f}" for elements in moved))
    console = terminal.console(markup=False)
    console.print(table)
    console.print(f"the best of {len(cuts)} meshes copies W {cuts[0].depth} times", soft_wrap=True)


def _judge(path: Path, asked: Asked, cluster: Cluster) -> None:
    """A given config on the cluster."""
    from tessera.config.load import load_config
    from tessera.train.foresee import foresee, layout_of
    from tessera.train.run import model_of

    config, notes = load_config(path, asked.overrides)
    model = model_of(config)
    judged = foresee(config, model, cluster)
    if 0 < cluster.devices < judged.devices:
        said = f"the file's sizes make {judged.devices} ranks, and {cluster} has {counted(cluster.devices, 'device')}"
        notes = [*notes, f"{said}: judged on as many machines as they need, {judged.cluster}"]
    advice = advice_on(model, *layout_of(config, model, cluster), judged)
    if asked.as_json:
        about = {"cluster": str(judged.cluster), "devices": judged.devices, "notes": list(notes)}
        terminal.say(json.dumps(about | _judged_json(judged) | advice.json | _lasting(judged, asked), indent=1))
        return
    console = terminal.console(markup=False)
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(_table(f"{path} on {judged.cluster}", [judged]))
    for line in [*_named([judged]), "", *explained(judged), *_duration(judged, asked), *advice.lines]:
        console.print(line, soft_wrap=True)


def _asked_training(subject: str, asked: Asked) -> tuple[dict[str, Any], Training]:
    """The keys of --config, and what is trained: as the options say, else as that file does, else as is usual.

    Raises UserError, or ConfigError with every problem of the file.
    """
    from tessera.train.settings import check_optim_args

    keys: dict[str, Any] = {}
    if asked.config is not None:
        keys = parse_yaml(read_text(asked.config, "--config"), str(asked.config))
        if not isinstance(keys, dict):
            raise UserError("--config", asked.config, "is no mapping of keys", "a YAML file as tessera train takes")
    config, _ = make_config({"base_model": subject, "datasets": [{"path": NO_DATA}]} | keys, str(asked.config))
    check_optim_args(config)
    if asked.optimizer is not None and asked.optimizer not in NAMES:
        raise UserError("--optimizer", asked.optimizer, "is no optimizer", either(NAMES))
    if asked.dtype is not None:
        check_dtype("--dtype", asked.dtype)
    rows = config.micro_batch_size * config.gradient_accumulation_steps * math.prod(config.data_sizes.values())
    own = asked.optimizer in (None, config.optimizer)
    training = Training(
        asked.sequence_len or (config.sequence_len if "sequence_len" in keys else 4096),
        asked.global_batch or (rows if "micro_batch_size" in keys else 256),
        asked.dtype or ("float32" if config.bf16 is False else "bfloat16"),
        "bfloat16" if config.full_bf16 else "float32",
        asked.optimizer or config.optimizer,
        (config.optim_args or {}) if own else {},
    )
    return keys, training


def _growing(cluster: Cluster) -> list[int]:
    """Numbers of devices to try, smallest first: parts of a machine, then whole machines, twice as many each time."""
    parts = [n for n in (1, 2, 4, 8, 16) if n < cluster.per_machine]
    return [*parts, *(cluster.per_machine * 2**power for power in range(11))]


def _table(title: str, judged: Sequence[Judged]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "s/step", "tokens/s", "MFU", "exposed", "GiB", "memory", "against the first"):
        table.add_column(name, justify="left" if name in ("memory", "against the first") else "right")
    for place, each in enumerate(judged, start=1):
        table.add_row(
            str(place),
            f"{each.seconds:.3g} ±{each.band:.0%}",
            f"{each.tokens_per_second:,.0f}",
            f"{each.mfu:.0%}",
            f"{each.time.communication / each.seconds:.0%}",
            gib(each.bytes),
            each.verdict + ("" if each.traced is None else ", traced"),
            each.lost,
        )
    return table


def _named(judged: Sequence[Judged]) -> list[str]:
    """The layouts of the table, a line each."""
    return [f"{place:>2}  {each.name}" for place, each in enumerate(judged, start=1)]


def explained(judged: Judged) -> list[str]:
    """Every term of the time and of the memory, in lines."""
    terms = [(name, seconds) for name, seconds in judged.time.terms.items() if abs(seconds) >= 5e-4 * judged.seconds]
    lines = ["time of a step:"]
    lines += [f"  {name:28}{1e3 * seconds:12.1f} ms {seconds / judged.seconds:7.1%}" for name, seconds in terms]
    peak = judged.peak if judged.traced is None else judged.traced.peak
    lines.append(
        f"memory at the peak ({peak.moment or 'estimated'}), of {gib(judged.cluster.profile.memory_bytes)} GiB:"
    )
    for name in ("states", "activations", "gathered", "working"):
        lines.append(f"  {name:28}{gib(getattr(peak, name)):>12} GiB")
    if judged.buffers:
        lines.append(f"  {'NCCL, beside the peak':28}{gib(judged.buffers):>12} GiB, by published figures, not measured")
    profile = judged.cluster.profile
    if judged.host_bytes:
        more = ", which is more than four fifths of it" if judged.host_bytes > room_on_host(profile) else ""
        of_host = f"GiB of a device's {gib(profile.host_memory_bytes)}{more}"
        lines.append(f"  {'in host memory':28}{gib(judged.host_bytes):>12} {of_host}")
    source = "measured" if profile.measured else "published figures; tessera measure takes those of your machine"
    return [*lines, f"rates of {profile.name}: {source}; half of the band {judged.band:.0%}"]


def _unfitting(made: Plan) -> list[str]:
    """The fastest that does not fit, and what would have to change for it."""
    if made.too_large is None or made.too_large.layout is None:
        return []
    judged, best = made.too_large, made.best
    device = made.cluster.profile.memory_bytes
    faster, room = 1 - judged.seconds / best.seconds, most_that_fits(device, judged.buffers)
    lines = [
        f"{faster:.0%} faster, but it does not surely fit: {judged.name}",
        f"  {gib(judged.bytes)} GiB, and up to {gib(room)} of {gib(device)} surely fit",
    ]
    layout = judged.layout
    assert layout is not None
    remedies = memory_remedies(made.model, layout, made.training, made.cluster.profile)
    return lines + remedy_lines([each for each in remedies if not each.refused][:3])


def _lasting(judged: Judged, asked: Asked) -> dict[str, float]:
    """How long a number of tokens takes, and what that costs; empty where none is asked for."""
    if asked.tokens is None:
        return {}
    tokens = number_of_tokens(asked.tokens)
    seconds = tokens / judged.tokens_per_second
    hours = seconds / 3600 * judged.devices
    lasting = {"tokens": tokens, "days": seconds / 86400, "device_hours": hours}
    return lasting | ({} if asked.price is None else {"cost": hours * asked.price})


def _duration(judged: Judged, asked: Asked) -> list[str]:
    """The same as a line."""
    lasting = _lasting(judged, asked)
    if not lasting:
        return []
    said = f"{asked.tokens} tokens: {lasting['days']:,.1f} days, {lasting['device_hours']:,.0f} device hours"
    return [said + (f", {lasting['cost']:,.0f} at {asked.price:g} an hour" if "cost" in lasting else "")]


def number_of_tokens(text: str) -> float:
    """`1T`, `300B`, `5e9`. Raises UserError for what is none of these."""
    scales = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}
    scale = scales.get(text[-1:].upper())
    try:
        number = float(text[:-1] if scale else text) * (scale or 1.0)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e18:
        raise UserError("--tokens", text, "is no number of tokens", "for example 300B or 1T")
    return number


def as_json(made: Plan) -> dict[str, Any]:
    """A plan as JSON values; times in seconds, memory in bytes."""
    choices = [_judged_json(each) for each in made.choices]
    too_large = None if made.too_large is None else _judged_json(made.too_large)
    about = {"model": made.name, "cluster": str(made.cluster), "considered": made.considered}
    return {**about, "choices": choices, "too_large": too_large}


def _judged_json(judged: Judged) -> dict[str, Any]:
    return {
        "layout": judged.name,
        "keys": judged.layout.keys if judged.layout else {},
        "seconds": judged.seconds,
        "half_band": judged.band,
        "terms": judged.time.terms,
        "tokens_per_second": judged.tokens_per_second,
        "mfu": judged.mfu,
        "memory": asdict(judged.peak) | {"total": judged.peak.total},
        "traced": None if judged.traced is None else asdict(judged.traced.peak) | {"total": judged.bytes},
        "library_buffers": judged.buffers,
        "host_bytes": judged.host_bytes,
        "verdict": judged.verdict,
        "lost": judged.lost,
    }
