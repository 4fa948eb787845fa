"""Whether a step fits into a device's memory, and what lowers what it holds, each with its saving, by the closed form.

    fits            1.03 · estimate / 0.85 + 1 GiB + buffers <= the device's memory
    may fit         the estimate alone is below it
    does not fit    it is not

1.03: the formula is held to within 3% of the traced step (tests/plan/test_peak.py). 0.85: torch's allocator reserves
more than is alive at once, for what is free lies in pieces. 1 GiB: the driver's context, and what libraries take for
themselves; `buffers` are those of the communication library (plan/buffers.py). So an estimate of up to four fifths
of a device with 80 GB fits: of 454 published runs none that was estimated so ran out of memory.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from tessera.core.axes import DATA_AXES, MODEL_AXES, SEQUENCE_AXES
from tessera.core.errors import UserError
from tessera.layout.resolve import check_layout
from tessera.layout.streams import joins_rows
from tessera.models.config import ModelConfig
from tessera.models.sharing import surroundings
from tessera.plan.choice import Layout, Training
from tessera.plan.host import host_bytes, room_on_host
from tessera.plan.machine import Profile
from tessera.plan.peak import RESERVED, peak_bytes
from tessera.sizes.context import fitted
from tessera.sizes.rules import TensorParallel

MARGIN, USED = 1.03, 0.85
Verdict = Literal["fits", "may fit", "does not fit"]


def fits(estimate_bytes: int, device_bytes: int, buffers: int = 0) -> Verdict:
    """Whether a peak of so many bytes fits into a device of `device_bytes`, beside `buffers`; the rule is above."""
    if estimate_bytes <= most_that_fits(device_bytes, buffers):
        return "fits"
    return "may fit" if estimate_bytes < device_bytes else "does not fit"


def most_that_fits(device_bytes: int, buffers: Any = 0) -> Any:
    """The largest estimate in bytes that surely fits; `buffers` may be those of many candidates."""
    room = (device_bytes - RESERVED - buffers) * USED / MARGIN
    return np.maximum(0, np.floor(room)).astype(np.int64) if isinstance(room, np.ndarray) else max(0, math.floor(room))


class Remedy(NamedTuple):
    """Keys of the YAML with other values, the bytes that a rank's peak falls by, and what else they mean.

    `refused`: why these keys cannot be had; they save nothing then.
    """

    keys: dict[str, Any]
    saved: int
    meaning: str
    refused: str = ""


def memory_remedies(
    model: ModelConfig, layout: Layout, training: Training, profile: Profile | None = None
) -> list[Remedy]:
    """What lowers the peak of `layout`, the greatest saving first: each change by itself, by the closed form.

    Left out is what saves nothing. Last come those that are refused: by the model or the mesh, or because the host of a
    device of `profile` has no room. The global batch stays as it is.
    """
    found = [remedy for remedy, _ in _weighed(model, layout, training, profile)]
    return sorted(found, key=lambda remedy: (remedy.refused != "", -remedy.saved))


def remedies_together(
    model: ModelConfig, layout: Layout, training: Training, profile: Profile, buffers: int = 0
) -> tuple[dict[str, Any], int]:
    """The keys of several changes on the same devices, and the peak in bytes with all of them.

    They are taken one after the other, always that which saves most, until the step surely fits a device of `profile`
    beside `buffers`, or nothing is left that saves any.
    """
    keys: dict[str, Any] = {}
    peak = checked_peak(model, layout, training)
    while peak > most_that_fits(profile.memory_bytes, buffers):
        every = _weighed(model, layout, training, profile)
        own = [(remedy, other) for remedy, other in every if not remedy.refused and other.devices == layout.devices]
        if not own:
            break
        remedy, layout = max(own, key=lambda each: each[0].saved)
        keys, peak = keys | remedy.keys, peak - remedy.saved
    return keys, peak


def _weighed(
    model: ModelConfig, layout: Layout, training: Training, profile: Profile | None
) -> Iterator[tuple[Remedy, Layout]]:
    """Each change that saves memory or is refused, with the layout that it makes."""
    now = checked_peak(model, layout, training)
    for keys, other, meaning in _changes(layout):
        try:
            other = _sharing_as_asked(model, other)
            saved, refused = now - checked_peak(model, other, training), ""
        except UserError as error:
            saved, refused = 0, error.reason
        if not refused and profile is not None:
            on_host, room = _on_host(model, other, training), room_on_host(profile)
            if on_host > room:
                refused = f"{on_host / 2**30:.1f} GiB in host memory, and {room / 2**30:.1f} of a device may be taken"
        if refused or saved > 0:
            yield Remedy(keys, 0 if refused else saved, meaning, refused), other


def _sharing_as_asked(model: ModelConfig, layout: Layout) -> Layout:
    """With the ring and ulysses that a config of its sizes takes: where it leaves them open, they follow the sizes."""
    if layout.context.size == 1:
        return layout
    around = surroundings(model, layout.tensor.axes, layout.micro_batch)
    context = fitted(replace(layout.beside.context, size=layout.context.size), around)
    return replace(layout, sizes={**layout.sizes, **context.sizes})


def _on_host(model: ModelConfig, layout: Layout, training: Training) -> int:
    parallel = layout.parallel(model, training)
    shape = layout.shape(training, parallel)
    return int(host_bytes(model, shape, parallel, offload=layout.offload_params, update=training.update))


def checked_peak(model: ModelConfig, layout: Layout, training: Training) -> int:
    """Bytes of the peak on rank 0 by formula. Raises UserError where sizes do not fit, with the nearest that do."""
    data = {axis: layout.size(axis) for axis in (*DATA_AXES, *SEQUENCE_AXES)}
    check_layout(layout.tensor, data, model.dimensions, layout.micro_batch)
    parallel = layout.parallel(model, training)
    if layout.context.size > 1 or joins_rows(layout.tensor.axes, layout.micro_batch, model.dimensions):
        _check_shared(model, layout)
    shape = layout.shape(training, parallel)
    return int(peak_bytes(model, shape, parallel, offload=layout.offload_params, update=training.update).total)


def _check_shared(model: ModelConfig, layout: Layout) -> None:
    if model.attention_dropout:
        reason = "shares sequences between ranks, and the model drops attention probabilities"
        raise UserError("context_parallel_size", layout.context.size, reason, "attention_dropout 0 in config.json")
    fitted(layout.context, surroundings(model, layout.tensor.axes, layout.micro_batch))


_Change = tuple[dict[str, Any], Layout, str]


def _changes(layout: Layout) -> Iterator[_Change]:
    yield from _of_fsdp(layout)
    yield from _of_layers(layout)
    if layout.micro_batches > 1:
        rows = layout.micro_batch * layout.micro_batches
        keys = {"micro_batch_size": rows, "gradient_accumulation_steps": 1}
        whole = replace(layout, micro_batch=rows, micro_batches=1)
        kept = _served(layout) and not layout.sync_each_batch
        more = "FSDP2 keeps no whole gradients between micro-batches" if kept else "larger products"
        yield keys, whole, f"the numbers stay; {more}"
    if layout.micro_batch % 2 == 0:
        times = 2 * layout.micro_batches
        keys = {"micro_batch_size": layout.micro_batch // 2, "gradient_accumulation_steps": times}
        half = replace(layout, micro_batch=layout.micro_batch // 2, micro_batches=times)
        yield keys, half, "the numbers stay; smaller products"
    if (axes := _twice_the_tensor_axes(layout)) is not None:
        yield from _wider({"tensor_parallel_size": math.prod(axes.values())}, layout, axes)
    size = 2 * layout.context.size
    yield from _wider({"context_parallel_size": size}, layout, {"ring": 2 * layout.size("ring")})


def _twice_the_tensor_axes(layout: Layout) -> dict[str, int] | None:
    """The axes of twice the tensor size, where the size alone names them."""
    asked, axes = layout.beside.tensor, {axis: layout.size(axis) for axis in MODEL_AXES}
    if asked.mesh is not None:
        return None
    if asked.axes != axes:  # a search's layout, in whose config 1d alone has no mesh
        asked = TensorParallel()
        if layout.mode != "1d":
            return None
    try:
        return replace(asked, size=2 * math.prod(axes.values())).axes
    except UserError:
        return None


def _wider(keys: dict[str, Any], layout: Layout, axes: dict[str, int]) -> Iterator[_Change]:
    """With these axes: on the same devices, taken from a data axis, with more micro-batches; or on twice as many."""
    halved = [axis for axis in DATA_AXES if layout.size(axis) % 2 == 0]
    for axis in halved:
        size, times = layout.size(axis) // 2, 2 * layout.micro_batches
        own = keys | {_KEYS[axis]: size, "gradient_accumulation_steps": times}
        other = replace(layout, sizes={**layout.sizes, **axes, axis: size}, micro_batches=times)
        yield own, other, "on the same devices; the numbers stay"
    if not halved:
        yield keys, replace(layout, sizes={**layout.sizes, **axes}), "on twice as many devices"


_KEYS = {"replicate": "dp_replicate_size", "shard": "dp_shard_size"}


def _of_fsdp(layout: Layout) -> Iterator[_Change]:
    if layout.size("replicate") % 2 == 0:
        sizes = {"replicate": layout.size("replicate") // 2, "shard": 2 * layout.size("shard")}
        keys = {_KEYS[axis]: size for axis, size in sizes.items()}
        yield keys, replace(layout, sizes={**layout.sizes, **sizes}), "states are cut over twice as many devices"
    if not layout.reshard:
        keys = {"fsdp_config.reshard_after_forward": True}
        yield keys, replace(layout, reshard=True), "weights are gathered again for the backward"
    served = _served(layout)
    if served and layout.micro_batches > 1 and not layout.sync_each_batch:
        meaning = "gradients are summed after every micro-batch; no whole ones are kept between them"
        yield {"fsdp_config.sync_each_batch": True}, replace(layout, sync_each_batch=True), meaning
    if served and not layout.offload_params:
        keys = {"fsdp_config.offload_params": True}
        yield keys, replace(layout, offload_params=True), "the update runs on the host"


def _served(layout: Layout) -> bool:
    """Whether FSDP2 holds the states."""
    return layout.size(*DATA_AXES, *SEQUENCE_AXES) > 1


def _of_layers(layout: Layout) -> Iterator[_Change]:
    """Gradient checkpointing, offloaded activations, the MLP in tiles: the numbers stay."""
    ways = {
        True: ("true", False, "layers run again: a third more products"),
        "selective": ("selective", False, "layers run again, attention does not"),
        "offload": ("true", True, "layers run again; their inputs travel to the host"),
    }
    for value, (recompute, offload, meaning) in ways.items():
        other = replace(layout, recompute=recompute, offload=offload)
        if other != layout:
            yield {"gradient_checkpointing": value}, other, meaning
    if layout.recompute == "false" and not layout.offload:
        meaning = "what layers keep travels to the host and back"
        yield {"activation_offloading": True}, replace(layout, offload=True), meaning
    if layout.tiles == 1:
        yield {"tiled_mlp": True}, replace(layout, tiles=None), "the MLP runs again, tile by tile"
