"""The points that a step passes, and the operations between them, are those of the anatomy."""

from dataclasses import replace

import pytest
import torch

from distributed.model_cases import GPT2, LLAMA
from tessera.core.mesh import Mesh
from tessera.data.batch import MicroBatch
from tessera.engine.step import Step
from tessera.layout.parallel import Parallel
from tessera.layout.streams import residual_layout
from tessera.models.decoder import Decoder
from tessera.verify.trace import Point, _chain, behind, traced


@pytest.mark.parametrize("config", [LLAMA, replace(GPT2, tied=True, head_bias=False)], ids=["llama", "gpt2 tied"])
def test_a_step_passes_the_points_in_the_order_of_the_anatomy_and_back(config):
    model = Decoder(config, Parallel(Mesh(rank=0), residual_layout(True)))
    model.initialize(seed=5)
    ids = torch.randint(0, config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(3))
    trace = traced(Step(model, torch.optim.SGD(model.parameters(), lr=0.0)), [MicroBatch(ids, ids, ids.numel())])
    *chain, (head, *_) = _chain(config)
    points = [(name, output) for _, name, output in chain]
    forward = [(p.name, p.output) for p in trace.values if not p.backward]
    backward = [(p.name, p.output) for p in trace.values if p.backward]
    assert forward == points and set(backward) == set(points)
    later = [operation for operation, *_ in chain[1:]] + [head]
    for (name, output), operation, following in zip(points, (o for o, *_ in chain), later, strict=True):
        assert behind(Point(0, False, name, output), model) == operation
        gradient = behind(Point(0, True, name, output), model)
        assert gradient.modules == following.modules
        assert gradient.phase == ("forward" if following is head else "backward")
        assert all(model.get_submodule(module) for module in operation.modules)


def test_what_lies_behind_a_point():
    model = Decoder(LLAMA, Parallel(Mesh(rank=0), residual_layout(True)))
    out, norm = "layers.1.attention.out", "layers.1.mlp_norm"
    columns = ("q·k·v", "attention"), tuple(f"layers.1.attention.{name}" for name in "qkv"), out
    assert behind(Point(0, False, out, False), model) == (*columns, "forward")
    assert behind(Point(0, True, "layers.1.attention_norm", True), model) == (*columns, "backward")
    assert behind(Point(0, True, out, True), model)[:2] == (("layer norms",), (norm,))
    assert behind(Point(0, True, "layers.0.mlp.down", True), model).modules == ("layers.1.attention_norm",)
    assert behind(Point(0, True, "norm", True), model)[:2] == (("head", "loss"), ("head",))
