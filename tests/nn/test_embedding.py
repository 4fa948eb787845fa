"""Vocabulary-parallel embedding (even, uneven, tiny vocabularies) and learned positions against torch's embedding."""

import pytest
import torch

from nn.attention_cases import embedding_errors
from nn.shards import label, world
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.nn.embedding import LearnedPositions

CASES = [
    (509, {"col": 2}),
    (509, {"col": 4}),
    (512, {"col": 4}),
    (5, {"col": 2}),  # 3, 2
    (5, {"col": 3}),  # 2, 2, 1
    (7, {"col": 4}),  # 2, 2, 2, 1
    (509, {"row": 2, "col": 2}),
    (509, {"inner": 2, "col": 2}),
    (509, {"depth": 2, "col": 2}),
]


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize(("vocabulary", "sizes"), CASES, ids=label)
def test_embeddings_equal_torch(vocabulary, sizes, sequence_parallel):
    for errors, not_summed, _ in pool(world(sizes)).run(embedding_errors, vocabulary, sizes, sequence_parallel):
        assert max(errors.values()) <= 1e-12, errors
        tokens_are_cut = sequence_parallel or "row" in sizes or "depth" in sizes
        assert (not_summed > 1e-2) == tokens_are_cut


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
def test_leaving_out_any_collective_is_seen(sequence_parallel):
    run, sizes = pool(4).run, {"row": 2, "col": 2}
    *_, kinds = run(embedding_errors, 509, sizes, sequence_parallel)[0]
    assert len(kinds) >= 4
    for index, kind in enumerate(kinds):
        results = run(embedding_errors, 509, sizes, sequence_parallel, index)
        assert max(max(errors.values()) for errors, *_ in results) > 1e-2, f"leaving out {index} ({kind}) went unseen"


def test_padding_beyond_the_table_reads_its_last_position():
    """Only padding lies there: its targets are ignored."""
    positions = LearnedPositions(4, 8, Parallel(Mesh(rank=0), residual_layout(True)))
    torch.nn.init.normal_(positions.weight)
    assert torch.equal(positions(torch.tensor([2, 3, 4, 9])), positions.weight[[2, 3, 3, 3]])
