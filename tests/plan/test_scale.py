"""Geometries side by side at scale: the figures of the one rule, counted and by formula."""

from dataclasses import replace

import pytest

from tessera.cli.count import default_model
from tessera.layout.shape import StepShape
from tessera.models.anatomy import anatomy_of
from tessera.models.config import ModelConfig
from tessera.plan.count import counted_step
from tessera.plan.scale import (
    best_mesh,
    contenders,
    every_mesh,
    held_bytes,
    misfit,
    padded,
    parallel_of,
    published_loop_elements,
    received_elements,
    sharing_rows,
)
from tessera.plan.traffic import received_bytes, step_transfers
from tessera.sizes.rules import TensorParallel

# as many kv heads as heads, an MLP of 4h in two matrices, and T = 4h: the layer of the published comparisons
h = 1024
LAYER = ModelConfig(
    family="plain",
    vocab_size=64,
    hidden_size=h,
    num_layers=1,
    num_heads=64,
    num_kv_heads=64,
    head_dim=h // 64,
    ffn_size=4 * h,
    max_positions=64,
    activation="gelu",
    gated=False,
)
T4H = StepShape(batch=64, sequence=4 * h // 64)

# elements a layer in units of h²: the closed forms of the one rule, evaluated by hand
KEPT = {  # (inner, depth, row, col)
    (2, 1, 8, 4): 5.625,
    (1, 1, 8, 8): 6.125,
    (4, 1, 4, 4): 7.125,
    (1, 1, 64, 1): 23.625,
    (1, 1, 1, 64): 31.5,
}
AGAIN = {(1, 1, 8, 8): 8.3125}
PUBLISHED = 13.125


def mesh(axes, **options):
    mode = "3d" if axes[0] > 1 else "2d"
    return TensorParallel(mode, mesh=dict(zip(("inner", "depth", "row", "col"), axes, strict=True)), **options)


def layer_elements(tensor):
    """Of the four products alone, by formula."""
    transfers = step_transfers(LAYER, T4H, parallel_of(tensor, T4H.batch, LAYER))
    sites = {product.site for product, _ in anatomy_of(LAYER).products}
    return received_bytes(each for each in transfers if each.site in sites) / 4 / h**2


def counted_layer_elements(tensor):
    """All that one layer more adds to a step, counted."""
    parallel = parallel_of(tensor, T4H.batch, LAYER)
    one, two = (counted_step(replace(LAYER, num_layers=n), T4H, parallel).received for n in (1, 2))
    return (two - one) / 4 / h**2


@pytest.mark.parametrize(("axes", "figure"), KEPT.items(), ids=str)
def test_elements_of_a_layer_with_copies_kept(axes, figure):
    tensor = mesh(axes, keep_gathered=True)
    assert layer_elements(tensor) == figure
    # and what else a layer moves: statistics of the norms, gradients of their gains
    assert figure <= counted_layer_elements(tensor) < figure + 0.03


@pytest.mark.parametrize(("axes", "figure"), AGAIN.items(), ids=str)
def test_elements_of_a_layer_gathered_again(axes, figure):
    assert layer_elements(mesh(axes)) == figure
    # our loop broadcasts what a gather would gather again
    assert layer_elements(mesh(axes, schedule="summa")) == figure


def published_layer_elements():
    one, two = (published_loop_elements(replace(LAYER, num_layers=n), T4H, 64) for n in (1, 2))
    return (two - one) / h**2


def test_2d_moves_less_than_half_of_the_published_loop():
    rest = 0.02  # statistics of the norms
    assert PUBLISHED <= published_layer_elements() < PUBLISHED + rest
    two_dimensional = mesh((1, 1, 8, 8), keep_gathered=True)
    assert received_elements(LAYER, T4H, two_dimensional) < received_elements(LAYER, T4H, mesh((1, 1, 8, 8)))
    assert counted_layer_elements(two_dimensional) <= 0.5 * published_layer_elements()


def test_heads_bound_ulysses_and_nothing_else_that_shares_rows():
    found = sharing_rows(default_model(1), StepShape(1, 4096), 128)
    assert [each.name for each in found if each.tensor is None] == ["Ulysses"]
    assert "64 query heads" in found[0].reason and all(each.elements for each in found[1:])


def test_the_best_mesh_is_no_cube_and_moves_less():
    best = best_mesh(LAYER, T4H, 64, keep=True)
    assert tuple(best.axes.values()) == (2, 1, 8, 4)
    assert counted_layer_elements(best) < counted_layer_elements(mesh((4, 1, 4, 4), keep_gathered=True)) - 1


def test_the_best_mesh_is_the_best_of_all_that_fit():
    model, shape = default_model(2), StepShape(batch=16, sequence=128)
    assert len(list(every_mesh(64))) == 28 + 28 - 7  # ordered triples with inner and with depth; both have those of 2d
    for limit in (80e9, 5e9):
        best = best_mesh(model, shape, 64, memory=limit)
        assert best is not None
        for tensor in every_mesh(64):
            if misfit(model, shape, tensor) is None and sum(held_bytes(model, shape, tensor)) <= limit:
                assert received_elements(model, shape, best) <= received_elements(model, shape, tensor), (
                    tensor.written_mesh
                )
    assert best_mesh(model, shape, 64, memory=1e6) is None
    assert best_mesh(replace(model, num_heads=7, num_kv_heads=7, hidden_size=896, ffn_size=7), shape, 9) is None


def test_contenders_say_why_a_layout_does_not_fit():
    found = {each.name: each for each in contenders(default_model(1), StepShape(64, 64), 512)}
    assert "num_attention_heads" in found["1D"].reason and "64" in found["1D"].reason
    assert "micro_batch_size" in found["FSDP"].reason or "depth × row" in found["FSDP"].reason
    assert "square" in found["SUMMA loop"].reason
    assert found["3D"].mesh == "8·1·8·8" and not found["3D"].reason
    assert "SUMMA, published" not in found
    assert found["best mesh"].elements <= min(e.elements for e in found.values() if e.elements)


def test_sequences_are_padded_until_both_streams_divide():
    model = default_model(1)
    for axes, multiple in (((1, 1, 1, 8), 2), ((2, 1, 2, 2), 1), ((1, 1, 4, 4), 4)):
        assert padded(StepShape(4, 7), parallel_of(mesh(axes), 4, model)).sequence == -(-7 // multiple) * multiple
        assert received_elements(model, StepShape(4, 12), mesh(axes)) > received_elements(
            model, StepShape(4, 8), mesh(axes)
        )
