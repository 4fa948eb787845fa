"""The table and the figure of `tessera plan --scaling`: what plan/scaling.py predicts, beside what is often quoted."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from tessera.plan.scaling import CURVES, GEOMETRIES, QUOTED, Point, Study

NEAREST, UNLIMITED = "≈", "∞"
STYLES = {  # colour and marker of each curve
    "1D": ("#e45756", "s"),
    "2D": ("#4c78a8", "o"),
    "2.5D": ("#f58518", "D"),
    "3D": ("#54a24b", "^"),
    "best layout": ("black", "*"),
}
MARKS = (
    f"{NEAREST}: the geometry cannot have its own shape over all these devices; shown is the nearest mesh that the "
    f"model divides over. {UNLIMITED}: nothing fits the devices' memory; predicted with unlimited memory, so that "
    "nothing is recomputed."
)


def described(study: Study) -> list[str]:
    """What is compared, in sentences: model, rows, devices, baseline, where the rates come from."""
    training, base, profile = study.training, study.baseline, study.cluster.profile
    known = "measured" if profile.measured else "published figures, not measured"
    return [
        f"{study.name} on {study.cluster}, rows of {training.sequence_len} tokens, {training.dtype} products, states "
        f"in {training.stored}.",
        f"Strong scaling: {training.global_batch} rows a step. Weak scaling: for each device "
        f"{training.global_batch // max(study.devices)} of a step's rows.",
        f"Baseline: one such device with unlimited memory, by prediction: {base.seconds:.4g} s for "
        f"{training.global_batch} rows, MFU {base.mfu:.0%}.",
        f"Rates of {profile.name}: {known}; half of a prediction's band {base.band:.0%}.",
    ]


HEADINGS = (
    "devices",
    "rows",
    "curve",
    "mesh",
    "mark",
    "speed-up",
    "of ideal",
    "MFU",
    "exposed",
    "most lost to",
    "quoted",
)
NARROW = ("devices", "curve", "mesh", "speed-up", "of ideal", "exposed", "quoted")
_LEFT = ("curve", "mesh", "mark", "most lost to")


def cells(point: Point) -> tuple[str, ...]:
    """One row of the table, in the order of HEADINGS."""
    return (
        str(point.devices),
        str(point.rows),
        point.curve,
        point.mesh,
        marks(point),
        f"{point.speed_up:.1f}",
        f"{point.efficiency:.0%}",
        f"{point.judged.mfu:.0%}",
        f"{point.judged.time.communication / point.judged.seconds:.0%}",
        point.largest_loss,
        "" if point.quoted is None else f"{point.quoted:g}",
    )


def marks(point: Point) -> str:
    """The marks of a point, as MARKS explains them."""
    return (not point.exact) * NEAREST + (not point.fits) * UNLIMITED


def terminal_table(title: str, points: Sequence[Point]) -> Table:
    """Strong or weak scaling for a terminal of 80 columns: the mark stands behind the speed-up."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for heading in NARROW:
        table.add_column(heading, justify="left" if heading in _LEFT else "right", no_wrap=True)
    for point in points:
        cell = dict(zip(HEADINGS, cells(point), strict=True))
        cell["speed-up"] += cell["mark"]
        table.add_row(*(cell[heading] for heading in NARROW))
    return table


def markdown(study: Study, command: str) -> str:
    """Both tables, the quoted curves beside ours, and what was assumed; `command` made it."""
    parts = [
        f"# Scaling of {study.name}",
        " ".join(described(study)),
        MARKS,
        f"Exposed: communication that nothing hides, as a share of the step. Made by `{command}`.",
        "![Speed-up against the number of devices, strong and weak scaling.](scaling.svg)",
        "## Strong scaling",
        rows_as_markdown(HEADINGS, map(cells, study.strong)),
        "## Weak scaling",
        rows_as_markdown(HEADINGS[:-1], (cells(point)[:-1] for point in study.weak)),
    ]
    compared = [point for point in study.strong if point.quoted is not None]
    if compared:
        parts += [
            "## What is often quoted",
            "Speed-ups that are often quoted, without a source, a batch or a baseline. "
            "Needs: the MFU that the quoted speed-up would be with our baseline's MFU on one device.",
            rows_as_markdown(
                ("devices", "curve", "quoted", "ours", "quoted / ours", "needs MFU", "our MFU", "inside our band"),
                map(_compared, compared),
            ),
        ]
    if study.missing:
        parts += ["## Without a point", "\n".join(f"- {reason}" for reason in study.missing)]
    return "\n\n".join(parts) + "\n"


def _compared(point: Point) -> tuple[str, ...]:
    """A quoted speed-up beside ours."""
    assert point.quoted is not None and point.quoted_mfu is not None
    apart = point.quoted / point.speed_up
    return (
        str(point.devices),
        point.curve,
        f"{point.quoted:g}",
        f"{point.speed_up:.1f}{marks(point)}",
        f"{apart:.2f}",
        f"{point.quoted_mfu:.0%}",
        f"{point.judged.mfu:.0%}",
        "yes" if abs(apart - 1) <= point.judged.band else "no",
    )


def rows_as_markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(lines)


def draw(study: Study, path: Path) -> None:
    """The figure as SVG: speed-up against devices, both logarithmic, with the ideal line and what is quoted."""
    import matplotlib  # slow to import, and for drawing alone

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "tessera", "font.size": 9}):
        figure, both = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
        for axes, name, points in zip(both, ("strong", "weak"), (study.strong, study.weak), strict=True):
            axes.plot(study.devices, study.devices, color="grey", lw=0.8, label="ideal")
            for curve in CURVES:
                _draw_curve(axes, curve, [point for point in points if point.curve == curve])
            axes.set(xscale="log", yscale="log", xlabel="devices", title=f"{name} scaling")
            axes.set_xticks(study.devices, [str(n) for n in study.devices])
            axes.set_yticks(study.devices, [str(n) for n in study.devices])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        for geometry in GEOMETRIES:
            of_devices = {n: QUOTED[geometry][n] for n in study.devices if n in QUOTED[geometry]}
            if of_devices:
                look = {"color": STYLES[geometry][0], "ls": ":", "lw": 1, "label": f"{geometry}, often quoted"}
                both[0].plot(list(of_devices), list(of_devices.values()), **look)
        both[0].set_ylabel("speed-up over one such device with unlimited memory (predicted)")
        both[0].legend(fontsize=8)
        words = described(study)
        figure.suptitle(
            "\n".join([" ".join(words[:2]), words[2], "Hollow: with unlimited memory. ≈: the nearest mesh."]),
            fontsize=8,
        )
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _draw_curve(axes: object, curve: str, points: Sequence[Point]) -> None:
    """A line through all points; hollow where memory is unlimited, ≈ beside where the mesh is the nearest."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    colour, marker = STYLES[curve]
    axes.plot([p.devices for p in points], [p.speed_up for p in points], color=colour, lw=1.2)
    for fits, fill in ((True, colour), (False, "white")):
        own = [p for p in points if p.fits == fits]
        xs, ys = [p.devices for p in own], [p.speed_up for p in own]
        axes.plot(xs, ys, ls="", marker=marker, ms=6, color=colour, markerfacecolor=fill)
    axes.plot([], [], color=colour, marker=marker, ms=6, lw=1.2, label=curve)
    for point in points:
        if not point.exact:
            axes.annotate(NEAREST, (point.devices, point.speed_up), (4, -9), textcoords="offset points", color=colour)
