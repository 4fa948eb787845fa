"""Whole models in every geometry and schedule against one process in float64."""

import itertools
import math
from dataclasses import replace

import pytest

from distributed.model_cases import GPT2, LLAMA, MODELS, initial_weights, masks_agree, model_errors
from support.pool import pool
from tessera.layout import HIDDEN_BY_HEADS
from tessera.schedule import Schedule

TOLERANCE = 1e-12
AXES = ("inner", "depth", "row", "col")
# a model whose heads, features and batch divide by 2 × 3
LLAMA6 = replace(LLAMA, hidden_size=96, num_heads=6, num_kv_heads=3, head_dim=16, ffn_size=192)
GPT6 = replace(GPT2, hidden_size=96, num_heads=6, num_kv_heads=6, head_dim=16, ffn_size=192)


def meshes(world):
    """Every way to lay `world` ranks along the four axes, those of size 1 left out."""
    for sizes in itertools.product(range(1, world + 1), repeat=len(AXES)):
        if math.prod(sizes) == world:
            yield {axis: n for axis, n in zip(AXES, sizes, strict=True) if n > 1}


def name(value):
    if isinstance(value, dict):
        return "×".join(f"{key}{n}" if key in AXES else f"{key}={n}" for key, n in value.items())
    return str(value)


def check(sizes, *arguments, size=4, length=12, **options):
    """`arguments` of model_errors after the sizes: model, sequence parallel, steps, label smoothing."""
    model, sequence_parallel, steps, smoothing = (*arguments, True, 1, 0.1)[:4] if len(arguments) < 4 else arguments
    world = math.prod(sizes.values())
    for relative, parameter, _ in pool(world).run(
        model_errors, model, sizes, sequence_parallel, steps, smoothing, None, options, size, length
    ):
        assert relative["loss"] <= TOLERANCE and relative["norm"] <= TOLERANCE
        assert relative["gradients"] <= TOLERANCE, parameter
        assert relative["weights"] <= TOLERANCE
