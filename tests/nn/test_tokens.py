"""Tokens as vectors: what names a token does not depend on how documents lie in rows, nor rows on ranks."""

import itertools

import pytest
import torch

from nn.shards import chunk, label, parallel_of, part, world
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.attention import Attention, AttentionConfig
from tessera.nn.documents import Documents
from tessera.nn.rope import RopeConfig, rope_table, rotate
from tessera.nn.tokens import Tokens

LENGTHS = [3, 5, 1, 7, 4, 4]
KEY, P, FIRST = 5, 0.3, 11


def packed(rows, first=FIRST):
    """Documents of LENGTHS in rows, `rows` the documents of each; the rest of a row is a document of padding."""
    width = max(sum(LENGTHS[d] for d in row) for row in rows)
    positions, documents = [], []
    for at, row in enumerate(rows):
        lengths = [LENGTHS[d] for d in row]
        names = [*row, len(LENGTHS) + at]
        lengths.append(width - sum(lengths))
        positions.append(torch.cat([torch.arange(n) for n in lengths]))
        documents.append(torch.cat([torch.full((n,), d) for d, n in zip(names, lengths, strict=True)]))
    positions, documents = torch.stack(positions), torch.stack(documents)
    return MicroBatch(torch.zeros_like(positions), torch.zeros_like(positions), 0, first, positions, documents)


TWO_ROWS, FOUR_ROWS = packed([[0, 1, 5], [3, 2, 4]]), packed([[2, 4], [1], [0, 5], [3]])


def tokens_on(batch, sizes=None, rank=0, sequence_parallel=True):
    mesh = Mesh(sizes or {}, rank=rank)
    parallel = Parallel(mesh, residual_layout(sequence_parallel))
    return Tokens.of(batch, parallel.streams, mesh, KEY), parallel


def test_a_tokens_row_is_the_place_of_its_document_and_its_position():
    for batch in (TWO_ROWS, FOUR_ROWS):
        rows = tokens_on(batch)[0].residual.rows
        every = {((FIRST + d) << 32) + s for d, n in enumerate(LENGTHS) for s in range(n)}
        assert every <= set(rows.tolist()) and len(set(rows.tolist())) == len(rows)
    assert not torch.equal(TWO_ROWS.documents, TWO_ROWS.positions), "another vector gives another mask"


@pytest.mark.parametrize("sizes", [{}, {"col": 2}, {"row": 2, "col": 2}, {"depth": 2, "inner": 2}], ids=label)
@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
def test_vectors_are_the_ranks_part_of_those_of_one_process(sizes, sequence_parallel):
    plain = MicroBatch(FOUR_ROWS.input_ids, FOUR_ROWS.targets, 0, FIRST)
    for batch, rank in itertools.product((FOUR_ROWS, plain), range(world(sizes))):
        whole, (tokens, parallel) = tokens_on(batch)[0], tokens_on(batch, sizes, rank, sequence_parallel)
        for name in ("positions", "documents", "places", "rows"):
            every = getattr(whole.residual, name)
            assert torch.equal(getattr(tokens.residual, name), part(every, parallel.residual, parallel.mesh))
            own = chunk(every, 0, parallel.attention.tokens, parallel.mesh)
            assert torch.equal(getattr(tokens.attention, name), own)
        if batch.documents is not None:
            own = chunk(batch.documents, 0, parallel.attention.tokens, parallel.mesh)
            assert torch.equal(tokens.documents.ids, own) and tokens.documents.bounds == Documents.of(own).bounds


def test_without_vectors_every_row_is_a_document():
    batch = MicroBatch(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64), 0, FIRST)
    tokens = tokens_on(batch)[0]
    assert tokens.residual.positions.tolist() == [0, 1, 2, 3] * 3
    assert tokens.residual.places.tolist() == [FIRST + b for b in range(3) for _ in range(4)]
    assert tokens.documents is None and tokens.positions.tolist() == [0, 1, 2, 3]


def found(batch, values):
    """By document, its tokens' values [B, S, …] in order."""
    return {d: values[batch.documents == d] for d in range(len(LENGTHS))}


def test_rotary_angles_are_those_of_positions_in_documents():
    torch.manual_seed(0)
    x = torch.randn(sum(LENGTHS) + 50, 2, 8, dtype=torch.float64)
    turned = []
    for batch in (TWO_ROWS, FOUR_ROWS):
        place = batch.documents * 8 + batch.positions  # the same token has the same heads
        table = rope_table(tokens_on(batch)[0].positions, 8, RopeConfig(), torch.float64)
        turned.append(found(batch, rotate(x[place.clamp(max=len(x) - 1)], table)))
    assert all(torch.equal(one, turned[1][d]) for d, one in turned[0].items())
    in_rows = rope_table(torch.arange(TWO_ROWS.input_ids.shape[1]), 8, RopeConfig(), torch.float64)
    by_row = found(TWO_ROWS, rotate(x[TWO_ROWS.documents * 8 + TWO_ROWS.positions], in_rows))
    assert torch.equal(by_row[0], turned[0][0]) and not torch.equal(by_row[1], turned[0][1])


def test_dropped_probabilities_do_not_depend_on_packing():
    attention = Attention(AttentionConfig(8, 2, 2, 4, dropout=P), parallel_of({}), name="layers.0.attention")
    masks = []
    for batch in (TWO_ROWS, FOUR_ROWS):
        keep = attention._keep(tokens_on(batch)[0], KEY)
        places = [(batch.documents == d).nonzero() for d in range(len(LENGTHS))]
        masks.append([keep[at[0, 0]][:, at[:, 1]][:, :, at[:, 1]] for at in places])
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))
    assert not torch.equal(masks[0][4], masks[0][5]), "documents of one length have masks of their own"
