"""Attention step by step in plain torch: it takes every mask, dropout and soft cap, and holds scores of S × S."""

import math

import torch
from torch import Tensor

from tessera.nn.mask import Mask


def one_a_query(kv_BHSD: Tensor, q_BHSD: Tensor) -> Tensor:
    """Grouped kv heads repeated until each query head has its own."""
    return kv_BHSD.repeat_interleave(q_BHSD.shape[1] // kv_BHSD.shape[1], 1)


def explicit(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    keep: Tensor | None,
    p: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `attend` says of its arguments, all of them."""
    k_BHSD, v_BHSD = one_a_query(k_BHSD, q_BHSD), one_a_query(v_BHSD, q_BHSD)
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) / (math.sqrt(q_BHSD.shape[-1]) if scale is None else 1 / scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = mask.hidden(range(q_BHSD.shape[2]), range(k_BHSD.shape[2]), scores.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(-1, dtype=wide).to(scores.dtype)
    if keep is not None:
        probabilities = probabilities * keep.to(scores.dtype).div_(1 - p)
    return probabilities @ v_BHSD, scores.detach().to(wide).logsumexp(-1) if with_lse else None
