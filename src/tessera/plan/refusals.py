"""What a plan that cannot be is refused with: the reason, and the nearest that can."""

from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.plan.candidates import buildable
from tessera.plan.choice import Training
from tessera.plan.fit import most_that_fits
from tessera.plan.machine import Cluster


def no_layout(model: ModelConfig, cluster: Cluster, training: Training) -> UserError:
    """That no layout of all devices divides the model and the batch, with numbers of devices that do."""
    near = [n for n in range(cluster.devices - 1, 0, -1) if buildable(model, n, training)][:1]
    reason = (
        f"no mesh of {cluster.devices} devices divides the model's widths and heads and {training.global_batch} rows"
    )
    hint = f"{near[0]} devices, or a --global-batch that divides by {cluster.devices}" if near else "fewer devices"
    return UserError("--cluster", str(cluster), reason, hint)


def too_large_for(cluster: Cluster, peak: int, buffers: int, which: str, name: str) -> UserError:
    """That nothing fits: the smallest layout, called `name`, has a `peak` of so many bytes.

    `which`: of how many it is the smallest; `buffers`: bytes of the communication library beside it.
    """
    device = cluster.profile.memory_bytes
    needed, has = peak / 2**30, device / 2**30
    reason = f"nothing fits: {which} needs {needed:.1f} GiB of {has:.1f} on a device ({name})"
    room = max(1, most_that_fits(device, buffers))
    need = -(-peak * cluster.devices // room)
    hint = f"about {need} such devices, or a shorter --sequence-len"
    return UserError("--cluster", str(cluster), reason, hint)
