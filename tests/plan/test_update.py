"""What optimizers hold, by formula, against the traced step and against the optimizers themselves; what they cost."""

from dataclasses import replace

import pytest
import torch

from distributed.model_cases import LLAMA
from tessera.core.mesh import Mesh
from tessera.engine.optimizer import NAMES, build_optimizer, missing_package
from tessera.layout.resolve import parallel_of
from tessera.layout.shape import StepShape
from tessera.models.decoder import Decoder
from tessera.nn.parameter import to_local
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.peak import peak_bytes
from tessera.plan.recommend import judge
from tessera.plan.trace import traced_memory
from tessera.plan.update import ADAMW, Update
from tessera.sizes.rules import TensorParallel

MODEL = replace(
    LLAMA, vocab_size=1024, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=2048
)
MOMENTUM = Update("sgd", {"momentum": 0.9})
TRACED = [
    (Update("adamw_torch"), ADAMW),
    (Update("sgd"), ADAMW),
    (MOMENTUM, Update("sgd")),
    (Update("muon"), Update("sgd")),
]
"""Each beside another one, whose peak would not do."""
FEW = StepShape(1, 64)
"""So few tokens that most is alive in the update."""


def laid_out(sizes, rank, tensor):
    mesh = Mesh(sizes, rank=rank)
    return parallel_of(tensor, mesh, 1, MODEL.dimensions, None, torch.float32, torch.bfloat16)


ALONE, COL = ({}, 0, TensorParallel()), ({"col": 2}, 1, TensorParallel(size=2))
"""Of ranks that share muon's work the last one holds most."""


@pytest.mark.parametrize(("update", "other"), TRACED, ids=str)
@pytest.mark.parametrize("layout", [pytest.param(ALONE, marks=pytest.mark.slow), COL], ids=["alone", "col2"])
def test_the_peak_of_an_optimizer_is_within_three_percent_of_the_trace(update, other, layout):
    parallel = laid_out(*layout)
    peak, traced = peak_bytes(MODEL, FEW, parallel, update=update), traced_memory(MODEL, FEW, parallel, update=update)
    assert peak.total == pytest.approx(traced.peak.total, rel=0.03)
    assert abs(peak_bytes(MODEL, FEW, parallel, update=other).total - peak.total) > 0.06 * peak.total


LIGHT = ("adamw_torch_fused", "sgd", "muon", "adamw_torch_4bit")


@pytest.mark.parametrize("name", [n if n in LIGHT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_moments_by_formula_are_those_that_the_optimizer_holds(name):
    if missing_package(name):
        pytest.skip(f"{missing_package(name)} is not installed")
    options = {"momentum": 0.9} if name == "sgd" else {}
    parallel, model = laid_out(*ALONE), replace(MODEL, num_layers=1)
    decoder = Decoder(model, replace(parallel, compute=torch.float32))
    for parameter in decoder.parameters():
        to_local(parameter).normal_(std=0.02)
        parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(decoder, name, (0.9, 0.95), 1e-8, 0.1, options)
    optimizer.step()
    states = [optimizer.state, *(part.state for part in (vars(optimizer).get(k) for k in ("inner", "adamw")) if part)]
    held = sum(_bytes(key, value) for state in states for of in state.values() for key, value in of.items())
    assert Update(name, options).moment_bytes(model, parallel) == pytest.approx(held, rel=1e-3)


def _bytes(key, value):
    """A moment's, and those of what it is made of; no count of steps, and no table of a code's values."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or key.startswith("qmap"):
        return 0
    parts = [vars(value)[name] for name in ("codes", "scale") if name in vars(value)]
    return sum(part.nbytes for part in parts) if parts else to_local(value).nbytes


def test_an_optimizer_s_time_follows_what_it_moves():
    cluster, layout = cluster_of("2xA100-80"), Layout({"shard": 2}, 2, 1)
    seconds = {
        update.name: judge(MODEL, layout, cluster, Training(512, 4, "bfloat16", "float32", update.name, update.options))
        for update in (ADAMW, MOMENTUM, Update("muon"))
    }
    adamw, sgd, muon = (seconds[name].time for name in (ADAMW.name, "sgd", "muon"))
    assert sgd.optimizer == pytest.approx(0.8 * adamw.optimizer)
    assert muon.optimizer > adamw.optimizer  # the iteration's products
    assert muon.communication > adamw.communication  # matrices come together, changes are sent
    assert sgd.products == adamw.products == muon.products
    assert seconds["sgd"].peak.states < seconds[ADAMW.name].peak.states
