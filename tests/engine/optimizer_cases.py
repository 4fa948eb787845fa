"""Runs on every rank of a pool: AdamW on shards beside torch's own on DTensors."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distributed.model_cases import LLAMA, batches, build
from support.mesh import shared_mesh
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.nn.parameter import to_local


def beside_torchs_own(name: str, sizes: dict[str, int], dtype: torch.dtype) -> tuple[bool, bool, int]:
    """After three steps of each: weights and moments are the same bits; state is DTensors; DTensors that AdamW saw."""
    ours, seen = _trained(name, sizes, dtype, own=True)
    theirs, _ = _trained(name, sizes, dtype, own=False)
    same = all(torch.equal(to_local(ours[key]), to_local(theirs[key])) for key in theirs)
    return same and ours.keys() == theirs.keys(), all(isinstance(value, DTensor) for value in ours.values()), seen


def _trained(name: str, sizes: dict[str, int], dtype: torch.dtype, own: bool) -> tuple[dict[str, Tensor], int]:
    model = build(LLAMA, shared_mesh(sizes), dtype=dtype)
    optimizer = build_optimizer(model, name, (0.9, 0.95), 1e-6, 0.1)
    if not own:
        optimizer.__class__ = torch.optim.AdamW
    step = Step(model, optimizer, max_grad_norm=0.5)
    for index in range(3):
        step(batches(LLAMA, 2, index), index, 1e-2)
    lists: list[list[Any]] = [[] for _ in range(6)]
    optimizer._init_group(optimizer.param_groups[0], *lists)
    seen = sum(isinstance(value, DTensor) for each in lists for value in each)
    found = dict(model.named_parameters())
    for key, parameter in list(found.items()):
        found |= {f"{key} {moment}": optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
    return found, seen
