"""Attention of each document by itself in one kernel: flash attention over lengths that vary (Dao 2023), on GPUs.

The rows of a micro-batch are joined into one sequence of T = B · S tokens, in which the kernel finds the documents by
their bounds. It reads grouped kv heads as they are, and computes no more than a window shows. torch's own `varlen_attn`
does the same; its arguments differ between the versions of torch that are supported, those of the operators do not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.nn.documents import Documents
from tessera.nn.kernels.function import attention
from tessera.nn.once import Once


def takes_varlen(q_BHSD: Tensor) -> bool:
    """Whether the kernel is there for `q`: of two bytes an element, heads of a size that it has, a GPU since Ampere."""
    fits = q_BHSD.dtype in (torch.bfloat16, torch.float16) and q_BHSD.shape[-1] % 8 == 0 and q_BHSD.shape[-1] <= 256
    return fits and q_BHSD.is_cuda and torch.cuda.get_device_capability(q_BHSD.device) >= (8, 0)


def varlen(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    documents: Documents | None,
    *,
    causal: bool,
    scale: float | None,
    window: int | None = None,
    once: Once | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v within each document (None: each row is one), and the log-sum-exp [B, H, S].

    Causal or not; causal with a `window` over those keys that are fewer tokens behind. The log-sum-exp has no gradient.
    """
    B, _, S, _ = q_BHSD.shape
    if documents is None:
        offsets, longest = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=q_BHSD.device), S
    else:
        offsets, longest = documents.offsets, documents.longest
    bounds, seen = (offsets, offsets, longest, longest), {} if window is None else {"window_size_left": window - 1}

    def forward(*tensors_THD: Tensor) -> Sequence[Tensor]:
        operator = torch.ops.aten._flash_attention_forward.default
        return operator(*tensors_THD, *bounds, 0.0, causal, False, scale=scale, **seen)[:-1]

    def backward(d_out_THD: Tensor, *saved: Tensor) -> Sequence[Tensor]:
        *tensors, first, second = saved  # the last two: the random state of dropout, though nothing is dropped
        operator = torch.ops.aten._flash_attention_backward.default
        return operator(d_out_THD.contiguous(), *tensors, *bounds, 0.0, causal, first, second, scale=scale, **seen)

    joined = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHSD, k_BHSD, v_BHSD))
    out_THD, lse_HT = attention(forward, backward, *joined, once=once)
    return out_THD.unflatten(0, (B, S)).transpose(1, 2), lse_HT.unflatten(1, (B, S)).transpose(0, 1)
