"""Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for everything else.

The momentum of each matrix lies in shards, as the matrix does. Its orthogonalisation needs the whole matrix: the update
is gathered, torch.optim.Muon works on it, and each rank takes the part of the result that is its own. The matrices are
taken a few at a time, each by another rank, whose result is broadcast:

    rank      0             1             ...     all: gather the updates, in bfloat16 as the method computes
              Muon of 0     Muon of 1     ...     all: broadcast the changes, add the own part of each
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tessera.core.axes import AXES
from tessera.core.collectives import start_broadcast
from tessera.core.mesh import Mesh
from tessera.engine.adamw import AdamW
from tessera.layout.spec import ParameterSpec
from tessera.nn.parameter import gather_parameter, to_local
from tessera.product.roles import ranks_of

Named = tuple[str, nn.Parameter, ParameterSpec]


AT_ONCE = 8
"""Matrices whose updates are gathered together, and the ranks that share their work."""


class Muon(torch.optim.Optimizer):
    """Of `named`, the matrices of layers go to Muon; the others to `adamw`. Options are those of torch.optim.Muon."""

    def __init__(
        self, named: list[Named], mesh: Mesh, adamw: Mapping[str, Any], weight_decay: float, options: Mapping[str, Any]
    ) -> None:
        matrices = [one for one in named if one[0].startswith("layers.") and len(one[2].shape) == 2]
        chosen = {id(parameter) for _, parameter, _ in matrices}
        others = [parameter for _, parameter, _ in named if id(parameter) not in chosen]
        groups = [{"params": [p for _, p, _ in matrices]}, {"params": others}]
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0})
        self.group = mesh.group(axis for axis in AXES if axis != "pp")
        self.matrices, self.mesh, self.weight_decay = [one[1:] for one in matrices], mesh, weight_decay
        self.momentum, self.nesterov = options.get("momentum", 0.95), options.get("nesterov", True)
        self.options = {key: value for key, value in options.items() if key not in ("momentum", "nesterov")}
        self.adamw = AdamW(others, lr=0.0, weight_decay=weight_decay, **adamw) if others else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        rate = self.param_groups[0]["lr"]
        moved, at_once = [one for one in self.matrices if one[0].grad is not None], min(AT_ONCE, ranks_of(self.group))
        for first in range(0, len(moved), at_once):
            self._move(moved[first : first + at_once], rate)
        if self.adamw is not None:
            self.adamw.param_groups[0]["lr"] = rate
            self.adamw.step()

    def _move(self, matrices: list[tuple[nn.Parameter, ParameterSpec]], rate: float) -> None:
        """Update these matrices, each by the rank in its place."""
        updates = [gather_parameter(self._update(p).bfloat16(), spec, self.mesh) for p, spec in matrices]
        travelling = []
        for place, (update, (parameter, _)) in enumerate(zip(updates, matrices, strict=True)):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            own = self.group is None or self.group.rank == place
            change = self._change(update.to(wide), rate) if own else torch.empty_like(update, dtype=wide)
            travelling.append(start_broadcast(change, place, self.group))
        for arriving, (parameter, spec) in zip(travelling, matrices, strict=True):
            own_part, shard = arriving.wait()[spec.stored_slices(self.mesh)], to_local(parameter)
            shard.mul_(1 - rate * self.weight_decay).add_(own_part.to(shard.device))

    def _update(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of what is orthogonalised."""
        gradient, momentum = to_local(parameter.grad), to_local(self.moments(parameter)["momentum_buffer"])
        momentum.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum) if self.nesterov else momentum

    def _change(self, update: Tensor, rate: float) -> Tensor:
        """What torch.optim.Muon adds to a matrix of which this is the update."""
        matrix = nn.Parameter(torch.zeros_like(update))
        matrix.grad = update
        torch.optim.Muon([matrix], lr=rate, weight_decay=0.0, momentum=0.0, nesterov=False, **self.options).step()
        return matrix.detach()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of `parameter` itself, zeros before the first step; what is copied into it is gone on from."""
        if not any(parameter is matrix for matrix, _ in self.matrices):
            assert self.adamw is not None
            return self.adamw.moments(parameter)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.detach())
        return state
