"""The operator behind torch's fused attention on CPUs, which gives the log-sum-exp too; it reads grouped kv heads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.nn.kernels.function import attention
from tessera.nn.once import Once


def flash_cpu(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, causal: bool, scale: float | None, once: Once | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, causal or not, and the log-sum-exp [B, H, S], which has no gradient."""
    options = 0.0, causal

    def forward(*tensors: Tensor) -> Sequence[Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(*tensors, *options, scale=scale)

    def backward(*tensors: Tensor) -> Sequence[Tensor]:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return operator(*tensors, *options, scale=scale)

    return attention(forward, backward, q_BHSD, k_BHSD, v_BHSD, once=once)
