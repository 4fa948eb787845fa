"""torch's fused attention: every device has a kernel for it, none of which gives a log-sum-exp or takes our masks."""

import torch.nn.functional as F
from torch import Tensor

from tessera.core.device import reads_grouped_heads
from tessera.nn.kernels.explicit import one_a_query


def fused(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, causal: bool, scale: float | None) -> Tensor:
    """softmax(scale · q kᵀ) v, causal or not."""
    grouped = q_BHSD.shape[1] != k_BHSD.shape[1]
    if grouped and not reads_grouped_heads(q_BHSD):
        k_BHSD, v_BHSD, grouped = one_a_query(k_BHSD, q_BHSD), one_a_query(v_BHSD, q_BHSD), False
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=causal, scale=scale, enable_gqa=grouped)
