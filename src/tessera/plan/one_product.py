"""What each rank receives in one product on its own: the closed form of the one rule."""

from tessera.product.roles import Roles


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
