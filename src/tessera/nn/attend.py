"""`attend`, the one door to the kernels of attention: what is asked for decides which one runs."""

from torch import Tensor

from tessera.nn.documents import Documents
from tessera.nn.kernels.documents_cpu import documents_cpu
from tessera.nn.kernels.each_document import each_document
from tessera.nn.kernels.explicit import explicit
from tessera.nn.kernels.flash_cpu import flash_cpu
from tessera.nn.kernels.fused import fused
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
    runs once, and its result is kept; but for what goes step by step, and float32 on a GPU, which run again.

    Scores of S × S exist with `eager`, where a window is shorter than the row, with a soft cap or dropped
    probabilities, and where a GPU is asked for the log-sum-exp of float32; in all other cases of no more than a tile.
    """
    banded, documents = mask.window is not None and mask.window < k_BHSD.shape[2], mask.documents
    if eager or banded or softcap is not None or keep is not None:
        return explicit(q_BHSD, k_BHSD, v_BHSD, mask, scale, softcap, keep, p, with_lse)
    if once is not None and documents is None and takes_varlen(q_BHSD):
        documents = Documents.whole(q_BHSD)
    if documents is not None and (q_BHSD.is_cpu or takes_varlen(q_BHSD)):
        kernel = documents_cpu if q_BHSD.is_cpu else varlen
        out, lse = kernel(q_BHSD, k_BHSD, v_BHSD, documents, causal=mask.causal, scale=scale, once=once)
        return out, lse if with_lse else None
    if q_BHSD.is_cpu and (with_lse or once is not None):
        out, lse = flash_cpu(q_BHSD, k_BHSD, v_BHSD, causal=mask.causal, scale=scale, once=once)
        return out, lse if with_lse else None
    if with_lse:
        return explicit(q_BHSD, k_BHSD, v_BHSD, mask, scale, softcap, keep, p, with_lse)
    if documents is not None:
        return each_document(q_BHSD, k_BHSD, v_BHSD, documents, causal=mask.causal, scale=scale), None
    return fused(q_BHSD, k_BHSD, v_BHSD, causal=mask.causal, scale=scale), None
