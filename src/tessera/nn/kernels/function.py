"""The autograd.Function of attention: a kernel and its backward, what lies between them, and what runs once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tessera.nn.once import Once, run_once

# mypy: disable-error-code="no-untyped-def"

Kernel = Callable[..., Sequence[Tensor]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Kernel, backward: Kernel, once: Once | None, *tensors: Tensor):
        out, lse, *more = run_once(once, lambda: kernel(*tensors))
        ctx.save_for_backward(*tensors, out, lse, *more)
        ctx.kernel, ctx.inputs = backward, len(tensors)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, d_out: Tensor | None, _: Tensor | None):
        gradients = (None,) * ctx.inputs if d_out is None else ctx.kernel(d_out, *ctx.saved_tensors)
        return None, None, None, *gradients


def attention(kernel: Kernel, backward: Kernel, *tensors: Tensor, once: Once | None = None) -> tuple[Tensor, Tensor]:
    """The result of `kernel(*tensors)` and its log-sum-exp, which has no gradient.

    `kernel` returns the two, and further tensors if its backward asks for them. `backward(d_out, *tensors, result,
    log-sum-exp, further ones)` returns the gradients of `tensors`. `once`: in a layer that runs again `kernel` runs
    once.
    """
    return _Attention.apply(kernel, backward, once, *tensors)
