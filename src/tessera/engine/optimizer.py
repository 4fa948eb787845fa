"""The optimizer and the learning-rate schedules, equal step by step to transformers.get_scheduler's."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tessera.nn.parameter import to_local

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


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


def learning_rate(step: int, peak: float, schedule: str, warmup: int, total: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up over `warmup` steps, then the schedule up to `total`.

    `constant` has no warm-up, as in transformers.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    if schedule == "constant":
        return peak
    if step < warmup:
        return peak * step / max(1, warmup)
    if schedule == "constant_with_warmup":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
