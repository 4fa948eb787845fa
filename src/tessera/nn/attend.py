"""`attend`, the one door to the kernels of attention: what is asked for decides which one runs."""

from torch import Tensor

from tessera.nn.kernels.explicit import explicit
from tessera.nn.kernels.flash_cpu import flash_cpu
from tessera.nn.kernels.fused import fused
from tessera.nn.mask import Mask


def attend(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    keep: Tensor | None = None,
    p: float = 0.0,
    with_lse: bool = False,
    eager: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(z) v over the keys that `mask` shows, where z = scale · q kᵀ, and the log-sum-exp of z if `with_lse`.

    k and v may have fewer heads than q, each read by an equal run of query heads. `scale` is 1/√D unless given;
    `softcap` c makes z = c · tanh(z / c); probabilities are dropped where `keep` [B, H, S, S] is False, which happens
    with probability `p`. The log-sum-exp [B, H, S] is in promote_types(dtype, float32), without dropout, and has no
    gradient. `eager` takes the kernel that goes step by step.
    """
    banded = mask.window is not None and mask.window < k_BHSD.shape[2]
    elsewhere = with_lse and not q_BHSD.is_cpu  # where no other kernel gives it
    if eager or banded or elsewhere or mask.documents is not None or softcap is not None or keep is not None:
        return explicit(q_BHSD, k_BHSD, v_BHSD, mask, scale, softcap, keep, p, with_lse)
    if with_lse:
        return flash_cpu(q_BHSD, k_BHSD, v_BHSD, causal=mask.causal, scale=scale)
    return fused(q_BHSD, k_BHSD, v_BHSD, causal=mask.causal, scale=scale), None
