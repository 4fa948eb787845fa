"""The fastest step on a mesh that is given: its micro-batch, what is recomputed, whether weights are kept.

Stages of a pipeline are by formula alone, as no schedule of them is implemented: a stage has an equal share of the
layers and, as the longest does, the head. 1F1B keeps what min(stages, micro-batches) micro-batches save for their
backward (Narayanan et al. 2021, SC'21, section 2.2.1), and time.Pipeline has what its stages wait.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from tessera.core.axes import DATA_AXES, MODEL_AXES
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.streams import joins_rows
from tessera.models.config import ModelConfig
from tessera.plan.buffers import library_bytes
from tessera.plan.calibrate import corrected, place_of
from tessera.plan.candidates import Found
from tessera.plan.choice import RECOMPUTES, Layout, Training
from tessera.plan.fit import fits
from tessera.plan.flops import step_flops
from tessera.plan.machine import LARGEST, Cluster
from tessera.plan.peak import peak_bytes
from tessera.plan.recommend import Judged, judge, plainest_first
from tessera.plan.time import Pipeline, step_time
from tessera.plan.work import machines_of, step_work
from tessera.sizes.numbers import divisors_of
from tessera.sizes.rules import Ask, TensorParallel, first_misfit, modes_with

TOO_LARGE = "does not fit"
"""The verdict of `fits` on a layout whose estimate is above the device's memory."""


def fastest_on(
    model: ModelConfig, sizes: Mapping[str, int], cluster: Cluster, training: Training, stages: int = 1
) -> Judged | None:
    """The fastest step of `training` on a mesh of these axes, times so many stages; None where nothing divides.

    Where nothing surely fits the devices' memory, of what may fit; where nothing may, the fastest with unlimited
    memory, whose verdict is `TOO_LARGE`. It covers every micro-batch and value of gradient_checkpointing, and weights
    kept or not; products are gathered in one piece.
    """
    verdicts = ("fits", "may fit", TOO_LARGE)
    for least in range(len(verdicts)):
        found = _fastest_within(verdicts[: least + 1], model, sizes, cluster, training, stages)
        if found is not None:
            return found
    return None


def fastest_found(found: Found, sizes: Mapping[str, int]) -> tuple[bool, Layout | None]:
    """Of a search's candidates with these axes: whether there are any, and the fastest that fits the devices' memory.

    Products are gathered in one piece, as in `fastest_on`.
    """
    plain = [switches.schedule == "gather" and switches.slices == 1 for switches in found.switches]
    chosen = np.array(plain, bool)[found.which]
    for axis, n in found.sizes.items():
        chosen &= n == sizes.get(axis, 1)
    places = np.flatnonzero(chosen)
    if not len(places):
        return False, None
    best = int(places[np.argmin(found.seconds[places])])
    return True, found.layout(best) if np.isfinite(found.seconds[best]) else None


def plainest(found: Found) -> Layout | None:
    """The fastest candidate that fits; of equally fast ones the plainest, as `recommend.plan` does. None: none fits."""
    first = next(plainest_first(found), None)
    return None if first is None else found.layout(first)


def without_limit(cluster: Cluster) -> Cluster:
    """The same devices, each with more memory than any layout needs."""
    return replace(cluster, profile=replace(cluster.profile, memory_bytes=LARGEST))


def _fastest_within(
    verdicts: Sequence[str],
    model: ModelConfig,
    sizes: Mapping[str, int],
    cluster: Cluster,
    training: Training,
    stages: int,
) -> Judged | None:
    """The fastest of those that have one of the `verdicts`."""
    data = prod(sizes.get(axis, 1) for axis in DATA_AXES)
    if training.global_batch % data or model.num_layers % stages:
        return None
    found: list[Judged] = []
    for batch in divisors_of(training.global_batch // data):
        if not _takes(model, sizes, batch):
            continue
        layout = Layout(sizes, batch, training.global_batch // (data * batch))
        found += _least_recomputed(verdicts, model, layout, cluster, training, stages)
    return min(found, key=lambda judged: judged.seconds, default=None)


def _takes(model: ModelConfig, sizes: Mapping[str, int], batch: int) -> bool:
    """Whether the model and the micro-batch divide (sizes/rules.py); ranks that share rows take no dropout."""
    axes = {axis: sizes.get(axis, 1) for axis in MODEL_AXES}
    modes = modes_with(axes)
    if not modes or first_misfit(Ask(TensorParallel(modes[0], mesh=axes), model.dimensions, batch)):
        return False
    return model.attention_dropout == 0 or not joins_rows(axes, batch, model.dimensions)


def _least_recomputed(
    verdicts: Sequence[str], model: ModelConfig, layout: Layout, cluster: Cluster, training: Training, stages: int
) -> list[Judged]:
    """With weights kept and gathered again, each with as little recomputed as fits; empty where nothing fits."""
    leanest = _judged(model, replace(layout, recompute=RECOMPUTES[-1]), cluster, training, stages)
    if leanest.verdict not in verdicts:
        return []
    found = []
    for reshard in (False, True):
        for recompute in RECOMPUTES:
            asked = replace(layout, recompute=recompute, reshard=reshard)
            judged = _judged(model, asked, cluster, training, stages)
            if judged.verdict in verdicts:
                found.append(judged)
                break
        if found and recompute == RECOMPUTES[0]:
            break  # there is nothing to gain by gathering again
    return found


def _judged(model: ModelConfig, layout: Layout, cluster: Cluster, training: Training, stages: int) -> Judged:
    """A layout in so many stages, of which each has the mesh of `layout`."""
    if stages == 1:
        return judge(model, layout, cluster, training)
    stage = replace(model, num_layers=model.num_layers // stages)
    layout = replace(layout, sizes={"pp": stages, **layout.sizes})
    parallel = layout.parallel(model, training)
    shape = layout.shape(training, parallel)
    mesh = parallel.mesh
    message = _residual_bytes(model, shape, parallel)
    pipeline = Pipeline(stages, machines_of(("pp",), mesh, cluster.per_machine), message)
    work = step_work(stage, shape, parallel, cluster.per_machine)
    buffers = library_bytes((each.transfer for each in work.moved), mesh, cluster.profile, cluster.per_machine)
    time = step_time(work, cluster.profile, pipeline)
    time = corrected(time, place_of(stage, shape, parallel, stages), cluster.profile)
    peak = peak_bytes(stage, shape, parallel)
    peak = replace(peak, activations=peak.activations * min(stages, layout.micro_batches))
    flops = step_flops(model, [training.sequence_len]) * training.global_batch
    verdict = fits(int(peak.total), cluster.profile.memory_bytes, buffers)
    name = f"{stages} stages by formula × {layout}"
    return Judged(name, layout.devices, training, cluster, peak, time, flops, verdict, layout, buffers=buffers)


def _residual_bytes(model: ModelConfig, shape: StepShape, parallel: Parallel) -> Any:
    """Bytes of the residual stream of a micro-batch on this rank: what a stage sends to the next."""
    features = model.hidden_size // parallel.mesh.size(parallel.residual.features)
    return shape.tokens_on(parallel.mesh, parallel.residual.tokens) * features * parallel.compute.itemsize
