"""The optimizer step of the torch and transformers contenders: AdamW fused, clipping by the global norm."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.workload import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY


class Training:
    """`step(tokens)`: `backward(tokens)`, which gives the loss, then clipping and the update."""

    def __init__(self, model: nn.Module, backward: Callable[[Tensor], Tensor]):
        self.backward = backward
        parameters = list(model.parameters())
        # torch mixes DTensors and plain tensors neither in one fused group nor in one gradient norm
        cut = [p for p in parameters if isinstance(p, DTensor)]
        replicated = [p for p in parameters if not isinstance(p, DTensor)]
        self.groups = [group for group in (cut, replicated) if group]
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in self.groups],
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def step(self, tokens: Tensor) -> tuple[float, float]:
        loss = self.backward(tokens)
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def _clip(self) -> Tensor:
        norms = []
        for group in self.groups:
            norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        total = torch.stack(norms).norm()
        for group in self.groups:
            nn.utils.clip_grads_with_norm_(group, MAX_GRAD_NORM, total)
        return total
