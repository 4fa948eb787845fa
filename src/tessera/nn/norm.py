"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) over features that may be cut.

Statistics are kept in promote_types(dtype, float32). Where axes cut the features, the statistics of each token are one
all-reduce over them, forward and backward; cut tokens need none. Gains and biases are cut like the features, and their
gradients summed over the token axes by the gradient rule.
"""

import torch
from torch import Tensor

from tessera.core.collectives import all_reduce
from tessera.core.mesh import Group
from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import Layout
from tessera.nn.parameter import ParallelModule

# mypy: disable-error-code="no-untyped-def"


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """y = g · x · r,  r = 1 / sqrt(mean(x²) + eps).    dx = r · g·dy − x · r³ · mean(x · g·dy)"""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float, features: int, group: Group | None) -> Tensor:
        wide = _widened(x)
        squares = all_reduce(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_(), group)
        scale = torch.rsqrt(squares / features + eps)
        ctx.save_for_backward(x, gain, scale)
        ctx.features, ctx.group = features, group
        return (wide * scale).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, gain, scale = ctx.saved_tensors
        wide, dy_wide, gain_wide = _widened(x), _widened(dy), _widened(gain)
        products = wide * dy_wide
        d_gain = (products.T @ scale.squeeze(-1)).to(gain.dtype)
        dots = all_reduce(products @ gain_wide, ctx.group).unsqueeze(-1)
        dx = (dy_wide * gain_wide).mul_(scale)
        dx.addcmul_(wide, dots * scale**3, value=-1 / ctx.features)
        return dx.to(x.dtype), d_gain, None, None, None


def _moments(wide: Tensor, features: int, group: Group | None) -> tuple[Tensor, Tensor]:
    """The mean of each row, and the sum of squares around it, [T, 1] each.

    Cut features take one all-reduce of two sums a token, each rank's squares being around its own mean (Chan et al.
    1979); in float64, as the means' own squares cancel.
    """
    mean = wide.mean(-1, keepdim=True)
    squares = torch.linalg.vecdot(wide - mean, wide - mean).unsqueeze(-1)
    if group is None:
        return mean, squares
    mine, count = mean.double(), wide.shape[-1]
    total, around_zero = all_reduce(torch.stack([mine * count, squares + mine.square() * count]), group)
    return (total / features).to(wide.dtype), (around_zero - total.square() / features).to(wide.dtype)


class _LayerNorm(torch.autograd.Function):
    """y = g · (x − mean) / sqrt(var + eps) + b.    dx = r · (g·dy − mean(g·dy) − x̂ · mean(x̂ · g·dy))"""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, bias: Tensor, eps: float, features: int, group: Group | None) -> Tensor:
        wide = _widened(x)
        mean, squares = _moments(wide, features, group)
        centred = wide - mean
        scale = torch.rsqrt(squares / features + eps)
        ctx.save_for_backward(x, gain, mean, scale)
        ctx.features, ctx.group = features, group
        return torch.addcmul(bias, centred.mul_(scale), gain).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, gain, mean, scale = ctx.saved_tensors
        x_hat = (_widened(x) - mean).mul_(scale)
        dy_wide = _widened(dy)
        d_gain = (dy_wide * x_hat).sum(0).to(gain.dtype)
        d_bias = dy_wide.sum(0).to(gain.dtype)
        dx_hat = dy_wide * gain
        sums = torch.stack([dx_hat.sum(-1), torch.linalg.vecdot(dx_hat, x_hat)])
        mean_d, mean_dots = (all_reduce(sums, ctx.group) / ctx.features).unsqueeze(-1)
        dx = dx_hat.sub_(mean_d).sub_(x_hat.mul_(mean_dots)).mul_(scale)
        return dx.to(x.dtype), d_gain, d_bias, None, None, None


class Norm(ParallelModule):
    """What both norms share: a gain over the features of the stream `layout`; x and y are [T_local, F_local] in it."""

    def __init__(self, features: int, layout: Layout, parallel: Parallel, eps: float) -> None:
        super().__init__(parallel)
        self.features, self.eps = features, eps
        self.input = self.output = layout
        self.declare("weight", ParameterSpec((features,), (layout.features,), layout, Init(value=1.0)))

    def _group(self) -> Group | None:
        return self.parallel.mesh.group(self.input.features)


class RMSNorm(Norm):
    """x / rms(x) · gain."""

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.stored("weight"), self.eps, self.features, self._group())


class HeadNorm(ParallelModule):
    """RMSNorm of each query or key head on its own (Henry et al. 2020); one gain [head_dim] for all heads.

    Every rank holds the gain whole; it acts on heads and tokens that the ranks share, so its gradient is summed over
    all axes that cut either.
    """

    def __init__(self, head_dim: int, hidden: Layout, parallel: Parallel, eps: float) -> None:
        super().__init__(parallel)
        self.head_dim, self.eps = head_dim, eps
        self.declare("weight", ParameterSpec((head_dim,), ((),), hidden, Init(value=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., head_dim], whole heads."""
        rows = x.reshape(-1, self.head_dim)
        return _RMSNorm.apply(rows, self.stored("weight"), self.eps, self.head_dim, None).view(x.shape)


class LayerNorm(Norm):
    """(x − mean) / std · gain + bias."""

    def __init__(self, features: int, layout: Layout, parallel: Parallel, eps: float) -> None:
        super().__init__(features, layout, parallel, eps)
        self.declare("bias", ParameterSpec((features,), (layout.features,), layout, Init()))

    def forward(self, x: Tensor) -> Tensor:
        return _LayerNorm.apply(x, self.stored("weight"), self.stored("bias"), self.eps, self.features, self._group())
