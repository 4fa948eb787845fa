"""Counted words equal the closed form exactly."""

from dataclasses import replace

import pytest

from distributed.model_cases import LLAMA, MODELS, model_step_counts
from support.pool import pool
from tessera.plan.words import StepShape, replicated_elements, step_collectives

BENCHMARK = replace(
    LLAMA, vocab_size=8192, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1408
)


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_counted_words_equal_the_formula(model, size, sequence_parallel):
    for options in ({}, {"keep_gathered": True}, {"recompute": True, "micro_batches": 3, "label_smoothing": True}):
        shape = StepShape(tokens=48, sequence_parallel=sequence_parallel, **options)
        for counted in pool(size).run(model_step_counts, MODELS[model], {"col": size}, shape, 4, 12):
            assert counted == step_collectives(MODELS[model], size, shape), options


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
def test_the_benchmark_shape_needs_at_most_twenty_collectives_without_sequence_parallelism(sequence_parallel):
    shape = StepShape(tokens=1024, sequence_parallel=sequence_parallel)
    counted = pool(2).run(model_step_counts, BENCHMARK, {"col": 2}, shape, 4, 256)[0]
    assert counted == step_collectives(BENCHMARK, 2, shape)
    calls = sum(n for n, _ in counted.values())
    assert calls == (47 if sequence_parallel else 20)


def test_several_chunks_of_the_loss_exchange_once_each():
    shape = StepShape(tokens=2304)
    counted = pool(2).run(model_step_counts, LLAMA, {"col": 2}, shape, 48, 48)[0]
    assert counted == step_collectives(LLAMA, 2, shape)
    assert counted["all_gather"][0] == step_collectives(LLAMA, 2, replace(shape, tokens=1024))["all_gather"][0] + 2


def test_one_process_hands_over_nothing():
    assert step_collectives(LLAMA, 1, StepShape(tokens=48)) == {}


def test_replicated_elements_of_the_memory_experiment():
    from tessera.cli.demo_memory import experiment_model

    assert replicated_elements(experiment_model(False)) == 549_888
