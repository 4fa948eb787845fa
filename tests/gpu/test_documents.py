"""Attention over documents on a GPU against the formula, in each dtype: the varlen kernel, and one for each document.

Skipped where there is none.
"""

import pytest
import torch

from tessera.nn.attend import attend
from tessera.nn.documents import Documents
from tessera.nn.kernels.explicit import explicit
from tessera.nn.mask import Mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = [[1, 300, 211], [512], [17, 1, 1, 493]]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 2e-5)])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_documents_equals_the_formula(causal, heads, dtype, tolerance):
    torch.manual_seed(0)
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]).cuda()
    shapes = [(3, 512, n, 64) for n in (heads[0], heads[1], heads[1], heads[0])]
    *inputs, gradient = (torch.randn(shape, device="cuda").to(dtype).transpose(1, 2) for shape in shapes)
    ours = [x.detach().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    mask = Mask(causal, None, Documents.of(ids))
    out, lse = attend(*ours, mask, with_lse=True)
    expected, sums = explicit(*theirs, mask, None, None, None, 0.0, True)
    plain, _ = attend(*ours, mask)
    plain.backward(gradient)
    expected.backward(gradient.double())
    pairs = [
        (out, expected),
        (plain, expected),
        (lse, sums),
        *((x.grad, y.grad) for x, y in zip(ours, theirs, strict=True)),
    ]
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def test_no_layer_waits_for_the_gpu():
    """The documents' places are tensors of the device once; forward and backward ask it for nothing."""
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]).cuda()
    documents = Documents.of(ids)
    documents.offsets.sum().item()
    q, k, v = (torch.randn(3, n, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (8, 2, 2))
    attend(q, k, v, Mask(True, None, documents))[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, Mask(True, None, documents))[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
