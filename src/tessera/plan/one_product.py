"""What each rank receives in one product on its own: the closed form of the one rule."""

from typing import NamedTuple

from tessera.core.axes import MODEL_AXES
from tessera.product.roles import Roles
from tessera.sizes.numbers import divisors_of


def received_elements(
    T: int, N: int, K: int, t: int, n: int, k: int, *, roles: Roles | None = None, keep: bool = False
) -> dict[str, int]:
    """Elements each rank receives in one product, forward and backward together, by role of the axis: the closed form.

    T, N, K are the global sizes and t, n, k the ranks that cut each (architecture: the one rule). Along the T
    axes W moves, along N X, along K Y. Gathering again in the backward (`keep` false) moves X and W once more.
    """
    roles = roles or Roles()
    P = t * n * k
    again = 0 if keep else 1
    w_elements = (2 + again) * (t - 1) * N * K // P
    x_elements = (2 if roles.x_dim is None else 2 + again) * (n - 1) * T * K // P
    y_elements = 2 * (k - 1) * T * N // P
    return {"tokens": w_elements, "outputs": x_elements, "inputs": y_elements}


class Cut(NamedTuple):
    """A mesh for one product, and elements that each rank receives in it, forward and backward, by what moves.

    `replicas` are sums of dW along depth, along which W is there once a plane; `held`: what a rank has of all three.
    """

    inner: int
    depth: int
    row: int
    col: int
    x: int
    w: int
    y: int
    replicas: int
    held: int

    @property
    def received(self) -> int:
        """All of them."""
        return self.x + self.w + self.y + self.replicas


def cuts_of(T: int, N: int, K: int, devices: int) -> list[Cut]:
    """Every mesh of so many devices for Y[T, N] = X[T, K] W[K, N] that divides the sizes; the least received first.

    depth and row cut T, col cuts N and inner cuts K; W is copied along depth (2.5D), so a larger depth moves less of X,
    W and Y and sums dW over more ranks. No geometry has both inner and depth. Gathered operands are gathered again in
    the backward.
    """
    cuts = []
    for inner in divisors_of(devices):
        for depth in divisors_of(devices) if inner == 1 else [1]:
            for row in divisors_of(devices // (inner * depth)):
                sizes = (inner, depth, row, devices // (inner * depth * row))
                made = _cut(T, N, K, dict(zip(MODEL_AXES, sizes, strict=True)))
                cuts += [made] if made else []
    return sorted(cuts, key=lambda cut: (cut.received, cut.held))


def _cut(T: int, N: int, K: int, axes: dict[str, int]) -> Cut | None:
    inner, depth, row, col = (axes[axis] for axis in MODEL_AXES)
    # X and Y lie over tokens and features both, W over row too
    if T % (depth * row * inner * col) or N % (col * inner * row) or K % (inner * col * row):
        return None
    plane = received_elements(T // depth, N, K, row, col, inner)
    share = N * K // (inner * row * col)
    replicas = 2 * (depth - 1) * share // depth
    held = (T * K + T * N) // (inner * depth * row * col) + share
    return Cut(inner, depth, row, col, plane["outputs"], plane["tokens"], plane["inputs"], replicas, held)
