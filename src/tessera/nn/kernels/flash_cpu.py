"""The operator behind torch's fused attention on CPUs, which gives the log-sum-exp too; it reads grouped kv heads."""

import torch
from torch import Tensor

from tessera.nn.once import Once, run_once

# mypy: disable-error-code="no-untyped-def"


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, causal: bool, scale: float | None, once: Once | None
    ):
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = run_once(once, lambda: operator(q_BHSD, k_BHSD, v_BHSD, 0.0, causal, scale=scale))
        ctx.save_for_backward(q_BHSD, k_BHSD, v_BHSD, out, lse)
        ctx.options = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out_BHSD: Tensor, _: Tensor):
        causal, scale = ctx.options
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return *operator(d_out_BHSD, *ctx.saved_tensors, 0.0, causal, scale=scale), None, None, None


def flash_cpu(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, causal: bool, scale: float | None, once: Once | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, causal or not, and the log-sum-exp [B, H, S], which has no gradient."""
    return _Flash.apply(q_BHSD, k_BHSD, v_BHSD, causal, scale, once)
