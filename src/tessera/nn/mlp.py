"""Feed-forward blocks: SwiGLU (Shazeer 2020) and GELU, column-parallel in, row-parallel out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init
from tessera.layout.streams import check_chain
from tessera.nn.linear import ColumnParallelLinear, RowParallelLinear, parallel_linear

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
    ) -> None:
        super().__init__()
        if gated != (activation == "silu"):
            raise ValueError(f"activation {activation!r} {'with' if gated else 'without'} a gate is not built")
        self.gate = ColumnParallelLinear(features, ffn_size, parallel, bias=bias, init=init) if gated else None
        self.up = ColumnParallelLinear(features, ffn_size, parallel, bias=bias, init=init)
        self.down = RowParallelLinear(ffn_size, features, parallel, bias=bias, init=out_init)
        self.activation = ACTIVATIONS.get(activation)
        check_chain("up", self.up.output, "down", self.down.input)
        self.input, self.output = self.up.input, self.down.output

    def forward(self, x_TF: Tensor) -> Tensor:
        """x_TF in the residual layout; so is the result."""
        if self.gate is not None:
            return self.down(swiglu(*parallel_linear([self.gate, self.up], x_TF)))
        assert self.activation is not None
        return self.down(self.activation(self.up(x_TF)))
