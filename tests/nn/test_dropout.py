"""Dropout masks: independent of the mesh and of padding, and as random as a test can tell."""

import dataclasses
import itertools

import pytest
import torch

from distributed.model_cases import GPT2, batches, build
from nn.dropout_cases import FEATURES, B, P, masks, masks_agree
from nn.shards import label, parallel_of, part, tokens_of, world
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.dropout import dropout, dropout_key, keep_mask

LAYOUTS = [{"col": 2}, {"col": 4}, {"row": 2, "col": 2}, {"inner": 2, "col": 2}, {"depth": 2, "col": 2}]


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=label)
def test_masks_do_not_depend_on_the_mesh(sizes, sequence_parallel):
    for stream, probabilities in pool(world(sizes)).run(masks_agree, sizes, sequence_parallel, 6):
        assert stream, "the residual stream's mask"
        assert probabilities, "the attention probabilities' mask"


def test_masks_differ_from_rank_to_rank():
    """What a mask seeded by the rank's own indices would give is something else."""
    stream, probabilities = masks(parallel_of({}), 6)
    first, second = stream.chunk(2)
    assert not torch.equal(first, second)
    for one, other in itertools.combinations(probabilities.unbind(1), 2):
        assert not torch.equal(one, other)


def test_masks_do_not_depend_on_padding():
    stream, probabilities = masks(parallel_of({}), 6)
    padded_stream, padded_probabilities = masks(parallel_of({}), 8)
    assert torch.equal(padded_stream.view(B, 8, FEATURES)[:, :6], stream.view(B, 6, FEATURES))
    assert torch.equal(padded_probabilities[:, :, :6, :6], probabilities)
    flat = padded_stream[: B * 6]  # what counting tokens through the batch would compare
    assert not torch.equal(flat, stream)


@pytest.mark.parametrize("sizes", [{}, {"col": 4}, {"row": 2, "col": 2}, {"depth": 2, "row": 2}], ids=label)
@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
def test_rows_name_the_same_token_on_every_mesh(sizes, sequence_parallel):
    """Without processes: every rank of every mesh, and the tokens of both streams."""
    residual = residual_layout(sequence_parallel)
    for sequence, rank in itertools.product((6, 8), range(world(sizes))):
        mesh = Mesh(sizes, rank=rank)
        ids = torch.zeros(4, sequence, dtype=torch.int64)
        tokens = tokens_of(ids, Parallel(mesh, residual))
        whole = torch.tensor([(b << 32) + s for b in range(4) for s in range(sequence)])
        assert torch.equal(tokens.residual.rows, part(whole, residual, mesh))
        assert tokens.residual.positions.max() < sequence


# ------------------------------------------------------------------------------------------------- randomness

ROWS, COLUMNS = torch.arange(1000), torch.arange(1000)
SIGMAS = 5


def correlation(a, b):
    """Between two masks, in standard deviations of what independent ones would give."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return ((a * b).mean() / (a.std() * b.std())).abs().item() * a.numel() ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    keep = keep_mask(ROWS, COLUMNS, p, 1, "layer").double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) <= SIGMAS * deviation / 1000
    for dim in (0, 1):  # each row's and each column's rate, the worst of a thousand
        assert (keep.mean(dim) - (1 - p)).abs().max() <= SIGMAS * deviation / 1000**0.5


def test_scale_and_edges():
    x = torch.full((1000, 1000), 3.0)
    y = dropout(x, ROWS, COLUMNS, 0.25, 1, "layer")
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert abs(y.mean() - 3.0) < 0.02
    assert keep_mask(ROWS, COLUMNS, 0.0, 1, "layer").all()


def test_rows_columns_layers_and_keys_are_independent():
    keep = keep_mask(ROWS, COLUMNS, 0.5, 1, "layers.0.mlp")
    pairs = {
        "next row": (keep[1:], keep[:-1]),
        "next column": (keep[:, 1:], keep[:, :-1]),
        "diagonal": (keep[1:, 1:], keep[:-1, :-1]),
        "transposed": (keep, keep.T),
        "row 64 on": (keep[64:], keep[:-64]),
        "next layer": (keep, keep_mask(ROWS, COLUMNS, 0.5, 1, "layers.1.mlp")),
        "other place in the layer": (keep, keep_mask(ROWS, COLUMNS, 0.5, 1, "layers.0.attention")),
        "next key": (keep, keep_mask(ROWS, COLUMNS, 0.5, 2, "layers.0.mlp")),
        "next sequence": (keep, keep_mask(ROWS + (1 << 32), COLUMNS, 0.5, 1, "layers.0.mlp")),
        "next head": (keep, keep_mask(ROWS, COLUMNS + (1 << 32), 0.5, 1, "layers.0.mlp")),
    }
    for name, (a, b) in pairs.items():
        assert correlation(a, b) <= SIGMAS, name
    assert correlation(keep, keep_mask(ROWS, COLUMNS, 0.45, 1, "layers.0.mlp")) > 100, "the measure sees a dependence"


def test_parity_of_four_corners_is_random():
    """A hash that only joined a row's and a column's bits by xor would have every rectangle's parity even."""
    keep = keep_mask(ROWS, COLUMNS, 0.5, 1, "layer")
    parity = keep[:-1, :-1] ^ keep[1:, :-1] ^ keep[:-1, 1:] ^ keep[1:, 1:]
    assert abs(parity.double().mean() - 0.5) <= SIGMAS * 0.5 / 999


def test_keys_differ_by_seed_and_step():
    keys = [dropout_key(*parts) for parts in itertools.product((1, 2, 12), (0, 1, 11))]
    assert len(set(keys)) == len(keys)
    assert dropout_key(1, 2) == dropout_key(1, 2)


def test_sequences_of_another_micro_batch_have_other_masks():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    a, b = (tokens_of(ids, parallel_of({}), 1, first).residual.rows for first in (0, 1))
    assert torch.equal(a[4:], b[:4]), "row 1 of the one is row 0 of the other"
    assert not torch.isin(a[:4], b).any()


# ------------------------------------------------------------------------------------------------- recompute


def loss_and_gradients(key, **options):
    config = dataclasses.replace(GPT2, embedding_dropout=P, attention_dropout=P, residual_dropout=P)
    model = build(config, Mesh(rank=0), **options)
    (batch,) = batches(config, 1)
    loss = model(batch, float(batch.valid), dropout_key=key)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def test_recompute_drops_the_same_elements():
    loss, gradients = loss_and_gradients(3)
    again, recomputed = loss_and_gradients(3, gradient_checkpointing=True)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[n], recomputed[n]) for n in gradients)
    for other in (4, None):
        different, _ = loss_and_gradients(other)
        assert abs(different / loss - 1) > 1e-4, "another key, or none, gives another loss"
