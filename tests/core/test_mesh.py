"""Axes, coordinates and groups."""

import itertools
import math

import numpy as np
import pytest

from core.core_cases import hang_in_a_group, members, wrong_world
from support.pool import pool
from tessera.core.axes import AXES, MODEL_AXES
from tessera.core.mesh import Mesh

CUBE = {"inner": 2, "row": 2, "col": 2}


@pytest.mark.parametrize(
    "sizes",
    [{}, {"col": 4}, {"row": 2, "col": 3}, {"inner": 2, "depth": 3, "row": 2, "col": 2}, dict.fromkeys(AXES, 2)],
    ids=lambda s: "×".join(s) or "one",
)
def test_coordinates_count_the_innermost_axis_first(sizes):
    shape = [sizes.get(axis, 1) for axis in AXES]
    for rank in range(math.prod(shape)):
        mesh = Mesh(sizes, rank=rank)
        assert mesh.coordinates == dict(zip(AXES, np.unravel_index(rank, shape), strict=True))
        assert mesh.index(AXES) == rank and mesh.world == math.prod(shape)


def test_the_busiest_axis_is_innermost():
    assert AXES == ("pp", "replicate", "shard", "ring", "ulysses", "inner", "depth", "row", "col")
    assert Mesh({"row": 2, "col": 4}, rank=5).coordinates["col"] == 1


def test_ranks_may_be_numbered_in_another_order():
    numbering = ("row", *(axis for axis in AXES if axis != "row"))
    mesh = Mesh({"row": 2, "col": 4}, rank=5, numbering=numbering)
    assert mesh.coordinates == Mesh({"row": 2, "col": 4}, rank=5).coordinates  # row was before col anyhow
    numbering = (*(axis for axis in AXES if axis != "row"), "row")
    mesh = Mesh({"row": 2, "col": 4}, rank=5, numbering=numbering)
    assert (mesh.coordinates["row"], mesh.coordinates["col"]) == (1, 2)
    assert mesh.at(3).coordinates["row"] == 1 and mesh.at(3).numbering == numbering
    with pytest.raises(ValueError, match="numbered along every axis once"):
        Mesh({"row": 2}, rank=0, numbering=("row",))


def test_axes_of_size_one_are_not_present():
    mesh = Mesh({"col": 2, "row": 1, "inner": 3}, rank=0)
    assert mesh.present(("col", "row", "inner")) == ("inner", "col")
    assert mesh.present(MODEL_AXES) == ("inner", "col")
    assert mesh.size(("col", "row", "inner")) == 6 and mesh.size(()) == 1
    assert str(mesh) == "inner 3 × col 2" and str(Mesh(rank=0)) == "one process"


def test_index_takes_the_first_axis_as_major():
    mesh = Mesh({"inner": 2, "row": 2, "col": 3}, rank=11)  # inner 1, row 1, col 2
    assert mesh.index(("row", "col")) == 5
    assert mesh.index(("col", "row")) == 5
    mesh = Mesh({"row": 2, "col": 3}, rank=4)  # row 1, col 1
    assert mesh.index(("row", "col")) == 4 and mesh.index(("col", "row")) == 3 and mesh.index(()) == 0


def test_groups_of_one_rank_are_none():
    assert Mesh().group(("col",)) is None and Mesh().group(()) is None
    assert Mesh().device_mesh is None


def test_groups_are_in_mesh_order():
    """Whatever the order in which their axes are asked for, ranks follow one another as in the mesh."""
    run, ranks = pool(8, gloo=True).run, np.arange(8).reshape(2, 2, 2)
    for count in (1, 2, 3):
        for axes in itertools.combinations(CUBE, count):
            for rank, found in enumerate(run(members, CUBE, axes)):
                place = np.unravel_index(rank, ranks.shape)
                index = tuple(slice(None) if axis in axes else at for axis, at in zip(CUBE, place, strict=True))
                expected = ranks[index].flatten().tolist()
                assert found == {
                    "gathered": expected,
                    "axes": axes,
                    "place": expected.index(rank),
                    "backend": expected.index(rank),
                    "size": len(expected),
                }


def test_unknown_axes_are_named():
    with pytest.raises(ValueError, match=r"unknown mesh axes \['cow'\]; the axes are pp, .*, row, col"):
        Mesh({"cow": 2})


def test_sizes_must_equal_the_world():
    with pytest.raises(ValueError, match="a mesh row 2 × col 2 has 4 ranks, but 1 are running"):
        Mesh({"row": 2, "col": 2})
    assert pool(2, gloo=True).run(wrong_world) == ["a mesh col 4 has 4 ranks, but 2 are running"] * 2


def test_a_rank_that_hangs_in_a_group_ends_the_others_at_the_timeout():
    """Not half an hour later, which is what torch gives groups that are made after the default one."""
    found = pool(4, gloo=True).run(hang_in_a_group, 1.5)
    assert [timeouts for timeouts, _, _ in found] == [[1.5] * 3] * 4
    _, told, seconds = found[1]
    assert "Timed out waiting" in told and 1.4 < seconds < 2.9
    assert found[2][1] == found[3][1] == "", "the other column group has nobody to wait for"
