"""Runs on every rank of a pool: a model of which each rank has other parameters is handed out, saved and read."""

import torch
import torch.distributed.checkpoint as dcp

from support.mesh import shared_mesh
from tessera.checkpoint import tensors as checkpoint
from tessera.checkpoint.saver import Writer
from tessera.checkpoint.state import RunState, Source
from tessera.engine.optimizer import build_optimizer
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.decoder import Decoder
from tessera.models.hub import export, read_model_config
from tessera.nn.parameter import to_local

STAGES = (("norm", "head"), ("embedding",))
"""What the ranks of two stages lack; both have the layers, the second one's being others."""


def part(folder, sizes: dict[str, int]) -> Decoder:
    """The part of a model that this rank has, filled by name."""
    mesh = shared_mesh(sizes)
    model = Decoder(read_model_config(folder), Parallel(mesh, residual_layout(True)))
    model.initialize(seed=3)
    for name in STAGES[mesh.coordinates["pp"]]:
        delattr(model, name)
    return model


def exported_in_parts(folder, target, sizes):
    export(part(folder, sizes), target, folder)


def saved_and_read_in_parts(folder, target, sizes) -> bool:
    """Whether every parameter that this rank has comes back, after another rank's weights were in its place."""
    model = part(folder, sizes)
    optimizer = build_optimizer(model, "adamw_torch", (0.9, 0.95), 1e-8, 0.1)
    before = {name: to_local(p).clone() for name, p in model.named_parameters()}
    tensors = checkpoint.model_tensors(model) | checkpoint.optimizer_tensors(model, optimizer)
    writer = Writer(target, RunState(0, 0, 0, 0, Source(str(folder))), None)
    dcp.save(tensors, storage_writer=writer)
    model.initialize(seed=4)
    checkpoint.load(target, model, optimizer)
    return all(torch.equal(to_local(p), before[name]) for name, p in model.named_parameters())
