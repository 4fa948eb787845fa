"""Runs on every rank of a pool: models with windows and documents against a decoder written out in plain torch."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.model_cases import GPT2, LLAMA, build, full
from nn.shards import mesh_of
from support.compare import worst
from tessera.core.axes import AXES
from tessera.core.collectives import all_reduce
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.gradients import first_copy, sum_replicated_gradients
from tessera.layout.streams import HIDDEN
from tessera.models.config import LayerKind, ModelConfig
from tessera.nn.rope import rope_frequencies

WINDOW, LENGTH = 3, 12
WINDOWED = replace(LLAMA, num_layers=4, vocab_size=61, layer_kinds=(LayerKind(), LayerKind(WINDOW)))


def plain_logits(config: ModelConfig, weights: dict[str, Tensor], ids: Tensor, windows: list[int | None]) -> Tensor:
    """A Llama of these weights, each row one document, layer i with a window of `windows[i]` tokens."""
    length, heads = ids.shape[1], config.num_heads
    ages = torch.arange(length).unsqueeze(1) - torch.arange(length)  # of a key, as a query sees it
    angles = torch.outer(torch.arange(length).float(), rope_frequencies(config.head_dim, config.rope))
    turn = torch.complex(angles.cos().double(), angles.sin().double())

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], config.norm_eps)

    def product(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def rotated(x: Tensor) -> Tensor:
        y = torch.complex(*x.chunk(2, -1)) * turn.unsqueeze(1)
        return torch.cat([y.real, y.imag], -1)

    x = weights["embedding.weight"][ids]
    for layer, window in enumerate(windows):
        here = f"layers.{layer}"
        y = norm(x, f"{here}.attention_norm")
        q, k, v = (product(y, f"{here}.attention.{n}").view(*ids.shape, -1, config.head_dim) for n in "qkv")
        q, k = rotated(q), rotated(k)
        q, k, v = (each.repeat_interleave(heads // each.shape[2], 2).transpose(1, 2) for each in (q, k, v))
        seen = (ages >= 0) & (ages < (window or length))
        scores = (q @ k.mT / config.head_dim**0.5).masked_fill(~seen, -torch.inf)
        x = x + product((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{here}.attention.out")
        y = norm(x, f"{here}.mlp_norm")
        x = x + product(F.silu(product(y, f"{here}.mlp.gate")) * product(y, f"{here}.mlp.up"), f"{here}.mlp.down")
    return product(norm(x, "norm"), "head")


def windows_errors(sizes: dict[str, int], windows: list[int | None], options: dict[str, Any]) -> dict[str, float]:
    """How far the model WINDOWED on a mesh is from the plain one with these windows: logits, and the worst gradient."""
    model = build(WINDOWED, mesh_of(sizes), **options)
    ids = torch.randint(0, WINDOWED.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    weights = {name: full(p).requires_grad_() for name, p in model.named_parameters()}
    logits = plain_logits(WINDOWED, weights, ids, windows)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    model(MicroBatch(ids, targets, ids.numel()), float(ids.numel())).backward()
    sum_replicated_gradients(model, model.parallel.mesh)
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    ours, logits = model.logits(ids), logits.detach()
    error, _ = worst(gradients, {name: weight.grad for name, weight in weights.items()})
    return {"logits": ((ours - logits).norm() / logits.norm()).item(), "gradients": error}


# ---------------------------------------------------------------------------------------------- documents

LENGTHS = [3, 5, 1, 7, 4, 4]
PACKINGS = {
    "two rows of twelve": [[0, 1, 5], [3, 2, 4]],
    "four rows of eight": [[2, 4], [1], [0, 5], [3]],
}


def packed(rows: list[list[int]], vocabulary: int) -> MicroBatch:
    """The documents of LENGTHS in rows, each row filled up by a document of padding; the same tokens in any rows."""
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(0, vocabulary, (n,), generator=generator) for n in LENGTHS]
    width = max(sum(LENGTHS[d] for d in row) for row in rows)
    columns: dict[str, list[Tensor]] = {"ids": [], "targets": [], "positions": [], "documents": []}
    for at, row in enumerate(rows):
        rest = width - sum(LENGTHS[d] for d in row)
        filling = torch.full((rest,), 1 + at)
        pieces = [*(texts[d] for d in row), filling]
        labels = [torch.cat([texts[d][1:], torch.tensor([-100])]) for d in row]
        names = [*row, len(LENGTHS) + at]
        columns["ids"].append(torch.cat(pieces))
        columns["targets"].append(torch.cat([*labels, torch.full((rest,), -100)]))
        columns["positions"].append(torch.cat([torch.arange(len(piece)) for piece in pieces]))
        columns["documents"].append(torch.cat([torch.full((len(p),), d) for d, p in zip(names, pieces, strict=True)]))
    ids, targets, positions, documents = (torch.stack(column) for column in columns.values())
    return MicroBatch(ids, targets, sum(LENGTHS) - len(LENGTHS), 9, positions, documents)


PACKED_MODELS = {
    "llama": replace(LLAMA, vocab_size=61, layer_kinds=(LayerKind(2), LayerKind())),
    "gpt2": replace(GPT2, vocab_size=61),  # dropout everywhere, positions learned
}


def loss_and_gradients(name: str, mesh: Mesh, batch: MicroBatch, options: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of one micro-batch, whole on every rank."""
    model = build(PACKED_MODELS[name], mesh, **options)
    loss = model(batch, float(batch.valid), dropout_key=3)
    loss.backward()
    sum_replicated_gradients(model, mesh)
    part = loss.detach() if first_copy(mesh, HIDDEN.tokens) else torch.zeros_like(loss)
    found = {"loss": all_reduce(part, mesh.group(AXES))}
    return found | {n: full(p.grad) for n, p in model.named_parameters()}


def packing_errors(
    name: str, sizes: dict[str, int], packing: str, options: dict[str, Any], forget: str | None = None
) -> tuple[float, str]:
    """How far documents packed on a mesh are from the same, four rows of eight, in one process.

    `forget` is a vector of the micro-batch that is left out on the mesh.
    """
    vocabulary = PACKED_MODELS[name].vocab_size
    alone = packed(PACKINGS["four rows of eight"], vocabulary)
    batch = packed(PACKINGS[packing], vocabulary)
    if forget is not None:
        batch = replace(batch, **{forget: None})
    found = loss_and_gradients(name, mesh_of(sizes), batch, options)
    return worst(found, loss_and_gradients(name, mesh_of({}), alone, {}))
