"""Numbers as the page shows them; `page.js` writes those under the pointer by the same rules."""

import math
import time
from collections.abc import Sequence

PLAIN, COUNT, SHARE, SECONDS, GIB, BYTES, RATE = "plain", "count", "share", "seconds", "gib", "bytes", "rate"
"""Kinds of numbers: what their unit is, and how many digits say something."""
UNKNOWN = "—"


UNITS = {
    SECONDS: (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)),
    GIB: (("GiB", 1.0), ("MiB", 2**-10), ("KiB", 2**-20)),
    BYTES: (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)),
}


def shown(value: float | None, kind: str) -> str:
    """A number with its unit: `shown(0.0123, SECONDS)` is "12.3 ms"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if kind == COUNT and abs(value) < 1e15:
        return f"{value:,.0f}"
    if kind == SHARE:
        return f"{100 * value:.3g} %"
    if kind == RATE:
        return f"{value:.2e}" if value else "0"
    if kind not in UNITS:
        return digits(value)
    units = UNITS[kind]
    name, size = next((u for u in units if abs(value) >= u[1]), units[-1] if value else units[0])
    number = value / size
    return f"{number:,.0f} {name}" if abs(number) >= 1000 else f"{number:.3g} {name}"


def ticks_shown(ticks: Sequence[float], kind: str) -> list[str]:
    """Round numbers beside an axis, all in one unit: 0 s, 0.5 s, 1 s."""
    if kind not in UNITS:
        return [shown(tick, kind) for tick in ticks]
    greatest, units = max(map(abs, ticks), default=0.0), UNITS[kind]
    name, size = next((u for u in units if greatest >= 0.1 * u[1]), units[0])
    return [f"{tick / size:.4g} {name}" for tick in ticks]


def digits(value: float) -> str:
    """Four significant digits, thousands with commas."""
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def steps_in_short(step: float) -> str:
    """The number of a step below an axis: 250k, 1M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(step) >= 10 * size or (abs(step) >= size and step % size == 0):
            return f"{step / size:g}{unit}"
    return f"{step:,.0f}"


def moment(seconds: float) -> str:
    """A time of the clock, in this machine's zone."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return UNKNOWN


def difference(before: float | None, after: float | None) -> str:
    """How much more the second is, as a share of the first: "+12.5 %"."""
    if before is None or after is None:
        return UNKNOWN
    if before == after:
        return "same"
    return f"{100 * (after / before - 1):+.1f} %" if before > 0 and abs(after / before) < 100 else UNKNOWN
