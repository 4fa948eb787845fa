"""Runs on every rank of a pool: packed samples on a mesh against the same samples, each a row, in one process."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distributed.model_cases import GPT2, LLAMA, build
from nn.shards import mesh_of
from support.compare import worst
from tessera.core.axes import AXES, DATA_AXES
from tessera.core.collectives import all_reduce
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.gradients import first_copy
from tessera.engine.step import Step
from tessera.models.config import ModelConfig
from tessera.nn.parameter import gather_parameter, named_specs

NO = -100
LENGTH = 12
ROWS = [[3, 5, 1], [7, 4], [4, 8], [12], [2, 2, 2, 2], [1, 1, 9], [6, 5], [10, 1]]
"""The lengths of the samples of each row."""
MODELS = {
    "llama": replace(LLAMA, vocab_size=61),
    "llama tied": replace(LLAMA, vocab_size=61, tied=True),
    "gpt2": replace(GPT2, vocab_size=61, attention_dropout=0.0),  # dropout of the residual stream, positions learned
}


def samples() -> list[tuple[Tensor, Tensor]]:
    """Ids and targets of each sample, the last target of none."""
    generator, found = torch.Generator().manual_seed(7), []
    for length in (n for row in ROWS for n in row):
        ids = torch.randint(0, 61, (length,), generator=generator)
        targets = torch.cat([ids[1:], torch.tensor([NO])])
        targets[torch.rand(length, generator=generator) < 0.1] = NO
        found.append((ids, targets))
    return found


def unpacked() -> MicroBatch:
    """A row for each sample."""
    own = samples()
    ids, targets = torch.zeros(len(own), LENGTH, dtype=torch.int64), torch.full((len(own), LENGTH), NO)
    for row, (sample, labels) in enumerate(own):
        ids[row, : len(sample)], targets[row, : len(labels)] = sample, labels
    return MicroBatch(ids, targets, int((targets != NO).sum()))


def packed(rows: range = range(len(ROWS))) -> MicroBatch:
    """These of the rows of ROWS; documents are numbered as among all of them."""
    columns: dict[str, list[Tensor]] = {"ids": [], "targets": [], "positions": [], "documents": []}
    remaining, place = samples(), 0
    for row, lengths in enumerate(ROWS):
        rest = LENGTH - sum(lengths)
        filling = torch.ones(rest, dtype=torch.int64)
        pieces = [*remaining[place : place + len(lengths)], (filling, NO * filling)]
        if row in rows:
            names = [*range(place, place + len(lengths)), -1]
            columns["ids"].append(torch.cat([ids for ids, _ in pieces]))
            columns["targets"].append(torch.cat([targets for _, targets in pieces]))
            columns["positions"].append(torch.cat([torch.arange(len(ids)) for ids, _ in pieces]))
            named = [torch.full((len(ids),), name) for name, (ids, _) in zip(names, pieces, strict=True)]
            columns["documents"].append(torch.cat(named))
        place += len(lengths)
    ids, targets, positions, documents = (torch.stack(column) for column in columns.values())
    return MicroBatch(ids, targets, int((targets != NO).sum()), 0, positions, documents)


def loss_and_gradients(
    config: ModelConfig, mesh: Mesh, batch: MicroBatch, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Loss and gradients of the mean over all samples' targets, whole on every rank."""
    model = build(config, mesh, **options)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    loss = step.gradients([batch], 3, unpacked().valid)
    part = loss if first_copy(mesh, step.streams.loss) else torch.zeros_like(loss)
    found = {"loss": all_reduce(part, mesh.group(AXES))}
    return found | {name: gather_parameter(p.grad, spec, mesh) for name, p, spec in named_specs(model)}


def packing_error(name: str, sizes: dict[str, int], options: dict[str, Any], forget: str = "") -> tuple[float, str]:
    """How far packed rows on a mesh, cut over its data axes, are from single samples in one process.

    `forget` is a vector of the micro-batch that is left out on the mesh.
    """
    mesh = mesh_of(sizes)
    share = len(ROWS) // mesh.size(DATA_AXES)
    first = mesh.index(DATA_AXES) * share
    batch = packed(range(first, first + share))
    if forget:
        batch = replace(batch, **{forget: None})
    found = loss_and_gradients(MODELS[name], mesh, batch, options)
    return worst(found, loss_and_gradients(MODELS[name], mesh_of({}), unpacked(), {}))


def leaks(sizes: dict[str, int], options: dict[str, Any], row: int, document: int) -> list[bool]:
    """Whether other tokens for one document change any bit of each document of its row, of other rows last."""
    mesh = mesh_of(sizes)
    model, batch = build(MODELS["llama"], mesh, **options), packed()
    place = sum(map(len, ROWS[:row])) + document
    other = replace(batch, input_ids=torch.where(batch.documents == place, 60 - batch.input_ids, batch.input_ids))
    streams = []
    for one in (batch, other):
        with torch.no_grad():
            tokens = model.begin(one)
            streams.append(model.norm(model.run_layers(model.embed(tokens), tokens)))
    documents = tokens.residual.documents
    changed = [bool((streams[0] != streams[1])[documents == name].any()) for name in range(sum(map(len, ROWS)))]
    return [*changed, bool((streams[0] != streams[1])[documents == -1].any())]
