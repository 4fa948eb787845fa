"""`tessera count`: words and memory of one device against the number of devices, for every geometry.

Counted: one AdamW step of the trainer, as rank 0 of each world runs it, on tensors without data (plan/count.py). By
formula: the closed forms of plan/traffic.py and plan/memory.py. The command fails where the words of the two differ.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tessera.core.errors import RunFailed, UserError
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.nn.rope import RopeConfig
from tessera.plan.count import counted_step
from tessera.plan.memory import StepMemory
from tessera.plan.scale import Entry, entries, padded, parallel_of
from tessera.plan.traffic import step_rows, totals

LAYERS = 16
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
}


def default_model(layers: int = LAYERS) -> ModelConfig:
    """Layers of the sizes of Llama 3 70B."""
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=8192,
        num_layers=layers,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=28672,
        max_positions=8192,
        rope=RopeConfig(theta=500000.0),
    )


@dataclass(frozen=True)
class Line:
    """One layout at one number of devices, by formula and (where it runs) counted: words received, and memory."""

    entry: Entry
    counted: int | None = None
    memory: StepMemory | None = None

    @property
    def runs(self) -> bool:
        return self.counted is not None


def count(
    ranks: str,
    model: str | None,
    layers: int | None,
    batch: int,
    sequence: int,
    keep: bool,
    memory: float,
    output: Path | None,
) -> None:
    """Count every layout at each of `ranks`; print the table, and write it and its figure into `output`.

    `memory`: the GB of a device, which the best mesh may hold.
    """
    worlds = _numbers(ranks)
    if output is not None and output.exists() and not output.is_dir():
        raise UserError("--output", output, "is a file", "give a folder")
    config = _model(model, layers)
    shape = StepShape(batch, sequence)
    console = Console(highlight=False, markup=False)
    todo = [entry for world in worlds for entry in entries(config, shape, world, keep, memory * 1e9)]
    lines = [
        count_entry(config, shape, entry)
        for entry in track(todo, "counting", console=console, transient=True, disable=not console.is_terminal)
    ]
    title = describe(config, shape, keep, memory)
    console.print(_terminal_table(title, lines))
    for line in left_out(lines):
        console.print(line)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "scale.md").write_text(markdown(title, lines))
        draw(title, lines, output)
        console.print(f"written: {output}/scale.md, scale.svg, scale.png")


def _numbers(ranks: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in ranks.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise UserError("--ranks", ranks, "are the numbers of devices to compare", "for example 8,16,64,512")
    return numbers


def _model(folder: str | None, layers: int | None) -> ModelConfig:
    """The sizes of `folder`'s config.json, or the default's, with so many layers."""
    if folder is None:
        return default_model(layers or LAYERS)
    from tessera.models.hub import read_model_config, resolve_model_folder

    config = read_model_config(resolve_model_folder(folder, weights=False))
    config = replace(config, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    return replace(config, num_layers=layers or config.num_layers)


def describe(model: ModelConfig, shape: StepShape, keep: bool, memory: float) -> str:
    """What is counted, in one line."""
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_size}, heads {model.num_heads} "
        f"({model.num_kv_heads} kv), vocabulary {model.vocab_size}; {shape.tokens} tokens ({shape.batch} × "
        f"{shape.sequence}); float32, AdamW; operands {'kept' if keep else 'gathered again'}; "
        f"best mesh: the fewest words within {memory:g} GB"
    )


def count_entry(model: ModelConfig, shape: StepShape, entry: Entry) -> Line:
    """Run the step of a layout that fits. Raises RunFailed when calls or bytes on any axis are not the formula's."""
    if entry.tensor is None:
        return Line(entry)
    parallel = parallel_of(entry.tensor, shape.batch)
    shape = padded(shape, parallel)
    counted, formula = counted_step(model, shape, parallel), totals(step_rows(model, shape, parallel))
    if counted.totals != formula:
        raise RunFailed(f"{entry.name} on {entry.ranks} devices: counted {counted.totals}, by formula {formula}")
    return Line(entry, counted.received // parallel.compute.itemsize, counted.memory)


# ---------------------------------------------------------------------------------------------- tables and figure

NOTES = """\
mesh: the sizes of inner·depth·row·col. Words: what one device (rank 0) receives in one optimizer step, counted and by
formula alike; kept: by formula, with gathered operands kept for the backward. Bytes of the device, counted: the peak of
the step; states: parameters, gradients and moments; saved: what the forward leaves for the backward. FSDP: the axis row
alone. SUMMA, published: its loop C = A B in every layer, a formula; SUMMA loop: ours, A Bᵀ in every second layer."""


def cells(line: Line, unit: float) -> dict[str, str]:
    """One row of the table by heading: words in `unit`, bytes in GB."""
    entry, memory = line.entry, line.memory
    words = {"counted": line.counted, "by formula": entry.words, "kept": entry.kept}
    held = {"peak": memory.peak, "states": memory.states, "saved": memory.activations} if memory else {}
    return {
        "devices": str(entry.ranks),
        "layout": entry.name,
        "mesh": entry.mesh,
        **{name: f"{number / unit:,.0f}" if number else "—" for name, number in words.items()},
        **{name: f"{held[name] / 1e9:.2f}" if held else "—" for name in ("peak", "states", "saved")},
    }


def _terminal_table(title: str, lines: Sequence[Line]) -> Table:
    """Eight columns; where words are counted they are the formula's, or the command has failed."""
    caption = f"words in millions, bytes in GB. {' '.join(NOTES.split())}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False  # to fit 80 columns
    rows = [cells(line, 1e6) for line in lines]
    for row in rows:
        row["words"] = row.pop("by formula")
        del row["counted"]
    for heading in (shown := ("devices", "layout", "mesh", "words", "kept", "peak", "states", "saved")):
        table.add_column(heading, justify="left" if heading in ("layout", "mesh") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[heading] for heading in shown))
    return table


def left_out(lines: Sequence[Line]) -> list[str]:
    """What does not fit, and why."""
    return [f"{e.ranks} devices, {e.name}: {e.reason}" for e in (line.entry for line in lines) if e.reason]


def markdown(title: str, lines: Sequence[Line]) -> str:
    """The table as Markdown, with what does not fit and what it was made by."""
    rows = [cells(line, 1) for line in lines]
    rule = ["---" if heading in ("layout", "mesh") else "---:" for heading in rows[0]]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (list(rows[0]), rule, *(r.values() for r in rows)))
    reasons = "\n".join(f"- {reason}" for reason in left_out(lines))
    made = f"Made by `tessera count`, torch {torch.__version__}, {platform.machine()}, {date.today()}."
    return f"{title}.\n\n{table}\n\n{NOTES}\n\n{reasons}\n\n{made}\n"


def draw(title: str, lines: Sequence[Line], folder: Path) -> None:
    """scale.svg and scale.png: words and peak memory of one device against devices; lines by formula, marks counted."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    with pyplot.rc_context({"svg.hashsalt": "tessera", "font.size": 9}):
        figure, (words, memory) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        for name, (colour, style, marker) in STYLES.items():
            own = [line for line in lines if line.entry.name == name and line.entry.words]
            devices = [line.entry.ranks for line in own]
            words.plot(devices, [line.entry.words / 1e9 for line in own], style, color=colour, lw=1.2)
            look = {"color": colour, "ls": style, "lw": 1.2, "marker": marker, "ms": 6, "label": name}
            if all(line.runs for line in own):
                counted = [line.counted / 1e9 for line in own if line.counted]
                words.plot(devices, counted, color=colour, ls="", marker=marker, ms=6)
                memory.plot(devices, [line.memory.peak / 1e9 for line in own if line.memory], **look)
            words.plot([], [], **look)
        for axes, label in ((words, "10⁹ words received by one device in a step"), (memory, "peak GB of one device")):
            axes.set(xscale="log", yscale="log", xlabel="devices", ylabel=label)
            numbers = sorted({line.entry.ranks for line in lines})
            axes.set_xticks(numbers, [str(n) for n in numbers])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        words.legend(fontsize=8)
        figure.suptitle(title, fontsize=8)
        for ending in ("svg", "png"):
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(folder / f"scale.{ending}", dpi=150, metadata=metadata)
        pyplot.close(figure)
