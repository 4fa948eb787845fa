"""The layouts to verify: that of a config, or every one of a world of ranks."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tessera.config.schema import MeshConfig, TrainConfig
from tessera.core.axes import MODEL_AXES
from tessera.core.errors import UserError
from tessera.layout.streams import HIDDEN, attention_layout, joins_rows
from tessera.models.config import ModelConfig
from tessera.plan.tune import kinds
from tessera.sizes.geometries import GEOMETRIES, geometry_axes
from tessera.sizes.numbers import divisors_of
from tessera.sizes.rules import IN_ONE_PIECE, config_key
from tessera.sizes.schedule import Schedule
from tessera.train.settings import fitting_layout
from tessera.verify.problem import LENGTH, Problem, small_batch, small_model


@dataclass(frozen=True)
class Case:
    """A layout, as the config that asks for it, and what is computed in it: at `full` size or in miniature."""

    config: TrainConfig
    problem: Problem
    full: bool = False

    @property
    def name(self) -> str:
        return layout_name(self.config, self.problem.model)


def layout_name(config: TrainConfig, model: ModelConfig) -> str:
    """A layout in few words: 2d row 2 × col 2, summa."""
    axes, transport = config.axes, config.context_parallel.transport
    sizes = " × ".join(f"{transport if axis == 'ring' else axis} {n}" for axis, n in config.mesh_sizes.items() if n > 1)
    said = [f"{config.tensor_parallel_mode} {sizes or 'one rank'}", str(config.schedule)]
    said += ["kept"] if config.tensor_parallel_keep_gathered else []
    said += ["weights over depth"] if config.tensor_parallel_depth_weights == "shard" else []
    said += ["heads over inner"] if axes["inner"] > 1 and _cuts_heads(config, model) else []
    said += [] if config.sequence_parallel else ["no sequence parallel"]
    if _joined(config, model):
        by = "" if config.context_parallel.sizes["ring"] > 1 else f" by {transport}"
        sharing = attention_layout(axes, config.micro_batch_size, model.dimensions).tokens
        said.append(f"sequences over {'·'.join(axis for axis in sharing if axes[axis] > 1)}{by}")
    said += [f"heads in {config.ulysses_chunks} groups"] if config.ulysses_chunks > 1 else []
    said += ["packed"] if config.sample_packing else []
    return ", ".join(said)


def cases_of(config: TrainConfig, model: ModelConfig, full: bool) -> list[Case]:
    """The layout of `config`, which has to fit `model`; with schedule auto in every schedule that it chooses from.

    Raises UserError when the sizes do not fit.
    """
    ways = [config := fitting_layout(config, model)]
    if config.tensor_parallel_schedule == "auto":
        changed = [
            config.model_copy(update={"tensor_parallel_schedule": name, "tensor_parallel_slices": slices})
            for name, slices in kinds(math.prod(config.data_sizes.values()) * config.context_parallel_size)
        ]
        ways = [way for way in changed if not _misfit(way, model)]
    return _cases(ways, model, full)


def every_case(config: TrainConfig, model: ModelConfig, world: int, full: bool) -> tuple[list[Case], dict[str, str]]:
    """Every layout of `world` ranks that `model` allows, tensor-parallel or sharing sequences, and of others why not.

    Each mesh, under the first geometry that has its axes; every schedule, both ways to store weights along depth, to
    cut attention along inner, and in 1d the residual stream repeated too. Then each size of context parallelism with
    each split and transport, beside 1d, and beside 2d where row shares its sequences too. Other keys are those of
    `config`, but for batches, which are made to fit, and switches that panels refuse.
    """
    ways, sharing = list(_ways(config, world)), list(_context_ways(config, world))
    reasons = {}
    if model.attention_dropout or config.eager:  # which no rank does that shares a sequence
        reasons["every layout whose ranks share sequences"] = _misfit(sharing[-1], model)
    else:
        ways += sharing
    named = {layout_name(way, model): way for way in ways}
    reasons |= {name: _misfit(way, model) for name, way in named.items()}
    fitting = [way for name, way in named.items() if not reasons[name]]
    return _cases(fitting, model, full), {name: reason for name, reason in reasons.items() if reason}


def _cases(configs: list[TrainConfig], model: ModelConfig, full: bool) -> list[Case]:
    if full:
        return [_at_full_size(c, model) for c in configs]
    largest = math.lcm(*(c.tensor_parallel_slices for c in configs))
    small = small_model(model, list(map(_head_cuts, configs)), largest)
    steps = 2 if len(configs) == 1 else 1  # a second step only adds the optimizer's state to the first
    return [_in_miniature(c, small, steps) for c in configs]


def _at_full_size(config: TrainConfig, model: ModelConfig) -> Case:
    micro_batches = min(2, config.gradient_accumulation_steps)  # the others would repeat the second
    batch = config.micro_batch_size * math.prod(config.data_sizes.values())
    return Case(config, _problem(config, model, batch, config.sequence_len, micro_batches, steps=1), full=True)


def in_miniature(case: Case) -> Case:
    """The same layout with a small model."""
    model = small_model(case.problem.model, [_head_cuts(case.config)], case.config.tensor_parallel_slices)
    return _in_miniature(case.config, model, steps=1)


def _in_miniature(config: TrainConfig, model: ModelConfig, steps: int) -> Case:
    sizes = config.axes | config.context_parallel.sizes
    batch = small_batch(sizes, _cuts_heads(config, model), _joined(config, model))
    small = config.model_copy(update={"micro_batch_size": batch})
    everyone = batch * math.prod(config.data_sizes.values())
    return Case(small, _problem(config, model, everyone, LENGTH, micro_batches=2, steps=steps))


def _problem(
    config: TrainConfig, model: ModelConfig, batch: int, length: int, micro_batches: int, steps: int
) -> Problem:
    shared = config.context_parallel_size > 1 or _joined(config, model)
    return Problem(model, batch, length, micro_batches, steps, packed=config.sample_packing, shared=shared)


def _cuts_heads(config: TrainConfig, model: ModelConfig) -> bool:
    """Whether attention cuts heads along inner, because the batch does not divide by it."""
    return attention_layout(config.axes, config.micro_batch_size, model.dimensions) != HIDDEN


def _joined(config: TrainConfig, model: ModelConfig) -> bool:
    """Whether the axes that cut tokens share sequences, because the batch does not divide by them."""
    return joins_rows(config.axes, config.micro_batch_size, model.dimensions)


def _head_cuts(config: TrainConfig) -> dict[str, int]:
    """The tensor axes, and into how many parts ulysses cuts the heads that these leave to a rank."""
    return config.axes | {"ulysses": config.context_parallel.sizes["ulysses"] * config.ulysses_chunks}


def _misfit(config: TrainConfig, model: ModelConfig) -> str:
    """Why `model` does not fit this layout; empty when it does."""
    try:
        fitting_layout(config, model)
    except UserError as error:
        return error.reason
    return ""


_NO_OTHER_AXES = {
    "dp_shard_size": 1,
    "dp_replicate_size": 1,
    "context_parallel_size": 1,
    "context_parallel_mode": "auto",
    "ulysses_size": None,
    "ulysses_chunks": 1,
}


def _ways(config: TrainConfig, world: int) -> Iterator[TrainConfig]:
    seen = []
    for mode in GEOMETRIES:
        for sizes in _meshes(geometry_axes(mode), world):
            if sizes in seen:
                continue
            seen.append(sizes)
            mesh = {
                "tensor_parallel_mode": mode,
                "tensor_parallel_size": None,
                "tensor_parallel_depth": None,
                "tensor_parallel_mesh": MeshConfig(**sizes),
                **_NO_OTHER_AXES,
            }
            batches = [small_batch(sizes, by_heads) for by_heads in ([False, True] if sizes["inner"] > 1 else [False])]
            repeated = [True, False] if mode == "1d" else [True]
            for keys, batch, cut in itertools.product(_schedules(config, sizes), batches, repeated):
                if cut or keys["tensor_parallel_schedule"] == "gather":
                    yield config.model_copy(update=mesh | keys | {"micro_batch_size": batch, "sequence_parallel": cut})


def _context_ways(config: TrainConfig, world: int) -> Iterator[TrainConfig]:
    """Layouts in which ranks share sequences: along the sequence axes, along row in one 2d grid, and along both."""
    plain = next(_schedules(config, dict.fromkeys(MODEL_AXES, 1)))
    for size in divisors_of(world):
        tensor = world // size
        grids = [("1d", {"col": tensor})] if size > 1 else []
        grids += [("2d", {"row": row, "col": tensor // row}) for row in divisors_of(tensor)[1:2]]
        for (mode, sizes), ulysses in itertools.product(grids, divisors_of(size)):
            moved = size > ulysses or size == 1  # keys and values along no other axis, so that transports differ
            for transport in ("exchange", "ring") if moved else ("exchange",) if mode == "2d" else ("ulysses",):
                keys = _NO_OTHER_AXES | {
                    "tensor_parallel_mode": mode,
                    "tensor_parallel_size": None,
                    "tensor_parallel_depth": None,
                    "tensor_parallel_mesh": MeshConfig(**sizes),
                    "context_parallel_size": size,
                    "context_parallel_mode": transport,
                    "ulysses_size": ulysses,
                    "micro_batch_size": small_batch(dict.fromkeys(MODEL_AXES, 1) | sizes, False, joined=mode == "2d"),
                    "sequence_parallel": True,
                }
                yield config.model_copy(update=plain | keys)


def _meshes(axes: Iterable[str], world: int) -> Iterator[dict[str, int]]:
    """The sizes of inner, depth, row and col whose product is `world`, all 1 but for `axes`."""
    names = [axis for axis in MODEL_AXES if axis in set(axes)]
    for numbers in itertools.product(divisors_of(world), repeat=len(names)):
        if math.prod(numbers) == world:
            yield dict.fromkeys(MODEL_AXES, 1) | dict(zip(names, numbers, strict=True))


def _schedules(config: TrainConfig, sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """The keys of every schedule, and way to store weights along depth, that a mesh of `sizes` has."""

    def keys(name: str, slices: int = 1, depth: str = "replicate", kept: bool = False) -> dict[str, Any]:
        panels = Schedule(name, slices).in_panels  # whose switches are on
        return {config_key(switch): True for switch in IN_ONE_PIECE if panels} | {
            "tensor_parallel_schedule": name,
            "tensor_parallel_slices": slices,
            "tensor_parallel_depth_weights": depth,
            "tensor_parallel_keep_gathered": kept,
        }

    for slices in (1, max(2, config.tensor_parallel_slices)):
        for depth in ("replicate", "shard") if sizes["depth"] > 1 else ("replicate",):
            yield keys("gather", slices, depth, config.tensor_parallel_keep_gathered)
    if sizes["row"] == sizes["col"]:
        yield keys("summa")
        yield keys("cannon")
