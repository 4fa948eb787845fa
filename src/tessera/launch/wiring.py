"""Which GPU each rank of this machine takes: the order in which the axes that move most lie on the fastest links.

Decided once, by this machine's launcher, and handed to its ranks in their environment (`core.device.ORDER`): the
numbers of ranks stay, and with them coordinates, groups and results. It follows a profile that `tessera measure` kept
for these very GPUs, by their UUIDs, with the software of now; without one ranks take GPUs as CUDA counts them. What the
user has put into the variable stands. The launcher gives no GPU a context, so that it asks the driver who they are.
"""

import math
import os

import torch

from tessera.config.schema import TrainConfig
from tessera.core.axes import AXES
from tessera.core.device import ORDER, stack
from tessera.core.driver import Ask, gpus, nvidia_smi, visible
from tessera.core.mesh import Mesh
from tessera.models.config import ModelConfig
from tessera.plan.cluster import kept_profiles
from tessera.plan.machine import Profile
from tessera.plan.numbering import (
    busiest_first,
    device_order,
    link_rates,
    received_along,
    sizes_inside,
    slowest_link,
)
from tessera.plan.traffic import step_transfers
from tessera.train.links import best_numbering
from tessera.train.settings import parallel_for, step_shape


def wired_order(
    config: TrainConfig, model: ModelConfig, here: int, ask: Ask = nvidia_smi
) -> tuple[dict[str, str], list[str]]:
    """What to add to the environment of `here` ranks on this machine, and what to tell; nothing where links are alike.

    `config` has every size. Ranks that do not fill the machine along whole axes keep the usual order.
    """
    if here < 2 or ORDER in os.environ or torch.cuda.device_count() < here:
        return {}, []
    profile = _of_these_gpus(here, ask)
    if profile is None:
        return {}, []
    compute = torch.bfloat16 if config.bf16 else torch.float32  # auto too, which new GPUs have
    numbering = best_numbering(config, model, here, compute) if config.world_size > here else AXES
    inside = sizes_inside(config.mesh_sizes, here, numbering)
    parallel = parallel_for(config, model, Mesh(config.mesh_sizes, "meta", rank=0), compute=compute)
    received = received_along(step_transfers(model, step_shape(config, parallel), parallel))
    busiest = tuple(map(int, busiest_first(inside, received)))
    order = device_order(profile.pairs, tuple(inside.values()), busiest)
    if len(order) != here:
        return {}, []
    return ({} if order == tuple(range(here)) else {ORDER: ",".join(map(str, order))}), _told(
        profile, inside, busiest, order
    )


def _of_these_gpus(here: int, ask: Ask) -> Profile | None:
    """The newest profile of the first `here` GPUs with this software whose links differ."""
    fitting = [
        profile
        for profile in kept_profiles()
        if len(profile.devices) >= here
        and profile.stack == stack(gpu=True)
        and link_rates(profile.pairs, here) is not None
    ]
    if not fitting:
        return None  # and the driver is not asked
    mine = [_plain(gpu.uuid) for gpu in visible(gpus(ask), os.environ.get("CUDA_VISIBLE_DEVICES"))][:here]
    return next((profile for profile in fitting if list(map(_plain, profile.devices[:here])) == mine), None)


def _plain(uuid: str) -> str:
    """As torch says it: the driver puts GPU- before."""
    return uuid.removeprefix("GPU-").lower()


def _told(profile: Profile, inside: dict[str, int], busiest: tuple[int, ...], order: tuple[int, ...]) -> list[str]:
    """The order and why, the busiest axis first."""
    usual = tuple(range(len(order)))
    rates = link_rates(profile.pairs, len(order))
    assert rates is not None
    slowest, fastest = rates.min() / 1e9, rates[rates < math.inf].max() / 1e9
    why = f"links between GPUs differ ({slowest:.3g} to {fastest:.3g} GB/s, {profile.name})"
    if order == usual:
        return [f"GPUs: {why}; ranks take them in the usual order, none is better"]
    gains = []
    for place in busiest:
        axis, size = list(inside.items())[place]
        if size > 1:
            now, before = (slowest_link(profile.pairs, o, tuple(inside.values()), place) / 1e9 for o in (order, usual))
            gains.append(f"{axis} {size} on {now:.3g} GB/s" + (f", not {before:.3g}" if now != before else ""))
    return [f"GPUs: {why}; ranks take them in the order {', '.join(map(str, order))}: {'; '.join(gains)}"]
