"""Layouts: which mesh axes cut the tokens and the features of the two streams.

    stream      tokens cut over          features cut over
    residual    depth · row · col        inner                 without sequence parallelism: tokens over depth · row
                depth · row              inner · col           for summa and cannon, whose panels line up so
    hidden      depth · row · inner      col
                depth · row              col · inner           in attention, when heads divide so and the batch does not

A column-parallel layer leads from residual to hidden, a row-parallel layer back: the output layout of each layer is the
input layout of the next, so no step of a model re-lays anything out. Within one axis order the first axis is major.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tessera.core.axes import DATA_AXES, SEQUENCE_AXES
from tessera.core.mesh import Mesh
from tessera.product.roles import Roles
from tessera.sizes.rules import heads_divide


@dataclass(frozen=True)
class Layout:
    """The axes that cut the tokens (dim 0) and the features (dim 1) of an activation, major to minor."""

    tokens: tuple[str, ...]
    features: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        return self.tokens + self.features

    @property
    def cuts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The axes that cut each dim, as a `ParameterSpec` has them."""
        return self.tokens, self.features

    def stored_dim(self, axis: str) -> int | None:
        """The dim of the activation that `axis` cuts; None when it holds a whole copy on every rank of the axis."""
        return 0 if axis in self.tokens else 1 if axis in self.features else None


TOKEN_AXES = ("depth", "row")
HIDDEN = Layout(tokens=(*TOKEN_AXES, "inner"), features=("col",))
HIDDEN_BY_HEADS = Layout(tokens=TOKEN_AXES, features=("col", "inner"))


def attention_layout(sizes: Mapping[str, int], batch: int, dimensions: Mapping[str, int]) -> Layout:
    """The hidden stream inside attention: where `batch` does not divide, heads are cut along inner, if they divide.

    `dimensions` are those of the model, as `sizes.remedies.check_sizes` takes them.
    """
    whole_rows = batch % _ranks(HIDDEN, sizes) == 0
    by_heads = heads_divide(dimensions, math.prod(sizes[axis] for axis in HIDDEN_BY_HEADS.features))
    return HIDDEN_BY_HEADS if by_heads and not whole_rows else HIDDEN


def joins_rows(sizes: Mapping[str, int], batch: int, dimensions: Mapping[str, int]) -> bool:
    """Whether `batch` rows are too few for the axes that cut attention's tokens, which then share each sequence."""
    return batch % _ranks(attention_layout(sizes, batch, dimensions), sizes) != 0


def _ranks(layout: Layout, sizes: Mapping[str, int]) -> int:
    """Among how many ranks `layout` cuts tokens."""
    return math.prod(sizes[axis] for axis in layout.tokens)


def residual_layout(sequence_parallel: bool, schedule: str = "gather") -> Layout:
    """The residual stream: along `col` cut over tokens, or (Megatron without sequence parallelism) whole there.

    The loops of `summa` and `cannon` take it cut over features along `col`, as W is cut along `row`.
    """
    if schedule != "gather":
        return Layout(tokens=TOKEN_AXES, features=("inner", "col"))
    return Layout(tokens=(*TOKEN_AXES, "col") if sequence_parallel else TOKEN_AXES, features=("inner",))


@dataclass(frozen=True)
class Streams:
    """The layouts of one model's streams, and the axes that follow from them. `attention` is the hidden one in there.

    `batch` are the axes that cut the batch: along them each rank has rows of its own, or its part of rows. `ids` are
    those that cut a micro-batch in every stream: so the ids to look up and the targets are cut.
    """

    residual: Layout
    attention: Layout = HIDDEN
    hidden: Layout = HIDDEN
    batch: ClassVar[tuple[str, ...]] = (*DATA_AXES, *SEQUENCE_AXES)
    ids: ClassVar[tuple[str, ...]] = TOKEN_AXES

    @property
    def loss(self) -> tuple[str, ...]:
        """The axes along which each rank's loss is that of other tokens. Along all others it is the same number.

        So a rank's loss counts where it is the first copy over these: where its place along all others is 0.
        """
        return (*self.batch, *self.hidden.tokens)


@dataclass(frozen=True)
class LinearPlan:
    """How one parallel linear layer lies on the mesh: its two layouts, and the axes that cut W, dim by dim."""

    input: Layout
    output: Layout
    outputs_axis: str
    inputs_axis: str
    weight_cuts: tuple[tuple[str, ...], tuple[str, ...]]
    bias_cuts: tuple[tuple[str, ...]]
    w_dim: int
    tokens_axes: tuple[str, ...] = ("row",)

    def roles(self, mesh: Mesh) -> Roles:
        """The groups of this layer's product on `mesh`."""
        return Roles(
            tokens=mesh.group(self.tokens_axes),
            outputs=mesh.group((self.outputs_axis,)),
            inputs=mesh.group((self.inputs_axis,)),
            x_dim=self.input.stored_dim(self.outputs_axis),
            w_dim=self.w_dim,
            y_dim=self.output.stored_dim(self.inputs_axis),
        )


def column_parallel(residual: Layout, hidden: Layout = HIDDEN, weights_over: tuple[str, ...] = ("row",)) -> LinearPlan:
    """q, k, v, gate, up, head: residual → hidden; T over depth·row, N over col, K over inner.

    `weights_over`: the token axes along which the weight is stored cut: row, or depth and row.
    """
    cuts = (("col",), ("inner", *weights_over))
    return LinearPlan(residual, hidden, "col", "inner", cuts, (("col",),), w_dim=1, tokens_axes=weights_over)


def row_parallel(residual: Layout, hidden: Layout = HIDDEN, weights_over: tuple[str, ...] = ("row",)) -> LinearPlan:
    """attention out, down, embedding: hidden → residual; T over depth·row, N over inner, K over col."""
    cuts = (("inner", *weights_over), ("col",))
    return LinearPlan(hidden, residual, "inner", "col", cuts, (residual.features,), w_dim=0, tokens_axes=weights_over)


def check_chain(producer: str, output: Layout, consumer: str, input: Layout) -> None:
    """Raise ValueError, naming both, when one layer's output layout is not the next one's input layout."""
    if output != input:
        raise ValueError(f"{producer} gives {output}, but {consumer} takes {input}: layouts must chain without a move")
