"""The one place that knows kinds of devices: which one a rank uses, its backend, its dtype, its memory."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from tessera.core.errors import UserError
from tessera.core.text import counted

ORDER = "TESSERA_DEVICE_ORDER"
"""The GPUs that the ranks of a machine take, as CUDA counts them, e.g. 0,2,1,3; the launcher sets it where that helps
(launch/wiring.py)."""


def local_device() -> torch.device:
    """The device of this process: its GPU when there is one for it, the CPU otherwise. UserError: ORDER is no order."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if (text := os.environ.get(ORDER)) and "LOCAL_RANK" in os.environ:
            index = _ordered(text)[index]
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


def _ordered(text: str) -> list[int]:
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
    words = [word.strip() for word in text.split(",")]
    if sorted(words) != sorted(map(str, range(here))):
        hint = f"each of 0 to {here - 1} once, e.g. {','.join(map(str, range(here)))}, or unset it"
        raise UserError(ORDER, text, f"is no order of the {here} GPUs that the ranks here take", hint)
    return list(map(int, words))


def identity(device: torch.device) -> str | None:
    """What tells a GPU from every other of its kind: the driver's UUID; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def stack(*, gpu: bool) -> str:
    """The software that rates depend on: torch, on GPUs NCCL, and the system where it is not Linux."""
    text = f"torch {torch.__version__}"
    if gpu:
        text += f" NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return text if platform.system() == "Linux" else f"{text} {platform.system()}"


def backend(device: torch.device) -> str:
    """The torch.distributed backend that serves tensors of `device` (and CPU tensors beside them)."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, float32: as people and config.json write it."""
    return str(dtype).removeprefix("torch.")


def prepare(device: torch.device, *, tf32: bool) -> None:
    """Settings of this process that training wants on `device`; call once, before the first tensor."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    elif platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h)."""


def _keep_freed_memory() -> None:
    """Have malloc keep what is freed, so that the next step uses the same pages again.

    By itself glibc maps each large tensor anew and unmaps it when it is freed, so the system clears its pages again in
    every step: 73,000 page faults and 5% of the time in a step of 4 layers with 1024 tokens' logits of 32000
    (`python benchmarks/page_faults.py`). The price: the process keeps the memory of its peak until it ends, the user's
    own process too where it trains alone.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # no block has a mapping of its own
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap does not shrink


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products run on `device` without emulation worth avoiding (on CPUs: never chosen by itself)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def has_tf32(device: torch.device) -> bool:
    """Whether float32 products on `device` can use TF32 tensor cores: on NVIDIA GPUs from Ampere on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU so far; on CPU the peak resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage's maximum: on Linux a process begins with that of the one which started it
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        import resource  # Unix alone has it

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_memory_bytes(device: torch.device) -> int:
    """Bytes allocated on a GPU now; on CPU what this process holds that is no file's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024
    except (OSError, IndexError):  # no Linux: the peak is all that is told
        return peak_memory_bytes(device)


def memory_bytes(device: torch.device) -> int | None:
    """The bytes that a GPU has; None for a CPU, whose memory other processes share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def host_memory_bytes() -> int:
    """The memory of this machine, whoever uses it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores_here() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_missing(ranks: int) -> int:
    """How many GPUs this machine is short of one for each of `ranks`; 0 where it has none at all."""
    return max(0, ranks - torch.cuda.device_count()) if torch.cuda.is_available() else 0


def profiled_activities(device: torch.device) -> list[ProfilerActivity]:
    """What torch's profiler watches in a process that computes on `device`."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reads_grouped_heads(q: Tensor) -> bool:
    """Whether a fused attention kernel for `q` reads grouped kv heads as they are: on GPUs none does in float32."""
    return not (q.is_cuda and q.dtype == torch.float32)


def describe(device: torch.device) -> str:
    """A name for logs and result files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {counted(torch.get_num_threads(), 'thread')} a rank"


def hardware(device: torch.device) -> str:
    """The name of the hardware alone, the same for every run: that of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^(?:model name|Model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return f"CPU {model[1].strip() if model else platform.processor() or platform.machine()}"


# Dense bf16 peak of one device in TFLOP/s, from the vendors' data sheets; the first that a device's name holds counts.
_PEAK_TFLOPS = {
    "A100": 312,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "GB200": 2500,
    "B200": 2250,
    "MI300X": 1307,
    "L40S": 362,
    "4090": 165,
}


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Dense operations a second that `device` is sold with; None where the table has no such device or dtype."""
    name = describe(device)
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return next((tera * 1e12 for known, tera in _PEAK_TFLOPS.items() if known in name), None)


def stay_on_cpu_without_gpus(ranks: int) -> None:
    """Hide the GPUs of this machine from the run when there are some, but fewer than ranks."""
    if gpus_missing(ranks):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
