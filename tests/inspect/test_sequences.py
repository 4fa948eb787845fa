"""Who has which tokens of shared sequences, computes which tiles and receives what, against cuts and masks."""

from dataclasses import replace

import pytest
import torch

from distributed.model_cases import MODELS
from support.inspect_cases import config_of
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.inspect.held import activations, inspect_model, traffic
from tessera.inspect.picture import draw
from tessera.inspect.sequences import documents_of, shared_sequences
from tessera.inspect.tables import chunks_in_words, sequences_table, sequences_title
from tessera.nn.context.cut import cut
from tessera.plan.traffic import step_transfers
from tessera.train.settings import fitting_layout, parallel_for, step_shape

MODEL = MODELS["llama"]


def shared(size, mode, **keys):
    return {"context_parallel_size": size, "context_parallel_mode": mode, **keys}


GRID = {"tensor_parallel_mode": "2d", "tensor_parallel_mesh": {"row": 2, "col": 2}}
LAYOUTS = {
    "ring 4": (shared(4, "ring", micro_batch_size=1), (7, 4)),
    "exchange 2 × ulysses 2, two data ranks": (shared(4, "exchange", ulysses_size=2, dp_shard_size=2), (5, 1, 6)),
    "exchange 2 × 2d, streams of two rows": (shared(2, "exchange", **GRID, micro_batch_size=4), (8,)),
    "ring 2 × 2d, one row": (shared(2, "ring", **GRID, micro_batch_size=1), ()),
    "one row over row": (GRID | {"micro_batch_size": 1}, (3, 2, 6)),
}


def inspected(settings, lengths):
    config = fitting_layout(config_of(settings), MODEL)
    parallel = parallel_for(config, MODEL, Mesh(config.mesh_sizes, device="meta", rank=0))
    shape = step_shape(config, parallel)
    shape = documents_of(lengths, shape) if lengths else shape
    inspection = inspect_model(MODEL, parallel)
    return inspection, shape, shared_sequences(MODEL, inspection, shape)


def batch_of(shape):
    """Its ids say which token each is; documents as the shape has them."""
    ids = torch.arange(shape.tokens).view(shape.batch, shape.sequence)
    documents = torch.zeros(shape.tokens, dtype=torch.int64)
    documents[list(shape.document_starts[0])] = 1
    return MicroBatch(ids, ids, shape.tokens, 0, ids, documents.cumsum(0).view_as(ids))


def visible(bounds):
    """Which key each query sees of a stream, [T, T]."""
    documents = torch.zeros(bounds[-1], dtype=torch.int64)
    documents[list(bounds[1:-1])] = 1
    documents = documents.cumsum(0)
    return (documents[:, None] == documents).tril()


def tokens_of(chunks):
    return [token for first, end in chunks for token in range(first, end)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_have_and_compute_what_is_said(layout):
    inspection, shape, sequences = inspected(*LAYOUTS[layout])
    parallel, stream = inspection.parallel, sequences.stream
    seen, told = visible(stream.bounds), {}
    assert stream.bounds[-1] == sequences.rows * shape.sequence
    assert sorted(token for share in sequences.shares for token in tokens_of(share.holds)) == list(range(len(seen)))
    for share in sequences.shares:
        own = tokens_of(share.computes)
        assert share.pairs == MODEL.num_layers * int(seen[own].sum())
        read = seen[own].any(0)
        read[own] = False
        passing = int(read.sum())
        assert share.tokens >= passing if parallel.context.transport == "ring" else share.tokens == passing
        told |= dict.fromkeys(share.ranks, share)
    assert sum(share.pairs for share in sequences.shares) % int(seen.sum()) == 0
    data = [mesh for mesh in inspection.ranks if mesh.index(("replicate", "shard")) == 0]
    for mesh in data:
        here = replace(parallel, mesh=mesh)
        rows = cut(batch_of(shape), here, MODEL.windows).input_ids
        part = mesh.index(parallel.attention.tokens)
        if mesh.rank in told:
            assert sorted(rows[part].tolist()) == sorted(tokens_of(told[mesh.rank].holds))
        else:
            assert rows[part].min() >= stream.bounds[-1]
        of_attention = [t for t in step_transfers(MODEL, shape, here) if t.site == "attention"]
        received = sum(t.times * t.received for t in of_attention)
        if mesh.rank in told and len(told[mesh.rank].ranks) == 1:
            assert received == told[mesh.rank].bytes * MODEL.num_layers * shape.micro_batches
    assert len(told) * (1 if parallel.context.joined else sequences.streams) == len(data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_square_has_each_tile_in_its_rank(layout):
    _, _, sequences = inspected(*LAYOUTS[layout])
    grid, seen = sequences.grid, visible(sequences.stream.bounds)
    for row, blocks in zip(grid.rows, grid.ranks, strict=True):
        for column, ranks in zip(grid.columns, blocks, strict=True):
            by = set()
            for share in sequences.shares:
                own = [token for token in tokens_of(share.computes) if row.start <= token < row.stop]
                if seen[own, column].any():
                    by |= set(share.ranks)
            assert set(ranks) == by


def test_a_long_stream_is_drawn_in_few_blocks_and_counted_whole(tmp_path):
    settings = shared(16, "exchange", ulysses_size=1, sequence_len=1 << 15, micro_batch_size=1)
    inspection, shape, sequences = inspected(settings, (1000, 3096) * 8)
    assert len(sequences.grid.rows) <= 128 and sequences.grid.rows[-1].stop == 1 << 15
    work = [share.pairs / sequences.mean for share in sequences.shares]
    assert max(work) < 1.1
    owners = {ranks for blocks in sequences.grid.ranks for ranks in blocks}
    assert {rank for ranks in owners for rank in ranks} == set(range(16))
    draw("exchange 16", inspection.mesh, [sequences.grid], tmp_path / "a.svg")
    drawing = (tmp_path / "a.svg").read_text()
    assert all(f'id="panel1-rank{rank}"' in drawing for rank in range(16)) and "clip-path" in drawing
    assert "who has which tokens of a stream (32,768 tokens, 16 documents, 1 row)" in sequences_title(sequences)
    assert sequences_table(sequences).row_count == 16


def test_activations_of_shared_sequences_are_cut_along_their_axes_too():
    inspection, shape, _ = inspected(*LAYOUTS["exchange 2 × 2d, streams of two rows"])
    held = activations(MODEL, inspection, shape)["residual"]
    assert set(held.shapes) == {(shape.tokens // 8, MODEL.hidden_size)} and held.copies == 1


def test_a_rank_that_receives_nothing_of_a_collective_is_listed_all_the_same():
    inspection, shape, _ = inspected(LAYOUTS["ring 4"][0], (4, 2, 6))
    moves = traffic(MODEL, inspection, shape)
    for rank, mesh in enumerate(inspection.ranks):
        own = step_transfers(MODEL, shape, replace(inspection.parallel, mesh=mesh))
        received = sum(t.times * t.received for t in own)
        assert sum(move.transfer.times * move.received[rank] for move in moves) == received
    assert any(0 in move.calls for move in moves)


def test_whole_sequences_have_no_shares():
    _, _, sequences = inspected({"tensor_parallel_size": 2}, ())
    assert sequences is None


def test_chunks_in_words():
    assert chunks_in_words([(0, 4), (7, 8)]) == "0–3, 7"
    assert chunks_in_words([(2 * i, 2 * i + 1) for i in range(9)]) == "0, 2, 4, 6 … (9 chunks)"
