"""The optimizers: torch's AdamW on the shards themselves, and the others that a name asks for."""

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


def build_optimizer(
    model: nn.Module, name: str, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over every parameter (weight decay included, as in torch.optim); the learning rate is set step by step."""
    fused = name == "adamw_torch_fused"
    # a tensor-free lr of 0 until the first step sets it
    return AdamW(
        model.parameters(), lr=0.0, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=fused, foreach=not fused
    )
