"""Where shards lie, and values that depend on names, seeds and global indices only."""

import itertools

import pytest
import torch

from distributed.model_cases import GPT2, build
from nn.shards import chunk, parallel_of, world
from tessera.core.mesh import Mesh
from tessera.layout.spec import Init, ParameterSpec, local_slice
from tessera.nn.initialize import _normal, hash_seed, initialize
from tessera.nn.parameter import ParallelModule

MESHES = [{}, {"col": 2}, {"col": 4}, {"row": 2, "col": 3}, {"inner": 2, "row": 2, "col": 2}, {"depth": 2, "col": 2}]


def ranks(sizes):
    return [Mesh(sizes, rank=rank) for rank in range(world(sizes))]


@pytest.mark.parametrize("axes", [("col",), ("inner", "row"), ("inner", "row", "col")])
def test_slices_are_those_of_nested_chunks(axes):
    for sizes in itertools.product((1, 2, 3, 4), repeat=len(axes)):
        for n, mesh in itertools.product((1, 2, 5, 7, 12, 509), ranks(dict(zip(axes, sizes, strict=True)))):
            whole = torch.arange(n)
            assert torch.equal(whole[local_slice(n, axes, mesh)], chunk(whole, 0, axes, mesh)), (n, sizes, mesh.rank)


def test_uneven_slices_by_hand():
    def lengths(n, size):
        slices = [local_slice(n, ("col",), mesh) for mesh in ranks({"col": size})]
        return [s.stop - s.start for s in slices]

    assert lengths(509, 4) == [128, 128, 128, 125]
    assert lengths(7, 4) == [2, 2, 2, 1]
    assert lengths(5, 4) == [2, 2, 1, 0]


def spec_of(shape, cuts):
    return ParameterSpec(shape, cuts, parallel_of({}).residual, Init(std=0.5))


@pytest.mark.parametrize(
    "spec",
    [
        spec_of((509, 24), (("col",), ("inner", "row"))),
        spec_of((48, 64), (("inner", "row"), ("col",))),
        spec_of((130, 12), (("col",), ())),
        spec_of((64, 8), (("col",), ())),
        spec_of((65, 8), ((), ("inner",))),
        spec_of((300,), (("col",),)),
        spec_of((5, 8), (("col",), ())),
    ],
    ids=lambda s: str(s.shape),
)
def test_initial_values_do_not_depend_on_the_mesh(spec):
    """Bit for bit, on every rank of every mesh; no processes needed."""
    whole = _normal("a.weight", spec.shape, tuple(slice(0, n) for n in spec.shape), 0.5, 3)
    assert whole.shape == spec.shape
    for mesh in itertools.chain.from_iterable(map(ranks, MESHES)):
        slices = spec.local_slices(mesh)
        assert torch.equal(_normal("a.weight", spec.shape, slices, 0.5, 3), whole[slices]), (str(mesh), mesh.rank)


def test_initial_values_are_normal_and_differ_by_name_and_seed():
    shape = (400, 500)
    everything = tuple(slice(0, n) for n in shape)
    values = _normal("a.weight", shape, everything, 0.02, 3)
    assert abs(values.std() / 0.02 - 1) < 0.01 and abs(values.mean()) < 5 * 0.02 / 200_000**0.5
    assert abs((values.abs() < 0.02).float().mean() - 0.6827) < 0.005
    standard = values / 0.02
    for other in (_normal("b.weight", shape, everything, 0.02, 3), _normal("a.weight", shape, everything, 0.02, 4)):
        assert abs((standard * other / 0.02).mean()) < 5 / 200_000**0.5
    assert abs((standard[:-64] * standard[64:]).mean()) < 5 / 168_000**0.5, "blocks of rows repeat"
    assert abs((standard[:-1] * standard[1:]).mean()) < 5 / 199_500**0.5


def test_constants_and_names():
    one, other = build(GPT2, Mesh(rank=0)), build(GPT2, Mesh(rank=0))
    for name, parameter in one.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std() > 0
    weights = dict(one.named_parameters())
    assert not torch.equal(weights["layers.0.attention.q.weight"], weights["layers.1.attention.q.weight"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    initialize(other, Mesh(rank=0), seed=6)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_seeds_depend_on_every_part():
    seeds = {hash_seed(*parts) for parts in [("a", 1, 2), ("a", 2, 1), ("a", 1), ("b", 1, 2), ("a", 1, 3), (1, "a", 2)]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_summed_axes_are_those_that_cut_the_activation_and_not_the_parameter():
    residual = parallel_of({}).residual
    assert ParameterSpec((8,), (("inner",),), residual, Init()).summed_axes == ("depth", "row", "col")
    assert ParameterSpec((8,), ((),), residual, Init()).summed_axes == ("depth", "row", "col", "inner")
    assert ParameterSpec((8, 8), (("row", "col"), ("inner",)), residual, Init()).summed_axes == ("depth",)


def test_one_process_has_plain_parameters_in_their_dtype():
    module = ParallelModule(parallel_of({}, dtype=torch.bfloat16))
    module.declare("weight", spec_of((6, 4), (("col",), ("inner",))))
    assert type(module.weight) is torch.nn.Parameter and module.weight.dtype == torch.bfloat16
    assert module.local("weight").data_ptr() == module.weight.data_ptr(), "no copy"
    assert "weight [6, 4] → [6, 4]" in repr(module)
