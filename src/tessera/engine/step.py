"""One optimizer step: forward and backward of every micro-batch, gradient sums, norm, clipping, update.

The same step serves training, verification and benchmarks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.core.collectives import all_reduce
from tessera.data.batch import MicroBatch
from tessera.engine.fsdp import gradients_travel
from tessera.engine.gradients import clip_gradients, first_copy, gradient_norm, sum_replicated_gradients
from tessera.models.decoder import Decoder
from tessera.nn.dropout import dropout_key
from tessera.product.overlap import BACKWARD


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's valid tokens; grad_norm: before clipping; stop: whether a rank asked to stop.

    tokens: valid ones of all data ranks.
    """

    loss: float
    grad_norm: float
    tokens: int
    stop: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Step:
    """Optimizer steps of `model`; `max_grad_norm` 0: no clipping; `label_smoothing` as in torch's cross entropy."""

    def __init__(
        self,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float = 0.0,
        label_smoothing: float = 0.0,
        seed: int = 42,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.max_grad_norm, self.label_smoothing, self.seed = max_grad_norm, label_smoothing, seed
        self.mesh, self.streams = model.parallel.mesh, model.parallel.streams
        self.entered: Callable[[str], None] = lambda phase: None
        """Told when the step goes on to its next phase: forward, backward, optimizer."""

    def valid_tokens(self, batches: Sequence[MicroBatch]) -> int:
        """The targets that count in this step, of all data ranks."""
        own = torch.tensor(sum(batch.valid for batch in batches), device=self.mesh.device)
        return int(all_reduce(own, self.mesh.group(self.streams.batch)).item())

    def gradients(self, batches: Sequence[MicroBatch], step: int, valid: int | None = None) -> Tensor:
        """Accumulate the gradients of all micro-batches, complete their sums; returns this rank's part of the loss.

        `valid` is what `valid_tokens` gives, where it is known.
        """
        batches = [self.model.cut(batch) for batch in batches]
        denominator = float(max(1, self.valid_tokens(batches) if valid is None else valid))
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index, batch in enumerate(batches):
            gradients_travel(self.model, index == len(batches) - 1)
            self.entered("forward")
            loss = self.model(
                batch.to(self.mesh.device),
                denominator,
                dropout_key=dropout_key(self.seed, step),
                label_smoothing=self.label_smoothing,
            )
            self.entered("backward")
            self.model.parallel.overlap.begin(BACKWARD)
            loss.backward()
            losses.append(loss.detach())
        sum_replicated_gradients(self.model, self.mesh)
        return torch.stack(losses).sum()

    def __call__(
        self,
        batches: Sequence[MicroBatch],
        step: int,
        learning_rate: float,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """One whole step. Without a valid target, or with a loss or gradient that is not finite, the weights stay.

        `stop` is asked as late as possible; when it says yes on any rank, the result's `stop` is true on all.
        """
        batches = [self.model.cut(batch) for batch in batches]
        valid = self.valid_tokens(batches)
        loss = self.gradients(batches, step, valid)
        own_part = loss if first_copy(self.mesh, self.streams.loss) else torch.zeros_like(loss)
        numbers = gradient_norm(self.model, self.mesh, own_part, loss.new_tensor(float(stop())))
        norm_value, loss_value, stopping = torch.stack(numbers).tolist()
        result = StepResult(loss_value, norm_value, valid, stopping > 0)
        if result.finite and result.tokens:
            self.entered("optimizer")
            if self.max_grad_norm:
                clip_gradients(self.model, norm_value, self.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        return result
