"""Runs on every rank of a pool: attention against explicit softmax, embeddings against torch's, in float64."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.shards import drawer, fill, parallel_of, part, tokens_of, whole_gradients
from support.compare import error
from tessera.core.collectives import Recorder
from tessera.engine.gradients import sum_replicated_gradients
from tessera.nn.attention import Attention, AttentionConfig
from tessera.nn.dropout import keep_mask
from tessera.nn.embedding import LearnedPositions, VocabParallelEmbedding
from tessera.nn.rope import RopeConfig, rope_table

B, S, FEATURES, HEAD_DIM = 2, 6, 24, 12
DROPOUT_KEY = 77


def explicit(X, p, heads, kv_heads, causal, rope, dropout, kv_of):
    """Attention of the whole sequences, every step written out; `kv_of(h)` is the kv head that query head h reads."""
    q, k, v = (F.linear(X, p[f"{n}.weight"], p[f"{n}.bias"]).view(B, S, -1, HEAD_DIM) for n in "qkv")
    if rope is not None:
        turn = torch.complex(*rope).unsqueeze(1)
        q, k = (torch.complex(*x.chunk(2, -1)) * turn for x in (q, k))
        q, k = (torch.cat([x.real, x.imag], -1) for x in (q, k))
    outputs = []
    for head in range(heads):
        scores = q[:, :, head] @ k[:, :, kv_of(head)].transpose(1, 2) / math.sqrt(HEAD_DIM)
        if causal:
            scores = scores + torch.full((S, S), -torch.inf, dtype=X.dtype).triu(1)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        if dropout:
            rows = (torch.arange(B) << 32).unsqueeze(1) + torch.arange(S)
            columns = (head << 32) + torch.arange(S)
            keep = keep_mask(rows.flatten(), columns, dropout, DROPOUT_KEY, "here.probabilities")
            weights = weights * keep.view(B, S, S) / (1 - dropout)
        outputs.append(weights @ v[:, :, kv_of(head)])
    joined = torch.stack(outputs, 2).reshape(B * S, heads * HEAD_DIM)
    return F.linear(joined, p["out.weight"], p["out.bias"])


def combinations(col):
    """Query heads that divide by `col`, with every number of kv heads that they divide by."""
    return [(h, kv) for h in (col, 2 * col, 3 * col) if h <= 8 for kv in range(1, h + 1) if h % kv == 0]


def attention_errors(sizes, sequence_parallel, causal, rotary, dropout=0.0, chosen=None, leave_out=None):
    """Errors by (heads, kv heads) of output and gradients; how far off kv heads taken in turns would be."""
    parallel = parallel_of(sizes, sequence_parallel)
    mesh, results, kinds = parallel.mesh, {}, []
    rope = rope_table(torch.arange(S), HEAD_DIM, RopeConfig(), torch.float64) if rotary else None
    tokens = tokens_of(torch.zeros(B, S, dtype=torch.int64), parallel, DROPOUT_KEY)
    for heads, kv_heads in chosen or combinations(mesh.sizes["col"]):
        draw = drawer(heads)
        sides = {"q": (heads, FEATURES), "k": (kv_heads, FEATURES), "v": (kv_heads, FEATURES)}
        values = {f"{n}.weight": draw(h * HEAD_DIM, f) / 4 for n, (h, f) in sides.items()}
        values |= {f"{n}.bias": draw(h * HEAD_DIM) for n, (h, _) in sides.items()}
        values |= {"out.weight": draw(FEATURES, heads * HEAD_DIM) / 4, "out.bias": draw(FEATURES)}
        X, dY = draw(B * S, FEATURES).requires_grad_(), draw(B * S, FEATURES)
        theirs = {n: v.clone().requires_grad_() for n, v in values.items()}
        options = (heads, kv_heads, causal, rope, dropout)
        Y = explicit(X, theirs, *options, lambda h, heads=heads, kv=kv_heads: h // (heads // kv))
        Y.backward(dY)
        in_turns = explicit(X.detach(), values, *options, lambda h, kv=kv_heads: h % kv)

        config = AttentionConfig(
            FEATURES, heads, kv_heads, HEAD_DIM, causal=causal, qkv_bias=True, out_bias=True, dropout=dropout
        )
        layer = Attention(config, parallel, name="here")
        fill(layer, values)
        x = part(X.detach(), layer.input, mesh).requires_grad_()
        with Recorder(leave_out) as recorder:
            y = layer(x, tokens, rope)
            y.backward(part(dY, layer.output, mesh))
            sum_replicated_gradients(layer, mesh)
        kinds = [r.kind for r in recorder.records]
        gradients = whole_gradients(layer)
        whole = torch.stack([t.grad.norm() for t in theirs.values()]).norm().item()  # a key bias has no gradient
        errors = {n: error(gradients[n], theirs[n].grad, whole) for n in theirs}
        errors["output"] = error(y.detach(), part(Y.detach(), layer.output, mesh))
        errors["input gradient"] = error(x.grad, part(X.grad, layer.input, mesh))
        results[heads, kv_heads] = errors, error(in_turns, Y.detach())
    return results, kinds


def embedding_errors(vocabulary, sizes, sequence_parallel, leave_out=None):
    """Token and position embeddings and their gradients; every id of a small vocabulary occurs, and the last one."""
    parallel = parallel_of(sizes, sequence_parallel)
    mesh, draw, batch = parallel.mesh, drawer(5), 4
    ids = torch.randint(0, vocabulary, (batch * S,), generator=torch.Generator().manual_seed(6))
    ids[0], ids[-1] = vocabulary - 1, 0
    model = nn.ModuleDict(
        {
            "token": VocabParallelEmbedding(vocabulary, 8, parallel),
            "position": LearnedPositions(S + 3, 8, parallel),
        }
    )
    values = {"token.weight": draw(vocabulary, 8), "position.weight": draw(S + 3, 8)}
    fill(model, values)
    theirs = {n: v.clone().requires_grad_() for n, v in values.items()}
    tokens = tokens_of(ids.view(batch, S), parallel)
    Y: Tensor = F.embedding(ids, theirs["token.weight"])
    P: Tensor = F.embedding(torch.arange(S).repeat(batch), theirs["position.weight"])
    dY = draw(batch * S, 8)
    (Y + P).backward(dY)

    looked_up = ids.chunk(mesh.size(("depth", "row")))[mesh.index(("depth", "row"))]
    with Recorder(leave_out) as recorder:
        y = model["token"](looked_up)
        p = model["position"](tokens.residual.positions)
        # a whole position table gives whole rows: features are cut where the table is
        (y + p).backward(part(dY, parallel.residual, mesh))
    partial = whole_gradients(model)["position.weight"].clone()
    with recorder:
        sum_replicated_gradients(model, mesh)
    gradients = whole_gradients(model)
    errors = {n: error(gradients[n], theirs[n].grad) for n in theirs}
    errors["tokens"] = error(y.detach(), part(Y.detach(), parallel.residual, mesh))
    errors["positions"] = error(p.detach(), part(P.detach(), parallel.residual, mesh))
    not_summed = error(partial, theirs["position.weight"].grad)
    return errors, not_summed, [r.kind for r in recorder.records]
