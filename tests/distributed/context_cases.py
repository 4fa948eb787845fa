"""Runs on every rank of a pool: what other tokens in a document change, and labels that few ranks have."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distributed.model_cases import build
from distributed.packing_cases import MODELS, NO, ROWS, loss_and_gradients, packed
from nn.shards import mesh_of
from support.compare import worst
from tessera.core.axes import DATA_AXES
from tessera.data.batch import MicroBatch
from tessera.engine.step import Step
from tessera.nn.tokens import Tokens

Seen = tuple[Tensor, Tensor]


def leaks_across(sizes: dict[str, int], options: dict[str, Any], row: int, document: int) -> tuple[set[int], set[int]]:
    """The documents on this rank whose outputs, and whose gradients at the embedding, other tokens in one change."""
    mesh = mesh_of(sizes)
    model, batch = build(MODELS["llama"], mesh, **options), packed()
    place = sum(map(len, ROWS[:row])) + document
    other = replace(batch, input_ids=torch.where(batch.documents == place, 60 - batch.input_ids, batch.input_ids))
    seen: list[list[Tensor]] = []
    first, last = model.layers["0"], model.norm
    hooks = [
        first.register_forward_pre_hook(lambda _, args: args[0].register_hook(seen[-1].append) and None),
        last.register_forward_hook(lambda _, __, out: seen[-1].append(out.detach())),
    ]
    for one in (batch, other):
        seen.append([])
        model(model.cut(one), 1.0).backward()
    for hook in hooks:
        hook.remove()
    documents = Tokens.of(model.cut(batch), model.parallel.streams, mesh).residual.documents
    changed = [(a != b).any(-1) for a, b in zip(*seen, strict=True)]  # outputs, gradients
    outputs, gradients = (set(documents[differs].tolist()) for differs in changed)
    return outputs, gradients


def valid_tokens(sizes: dict[str, int], options: dict[str, Any]) -> tuple[int, int]:
    """The targets that count, as ranks count them together, and as they are."""
    mesh, batch = mesh_of(sizes), packed()
    model = build(MODELS["llama"], mesh, **options)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    own = _rows_of(batch, mesh.index(DATA_AXES), mesh.size(DATA_AXES))
    return step.valid_tokens([model.cut(own)]), batch.valid


def _rows_of(batch: MicroBatch, place: int, ranks: int) -> MicroBatch:
    share = len(batch.input_ids) // ranks
    return packed(range(place * share, (place + 1) * share))


def empty_ranks(sizes: dict[str, int], options: dict[str, Any]) -> tuple[float, str, int]:
    """How far the gradients are from one process where one document alone has labels, and this rank's labels."""
    mesh, batch = mesh_of(sizes), packed()
    targets = torch.where(batch.documents == 3, batch.targets, NO)
    labelled = replace(batch, targets=targets, valid=int((targets != NO).sum()))
    found = loss_and_gradients(MODELS["llama"], mesh, labelled, options)
    error, name = worst(found, loss_and_gradients(MODELS["llama"], mesh_of({}), labelled, {}))
    model = build(MODELS["llama"], mesh, **options)
    return error, name, int((model._looked_up(model.cut(labelled).targets) != NO).sum())
