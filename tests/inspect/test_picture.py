"""Text pictures against what ranks hold, and drawings that name and colour every rank."""

import io
import re

import pytest
from rich.console import Console

from support.inspect_cases import first_held
from support.pool import pool
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.inspect.picture import (
    Grid,
    check_picture,
    coarsened,
    colours,
    draw,
    grid_of,
    label,
    mesh_grid,
    text_picture,
)

WEIGHT = (("col",), ("inner", "row"))


def ranks_of(sizes: dict[str, int]) -> list[Mesh]:
    world = Mesh(sizes, rank=0).world
    return [Mesh(sizes, rank=rank) for rank in range(world)]


def text(grid: Grid, width: int = 100, colour: bool = False) -> str:
    mesh = Mesh({"col": 512}, rank=0)  # as many colours as a test needs
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(text_picture(grid, colours(mesh), width))
    return file.getvalue()


PICTURES = {
    "2d": (
        {"row": 2, "col": 2},
        """\
up
[out: col][in: row]
┌────┬───┬────┐
│    │ 0 │ 32 │
├────┼───┼────┤
│  0 │ 0 │ 2  │
├────┼───┼────┤
│ 48 │ 1 │ 3  │
└────┴───┴────┘
""",
    ),
    "3d": (
        {"inner": 2, "row": 2, "col": 2},
        """\
up
[out: col][in: row]
┌────┬───┬────┬────┬────┐
│    │ 0 │ 16 │ 32 │ 48 │
├────┼───┼────┼────┼────┤
│  0 │ 0 │ 2  │ 4  │ 6  │
├────┼───┼────┼────┼────┤
│ 48 │ 1 │ 3  │ 5  │ 7  │
└────┴───┴────┴────┴────┘
""",
    ),
    "2.5d": (
        {"depth": 2, "row": 2, "col": 2},
        """\
up
[out: col][in: row]
┌────┬─────┬─────┐
│    │  0  │ 32  │
├────┼─────┼─────┤
│  0 │ 0,4 │ 2,6 │
├────┼─────┼─────┤
│ 48 │ 1,5 │ 3,7 │
└────┴─────┴─────┘
""",
    ),
}


@pytest.mark.parametrize("layout", PICTURES)
def test_the_text_is_what_ranks_hold(layout):
    sizes, expected = PICTURES[layout]
    picture = text(grid_of("up\n[out: col][in: row]", (96, 64), WEIGHT, ranks_of(sizes)))
    assert "\n".join(line.rstrip() for line in picture.splitlines()) + "\n" == expected
    # the table again, read cell by cell: each rank is where the first element of its own DTensor shard lies
    _, *lines = [re.findall(r"[^│]+", line) for line in picture.splitlines() if line.startswith("│")]
    starts = [int(cell) for cell in re.findall(r"\d+", picture.splitlines()[3])]
    drawn = {}
    for head, *cells in lines:
        for start, cell in zip(starts, cells, strict=True):
            drawn |= {int(rank): (int(head), start) for rank in cell.split(",")}
    held = pool(len(ranks_of(sizes))).run(first_held, sizes, (96, 64), WEIGHT)
    assert drawn == {rank: divmod(first, 64) for rank, first in enumerate(held)}


def test_an_uneven_dim_and_one_dim_are_drawn_as_they_are_held():
    uneven = grid_of("V", (509, 64), (("col",), ("row",)), ranks_of({"row": 2, "col": 4}))
    assert [(r.start, r.stop) for r in uneven.rows] == [(0, 128), (128, 256), (256, 384), (384, 509)]
    bias = grid_of("b", (96,), (("col",),), ranks_of({"row": 2, "col": 2}))
    assert (bias.rows, bias.ranks) == ((slice(0, 1),), (((0, 2), (1, 3)),))


def test_labels():
    assert [label(ranks) for ranks in ([3], [0, 4], [0, 1, 2], [0, 2, 4, 6])] == ["3", "0,4", "0–2", "0,2,4,6"]
    assert label(range(0, 64, 8)) == "0…56/8"
    assert label([0, 1, 8, 9, 16]) == "0…16 (5)"


@pytest.mark.parametrize("sizes", [{"col": 64}, {"row": 8, "col": 8}, {"inner": 8, "row": 8, "col": 8}], ids=str)
def test_large_worlds_fit_the_width_and_keep_every_rank(sizes):
    grid = grid_of("up", (4096, 4096), WEIGHT, ranks_of(sizes))
    lines = text(grid).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 24
    small = coarsened(grid, 4, 2)
    assert len(small.rows) <= 4 and len(small.columns) <= 2
    everyone = sorted(rank for blocks in small.ranks for ranks in blocks for rank in ranks)
    assert everyone == list(range(len(ranks_of(sizes))))
    assert ("each cell here is" in text(grid)) == (sizes != {"row": 8, "col": 8})


def test_colours_are_of_the_rank_and_only_for_terminals():
    grid = grid_of("up", (96, 64), WEIGHT, ranks_of({"row": 2, "col": 2}))
    assert "\x1b" not in text(grid) and "\x1b[" in text(grid, colour=True)
    for sizes in ({"col": 2}, {"row": 2, "col": 4}, {"row": 8, "col": 8}, {"col": 64}):
        palette = colours(Mesh(sizes, rank=0))
        assert len(set(palette)) == len(palette) == Mesh(sizes, rank=0).world


def test_the_mesh_is_drawn_with_its_coordinates():
    grid = mesh_grid(Mesh({"inner": 2, "row": 2, "col": 2}, rank=0))
    assert grid.heads == ("0 0", "0 1", "1 0", "1 1") and grid.ranks[2] == ((4,), (5,))
    assert grid.title.endswith("inner row ↓  col →")


def test_the_svg_has_every_rank_in_its_colour_in_every_panel(tmp_path):
    sizes = {"depth": 2, "row": 2, "col": 2}
    ranks, file = ranks_of(sizes), tmp_path / "a.svg"
    stream = grid_of("residual", (32, 64), (("depth", "row", "col"), ()), ranks)
    draw("2.5d", ranks[0], [grid_of("up", (96, 64), WEIGHT, ranks), stream], file)
    drawing, palette = file.read_text(), colours(ranks[0])
    for panel in range(3):
        for rank in range(8):
            assert re.search(rf'<g id="panel{panel}-rank{rank}">\s*<path [^>]*fill: {palette[rank]}', drawing)
    labels = re.findall(r">([\d,]+)</text>", drawing)
    assert {"0,4", "1,5", "2,6", "3,7", *map(str, range(8))} <= set(labels)
    assert "slanting stripes" in drawing  # some blocks are held twice, and look so


def test_a_png_of_many_ranks_is_drawn(tmp_path):
    ranks, file = ranks_of({"row": 8, "col": 8}), tmp_path / "a.png"
    draw("2d", ranks[0], [grid_of("up", (4096, 4096), WEIGHT, ranks)], file)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


@pytest.mark.parametrize(("name", "reason"), [("a.jpg", "ends in .jpg"), ("a", "nothing"), ("no/a.svg", "folder")])
def test_a_file_that_cannot_be_drawn_is_refused(tmp_path, name, reason):
    with pytest.raises(UserError, match=reason) as caught:
        check_picture(tmp_path / name)
    assert caught.value.key == "--picture"
    check_picture(tmp_path / "A.PNG")
