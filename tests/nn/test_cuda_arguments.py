"""What the kernels for GPUs are handed, checked without one: fake tensors on a GPU, and the rules of the operators.

The rules are those that torch's flash_attn/flash_api.cpp checks (mha_varlen_fwd, mha_varlen_bwd). The schema is that of
torch 2.11; later ones only add optional arguments. What the kernels compute is a matter of tests/gpu.
"""

from itertools import pairwise

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nn.tile_cases import HEADS, SCALE, TILES
from tessera.nn.attend import attend
from tessera.nn.documents import Documents
from tessera.nn.kernels import tile_cuda, varlen
from tessera.nn.mask import Mask

QUERIES = "Tensor query, Tensor key, Tensor value, "
OPTIONS = "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
WINDOW = "*, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None"
FORWARD = torch._C.parse_schema(
    f"aten::_flash_attention_forward({QUERIES}Tensor? cum_seq_q, Tensor? cum_seq_k, {OPTIONS}bool return_debug_mask, "
    f"{WINDOW}, Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> "
    "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
)
BACKWARD = torch._C.parse_schema(
    f"aten::_flash_attention_backward(Tensor grad_out, {QUERIES}Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
    f"Tensor cum_seq_k, {OPTIONS}Tensor rng_state, Tensor unused, {WINDOW}) -> (Tensor, Tensor, Tensor)"
)
BFLOAT16, FLOAT32, INT32, UINT64 = torch.bfloat16, torch.float32, torch.int32, torch.uint64


class Checked(TorchDispatchMode):
    """Refuses calls of the two operators that their kernels would refuse; `seen` has the arguments of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for schema in (FORWARD, BACKWARD):
            if func.name() == schema.name:
                names = [argument.name for argument in schema.arguments]
                positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
                assert len(args) == len(positional) and set(kwargs or {}) <= set(names[len(positional) :])
                given = dict(zip(positional, args, strict=True)) | (kwargs or {})
                check(given)
                self.seen.append(given)
        return func(*args, **(kwargs or {}))


def check(given: dict) -> None:
    q, k = given["query"], given["key"]
    (total_q, heads, features), (total_k, kv_heads, _) = q.shape, k.shape
    expected = {
        "query": (BFLOAT16, (total_q, heads, features)),
        "key": (BFLOAT16, (total_k, kv_heads, features)),
        "value": (BFLOAT16, (total_k, kv_heads, features)),
        "grad_out": (BFLOAT16, (total_q, heads, features)),
        "out": (BFLOAT16, (total_q, heads, features)),
        "logsumexp": (FLOAT32, (heads, total_q)),
        "cum_seq_q": (INT32, given["cum_seq_q"].shape),
        "cum_seq_k": (INT32, given["cum_seq_q"].shape),
        "rng_state": (UINT64, (2,)),
    }
    for name, (dtype, shape) in expected.items():
        if name in given:
            tensor = given[name]
            assert (tensor.dtype, tuple(tensor.shape), tensor.is_cuda) == (dtype, tuple(shape), True), name
            assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1, name
            if name in ("grad_out", "out", "logsumexp", "cum_seq_q", "cum_seq_k"):  # read by their shapes alone
                assert tensor.is_contiguous(), name
    assert heads % kv_heads == 0 and features % 8 == 0 and features <= 256 and len(given["cum_seq_q"].shape) == 1
    assert 0 < given["max_q"] <= total_q and 0 < given["max_k"] <= total_k and given["dropout_p"] == 0


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    # torch built without CUDA refuses `contiguous` of tensors there, fake or not
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    with FakeTensorMode(), Checked() as mode, torch.no_grad():  # fake tensors of a GPU have no graph without one
        yield mode


def tensors(shapes, dtype=BFLOAT16):
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


def test_installed_operators_take_these_arguments():
    for schema in (FORWARD, BACKWARD):
        installed = getattr(torch.ops.aten, schema.name.removeprefix("aten::")).default._schema
        assert installed.is_backward_compatible_with(schema)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rows_are_handed_as_the_kernel_takes_them(checked, monkeypatch, heads, packed, window):
    gradients = []

    def both(kernel, backward, *inputs, once=None):
        out, lse, *more = kernel(*inputs)
        gradients.extend(
            backward(
                out.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1),
                *inputs,
                out,
                lse,
                *more,
            )
        )
        return out, lse

    monkeypatch.setattr(varlen, "attention", both)
    bounds = (0, 1, 20, 64, 65, 128) if packed else (0, 64, 128)
    q, k, v = (x.transpose(1, 2) for x in tensors([(2, 64, h, 32) for h in (heads[0], heads[1], heads[1])]))
    documents = Documents(torch.empty(2, 64, device="cuda"), bounds) if packed else None
    out, lse = attend(q, k, v, Mask(True, window, documents), with_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == FLOAT32
    assert [x.shape for x in gradients] == [(128, h, 32) for h in (heads[0], heads[1], heads[1])]
    assert len(checked.seen) == 2
    for given in checked.seen:
        lengths = [end - first for first, end in pairwise(bounds)]
        assert len(given["cum_seq_q"]) == len(bounds) and given["max_q"] == given["max_k"] == max(lengths)
        assert given["is_causal"]
        shows = None if window is None or window >= 64 else window - 1
        assert given.get("window_size_left") == shows


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", TILES)
def test_tiles_are_handed_as_the_kernel_takes_them(checked, name, heads):
    """Parts of larger tensors, as `forward_tiles` cuts them; the result of all tiles in the queries' dtype."""
    tile = TILES[name]
    q, out, d_out = (x.narrow(0, 3, tile.q1) for x in tensors([(tile.q1 + 5, heads[0], 32)] * 3))
    k, v = (x.narrow(0, 2, tile.k1) for x in tensors([(tile.k1 + 4, heads[1], 32)] * 2))
    (lse,) = tensors([(heads[0], tile.q1 + 5)], FLOAT32)
    found, found_lse = tile_cuda.forward(q, k, v, tile, SCALE)
    assert found.shape == q.shape and (found_lse.shape, found_lse.dtype) == ((heads[0], tile.q1), FLOAT32)
    gradients = tile_cuda.backward(d_out, q, k, v, out, lse.narrow(1, 3, tile.q1), tile, SCALE)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    assert len(checked.seen) == 2
    for given in checked.seen:
        assert (given["max_q"], given["max_k"], given["is_causal"]) == (tile.q1, tile.k1, tile.causal)
        assert given.get("window_size_left") == (None if tile.window is None else 0)


@pytest.mark.parametrize("name, wrong", [("logsumexp", FLOAT32), ("cum_seq_q", torch.int64), ("out", FLOAT32)])
def test_what_the_kernel_refuses_is_found(checked, name, wrong):
    q, k, v, d_out, out = tensors([(16, 8, 32), (16, 2, 32), (16, 2, 32), (16, 8, 32), (16, 8, 32)])
    (lse,) = tensors([(8, 16)], FLOAT32)
    bounds = torch.empty(2, dtype=INT32, device="cuda")
    rng = torch.empty(2, dtype=UINT64, device="cuda")
    arguments = {"logsumexp": lse, "cum_seq_q": bounds, "out": out}
    operator = torch.ops.aten._flash_attention_backward.default

    def call(out, logsumexp, cum_seq_q):
        operator(d_out, q, k, v, out, logsumexp, cum_seq_q, bounds, 16, 16, 0.0, True, rng, rng, scale=None)

    call(**arguments)
    arguments[name] = lse.t() if name == "logsumexp" else arguments[name].to(wrong)
    with pytest.raises(AssertionError, match=name):
        call(**arguments)
