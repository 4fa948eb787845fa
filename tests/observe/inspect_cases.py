"""Runs on every rank of a pool: what it really holds and receives, for a config as the trainer would lay it out."""

from typing import Any

import torch
from torch.distributed.tensor import distribute_tensor

from distributed.model_cases import MODELS, batches
from support.mesh import shared_mesh
from tessera.collectives import Recorder
from tessera.config.load import make_config
from tessera.layout import HIDDEN
from tessera.mesh import MODEL_AXES
from tessera.models.decoder import Decoder
from tessera.nn.moves import cut
from tessera.nn.parameter import Init, ParameterSpec, initialize, named_specs, to_local
from tessera.train.optimizer import build_optimizer
from tessera.train.preflight import parallel_for
from tessera.train.step import Step

BATCH, LENGTH = 8, 12
BASE = {
    "base_model": "unread",
    "datasets": [{"path": "unread"}],
    "micro_batch_size": BATCH,
    "sequence_len": LENGTH,
    "gradient_accumulation_steps": 2,
}


def config_of(settings: dict[str, Any]) -> Any:
    return make_config(BASE | settings)[0]


def model_on_rank(name: str, settings: dict[str, Any]) -> Decoder:
    config = config_of(settings)
    mesh = shared_mesh({axis: size for axis, size in config.axes.items() if size > 1})
    return Decoder(MODELS[name], parallel_for(config, mesh))


def held_and_received(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """After one step: the shape and the bytes of the data, gradient and optimizer state of each parameter; the bytes
    received in it."""
    model = model_on_rank(name, settings)
    initialize(model, model.parallel.mesh, seed=5)
    optimizer = build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0)
    step = Step(model, optimizer, max_grad_norm=1.0)
    with Recorder() as recorder:
        step(batches(model.config, 2, size=BATCH, length=LENGTH), 0, 1e-3)
    held = {}
    for full_name, parameter, _ in named_specs(model):
        gradient = torch.zeros_like(to_local(parameter)) if parameter.grad is None else to_local(parameter.grad)
        state = sum(to_local(value).nbytes for value in optimizer.state[parameter].values())
        local = to_local(parameter)
        held[full_name] = (tuple(local.shape), local.nbytes, gradient.nbytes, state)
    return held, sum(record.received for record in recorder.records)


def held_blocks(name: str, settings: dict[str, Any], weight: str) -> list[Any]:
    """The values of `weight`, and its parts of a residual and a hidden stream whose elements are numbered."""
    model = model_on_rank(name, settings)
    initialize(model, model.parallel.mesh, seed=5)
    values = to_local({full: p for full, p, _ in named_specs(model)}[weight])
    up = model.layers[0].mlp.up
    streams = [
        cut(torch.arange(BATCH * LENGTH * features).view(-1, features), layout, model.parallel.mesh)
        for layout, features in ((up.input, up.in_features), (up.output, up.out_features))
    ]
    return [values, *streams]


def first_held(sizes: dict[str, int], shape: tuple[int, ...], cuts: tuple[tuple[str, ...], ...]) -> int:
    """The flat index of the first element that this rank holds of a tensor, as DTensor cuts it by its placements."""
    mesh = shared_mesh(sizes)
    assert mesh.device_mesh is not None
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    placements = ParameterSpec(shape, cuts, HIDDEN, Init()).placements(mesh.present(MODEL_AXES))
    return int(distribute_tensor(whole, mesh.device_mesh, placements).to_local()[0, 0])
