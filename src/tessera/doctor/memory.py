"""The memory of a machine: of the host, of its control group, what processes share, and what a run needs of it."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tessera.core import exhausted
from tessera.core.driver import Gpu
from tessera.core.text import human
from tessera.doctor.finding import Finding, State, read

SHARED = 2**30
"""Bytes of /dev/shm that several GPUs of a machine may take: NCCL exchanges through it what NVLink does not carry."""
FULL = 0.95
"""The share of /dev/shm in use from which it is called full."""
SWAPPED = 2**30
BUSY = 2**30
"""Bytes in use on a GPU above which somebody else computes there; a desktop takes less."""
CONTEXT = 2**30
"""Bytes of a GPU that torch and NCCL take beside tensors."""


@dataclass(frozen=True)
class Need:
    """What a run takes on this machine by formula: the bytes of one rank, how many ranks, and the key that lowers it
    most, in words."""

    rank: int
    ranks: int
    on_gpu: bool
    less: str = ""


def host_findings(
    need: Need | None,
    several_gpus: bool,
    files: Callable[[str], str | None] = read,
    free: Callable[[], int | None] = exhausted.host_bytes_free,
    limit: Callable[[], int | None] = exhausted.group_limit,
    shared: Callable[[], tuple[int, int] | None] = lambda: room_of("/dev/shm"),
) -> list[Finding]:
    """The host's memory, the limit of its control group, what is swapped out, and /dev/shm."""
    told = {name: int(value) * 1024 for name, value in re.findall(r"(\w+): +(\d+) kB", files("/proc/meminfo") or "")}
    left, whole, most = free(), told.get("MemTotal"), limit()
    found = []
    if left is None or whole is None:
        found.append(Finding("host", "unknown", "the kernel does not say how much memory there is"))
    else:
        text = f"{human(left)} of {human(whole)} free"
        if most is not None and most < whole:
            text += f", this control group (container, job) gets {human(most)}"
        found.append(_enough("host", text, left, need if need and not need.on_gpu else None))
    used = told.get("SwapTotal", 0) - told.get("SwapFree", 0)
    if used > SWAPPED:
        text = f"{human(used)} of memory are on disk: whoever needs them waits"
        found.append(Finding("swap", "slow", text, "end what else needs memory, then swapoff -a && swapon -a"))
    return [*found, _shared(shared(), several_gpus)]


def _shared(room: tuple[int, int] | None, several_gpus: bool) -> Finding:
    """Judge /dev/shm by the bytes that are free there and all."""
    name = "/dev/shm"
    if room is None:
        return Finding(name, "unknown", "is not there")
    left, whole = room
    text = f"{human(left)} of {human(whole)} free"
    emptied = "remove what programs that were killed have left there (ls -l /dev/shm)"
    if several_gpus and left < SHARED:
        larger = "docker run --shm-size=8g (or --ipc=host), mount -o remount,size=8g /dev/shm"
        text += ": NCCL may not get the memory through which GPUs exchange"
        return Finding(name, "wrong", text, larger if whole < SHARED else emptied)
    if whole - left > FULL * whole:
        return Finding(name, "slow", f"{text}: what lies there takes the host's memory", emptied)
    return Finding(name, "ok", text)


def room_of(path: str) -> tuple[int, int] | None:
    """The bytes that this user may still write to the file system at `path`, and all; None where there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def gpu_findings(gpus: Sequence[Gpu], need: Need | None) -> list[Finding]:
    """The memory of each GPU that the driver tells of."""
    found = []
    for gpu in gpus:
        name = f"GPU {gpu.index}"
        if gpu.memory is None or gpu.used is None:
            found.append(Finding(name, "unknown", "the driver does not say how much memory is free"))
            continue
        left = gpu.memory - gpu.used
        text = f"{human(left)} of {human(gpu.memory)} free"
        if gpu.used > BUSY:
            judged = _enough(name, text, left - CONTEXT, need if need and need.on_gpu else None)
            mend = "nvidia-smi names the processes that hold it: end them, or choose others (CUDA_VISIBLE_DEVICES)"
            state: State = "wrong" if judged.state == "wrong" else "slow"
            found.append(Finding(name, state, f"{judged.text}; another process holds the rest", mend))
        else:
            found.append(_enough(name, text, left - CONTEXT, need if need and need.on_gpu else None))
    return found


def _enough(name: str, text: str, left: int, need: Need | None) -> Finding:
    if need is None:
        return Finding(name, "ok", text)
    together = need.rank if need.on_gpu else need.rank * need.ranks
    each = "" if need.on_gpu else f" ({need.ranks} × {human(need.rank)})" if need.ranks > 1 else ""
    text = f"{text}; by formula this run holds {human(together)}{each} at its peak"
    if together > left:
        return Finding(name, "wrong", text, need.less or "fewer rows, a shorter sequence_len, or more ranks")
    return Finding(name, "ok", text)
