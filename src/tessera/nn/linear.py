"""The parallel linear layer: one class, two standard names, products in common.

name                   from → to             weight [out, in]                 Megatron's words (col only)
ColumnParallelLinear   residual → hidden     [out: col][in: inner, row]       gather X, no move of Y
RowParallelLinear      hidden → residual     [out: inner, row][in: col]       no move of X, reduce Y, then the bias
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from tessera.layout.parallel import Parallel
from tessera.layout.spec import Init, ParameterSpec
from tessera.layout.streams import HIDDEN, Layout, LinearPlan
from tessera.nn.parameter import ParallelModule, add_gradient, to_local
from tessera.product.gathered import Site, distributed_product
from tessera.product.moves import cut
from tessera.product.panels import panel_product
from tessera.product.roles import Roles


class ParallelLinear(ParallelModule):
    """Y = X Wᵀ + b, the product cut as the subclass plans it. `in_features` and `out_features` are global sizes."""

    make_plan: Callable[[Parallel, Layout], LinearPlan]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parallel: Parallel,
        *,
        bias: bool = False,
        init: Init = Init(std=0.02),
        hidden: Layout = HIDDEN,
    ) -> None:
        super().__init__(parallel)
        self.in_features, self.out_features = in_features, out_features
        self.plan = plan = self.make_plan(parallel, hidden)
        self.input, self.output = plan.input, plan.output
        self.declare("weight", ParameterSpec((out_features, in_features), plan.weight_cuts, plan.input, init))
        if bias:
            self.declare("bias", ParameterSpec((out_features,), plan.bias_cuts, plan.output, Init()))

    def local_bias(self) -> Tensor | None:
        """This rank's part of the bias, in the compute dtype; None when there is none."""
        if "bias" not in self.specs:
            return None
        bias, mesh = self.local("bias"), self.parallel.mesh
        for axis in self.output.features:
            if axis not in self.plan.bias_cuts[0]:  # stored whole along it: its own part of Y gets its own part
                bias = bias.chunk(mesh.sizes[axis])[mesh.coordinates[axis]]
        return bias

    def forward(self, x: Tensor, *, uncut: bool = False) -> Tensor:
        """x: this rank's part [T_local, in_local] in the `input` layout; with `uncut` all of it, [T, in], everywhere.

        Returns this rank's part of Y in the `output` layout.
        """
        return parallel_linear([self], x, uncut=uncut)[0]


class ColumnParallelLinear(ParallelLinear):
    """Residual stream → hidden stream: outputs cut over `col` (q, k, v, gate, up, head)."""

    make_plan = staticmethod(Parallel.column)


class RowParallelLinear(ParallelLinear):
    """Hidden stream → residual stream: inputs cut over `col` (attention out, down). The bias is added once."""

    make_plan = staticmethod(Parallel.row)


def parallel_linear(layers: Sequence[ParallelLinear], x: Tensor, *, uncut: bool = False) -> tuple[Tensor, ...]:
    """Apply layers that read the same x as one product: one gather of x, one reduction of its gradient."""
    plan, parallel = layers[0].plan, layers[0].parallel
    roles = plan.roles(parallel.mesh)
    if uncut:
        if parallel.schedule.in_panels:
            raise ValueError(f"schedule {parallel.schedule} takes x cut as the layer's input is")
        x, roles = _cut_for(plan, x, roles, parallel)
    weights = [layer.local("weight") for layer in layers]
    biases = [layer.local_bias() for layer in layers]
    return product_of(layers[0], x, weights, biases, roles, _site(layers, parallel))


def product_of(
    layer: ParallelLinear,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    roles: Roles,
    site: Site | None = None,
) -> tuple[Tensor, ...]:
    """The product of layers such as `layer` with these local weights and biases, as its schedule moves them."""
    schedule = layer.parallel.schedule
    if schedule.in_panels:
        Y = panel_product(x, weights, roles, schedule, column=layer.plan.outputs_axis == "col")
        return tuple(y if b is None else y + b for y, b in zip(Y, biases, strict=True))
    return distributed_product(x, weights, biases, roles, schedule, site)


def _site(layers: Sequence[ParallelLinear], parallel: Parallel) -> Site:
    """Where the gathered product of these layers gets its weights early and leaves their gradients late."""

    def weights() -> list[Tensor]:
        return [to_local(layer._parameters["weight"]).to(parallel.compute) for layer in layers]

    def add(gradients: list[Tensor]) -> None:
        weights = [layer._parameters["weight"] for layer in layers]
        trained = [weight for weight in weights if weight is not None and weight.requires_grad]
        for weight, gradient in zip(trained, gradients, strict=True):
            add_gradient(weight, gradient)

    return Site(tuple(id(layer) for layer in layers), parallel.overlap, weights, add)


def _cut_for(plan: LinearPlan, x: Tensor, roles: Roles, parallel: Parallel) -> tuple[Tensor, Roles]:
    """Cut a whole X over the axes of T and K only: along the axes of N every rank needs all of it anyway."""
    needed = [[axis for axis in axes if axis != plan.outputs_axis] for axes in (plan.input.tokens, plan.input.features)]
    return cut(x, needed, parallel.mesh), replace(roles, x_dim=None)
