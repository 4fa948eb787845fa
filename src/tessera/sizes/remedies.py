"""What would fit instead: the nearest sizes on both sides, searched among all there are.

Every axis divides some size of the model or the batch, so that the meshes which fit a model are few enough to try each;
where they are not, a number of the nearest is tried: the work is bounded.
Nothing is proposed that rules.py would refuse.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tessera.core.axes import MODEL_AXES
from tessera.core.errors import UserError, as_yaml
from tessera.sizes.bounds import RANKS, ROWS, VOCABULARY, WIDTH, at_most
from tessera.sizes.geometries import GEOMETRIES, geometry_axes, mesh_sizes
from tessera.sizes.numbers import both_sides, divisors_of, either, multiples_near, nearest_on_both_sides
from tessera.sizes.rules import (
    HEADS,
    IN_ONE_PIECE,
    Ask,
    TensorParallel,
    config_key,
    divisors,
    every_rank_has_a_row,
    first_misfit,
    in_words,
    modes_with,
    schedule_misfits,
)

Axes = Mapping[str, int]
_ATTEMPTS = 300
"""Settings of switches that are tried, those on the way to others too."""
_MESHES = 2000
"""Meshes that are tried for each: the nearest, where a model's sizes have more divisors than models have."""
_PLAIN = {  # switches as they fit most
    "schedule": "gather",
    "slices": 1,
    "keep_gathered": False,
    "depth_weights": "replicate",
    "sequence_parallel": True,
    "depth": None,
    **dict.fromkeys(IN_ONE_PIECE, True),
}


def check_sizes(tensor: TensorParallel, dimensions: Mapping[str, int], batch: int) -> None:
    """Raise UserError, one message for all that is wrong, with the nearest sizes that fit.

    `dimensions` names the model's hidden_size, num_attention_heads, kv_features, intermediate_size and vocab_size;
    `batch` is micro_batch_size, the sequences that the axes share.
    """
    at_most("micro_batch_size", batch, ROWS, "is the number of sequences")
    for name, size in dimensions.items():
        at_most(in_words(name), size, VOCABULARY if name == "vocab_size" else WIDTH, "is a size of the model")
    at_most("tensor_parallel_slices", tensor.slices, WIDTH, "is the number of panels of a product")
    at_most("tensor_parallel_mesh", math.prod((tensor.mesh or {}).values()), RANKS, "is the number of devices")
    at_most("tensor_parallel_size", tensor.size or 1, RANKS, "is the number of devices")
    at_most("tensor_parallel_depth", tensor.depth or 1, RANKS, "is the number of devices")
    ask = Ask(tensor, dimensions, batch)
    if misfit := first_misfit(ask):
        raise UserError(misfit.key, misfit.value, misfit.reason, "\n  or ".join(remedies(ask)))


def remedies(ask: Ask) -> list[str]:
    """Ways to make an `ask` fit that does not, each in words: switches, tensor sizes, other models.

    Where several things are wrong, as few switches as need be are changed together with the rest.
    """
    tried: set[tuple[int, str]] = set()
    return next((told for switches in range(len(_PLAIN)) if (told := _remedies(ask, switches, tried))), [])


def _remedies(ask: Ask, switches: int, tried: set[tuple[int, str]]) -> list[str]:
    """The same with so many switches changed first; `tried` holds those that led nowhere, of which there may be few.

    One rank, which is no tensor parallelism, comes last, and only where no other number fits.
    """
    attempt = (switches, repr(ask.tensor))
    misfit = first_misfit(ask)
    if misfit is None or attempt in tried or len(tried) == _ATTEMPTS:
        return []
    tried.add(attempt)
    if not switches:
        lines = [*_switches(ask, misfit.switches), *_sizes(ask, least=2)]
        return [*lines, *_models(ask), *([] if lines else _sizes(ask, least=1))]
    for field in (*misfit.switches, *_PLAIN):
        for changed in _alternatives(ask, field)[:1]:
            if rest := _remedies(changed, switches - 1, tried):
                return [f"{_setting(changed.tensor, field)}, {line}" for line in rest]
    return []


def _fits(ask: Ask) -> bool:
    return first_misfit(ask) is None


# ---------------------------------------------------------------------------------------------- other switches


def _switches(ask: Ask, fields: Iterable[str]) -> Iterator[str]:
    """Changes of one of these `fields` alone."""
    for field in fields:
        fitting = [changed.tensor for changed in _alternatives(ask, field) if _fits(changed)]
        if field in ("slices", "depth") and len(fitting) > 1:
            sides = both_sides(getattr(ask.tensor, field) or 2, (getattr(tensor, field) for tensor in fitting))
            fitting = [tensor for tensor in fitting if getattr(tensor, field) in sides]
        if fitting:
            yield either([_setting(fitting[0], field), *(as_yaml(getattr(t, field)) for t in fitting[1:])])


def _alternatives(ask: Ask, field: str) -> list[Ask]:
    """`ask` with every other value of `field` that could help, plain ones first."""
    tensor, mesh = ask.tensor, ask.tensor.mesh
    asked = getattr(tensor, field)
    values: Sequence[Any] = [_PLAIN.get(field)]
    if field == "mode":
        values = modes_with(mesh) if mesh else list(GEOMETRIES)
    elif field == "size":
        values = [math.prod(mesh.values())] if mesh else []
    elif field == "slices" and tensor.schedule == "gather":
        values = divisors_of(ask.dimensions["hidden_size"])
    elif field == "depth" and "depth" in geometry_axes(tensor.mode):
        if mesh is None:
            values = divisors_of(tensor.size or 1)
        elif asked not in (None, mesh.get("depth", 1)):
            values = [mesh.get("depth", 1)]
    return [replace(ask, tensor=replace(tensor, **{field: value})) for value in values if value != asked]


def _setting(tensor: TensorParallel, field: str) -> str:
    value = getattr(tensor, field)
    return f"no {config_key(field)}" if value is None else f"{config_key(field)}: {as_yaml(value)}"


# ---------------------------------------------------------------------------------------------- other tensor sizes


def _sizes(ask: Ask, least: int) -> Iterator[str]:
    """Tensor sizes and meshes of at least so many ranks that fit this model and batch with the same switches.

    A mesh of as many ranks as were asked for comes before other numbers of ranks.
    """
    tensor, meshes = ask.tensor, [mesh for mesh in _fitting_meshes(ask) if math.prod(mesh.values()) >= least]
    size = tensor.size or math.prod((tensor.mesh or {}).values())
    sizes = []
    if tensor.mesh is None:
        sizes = both_sides(size, (math.prod(mesh.values()) for mesh in meshes if _is_derived(mesh, tensor)))
        meshes = [mesh for mesh in meshes if not _is_derived(mesh, tensor)]
    lines = [f"tensor_parallel_size: {either(sizes)} fits this model and batch"] if sizes else []
    if found := _nearest_meshes(meshes, tensor, size, sizes):
        written = either(replace(tensor, mesh=mesh).written_mesh for mesh in found)
        other = tensor.size is not None and any(math.prod(mesh.values()) != size for mesh in found)
        line = f"tensor_parallel_mesh: {written}" + (" instead of tensor_parallel_size" if other else "")
        lines.insert(len(lines) if other else 0, line)
    yield from lines


def _fitting_meshes(ask: Ask) -> list[Axes]:
    """Every mesh of this geometry that fits with the same switches."""
    dimensions, own = ask.dimensions, geometry_axes(ask.tensor.mode)
    whole = {
        "inner": dimensions["hidden_size"],
        "row": dimensions["hidden_size"],
        "col": math.gcd(dimensions["intermediate_size"], *(dimensions[name] for name in HEADS)),
    }
    if _no_mesh_mends(ask.tensor):
        return []
    asked = math.prod((ask.tensor.mesh or {"size": ask.tensor.size or 1}).values()) ** (1 / len(own))
    every = {axis: divisors_of(size) for axis, size in whole.items()}
    # depth need not divide any size: those that were asked for, and those that give each rank whole rows
    given = {ask.tensor.depth or 2, (ask.tensor.mesh or {}).get("depth", 1)}
    every["depth"] = sorted({1, *given, *divisors_of(ask.batch)})
    of_each = [every[axis] if axis in own else [1] for axis in MODEL_AXES]
    while math.prod(map(len, of_each)) > _MESHES:
        longest = max(of_each, key=len)
        longest.remove(max(longest, key=lambda n: abs(math.log(n / asked))))
    sizes = itertools.product(*of_each)
    meshes = [dict(zip(MODEL_AXES, each, strict=True)) for each in sizes]
    return [m for m in meshes if _fits(replace(ask, tensor=replace(ask.tensor, mesh=m, size=None)))]


def _no_mesh_mends(tensor: TensorParallel) -> bool:
    """Whether switches of `tensor` exclude each other on every mesh."""
    depth = (tensor.depth or 2) if "depth" in geometry_axes(tensor.mode) else 1
    trial = replace(tensor, mesh={"depth": depth}, size=None)
    try:
        return next(schedule_misfits(trial, trial.axes), None) is not None
    except UserError:
        return True


def _is_derived(mesh: Axes, tensor: TensorParallel) -> bool:
    """Whether a tensor size alone gives this mesh."""
    return mesh == _derived(tensor, math.prod(mesh.values()))


def _derived(tensor: TensorParallel, size: int) -> Axes | None:
    try:
        return mesh_sizes(tensor.mode, size, tensor.depth or 2)
    except UserError:
        return None


def _nearest_meshes(meshes: list[Axes], tensor: TensorParallel, size: int, sizes: list[int]) -> list[Axes]:
    """The most alike mesh of as many ranks, and of the nearest below and above where nearer than the given `sizes`."""
    own = geometry_axes(tensor.mode)
    evenly = dict.fromkeys(own, size ** (1 / len(own)))
    shape = tensor.mesh or _derived(tensor, size) or evenly

    def unlike(mesh: Axes) -> tuple[int, float, list[int]]:
        stretch = sum(abs(math.log(mesh[axis] / shape.get(axis, 1))) for axis in own)
        return abs(math.prod(mesh.values()) - size), round(stretch, 9), [mesh[axis] for axis in MODEL_AXES]

    def best(among: Callable[[int], bool]) -> list[Axes]:
        return sorted((mesh for mesh in meshes if among(math.prod(mesh.values()))), key=unlike)[:1]

    same = best(lambda n: n == size)
    if same and tensor.size is not None:
        return same
    below, above = max([n for n in sizes if n < size], default=0), min([n for n in sizes if n > size], default=math.inf)
    return same + best(lambda n: below < n < size) + best(lambda n: size < n < above)


# ---------------------------------------------------------------------------------------------- other models


def _models(ask: Ask) -> Iterator[str]:
    """Sizes of the model that fit these axes with the same switches."""
    try:
        axes = ask.tensor.axes
    except UserError:
        return
    multiples = divisors(ask.tensor, axes)
    multiples["hidden_size"] *= ask.tensor.slices
    sizes, col = ask.dimensions, axes["col"]
    changes = {name: multiples_near(sizes[name], each) for name, each in multiples.items() if sizes[name] % each}
    if not every_rank_has_a_row(sizes["vocab_size"], col):
        changes["vocab_size"] = nearest_on_both_sides(sizes["vocab_size"], lambda n: every_rank_has_a_row(n, col))
    first = {name: values[0] for name, values in changes.items()}
    if changes and _fits(replace(ask, dimensions={**sizes, **first})):  # else switches are wrong
        yield "a model with " + ", ".join(f"{in_words(name)} {either(values)}" for name, values in changes.items())
