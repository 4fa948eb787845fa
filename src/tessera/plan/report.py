"""The table and the figure of `tessera count`: every layout at each number of devices, counted and by formula.

Counted: one AdamW step of the trainer, as rank 0 of each world runs it, on tensors without data (plan/count.py). By
formula: the closed forms of plan/traffic.py and plan/memory.py. What is received is told in elements, memory in bytes.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from tessera.core.errors import RunFailed
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.plan.count import counted_step
from tessera.plan.memory import StepMemory
from tessera.plan.scale import SHARING, Contender, padded, parallel_of
from tessera.plan.traffic import step_transfers, totals

STYLES = {  # colour, line and marker of each layout in the figure
    "1D": ("#e45756", ":", "s"),
    "1D + SP": ("#e45756", "-", "s"),
    "FSDP": ("#72b7b2", "-", "v"),
    "2D": ("#4c78a8", "-", "o"),
    "2.5D": ("#f58518", "-", "D"),
    "3D": ("#54a24b", "-", "^"),
    "best mesh": ("black", "-", "*"),
    "SUMMA loop": ("#4c78a8", "--", "x"),
    "SUMMA, published": ("grey", "--", "+"),
    "Ulysses": ("#b279a2", "-", "P"),
    "exchange": ("#9d755d", "-", "X"),
    "ring": ("#9d755d", ":", "p"),
}


@dataclass(frozen=True)
class Line:
    """One layout at one number of devices, by formula and (where it runs) counted: elements received, and memory."""

    contender: Contender
    counted: int | None = None
    memory: StepMemory | None = None


def line_of(model: ModelConfig, shape: StepShape, contender: Contender) -> Line:
    """Run the step of a layout that fits. Raises RunFailed when calls or bytes on any axis are not the formula's."""
    if contender.tensor is None:
        return Line(contender)
    parallel = parallel_of(contender.tensor, shape.batch, model, context=contender.context)
    shape = padded(shape, parallel)
    counted, formula = counted_step(model, shape, parallel), totals(step_transfers(model, shape, parallel))
    if counted.totals != formula:
        where = f"{contender.name} on {contender.ranks} devices"
        raise RunFailed(f"{where}: counted {counted.totals}, by formula {formula}")
    return Line(contender, counted.received // parallel.compute.itemsize, counted.memory)


def describe(model: ModelConfig, shape: StepShape, keep: bool, memory: float) -> str:
    """What is counted, in one line."""
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_size}, heads {model.num_heads} "
        f"({model.num_kv_heads} kv), vocabulary {model.vocab_size}; {shape.tokens} tokens ({shape.batch} × "
        f"{shape.sequence}); float32, AdamW; operands {'kept' if keep else 'gathered again'}; "
        f"best mesh: the fewest elements within {memory:g} GiB"
    )


NOTES = """\
mesh: the sizes of inner·depth·row·col. Elements: what one device (rank 0) receives in one optimizer step, counted
and by formula alike; kept: by formula, with gathered operands kept for the backward. Bytes of the device, counted: the
peak of the step; states: parameters, gradients and moments; saved: what the forward leaves for the backward. Of each —
the reason is below. FSDP: the axis row alone. SUMMA, published: its loop C = A B in every layer, a formula; SUMMA loop:
ours, A Bᵀ in every second layer. Ulysses, exchange, ring, with --context alone: all devices share each row, and FSDP2
cuts weights over them."""


def cells(line: Line, unit: float) -> dict[str, str]:
    """One row of the table by heading: elements in `unit`, bytes in GiB. `left_out` says why a cell is "—"."""
    contender, memory = line.contender, line.memory
    known = contender.tensor is not None or contender.elements > 0
    elements = {"counted": line.counted, "by formula": contender.elements, "kept": contender.kept}
    elements = elements if known else dict.fromkeys(elements)
    held = {"peak": memory.peak, "states": memory.states, "saved": memory.activations} if memory else {}
    return {
        "devices": str(contender.ranks),
        "layout": contender.name,
        "mesh": contender.mesh,
        **{name: f"{number / unit:,.0f}" if number is not None else "—" for name, number in elements.items()},
        **{name: f"{held[name] / 2**30:.2f}" if held else "—" for name in ("peak", "states", "saved")},
    }


def terminal_table(title: str, lines: Sequence[Line]) -> Table:
    """Eight columns; where elements are counted they are the formula's, or the command has failed."""
    caption = f"elements in millions, bytes in GiB. {' '.join(NOTES.split())}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False  # to fit 80 columns
    for heading in ("devices", "layout", "mesh", "elements", "kept", "peak", "states", "saved"):
        table.add_column(heading, justify="left" if heading in ("layout", "mesh") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(cell for heading, cell in cells(line, 1e6).items() if heading != "counted"))
    return table


def left_out(lines: Sequence[Line]) -> list[str]:
    """What does not fit or is not counted, and why: of every line that has a "—"."""
    return [f"{c.ranks} devices, {c.name}: {c.reason}" for c in (line.contender for line in lines) if c.reason]


def markdown(title: str, lines: Sequence[Line]) -> str:
    """The table as Markdown, with what does not fit and what it was made by."""
    rows = [cells(line, 1) for line in lines]
    rule = ["---" if heading in ("layout", "mesh") else "---:" for heading in rows[0]]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (list(rows[0]), rule, *(r.values() for r in rows)))
    reasons = "\n".join(f"- {reason}" for reason in left_out(lines))
    made = f"Made by `tessera count`, torch {torch.__version__}, {platform.machine()}, {date.today()}."
    return f"{title}.\n\n{table}\n\n{NOTES}\n\n{reasons}\n\n{made}\n"


def draw(title: str, lines: Sequence[Line], folder: Path) -> None:
    """scale.svg and scale.png: elements received and peak memory against devices; lines by formula, marks counted."""
    import matplotlib  # slow to import, and for drawing alone

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    with pyplot.rc_context({"svg.hashsalt": "tessera", "font.size": 9}):
        figure, (elements, memory) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        for name, (colour, style, marker) in STYLES.items():
            own = [line for line in lines if line.contender.name == name and line.contender.elements]
            if not own and name in SHARING:  # which are asked for
                continue
            devices = [line.contender.ranks for line in own]
            elements.plot(devices, [line.contender.elements / 1e9 for line in own], style, color=colour, lw=1.2)
            look = {"color": colour, "ls": style, "lw": 1.2, "marker": marker, "ms": 6, "label": name}
            if all(line.counted is not None for line in own):
                counted = [line.counted / 1e9 for line in own if line.counted]
                elements.plot(devices, counted, color=colour, ls="", marker=marker, ms=6)
                memory.plot(devices, [line.memory.peak / 2**30 for line in own if line.memory], **look)
            elements.plot([], [], **look)
        received = "10⁹ elements received by one device in a step"
        for axes, label in ((elements, received), (memory, "peak GiB of one device")):
            axes.set(xlabel="devices", ylabel=label)
            if not axes.lines or all(not len(line.get_xdata()) for line in axes.lines):
                continue  # one device receives nothing, and nothing has no logarithm
            axes.set(xscale="log", yscale="log")
            numbers = sorted({line.contender.ranks for line in lines})
            axes.set_xticks(numbers, [str(n) for n in numbers])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        elements.legend(fontsize=8)
        figure.suptitle(title, fontsize=8)
        for ending in ("svg", "png"):
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(folder / f"scale.{ending}", dpi=150, metadata=metadata)
        pyplot.close(figure)
