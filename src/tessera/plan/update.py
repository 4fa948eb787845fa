"""What an update of the weights holds, moves and multiplies, by the optimizer that a config names.

Of each element of this rank's shards, b bytes wide (4 in float32), beside the parameter and its gradient:

    optimizer                  moments               copies in the update
    adamw_torch_fused          2 b                   none
    adamw_torch                2 b                   b        roots of the second moments
    sgd                        b with momentum       b        gradients with weight decay added; one by one on a CPU
    muon, matrices of layers   b                     below
    muon, all else             2 b                   none
    8 bits                     2 and its scale       none     4 bits: 1; a shard of few elements keeps its moments whole
    paged_adamw_32bit          8                     none

The norm reads a gradient, clipping reads and writes it; the update reads it, reads and writes the parameter and the
moments: 6 b and twice the moments' bytes, ten elements with AdamW.

Muon brings its matrices together in bfloat16, as many at once as ranks share their work; each rank orthogonalises one
by Newton and Schulz's iteration in five rounds of 4 d² D + 2 d³ FLOP (D and d the longer and the shorter side), and
sends the change in float32.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from tessera.core.arrays import smaller, where
from tessera.core.axes import AXES
from tessera.engine.muon import AT_ONCE
from tessera.engine.optimizer import BITSANDBYTES, EXACT, TORCHAO
from tessera.layout.parallel import Parallel
from tessera.models.anatomy import Parameter, anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.traffic import Transfer

ROUNDS = 5
"""Of Newton and Schulz's iteration, unless `ns_steps` says others."""
FEW = 4096
"""Elements of a shard below which the libraries of few bits keep moments whole."""
WIDE, NARROW = 4, 2
"""Bytes of a float32 and of a bfloat16."""


@dataclass(frozen=True)
class Update:
    """An optimizer by the keys of a config: `optimizer`, and its `optim_args`."""

    name: str = EXACT[0]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def moment_bytes(self, model: ModelConfig, parallel: Parallel) -> Any:
        """Bytes of the optimizer's state of this rank's shards."""
        return sum(times * self._moments(p, parallel, layer) for p, times, layer in _parameters(model, parallel))

    def copied_bytes(self, model: ModelConfig, parallel: Parallel, *, offload: bool = False) -> Any:
        """Bytes on the device of what the update holds beside all states, at most; `offload`: these lie on the host."""
        if self.name == "muon":
            return self._orthogonalised(model, parallel)
        copies = self.name in ("adamw_torch", "sgd") and not offload
        return shard_elements(model, parallel) * parallel.dtype.itemsize if copies else 0

    def moved_bytes(self, model: ModelConfig, parallel: Parallel) -> Any:
        """Bytes that the norm, clipping and the update read and write in memory."""
        shards = shard_elements(model, parallel) * parallel.dtype.itemsize
        return 6 * shards + 2 * self.moment_bytes(model, parallel)

    def flops(self, model: ModelConfig, parallel: Parallel) -> Any:
        """What a rank multiplies in matrix products: muon's iteration, each matrix by one of the ranks that share."""
        if self.name != "muon":
            return 0
        rounds, share = self.options.get("ns_steps", ROUNDS), smaller(AT_ONCE, parallel.mesh.size(AXES))
        sides = [(min(p.spec.shape), max(p.spec.shape), times) for p, times in _matrices(model, parallel)]
        return sum(times * rounds * (4 * d**2 * far + 2 * d**3) for d, far, times in sides) / share

    def transfers(self, model: ModelConfig, parallel: Parallel) -> list[Transfer]:
        """What ranks exchange for it: muon's updates, brought together along all axes that cut them, and changes."""
        mesh, made = parallel.mesh, []
        if self.name != "muon" or not (everywhere := mesh.present(AXES)):
            return []
        for p, times in _matrices(model, parallel):
            whole, shard = prod(p.spec.shape), prod(p.spec.stored_shape(mesh))
            cut = mesh.present({*p.spec.stored_over, *(axis for axes in p.spec.cuts for axis in axes)})
            if cut:
                received = NARROW * (whole - shard)
                made.append(Transfer("update", "step", "update", "all_gather", cut, 1, received, times))
            made.append(Transfer("update", "step", "change", "broadcast", everywhere, 1, WIDE * whole, times))
        return made

    def _moments(self, parameter: Parameter, parallel: Parallel, layer: bool) -> Any:
        elements, b = prod(parameter.spec.stored_shape(parallel.mesh)), parallel.dtype.itemsize
        if self.name == "sgd":
            return elements * b if self.options.get("momentum") else 0
        if self.name == "muon" and layer and len(parameter.spec.shape) == 2:
            return elements * b
        if self.name in TORCHAO:
            bits = TORCHAO[self.name]
            block = self.options.get("block_size", 256 if bits == 8 else 128)
            low = elements * bits // 4 + 2 * WIDE * (elements // block)
            return where((elements >= FEW) & (elements % block == 0), low, 2 * elements * b)
        if self.name in BITSANDBYTES:
            few = self.options.get("min_8bit_size", FEW) if BITSANDBYTES[self.name] == 8 else np.inf
            return where(elements >= few, 2 * elements + 2 * WIDE * -(-elements // 256), 2 * WIDE * elements)
        return 2 * elements * b

    def _orthogonalised(self, model: ModelConfig, parallel: Parallel) -> int:
        """Bytes that the last of the ranks that share work holds: all updates, and the changes of those before it,
        the last of which lies there twice: as it arrives, and what it arrived in place of.

        Its own matrix is there as float32 three times, and twice in bfloat16 beside two products of d × d.
        """
        share = int(np.max(smaller(AT_ONCE, parallel.mesh.size(AXES))))
        of_layer = [p.spec.shape for p, _ in _matrices(model, parallel)]
        turns = [[of_layer[(first + n) % len(of_layer)] for n in range(share)] for first in range(len(of_layer))]
        return max(
            NARROW * sum(map(prod, turn))
            + WIDE * (sum(map(prod, turn[:-1])) + sum(map(prod, turn[-2:-1])))
            + 3 * WIDE * prod(turn[-1])
            + NARROW * (2 * prod(turn[-1]) + 2 * min(turn[-1]) ** 2)
            for turn in turns
        )


ADAMW = Update()


def shard_elements(model: ModelConfig, parallel: Parallel) -> Any:
    """Elements of this rank's shards of all parameters."""
    return sum(times * prod(p.spec.stored_shape(parallel.mesh)) for p, times, _ in _parameters(model, parallel))


def _parameters(model: ModelConfig, parallel: Parallel) -> Iterator[tuple[Parameter, int, bool]]:
    """Each parameter of each kind of layer, how many there are, and whether it is a layer's."""
    *layers, (outside, _) = anatomy_of(model).units(parallel)
    for unit, times in layers:
        yield from ((parameter, times, True) for parameter in unit)
    yield from ((parameter, 1, False) for parameter in outside)


def _matrices(model: ModelConfig, parallel: Parallel) -> list[tuple[Parameter, int]]:
    """What muon orthogonalises."""
    every = _parameters(model, parallel)
    return [(p, times) for p, times, layer in every if layer and len(p.spec.shape) == 2]
