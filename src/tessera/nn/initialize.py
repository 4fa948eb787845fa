"""How parameters start: from their name, the seed and the global index, the same on every mesh."""

import hashlib
import math

import torch
from torch import Tensor, nn

from tessera.core.mesh import Mesh
from tessera.nn.parameter import named_specs, to_local

_ROWS = 64  # rows drawn from one generator: a rank draws only the blocks it holds a part of


def hash_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@torch.no_grad()
def initialize(model: nn.Module, mesh: Mesh, seed: int) -> None:
    """Fill every parameter from its name, the seed and the global index: the values do not depend on the mesh."""
    for name, parameter, spec in named_specs(model):
        shard = to_local(parameter)
        if spec.init.std == 0:
            shard.fill_(spec.init.value)
        else:
            shard.copy_(_normal(name, spec.shape, spec.stored_slices(mesh), spec.init.std, seed))


def _normal(name: str, shape: tuple[int, ...], slices: tuple[slice, ...], std: float, seed: int) -> Tensor:
    """The slice of a normal tensor whose blocks of rows each come from a generator seeded by (seed, name, block)."""
    rows, width = slices[0], math.prod(shape[1:])
    generator, drawn = torch.Generator(), []
    for block in range(rows.start // _ROWS, -(-rows.stop // _ROWS)):
        generator.manual_seed(hash_seed(seed, name, block))
        values = torch.randn(_ROWS, width, generator=generator).reshape(_ROWS, *shape[1:])
        first = max(rows.start - block * _ROWS, 0)
        drawn.append(values[(slice(first, rows.stop - block * _ROWS), *slices[1:])])
    return torch.cat(drawn) * std if drawn else torch.empty(0, *(s.stop - s.start for s in slices[1:]))
