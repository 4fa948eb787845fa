"""Whole models in 1D tensor parallelism, and their blocks in every geometry, against one process in float64."""

import pytest

from distributed.model_cases import MODELS, initial_weights, model_errors
from support.pool import pool

TOLERANCE = 1e-12

LAYOUTS = [
    {"col": 2},
    {"col": 4},
    {"row": 2},
    {"inner": 2},
    {"row": 2, "col": 2},
    {"depth": 2, "col": 2},
    {"inner": 2, "col": 2},
    {"depth": 2, "row": 2, "col": 2},
    {"inner": 2, "row": 2, "col": 2},
]


def name(value):
    return "×".join(f"{a}{n}" for a, n in value.items()) if isinstance(value, dict) else str(value)


def world(sizes):
    size = 1
    for n in sizes.values():
        size *= n
    return size


def check(sizes, *arguments):
    for relative, parameter, _ in pool(world(sizes)).run(model_errors, *arguments):
        assert relative["loss"] <= TOLERANCE and relative["norm"] <= TOLERANCE
        assert relative["gradients"] <= TOLERANCE, parameter
        assert relative["weights"] <= TOLERANCE


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_1d_equals_one_process(model, size, sequence_parallel):
    sizes = {"col": size}
    check(sizes, model, sizes, sequence_parallel, 2, 0.1)


@pytest.mark.parametrize("sizes", LAYOUTS[2:], ids=name)
@pytest.mark.parametrize("model", ["llama tied", "gpt2"])
def test_every_axis_equals_one_process(model, sizes):
    check(sizes, model, sizes, True, 1, 0.1)


@pytest.mark.parametrize("options", [{"keep_gathered": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_policies_do_not_change_numbers(model, options):
    check({"col": 2}, model, {"col": 2}, True, 1, 0.0, None, options)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=name)
def test_initial_weights_do_not_depend_on_the_mesh(sizes):
    for model in ("llama", "gpt2"):
        assert all(pool(world(sizes)).run(initial_weights, model, sizes))


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_leaving_out_any_collective_is_seen(model, sequence_parallel):
    """At size 4, so that the gather of kv heads is among them; what changes nothing is not needed."""
    sizes = {"col": 4}
    run = pool(4).run
    _, _, kinds = run(model_errors, model, sizes, sequence_parallel, 1)[0]
    for index, kind in enumerate(kinds):
        relative = [r for r, _, _ in run(model_errors, model, sizes, sequence_parallel, 1, 0.0, index)]
        worst = max(value for r in relative for value in r.values())
        assert not worst <= 1e-6, f"leaving out collective {index} ({kind}) went unseen"
