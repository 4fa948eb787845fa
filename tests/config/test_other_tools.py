"""Keys of other tools: taken under our name, without effect, or refused; each in one line."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from tessera.config import compat
from tessera.config.deepspeed import TAKEN, WELL_KNOWN
from tessera.config.load import ConfigError, load_config, make_config
from tessera.config.reader import parse_yaml
from tessera.config.schema import DatasetConfig, FsdpConfig, TrainConfig
from tessera.core.errors import UserError

MINIMAL = {"base_model": "./my-llama", "datasets": [{"path": "a.jsonl"}]}
PLACES = {"": compat.TOP, "datasets[0].": compat.DATASETS, "fsdp_config.": compat.FSDP}
REFUSED = [(place, key) for place, table in PLACES.items() for key in table.refused]
NO_EFFECT = [(place, key) for place, table in PLACES.items() for key in table.no_effect]


def values(place: str, key: str, value: object) -> dict[str, object]:
    """The shortest config with this key."""
    if place == "datasets[0].":
        return {**MINIMAL, "datasets": [{"path": "a.jsonl", key: value}]}
    return {**MINIMAL, **({"fsdp_config": {key: value}} if place else {key: value})}


def problem_of(given: dict[str, object]) -> UserError:
    with pytest.raises(UserError) as caught:
        make_config(given)
    return caught.value


def test_no_table_has_a_key_twice():
    parse_yaml((Path(compat.__file__).parent / "other_tools.yaml").read_text(), "other_tools.yaml")


IN_NEW_FILES = """
    chunked_cross_entropy chunked_cross_entropy_num_chunks center_rewards_coefficient deepcompile default_system_message
    dion_lr dion_rank_fraction eval_sequence_len eval_table_max_new_tokens generate_samples generation_max_new_tokens
    jagged_restart_steps num_dataset_shards_to_save num_generation_samples nvfp4 otel_metrics_port profiler_steps_start
    quantize_moe_experts resources_per_worker sample_packing_mp_start_method scaling_softmax_factor trainer_cls
    type_of_model use_dynamic_finetuning use_swanlab
"""


def test_keys_that_axolotl_has_come_to_know_have_a_verdict():
    known = {**compat.TOP.others, **TrainConfig.model_fields}
    assert [key for key in IN_NEW_FILES.split() if compat.find(known, key) is None] == []


def test_the_verdicts_do_not_overlap():
    for table, section in zip(PLACES.values(), (TrainConfig, DatasetConfig, FsdpConfig), strict=True):
        keys = [*section.model_fields, *table.refused, *table.no_effect, *table.ours]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("place", "key"), REFUSED)
def test_refused_keys_say_so_and_what_to_do_unless_they_ask_for_nothing(place, key):
    problem, row = problem_of(values(place, key, "something else")), PLACES[place].refused[key]
    assert problem.key == place + key
    assert problem.reason == f"is not supported ({row.what})" and problem.hint == row.instead
    for neutral in (None, "", [], {}, *row.neutral):
        assert make_config(values(place, key, neutral)) == make_config(MINIMAL)


def test_false_asks_for_something_where_true_does_not():
    assert problem_of({**MINIMAL, "save_safetensors": False}).key == "save_safetensors"
    assert make_config({**MINIMAL, "save_safetensors": True}) == make_config(MINIMAL)


def test_true_is_not_taken_for_the_size_one():
    assert "not supported" in str(problem_of({**MINIMAL, "pipeline_parallel_size": True}))


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, found in compat.REFUSED_VALUES.items() for v in found])
def test_refused_values_say_which_are_supported(key, value):
    place, _, inner = key.rpartition(".")
    given = values("datasets[0]." if place else "", inner, value)
    problem = problem_of(given)
    assert problem.key.endswith(inner) and problem.reason == "is not supported"
    assert problem.hint.startswith("supported: ") or problem.hint == "remove it"


@pytest.mark.parametrize(("place", "key"), NO_EFFECT)
def test_keys_without_effect_pass_with_the_reason(place, key):
    config, notes = make_config(values(place, key, "x"))
    assert config == make_config(MINIMAL)[0]
    assert notes == [f"{place}{key}: x has no effect: {PLACES[place].no_effect[key]}"]
    assert make_config(values(place, key, None))[1] == []


def test_a_star_stands_for_any_letters():
    _, notes = make_config({**MINIMAL, "liger_rope": True, "liger_swiglu": True, "lora_mlp_kernel": True})
    assert [note.partition(":")[0] for note in notes] == ["liger_rope", "liger_swiglu", "lora_mlp_kernel"]
    assert problem_of({**MINIMAL, "lora_dropout": 0.05}).hint == "remove it to train every weight"


def test_keys_that_ask_for_the_same_are_refused_together():
    problem = problem_of({**MINIMAL, "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "rl": "dpo"})
    assert [each.key for each in problem.problems] == ["adapter, lora_r, lora_alpha", "rl"]
    assert str(problem.problems[0]).endswith("\n  are not supported (LoRA adapters)\n  remove it to train every weight")


@pytest.mark.parametrize("plugin", sorted(compat.NO_EFFECT_PLUGINS))
def test_plugins_whose_work_changes_nothing_pass(plugin):
    _, (note,) = make_config({**MINIMAL, "plugins": [plugin]})
    assert note == f"plugins: {plugin} has no effect: {compat.NO_EFFECT_PLUGINS[plugin]}"
    assert make_config({**MINIMAL, "plugins": plugin})[1] == [note]
    problem = problem_of({**MINIMAL, "plugins": [plugin, "axolotl.integrations.kd.KDPlugin"]})
    assert (problem.value, problem.reason) == ("axolotl.integrations.kd.KDPlugin", "this plugin is not supported")


def two_values(annotation: Any) -> list[Any]:
    """Two values of a key's type."""
    choices = [choice for choice in get_args(annotation) if isinstance(choice, str)]
    kinds = {str: ["./x", "./y"], int: [2, 4], float: [3.0, 4.0], bool: [True, 3]}
    inner = [
        pair for part in get_args(annotation) if isinstance(part, type) or get_args(part) for pair in two_values(part)
    ]
    return choices[:2] or inner[:2] or kinds.get(annotation, [])


# pretraining_dataset: tests/train/test_stream.py
@pytest.mark.parametrize("theirs", sorted(compat.TOP.ours.keys() - {"pretraining_dataset"}))
def test_other_names_are_taken_in_one_line(theirs):
    ours, divisor = compat.TOP.ours[theirs].key, compat.TOP.ours[theirs].divisor
    value, other = two_values(TrainConfig.model_fields[ours].annotation)
    given = {key: each for key, each in MINIMAL.items() if key != ours}
    theirs_value = value if divisor == 1 else value * divisor
    config, notes = make_config({**given, theirs: theirs_value})
    assert getattr(config, ours) == value
    assert len(notes) == 1 and notes[0].startswith(f"{theirs} is called {ours} here")
    assert make_config({**given, theirs: theirs_value, ours: value})[0] == config
    problem = problem_of({**given, theirs: theirs_value, ours: other})
    assert "keep one of the two" in str(problem)


def test_the_same_number_in_two_places_is_no_contradiction():
    assert make_config({**MINIMAL, "num_train_epochs": 3, "num_epochs": 3.0})[0].num_epochs == 3
    assert make_config({**MINIMAL, "deepspeed": {"gradient_clipping": 1}, "max_grad_norm": 1.0})[0].max_grad_norm == 1


def test_a_mistake_is_told_under_the_name_that_was_given():
    assert problem_of({**MINIMAL, "lr": "fast"}).key == "lr"


def test_a_timeout_in_seconds_becomes_minutes():
    config, notes = make_config({**MINIMAL, "ddp_timeout": 5400})
    assert config.group_timeout_minutes == 90 and notes == ["ddp_timeout is called group_timeout_minutes here: 90"]


FULL = """
base_model: meta-llama/Llama-3.1-70B
dp_shard_size: 4
tensor_parallel_size: 2
fsdp_version: 2
fsdp_config:
  reshard_after_forward: true
  state_dict_type: FULL_STATE_DICT
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: LlamaDecoderLayer
  forward_prefetch: true
datasets:
  - path: ./alpaca.jsonl
    type: alpaca
warmup_ratio: 0.1
bf16: true
tf32: true
gradient_checkpointing: true
torch_compile: true
torch_compile_backend: inductor
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
wandb_project:
strict: false
"""


def test_a_file_as_people_write_it_loads_with_a_line_for_each_key_without_effect(tmp_path):
    (tmp_path / "run.yaml").write_text(FULL)
    config, notes = load_config(tmp_path / "run.yaml")
    assert config.world_size == 8 and config.fsdp_config.forward_prefetch
    told = [note.partition(":")[0] for note in notes]
    wrapped = ["fsdp_config.state_dict_type", "fsdp_config.transformer_layer_cls_to_wrap"]
    assert told == ["torch_compile", "torch_compile_backend", "plugins", *wrapped]


# ---- FSDP1


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"fsdp": ["full_shard", "auto_wrap"]}, {}),
        ({"fsdp": "full_shard auto_wrap offload"}, {"fsdp_config": {"offload_params": True}}),
        ({"fsdp": True}, {}),
        ({"fsdp": ["shard_grad_op"]}, {"fsdp_config": {"reshard_after_forward": False}}),
        ({"fsdp": ["no_shard"], "dp_replicate_size": 2}, {"dp_shard_size": 1, "dp_replicate_size": 2}),
        ({"fsdp": ["hybrid_shard"], "dp_replicate_size": 2}, {"dp_replicate_size": 2}),
        ({"fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}}, {}),
        ({"fsdp_config": {"sharding_strategy": 1}}, {}),
        ({"fsdp_config": {"sharding_strategy": "SHARD_GRAD_OP"}}, {"fsdp_config": {"reshard_after_forward": False}}),
        ({"fsdp_config": {"fsdp_sharding_strategy": 2}}, {"fsdp_config": {"reshard_after_forward": False}}),
        ({"fsdp_config": {"fsdp_reshard_after_forward": "FULL_SHARD"}}, {}),
        (
            {"fsdp_config": {"reshard_after_forward": "SHARD_GRAD_OP"}},
            {"fsdp_config": {"reshard_after_forward": False}},
        ),
        (
            {"fsdp_config": {"sharding_strategy": "HYBRID_SHARD_ZERO2"}, "dp_replicate_size": 4},
            {"fsdp_config": {"reshard_after_forward": False}, "dp_replicate_size": 4},
        ),
        (
            {"fsdp_config": {"sharding_strategy": "NO_SHARD"}, "dp_replicate_size": 4},
            {"dp_shard_size": 1, "dp_replicate_size": 4},
        ),
        ({"fsdp_config": {"activation_checkpointing": True}}, {"gradient_checkpointing": True}),
        (
            {"fsdp_config": {"activation_checkpointing": True}, "gradient_checkpointing": False},
            {"gradient_checkpointing": True},
        ),
        ({"fsdp_config": {"fsdp_version": 2}}, {}),
        ({"fsdp_config": {"version": "2"}}, {}),
        ({"fsdp_config": {"version": 1}}, {}),
        ({"fsdp_version": 1}, {}),
        ({"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1000}}, {}),
        ({"fsdp_config": {"fsdp_offload_params": True}}, {"fsdp_config": {"offload_params": True}}),
    ],
)
def test_the_words_of_fsdp1_are_ours(given, ours):
    assert make_config({**MINIMAL, **given})[0] == make_config({**MINIMAL, **ours})[0]


@pytest.mark.parametrize(
    ("given", "key", "said"),
    [
        ({"fsdp": ["full_shart"]}, "fsdp", "nearest: full_shard"),
        ({"fsdp": ["no_shard"]}, "fsdp", "write dp_shard_size: 1, and dp_replicate_size"),
        (
            {"fsdp_config": {"sharding_strategy": "HYBRID_SHARD"}},
            "fsdp_config.sharding_strategy",
            "write dp_replicate_size",
        ),
        ({"fsdp_config": {"sharding_strategy": "offload"}}, "fsdp_config.sharding_strategy", "offload is not a way"),
        (
            {"fsdp_config": {"sharding_strategy": "SHARD_GRAD_OP", "reshard_after_forward": True}},
            "fsdp_config.sharding_strategy",
            "keep one of the two",
        ),
        ({"fsdp_config": {"version": 3}}, "fsdp_config.fsdp_version", "one of 2"),
        ({"fsdp_config": {"activation_checkpointing": 3}}, "fsdp_config.activation_checkpointing", "true or false"),
    ],
)
def test_what_fsdp1_leaves_open_or_contradicts_is_told(given, key, said):
    problem = problem_of({**MINIMAL, **given})
    assert problem.key == key and said in str(problem)


def test_checkpointing_in_either_place_is_no_contradiction():
    config, notes = make_config({**MINIMAL, "fsdp_config": {"activation_checkpointing": True}})
    assert config.gradient_checkpointing
    assert notes == ["fsdp_config.activation_checkpointing is called gradient_checkpointing here"]


def test_fsdp_without_sizes_shards_over_the_processes_that_are_left():
    config, _ = make_config({**MINIMAL, "fsdp": ["full_shard"], "tensor_parallel_size": 2})
    assert config.filled_in(8).mesh_sizes["shard"] == 4
    for asked in ({"fsdp": ["full_shard"]}, {"deepspeed": "zero3.json"}):
        said = f"{next(iter(asked))} shards over all processes that the other sizes leave"
        assert make_config({**MINIMAL, **asked})[1][-1].startswith(said)
        assert not any(said in note for note in make_config({**MINIMAL, **asked, "dp_shard_size": 2})[1])


def test_fsdp_that_has_nothing_to_shard_over_is_told():
    keys = {"fsdp_config": {"offload_params": True, "forward_prefetch": True}}
    (line,) = make_config({**MINIMAL, **keys})[0].idle_fsdp_keys()
    assert line.startswith("fsdp_config.forward_prefetch, fsdp_config.offload_params have no effect: ")
    assert make_config({**MINIMAL, **keys, "dp_replicate_size": 2})[0].idle_fsdp_keys() == []
    assert make_config(MINIMAL)[0].idle_fsdp_keys() == []


# ---- DeepSpeed

OFFLOAD = {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("deepspeed", "ours"),
    [
        ({"zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_max_live_parameters": 0}}, {}),
        ({"zero_optimization": {"stage": 2}}, {"fsdp_config": {"reshard_after_forward": False}}),
        ({"zero_optimization": {"stage": 1}}, {"fsdp_config": {"reshard_after_forward": False}}),
        ({"zero_optimization": {"stage": 3, "offload_param": OFFLOAD}}, {"fsdp_config": {"offload_params": True}}),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD}}, {"fsdp_config": {"offload_params": True}}),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}, {}),
        ({"bf16": {"enabled": True}}, {"bf16": True}),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}}, {}),
        ({"gradient_clipping": 0.5, "train_batch_size": "auto"}, {"max_grad_norm": 0.5}),
        (
            {"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 2},
            {"gradient_accumulation_steps": 4, "micro_batch_size": 2},
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}, "wall_clock_breakdown": False},
            {},
        ),
        ({"compile": {"disable": False, "backend": "inductor"}, "steps_per_print": 100}, {}),
        ({}, {}),
    ],
)
def test_a_deepspeed_config_is_ours(deepspeed, ours, tmp_path):
    expected = make_config({**MINIMAL, **ours})[0]
    assert make_config({**MINIMAL, "deepspeed": deepspeed})[0] == expected
    (tmp_path / "ds.json").write_text(json.dumps(deepspeed))
    assert make_config({**MINIMAL, "deepspeed": str(tmp_path / "ds.json")})[0] == expected


def test_a_stage_says_what_it_is_here():
    for stage, said in ((3, "is FSDP2 here"), (2, "parameters and gradients are stored cut too")):
        given = {**MINIMAL, "dp_shard_size": 2, "deepspeed": {"zero_optimization": {"stage": stage}}}
        _, (note,) = make_config(given)
        assert note.startswith("deepspeed.zero_optimization.stage") and said in note


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_the_files_of_axolotls_examples_are_known_without_being_here(name):
    config, notes = make_config({**MINIMAL, "bf16": "auto", "deepspeed": f"deepspeed_configs/{name}"})
    assert config.fsdp_config.reshard_after_forward == name.startswith("zero3")
    assert config.fsdp_config.offload_params == ("offload" in name or name.startswith("zero2"))
    assert config.bf16 == (True if "bf16" in name else "auto")
    assert "does not exist; taken as the file of that name" in notes[0]


@pytest.mark.parametrize(
    ("deepspeed", "key", "said"),
    [
        ("nowhere.json", "deepspeed", "does not exist\n  known without a file: zero1.json"),
        (3, "deepspeed", "path of a JSON file"),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage", "write 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "deepspeed.zero_optimization.stage", "write 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "deepspeed.zero_optimization.stage", "dp_replicate_size"),
        ({"zero_optimization": 3}, "deepspeed.zero_optimization", "must be keys with values"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}, "stage": 3}},
            "deepspeed.zero_optimization.offload_param",
            "device: cpu",
        ),
        ({"zero_optimization": {"stage": 3, "stag": 3}}, "deepspeed.zero_optimization.stag", "nearest: stage"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16", "float16"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
            "deepspeed.optimizer",
            "write optimizer and learning_rate",
        ),
        ({"optimizer": {"type": "Lamb"}}, "deepspeed.optimizer", "not supported"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.scheduler", "lr_scheduler"),
        ({"train_batch_size": 64}, "deepspeed.train_batch_size", "write auto there"),
        ({"bf17": {"enabled": True}}, "deepspeed.bf17", "nearest: bf16"),
    ],
)
def test_what_a_deepspeed_config_cannot_ask_for(deepspeed, key, said):
    problem = problem_of({**MINIMAL, "deepspeed": deepspeed})
    assert problem.key == key and said in str(problem)


def test_deepspeed_beside_other_values():
    stage = {"zero_optimization": {"stage": 3}}
    assert "keep one of the two" in str(
        problem_of({**MINIMAL, "deepspeed": stage, "fsdp_config": {"forward_prefetch": True}})
    )
    assert make_config({**MINIMAL, "deepspeed": stage, "fsdp_config": None})[0] == make_config(MINIMAL)[0]
    for theirs, ours in TAKEN.items():
        assert problem_of({**MINIMAL, "deepspeed": {theirs: 3}, ours: 2}).hint == "keep one of the two"


def test_every_problem_of_every_place_is_told_at_once():
    problem = problem_of(
        {**MINIMAL, "fsdp": "x", "deepspeed": {"zero_optimization": {"stage": 9}}, "adapter": "lora", "seed": "x"}
    )
    assert isinstance(problem, ConfigError)
    keys = {each.key for each in problem.problems}
    assert keys == {"fsdp", "deepspeed.zero_optimization.stage", "adapter", "seed"}


def test_a_token_for_the_hub_is_not_shown():
    config, notes = make_config({"base_model": "m", "datasets": [{"path": "a"}], "hub_token": "hf_very_secret"})
    assert len(notes) == 1 and "hub_token: … has no effect" in notes[0] and "secret" not in notes[0]
