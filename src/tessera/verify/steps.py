"""The trainer's own optimizer steps on one mesh, and what is compared of them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tessera.config.schema import TrainConfig
from tessera.core.axes import DATA_AXES
from tessera.core.collectives import Recorder
from tessera.data.batch import MicroBatch
from tessera.data.samples import IGNORED
from tessera.engine.fsdp import build_decoder
from tessera.engine.optimizer import EXACT, build_optimizer
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape, length_multiple
from tessera.layout.spec import ParameterSpec
from tessera.models.decoder import Decoder
from tessera.nn.initialize import hash_seed
from tessera.nn.parameter import named_specs, to_local
from tessera.train.settings import fsdp_of, savers_of, step_shape
from tessera.verify.problem import Problem

LEARNING_RATE = 1e-4  # large enough for a wrong update to show, too small for AdamW to make rounding large
CLIPPED_TO = 0.1  # below any norm that occurs, so that clipping takes place


@dataclass
class StepsTaken:
    """What the steps gave on one rank: loss and norm of each, the first one's gradients and the last weights (shards).

    Gradients are those before clipping.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    specs: dict[str, ParameterSpec] = field(default_factory=dict)


def build(problem: Problem, parallel: Parallel, config: TrainConfig) -> Decoder:
    """The model of `problem`, every parameter random: biases and gains too, so that one in the wrong place shows."""
    recompute, savers = config.recompute, savers_of(config)
    model = build_decoder(problem.model, parallel, fsdp_of(config), gradient_checkpointing=recompute, savers=savers)
    model.initialize(problem.seed)
    with torch.no_grad():
        for name, parameter, spec in named_specs(model):
            if not spec.init.std:
                generator = torch.Generator().manual_seed(hash_seed(problem.seed, name))
                noise = torch.randn(spec.shape, generator=generator)[spec.stored_slices(parallel.mesh)]
                to_local(parameter).add_(noise.to(to_local(parameter).device), alpha=0.1)
    return model


def stepper(model: Decoder, problem: Problem, config: TrainConfig) -> Step:
    """The trainer's step of `config` over `model`."""
    betas = (config.adam_beta1, config.adam_beta2)
    # the others round by blocks of a shard, or in bfloat16: no layout has just the numbers of one process
    name = config.optimizer if config.optimizer in EXACT else "adamw_torch"
    optimizer = build_optimizer(model, name, betas, config.adam_epsilon, config.weight_decay)
    return Step(
        model, optimizer, max_grad_norm=CLIPPED_TO, label_smoothing=config.label_smoothing_factor, seed=problem.seed
    )


def batches_of(problem: Problem, parallel: Parallel, step: int) -> list[MicroBatch]:
    """This data rank's share of the micro-batches of a step, padded as its mesh needs it."""
    mesh = parallel.mesh
    rows = problem.batch // mesh.size(DATA_AXES)
    first = mesh.index(DATA_AXES) * rows
    whole = problem.batches(step, length_multiple(rows, parallel.residual, mesh))
    return [_rows_of(batch, slice(first, first + rows)) for batch in whole]


def _rows_of(batch: MicroBatch, rows: slice) -> MicroBatch:
    targets, documents = batch.targets[rows], None if batch.documents is None else batch.documents[rows]
    positions = None if batch.positions is None else batch.positions[rows]
    first = batch.first_document + (rows.start if documents is None else 0)  # else they are numbered within the step
    valid = int((targets != IGNORED).sum())
    return MicroBatch(batch.input_ids[rows], targets, valid, first, positions, documents)


def shape_of(problem: Problem, parallel: Parallel, config: TrainConfig) -> StepShape:
    """What the first step of `problem` runs on this data rank, with the documents of its rows."""
    rows = problem.batch // parallel.mesh.size(DATA_AXES)
    shape = step_shape(config, parallel, rows, problem.length, problem.micro_batches)
    if not problem.packed:
        return shape
    return replace(shape, documents=tuple(batch.document_starts for batch in batches_of(problem, parallel, 0)))


def take(problem: Problem, parallel: Parallel, config: TrainConfig, recorder: Recorder | None = None) -> StepsTaken:
    """All steps of `problem`; `recorder` sees the collectives of the first."""
    model = build(problem, parallel, config)
    step = stepper(model, problem, config)
    taken = StepsTaken(specs={name: spec for name, _, spec in named_specs(model)})
    for index in range(problem.steps):
        batches = batches_of(problem, parallel, index)
        if index == 0 and recorder is not None:
            with recorder:
                result = step(batches, index, LEARNING_RATE)
        else:
            result = step(batches, index, LEARNING_RATE)
        taken.losses.append(result.loss)
        taken.norms.append(result.grad_norm)
        if index == 0:
            clipped = CLIPPED_TO / (result.grad_norm + 1e-6)
            taken.gradients = {n: _gradient(p) for n, p, _ in named_specs(model)}
            if result.finite and clipped < 1:  # undone, so that a norm that is wrong leaves right gradients right
                torch._foreach_div_(list(taken.gradients.values()), clipped)
    taken.weights = {n: to_local(p) for n, p, _ in named_specs(model)}
    return taken


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The local gradient; none is zero."""
    return torch.zeros_like(to_local(parameter)) if parameter.grad is None else to_local(parameter.grad)
