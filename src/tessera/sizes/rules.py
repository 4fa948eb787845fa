"""Whether the sizes of a config fit each other, the model and the batch; if not, one message with the nearest that do.

    size                  must divide by
    hidden_size           inner · row · slices; where weights are stored cut over depth: · depth
    num_attention_heads   col
    kv_features           col                                        (num_key_value_heads × head_dim)
    intermediate_size     col
    micro_batch_size      nothing: too few rows for depth · row · inner are shared by their ranks (nn/context)
    vocab_size            nothing, but each rank of col has a row of it
    row × col             a square grid for the loops of summa and cannon

Where micro_batch_size does not divide by depth · row · inner, and heads and kv_features do by col · inner, heads are
cut along inner instead of rows. Sequences of any length fit: they are padded. What would fit instead is searched in
remedies.py.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tessera.core.axes import MODEL_AXES
from tessera.core.errors import UserError, as_yaml
from tessera.sizes.geometries import GEOMETRIES, geometry_axes, mesh_sizes
from tessera.sizes.schedule import LOOPS, Schedule

HEADS = ("num_attention_heads", "kv_features")
"""The dimensions cut over `inner` too where the batch is not and they divide."""
IN_ONE_PIECE = ("prefetch", "defer", "overlap")
"""The switches that act in a gathered product in one piece alone."""


@dataclass(frozen=True)
class TensorParallel:
    """The tensor axes as the keys of a config ask for them; None: not given."""

    mode: str = "1d"
    size: int | None = None
    depth: int | None = None
    mesh: Mapping[str, int] | None = None
    depth_weights: str = "replicate"
    schedule: str = "gather"
    slices: int = 1
    keep_gathered: bool = False
    prefetch: bool = True
    defer: bool = True
    overlap: bool = True
    sequence_parallel: bool = True

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of inner, depth, row and col. Raises UserError where mode, size, depth and mesh do not agree."""
        own = geometry_axes(self.mode)
        if self.depth is not None and "depth" not in own:
            raise UserError("tensor_parallel_depth", self.depth, f"{self.mode} has no depth; 2.5d has")
        if self.mesh is None:
            return mesh_sizes(self.mode, self.size or 1, self.depth or 2)
        axes = dict.fromkeys(MODEL_AXES, 1) | dict(self.mesh)
        made, written = math.prod(axes.values()), self.written_mesh
        if foreign := [axis for axis, n in axes.items() if n > 1 and axis not in own]:
            needed = " and ".join(axis for axis, n in axes.items() if n > 1)
            having = " and ".join(modes_with(axes)) or "no geometry"
            reason = f"{self.mode} has no {' and no '.join(foreign)}; {having} has {needed}"
            raise UserError("tensor_parallel_mesh", written, reason)
        if self.size not in (None, made):
            raise UserError("tensor_parallel_size", self.size, f"tensor_parallel_mesh {written} makes {made}")
        if self.depth not in (None, axes["depth"]):
            raise UserError("tensor_parallel_depth", self.depth, f"tensor_parallel_mesh {written} has another")
        return axes

    @property
    def as_schedule(self) -> Schedule:
        """How operands move; before auto has measured, gathered."""
        name = "gather" if self.schedule == "auto" else self.schedule
        return Schedule(name, self.slices, self.keep_gathered, self.prefetch, self.defer, self.overlap)

    @property
    def written_mesh(self) -> str:
        """The mesh as YAML, with the axes that the geometry has or that are above 1."""
        axes, own = dict.fromkeys(MODEL_AXES, 1) | dict(self.mesh or {}), geometry_axes(self.mode)
        return "{" + ", ".join(f"{a}: {n}" for a, n in axes.items() if a in own or n > 1) + "}"


def modes_with(axes: Mapping[str, int]) -> list[str]:
    """The geometries that have every axis above 1."""
    return [mode for mode in GEOMETRIES if all(n == 1 or axis in geometry_axes(mode) for axis, n in axes.items())]


@dataclass(frozen=True)
class Ask:
    """What has to fit together: tensor axes, the model's dimensions by the names users know, micro_batch_size."""

    tensor: TensorParallel
    dimensions: Mapping[str, int]
    batch: int


class Misfit(NamedTuple):
    """A key, its value and why it does not fit; `switches` are the fields of `TensorParallel` that may mend it."""

    key: str
    value: object
    reason: str
    switches: tuple[str, ...] = ()


def first_misfit(ask: Ask) -> Misfit | None:
    """The first thing that does not fit, None when all does. Raises UserError for a mode that there is not."""
    return next(_misfits(ask), None)


def _misfits(ask: Ask) -> Iterator[Misfit]:
    """Rule by rule; each may take those before it for granted."""
    geometry_axes(ask.tensor.mode)
    try:
        axes = ask.tensor.axes
    except UserError as error:
        switches = {"tensor_parallel_mesh": ("mode",), "tensor_parallel_depth": ("depth", "mode")}
        yield Misfit(error.key, error.value, error.reason, switches.get(error.key, ("size", "depth")))
        return
    yield from schedule_misfits(ask.tensor, axes)
    yield from _model_misfits(ask, axes)


def schedule_misfits(tensor: TensorParallel, axes: Mapping[str, int]) -> Iterator[Misfit]:
    """Rules of the schedule and of the weights along depth, whatever the model."""
    schedule, loop = tensor.schedule, tensor.schedule in LOOPS
    if tensor.depth_weights == "shard" and axes["depth"] == 1:
        yield _misfit_of(tensor, "depth_weights", "there is no depth to cut weights over", "mode")
    if loop and axes["row"] != axes["col"]:
        reason = f"needs a square grid, and this one has row {axes['row']} × col {axes['col']}"
        yield _misfit_of(tensor, "schedule", reason, "mode")
    if loop and tensor.depth_weights == "shard":
        yield _misfit_of(tensor, "depth_weights", f"{schedule} moves weights along row alone", "schedule")
    if loop and not tensor.sequence_parallel:
        reason = f"{schedule} cuts the residual stream over features along col instead of repeating it there"
        yield _misfit_of(tensor, "sequence_parallel", reason, "schedule")
    if loop and tensor.keep_gathered:
        yield _misfit_of(tensor, "keep_gathered", f"{schedule} gathers nothing that could be kept", "schedule")
    if schedule != "gather" and tensor.slices > 1:
        reason = f"{schedule} {'has panels of its own' if loop else 'chooses the slices itself'}"
        yield _misfit_of(tensor, "slices", reason, "schedule")
    if loop or tensor.slices > 1:
        whose, other = (schedule, "schedule") if loop else ("a product in slices", "slices")
        for field in IN_ONE_PIECE:
            if not getattr(tensor, field):
                yield _misfit_of(tensor, field, f"{whose} overlaps its panels by itself", other)


def _misfit_of(tensor: TensorParallel, field: str, reason: str, *others: str) -> Misfit:
    return Misfit(config_key(field), as_yaml(getattr(tensor, field)), reason, (field, *others))


def _model_misfits(ask: Ask, axes: Mapping[str, int]) -> Iterator[Misfit]:
    tensor, dimensions = ask.tensor, ask.dimensions
    key, value = ("tensor_parallel_mesh", tensor.written_mesh) if tensor.mesh else ("tensor_parallel_size", tensor.size)
    for name, divisor in divisors(tensor, axes).items():
        if dimensions[name] % divisor:
            reason = f"cuts {in_words(name)} = {dimensions[name]} of the model {divisor} ways, which does not divide"
            yield Misfit(key, value, reason)
    block = dimensions["hidden_size"] // divisors(tensor, axes)["hidden_size"]
    if block % tensor.slices:
        reason = f"the {block} features of hidden_size that a rank holds of its weights do not divide"
        yield _misfit_of(tensor, "slices", reason)
    if not every_rank_has_a_row(dimensions["vocab_size"], axes["col"]):
        yield Misfit(key, value, f"leaves ranks without a row of the vocabulary of {dimensions['vocab_size']}")


def divisors(tensor: TensorParallel, axes: Mapping[str, int]) -> dict[str, int]:
    """What each dimension of the model must be a multiple of, slices and the batch aside."""
    weights_over = axes["row"] * (axes["depth"] if tensor.depth_weights == "shard" else 1)
    return {"hidden_size": axes["inner"] * weights_over, **dict.fromkeys((*HEADS, "intermediate_size"), axes["col"])}


def heads_divide(dimensions: Mapping[str, int], ways: int) -> bool:
    """Whether attention can be cut so many ways by heads."""
    return all(dimensions[name] % ways == 0 for name in HEADS)


def every_rank_has_a_row(vocabulary: int, col: int) -> bool:
    """Shards are as long as torch.chunk's, so that the last ones may be empty."""
    return -(-vocabulary // col) * (col - 1) < vocabulary


def config_key(field: str) -> str:
    """The key that sets a field of `TensorParallel`."""
    return field if field == "sequence_parallel" else f"tensor_parallel_{field}"


def in_words(dimension: str) -> str:
    """A dimension of the model by the keys of config.json."""
    return "num_key_value_heads × head_dim" if dimension == "kv_features" else dimension
