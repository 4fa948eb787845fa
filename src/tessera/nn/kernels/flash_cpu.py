"""The operator behind torch's fused attention on CPUs, which gives the log-sum-exp too; it reads grouped kv heads."""

import torch
from torch import Tensor


def flash_cpu(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, causal or not, and the log-sum-exp [B, H, S]."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operator(q_BHSD, k_BHSD, v_BHSD, is_causal=causal, scale=scale)
