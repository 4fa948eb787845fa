"""The devices of a machine: its cores and GPUs, how each GPU runs, and whether torch sees what the driver has."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tessera.core.device import cores_here
from tessera.core.driver import Gpu
from tessera.core.text import counted, human
from tessera.doctor.finding import Finding, read


@dataclass(frozen=True)
class Torch:
    """What torch is and sees: its version, the CUDA it is built for (None: for CPUs), GPUs, and how it may talk."""

    version: str
    cuda: str | None
    gpus: int
    backends: tuple[str, ...]
    nccl: str = ""


def torch_here() -> Torch:
    """Of this process; no GPU is given a context."""
    import torch
    import torch.distributed as dist

    backends = ["gloo"] if dist.is_available() and dist.is_gloo_available() else []
    nccl = ""
    if dist.is_available() and dist.is_nccl_available():
        backends.append("nccl")
        with suppress(AttributeError, RuntimeError):
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Torch(torch.__version__, torch.version.cuda, torch.cuda.device_count(), tuple(backends), nccl)


def cpu_findings(files: Callable[[str], str | None] = read, allowed: int | None = None) -> list[Finding]:
    """The processor, and how many of its cores this process may use: by affinity, and by its control group."""
    model = re.search(r"^(?:model name|Model)\s*: (.*)$", files("/proc/cpuinfo") or "", re.MULTILINE)
    there, mine = os.cpu_count() or 1, cores_here() if allowed is None else allowed
    name = f"{model[1].strip()}, " if model else ""
    text = f"{name}{counted(there, 'core')}"
    found = []
    if mine < there:
        text += f", {mine} for this process"
        mend = "start it without taskset, or ask the batch system for more cores (--cpus-per-task)"
        found.append(Finding("cpu", "slow" if mine == 1 else "ok", text, mend if mine == 1 else ""))
    else:
        found.append(Finding("cpu", "ok", text))
    quota = _quota(files)
    if quota is not None and quota < mine:
        text = f"the control group (container, job) gives {quota:g} of them: whoever uses more stands still"
        mend = f"OMP_NUM_THREADS={max(1, int(quota))} for all ranks together, or docker run --cpus={mine}"
        found.append(Finding("cpu quota", "slow", text, mend))
    return found


def _quota(files: Callable[[str], str | None]) -> float | None:
    """The cores that a control group gives, of version 2 or 1; None for no limit."""
    words = (files("/sys/fs/cgroup/cpu.max") or "").split()
    if not words:
        folder = "/sys/fs/cgroup/cpu"
        words = [(files(f"{folder}/cpu.cfs_{name}_us") or "").strip() for name in ("quota", "period")]
    if all(word.isdecimal() for word in words) and len(words) == 2 and int(words[1]):
        return int(words[0]) / int(words[1])
    return None


def gpu_findings(
    every: Sequence[Gpu], usable: Sequence[Gpu], torch: Torch, served: tuple[int, int] | None, order: str = ""
) -> list[Finding]:
    """The GPUs of the driver, of which `usable` are those that CUDA_VISIBLE_DEVICES leaves; why torch sees fewer.

    `served` is the newest CUDA version that the driver serves, `order` what CUDA_DEVICE_ORDER says.
    """
    if not every:
        told = f"torch sees {counted(torch.gpus, 'GPU')}, of which nvidia-smi tells nothing" if torch.gpus else "none"
        return [Finding("GPUs", "unknown" if torch.gpus else "ok", told)]
    found = []
    # of GPUs that are cut CUDA gives a process one instance, however many there are
    if torch.gpus < len(usable) and not (torch.gpus and any(gpu.mig for gpu in usable)):
        found.append(_unseen(len(usable), torch, served))
    elif len(usable) < len(every):
        text = f"CUDA_VISIBLE_DEVICES leaves {len(usable)} of the driver's {len(every)}"
        found.append(Finding("GPUs", "ok", text, "unset it to use all"))
    if len({gpu.name for gpu in usable}) > 1:
        kinds = ", ".join(sorted({gpu.name for gpu in usable}))
        text = f"they are of several kinds ({kinds}): all wait for the slowest"
        found.append(Finding("GPUs", "slow", text, "choose those of one kind (CUDA_VISIBLE_DEVICES)"))
    if len({gpu.name for gpu in every}) > 1 and order != "PCI_BUS_ID":
        text = "of several kinds, CUDA counts the fastest first, the driver and these lines by bus: numbers may differ"
        found.append(Finding("GPUs", "unknown", text, "CUDA_DEVICE_ORDER=PCI_BUS_ID"))
    for gpu in usable:
        found += _one(gpu, alone=torch.gpus == 1)
    return found


def _unseen(usable: int, torch: Torch, served: tuple[int, int] | None) -> Finding:
    text = f"the driver has {counted(usable, 'GPU')}, torch sees {torch.gpus or 'none'}"
    if torch.cuda is None:
        return Finding("GPUs", "wrong", f"{text}: {torch.version} is built for CPUs", "install torch for CUDA")
    built = tuple(map(int, torch.cuda.split(".")[:2]))
    if served is not None and built > served and built[0] > served[0]:
        mend = f"install a newer driver, or torch built for CUDA {served[0]}.x"
        text = f"{text}: it is built for CUDA {torch.cuda}, and the driver serves {served[0]}.{served[1]}"
        return Finding("GPUs", "wrong", text, mend)
    mend = "look whether this user may open /dev/nvidia* (docker run --gpus all; a batch job: --gpus-per-node)"
    return Finding("GPUs", "wrong", text, mend)


def _one(gpu: Gpu, alone: bool) -> list[Finding]:
    """A line for the GPU, and one for each thing that is wrong with it; `alone`: torch sees no other device."""
    name = f"GPU {gpu.index}"
    told = [gpu.name]
    if gpu.memory is not None:
        told.append(human(gpu.memory))
    if gpu.clock is not None and gpu.clock_most is not None:
        told.append(f"{gpu.clock:,} of {gpu.clock_most:,} MHz{', idle' if gpu.idle else ''}")
    if gpu.celsius is not None:
        told.append(f"{gpu.celsius} °C")
    if gpu.width is not None and gpu.generation is not None:
        told.append(f"PCIe {gpu.generation} × {gpu.width}")
    found = []
    if gpu.slowed:
        at = "" if gpu.celsius is None else f" at {gpu.celsius} °C"
        clock = "" if gpu.clock is None else f", clock {gpu.clock:,} of {gpu.clock_most or gpu.clock:,} MHz"
        mend = "look at fans, air and power supply (nvidia-smi -q -d PERFORMANCE,TEMPERATURE); all ranks wait for it"
        found.append(Finding(name, "slow", f"{' and '.join(gpu.slowed)}{at}{clock}", mend))
    if gpu.power_limit and gpu.power_default and gpu.power_limit < 0.99 * gpu.power_default:
        text = f"limited to {gpu.power_limit:.0f} W, where {gpu.power_default:.0f} W are usual"
        found.append(Finding(name, "slow", text, f"nvidia-smi -i {gpu.index} -pl {gpu.power_default:.0f}"))
    if gpu.width is not None and gpu.width_most is not None and gpu.width < gpu.width_most:
        text = f"{gpu.width} of {gpu.width_most} PCIe lanes"
        found.append(Finding(name, "slow", text, "seat the card anew, or in a slot with all lanes"))
    if not gpu.idle and (gpu.generation or 99) < (gpu.generation_most or 0):  # an idle one saves power so
        text = f"PCIe generation {gpu.generation}, where {gpu.generation_most} is possible"
        found.append(Finding(name, "slow", text, "look at the slot's setting in the firmware, and at riser cables"))
    if gpu.errors:
        text = f"{counted(gpu.errors, 'memory error')} that could not be corrected since the driver was loaded"
        found.append(Finding(name, "wrong", text, f"leave it out, and nvidia-smi --gpu-reset -i {gpu.index}"))
    if gpu.mig and alone:
        found.append(Finding(name, "ok", "cut into MIG instances, of which this process has one: enough for one rank"))
    elif gpu.mig:
        text = "cut into MIG instances, between which NCCL does not exchange"
        found.append(Finding(name, "wrong", text, f"nvidia-smi -i {gpu.index} -mig 0, or train on one instance alone"))
    return [Finding(name, "ok", ", ".join(told)), *found]
