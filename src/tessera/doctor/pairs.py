"""How fast every pair of ranks exchanges: measured by real processes, through the door that training uses.

    python -P -m tessera.doctor.pairs       one rank, started by `measured`

One pair exchanges at a time while the others wait. Of several round trips the fastest counts: what else the
machine does makes some of them slow, and nothing makes one fast. On GPUs the messages are NCCL's, on CPUs gloo's.
"""

import itertools
import os
import signal
import socket
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from tessera.core import device as devices
from tessera.core.collectives import all_reduce, gathered, start_exchange
from tessera.core.mesh import Group, Mesh
from tessera.launch.launch import variables
from tessera.launch.machines import Machines, Place
from tessera.launch.rank import as_rank, handed
from tessera.launch.workers import Restarts, environment, run_workers

CPU_BYTES, GPU_BYTES = 4 * 2**20, 128 * 2**20
"""Bytes of a message: large enough that the time to begin does not count."""
ROUNDS, SMALL_ROUNDS = 5, 20
PATIENCE = 180
"""Seconds after which a rank ends, whatever it waits for; by then pairs that work have long exchanged."""
TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class End:
    """Where a rank is: its machine, and its GPU as CUDA counts them there (None: on the CPU)."""

    machine: str
    gpu: int | None


@dataclass(frozen=True)
class Pair:
    """Two ranks, the lower one first: bytes a second one way, and seconds that a message without content takes."""

    first: int
    second: int
    rate: float
    latency: float


@dataclass(frozen=True)
class Measured:
    """Each rank's place, and every pair of them."""

    ends: list[End]
    pairs: list[Pair]


_JSON = TypeAdapter(Measured)


def measured(processes: int, place: Place | None = None, folder: Path | None = None) -> Measured | None:
    """Measure all pairs of `processes` ranks on each machine; None but on machine 0. Raises RunFailed, UserError.

    `place` says which machine this is; on several `folder`, which all see, is where they leave their token.
    """
    place = place or Place()
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # what does not go is told by the error
    with redirect_stdout(sys.stderr):  # the results are for stdout
        around = variables(place) | quiet
    with TemporaryDirectory(prefix="tessera-doctor-") as name, environment(around):
        file = Path(name, "pairs.json")
        with Machines(place, processes, folder) as machines:
            words = ["-P", "-m", "tessera.doctor.pairs"]
            run_workers(words, processes, machines, Restarts(handed=lambda _: str(file)))
        return _JSON.validate_json(file.read_bytes()) if place.rank == 0 else None


def measure_pairs(mesh: Mesh, size: int) -> Measured:
    """Measure on every rank of `mesh`, with messages of `size` bytes; each returns all of it."""
    group = mesh.group(mesh.present(mesh.numbering))
    if group is None:
        raise ValueError("one rank alone has nobody to exchange with")
    gpu = mesh.device.index if mesh.device.type == "cuda" else None
    machine = f"machine {os.environ.get('GROUP_RANK', '0')}, {socket.gethostname()}"  # names may be alike
    ends = gathered(End(machine, gpu), mesh.world)
    memory = torch.ones(size // 4, device=mesh.device)
    found = []
    for first, second in itertools.combinations(range(mesh.world), 2):
        _all_here(mesh, group)
        if mesh.rank in (first, second):
            other = second if mesh.rank == first else first
            _fastest(memory[:1], other, mesh.rank == first, group, 1)  # the first message makes the connection
            latency = _fastest(memory[:1], other, mesh.rank == first, group, SMALL_ROUNDS) / 2
            trip = _fastest(memory, other, mesh.rank == first, group, 1 + ROUNDS)
            if mesh.rank == first:
                found.append(Pair(first, second, 2 * memory.nbytes / trip, latency))
    every = itertools.chain.from_iterable(gathered(found, mesh.world))
    return Measured(ends, sorted(every, key=lambda pair: (pair.first, pair.second)))


def _all_here(mesh: Mesh, group: Group) -> None:
    """Wait for every rank: reading a number waits for what its device was given before."""
    all_reduce(torch.zeros(1, device=mesh.device), group).item()


def _fastest(x: torch.Tensor, other: int, begins: bool, group: Group, rounds: int) -> float:
    """Seconds of the fastest of so many round trips of `x` with the rank `other`."""
    took = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for sends in (begins, not begins):
            message = [(x, other)]
            there, back = start_exchange(message if sends else [], [] if sends else message, group)
            for pending in (*there, *back):
                pending.wait()
        x[0].item()
        took.append(time.perf_counter() - begun)
    return min(took)


def _on_rank(file: Path) -> None:
    signal.alarm(PATIENCE)  # ends this process even where it waits inside a library
    device = devices.local_device()
    devices.prepare(device, tf32=False)
    dist.init_process_group(devices.backend(device), timeout=TIMEOUT)
    try:
        mesh = Mesh({"shard": dist.get_world_size()}, device)
        found = measure_pairs(mesh, GPU_BYTES if device.type == "cuda" else CPU_BYTES)
        if mesh.rank == 0:
            file.write_bytes(_JSON.dump_json(found))
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


if __name__ == "__main__":
    as_rank(lambda ours: _on_rank(Path(handed())))
