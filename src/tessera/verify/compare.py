"""How far a layout's numbers are from those of one process, and its traffic from the formula.

A tensor differs by ‖Δ‖ / max(‖reference‖, global norm / 1000), as some exact gradients are zero; a loss or norm by its
relative difference. Shards are compared where they lie, so that copies that drifted apart are seen.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tessera.core.axes import AXES
from tessera.core.collectives import gathered, start_broadcast
from tessera.core.mesh import Mesh
from tessera.layout.spec import ParameterSpec
from tessera.verify.steps import StepsTaken

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}
QUANTITIES = ("loss", "gradients", "norm", "weights")
ZERO = 1e-9  # of the global norm: a gradient below is noise around an exact zero
BUNDLE = 1 << 24  # elements in one broadcast

Traffic = dict[tuple[str, str], tuple[int, int]]  # (axis, kind) → calls and bytes received in a step


@dataclass(frozen=True)
class Finding:
    """One number that is not what it should be; `name` is the parameter's, or the step of a loss or norm."""

    quantity: str
    name: str
    error: float


@dataclass
class Comparison:
    """The largest difference of each quantity in one dtype, and everything above its tolerance."""

    dtype: torch.dtype
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0.0))
    worst: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    noise: frozenset[str] = frozenset()

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    def add(self, quantity: str, name: str, error: float) -> None:
        """Count one difference; not a number is the largest of all."""
        error = math.inf if math.isnan(error) else error
        if error >= self.errors[quantity]:
            self.errors[quantity], self.worst[quantity] = error, name
        if error > self.tolerance:
            self.findings.append(Finding(quantity, name, error))


def compare(
    taken: StepsTaken, reference: StepsTaken | None, mesh: Mesh, dtype: torch.dtype, noise: frozenset[str] | None = None
) -> Comparison:
    """The differences of all ranks, the same on each; `reference` is given on rank 0.

    Parameters in `noise` have gradients that are zero but for rounding, found here when None: AdamW divides noise by
    noise, so that their updates mean nothing.
    """
    gradients = _Squares(taken.gradients, reference.gradients if reference else None, taken.specs, mesh)
    weights = _Squares(taken.weights, reference.weights if reference else None, taken.specs, mesh)
    scalars = (taken.losses, taken.norms)
    expected = (reference.losses, reference.norms) if reference else None
    everyone = gathered((gradients.own, weights.own, scalars, expected), mesh.world)
    expected = everyone[0][3]
    assert expected is not None
    whole = math.hypot(*gradients.references.values())
    found = Comparison(dtype)
    found.noise = frozenset(n for n, r in gradients.references.items() if r <= ZERO * whole) if noise is None else noise
    for quantity, index in (("loss", 0), ("norm", 1)):
        for step, want in enumerate(expected[index]):
            error = max(abs(ours[2][index][step] - want) for ours in everyone) / abs(want)
            found.add(quantity, f"step {step + 1}", error)
    for quantity, tensors, place in (("gradients", gradients, 0), ("weights", weights, 1)):
        least = 1e-3 * math.hypot(*tensors.references.values())
        for name, spec in taken.specs.items():
            if quantity == "gradients" or name not in found.noise:
                difference = _over_ranks([ours[place][name] for ours in everyone], spec, mesh)
                found.add(quantity, name, difference / max(tensors.references[name], least))
    return found


class _Squares:
    """‖Δ‖² of this rank's shard of each tensor, and the norm of each whole reference."""

    def __init__(
        self,
        shards: Mapping[str, Tensor],
        whole: Mapping[str, Tensor] | None,
        specs: Mapping[str, ParameterSpec],
        mesh: Mesh,
    ) -> None:
        self.own: dict[str, float] = {}
        self.references: dict[str, float] = {}
        for name, reference in _from_first_rank(whole, shards, specs, mesh):
            reference = reference.double()
            self.references[name] = reference.norm().item()
            part = reference[specs[name].stored_slices(mesh)]
            self.own[name] = (shards[name].double() - part.to(shards[name].device)).square().sum().item()


def _from_first_rank(
    whole: Mapping[str, Tensor] | None, shards: Mapping[str, Tensor], specs: Mapping[str, ParameterSpec], mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Every whole tensor that rank 0 has, on all ranks: never more than a bundle of them at once."""
    names, group = list(specs), mesh.group(AXES)
    while names:
        bundle, names = [names.pop(0)], names
        sizes = [math.prod(specs[bundle[0]].shape)]
        while names and sum(sizes) + math.prod(specs[names[0]].shape) <= BUNDLE:
            bundle.append(names.pop(0))
            sizes.append(math.prod(specs[bundle[-1]].shape))
        like = shards[bundle[0]]
        flat = like.new_empty(sum(sizes)) if whole is None else torch.cat([whole[n].reshape(-1) for n in bundle])
        arrived = start_broadcast(flat, 0, group).wait().split(sizes)
        yield from ((n, part.view(specs[n].shape)) for n, part in zip(bundle, arrived, strict=True))


def _over_ranks(squares: list[float], spec: ParameterSpec, mesh: Mesh) -> float:
    """The norm over the shards of one copy, of the copy that is furthest off."""
    by_rank = torch.tensor(squares, dtype=torch.float64).view([mesh.sizes[axis] for axis in AXES])
    for dim, axis in enumerate(AXES):
        by_rank = by_rank.sum(dim, keepdim=True) if axis in spec.cut_axes else by_rank.amax(dim, keepdim=True)
    return by_rank.sqrt().item()
