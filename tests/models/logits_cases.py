"""Runs on every rank of a pool: logits and whole parameters of a model on a mesh, against one process."""

import torch

from distributed.model_cases import MODELS, build, full
from support.mesh import shared_mesh
from tessera.core.mesh import Mesh
from tessera.nn.parameter import gather_whole, named_specs, to_local
from tessera.sizes.schedule import Schedule


def differences(name, sizes, schedule):
    """The largest difference of the logits, and whether every parameter comes together as DTensor says."""
    config = MODELS[name]
    ids = torch.arange(4 * 12).reshape(4, 12) * 7 % config.vocab_size
    mesh = shared_mesh(sizes)
    model = build(config, mesh, schedule=Schedule(schedule))
    want = build(config, Mesh(rank=0)).logits(ids)
    same = all(torch.equal(gather_whole(to_local(p), s.shape, s.cuts, mesh), full(p)) for _, p, s in named_specs(model))
    return (model.logits(ids) - want).abs().max().item() / want.abs().max().item(), same
