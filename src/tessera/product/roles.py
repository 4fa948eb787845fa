"""Which group of ranks cuts each dimension of one product, and the two moves of an operand."""

from dataclasses import dataclass

from torch import Tensor

from tessera.core.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from tessera.core.mesh import Group


@dataclass(frozen=True)
class Roles:
    """The group of axes that cuts each dimension of one product (None: none does), and how operands are stored.

    `x_dim` is the dim of X over which the `outputs` axes store it: 0 tokens, 1 features, None whole on every rank.
    `y_dim` is the same for Y and the `inputs` axes. `w_dim` is the dim of W over which the `tokens` axes store it: the
    one that `inner` cuts, so that nested shards stay contiguous (1 in a column-parallel layer, 0 in a row one).
    """

    tokens: Group | None = None
    outputs: Group | None = None
    inputs: Group | None = None
    x_dim: int | None = 0
    w_dim: int = 1
    y_dim: int | None = 0


def ranks_of(group: Group | None) -> int:
    """How many ranks share a dimension: 1 where none cuts it."""
    return group.size if group else 1


def start_unshard(x: Tensor, dim: int | None, group: Group | None) -> Pending:
    """Bring together a tensor stored cut along `dim`; nothing to do for one stored whole."""
    return Pending(x) if dim is None else start_all_gather(x, dim, group)


def start_reduce(x: Tensor, dim: int | None, group: Group | None) -> Pending:
    """Sum partial results, each rank keeping its shard along `dim`, or all of it when `dim` is None."""
    return start_all_reduce(x, group) if dim is None else start_reduce_scatter(x, dim, group)
