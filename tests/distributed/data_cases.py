"""Runs on every rank of a pool: what FSDP2 holds, saved and read again, and gradients of tokens that occur often."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from distributed.model_cases import LLAMA, batch_of, build, share
from support.mesh import shared_mesh
from tessera.checkpoint.tensors import model_tensors
from tessera.engine.optimizer import build_optimizer
from tessera.engine.step import Step
from tessera.models.decoder import Decoder
from tessera.nn.parameter import gather_parameter, named_specs

FSDP = {"fsdp": ("shard", "row"), "weights_over": ()}


def uneven_model(vocabulary: int, sizes: dict[str, int]) -> Decoder:
    data = {} if "shard" not in sizes else FSDP
    return build(replace(LLAMA, vocab_size=vocabulary), shared_mesh(sizes), dtype=torch.float32, **data)


def saved_by_ranks(vocabulary: int, sizes: dict[str, int], folder: Path) -> None:
    """Every parameter, as it starts, written by all ranks."""
    dcp.save(model_tensors(uneven_model(vocabulary, sizes)), storage_writer=dcp.FileSystemWriter(folder))


def read_by_ranks(vocabulary: int, sizes: dict[str, int], folder: Path) -> float:
    """The largest difference from how the model starts, of what the ranks read into one that was zero."""
    model, fresh = (uneven_model(vocabulary, sizes) for _ in range(2))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    dcp.load(model_tensors(model), storage_reader=dcp.FileSystemReader(folder))
    both = zip(named_specs(model), named_specs(fresh), strict=True)
    mesh = model.parallel.mesh
    return max(
        (gather_parameter(a, spec, mesh) - gather_parameter(b, spec, mesh)).abs().max().item()
        for (_, a, spec), (_, b, _) in both
    )


def embedding_gradient(compute: torch.dtype) -> torch.Tensor:
    """The whole gradient of the embedding where four tokens occur a thousand times each, FSDP2 over two ranks."""
    mesh = shared_mesh({"shard": 2})
    model = build(LLAMA, mesh, dtype=torch.float32, compute=compute, **FSDP)
    ids = torch.arange(16 * 256).view(16, 256) % 4
    step = Step(model, build_optimizer(model, "adamw_torch_fused", (0.9, 0.95), 1e-8, 0.0))
    step.gradients([share(batch_of(ids, ids.roll(-1, 1)), mesh)], 0)
    spec = model.embedding.specs["weight"]
    return gather_parameter(model.embedding.weight.grad, spec, mesh)
