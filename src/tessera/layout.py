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
from tessera.mesh import MODEL_AXES, Mesh
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


def _one_dimensional(size: int, depth: int) -> dict[str, int]:
    return {"col": size}


def _two_dimensional(size: int, depth: int) -> dict[str, int]:
    """The most nearly square row × col, row the smaller."""
    row = next(r for r in range(math.isqrt(size), 0, -1) if size % r == 0)
    return {"row": row, "col": size // row}


def _two_and_a_half(size: int, depth: int) -> dict[str, int]:
    if size % depth:
        raise UserError("tensor_parallel_size", size, f"does not divide by the depth of {depth}", nearest(size, depth))
    return {"depth": depth, **_two_dimensional(size // depth, depth)}


def _three_dimensional(size: int, depth: int) -> dict[str, int]:
    side = round(size ** (1 / 3))
    if side**3 != size:
        reason = "is not a cube: a 3d mesh of another shape has to be given"
        raise UserError("tensor_parallel_size", size, reason, "tensor_parallel_mesh: {inner: …, row: …, col: …}")
    return {"inner": side, "row": side, "col": side}


# tensor_parallel_mode → the sizes of (inner, depth, row, col) that a tensor_parallel_size (and depth) gives.
# The config opens 1d; the layers hold for all.
GEOMETRIES: dict[str, Callable[[int, int], dict[str, int]]] = {
    "1d": _one_dimensional,
    "2d": _two_dimensional,
    "2.5d": _two_and_a_half,
    "3d": _three_dimensional,
}


def mesh_sizes(mode: str, size: int, depth: int = 2) -> dict[str, int]:
    """The sizes of inner, depth, row and col of geometry `mode` at `size` ranks."""
    if mode not in GEOMETRIES:
        raise UserError("tensor_parallel_mode", mode, "is not a geometry", f"there are: {', '.join(GEOMETRIES)}")
    return dict.fromkeys(MODEL_AXES, 1) | GEOMETRIES[mode](size, depth)


def nearest(value: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `value`, in words."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def check_sizes(mode: str, size: int, dimensions: dict[str, int]) -> None:
    """Raise UserError, before any process starts, when a cut dimension does not divide by its axes.

    `dimensions` names the model's: hidden_size, num_attention_heads, kv_features, intermediate_size, vocab_size (which
    may be uneven). The message gives the tensor sizes that fit the model and the model sizes that fit the tensor size.
    """
    for key, divisor in _divisors(mode, size).items():
        value = dimensions[key]
        if value % divisor:
            name = "num_key_value_heads × head_dim" if key == "kv_features" else key
            raise UserError(
                "tensor_parallel_size",
                size,
                f"cuts {name} = {value} of the model {divisor} ways, which does not divide",
                f"tensor_parallel_size: {_fitting_sizes(mode, size, dimensions)} fits this model; "
                f"or a model with {name} {nearest(value, divisor)}",
            )
    vocabulary, col = dimensions["vocab_size"], mesh_sizes(mode, size)["col"]
    if not _every_rank_has_a_row(vocabulary, col):
        raise UserError(
            "tensor_parallel_size",
            size,
            f"leaves ranks without a row of the vocabulary of {vocabulary}",
            f"tensor_parallel_size: {_fitting_sizes(mode, size, dimensions)} fits this model; "
            f"or a model with vocab_size {-(-vocabulary // col) * col}",
        )


def _divisors(mode: str, size: int) -> dict[str, int]:
    """What each dimension of the model must be a multiple of."""
    axes = mesh_sizes(mode, size)
    cut_by_col = dict.fromkeys(("num_attention_heads", "kv_features", "intermediate_size"), axes["col"])
    return {"hidden_size": axes["inner"] * axes["row"], **cut_by_col}


def _every_rank_has_a_row(vocabulary: int, col: int) -> bool:
    """Shards are as long as torch.chunk's, so that the last ones may be empty."""
    return -(-vocabulary // col) * (col - 1) < vocabulary


def _fitting_sizes(mode: str, size: int, dimensions: dict[str, int]) -> str:
    """The nearest tensor sizes on both sides of `size` that fit the model, in words."""

    def fits(other: int) -> bool:
        try:
            divide = all(dimensions[key] % divisor == 0 for key, divisor in _divisors(mode, other).items())
            return divide and _every_rank_has_a_row(dimensions["vocab_size"], mesh_sizes(mode, other)["col"])
        except UserError:  # no such mesh
            return False

    fitting = [other for other in range(1, 2 * size + 1) if fits(other)]
    below, above = [s for s in fitting if s < size][-1:], [s for s in fitting if s > size][:1]
    return " or ".join(map(str, below + above)) or "1"
