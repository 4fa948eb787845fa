"""What NVIDIA's driver says of the GPUs of this machine: its tool `nvidia-smi` asked, its tables read. Needs no torch.

A machine without the tool, or one of another vendor, has no answers: every function then returns None or nothing.
"""

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PATIENCE = 20.0
"""Seconds that the driver may take for an answer; a GPU that has fallen off the bus can make it wait for ever."""

Ask = Callable[[Sequence[str]], str | None]
"""Runs `nvidia-smi` with these words; what it printed, or None where it failed or is not there."""


def nvidia_smi(words: Sequence[str]) -> str | None:
    """What `nvidia-smi` prints for these `words`; None where it is not there, fails, or takes longer than PATIENCE."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return done.stdout if done.returncode == 0 else None


_FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "power.limit",
    "power.default_limit",
    "ecc.errors.uncorrected.volatile.total",
    "mig.mode.current",
)
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Two names of one field: drivers before 535 know the second alone."""

IDLE = 0x1
SLOWED = {
    0x8: "the hardware slows it down",
    0x20: "it is too hot",
    0x40: "it is too hot for the hardware",
    0x80: "the power supply brakes it",
}
"""Bits of why a GPU's clocks are low, from nvml.h: those that no setting of a user asks for."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it; None where the driver does not say. Memory in bytes, clocks in MHz, power in W."""

    index: int
    uuid: str
    name: str
    driver: str
    memory: int | None = None
    used: int | None = None
    generation: int | None = None
    generation_most: int | None = None
    width: int | None = None
    width_most: int | None = None
    clock: int | None = None
    clock_most: int | None = None
    celsius: int | None = None
    power_limit: float | None = None
    power_default: float | None = None
    errors: int | None = None
    mig: bool = False
    reasons: int | None = None

    @property
    def idle(self) -> bool:
        """Whether its clocks, and its PCIe link with them, are low because nothing runs."""
        return bool((self.reasons or 0) & IDLE)

    @property
    def slowed(self) -> list[str]:
        """Why the GPU runs below the clocks that it could have, in words."""
        bits = self.reasons or 0
        if bits & (0x40 | 0x80):
            bits &= ~0x8  # which stands for both of them, and for others
        return [word for bit, word in SLOWED.items() if bits & bit]


def gpus(ask: Ask = nvidia_smi) -> list[Gpu]:
    """Every GPU that the driver has, whatever CUDA_VISIBLE_DEVICES says; empty where there is no driver."""
    for reasons in _REASONS:
        fields = (*_FIELDS, reasons)
        text = ask([f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
        if text is not None:
            rows = (dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in text.splitlines())
            return [_gpu(row, reasons) for row in rows if row.get("index", "").isdecimal()]
    return []


def _gpu(row: Mapping[str, str], reasons: str) -> Gpu:
    def number(field: str) -> float | None:
        found = re.fullmatch(r"\d+(\.\d+)?", row.get(field, ""))
        return float(found[0]) if found else None

    def whole(field: str, unit: int = 1) -> int | None:
        value = number(field)
        return None if value is None else int(value) * unit

    mask = row.get(reasons, "")
    return Gpu(
        int(row["index"]),
        row.get("uuid", ""),
        row.get("name", ""),
        row.get("driver_version", ""),
        memory=whole("memory.total", 2**20),
        used=whole("memory.used", 2**20),
        generation=whole("pcie.link.gen.current"),
        generation_most=whole("pcie.link.gen.max"),
        width=whole("pcie.link.width.current"),
        width_most=whole("pcie.link.width.max"),
        clock=whole("clocks.sm"),
        clock_most=whole("clocks.max.sm"),
        celsius=whole("temperature.gpu"),
        power_limit=number("power.limit"),
        power_default=number("power.default_limit"),
        errors=whole("ecc.errors.uncorrected.volatile.total"),
        mig=row.get("mig.mode.current") == "Enabled",
        reasons=int(mask, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", mask) else None,
    )


def cuda_of_driver(ask: Ask = nvidia_smi) -> tuple[int, int] | None:
    """The newest CUDA version that the driver serves, e.g. (12, 4); None where it does not say."""
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", ask([]) or "")
    return (int(found[1]), int(found[2])) if found else None


def visible(every: Sequence[Gpu], chosen: str | None) -> list[Gpu]:
    """Those of the driver's GPUs that CUDA counts, in its order; `chosen` is CUDA_VISIBLE_DEVICES (None: not set).

    As CUDA does, it stops at the first word that names no GPU. A MIG instance stands for its GPU; its UUID does not say
    for which, so it is taken to be of the first that is cut.
    """
    if chosen is None:
        return list(every)
    found: list[Gpu] = []
    for word in map(str.strip, chosen.split(",")):
        by_number = [gpu for gpu in every if str(gpu.index) == word]
        by_name = [gpu for gpu in every if word.startswith("GPU-") and gpu.uuid.startswith(word)]
        by_part = [gpu for gpu in every if gpu.mig and (word.startswith(f"MIG-{gpu.uuid}/") or _is_instance(word))]
        if not (by_number or by_name or by_part):
            break
        found += (by_number or by_name or by_part)[:1]
    return found


def _is_instance(word: str) -> bool:
    """Whether it is the UUID of a MIG instance, as drivers since 470 write it; before, it began with the GPU's."""
    return word.startswith("MIG-") and not word.startswith("MIG-GPU-")


NVLINK, PCIE = "NVLink", "PCIe"
_PCIE_WAYS = {
    "PIX": "one switch",
    "PXB": "several switches",
    "PHB": "the CPU's host bridge",
    "NODE": "host bridges of one NUMA node",
    "SYS": "the link between CPU sockets",
}


@dataclass(frozen=True)
class Link:
    """The best way between two GPUs: of kind NVLink, with how many links, or PCIe, through what.

    `word` is the driver's own: NV12, PHB.
    """

    word: str

    @property
    def kind(self) -> str:
        return NVLINK if self.lanes else PCIE

    @property
    def lanes(self) -> int:
        """The bonded NVLinks; 0 for PCIe."""
        return int(self.word[2:]) if re.fullmatch(r"NV\d+", self.word) else 0

    def __str__(self) -> str:
        return f"{NVLINK} × {self.lanes}" if self.lanes else f"{PCIE} through {_PCIE_WAYS[self.word]} ({self.word})"


def links(ask: Ask = nvidia_smi) -> dict[tuple[int, int], Link]:
    """The link of each pair of GPUs by the driver's numbers, the lower one first; empty where it does not say."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", ask(["topo", "-m"]) or "")
    rows = [line.split() for line in text.splitlines()]
    columns: list[int] = []
    found: dict[tuple[int, int], Link] = {}
    for words in rows:
        numbers = [int(word[3:]) if re.fullmatch(r"GPU\d+", word) else -1 for word in words]
        if not words or numbers[0] < 0:
            continue
        if not columns:
            columns = [number for number in numbers if number >= 0]  # the heading, whose first words are the GPUs
            continue
        for other, word in zip(columns, words[1:], strict=False):
            if numbers[0] < other and (word in _PCIE_WAYS or re.fullmatch(r"NV\d+", word)):
                found[numbers[0], other] = Link(word)
    return found
