"""A model whose layers differ costs what its layers cost, each kind by itself: readers sum over kinds of layers."""

from dataclasses import replace

import pytest

from distributed.model_cases import GPT2, LLAMA
from tessera.core.mesh import Mesh
from tessera.inspect.held import inspect_model, traffic
from tessera.layout.parallel import Parallel
from tessera.layout.shape import StepShape
from tessera.layout.streams import residual_layout
from tessera.models.anatomy import anatomy_of
from tessera.plan.memory import saved_bytes, state_bytes
from tessera.plan.scratch import scratch_bytes
from tessera.plan.traffic import received_bytes, step_transfers, totals
from tessera.sizes.schedule import Schedule

SHAPE = StepShape(batch=8, sequence=6, micro_batches=2)
READERS = [f"tessera.{name}.anatomy_of" for name in ("plan.traffic", "plan.memory", "plan.scratch", "inspect.held")]
MIXED = {  # a model, how its last layer differs, and along which axes: every sum divides by the ranks
    "wider mlp": (LLAMA, {"ffn_size": 192}, {"row": 2, "col": 2}),
    "fewer kv heads": (LLAMA, {"num_kv_heads": 4}, {"inner": 2, "col": 2}),
    "no gate, over fsdp": (LLAMA, {"gated": False, "activation": "gelu"}, {"shard": 2, "col": 2}),
    "no bias": (GPT2, {"mlp_bias": False}, {"depth": 2, "col": 2}),
}


@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("name", MIXED)
def test_costs_are_summed_over_kinds_of_layers(name, keep):
    model, difference, sizes = MIXED[name]
    fsdp = {"fsdp": ("shard", "row"), "weights_over": ()} if "shard" in sizes else {}
    parallel = Parallel(Mesh(sizes, rank=1), residual_layout(True), schedule=Schedule(keep=keep), **fsdp)
    three, four = (replace(model, num_layers=layers) for layers in (3, 4))
    other = replace(three, **difference)
    layers = (*anatomy_of(three).layers, anatomy_of(other).layers[0])
    mixed = replace(anatomy_of(three), layers=layers)

    def costs(model):
        transfers = step_transfers(model, SHAPE, parallel)
        return (
            received_bytes(transfers),
            sum(calls for calls, _ in totals(transfers).values()),
            saved_bytes(model, SHAPE, parallel),
            saved_bytes(model, replace(SHAPE, recompute=True), parallel),
            state_bytes(model, parallel),
        )

    one_more = [b - a for a, b in zip(costs(other), costs(replace(other, num_layers=4)), strict=True)]
    scratch = [scratch_bytes(m, SHAPE.tokens, parallel) for m in (three, four, other, replace(other, num_layers=4))]
    with pytest.MonkeyPatch.context() as patched:
        for reader in READERS:
            patched.setattr(reader, lambda _: mixed)
        of_mixed, transfers = costs(four), step_transfers(four, SHAPE, parallel)
        inspection = inspect_model(four, parallel)
        collectives = traffic(four, inspection, SHAPE)
        scratch_of_mixed = scratch_bytes(four, SHAPE.tokens, parallel)
    assert list(of_mixed) == [a + b for a, b in zip(costs(three), one_more, strict=True)]
    assert of_mixed != costs(four)
    # a site of both kinds has one transfer where they move alike, else one of each
    times = [each.times for each in transfers if (each.site, each.phase) == ("attention out", "forward")]
    assert times and all(n == 4 * SHAPE.micro_batches for n in times)
    assert sum(held.elements[1] for held in inspection.parameters) * 4 * 4 == of_mixed[4]
    assert sum(c.transfer.times * c.received[1] for c in collectives) == of_mixed[0]
    if keep:
        copies = [scratch[1] - scratch[0], scratch[3] - scratch[2]]
        running = max(scratch[0] - 3 * copies[0], scratch[2] - 3 * copies[1])
        assert scratch_of_mixed == running + 3 * copies[0] + copies[1]
    else:
        assert scratch_of_mixed == max(scratch)
