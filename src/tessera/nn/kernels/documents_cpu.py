"""Attention of each document by itself on CPUs: torch's flash operator, called for one document after another.

One autograd.Function has them all (function.py), so that a document costs two calls of an operator and no node of a
graph, and what lies between the documents is never computed. The operator reads grouped kv heads as they are, and works
in tiles: no matrix of scores exists.
"""

from functools import partial

import torch
from torch import Tensor

from tessera.nn.documents import Documents
from tessera.nn.kernels.function import attention
from tessera.nn.once import Once


def _forward(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, documents: Documents, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    B, H, S, D = q_BHSD.shape
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out = q_BHSD.new_empty(B, S, H, D).transpose(1, 2)  # as the next product reads it
    lse = q_BHSD.new_empty(B, H, S, dtype=torch.promote_types(q_BHSD.dtype, torch.float32))
    for row, first, end in documents:
        own = (x[row : row + 1, :, first:end] for x in (q_BHSD, k_BHSD, v_BHSD))
        out[row : row + 1, :, first:end], lse[row : row + 1, :, first:end] = operator(*own, 0.0, causal, scale=scale)
    return out, lse


def _backward(
    d_out_BHSD: Tensor, *saved: Tensor, documents: Documents, causal: bool, scale: float | None
) -> list[Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    gradients = [torch.empty_like(x) for x in saved[:3]]
    for row, first, end in documents:
        own = (x[row : row + 1, :, first:end] for x in (d_out_BHSD, *saved))
        for whole, part in zip(gradients, operator(*own, 0.0, causal, scale=scale), strict=True):
            whole[row : row + 1, :, first:end] = part
    return gradients


def documents_cpu(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    documents: Documents,
    *,
    causal: bool,
    scale: float | None,
    once: Once | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v within each document, causal or not, and the log-sum-exp [B, H, S] without gradient."""
    forward, backward = (partial(f, documents=documents, causal=causal, scale=scale) for f in (_forward, _backward))
    return attention(forward, backward, q_BHSD, k_BHSD, v_BHSD, once=once)
