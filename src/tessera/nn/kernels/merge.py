"""What several tiles say of the same queries, as one result: each weighs as its log-sum-exp does."""

import torch
from torch import Tensor


def nothing_yet(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries that have met no key: out [T, H, D] of zeros and log-sum-exp [H, T] of -inf, in float32 or wider."""
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    T, H, _ = q_THD.shape
    return torch.zeros_like(q_THD, dtype=wide), q_THD.new_full((H, T), -torch.inf, dtype=wide)


def merge(out_THD: Tensor, lse_HT: Tensor, more_out_THD: Tensor, more_lse_HT: Tensor) -> None:
    """Add to `out` and `lse`, in place, what further keys say of the same queries; their log-sum-exp is finite."""
    weight = torch.sigmoid(more_lse_HT - lse_HT).T.unsqueeze(-1)
    out_THD.lerp_(more_out_THD.to(out_THD.dtype), weight)
    torch.logaddexp(lse_HT, more_lse_HT, out=lse_HT)
