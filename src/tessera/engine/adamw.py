"""torch's AdamW on the shards themselves."""

from typing import Any

import torch
from torch import Tensor, nn

from tessera.nn.parameter import to_local


class AdamW(torch.optim.AdamW):
    """torch's AdamW on the shards themselves; state stays DTensors, as checkpoints want it.

    Through DTensors torch would work out for every new mesh how AdamW is sharded, and look it up on
    each step, while every shard only needs its own numbers.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """What torch collects for its update: parameters, gradients and their state, each as its local tensor."""
        has_complex: bool = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(to_local, tensors)
        return has_complex

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of `parameter` itself, zeros before the first step; what is copied into it is gone on from."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
        return state
