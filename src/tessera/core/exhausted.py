"""Memory that has run out: which errors mean it, how much was asked for, and how much there is."""

import errno
import os
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.core.text import human

if TYPE_CHECKING:
    import torch

_SIGNS = (  # of torch's allocators, C++ and cuBLAS, which raise plain RuntimeErrors
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "ALLOC_FAILED",
)
_ASKED = re.compile(r"(?:tried|Tried|Unable) to allocate ([\d.]+) ?(bytes|B|[KMGT]iB)")
_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
RAN_OUT = "memory ran out"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a GPU, ran out."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def memory_in_words(error: BaseException, device: "torch.device | None" = None) -> str:
    """One line: of what memory, how many bytes were asked for, and how many are free."""
    text = str(error)
    on_gpu = device is not None and device.type == "cuda" and ("CUDA" in text or "CUBLAS" in text)
    asked = _ASKED.search(text)
    told = [f"{human(float(asked[1]) * _UNITS[asked[2]])} asked for"] if asked else []
    with suppress(RuntimeError, OSError, ValueError):  # a GPU may have lost its context with the memory
        if on_gpu:
            import torch  # a launcher, which asks how many the kernel has killed, does without it

            free: int | None = torch.cuda.mem_get_info(device)[0]
        else:
            free = host_bytes_free()
        told += [] if free is None else [f"{human(free)} free"]
    memory = f"GPU {device.index or 0}" if device is not None and on_gpu else "the host"
    return f"{RAN_OUT} on {memory}" + (f": {', '.join(told)}" if told else "")


def host_bytes_free() -> int | None:
    """What this process can still allocate: of the machine, of its control group, of ulimit -v; None: unknown."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        found.append(int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024)
    for folder in _groups():
        for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):
                found.append(int((folder / most).read_text()) - int((folder / now).read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError, IndexError):
            found.append(limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found)) if found else None


def group_limit() -> int | None:
    """The bytes that the control group of this process (a container, a batch job) may have; None: no limit is seen."""
    found = []
    for folder in _groups():
        for most in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                found.append(int((folder / most).read_text()))
    return min(found) if found else None


def kernel_kills() -> int:
    """How many processes the kernel has killed for memory so far, in this control group or else on this machine."""
    events = [folder / name for folder in _groups() for name in ("memory.events", "memory.oom_control")]
    for file in [*events, Path("/proc/vmstat")]:
        with suppress(OSError, ValueError, IndexError):
            return int(re.findall(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)[0])
    return 0


def _groups() -> list[Path]:
    """The folders of this process's memory control group, of version 2 and of version 1."""
    root, found = Path("/sys/fs/cgroup"), []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                found += [root / kinds / path.lstrip("/"), root / kinds]  # in a container the path may be the host's
    return found
