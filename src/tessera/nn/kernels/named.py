"""The name of the kernel that attention runs, and where it is not flash attention, why."""

import torch

from tessera.core.device import reads_grouped_heads
from tessera.nn.kernels.varlen import takes_varlen

_NAMES = {0: "torch's plain product", 1: "flash attention", 2: "torch's memory-efficient kernel", 3: "cuDNN's kernel"}
"""By the numbers of torch.nn.attention.SDPBackend."""
MOST_FEATURES = 256
"""Of a head, in flash attention on a GPU."""


def kernel_name(
    heads: tuple[int, int],
    head_dim: int,
    sequence: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout: float = 0.0,
    window: int | None = None,
    eager: bool = False,
    documents: bool = False,
) -> str:
    """The kernel of `attend` for query and kv `heads` on this device, as torch itself chooses it; not flash: why.

    `window` is the shortest of the layers', `documents` whether rows hold several. What `attend` gives the kernels of
    this package is named first.
    """
    own = "the step-by-step kernel, with scores of sequence_len² for each head"
    if eager:
        return f"{own} (attn_implementation: eager)"
    if dropout:
        return f"{own}, not flash: the model drops attention probabilities (attention_dropout {dropout:g})"
    length = min(sequence, 1024)
    q, kv = (torch.empty(1, count, length, head_dim, dtype=dtype, device=device, requires_grad=True) for count in heads)
    several = ", each document by itself" if documents else ""
    if window is not None and window < sequence:
        if q.is_cpu or takes_varlen(q):
            return f"flash attention within a window of {window} tokens{several}"
        why = f"it takes heads of a multiple of 8 features, not {head_dim}" if head_dim % 8 else None
        name = f"plain products in blocks within a window of {window} tokens{several}"
        return f"{name}, not flash: {why or _why(dtype, device, head_dim)}"
    grouped = heads[0] != heads[1] and reads_grouped_heads(q)
    kv = q if heads[0] != heads[1] and not grouped else kv
    found = torch._fused_sdp_choice(q, kv, kv, is_causal=True, enable_gqa=grouped)
    if documents and (q.is_cpu or takes_varlen(q)):
        return f"flash attention{several}"
    name = _NAMES.get(found, f"torch's kernel {found}") + several
    return name if found == 1 else f"{name}, not flash: {_why(dtype, device, head_dim)}"


def _why(dtype: torch.dtype, device: torch.device, head_dim: int) -> str:
    if device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16, and the run computes in {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and head_dim > MOST_FEATURES:
        return f"it takes heads of at most {MOST_FEATURES} features, not {head_dim}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs a GPU of the Ampere generation or later, not {torch.cuda.get_device_name(device)}"
    return f"torch prefers the other on this {'GPU' if device.type == 'cuda' else 'machine'}"
