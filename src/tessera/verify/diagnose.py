"""From numbers that differ to the parameter, the mesh axis and the sum that is likely missing.

One step is run again with what passes between the products in view, in float64, beside the same step in one process: on
sequences enough that every rank has whole ones, unless ranks share them. Where things first go wrong, and what the
wrong numbers are instead of the right ones, tells the fault:

    the first wrong tensor    lies behind one product or norm, whose collectives `plan.traffic` lists
    each rank's own part      of a sum over an axis: that sum was not taken
    zero                      an operand did not arrive
    a whole multiple          what was whole was summed over an axis of that size
    off by the bias           as often as there are ranks on an axis: each has added it
    one place of an axis      wrong or right alone: the collective from it or to it
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera.core.axes import AXES, DATA_AXES
from tessera.core.collectives import Recorder, gathered
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import length_multiple
from tessera.layout.spec import ParameterSpec, local_slice
from tessera.models.anatomy import HEAD
from tessera.models.decoder import Decoder
from tessera.nn.parameter import named_specs, to_local
from tessera.plan.traffic import LAYERS, OUTSIDE, Transfer, step_transfers
from tessera.verify import own
from tessera.verify.cases import Case
from tessera.verify.steps import batches_of, build, shape_of, stepper
from tessera.verify.trace import Operation, Point, Trace, behind, operations, part, traced

ARRIVING = ("all_gather", "broadcast", "shift", "all_to_all", "receive")
SUMMING = ("reduce_scatter", "all_reduce", "reduce", "shift")
ROOTED = ("broadcast", "reduce", "shift")
ROUNDING = 1e-10  # of a whole tensor's norm, in float64


@dataclass
class Beside:
    """The layout and one process side by side: one step of each, what passed in it, its gradients."""

    model: Decoder
    trace: Trace
    reference: Step
    expected: Trace
    gradients: dict[str, Tensor]  # the reference's, whole
    batches: Sequence[MicroBatch]
    transfers: list[Transfer]
    own_tokens: Sequence[Tensor]  # of each micro-batch: which of its data rank's tokens this rank has, in its order

    @property
    def mesh(self) -> Mesh:
        return self.model.parallel.mesh

    def agreed(self, flags: Iterable[bool]) -> list[bool]:
        """Which of `flags` are set on any rank."""
        return [any(everyone) for everyone in zip(*gathered(list(flags), self.mesh.world), strict=True)]

    def everywhere(self, flag: bool) -> bool:
        return all(gathered(flag, self.mesh.world))


@dataclass(frozen=True)
class Hint:
    """What the wrong numbers are, in words, and the axes and kinds of the collectives that would explain it.

    `across`: shifts would be along other axes than `axes`, as Cannon's depend on the place across their own.
    """

    said: str = ""
    axes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ARRIVING + SUMMING
    likely: str = ""
    across: bool = False

    def fits(self, transfer: Transfer) -> bool:
        along = not self.axes or bool(set(transfer.axes) & set(self.axes))
        return transfer.kind in self.kinds and along != (self.across and transfer.kind == "shift")


def diagnose(case: Case, parallel: Parallel, alone: Parallel, leave_out: int | None = None) -> list[str]:
    """What is wrong with a layout that differs from one process, in lines for people; the same on every rank.

    `parallel` is the layout and `alone` one process, both in float64.
    """
    beside = _run_beside(case, parallel, alone, leave_out)
    points = list(beside.trace.values)
    wrong_points = beside.agreed(_is_wrong(*_at(beside, point)) for point in points)
    if any(wrong_points):
        return _of_point(beside, points[wrong_points.index(True)])
    specs = {name: spec for name, _, spec in named_specs(beside.model)}
    wrong = beside.agreed(_is_wrong(*_gradient(beside, name, spec)) for name, spec in specs.items())
    if any(wrong):
        return _of_gradients(
            beside, {name: spec for (name, spec), flag in zip(specs.items(), wrong, strict=True) if flag}
        )
    axes = "·".join(beside.mesh.present(AXES))
    return [
        "every activation and every gradient of a step is right: what is wrong comes after them",
        f"likely missing: the sum over {axes} of the loss and the squared gradients (all_reduce), or the update itself",
    ]


def _run_beside(case: Case, parallel: Parallel, alone: Parallel, leave_out: int | None) -> Beside:
    problem, config = replace(case.problem, steps=1), case.config
    if not problem.shared:
        problem = replace(problem, batch=2 * parallel.mesh.world)
    padded = length_multiple(problem.batch // parallel.mesh.size(DATA_AXES), parallel.residual, parallel.mesh)
    model, reference = (build(problem, p, config) for p in (parallel, alone))
    step, reference_step = (stepper(m, problem, config) for m in (model, reference))
    batches, mine = problem.batches(0, padded), batches_of(problem, parallel, 0)
    with Recorder(leave_out):
        trace = traced(step, mine)
    expected = traced(reference_step, batches)
    gradients = {name: to_local(parameter.grad).clone() for name, parameter, _ in named_specs(reference)}
    transfers = step_transfers(problem.model, shape_of(problem, parallel, config), parallel)
    return Beside(
        model, trace, reference_step, expected, gradients, batches, transfers, [_own_tokens(model, b) for b in mine]
    )


def _at(beside: Beside, point: Point) -> tuple[Tensor, Tensor, float]:
    """This rank's tensor at a point, what it should be, and the norm of the whole."""
    whole = beside.expected.values[point]
    return beside.trace.values[point], _here(beside, whole, point), whole.norm().item()


def _here(beside: Beside, whole: Tensor, point: Point) -> Tensor:
    """This rank's part of what is at a point: of its data rank's sequences, as its layout cuts them."""
    mesh = beside.mesh
    of_data_rank = whole.chunk(mesh.size(DATA_AXES))[mesh.index(DATA_AXES)]
    return part(of_data_rank[beside.own_tokens[point.micro_batch]], beside.trace.layouts[point], mesh)


def _own_tokens(model: Decoder, batch: MicroBatch) -> Tensor:
    """Where the tokens of this rank of the sequence axes come from, by the permutation that the ids go through too."""
    ids = batch.input_ids
    return model.cut(replace(batch, input_ids=torch.arange(ids.numel()).view_as(ids))).input_ids.flatten()


def _gradient(beside: Beside, name: str, spec: ParameterSpec) -> tuple[Tensor, Tensor, float]:
    """This rank's gradient of a parameter, what it should be, and the norm of the whole, at least a share of all."""
    whole = beside.gradients[name]
    ours = beside.model.get_parameter(name).grad
    want = whole[spec.stored_slices(beside.mesh)]
    least = 1e-3 * max(g.norm().item() for g in beside.gradients.values())
    return want.new_zeros(want.shape) if ours is None else to_local(ours), want, max(whole.norm().item(), least)


def _is_wrong(ours: Tensor, want: Tensor, scale: float) -> bool:
    return not (ours - want).norm().item() <= ROUNDING * scale  # not a number is wrong


# ---------------------------------------------------------------------------------------------- what is wrong where


def _of_point(beside: Beside, point: Point) -> list[str]:
    operation = behind(point, beside.model)
    names = [n for n, _, _ in named_specs(beside.model) if n.rpartition(".")[0] in operation.modules]
    sites, on_the_way = {*operation.sites, *map(_unit, names)}, _on_the_way(beside, operation)
    transfers = [t for t in beside.transfers if t.site in sites and t.phase == operation.phase and t.what in on_the_way]
    ours, want, scale = _at(beside, point)

    def own_part(axes: tuple[str, ...]) -> Tensor | None:
        whole = own.of_point(point, axes[0], beside.model, beside.reference.model, beside.expected)
        return None if whole is None else _here(beside, whole, point)

    candidates = [(axis,) for axis in beside.mesh.present({axis for transfer in transfers for axis in transfer.axes})]
    hint = (
        _zero_or_multiple(beside, ours, want, scale)
        or _own_part(beside, ours, want, scale, own_part, candidates)
        or _bias(beside, point, ours - want, scale)
        or (_one_place(beside, ours, want, scale) if _may_be_one_place(beside, transfers) else None)
    )
    return [f"parameter: {', '.join(names)}", f"first wrong: {point}", *_told(hint or Hint(), transfers)]


def _on_the_way(beside: Beside, operation: Operation) -> tuple[str, ...]:
    """The operands whose moves an operation's result depends on, as `plan.traffic` calls them."""
    if HEAD in operation.sites:  # forms its gradients in the forward
        parts = sum(gathered(beside.trace.loss, beside.mesh.world))
        right = abs(parts - beside.expected.loss) <= ROUNDING * abs(beside.expected.loss)
        return ("dX", "dlogits") if right else ("X", "W", "logits", "log-sum-exp", "targets")
    if operation.phase == "forward":
        return ("X", "W", "Y", "q", "k·v", "result", "statistics")
    return ("dY", "W", "dX", "k·v", "dq", "dk·dv", "dresult", "statistics")


def _of_gradients(beside: Beside, wrong: dict[str, ParameterSpec]) -> list[str]:
    name, spec = next(iter(wrong.items()))
    ours, want, scale = _gradient(beside, name, spec)
    # where ranks share sequences, the loss on some tokens has gradients at others' keys and values
    parallel = beside.model.parallel
    shared = {"inner", "col", *parallel.owners} if parallel.cuts_sequences else ()
    tokens = tuple(axis for axis in (*DATA_AXES, *spec.acts_on.tokens) if axis not in shared)

    def own_part(axes: tuple[str, ...]) -> Tensor:
        whole = own.of_parameter(name, axes, tokens, beside.mesh, beside.reference, beside.batches)
        return whole[spec.stored_slices(beside.mesh)]

    present = beside.mesh.present(tokens)
    candidates = [axes for n in range(len(present)) for axes in itertools.combinations(present, n + 1)]
    hint = (
        _zero_or_multiple(beside, ours, want, scale)
        or _own_part(beside, ours, want, scale, own_part, candidates)
        or _one_place(beside, ours, want, scale)
    )
    others = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
    # a vector's gradient is summed with the replicas
    replicas = [t for t in beside.transfers if t.what == "replicas" and not set(t.axes) & spec.cut_axes]
    module, _, kind = name.rpartition(".")
    reading = [each for each, *_ in operations(beside.model.config) if kind == "weight" and module in each.modules]
    sites = {_unit(name), *(site for operation in reading for site in operation.sites)}
    moved = ("dY", "dW") if name == "embedding.weight" else ("X", "dW")
    own_product = [t for t in beside.transfers if t.site in sites and t.what in moved]
    transfers = [t for t in own_product if t.phase == "backward" or t.what == "dW"] + replicas
    return [
        f"parameter: {name}{others}",
        "first wrong: its gradient; every activation, and the gradient of every one, is right",
        *_told(hint or Hint(), transfers),
    ]


def _unit(name: str) -> str:
    """The site of what FSDP2 moves a parameter with."""
    return LAYERS if name.startswith("layers.") else OUTSIDE


# ---------------------------------------------------------------------------------------------- what it is instead


# Each answers on all ranks alike: `ours` is wrong on some rank, `want` is right, `scale` the norm of the whole.


def _zero_or_multiple(beside: Beside, ours: Tensor, want: Tensor, scale: float) -> Hint | None:
    if beside.everywhere(not ours.any().item()):
        return Hint("it is zero: an operand did not arrive", kinds=ARRIVING)
    for axis in beside.mesh.present(AXES):
        times = beside.mesh.sizes[axis]
        if beside.everywhere(not _is_wrong(ours, times * want, times * scale)):
            said = f"it is {times} times what it should be"
            return Hint(
                said, likely=f"likely: one sum too many, over {axis}, of what is whole on each of its {times} ranks"
            )
    return None


def _own_part(
    beside: Beside,
    ours: Tensor,
    want: Tensor,
    scale: float,
    own_part: Callable[[tuple[str, ...]], Tensor | None],
    candidates: Iterable[tuple[str, ...]],
) -> Hint | None:
    wrong = _is_wrong(ours, want, scale)
    for axes in candidates:
        alone = own_part(axes)
        if alone is not None and beside.everywhere(not wrong or not _is_wrong(ours, alone, scale)):
            named = "·".join(axes)
            said = f"wherever it is wrong it is that rank's own part along {named}: it is not summed over {named}"
            return Hint(said, axes, SUMMING)
    return None


def _bias(beside: Beside, point: Point, difference: Tensor, scale: float) -> Hint | None:
    """Whether a row-parallel layer's output is off by its bias, which more than one rank has added."""
    whole = dict(beside.reference.model.named_parameters()).get(f"{point.name}.bias")
    if whole is None or point.backward or not point.output or point.name.endswith("norm"):
        return None
    bias = whole.detach()[local_slice(len(whole), beside.trace.layouts[point].features, beside.mesh)]
    for axis in beside.mesh.present(AXES):
        times = beside.mesh.sizes[axis]
        if beside.everywhere(not _is_wrong(difference, (times - 1) * bias.expand_as(difference), scale)):
            likely = f"likely: each of the {times} ranks of {axis} adds it; it is added once, after the sum over {axis}"
            return Hint(f"it is off by {times - 1} times {point.name}.bias at every token", likely=likely)
    return None


def _may_be_one_place(beside: Beside, transfers: Sequence[Transfer]) -> bool:
    """Whether ranks at one place are likely to be wrong alone: of shared sequences some are whole where they are."""
    return not beside.model.parallel.cuts_sequences or any(transfer.kind in ROOTED for transfer in transfers)


def _one_place(beside: Beside, ours: Tensor, want: Tensor, scale: float) -> Hint | None:
    """Whether wrong and right ranks differ by their place along one axis."""
    mesh, wrong = beside.mesh, gathered(_is_wrong(ours, want, scale), beside.mesh.world)
    places = [mesh.at(rank).coordinates for rank in range(mesh.world)]
    for axis in mesh.present(AXES):
        for alone in range(mesh.sizes[axis]):
            at_it = [place[axis] == alone for place in places]
            if wrong in (at_it, [not there for there in at_it]):
                rest = "wrong" if wrong == at_it else "right"
                said = f"of the ranks along {axis} only those at place {alone} are {rest}"
                return Hint(said, (axis,), ROOTED, across=True)
    return None


def _told(hint: Hint, transfers: Sequence[Transfer]) -> list[str]:
    """The hint, and the collectives among `transfers` that it leaves possible: over its very axes, if there are any."""
    possible = [transfer for transfer in transfers if hint.fits(transfer)]
    exact = [transfer for transfer in possible if set(transfer.axes) == set(hint.axes)]
    told = dict.fromkeys(f"{t.kind} of {t.what} over {t.axis} ({t.site}, {t.phase})" for t in exact or possible)
    if hint.likely:
        likely = hint.likely
    elif told:
        likely = f"likely missing: {' or '.join(told)}"
    elif hint.axes:
        likely = f"likely missing: a sum over {'·'.join(hint.axes)}, which the formula has not either"
    else:
        likely = "no collective lies there: the computation itself is wrong"
    return [*([hint.said] if hint.said else []), likely]
