"""The clocks of a machine: the wall clock, the timer that programs read, how fast and how freely its cores run."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.core.text import counted
from tessera.doctor.finding import Finding, read

Read = Callable[[str], str | None]
"""The text of a file, or None."""

DAY = 86400
OLDEST = 15 * 365 * DAY
"""Seconds since the installed packages were written after which the wall clock is not believed."""
SLACK = 300
"""Seconds that a file's time may lie ahead: of a network file system whose server's clock differs a little."""
FAST_TIMERS = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "timebase")
STOLEN = 0.05
"""The share of the cores' time that a hypervisor may give to others."""


def wall_clock(now: float, written: Sequence[float]) -> Finding:
    """Judge the wall clock `now` (seconds since 1970) by when files of the installed packages were `written`."""
    newest, today = max(written, default=0.0), _day(now)
    mend = "set it (timedatectl set-ntp true, or chronyc makestep); a container has its host's clock"
    why = "files would seem new or old that are not, and the lock of output_dir goes by their age"
    if now < newest - SLACK:
        text = f"it says {today}, and packages here were installed on {_day(newest)}, later than that: {why}"
        return Finding("wall clock", "wrong", text, mend)
    if newest and now > newest + OLDEST:
        years = int((now - newest) / (365 * DAY))
        text = f"it says {today}, {years} years after the packages here were installed ({_day(newest)}): {why}"
        return Finding("wall clock", "wrong", text, mend)
    return Finding("wall clock", "ok", f"{today}, not before what is installed here")


def times_of_packages() -> list[float]:
    """When files of Tessera and torch were written, which is surely past."""
    import torch

    files = [Path(__file__), Path(torch.__file__), Path(torch.__file__).with_name("version.py")]
    return [file.stat().st_mtime for file in files if file.exists()]


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def timer(files: Read = read) -> Finding:
    """How programs read the time: asking a chip for it costs a hundred times what a register does."""
    name = (files("/sys/devices/system/clocksource/clocksource0/current_clocksource") or "").strip()
    if not name:
        return Finding("timer", "unknown", "the kernel does not say which one programs read")
    if name in FAST_TIMERS:
        return Finding("timer", "ok", name)
    text = f"{name}: each look at the time is a system call to a slow chip"
    return Finding("timer", "slow", text, "boot with tsc=reliable, or ask who runs the machine why it left tsc")


def governor(files: Read = read) -> Finding:
    """How the kernel chooses the frequency of the cores."""
    folder = "/sys/devices/system/cpu/cpu0/cpufreq"
    name = (files(f"{folder}/scaling_governor") or "").strip()
    driver = (files(f"{folder}/scaling_driver") or "").strip()
    if not name:
        return Finding("frequency of cores", "unknown", "left to the hardware, or to the host of this machine")
    if name == "powersave" and driver not in ("intel_pstate", "amd-pstate-epp"):  # with these it follows the load
        mend = "cpupower frequency-set -g performance"
        return Finding("frequency of cores", "slow", f"governor {name}: the lowest there is", mend)
    return Finding("frequency of cores", "ok", f"governor {name} ({driver or 'unknown driver'})")


@dataclass(frozen=True)
class Ticks:
    """What the cores did since the start, in ticks of /proc/stat: all, and what a hypervisor gave to others."""

    all: int
    stolen: int


def ticks(files: Read = read) -> Ticks | None:
    """The counters of now; None where the kernel has none."""
    found = re.match(r"cpu +([\d ]+)", files("/proc/stat") or "")
    if not found:
        return None
    counts = [int(word) for word in found[1].split()][:8]  # guests' time is in user time already
    return Ticks(sum(counts), counts[7] if len(counts) == 8 else 0)


def stolen(before: Ticks | None, after: Ticks | None) -> Finding:
    """The share of the cores that a hypervisor gave to other machines between two looks."""
    name = "stolen time"
    if before is None or after is None or after.all <= before.all:
        return Finding(name, "unknown", "the kernel does not count it here")
    share = (after.stolen - before.stolen) / (after.all - before.all)
    text = f"{share:.1%} of the cores' time goes to other virtual machines"
    if share > STOLEN:
        mend = "ask for dedicated cores: every rank waits for the slowest"
        return Finding(name, "slow", text, mend)
    return Finding(name, "ok", text)


def load(average: float, cores: int, pressure: str | None) -> Finding:
    """Whether others compute here: `average` programs that ran in the last minute, `pressure` of /proc/pressure/cpu."""
    waiting = re.search(r"some avg10=([\d.]+)", pressure or "")
    waited = f"; some program waited for a core {float(waiting[1]):.0f}% of the last 10 s" if waiting else ""
    text = f"{average:.1f} programs wanted {counted(cores, 'core')} in the last minute{waited}"
    if average > 1.2 * cores + 1:
        return Finding("load", "slow", text, "end what else computes here (top): every rank waits for the slowest")
    return Finding("load", "ok", text)
