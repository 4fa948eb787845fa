"""Runs on every rank of a pool: the fused loss against torch's cross entropy on full logits, in float64."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.shards import drawer, fill, parallel_of, part, whole_gradients
from support.compare import error
from tessera.core.collectives import Recorder, all_reduce
from tessera.engine.gradients import sum_replicated_gradients
from tessera.layout.streams import HIDDEN, column_parallel
from tessera.nn.embedding import VocabParallelEmbedding
from tessera.nn.linear import ColumnParallelLinear
from tessera.nn.loss import LossSpec, linear_cross_entropy

T, K = 24, 16
IGNORED = -100
UPSTREAM = 1.7  # the loss is not always the end of the graph


@dataclass(frozen=True)
class Case:
    """`ignored`: the tokens without a label; `words`: the targets are ids below it; `scale`: of the hidden states."""

    vocabulary: int = 509
    smoothing: float = 0.0
    bias: bool = False
    ignored: slice | None = None
    words: int | None = None
    last_word_only: bool = False
    chunk_tokens: int = 1024
    denominator: float = float(T)
    scale: float = 1.0


CASES = {
    "plain": Case(),
    "smoothed": Case(smoothing=0.1),
    "bias": Case(bias=True),
    "smoothed, bias, labels ignored": Case(smoothing=0.1, bias=True, ignored=slice(0, T, 3), denominator=16.0),
    "no valid label": Case(ignored=slice(None), bias=True, denominator=1.0),
    "no valid label, smoothed": Case(smoothing=0.1, ignored=slice(None), bias=True),
    "first half of the tokens ignored": Case(smoothing=0.1, ignored=slice(0, T // 2), denominator=12.0),
    "labels on the first rank only": Case(words=3, smoothing=0.1),
    "labels on the last rank only": Case(last_word_only=True, smoothing=0.1),
    "chunks": Case(chunk_tokens=4, bias=True, smoothing=0.1),
    "chunks, the last one shorter": Case(chunk_tokens=5, bias=True, smoothing=0.1, ignored=slice(1, T, 4)),
    "a chunk without a valid label": Case(chunk_tokens=4, bias=True, smoothing=0.1, ignored=slice(4, 8)),
    "vocabulary 7": Case(vocabulary=7, bias=True, smoothing=0.1),
    "large logits": Case(scale=3e3, bias=True, smoothing=0.1, ignored=slice(2, 5)),
    "another denominator": Case(denominator=3.5, bias=True),
}


def targets_of(case: Case) -> Tensor:
    targets = torch.randint(0, case.words or case.vocabulary, (T,), generator=torch.Generator().manual_seed(4))
    if case.last_word_only:
        targets.fill_(case.vocabulary - 1)
    if case.ignored is not None:
        targets[case.ignored] = IGNORED
    return targets


def full_loss(x: Tensor, w: Tensor, b: Tensor | None, targets: Tensor, case: Case) -> Tensor:
    logits = F.linear(x, w, b)
    total = F.cross_entropy(logits, targets, label_smoothing=case.smoothing, ignore_index=IGNORED, reduction="sum")
    return total / case.denominator


def loss_errors(sizes: dict[str, int], sequence_parallel: bool, names: list[str] | None = None, leave_out=None) -> Any:
    """Errors of the loss and its gradients by case, the loss itself, and the collectives of the last case."""
    parallel = parallel_of(sizes, sequence_parallel)
    mesh, results, kinds = parallel.mesh, {}, []
    for name in names or CASES:
        case, draw = CASES[name], drawer(7)
        V, targets = case.vocabulary, targets_of(CASES[name])
        values = {"weight": draw(V, K)} | ({"bias": draw(V)} if case.bias else {})
        X = (case.scale * draw(T, K)).requires_grad_()
        theirs = {n: v.clone().requires_grad_() for n, v in values.items()}
        want = full_loss(X, theirs["weight"], theirs.get("bias"), targets, case)
        (UPSTREAM * want).backward()

        head = ColumnParallelLinear(K, V, parallel, bias=case.bias)
        fill(head, values)
        x = part(X.detach(), head.input, mesh).requires_grad_()
        own = targets.chunk(mesh.size(("depth", "row")))[mesh.index(("depth", "row"))]
        with Recorder(leave_out) as recorder:
            loss = vocabulary_loss(head, x, own, case)
            (UPSTREAM * loss).backward()
            sum_replicated_gradients(head, mesh)
        kinds = [r.kind for r in recorder.records]
        total = all_reduce(loss.detach().clone(), mesh.group(HIDDEN.tokens))
        gradients = whole_gradients(head)
        errors = {n: error(gradients[n], theirs[n].grad) for n in theirs}
        errors["input gradient"] = error(x.grad, part(X.grad, head.input, mesh))
        errors["loss"] = error(total, want.detach())
        results[name] = errors, total.item()
    return results, kinds


def vocabulary_loss(head: ColumnParallelLinear, x: Tensor, targets: Tensor, case: Case) -> Tensor:
    mesh = head.parallel.mesh
    constants = LossSpec(
        head.plan.roles(mesh),
        head.specs["weight"].local_slices(mesh)[0],
        case.vocabulary,
        case.denominator,
        case.smoothing,
        case.chunk_tokens,
    )
    bias = head.local("bias") if case.bias else None
    return linear_cross_entropy(x, head.local("weight"), bias, targets, constants)


def tied_errors(vocabulary: int, sizes: dict[str, int], sequence_parallel: bool) -> dict[str, float]:
    """Embedding and head with one weight, whose gradient is the sum of both; how far off it is without the head's."""
    parallel = parallel_of(sizes, sequence_parallel)
    mesh, draw, case = parallel.mesh, drawer(8), Case(vocabulary, smoothing=0.1, ignored=slice(0, T, 5))
    ids = torch.randint(0, vocabulary, (T,), generator=torch.Generator().manual_seed(9))
    weight = draw(vocabulary, K)
    theirs = weight.clone().requires_grad_()
    want = full_loss(F.embedding(ids, theirs), theirs, None, targets_of(case), case)
    want.backward()
    looked_up = weight.clone().requires_grad_()
    full_loss(F.embedding(ids, looked_up), weight, None, targets_of(case), case).backward()

    embedding = VocabParallelEmbedding(vocabulary, K, parallel)
    fill(embedding, {"weight": weight})
    own, own_targets = (t.chunk(mesh.size(("row",)))[mesh.index(("row",))] for t in (ids, targets_of(case)))
    roles = column_parallel(parallel.residual).roles(mesh)
    constants = LossSpec(roles, embedding.vocabulary, vocabulary, case.denominator, case.smoothing)
    loss = linear_cross_entropy(embedding(own), embedding.local("weight"), None, own_targets, constants)
    loss.backward()
    sum_replicated_gradients(embedding, mesh)
    total = all_reduce(loss.detach().clone(), mesh.group(HIDDEN.tokens))
    (gradient,) = whole_gradients(embedding).values()
    return {
        "loss": error(total, want.detach()),
        "weight": error(gradient, theirs.grad),
        "head left out": error(looked_up.grad, theirs.grad),
    }


def collectives_of(sizes, sequence_parallel, tokens, chunk_tokens, smoothing, training) -> list[tuple[str, int]]:
    """Kind and bytes of every collective of one loss over `tokens` tokens, 4 features and 8 words in float64."""
    parallel = parallel_of(sizes, sequence_parallel)
    head = ColumnParallelLinear(4, 8, parallel)
    nn.init.ones_(head.local("weight").detach())
    case = Case(8, smoothing, chunk_tokens=chunk_tokens)
    x = part(torch.ones(tokens, 4, dtype=torch.float64), head.input, parallel.mesh).requires_grad_()
    with Recorder() as recorder, torch.set_grad_enabled(training):
        vocabulary_loss(head, x, torch.zeros(tokens, dtype=torch.int64), case)
    return [(r.kind, r.bytes) for r in recorder.records]


def bf16_errors(sizes: dict[str, int]) -> dict[str, float]:
    """bf16 states and weights: logits are rounded once, what follows is float32."""
    parallel = parallel_of(sizes, True, torch.bfloat16)
    mesh, draw, case = parallel.mesh, drawer(10), Case(bias=True, smoothing=0.1, ignored=slice(0, T, 5))
    X, W, b = (t.bfloat16() for t in (draw(T, K), draw(case.vocabulary, K), draw(case.vocabulary)))
    targets = targets_of(case)
    logits = F.linear(X, W, b)  # bf16, as each rank rounds its own
    options = {"label_smoothing": case.smoothing, "ignore_index": IGNORED, "reduction": "sum"}
    rounded = F.cross_entropy(logits.double(), targets, **options) / case.denominator
    exact = [t.double().requires_grad_() for t in (X, W, b)]
    full_loss(*exact, targets, case).backward()

    head = ColumnParallelLinear(K, case.vocabulary, parallel, bias=True)
    fill(head, {"weight": W, "bias": b})
    x = part(X, head.input, mesh).requires_grad_()
    loss = vocabulary_loss(head, x, targets, case)
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = whole_gradients(head)
    return {
        "loss": error(loss.detach().double(), rounded),
        "loss in bf16": error((F.cross_entropy(logits, targets, **options) / case.denominator).double(), rounded),
        "input gradient": error(x.grad.double(), part(exact[0].grad, head.input, mesh)),
        "weight": error(gradients["weight"].double(), exact[1].grad),
        "bias": error(gradients["bias"].double(), exact[2].grad),
    }
