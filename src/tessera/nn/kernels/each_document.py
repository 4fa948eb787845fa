"""Attention of each document by itself, by the kernel that rows of one document get: where no kernel takes them all."""

import torch
from torch import Tensor

from tessera.nn.documents import Documents
from tessera.nn.kernels.fused import fused


def each_document(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, documents: Documents, *, causal: bool, scale: float | None
) -> Tensor:
    """softmax(scale · q kᵀ) v within each document, causal or not."""
    rows = zip(documents.lengths(), *(x.unbind() for x in (q_BHSD, k_BHSD, v_BHSD)), strict=True)
    found = []
    for lengths, *whole in rows:
        # split, whose backward joins its parts once; each slice of a row would make a gradient of the whole row
        parts = zip(*(x.unsqueeze(0).split(lengths, 2) for x in whole), strict=True)
        found.append(torch.cat([fused(*part, causal=causal, scale=scale) for part in parts], 2))
    return torch.cat(found)
