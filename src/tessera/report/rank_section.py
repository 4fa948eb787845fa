"""The section of the page on single ranks: a picture of all ranks over the steps, and a table of them."""

import math
from collections.abc import Sequence

import numpy as np

from tessera.report import numbers
from tessera.report.curve_sections import label, letter, section
from tessera.report.folder import RunFolder
from tessera.report.html import Html, data, join, table, tag
from tessera.report.ranks import OWN, Ranks

MOST_ROWS = 64
"""Ranks that are shown; of more those that are the slowest on average."""
LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares above the usual time at which the colour of a cell changes."""


def ranks(runs: Sequence[RunFolder]) -> Html:
    """Which rank is slow, and when."""
    parts = [_one(run, runs) for run in runs if run.ranks.count]
    return section("Ranks", *parts)


def _one(run: RunFolder, runs: Sequence[RunFolder]) -> Html:
    found = run.ranks
    steps, excess = found.excess()
    own = sum((found.means[term] for term in OWN if term in found.means), np.zeros(found.count))
    chosen = sorted(range(found.count), key=lambda rank: -own[rank])[:MOST_ROWS]
    few = "" if found.count <= MOST_ROWS else f"the slowest {MOST_ROWS} of {found.count:,} ranks"
    summary = tag("summary", letter(run, runs), "Mean seconds of a step by rank; over an axis: communication")
    return join(
        _strip(run, runs, steps, excess, sorted(chosen), few),
        tag("details", summary, _table(found, chosen, own), open="" if found.count <= 8 else None),
    )


def _strip(
    run: RunFolder, runs: Sequence[RunFolder], steps: list[int], excess: np.ndarray, chosen: list[int], few: str
) -> Html:
    """Ranks downwards, steps to the right, the colour says how much longer a rank works than is usual there."""
    if not steps:
        return Html()
    paths: dict[int, list[str]] = {}
    for row, rank in enumerate(chosen):
        for column, share in enumerate(excess[rank]):
            if not math.isnan(share):
                paths.setdefault(level(share), []).append(f"M{column} {row}h1v1h-1z")
    cells = [tag("path", class_=f"h{at}", d="".join(parts)) for at, parts in sorted(paths.items())]
    height = max(48, min(18 * len(chosen), 480))
    svg = tag(
        "svg",
        *cells,
        viewBox=f"0 0 {len(steps)} {len(chosen)}",
        preserveAspectRatio="none",
        role="img",
        aria_label="Ranks by steps",
        style=f"height:{height}px",
    )
    every = max(1, -(-len(chosen) * 14 // height))
    ys = [
        tag("span", f"rank {rank}", style=f"top:{100 * (row + 0.5) / len(chosen):.2f}%")
        for row, rank in enumerate(chosen)
        if row % every == 0
    ]
    first, last = steps[0], run.ranks.last_step or steps[-1]
    xs = [
        tag("span", numbers.steps_in_short(first), style="left:0%"),
        tag("span", numbers.steps_in_short(last), style="left:100%"),
    ]
    said = ["to 2 %", *(f"above {100 * share:.0f} %" for share in LEVELS)]
    legend = [tag("li", tag("i", class_=f"h{at}"), text) for at, text in enumerate(said)]
    rows = [[None if math.isnan(v) else round(float(v), 3) for v in excess[rank]] for rank in chosen]
    names = [f"rank {rank}" + (f" on {run.ranks.machine(rank)}" if run.ranks.machine(rank) else "") for rank in chosen]
    title = label(run, runs, "How much longer a rank works than the usual one")
    note = ", ".join(filter(None, ["compute, data, optimizer and other", few]))
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("small", note), tag("small", class_="step")),
        tag("ul", *legend, class_="legend"),
        tag("div", tag("div", *ys, class_="ys"), svg, tag("div", *xs, class_="xs"), class_="plot"),
        data({"steps": steps, "names": names, "rows": rows}),
        class_="heat",
    )


def level(share: float) -> int:
    """The colour of a share above the usual time: 0 for none, up to len(LEVELS)."""
    return sum(share >= least for least in LEVELS)


def _table(found: Ranks, chosen: list[int], own: np.ndarray) -> Html:
    """Each rank's mean seconds by term, slowest first, and its peak memory."""
    means = found.means
    terms = [term for term in means if means[term].any()]
    peaks = bool(np.isfinite(found.peak).any())
    heads: list[object] = ["rank", "machine", "its own time", "above usual", *(["peak memory"] if peaks else [])]
    heads += [term.replace("communication over", "over") for term in terms]
    usual = float(np.sort(own)[(found.count - 1) // 2])
    rows: list[list[object]] = []
    for rank in chosen:
        above = float(own[rank]) / usual - 1 if usual > 0 else None
        row: list[object] = [str(rank), found.machine(rank), numbers.shown(float(own[rank]), numbers.SECONDS)]
        row += [numbers.shown(above, numbers.SHARE)]
        row += [numbers.shown(float(found.peak[rank]), numbers.GIB)] if peaks else []
        rows.append(row + [numbers.shown(float(means[term][rank]), numbers.SECONDS) for term in terms])
    return table(heads, rows, 2)
