"""Streams, plans of the two linear layers, and the table of geometries."""

import itertools
import math

import pytest

from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.engine.gradients import first_copy
from tessera.layout.parallel import Parallel
from tessera.layout.streams import (
    HIDDEN,
    HIDDEN_BY_HEADS,
    Layout,
    Streams,
    check_chain,
    column_parallel,
    residual_layout,
    row_parallel,
)
from tessera.nn.attention import Attention, AttentionConfig
from tessera.nn.mlp import MLP
from tessera.sizes.geometries import geometry_axes, mesh_sizes


def test_streams():
    assert residual_layout(True) == Layout(("depth", "row", "col"), ("inner",))
    assert residual_layout(False) == Layout(("depth", "row"), ("inner",))
    assert Layout(("depth", "row", "inner"), ("col",)) == HIDDEN
    assert [HIDDEN.stored_dim(a) for a in ("depth", "row", "inner", "col")] == [0, 0, 0, 1]
    assert residual_layout(True).stored_dim("col") == 0 and residual_layout(False).stored_dim("col") is None


def counted(mesh, axes):
    """Which part of the batch and of its tokens each rank that is the first copy over `axes` has a loss of."""
    ranks = [mesh.at(rank) for rank in range(mesh.world)]
    return [(r.index(Streams.batch), r.index(HIDDEN.tokens)) for r in ranks if first_copy(r, axes)]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"col": 2},
        {"inner": 2, "row": 2, "col": 2},
        {"replicate": 2, "shard": 2, "depth": 2, "col": 2},
        {"shard": 2, "ring": 3, "ulysses": 2, "inner": 2, "col": 2},
    ],
    ids=str,
)
def test_every_token_has_one_rank_whose_loss_counts(sizes):
    mesh = Mesh(sizes, rank=0)
    for streams in (Streams(residual_layout(True)), Streams(residual_layout(False), HIDDEN_BY_HEADS)):
        parts = mesh.size(streams.batch), mesh.size(HIDDEN.tokens)
        assert sorted(counted(mesh, streams.loss)) == list(itertools.product(*map(range, parts)))
        wrong = streams.hidden.tokens, (*streams.batch, *streams.ids), (*streams.loss, "col")
        present = [mesh.size(streams.batch), mesh.sizes["inner"], mesh.sizes["col"]]
        for axes, ranks in zip(wrong, present, strict=True):
            assert (sorted(counted(mesh, axes)) == list(itertools.product(*map(range, parts)))) == (ranks == 1)


def test_a_models_streams_are_one_value():
    residual = residual_layout(False)
    streams = Parallel(Mesh(), residual, attention=HIDDEN_BY_HEADS).streams
    assert streams == Streams(residual, HIDDEN_BY_HEADS, HIDDEN)
    assert streams.batch == ("replicate", "shard", "ring", "ulysses") and streams.ids == ("depth", "row")


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
def test_linear_layers_lead_from_stream_to_stream(sequence_parallel):
    residual = residual_layout(sequence_parallel)
    column, row = column_parallel(residual), row_parallel(residual)
    check_chain("column", column.output, "row", row.input)
    check_chain("row", row.output, "column", column.input)
    assert column.input == residual and column.output == HIDDEN
    assert column.weight_cuts == (("col",), ("inner", "row")) and column.bias_cuts == (("col",),)
    assert row.weight_cuts == (("inner", "row"), ("col",)) and row.bias_cuts == (("inner",),)
    stored = 0 if sequence_parallel else None
    roles = column.roles(Mesh())
    assert (roles.x_dim, roles.w_dim, roles.y_dim) == (stored, 1, 0)
    roles = row.roles(Mesh())
    assert (roles.x_dim, roles.w_dim, roles.y_dim) == (0, 0, stored)
    assert roles.tokens is roles.outputs is roles.inputs is None


def test_layouts_that_do_not_chain_are_named():
    with pytest.raises(ValueError) as error:
        check_chain("attention", residual_layout(True), "mlp_norm", residual_layout(False))
    message = str(error.value)
    assert "attention gives" in message and "mlp_norm takes" in message
    assert str(residual_layout(True)) in message and str(residual_layout(False)) in message


def test_the_order_of_axes_is_part_of_a_layout():
    swapped = Layout(("depth", "col", "row"), ("inner",))
    with pytest.raises(ValueError, match="must chain"):
        check_chain("a", residual_layout(True), "b", swapped)


def test_blocks_check_their_layers(monkeypatch):
    """A row-parallel layer that reads another stream is found when the block is built."""
    parallel = Parallel(Mesh(), residual_layout(True))
    MLP(8, 8, parallel), Attention(AttentionConfig(8, 2, 2, 4), parallel, name="here")
    monkeypatch.setattr("tessera.nn.linear.RowParallelLinear.make_plan", staticmethod(Parallel.column))
    with pytest.raises(ValueError, match="up gives .* but down takes"):
        MLP(8, 8, parallel)
    with pytest.raises(ValueError, match="q, k, v gives .* but attention out takes"):
        Attention(AttentionConfig(8, 2, 2, 4), parallel, name="here")


def test_geometries():
    def shape(mode, size, **options):
        sizes = mesh_sizes(mode, size, **options)
        assert math.prod(sizes.values()) == size
        return tuple(sizes[axis] for axis in ("inner", "depth", "row", "col"))

    assert shape("1d", 4) == (1, 1, 1, 4)
    assert [shape("2d", size) for size in (1, 4, 8, 12, 7)] == [
        (1, 1, 1, 1),
        (1, 1, 2, 2),
        (1, 1, 2, 4),
        (1, 1, 3, 4),
        (1, 1, 1, 7),
    ]
    assert shape("2.5d", 8) == (1, 2, 2, 2) and shape("2.5d", 12, depth=3) == (1, 3, 2, 2)
    assert shape("3d", 27) == (3, 1, 3, 3)


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("7d", 4, "tensor_parallel_mode: 7d\n.*\n.*there are: 1d"),
        ("2.5d", 7, "tensor_parallel_size: 7\n.*depth of 2\n.*a multiple of 2"),
        ("3d", 9, "tensor_parallel_size: 9\n.*not a cube.*\n.*tensor_parallel_mesh"),
    ],
)
def test_sizes_without_a_mesh(mode, size, message):
    with pytest.raises(UserError, match=message):
        mesh_sizes(mode, size)


def test_axes_of_a_geometry():
    assert [geometry_axes(mode) for mode in ("1d", "2d", "2.5d", "3d")] == [
        ("col",),
        ("row", "col"),
        ("depth", "row", "col"),
        ("inner", "row", "col"),
    ]
