"""Feed-forward blocks: SwiGLU (Shazeer 2020) and GELU, column-parallel in, row-parallel out; whole or in tiles."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init
from tessera.layout.streams import check_chain
from tessera.nn.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear, parallel_linear, product_of
from tessera.nn.mlp_tiles import Operands, in_tiles, tile_sizes
from tessera.product.gathered import Move, Together
from tessera.product.roles import ranks_of, start_reduce, start_unshard

# mypy: disable-error-code="no-untyped-def"


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, keeping only gate and up for the backward (autograd would keep silu(gate) too)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        silu = F.silu(gate)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, silu.mul_(dy)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise."""
    return _SwiGLU.apply(gate, up)


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), exact."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (GPT-2's gelu_new)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh}


class MLP(nn.Module):
    """residual → hidden (ffn_size features, cut over col) → residual; with a gate SwiGLU, without it `activation`."""

    def __init__(
        self,
        features: int,
        ffn_size: int,
        parallel: Parallel,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        init: Init = Init(std=0.02),
        out_init: Init = Init(std=0.02),
        tiles: int | None = 1,
    ) -> None:
        """`tiles`: into how many parts its tokens fall; None: as many as `tiles_of` says."""
        super().__init__()
        if gated != (activation == "silu"):
            raise ValueError(f"activation {activation!r} {'with' if gated else 'without'} a gate is not built")
        self.gate = ColumnParallelLinear(features, ffn_size, parallel, bias=bias, init=init) if gated else None
        self.up = ColumnParallelLinear(features, ffn_size, parallel, bias=bias, init=init)
        self.down = RowParallelLinear(ffn_size, features, parallel, bias=bias, init=out_init)
        self.activation, self.tiles = ACTIVATIONS.get(activation), tiles
        check_chain("up", self.up.output, "down", self.down.input)
        self.input, self.output = self.up.input, self.down.output

    @property
    def into(self) -> list[ParallelLinear]:
        """The layers that read the residual stream."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    def forward(self, x_TF: Tensor) -> Tensor:
        """x_TF in the residual layout; so is the result."""
        sizes = self.tile_sizes(len(x_TF))
        if len(sizes) == 1:
            return self.down(self.activate(parallel_linear(self.into, x_TF)))
        layers = [*self.into, self.down]
        operands = [*(layer.local("weight") for layer in layers), *(layer.local_bias() for layer in layers)]
        return in_tiles(x_TF, _Tiles(self), sizes, operands)

    def activate(self, Y: Sequence[Tensor]) -> Tensor:
        """The hidden features of what the layers `into` give."""
        if self.gate is not None:
            return swiglu(*Y)
        assert self.activation is not None
        return self.activation(*Y)

    def tile_sizes(self, tokens: int) -> list[int]:
        """The tiles of so many tokens of the residual stream on this rank: the same on all ranks of its products."""
        roles = self.up.plan.roles(self.up.parallel.mesh)
        gathered = ranks_of(roles.outputs) if roles.x_dim == 0 else 1
        scattered = ranks_of(roles.inputs) if roles.y_dim == 0 else 1
        return tile_sizes(tokens, self.tiles, self.up.in_features, gathered, scattered)


class _Tiles:
    """The MLP as `in_tiles` runs it: its weights gathered once for all tiles, unless they come panel by panel."""

    def __init__(self, mlp: MLP) -> None:
        self.mlp, mesh = mlp, mlp.up.parallel.mesh
        self.roles = mlp.up.plan.roles(mesh), mlp.down.plan.roles(mesh)
        self.in_panels = mlp.up.parallel.schedule.in_panels

    def _moved(self, operands: Operands, start: Move) -> Operands:
        """With the weights moved by `start`, those of one kind of layer together; biases stay as they are."""
        moved, last = list(operands), len(operands) // 2 - 1
        for places, roles in zip((range(last), [last]), self.roles, strict=True):
            weights = {place: w for place in places if (w := operands[place]) is not None}
            if weights and not self.in_panels:
                moving = Together(start, list(weights.values()), roles.w_dim, 1 - roles.w_dim, roles.tokens)
                for place, w in zip(weights, moving.wait(), strict=True):
                    moved[place] = w
        return moved

    def gather(self, operands: Operands) -> Operands:
        return self._moved(operands, start_unshard)

    def reduce(self, gradients: Operands) -> Operands:
        return self._moved(gradients, start_reduce)

    def run(self, x_TF: Tensor, operands: Operands) -> Tensor:
        mlp, count = self.mlp, len(operands) // 2
        into, down = self.roles if self.in_panels else (replace(roles, tokens=None) for roles in self.roles)
        weights, biases = [w for w in operands[:count] if w is not None], operands[count:]
        h = mlp.activate(product_of(mlp.up, x_TF, weights[:-1], biases[:-1], into))
        return product_of(mlp.down, h, weights[-1:], biases[-1:], down)[0]
