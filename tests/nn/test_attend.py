"""`attend` and each kernel behind it against the formula written out in float64: result, gradients, log-sum-exp."""

import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from support.compare import error
from tessera.core.live_memory import PeakMemory
from tessera.nn import attend as door
from tessera.nn.attend import attend
from tessera.nn.documents import Documents
from tessera.nn.kernels.documents_cpu import documents_cpu
from tessera.nn.kernels.each_document import each_document
from tessera.nn.kernels.explicit import explicit
from tessera.nn.kernels.flash_cpu import flash_cpu
from tessera.nn.kernels.fused import fused
from tessera.nn.kernels.varlen import varlen
from tessera.nn.mask import Mask

B, S, D = 2, 11, 16
HEADS = [(4, 4), (4, 2), (6, 1)]
TOLERANCE = 1e-12
DOCUMENTS = Documents.of(torch.tensor([[0] * 4 + [1] * 1 + [2] * 6, [3] * 7 + [4] * 4]))
MASKS = {
    "causal": Mask(True),
    "all to all": Mask(False),
    "window 1": Mask(True, 1),
    "window 3": Mask(True, 3),
    "window as long as the row": Mask(True, S),
    "window 3 both ways": Mask(False, 3),
    "documents": Mask(True, None, DOCUMENTS),
    "documents, all to all": Mask(False, None, DOCUMENTS),
    "documents, window 2": Mask(True, 2, DOCUMENTS),
    "documents, window 3 both ways": Mask(False, 3, DOCUMENTS),
}
PLAIN = {name: MASKS[name] for name in ("causal", "all to all", "window as long as the row")}
BY_DOCUMENT = {name: MASKS[name] for name in ("documents", "documents, all to all")}


def sees(mask, b, i, j):
    """Whether query i of row b sees key j, said once more."""
    if mask.documents is not None and mask.documents.ids[b, i] != mask.documents.ids[b, j]:
        return False
    if mask.causal and j > i:
        return False
    return mask.window is None or abs(i - j) < mask.window


def seen(mask):
    return torch.tensor([[[sees(mask, b, i, j) for j in range(S)] for i in range(S)] for b in range(B)])


def dense(q, k, v, mask, scale=None, softcap=None, keep=None, p=0.0):
    """The formula head by head, in the dtype given; result and log-sum-exp."""
    scale = 1 / math.sqrt(D) if scale is None else scale
    shown, outputs, sums = seen(mask), [], []
    for head in range(q.shape[1]):
        kv = head * k.shape[1] // q.shape[1]
        z = scale * q[:, head] @ k[:, kv].transpose(1, 2)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        powers = z.exp() * shown
        weights = powers / powers.sum(-1, keepdim=True)
        weights = weights if keep is None else weights * keep[:, head] / (1 - p)
        outputs.append(weights @ v[:, kv])
        sums.append(powers.sum(-1).log())
    return torch.stack(outputs, 1), torch.stack(sums, 1)


def drawn(heads, kv_heads, dtype=torch.float64):
    """q, k and v as a layer gives them, transposed, and the gradient of the result."""
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    shapes = [(B, S, n, D) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


def errors(run, inputs, **options):
    """Relative errors of result, gradients of q, k, v and log-sum-exp (if given) of `run` from the formula."""
    *ours, gradient = [x.detach().requires_grad_() for x in inputs]
    *theirs, _ = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = run(*ours)
    expected, sums = dense(*theirs, **options)
    out.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(ours, theirs, strict=True))]
    pairs += [] if lse is None else [(lse, sums)]
    whole = gradient.double().norm().item()  # with a window of 1 the gradients of q and k are zero
    return [error(x.detach().double(), y.detach(), whole) for x, y in pairs]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 0.4}, {"softcap": 2.0}, {"scale": 0.1, "softcap": 0.5}], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_attend_equals_the_formula(name, options, heads):
    mask, inputs = MASKS[name], drawn(*heads)
    for with_lse in (False, True):
        run = partial(attend, mask=mask, with_lse=with_lse, **options)
        found = errors(run, inputs, mask=mask, **options)
        assert len(found) == 4 + with_lse and max(found) <= TOLERANCE


WRONG = [
    ("window 3", Mask(True, 2), {}),
    ("window 3", Mask(True, 4), {}),
    ("window 3 both ways", Mask(False, 4), {}),
    ("window 3 both ways", Mask(True, 3), {}),
    ("documents", Mask(True), {}),
    ("documents, window 2", Mask(True, None, DOCUMENTS), {}),
    ("causal", Mask(True), {"scale": 0.2}),
    ("causal", Mask(True), {"softcap": 3.0}),
]


@pytest.mark.parametrize("name, wrong, options", WRONG, ids=str)
def test_a_wrong_mask_scale_or_cap_lies_far_outside(name, wrong, options):
    inputs = drawn(4, 2)
    found = errors(lambda *x: attend(*x, MASKS[name], with_lse=True), inputs, mask=wrong, **options)
    assert min(found[:3]) > 1e-3 and found[4] > 1e-3  # of what the keys' values get, too


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_dropped_probabilities_equal_the_formula(name, heads):
    keep = torch.rand(B, heads[0], S, S, generator=torch.Generator().manual_seed(1)) > 0.3
    mask, options = MASKS[name], {"keep": keep, "p": 0.3}
    found = errors(lambda *x: attend(*x, mask, with_lse=True, **options), drawn(*heads), mask=mask, **options)
    assert max(found) <= TOLERANCE
    forgotten = errors(lambda *x: attend(*x, mask), drawn(*heads), mask=mask, **options)
    assert min(forgotten[0], forgotten[3]) > 1e-2


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_each_kernel_equals_the_formula(name, heads):
    mask, inputs = PLAIN[name], drawn(*heads)
    kernels = {
        "fused": lambda *x: (fused(*x, causal=mask.causal, scale=None), None),
        "flash on CPUs": lambda *x: flash_cpu(*x, causal=mask.causal, scale=None),
        "explicit": lambda *x: explicit(*x, mask, None, None, None, 0.0, True),
    }
    for kernel, run in kernels.items():
        assert max(errors(run, inputs, mask=mask)) <= TOLERANCE, kernel


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", BY_DOCUMENT)
def test_each_kernel_of_documents_equals_the_formula(name, heads):
    mask, inputs = BY_DOCUMENT[name], drawn(*heads)
    options = {"causal": mask.causal, "scale": None}
    found = errors(lambda *x: documents_cpu(*x, mask.documents, **options), inputs, mask=mask)
    found += errors(lambda *x: (each_document(*x, mask.documents, **options), None), inputs, mask=mask)
    assert len(found) == 9 and max(found) <= TOLERANCE


MEMORY = {
    "documents": ({}, {}, 2.05),
    "window": ({"window": 100}, {}, 2.05),
    "window that no document fills": ({"window": 1000}, {}, 2.05),
    "soft cap": ({}, {"softcap": 2.0}, 2.05),
    "eager": ({}, {"eager": True}, None),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_grows_with_the_row_and_not_with_its_square(name):
    """Bytes of live tensors at their peak, forward and backward: twice the row is twice the bytes."""
    window, options, most = MEMORY[name]
    peaks = []
    for length in (1024, 2048):
        documents = Documents.of((torch.arange(length) // 300).unsqueeze(0))
        q, k, v = (torch.randn(1, heads, length, D, requires_grad=True) for heads in (4, 2, 2))
        with PeakMemory() as memory:
            out, _ = attend(q, k, v, Mask(True, documents=documents, **window), **options)
            out.sum().backward()
        peaks.append(memory.peak)
    growth = peaks[1] / peaks[0]
    assert growth > 3.5 if most is None else growth < most


def test_documents_are_found_in_their_rows():
    assert DOCUMENTS.bounds == (0, 4, 5, 11, 18, 22) and DOCUMENTS.longest == 7
    assert list(DOCUMENTS) == [(0, 0, 4), (0, 4, 5), (0, 5, 11), (1, 0, 7), (1, 7, 11)]
    assert DOCUMENTS.lengths() == [[4, 1, 6], [7, 4]]
    assert DOCUMENTS.offsets.tolist() == list(DOCUMENTS.bounds) and DOCUMENTS.offsets.dtype == torch.int32
    same = Documents.of(torch.tensor([[5, 5, 5], [5, 5, 5]]))
    assert same.bounds == (0, 3, 6), "a row ends its last document, whatever the next one is called"


def test_the_kernel_of_gpus_gives_shapes_without_one():
    """On tensors without values: its operators take these arguments, forward and backward."""
    documents = Documents(DOCUMENTS.ids.to("meta"), DOCUMENTS.bounds)
    for own, window in ((documents, None), (documents, 3), (None, 3)):
        q, k, v, gradient = (x.to("meta", torch.bfloat16).requires_grad_() for x in drawn(4, 2))
        out, lse = varlen(q, k, v, own, causal=True, scale=None, window=window)
        assert out.shape == q.shape and out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
        assert lse.shape == q.shape[:3] and lse.dtype == torch.float32 and not lse.requires_grad
        out.backward(gradient)
        assert (q.grad.shape, k.grad.shape, v.grad.shape) == (q.shape, k.shape, v.shape)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", ["causal", "documents, window 2"])
def test_lse_is_float32_or_wider_and_has_no_gradient(name, dtype, tolerance):
    inputs, mask = drawn(4, 2, dtype), MASKS[name]
    assert max(errors(lambda *x: attend(*x, mask, with_lse=True), inputs, mask=mask)) <= tolerance
    out, lse = attend(*(x.detach().requires_grad_() for x in inputs[:3]), mask, with_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("causal", [True, False])
def test_without_anything_special_it_is_torchs_own_call(causal):
    q, k, v, _ = drawn(4, 2)
    real, calls = F.scaled_dot_product_attention, []

    def called(*tensors, **options):
        calls.append(options)
        return real(*tensors, **options)

    with patch.object(F, "scaled_dot_product_attention", called):
        out, lse = attend(q, k, v, Mask(causal))
    assert calls == [{"is_causal": causal, "scale": None, "enable_gqa": True}] and lse is None
    assert torch.equal(out, real(q, k, v, is_causal=causal, enable_gqa=True))


def test_who_chooses_makes_no_dense_mask_without_need():
    q, k, v, _ = drawn(4, 4)
    with patch.object(door, "explicit", side_effect=AssertionError), patch.object(Mask, "hidden", side_effect=OSError):
        for mask in (PLAIN | BY_DOCUMENT).values():
            attend(q, k, v, mask)
            attend(q, k, v, mask, with_lse=True)
        for mask in MASKS.values():
            if mask.causal:
                attend(q, k, v, mask, softcap=2.0)
        with pytest.raises(AssertionError):
            attend(q, k, v, Mask(False, S - 1))


@pytest.mark.parametrize("name", MASKS)
def test_a_block_of_a_mask_is_that_of_the_whole(name):
    mask = MASKS[name]
    whole = (~seen(mask)).unsqueeze(1)
    for queries, keys in ((range(S), range(S)), (range(4, 9), range(2, 6)), (range(0, 3), range(5, 11))):
        block = mask.hidden(queries, keys, torch.device("cpu"))
        expected = whole[:, :, queries.start : queries.stop, keys.start : keys.stop]
        assert torch.equal(torch.zeros_like(expected) if block is None else block.expand_as(expected), expected)
