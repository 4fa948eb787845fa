"""Layouts: which mesh axes cut the tokens and the features of the two streams, and the table of geometries.

    stream      tokens cut over          features cut over
    residual    depth · row · col        inner                 (without sequence parallelism: depth · row)
    hidden      depth · row · inner      col

A column-parallel layer leads from residual to hidden, a row-parallel layer back: the output layout of each layer is the
input layout of the next, so no step of a model re-lays anything out. Within one axis order the first axis is major.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tessera.errors import UserError
from tessera.mesh import Mesh
from tessera.product import Roles


@dataclass(frozen=True)
class Layout:
    """The axes that cut the tokens (dim 0) and the features (dim 1) of an activation, major to minor."""

    tokens: tuple[str, ...]
    features: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        return self.tokens + self.features

    def stored_dim(self, axis: str) -> int | None:
        """The dim of the activation that `axis` cuts; None when it holds a whole copy on every rank of the axis."""
        return 0 if axis in self.tokens else 1 if axis in self.features else None


HIDDEN = Layout(tokens=("depth", "row", "inner"), features=("col",))


def residual_layout(sequence_parallel: bool) -> Layout:
    """The residual stream: cut over tokens along `col` too, or (Megatron without sequence parallelism) whole there."""
    return Layout(tokens=("depth", "row", "col") if sequence_parallel else ("depth", "row"), features=("inner",))


@dataclass(frozen=True)
class LinearPlan:
    """How one parallel linear layer lies on the mesh: its two layouts, and the axes that cut W, dim by dim."""

    input: Layout
    output: Layout
    outputs_axis: str
    inputs_axis: str
    weight_cuts: tuple[tuple[str, ...], tuple[str, ...]]
    w_dim: int

    @property
    def bias_cuts(self) -> tuple[tuple[str, ...]]:
        return ((self.outputs_axis,),)

    def roles(self, mesh: Mesh) -> Roles:
        """The groups of this layer's product on `mesh`."""
        return Roles(
            tokens=mesh.group(("row",)),
            outputs=mesh.group((self.outputs_axis,)),
            inputs=mesh.group((self.inputs_axis,)),
            x_dim=self.input.stored_dim(self.outputs_axis),
            w_dim=self.w_dim,
            y_dim=self.output.stored_dim(self.inputs_axis),
        )


def column_parallel(residual: Layout) -> LinearPlan:
    """q, k, v, gate, up, head: residual → hidden; T over depth·row, N over col, K over inner."""
    return LinearPlan(residual, HIDDEN, "col", "inner", (("col",), ("inner", "row")), w_dim=1)


def row_parallel(residual: Layout) -> LinearPlan:
    """attention out, down, embedding: hidden → residual; T over depth·row, N over inner, K over col."""
    return LinearPlan(HIDDEN, residual, "inner", "col", (("inner", "row"), ("col",)), w_dim=0)


def check_chain(producer: str, output: Layout, consumer: str, input: Layout) -> None:
    """Raise ValueError, naming both, when one layer's output layout is not the next one's input layout."""
    if output != input:
        raise ValueError(f"{producer} gives {output}, but {consumer} takes {input}: layouts must chain without a move")


# ---------------------------------------------------------------------------------------------- geometries


def _one_dimensional(size: int) -> dict[str, int]:
    return {"col": size}


# tensor_parallel_mode → the sizes of (inner, depth, row, col) that a tensor_parallel_size alone gives.
GEOMETRIES: dict[str, Callable[[int], dict[str, int]]] = {
    "1d": _one_dimensional,
}


def mesh_sizes(mode: str, size: int) -> dict[str, int]:
    """The model axes of geometry `mode` at `size` ranks."""
    if mode not in GEOMETRIES:
        raise UserError(
            "tensor_parallel_mode",
            mode,
            "is not a geometry of this version",
            f"there are: {', '.join(GEOMETRIES)}",
        )
    return GEOMETRIES[mode](size)


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `value`, in words."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def _fitting_sizes(size: int, fits: Callable[[int], bool]) -> str:
    fitting = [s for s in range(1, 2 * size + 1) if fits(s)]
    below = [s for s in fitting if s < size][-1:]
    above = [s for s in fitting if s > size][:1]
    return " or ".join(str(s) for s in below + above) or "1"


def _every_rank_has_a_row(vocabulary: int, col: int) -> bool:
    """Shards are as long as torch.chunk's, so that the last ones may be empty."""
    return -(-vocabulary // col) * (col - 1) < vocabulary


def check_sizes(mode: str, size: int, dimensions: dict[str, int]) -> None:
    """Raise UserError, before any process starts, when a cut dimension does not divide by its axes.

    `dimensions` names the model's: hidden_size, num_attention_heads, kv_features, intermediate_size, vocab_size (which
    may be uneven). The message gives the tensor sizes that fit the model and the model sizes that fit the tensor size.
    """
    axes = {"inner": 1, "depth": 1, "row": 1, "col": 1} | mesh_sizes(mode, size)
    col, features = axes["col"], math.prod(axes[a] for a in ("inner", "row"))
    vocabulary = dimensions["vocab_size"]
    needs = {
        "hidden_size": features,
        "num_attention_heads": col,
        "kv_features": col,
        "intermediate_size": col,
    }

    def fits(other: int) -> bool:
        ways = {"inner": 1, "depth": 1, "row": 1, "col": 1} | mesh_sizes(mode, other)
        return _every_rank_has_a_row(vocabulary, ways["col"]) and all(
            dimensions[k] % (ways["col"] if k != "hidden_size" else ways["inner"] * ways["row"]) == 0 for k in needs
        )

    for key, divisor in needs.items():
        value = dimensions[key]
        if value % divisor:
            name = "num_key_value_heads × head_dim" if key == "kv_features" else key
            raise UserError(
                "tensor_parallel_size",
                size,
                f"cuts {name} = {value} of the model {divisor} ways, which does not divide",
                f"tensor_parallel_size: {_fitting_sizes(size, fits)} fits this model; "
                f"or a model with {name} {nearest_multiples(value, divisor)}",
            )
    if not _every_rank_has_a_row(vocabulary, col):
        raise UserError(
            "tensor_parallel_size",
            size,
            f"leaves ranks without a row of the vocabulary of {vocabulary}",
            f"tensor_parallel_size: {_fitting_sizes(size, fits)} fits this model; "
            f"or a model with vocab_size {-(-vocabulary // col) * col}",
        )
