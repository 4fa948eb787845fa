"""The tables and text pictures of `tessera inspect`, at most WIDTH characters wide."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tessera.core.axes import AXES
from tessera.core.device import dtype_name
from tessera.core.mesh import Mesh
from tessera.core.text import counted, human, human_range, number_range
from tessera.inspect.held import MOMENTS, Collective, Held, Inspection, Totals, cut_in_words, placements_in_words
from tessera.inspect.picture import LABELS, Grid, colours, grid_of, label, mesh_grid, text_picture
from tessera.inspect.sequences import Sequences
from tessera.layout.shape import StepShape
from tessera.plan.fit import fits
from tessera.plan.peak import Peak

WIDTH = 100


@dataclass(frozen=True)
class Report:
    """All there is to say of a layout; `weight` is the parameter to picture, `pictured` the activations.

    Where ranks share sequences, `context` says how and why, and `sequences` who has what of them.
    """

    title: str
    inspection: Inspection
    shape: StepShape
    streams: list[Held]
    traffic: list[Collective]
    weight: Held
    pictured: list[Held]
    peak: Peak
    device_bytes: int | None = None
    """The memory of this machine's device, where it has one that is known."""
    buffers: int = 0
    """What the communication library takes on such a device, beside the peak."""
    context: str | None = None
    sequences: Sequences | None = None

    @property
    def grids(self) -> list[Grid]:
        """Who holds which block of the chosen weight and activations; who computes which of shared attention."""
        mesh, ranks = self.inspection.mesh, self.inspection.ranks
        held = [
            grid_of(f"{held.name}\n{_cut(held, mesh)}", held.spec.shape, held.spec.cuts, ranks, held.spec.stored_over)
            for held in (self.weight, *self.pictured)
        ]
        return held + ([] if self.sequences is None else [self.sequences.grid])

    @property
    def totals(self) -> dict[str, Totals]:
        return {
            "matrices, embeddings": self.inspection.totals(matrices=True),
            "everything else": self.inspection.totals(matrices=False),
            "all": self.inspection.totals(),
        }


def print_report(console: Console, report: Report) -> None:
    """Everything: what ranks hold, who holds which block, what travels."""
    inspection, mesh, shape = report.inspection, report.inspection.mesh, report.shape
    compute = dtype_name(inspection.parallel.compute)
    console.print(Text(report.title, style="bold"))
    if mesh.world > 1:
        console.print(f"rank = {_rank_formula(mesh)}")
    console.print(f"{shape.micro_batches} × {shape.batch} × {shape.sequence} tokens a step, products in {compute}")
    if report.context is not None:
        console.print(report.context, markup=False)
    placed = f"placements on ({', '.join(mesh.present(AXES))}), " if mesh.world > 1 else ""
    title = f"parameters: {placed}bytes of each on a rank"
    _print_table(console, title, parameter_table(inspection))
    _print_table(console, "on each rank", totals_table(report.totals))
    console.print(share_in_words(inspection))
    console.print(peak_in_words(report.peak, report.device_bytes, report.buffers))
    ordered = ", tokens counted rank after rank" if report.sequences is not None else ""
    _print_table(console, f"activations of a micro-batch{ordered}", stream_table(report))
    if mesh.world == 1:
        return
    if report.sequences is not None:
        _print_table(console, sequences_title(report.sequences), sequences_table(report.sequences))
    console.print(Text("\nwho holds which block: rows and columns are called by their first index", style="bold"))
    console.print(Text(LABELS, style="dim"))
    width, palette = min(console.width, WIDTH), colours(mesh)
    pictures = [text_picture(grid, palette, width) for grid in (mesh_grid(mesh), *report.grids)]
    console.print(Columns(pictures, padding=(1, 3)), width=width)
    _print_table(console, "collectives, and bytes that a rank receives", traffic_table(report.traffic))
    console.print(received_in_words(report.traffic))


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def _rank_formula(mesh: Mesh) -> str:
    """`(inner · 2 + row) · 2 + col`: where the mesh puts a rank."""
    formula, *rest = mesh.present(AXES)
    for place, axis in enumerate(rest):
        formula = f"{f'({formula})' if place else formula} · {mesh.sizes[axis]} + {axis}"
    return formula


def _table(*columns: str, numbers: int) -> Table:
    """An empty table with these headings, of which the last `numbers` stand over numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for place, heading in enumerate(columns):
        right = place >= len(columns) - numbers
        fixed = heading in ("site", "collective", "axis")  # others wrap first
        table.add_column(Text(heading), justify="right" if right else "left", overflow="fold", no_wrap=fixed)
    return table


def parameter_table(inspection: Inspection) -> Table:
    """Each parameter, bytes as a range where ranks differ; those that lie alike in several layers in one line."""
    mesh = inspection.mesh
    table = _table("parameter\n  cut", "whole\nplacements", "on a rank", "parameter", "gradient", "AdamW", numbers=3)
    for name, held in layers_joined(inspection.parameters):
        sizes = held.bytes(inspection.parallel.dtype)
        placements = " ".join(placements_in_words(held.spec, mesh))
        copies = f"{held.copies} copies" if held.copies > 1 else ""
        table.add_row(
            Text(f"{name}\n").append(f"  {_cut(held, mesh)}", style="dim"),
            Text(f"{_by(held.spec.shape)}\n").append(placements, style="dim"),
            Text(f"{_local(held)}\n").append(copies, style="dim"),
            *map(_below, (sizes, sizes, [MOMENTS * size for size in sizes])),
        )
    return table


def layers_joined(parameters: Iterable[Held]) -> list[tuple[str, Held]]:
    """Parameters by name, the first of those that lie alike in several layers: `layers.0–3.…`."""
    joined: dict[tuple[object, ...], list[Held]] = {}
    for held in parameters:
        key = (re.sub(r"^layers\.\d+", "layers", held.name), held.spec.shape, held.spec.cuts)
        joined.setdefault(key, []).append(held)
    named = []
    for same in joined.values():
        numbers = [held.name.split(".")[1] for held in same]
        name = same[0].name
        named.append(
            (name.replace(f".{numbers[0]}.", f".{numbers[0]}–{numbers[-1]}.", 1) if same[1:] else name, same[0])
        )
    return named


def totals_table(totals_of: dict[str, Totals]) -> Table:
    """Elements of the model and of a rank (the least and the most); bytes on the rank that holds most."""
    headings = ("", "elements", "on a rank", "parameters", "gradients", "AdamW", "all")
    table = _table(*headings, numbers=6)
    for name, totals in totals_of.items():
        most = totals.by_rank.index(max(totals.by_rank))
        sizes = (totals.parameter_bytes, totals.gradient_bytes, totals.optimizer_bytes)
        elements = number_range(totals.by_rank).replace("–", " to\n")
        table.add_row(name, f"{totals.whole:,}", elements, *(human(size[most]) for size in (*sizes, totals.bytes)))
    return table


def share_in_words(inspection: Inspection) -> str:
    """Whether the matrices and embeddings are cut as they should be."""
    over = " · ".join(inspection.share_axes) or "one process"
    share = f"1/{inspection.share} of the matrices and embeddings ({over})"
    if not inspection.share_is_exact():
        return f"a rank does not hold {share}: this layout is wrong"
    uneven = ", ".join(name for name, held in layers_joined(inspection.uneven()) if held.is_matrix)
    return f"a rank holds {share}, " + (f"on average: {uneven} do not divide evenly" if uneven else "exactly")


def peak_in_words(peak: Peak, device_bytes: int | None, buffers: int = 0) -> str:
    """The most memory of a rank, of what, and whether a device of so many bytes has as much beside `buffers`."""
    parts = {"states": peak.states, "activations": peak.activations, "gathered weights": peak.gathered}
    parts["work in progress"] = peak.working
    told = " + ".join(f"{name} {human(size)}" for name, size in parts.items() if size)
    line = f"the peak of a rank is about {human(peak.total)}, by formula: {told}"
    if device_bytes is None:
        return line
    return f"{line}; it {fits(peak.total, device_bytes, buffers)} in this device's {human(device_bytes)}"


def stream_table(report: Report) -> Table:
    """The streams, and the activation that was asked for, in the compute dtype."""
    table = _table("stream", "cut", "whole", "on a rank", "copies", "bytes", numbers=4)
    for held in report.streams:
        size = human_range(held.bytes(report.inspection.parallel.compute))
        cut = Text(_cut(held, report.inspection.mesh))
        table.add_row(held.name, cut, _by(held.spec.shape), _local(held), str(held.copies), size)
    return table


SHARES = 32  # that are listed; --json has all


def sequences_title(sequences: Sequences) -> str:
    """What the table of shares is about."""
    bounds, rows = sequences.stream.bounds, sequences.rows
    of = "" if sequences.streams == 1 else f", the first of {sequences.streams} in a micro-batch"
    what = f"{bounds[-1]:,} tokens, {counted(len(bounds) - 1, 'document')}, {counted(round(rows), 'row')}"
    left = f"; the first {SHARES} of {len(sequences.shares)}" if len(sequences.shares) > SHARES else ""
    return f"who has which tokens of a stream ({what}{of}), and computes which tiles of attention{left}"


def sequences_table(sequences: Sequences) -> Table:
    """What the ranks at each place have: tokens, tiles, work beside the mean, and what a layer's attention receives."""
    headings = ("ranks", "tokens", "tiles", "pairs a head", "of the mean", "k·v tokens received", "a layer receives")
    table = _table(*headings, numbers=5)
    for share in sequences.shares[:SHARES]:
        table.add_row(
            label(share.ranks),
            chunks_in_words(share.holds),
            f"{share.tiles:,}",
            f"{share.pairs:,}",
            f"{share.pairs / sequences.mean:.3f}",
            f"{share.tokens:,}",
            human(share.bytes),
        )
    return table


def chunks_in_words(chunks: Sequence[tuple[int, int]], most: int = 4) -> str:
    """`0–3, 12–15`: the tokens of chunks; of many the first ones and how many there are."""
    words = [f"{first}–{end - 1}" if end - first > 1 else str(first) for first, end in chunks]
    return ", ".join(words) if len(words) <= most else f"{', '.join(words[:most])} … ({len(words)} chunks)"


def traffic_table(collectives: Sequence[Collective]) -> Table:
    """Which collective runs on which axis: first in each layer, then what runs once a micro-batch or a step."""
    table = _table("site", "pass", "what", "collective", "axis", "calls", "received", "a step", numbers=3)
    for in_layers in (True, False):
        group = [collective for collective in collectives if collective.in_layers == in_layers]
        last = ("", "")
        for collective in group:
            transfer = collective.transfer
            site, phase = transfer.site, transfer.phase
            table.add_row(
                site if site != last[0] else "",
                phase if (site, phase) != last else "",
                transfer.what,
                transfer.kind.replace("_", "-"),
                transfer.axis,
                number_range(collective.calls),
                human_range(collective.received),
                f"× {transfer.times}",
                end_section=collective is group[-1],
            )
            last = (site, phase)
    return table


def received_in_words(collectives: Sequence[Collective]) -> str:
    """What the busiest rank receives in a step, by axes."""
    in_a_step = [[c.transfer.times * received for received in c.received] for c in collectives]
    of_ranks = [sum(received) for received in zip(*in_a_step, strict=True)]
    busiest = of_ranks.index(max(of_ranks))
    by_axis: Counter[str] = Counter()
    for collective, received in zip(collectives, in_a_step, strict=True):
        by_axis[collective.transfer.axis] += received[busiest]
    parts = [f"{axis} {human(got)}" for axis, got in sorted(by_axis.items(), key=lambda item: -item[1])]
    whom = "; the busiest rank" if min(of_ranks) != max(of_ranks) else ""
    return f"a rank receives {human_range(of_ranks)} in a step{whom}: {', '.join(parts)}"


def _cut(held: Held, mesh: Mesh) -> str:
    return cut_in_words(held.dims, held.spec.stored_cuts, mesh)


def _by(shape: Sequence[object]) -> str:
    return " × ".join(map(str, shape))


def _local(held: Held) -> str:
    """The shape on a rank, dims that differ from rank to rank as `least–most`."""
    return _by([number_range(sizes).replace(",", "") for sizes in zip(*held.shapes, strict=True)])


def _below(sizes: Sequence[int]) -> str:
    """The same on two lines, for rows that have two: names stay whole."""
    return human_range(sizes).replace("–", " to\n")
