"""What the shell lets a process have (ulimit): open files, processes, locked memory, sizes of files."""

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass

from tessera.core.text import human
from tessera.doctor.finding import Finding

Limits = Mapping[str, tuple[int, int]]
"""By name, the limit of now and the one up to which the user may raise it; -1: none."""

_KINDS = {
    "open files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "file size": resource.RLIMIT_FSIZE,
    "core file": resource.RLIMIT_CORE,
}
_LETTERS = {"open files": "n", "processes": "u", "locked memory": "l", "file size": "f", "core file": "c"}
UNLIMITED = resource.RLIM_INFINITY

FILES_OF_A_RANK, FILES_OF_A_PEER = 128, 16
"""Open files of one rank: its own (of torch, the data, a save), and for each rank the connections along each axis.

Twice what was counted and more: at most 25, 46 and 70 in runs of 2, 4 and 8 ranks (tensor axes, with FSDP2, with
HSDP), of their launchers 31."""
THREADS_OF_A_RANK = 64
"""Threads of one rank beside those that compute; in the same runs it had at most 9, 18 and 24."""


@dataclass(frozen=True)
class Needs:
    """What a run asks of the limits: ranks on this machine, the bytes of its largest file (None: not known), whether
    the network reads memory of the GPUs itself (RDMA), and whether limits on processes hold for this user."""

    ranks: int
    largest_file: int | None = None
    rdma: bool = False
    root: bool = False


def own_limits() -> Limits:
    """The limits of this process."""
    return {name: resource.getrlimit(kind) for name, kind in _KINDS.items()}


def is_root() -> bool:
    """Whether this process is root's, whom the limit on processes does not hold."""
    return os.geteuid() == 0


def limit_findings(limits: Limits, needs: Needs) -> list[Finding]:
    """A finding for each limit."""
    files = FILES_OF_A_RANK + FILES_OF_A_PEER * needs.ranks
    processes = THREADS_OF_A_RANK * needs.ranks
    found = [_counted("open files", limits, files, needs.ranks)]
    if needs.root:
        found.append(Finding("processes", "ok", "not limited for root"))
    else:
        found.append(_counted("processes", limits, processes, needs.ranks))
    now = limits["locked memory"][0]
    if needs.rdma and now != UNLIMITED:
        mend = f"{_raise('locked memory', limits, None)}; in a container --ulimit memlock=-1"
        text = f"at most {human(now)}: InfiniBand cannot register the buffers of NCCL"
        found.append(Finding("locked memory", "wrong", text, mend))
    else:
        found.append(Finding("locked memory", "ok", _bytes(now)))
    now, largest = limits["file size"][0], needs.largest_file
    if now != UNLIMITED and (largest is None or largest > now):
        what = "a checkpoint may be larger" if largest is None else f"a file of the run has {human(largest)}"
        found.append(
            Finding("file size", "wrong", f"at most {human(now)}: {what}", _raise("file size", limits, largest))
        )
    else:
        found.append(Finding("file size", "ok", _bytes(now)))
    core = limits["core file"][0]
    found.append(Finding("core file", "ok", _bytes(core) if core else "none is left by a crash"))
    return found


def _counted(name: str, limits: Limits, needed: int, ranks: int) -> Finding:
    now = limits[name][0]
    if now == UNLIMITED or now >= needed:
        return Finding(name, "ok", "not limited" if now == UNLIMITED else f"at most {now:,}")
    text = f"at most {now:,}, and up to {needed:,} may be used with {ranks} rank{'s' * (ranks != 1)} on this machine"
    return Finding(name, "wrong", text, _raise(name, limits, needed))


def _raise(name: str, limits: Limits, needed: int | None) -> str:
    """The command that raises a limit, or who may raise it; `needed` in units or bytes, None for all there is."""
    most, letter = limits[name][1], _LETTERS[name]
    if most == UNLIMITED or needed is not None and most >= needed:
        unit = {"l": 1024, "f": 1024}.get(letter, 1)
        value = "unlimited" if needed is None or letter == "f" else -(-needed // unit)
        return f"ulimit -{letter} {value} before the run"
    most_words = f"{most:,}" if letter in "nu" else human(most)
    return f"only root may raise it above {most_words} (/etc/security/limits.conf, LimitNOFILE= of a service)"


def _bytes(limit: int) -> str:
    return "not limited" if limit == UNLIMITED else f"at most {human(limit)}"
