"""The arithmetic of training, in closed form: what MFU is a share of.

PaLM (Chowdhery et al. 2022), appendix B: forward and backward of a token are 6 N + 12 L H Q T operations, of floats.
N are the weights of matrix products: an embedding that is looked up multiplies nothing, a tied head multiplies all the
same. L layers have H heads of Q features over documents of T tokens: a row, or each of several in one, which do not see
one another. The half of the keys that a causal mask hides is not deducted, and what is computed again in the backward
is not added.
"""

from collections import Counter
from collections.abc import Iterable

from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig


def document_flops(model: ModelConfig, length: int) -> int:
    """Floating-point operations, forward and backward, of one document of `length` tokens."""
    anatomy = anatomy_of(model)
    products = [*anatomy.products, (anatomy.head, 1)]
    weights = sum(product.features * product.width * count for product, count in products)
    seen = 0  # keys that a query sees, in features of all layers
    for layer, count in anatomy.kinds:
        for attention in (block.attention for block in layer if block.attention):
            keys = length if attention.window is None else min(length, attention.window)
            seen += count * attention.heads * attention.head_dim * keys
    return length * (6 * weights + 12 * seen)


def step_flops(model: ModelConfig, lengths: Iterable[int]) -> int:
    """The same of documents of these lengths."""
    return sum(count * document_flops(model, length) for length, count in Counter(lengths).items())
