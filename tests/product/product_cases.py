"""Runs on every rank of a pool: one product, against the dense one that every rank computes for itself."""

import torch
from torch import Tensor

from support.compare import error
from support.mesh import shared_mesh
from tessera.core.collectives import Recorder
from tessera.core.mesh import Mesh
from tessera.plan.one_product import received_elements
from tessera.product.gathered import distributed_product
from tessera.product.roles import Roles
from tessera.sizes.schedule import Schedule

T, N, K = 16, 24, 32


def shard(x: Tensor, mesh: Mesh, cuts: list[tuple[str, int]]) -> Tensor:
    for axis, dim in cuts:
        x = x.chunk(mesh.sizes[axis], dim)[mesh.coordinates[axis]]
    return x.contiguous()


def product_errors(sizes, x_dim, w_dim, y_dim, keep, biased, count, leave_out):
    """Errors of every output and gradient, counted and closed-form words; `sizes` of row (T), col (N), inner (K)."""
    mesh = shared_mesh(sizes)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    X, dY = draw(T, K).requires_grad_(), [draw(T, N) for _ in range(count)]
    W = [draw(N, K).requires_grad_() for _ in range(count)]
    b = [draw(N).requires_grad_() if biased else None for _ in range(count)]
    Y = [torch.nn.functional.linear(X, w, bias) for w, bias in zip(W, b, strict=True)]
    torch.autograd.backward(Y, dY)

    x_cuts = [("row", 0), ("inner", 1)] + ([("col", x_dim)] if x_dim is not None else [])
    w_cuts = [("col", 0), ("inner", 1), ("row", w_dim)]
    y_cuts = [("row", 0), ("col", 1)] + ([("inner", y_dim)] if y_dim is not None else [])
    roles = Roles(mesh.group(["row"]), mesh.group(["col"]), mesh.group(["inner"]), x_dim, w_dim, y_dim)
    leaf = lambda t, cuts: shard(t.detach(), mesh, cuts).requires_grad_()  # noqa: E731
    x, w = leaf(X, x_cuts), [leaf(v, w_cuts) for v in W]
    bias_cut = [("col", 0)] + ([("inner", 0)] if y_dim == 1 else [])
    bias = [None if v is None else leaf(v, bias_cut) for v in b]
    with Recorder(leave_out) as recorder:
        y = distributed_product(x, w, bias, roles, Schedule(keep=keep))
        forward = len(recorder.records)
        torch.autograd.backward(y, [shard(v, mesh, y_cuts) for v in dY])
    pairs = [(v, shard(V.detach(), mesh, y_cuts)) for v, V in zip(y, Y, strict=True)]
    pairs += [(x.grad, shard(X.grad, mesh, x_cuts))]
    pairs += [(v.grad, shard(V.grad, mesh, w_cuts)) for v, V in zip(w, W, strict=True)]
    if biased:  # the gradient of a bias is left partial over the token axes of Y: the gradient rule sums it
        dy = [shard(v, mesh, y_cuts).sum(0) for v in dY]
        pairs += [(v.grad, want) for v, want in zip(bias, dy, strict=True)]
    p = [sizes.get(a, 1) for a in ("row", "col", "inner")]
    words = received_elements(T, N * count, K, *p, roles=roles, keep=keep)
    if count > 1:
        once = received_elements(T, N, K, *p, roles=roles, keep=keep)
        words["outputs"] = once["outputs"]  # X moves once for all weights
    counted = {"row": 0, "col": 0, "inner": 0}
    for record in recorder.records:
        counted[record.axis] += record.received // 8
    closed = {"row": words["tokens"], "col": words["outputs"], "inner": words["inputs"]}
    kinds = [r.kind for r in recorder.records]
    return max(error(a, r) for a, r in pairs), counted, closed, kinds[:forward], kinds[forward:]


def backward_order(keep: bool) -> list[str]:
    """What the backward of a product cut over N does, in order: collectives issued and awaited, and products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    mesh = shared_mesh({"col": 2})
    roles = Roles(outputs=mesh.group(["col"]))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (y,) = distributed_product(x, [w], [None], roles, Schedule(keep=keep))
    with Recorder() as recorder:

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.aten.mm.default:
                    # dX has as many columns as W; dW as many rows as dY has columns
                    recorder.events.append(("product", "dX" if args[0].shape[0] == 8 else "dW"))
                return function(*args, **(kwargs or {}))

        with Products():
            y.backward(torch.ones_like(y))
    return [f"{what} {r if isinstance(r, str) else r.kind}" for what, r in recorder.events]


def public_matmul() -> float:
    import tessera

    mesh = shared_mesh({"row": 2, "col": 2})
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(T, K, generator=generator, dtype=torch.float64)
    W = torch.randn(N, K, generator=generator, dtype=torch.float64)
    y = tessera.matmul(
        shard(X, mesh, [("row", 0), ("col", 0)]),
        shard(W, mesh, [("col", 0), ("row", 1)]),
        mesh,
        tokens="row",
        outputs="col",
    )
    return error(y, shard(X @ W.T, mesh, [("row", 0), ("col", 1)]))
