"""`attend`, the one door to the kernels of attention: what is asked for decides which one runs."""

from torch import Tensor

from tessera.nn.kernels.documents_cpu import documents_cpu
from tessera.nn.kernels.each_document import each_document
from tessera.nn.kernels.explicit import explicit
from tessera.nn.kernels.flash_cpu import flash_cpu
from tessera.nn.kernels.fused import fused
from tessera.nn.kernels.tiled import tiled
from tessera.nn.kernels.varlen import takes_varlen, varlen
from tessera.nn.mask import Mask
from tessera.nn.once import Once


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
    once: Once | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(z) v over the keys that `mask` shows, where z = scale · q kᵀ, and the log-sum-exp of z if `with_lse`.

    k and v may have fewer heads than q, each read by an equal run of query heads. `scale` is 1/√D unless given;
    `softcap` c makes z = c · tanh(z / c); probabilities are dropped where `keep` [B, H, S, S] is False, which happens
    with probability `p`. The log-sum-exp [B, H, S] is in promote_types(dtype, float32), without dropout, and has no
    gradient. `eager` takes the kernel that goes step by step. `once`: in a layer that runs again the kernel
    runs once, and its result is kept; but for what goes step by step, and torch's own kernels on a GPU, for float32.

    Scores of S × S exist with `eager` and dropped probabilities; where queries see keys after themselves, also with a
    window shorter than the row, a soft cap, or on a GPU a log-sum-exp in float32. In all other cases a block of them.
    """
    tensors, documents = (q_BHSD, k_BHSD, v_BHSD), mask.documents
    window = mask.window if mask.window is not None and mask.window < k_BHSD.shape[2] else None
    limited = window is not None or softcap is not None
    if eager or keep is not None or (limited and not mask.causal):
        return explicit(*tensors, mask, scale, softcap, keep, p, with_lse)
    kept = with_lse or once is not None
    if softcap is None and takes_varlen(q_BHSD) and (documents is not None or window is not None or kept):
        out, lse = varlen(*tensors, documents, causal=mask.causal, scale=scale, window=window, once=once)
    elif limited or (with_lse and mask.causal and not q_BHSD.is_cpu):
        out, lse = tiled(*tensors, documents, window=window, scale=scale, softcap=softcap, once=once)
    elif documents is not None and q_BHSD.is_cpu:
        out, lse = documents_cpu(*tensors, documents, causal=mask.causal, scale=scale, once=once)
    elif kept and q_BHSD.is_cpu:
        out, lse = flash_cpu(*tensors, causal=mask.causal, scale=scale, once=once)
    elif with_lse:
        return explicit(*tensors, mask, scale, softcap, keep, p, with_lse)
    elif documents is not None:
        return each_document(*tensors, documents, causal=mask.causal, scale=scale), None
    else:
        return fused(*tensors, causal=mask.causal, scale=scale), None
    return out, lse if with_lse else None
