"""What `inspect` says of a layout against what the ranks of that layout hold and receive."""

import pytest
import torch

from distributed.model_cases import MODELS
from support.inspect_cases import (
    BATCH,
    LENGTH,
    activations_of,
    activations_on_rank,
    config_of,
    held_and_received,
    held_blocks,
)
from support.pool import pool
from tessera.core.mesh import Mesh
from tessera.inspect.held import (
    Inspection,
    activations,
    cut_in_words,
    inspect_model,
    placements_in_words,
    streams,
    traffic,
)
from tessera.inspect.picture import grid_of
from tessera.inspect.tables import share_in_words
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape, padded_length
from tessera.models.decoder import Decoder
from tessera.nn.initialize import initialize
from tessera.nn.parameter import named_specs
from tessera.train.settings import parallel_for

LAYOUTS = {
    "1d": ("llama", {"tensor_parallel_size": 4}),
    "1d, residual whole": ("gpt2 tied", {"tensor_parallel_size": 4, "sequence_parallel": False}),
    "2d, q/k norm": ("llama q/k norm", {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}),
    "2d": ("gpt2", {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4}),
    "2d summa": (
        "llama",
        {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "tensor_parallel_schedule": "summa"},
    ),
    "2d cannon": (
        "gpt2",
        {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "tensor_parallel_schedule": "cannon"},
    ),
    "2.5d": ("llama", {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 8}),
    "2.5d, weights cut over depth": (
        "llama kv4",
        {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 8, "tensor_parallel_depth_weights": "shard"},
    ),
    "3d": ("gpt2", {"tensor_parallel_mode": "3d", "tensor_parallel_size": 8}),
}
SHARES = {
    "1d": 4,
    "1d, residual whole": 4,
    "2d": 4,
    "2d, q/k norm": 4,
    "2d summa": 4,
    "2d cannon": 4,
    "2.5d": 4,
    "3d": 8,
}
SHARES["2.5d, weights cut over depth"] = 8
SHAPE = StepShape(BATCH, LENGTH, micro_batches=2)


def inspected(name: str, settings: dict[str, object]) -> Inspection:
    config = config_of(settings)
    return inspect_model(
        MODELS[name], parallel_for(config, MODELS[name], Mesh(config.mesh_sizes, device="meta", rank=0))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_and_receives_what_is_said(layout):
    name, settings = LAYOUTS[layout]
    inspection = inspected(name, settings)
    ranks = pool(inspection.mesh.world).run(held_and_received, name, settings)
    for rank, (held, received) in enumerate(ranks):
        assert [p.name for p in inspection.parameters] == list(held)
        assert [p.shapes[rank] for p in inspection.parameters] == [shape for shape, *_ in held.values()]
        said_bytes = [p.bytes(inspection.parallel.dtype)[rank] for p in inspection.parameters]
        assert said_bytes == [size for _, size, *_ in held.values()]
        for matrices in (True, False, None):
            names = [p.name for p in inspection.parameters if matrices is None or p.is_matrix == matrices]
            totals = inspection.totals(matrices)
            said = (totals.parameter_bytes, totals.gradient_bytes, totals.optimizer_bytes)
            assert [size[rank] for size in said] == [sum(held[n][i] for n in names) for i in (1, 2, 3)]
            assert totals.bytes[rank] == sum(sum(held[n][1:]) for n in names)
        moves = traffic(MODELS[name], inspection, SHAPE)
        assert sum(move.transfer.times * move.received[rank] for move in moves) == received > 0
    # of this vocabulary, ranks hold different numbers of rows: one rank's numbers would not do for all
    assert [p.name for p in inspection.uneven()][0] == "embedding.weight"
    assert len(set(inspection.totals().by_rank)) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_and_embeddings_are_an_exact_share(layout):
    name, settings = LAYOUTS[layout]
    inspection = inspected(name, settings)
    assert inspection.share == SHARES[layout] and inspection.share_is_exact()
    matrices, rest = inspection.totals(matrices=True), inspection.totals(matrices=False)
    world = inspection.mesh.world
    assert sum(matrices.by_rank) * inspection.share == matrices.whole * world
    assert sum(rest.by_rank) * inspection.share > rest.whole * world  # what is repeated is not among them
    even = [p for p in inspection.parameters if p.is_matrix and "509" not in str(p.spec.shape)]
    assert even and all(set(p.elements) == {p.whole // inspection.share} for p in even)


def test_a_matrix_that_an_axis_does_not_cut_is_noticed():
    name, settings = LAYOUTS["2.5d"]
    inspection = inspected(name, settings)
    wrong = Parallel(
        inspection.parallel.mesh, inspection.parallel.residual, weights_over=("depth", "row")
    )  # the specs say row alone
    assert not Inspection(wrong, inspection.ranks, inspection.parameters).share_is_exact()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_hold_the_values_that_ranks_hold(layout):
    """Each rank's part of a weight (by value) and of the two streams is the block that the picture gives it."""
    name, settings = LAYOUTS[layout]
    inspection, weight = inspected(name, settings), "layers.1.mlp.up.weight"
    ranks = pool(inspection.mesh.world).run(held_blocks, name, settings, weight)
    alone = Decoder(MODELS[name], Parallel(Mesh(rank=0), inspection.parallel.residual))
    initialize(alone, alone.parallel.mesh, seed=5)
    chosen = next(p for p in inspection.parameters if p.name == weight)
    said = [chosen, *streams(MODELS[name], inspection, SHAPE)]
    whole = [next(p.detach() for n, p, _ in named_specs(alone) if n == weight)]
    whole += [torch.arange(torch.Size(s.spec.shape).numel()).view(s.spec.shape) for s in said[1:]]
    assert len(said) == 3
    for place, held in enumerate(said):
        grid = grid_of(held.name, held.spec.shape, held.spec.cuts, inspection.ranks)
        seen = set()
        for i, row in enumerate(grid.rows):
            for j, column in enumerate(grid.columns):
                for rank in grid.ranks[i][j]:
                    assert torch.equal(ranks[rank][place], whole[place][row, column])
                    seen.add(rank)
        assert seen == set(range(inspection.mesh.world))


BY_HEADS = {
    "tensor_parallel_mode": "3d",
    "tensor_parallel_mesh": {"inner": 2, "row": 1, "col": 2},
    "micro_batch_size": 1,
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "3d, attention by heads"])
def test_activations_are_those_of_the_running_layer(layout):
    """What each rank's layer computes is the block of one process's activation that the picture gives the rank."""
    name, settings = LAYOUTS.get(layout, ("llama", BY_HEADS))
    inspection, batch = inspected(name, settings), config_of(settings).micro_batch_size
    ranks = pool(inspection.mesh.world).run(activations_on_rank, name, settings)
    alone = Parallel(Mesh(rank=0), inspection.parallel.residual, torch.float64, torch.float64)
    whole = activations_of(Decoder(MODELS[name], alone), batch)
    said = activations(MODELS[name], inspection, StepShape(batch, LENGTH))
    assert set(said) == set(whole) and ("gate" in said) == MODELS[name].gated
    for activation, held in said.items():
        assert whole[activation].shape == held.spec.shape
        assert [rank[activation].shape for rank in ranks] == list(held.shapes)
        grid = grid_of(activation, held.spec.shape, held.spec.cuts, inspection.ranks)
        for row, blocks in zip(grid.rows, grid.ranks, strict=True):
            for column, holders in zip(grid.columns, blocks, strict=True):
                assert len(holders) == held.copies
                for rank in holders:
                    torch.testing.assert_close(
                        ranks[rank][activation], whole[activation][row, column], atol=1e-12, rtol=0
                    )


WITH_DATA_AXES = {
    "1d": ({"tensor_parallel_size": 2, "dp_shard_size": 2}, "1/4", "(shard · col)"),
    "1d, replicas": ({"tensor_parallel_size": 2, "dp_replicate_size": 2}, "1/2", "(col)"),
    "2d": ({"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "dp_shard_size": 2}, "1/8", "(shard · row · col)"),
    "2d summa": (
        {
            "tensor_parallel_mode": "2d",
            "tensor_parallel_size": 4,
            "dp_shard_size": 2,
            "tensor_parallel_schedule": "summa",
        },
        "1/8",
        "(shard · row · col)",
    ),
    "2.5d": ({"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 8}, "1/4", "(row · col)"),
    "one process": ({}, "1/1", "(one process)"),
}


@pytest.mark.parametrize("layout", WITH_DATA_AXES)
def test_the_share_names_every_axis_that_cuts(layout):
    settings, share, axes = WITH_DATA_AXES[layout]
    inspection = inspected("llama", settings)
    assert share_in_words(inspection).startswith(f"a rank holds {share} of the matrices and embeddings {axes}, ")
    up = next(p for p in inspection.parameters if p.name == "layers.0.mlp.up.weight")
    assert {f"1/{up.whole // n}" for n in up.elements} == {share}


def test_words_and_placements():
    inspection = inspected(*LAYOUTS["3d"])
    by_name = {p.name: p for p in inspection.parameters}
    said = {
        "embedding.weight": ("[V: col][h: inner, row]", "S(1) S(1) S(0)", 1),
        "positions.weight": ("[S][h: inner]", "S(1) R R", 4),
        "layers.0.attention.out.weight": ("[out: inner, row][in: col]", "S(0) S(0) S(1)", 1),
        "layers.0.mlp.up.bias": ("[out: col]", "R R S(0)", 4),
        "norm.weight": ("[h: inner]", "S(0) R R", 4),
    }
    for name, (cut, placements, copies) in said.items():
        held = by_name[name]
        assert cut_in_words(held.dims, held.spec.cuts, inspection.mesh) == cut
        assert " ".join(placements_in_words(held.spec, inspection.mesh)) == placements
        assert held.copies == copies


def test_ranks_of_cannon_receive_different_bytes():
    name, settings = LAYOUTS["2d cannon"]
    moves = traffic(MODELS[name], inspected(name, settings), SHAPE)
    skewed = [m for m in moves if m.transfer.kind == "shift"]
    assert skewed and all(len(set(m.received)) == 2 and len(set(m.calls)) == 2 for m in skewed)


def test_sequences_are_padded_to_what_divides():
    parallel = inspected("llama", LAYOUTS["1d"][1]).parallel
    lengths = [padded_length(n, batch, parallel.residual, parallel.mesh) for n, batch in ((8, 1), (9, 1), (9, 4))]
    assert lengths == [8, 12, 9]


def test_five_hundred_ranks_need_no_rank():
    settings = {"tensor_parallel_mode": "2d", "tensor_parallel_mesh": {"row": 64, "col": 8}, "micro_batch_size": 64}
    inspection = inspected("llama kv4", settings)
    assert len(inspection.ranks) == 512 and inspection.share == 512 and inspection.share_is_exact()
    assert not torch.distributed.is_initialized()
