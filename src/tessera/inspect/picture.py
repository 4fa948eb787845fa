"""Pictures of a layout: which rank holds which block of a tensor, as text and as SVG or PNG.

A tensor of two dims is a grid of blocks, each held by one rank or, where an axis of the mesh cuts neither dim, by
several. In text a block names its ranks; drawn, it is striped in their colours too.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tessera.core.axes import AXES
from tessera.core.errors import UserError
from tessera.core.files import check_target
from tessera.core.mesh import Mesh
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import HIDDEN

FORMATS = (".svg", ".png")
_DISTINCT = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2", "#9c755f")


@dataclass(frozen=True)
class Grid:
    """`ranks[i][j]` hold the block of `rows[i]` × `columns[j]` of a tensor; both run over it in order, without gaps.

    `title` has one line or two. Rows are called by their first index, or by `row_names`. `causal`: of a block that has
    the same indices down and across, the part above the diagonal is nobody's.
    """

    title: str
    rows: tuple[slice, ...]
    columns: tuple[slice, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    row_names: tuple[str, ...] = ()
    causal: bool = False

    @property
    def heads(self) -> tuple[str, ...]:
        """What the rows are called."""
        return self.row_names or tuple(str(row.start) for row in self.rows)


def grid_of(
    title: str,
    shape: Sequence[int],
    cuts: Sequence[tuple[str, ...]],
    ranks: Sequence[Mesh],
    stored_over: tuple[str, ...] = (),
) -> Grid:
    """Who holds which block of a tensor of one or two dims, of which the axes `cuts[d]` cut dim d, major to minor.

    `stored_over` as in `ParameterSpec`. A tensor of one dim is drawn as a row.
    """
    spec = ParameterSpec(tuple(shape), tuple(cuts), HIDDEN, Init(), stored_over)
    held: dict[tuple[int, int, int, int], list[int]] = {}
    for mesh in ranks:
        *rows_held, column = spec.stored_slices(mesh)
        row = rows_held[0] if rows_held else slice(0, 1)
        held.setdefault((row.start, row.stop, column.start, column.stop), []).append(mesh.rank)
    rows = sorted({(first, last) for first, last, _, _ in held if last > first})
    columns = sorted({(first, last) for _, _, first, last in held if last > first})
    blocks = tuple(tuple(tuple(held[(*row, *column)]) for column in columns) for row in rows)
    return Grid(title, tuple(slice(*row) for row in rows), tuple(slice(*column) for column in columns), blocks)


def mesh_grid(mesh: Mesh) -> Grid:
    """The ranks as the mesh arranges them: `col` runs to the right, all other axes downwards."""
    col = mesh.sizes["col"]
    down = [axis for axis in mesh.present(AXES) if axis != "col"]
    firsts = range(0, mesh.world, col)
    ranks = tuple(tuple((first + i,) for i in range(col)) for first in firsts)
    coordinates = [mesh.at(first).coordinates for first in firsts]
    names = tuple(" ".join(str(place[axis]) for axis in down) for place in coordinates)
    title = "the mesh\n" + "  ".join([f"{' '.join(down)} ↓"] * bool(down) + ["col →"] * (col > 1))
    return Grid(title, _single(len(firsts)), _single(col), ranks, names)


def _single(count: int) -> tuple[slice, ...]:
    return tuple(slice(i, i + 1) for i in range(count))


def legible(grid: Grid, fits: Callable[[Grid], bool], most_rows: int = 16) -> Grid:
    """`grid`, or neighbouring blocks of it taken together, as few as fit; a few more if labels are then exact."""
    best, best_score = grid, (False, 0)
    for rows in _group_counts(len(grid.rows), most_rows):
        for columns in _group_counts(len(grid.columns), 64):
            shown = coarsened(grid, rows, columns)
            exact = all("(" not in label(ranks) for blocks in shown.ranks for ranks in blocks)
            score = (fits(shown), rows * columns * (4 if exact else 1))
            if score > best_score:
                best, best_score = shown, score
    together = (-(-len(grid.rows) // len(best.rows)), -(-len(grid.columns) // len(best.columns)))
    if together == (1, 1):
        return best
    return replace(best, title=f"{best.title}\neach cell here is {together[0]} × {together[1]} blocks")


def _group_counts(count: int, most: int) -> list[int]:
    """The numbers of groups of one size that `count` neighbours make, up to `most`; and `most` where that leaves 1."""
    divisors = [n for n in range(1, min(count, most) + 1) if count % n == 0]
    return divisors if len(divisors) > 1 or count <= most else [1, most]


def coarsened(grid: Grid, rows: int, columns: int) -> Grid:
    """`grid` with neighbouring blocks taken together into at most so many rows and columns, each with all its ranks."""
    row_groups, column_groups = _groups(len(grid.rows), rows), _groups(len(grid.columns), columns)
    ranks = tuple(
        tuple(
            tuple(sorted({rank for i in down for j in across for rank in grid.ranks[i][j]})) for across in column_groups
        )
        for down in row_groups
    )
    joined_rows = tuple(slice(grid.rows[g[0]].start, grid.rows[g[-1]].stop) for g in row_groups)
    joined_columns = tuple(slice(grid.columns[g[0]].start, grid.columns[g[-1]].stop) for g in column_groups)
    names = tuple(grid.heads[g[0]] for g in row_groups)
    return replace(grid, rows=joined_rows, columns=joined_columns, ranks=ranks, row_names=names)


def _groups(count: int, most: int) -> list[range]:
    size = -(-count // most)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def label(ranks: Sequence[int]) -> str:
    """Ranks in ascending order in short; `LABELS` says how."""
    if not ranks:
        return ""
    first, last, count = ranks[0], ranks[-1], len(ranks)
    if count > 2 and last - first == count - 1:
        return f"{first}–{last}"
    if count <= 4:
        return ",".join(map(str, ranks))
    step = ranks[1] - first
    if list(ranks) == list(range(first, last + 1, step)):
        return f"{first}…{last}/{step}"
    return f"{first}…{last} ({count})"


LABELS = "0–3: ranks 0 to 3; 0…56/8: every eighth of 0 to 56; 0…99 (16): 16 of them"


def colours(mesh: Mesh) -> list[str]:
    """A colour for each rank: few differ in hue; many in hue along the outer axes and in lightness along the last."""
    if mesh.world <= len(_DISTINCT):
        return list(_DISTINCT[: mesh.world])
    *outer, last = mesh.present(AXES)
    size = mesh.sizes[last] if outer else 1
    hues = mesh.world // size
    made = []
    for rank in range(mesh.world):
        hue, light = divmod(rank, size)
        # hues stop short of the full circle, where the last would meet the first
        red_green_blue = colorsys.hls_to_rgb(0.92 * hue / hues, 0.42 + 0.4 * light / max(size - 1, 1), 0.6)
        made.append("#" + "".join(f"{round(255 * part):02x}" for part in red_green_blue))
    return made


# ---------------------------------------------------------------------------------------------- text


def text_picture(grid: Grid, palette: Sequence[str], width: int) -> Group:
    """`grid` as a table at most `width` wide, whose rows and columns are named by the first index they hold."""
    shown = legible(grid, lambda g: _width(g, spaces=0) <= width)
    few, wide = len(shown.rows) <= 8, _width(shown, spaces=2) > width
    style = box.SQUARE if few else box.SQUARE_DOUBLE_HEAD
    table = Table(box=style, show_lines=few, header_style="", padding=(0, 0 if wide else 1))
    table.add_column("", justify="right", no_wrap=True)
    for column in shown.columns:
        table.add_column(str(column.start), justify="center", no_wrap=True)
    for head, blocks in zip(shown.heads, shown.ranks, strict=True):
        table.add_row(head, *(_cell(ranks, palette) for ranks in blocks))
    return Group(Text(shown.title), table)


def _width(grid: Grid, spaces: int) -> int:
    """Characters of a line of the table, whose columns have so many spaces and a border each."""
    columns = [max(len(label(row[j])) for row in grid.ranks) for j in range(len(grid.columns))]
    names = [len(str(column.start)) for column in grid.columns]
    return 1 + sum(1 + spaces + n for n in [max(map(len, grid.heads)), *map(max, columns, names)])


def _cell(ranks: Sequence[int], palette: Sequence[str]) -> Text:
    """The label, on the colour of its rank where there is one."""
    return Text(label(ranks), style=f"black on {palette[ranks[0]]}" if len(ranks) == 1 else "")


# ---------------------------------------------------------------------------------------------- drawn


def check_picture(file: Path) -> None:
    """Raise UserError unless a picture can be written to `file`."""
    if file.suffix.lower() not in FORMATS:
        raise UserError("--picture", file, f"ends in {file.suffix or 'nothing'}", f"endings: {', '.join(FORMATS)}")
    check_target(file, "--picture")


def draw(title: str, mesh: Mesh, grids: Sequence[Grid], file: Path) -> None:
    """Draw the mesh and each of `grids` side by side into an SVG or PNG, by the ending of `file`."""
    import matplotlib  # slow to import, and for drawing alone

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels, palette = [mesh_grid(mesh), *grids], colours(mesh)
    across = 2 if len(panels) <= 4 else 3
    down = -(-len(panels) // across)
    # text stays text in an SVG, and its ids do not change from one run to the next
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tessera", "font.size": 9}):
        figure, axes = pyplot.subplots(down, across, figsize=(4.6 * across, 3.9 * down), layout="constrained")
        figure.suptitle(title, fontsize=11)
        for place, axis in enumerate(axes.flat):
            if place < len(panels):
                _draw_grid(axis, panels[place], palette, f"panel{place}", names_blocks=place == 0)
            else:
                axis.axis("off")
        legend = []
        if any(len(ranks) > 1 for grid in grids for blocks in grid.ranks for ranks in blocks):
            legend.append("a block with slanting stripes is held whole by the rank of each of its colours")
        if any(mark in text.get_text() for axis in axes.flat for text in axis.texts for mark in "–…"):
            legend.append(LABELS)
        figure.supxlabel("\n".join(legend), fontsize=9)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
        pyplot.close(figure)


_POINTS = (290, 210)  # of a panel, across and down, about
_SMALLEST, _LARGEST = 5.0, 11.0  # font sizes
_BEHIND = {"boxstyle": "round,pad=0.18", "facecolor": "white", "alpha": 0.82, "linewidth": 0}


def _draw_grid(axis: Any, grid: Grid, palette: Sequence[str], name: str, *, names_blocks: bool) -> None:
    """One panel: blocks in their ranks' colours, a label on each group of blocks in which one is legible.

    Numbers at the sides are the indices of edges, or (`names_blocks`) the names of the groups.
    """
    for row, blocks in zip(grid.rows, grid.ranks, strict=True):
        for column, ranks in zip(grid.columns, blocks, strict=True):
            _fill(axis, row, column, ranks, palette, name, below_diagonal=grid.causal and row == column)
    shown = legible(grid, lambda g: _font_size(g) >= _SMALLEST)
    size = max(_font_size(shown), _SMALLEST)
    for row, blocks in zip(shown.rows, shown.ranks, strict=True):
        for column, ranks in zip(shown.columns, blocks, strict=True):
            if not ranks:
                continue
            middle = ((column.start + column.stop) / 2, (row.start + row.stop) / 2)
            axis.text(*middle, label(ranks), ha="center", va="center", fontsize=size, bbox=_BEHIND)
    height, width = grid.rows[-1].stop, grid.columns[-1].stop
    for blocks_and_groups, thickness in (((grid.rows, grid.columns), 0.4), ((shown.rows, shown.columns), 1.6)):
        rows, columns = blocks_and_groups
        axis.hlines([row.start for row in rows[1:]], 0, width, color="white", linewidth=thickness)
        axis.vlines([column.start for column in columns[1:]], 0, height, color="white", linewidth=thickness)
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_title(shown.title, fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=7)
    if names_blocks:
        axis.set_xticks([(c.start + c.stop) / 2 for c in shown.columns], [str(c.start) for c in shown.columns])
        axis.set_yticks([(r.start + r.stop) / 2 for r in shown.rows], shown.heads)
    else:
        axis.set_xticks([*(c.start for c in shown.columns), width])
        axis.set_yticks([*(r.start for r in shown.rows), height])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _fill(
    axis: Any,
    row: slice,
    column: slice,
    ranks: Sequence[int],
    palette: Sequence[str],
    name: str,
    below_diagonal: bool,
) -> None:
    """Paint one block, in slanting stripes where several ranks hold it, so that they do not look like blocks."""
    from matplotlib.patches import Polygon  # as above

    stripe = (column.stop - column.start) / max(1, len(ranks))
    slant = 0.45 * stripe
    for place, rank in enumerate(ranks):
        left, right = column.start + place * stripe, column.start + (place + 1) * stripe
        at_left, at_right = slant * (place > 0), slant * (place + 1 < len(ranks))
        corners = [
            (left + at_left, row.start),
            (right + at_right, row.start),
            (right - at_right, row.stop),
            (left - at_left, row.stop),
        ]
        patch = Polygon(corners, facecolor=palette[rank], linewidth=0)
        patch.set_gid(f"{name}-rank{rank}")
        axis.add_patch(patch)
        if below_diagonal:
            triangle = [(column.start, row.start), (column.stop, row.stop), (column.start, row.stop)]
            patch.set_clip_path(Polygon(triangle, transform=axis.transData))


def _font_size(grid: Grid) -> float:
    """The largest font size in which every label fits into its block."""
    longest = max(len(label(ranks)) for blocks in grid.ranks for ranks in blocks)
    across, down = _POINTS[0] / len(grid.columns), _POINTS[1] / len(grid.rows)
    return min(_LARGEST, across / (0.62 * longest + 1.4), down / 1.7)
