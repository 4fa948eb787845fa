"""From a config to all there is to say of its layout: no ranks, data or weights are needed."""

import difflib
from collections.abc import Sequence

import torch

from tessera.config.schema import TrainConfig
from tessera.core import device as devices
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.inspect.held import Held, activations, inspect_model, streams, traffic
from tessera.inspect.sequences import documents_of, shared_sequences
from tessera.inspect.tables import Report
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.models.config import ModelConfig
from tessera.plan.buffers import library_bytes
from tessera.plan.cluster import shipped_for
from tessera.plan.peak import peak_bytes
from tessera.plan.traffic import step_transfers
from tessera.sizes.bounds import RANKS_SHOWN, at_most
from tessera.train.run import model_of
from tessera.train.settings import (
    compute_dtype,
    context_line,
    fitting_layout,
    parallel_for,
    step_shape,
    update_of,
)


def report_on(
    config: TrainConfig, weight: str | None = None, activation: str | None = None, documents: str | None = None
) -> Report:
    """What there is to say of `config`. UserError: sizes that do not fit, no such model, weight or activation.

    `documents`: the tokens of the documents of a row, with commas between; None: it is one.
    """
    at_most("processes", config.world_size, RANKS_SHOWN, "is the number of ranks, each of which is listed")
    model = model_of(config)
    config = fitting_layout(config, model)
    mesh = Mesh(config.mesh_sizes, device="meta", rank=0)
    parallel = parallel_for(config, model, mesh, compute=compute_dtype(config, devices.local_device()))
    inspection, shape = inspect_model(model, parallel), step_shape(config, parallel)
    if documents is not None:
        shape = documents_of(_lengths(documents, config, parallel), shape)
    ranks = f"{mesh} = {mesh.world} ranks" if mesh.world > 1 else str(mesh)
    shown = pictured = streams(model, inspection, shape)
    if activation is not None:
        pictured = [_activation(activations(model, inspection, shape), activation)]
        shown = [*shown, *(held for held in pictured if held not in shown)]
    auto = " (auto, before it has measured)" if config.tensor_parallel_schedule == "auto" else ""
    return Report(
        f"{config.tensor_parallel_mode}: {ranks}, schedule {parallel.schedule}{auto}",
        inspection,
        shape,
        shown,
        traffic(model, inspection, shape),
        _chosen(inspection.parameters, weight),
        pictured,
        peak=peak_bytes(model, shape, parallel, offload=config.fsdp_config.offload_params, update=update_of(config)),
        device_bytes=devices.memory_bytes(devices.local_device()),
        buffers=_buffers(model, shape, parallel),
        context=context_line(config, model),
        sequences=shared_sequences(model, inspection, shape),
    )


def _buffers(model: ModelConfig, shape: StepShape, parallel: Parallel) -> int:
    """What the communication library takes on this machine's devices; 0 for CPUs and GPUs without a shipped profile."""
    device = devices.local_device()
    profile = shipped_for(devices.hardware(device), gpu=True) if device.type == "cuda" else None
    if profile is None:
        return 0
    transfers = step_transfers(model, shape, parallel)
    return int(library_bytes(transfers, parallel.mesh, profile, torch.cuda.device_count()))


def _lengths(documents: str, config: TrainConfig, parallel: Parallel) -> tuple[int, ...]:
    """The tokens of the documents of a row."""
    if not parallel.cuts_sequences:
        reason = "says what ranks have that share sequences, and in this layout none do"
        raise UserError("--documents", documents, reason, "context_parallel_size: 2 or more, or leave it out")
    words = documents.split(",")
    lengths = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(lengths) < len(words) or 0 in lengths or sum(lengths) > config.sequence_len:
        reason = f"are the tokens of each document of a row, at most sequence_len {config.sequence_len} together"
        raise UserError("--documents", documents, reason, "for example 3000,1000,4096")
    return lengths


def _chosen(parameters: Sequence[Held], name: str | None) -> Held:
    """The parameter of this name; unless given the first layer's up projection."""
    by_name = {held.name: held for held in parameters}
    wanted = "layers.0.mlp.up.weight" if name is None else name
    if wanted not in by_name:
        near = sorted(by_name, key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())[:3]
        raise UserError("--weight", wanted, "is no parameter of this model", f"nearest: {', '.join(near)}")
    return by_name[wanted]


def _activation(by_name: dict[str, Held], wanted: str) -> Held:
    """The activation of this name."""
    if wanted not in by_name:
        reason = "is no activation of a layer of this model"
        raise UserError("--activation", wanted, reason, f"there are: {', '.join(by_name)}")
    return by_name[wanted]
