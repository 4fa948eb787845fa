"""Numbers and tables as a person reads them."""

from collections.abc import Sequence


def human(size: float) -> str:
    """Bytes in the largest unit that keeps them above 1, e.g. "31.8 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.{4 if size >= 999.5 else 3}g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def human_range(sizes: Sequence[int]) -> str:
    """The least and the most of some bytes, with the unit once where both have the same, e.g. "512–768 B"."""
    least, most = human(min(sizes)), human(max(sizes))
    number, unit = least.split()
    return most if least == most else f"{number if unit == most.split()[1] else least}–{most}"


def mib(size: int) -> str:
    """Bytes as a number of MiB."""
    return f"{size / 2**20:,.1f}"


def number_range(values: Sequence[int]) -> str:
    """The least and the most of some numbers, e.g. "1,024–2,048"; one number where they are the same."""
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"


def counted(number: int, noun: str) -> str:
    """A number of things, e.g. "1 step", "1,000 steps"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """A time in one or two units, e.g. "12 s", "3 min", "2 h 5 min", "4 days"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, indented, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "   ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
