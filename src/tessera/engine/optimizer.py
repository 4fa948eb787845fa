"""The optimizer and the learning-rate schedules, equal step by step to transformers.get_scheduler's."""

import math

import torch
from torch import nn

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def build_optimizer(
    model: nn.Module, name: str, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over every parameter (weight decay included, as in torch.optim); the learning rate is set step by step."""
    fused = name == "adamw_torch_fused"
    # a tensor-free lr of 0 until the first step sets it
    return torch.optim.AdamW(
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
