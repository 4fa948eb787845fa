"""What ranks of the pool do: measure this machine, with sizes so small that it takes a moment."""

import torch

from tessera.core.mesh import Mesh
from tessera.measure.compute import Sizes
from tessera.measure.links import KINDS, _call, _groups
from tessera.measure.session import Amount, measured_profile
from tessera.measure.steps import Size, lower_quartiles, small_steps, timed_steps
from tessera.measure.timing import Effort, Timer
from tessera.plan.machine import written_profile

TINY = Amount(
    Effort(1e-4, 2), Sizes([(8, 16, 16), (16, 16, 16), (32, 16, 16)], 2**10, 2**8, [(1, 2, 16, 8)]), (64, 256), 256
)


def profile_here():
    mesh = Mesh({"shard": torch.distributed.get_world_size()})
    profile, lines = measured_profile(mesh, TINY, 1, "2026-11-29")
    return written_profile(profile), lines, torch.get_num_threads()


def received_by_each_kind(here):
    """Bytes that the recorder counts in each kind of call, beside what the measurement takes them for."""
    from tessera.core.collectives import Recorder

    mesh, found = Mesh({"shard": torch.distributed.get_world_size()}), []
    for level, group in _groups(mesh, here):
        for kind in KINDS:
            call, received = _call(kind, group, 8, mesh.device)
            with Recorder() as recorder:
                for _ in range(group.size):  # each rank is the root once
                    call()
            counted = sum(record.received for record in recorder.records)
            calls = len([record for record in recorder.records if record.kind == kind])
            found.append((level, kind, group.size, counted / group.size, received, calls == group.size))
    return found


def what_slows_is_seen():
    """Seconds of a call that takes a while on every rank, and of one that does so on the last rank alone."""
    import time

    mesh = Mesh({"shard": torch.distributed.get_world_size()})
    timer, slow = Timer(mesh, Effort(0.05, 3)), lambda: time.sleep(0.01)
    last = mesh.rank == mesh.world - 1
    return [timer.time(slow).seconds, timer.time(slow if last else None).seconds]


def tiny_steps():
    """Seconds of the steps of a tiny model, their names, and how many ranks begin together."""
    mesh = Mesh({"shard": torch.distributed.get_world_size()})
    steps = small_steps(mesh.world, gpu=False, models=[Size(32, 1, 4, 4, 2, 16, 64)])
    return lower_quartiles(timed_steps(steps, mesh, rounds=2)), [str(step) for step in steps], mesh.world
