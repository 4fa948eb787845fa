"""Which kind of work an operator or a kernel does, by its name in a trace of torch's profiler."""

import re
from functools import cache

import torch

PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, OTHER = "products", "attention", "elementwise", "copies", "other"
PYTHON, GAPS = "python", "gaps"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, OTHER)
"""Work of operators. What stands first counts where a device does several at once."""

_PRODUCTS = re.compile(
    r"aten::(linear|matmul|_?(scaled_)?(grouped_)?mm|b?addb?mm|bmm|addmv|mv|dot|einsum|.*convolution)\w*"
)
_ATTENTION = re.compile(r"\w+::\w*(attention|flash_attn|flex)\w*")
_COPIES = re.compile(
    r"\w+::(_?to|_to_copy|copy_|clone|contiguous|cat|_?chunk_cat|stack|pin_memory|_foreach_copy_"
    r"|split_with_sizes_copy|repeat\w*|fill_|zero_|zeros\w*|ones\w*|full\w*|_foreach_zero_|_pin_memory)"
)
_ELEMENTWISE = re.compile(
    r"aten::(_foreach_|_fused_adam|_fused_sgd)\w+|aten::\w*(softmax|norm|dropout|norm_backward)\w*"
)
_PYTHON = re.compile(r"(?!autograd::|torch::|Memcpy|Memset)(?!.*Backward\d+$)[^:]+")
"""The body of an autograd.Function, or a region that somebody has named; nodes of C++ end with a number."""
_KERNELS = {  # of a kernel whose operator is not known: words of its name
    ATTENTION: re.compile(r"flash|fmha|attention", re.IGNORECASE),
    PRODUCTS: re.compile(r"gemm|cutlass|cublas|nvjet|xmma", re.IGNORECASE),
    COPIES: re.compile(r"memcpy|memset|copy|catarray", re.IGNORECASE),
    ELEMENTWISE: re.compile(r"elementwise|reduce|softmax|norm|multi_tensor|triton_", re.IGNORECASE),
}


@cache
def kind_of(name: str) -> str:
    """The kind of an operator, e.g. `products` of `aten::mm`; `python` for a region that runs Python itself."""
    for kind, names in ((PRODUCTS, _PRODUCTS), (ATTENTION, _ATTENTION), (COPIES, _COPIES), (ELEMENTWISE, _ELEMENTWISE)):
        if names.fullmatch(name):
            return kind
    if _PYTHON.fullmatch(name):
        return PYTHON
    return ELEMENTWISE if _has_elementwise_tag(name) else OTHER


@cache
def kind_of_kernel(name: str) -> str:
    """The kind of a device's kernel whose operator is not known."""
    return next((kind for kind, words in _KERNELS.items() if words.search(name)), OTHER)


def _has_elementwise_tag(name: str) -> bool:
    """Whether torch itself says of an operator that it works element by element, or sums elements."""
    space, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, space, None), operator, None) if space == "aten" else None
    wanted = {torch.Tag.pointwise, getattr(torch.Tag, "reduction", torch.Tag.pointwise)}  # the latter is newer
    return packet is not None and any(wanted & set(getattr(packet, one).tags) for one in packet.overloads())
