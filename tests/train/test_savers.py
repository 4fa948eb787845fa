"""The keys that save memory: what each does in a run, that the numbers stay, and what a run says of it."""

from typing import Any

import pytest

from distributed.model_cases import LLAMA
from support.pool import pool
from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.core.text import human
from tessera.layout.shape import Savers
from tessera.train.saved import saver_lines
from tessera.train.settings import parallel_for, savers_of
from train.runs import THREE_STEPS, Workshop, metrics
from train.savers_on_rank import saving_run
from train.test_parity import check

ROWS = {"micro_batch_size": 6, "gradient_accumulation_steps": 1, "sequence_len": 24}
NOTHING = {"tiles": 1, "host": 0, "once": 0, "again": False, "chunks": 1}
ULYSSES = {"context_parallel_size": 2, "context_parallel_mode": "ulysses"}
RUNS = {
    "selective": ({"gradient_checkpointing": "selective"}, {"again": True, "once": 12}),
    "offload": ({"gradient_checkpointing": "offload"}, {"again": True, "host": 2 * 6 * 16 * 64 * 4}),
    "activations, tiles": (
        {"activation_offloading": True, "tiled_mlp": True},
        {"tiles": 2, "host": None},  # 6 rows of at most 16 tokens for 64 features
    ),
    "all at 2 ranks": (
        ULYSSES
        | {"ulysses_chunks": 2, "gradient_checkpointing": "selective", "activation_offloading": True}
        | {"tiled_mlp": True, "tiled_mlp_num_shards": 3},
        {"chunks": 2, "again": True, "once": 12, "tiles": 3, "host": None},
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_does_what_the_keys_ask_for_and_equals_the_plain_loop(workshop: Workshop, plain, tmp_path, case):
    keys, wanted = RUNS[case]
    settings = workshop.settings("llama 64", tmp_path / "run", **(THREE_STEPS | ROWS | keys))
    said, seen = pool(TrainConfig.model_validate(settings).world_size).run(saving_run, settings)[0]
    assert seen["host"] > 0 if "host" in wanted else seen["host"] == 0
    assert seen | {"host": None} == NOTHING | {"host": None} | wanted | {"host": None}
    for key in ("gradient_checkpointing", "activation_offloading", "tiled_mlp", "ulysses_chunks"):
        assert (f"\n{key}" in said) == (key in keys), said
    check(settings, metrics(settings), plain("llama 64", **THREE_STEPS, **ROWS))


def config_of(**keys: Any) -> TrainConfig:
    settings = {"base_model": "x", "datasets": [{"path": "y"}], "sequence_len": 32, "micro_batch_size": 4}
    return make_config(settings | keys)[0]


def lines_of(**keys: Any) -> list[str]:
    config = config_of(**keys)
    return saver_lines(config, LLAMA, parallel_for(config, LLAMA, Mesh(config.mesh_sizes, rank=0)))


def test_a_run_says_what_each_saver_saves():
    """128 tokens of 64 features in float32: a layer's input takes 32 KiB, and there are two layers."""
    assert lines_of() == []
    (whole,) = lines_of(gradient_checkpointing=True)
    assert whole.startswith("gradient_checkpointing: layers keep 64 KiB for the backward, instead of ")
    (selective,) = lines_of(gradient_checkpointing="selective")
    kept = human(2 * 128 * (64 + 64 + 8) * 4)  # the input, attention's result, a statistic of each of 8 heads
    assert selective.split(" for ")[0] == f"gradient_checkpointing: layers keep {kept}"
    again, host = lines_of(gradient_checkpointing="offload")
    assert again == whole and "64 KiB of what layers keep for the backward lie in host memory" in host
    (host,) = lines_of(activation_offloading=True)
    assert host.startswith(f"activation_offloading: {whole.split(' instead of ')[1]} of what layers keep")
    (tiles,) = lines_of(tiled_mlp=True, tiled_mlp_num_shards=4)
    three = 3 * 96 * 4  # gate, up and their product
    between = f"holds {human(32 * three)}, instead of {human(128 * three)}"
    assert tiles == f"tiled_mlp: 4 parts of at most 32 tokens; between its products an MLP {between}"
    assert lines_of(tiled_mlp=True)[0].startswith("tiled_mlp: 2 parts of at most 64 tokens")
    (chunks,) = lines_of(**ULYSSES, ulysses_size=2, ulysses_chunks=2)
    one, all_heads = 64 * 2 * (4 + 2) * 8 * 4, 64 * 2 * (8 + 2) * 8 * 4  # one kv head in a group, repeated for 2 ranks
    assert chunks.startswith(f"ulysses_chunks: {human(one)} of q, k, v and result are gathered at a time, instead of ")
    assert f" {human(all_heads)};" in chunks
    (eager,) = lines_of(gradient_checkpointing="selective", attn_implementation="eager")
    assert eager.endswith("; attention runs again too, as its kernel goes step by step")


@pytest.mark.parametrize(
    ("keys", "savers"),
    [
        ({}, Savers()),
        ({"gradient_checkpointing": True}, Savers()),
        ({"gradient_checkpointing": "selective"}, Savers(attention_once=True)),
        ({"gradient_checkpointing": "offload"}, Savers(offload=True)),
        ({"gradient_checkpointing": True, "activation_offloading": True}, Savers(offload=True)),
        ({"tiled_mlp": True}, Savers(mlp_tiles=None)),
        ({"activation_offloading": "legacy"}, Savers(offload=True)),
        ({"tiled_mlp": True, "tiled_mlp_num_shards": 5}, Savers(mlp_tiles=5)),
    ],
    ids=str,
)
def test_what_the_keys_come_to(keys, savers):
    config = config_of(**keys)
    assert savers_of(config) == savers and config.recompute == ("gradient_checkpointing" in keys)


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("activation_offloading", "disk", "write gradient_checkpointing: offload"),
        ("gradient_checkpointing", "offload_disk", "supported: true, false, selective, offload"),
        ("gradient_checkpointing", "unsloth", "supported: true, false, selective, offload"),
    ],
)
def test_other_ways_of_axolotl_are_refused_by_name(key, value, way_out):
    with pytest.raises(UserError) as caught:
        config_of(**{key: value})
    assert caught.value.key == key and way_out in caught.value.hint


def test_parts_without_tiles_are_told():
    settings = {"base_model": "x", "datasets": [{"path": "y"}], "tiled_mlp_num_shards": 4}
    assert make_config(settings)[1] == ["tiled_mlp_num_shards: 4 has no effect: tiled_mlp is not asked for"]
