"""The YAML file in, a checked `TrainConfig` out; every mistake is named."""

from pathlib import Path

import pytest

from tessera.config.load import ConfigError, dump_config, load_config, make_config
from tessera.config.schema import DatasetConfig, FsdpConfig, MeshConfig, TokenizerConfig, TrainConfig
from tessera.core.errors import UserError

MINIMAL = {"base_model": "./my-llama", "datasets": [{"path": "a.jsonl"}]}


def config_of(**keys: object) -> TrainConfig:
    return make_config({**MINIMAL, **keys})[0]


def problem_of(**keys: object) -> UserError:
    with pytest.raises(UserError) as caught:
        make_config({**MINIMAL, **keys})
    return caught.value


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_those_that_users_know():
    config = config_of()
    assert (config.sequence_len, config.micro_batch_size, config.gradient_accumulation_steps) == (2048, 1, 1)
    assert (config.num_epochs, config.max_steps, config.learning_rate) == (1, None, 2e-5)
    assert (config.optimizer, config.lr_scheduler) == ("adamw_torch_fused", "cosine")
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (config.warmup_ratio, config.weight_decay, config.max_grad_norm) == (0.03, 0.0, 1.0)
    assert (config.bf16, config.seed, config.shuffle, config.sequence_parallel) == ("auto", 42, True, True)
    assert (config.output_dir, config.excess_length_strategy) == ("./outputs", "drop")
    assert config.world_size == 1


def test_every_key_has_its_meaning():
    for section in (TrainConfig, DatasetConfig, TokenizerConfig, MeshConfig, FsdpConfig):
        for key, field in section.model_fields.items():
            assert field.description and field.description.endswith("."), key


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    keys = "learning_rate: 2e-5\nweight_decay: 1E-1\nadam_epsilon: 1.5e-9\n"
    text = "base_model: m\ndatasets: [{path: a}]\n" + keys
    config, _ = load_config(write(tmp_path, text))
    assert (config.learning_rate, config.weight_decay, config.adam_epsilon) == (2e-5, 0.1, 1.5e-9)


def test_a_key_given_twice_is_refused_with_its_lines(tmp_path):
    text = "base_model: m\nseed: 1\ndatasets: [{path: a}]\nseed: 2\n"
    with pytest.raises(UserError, match="lines 2 and 4") as caught:
        load_config(write(tmp_path, text))
    assert caught.value.key == "seed"


def test_merge_keys_are_not_duplicates(tmp_path):
    text = "base_model: m\ndatasets:\n  - &first {path: a, field: t}\n  - {<<: *first, path: b}\n"
    config, _ = load_config(write(tmp_path, text))
    assert [(d.path, d.field) for d in config.datasets] == [("a", "t"), ("b", "t")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "is not YAML: line"),
        ("", "is empty"),
        ("- a\n", "is a list"),
        ("base_model: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_files_that_hold_no_config(tmp_path, text, reason):
    with pytest.raises(UserError, match=reason):
        load_config(write(tmp_path, text))


def test_a_missing_file_names_the_nearest(tmp_path):
    path = write(tmp_path, "a: 1")
    with pytest.raises(UserError, match="nearest: run.yaml"):
        load_config(path.with_name("rum.yaml"))
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)


def test_overrides_are_yaml_and_win(tmp_path):
    path = write(tmp_path, "base_model: m\ndatasets: [{path: a}]\nmax_steps: 3\n")
    config, _ = load_config(
        path,
        ["max_steps=7", "learning_rate=1e-3", "tokenizer={train: bpe, vocab_size: 300}", "seed=1", "seed=2"],
    )
    assert (config.max_steps, config.learning_rate, config.seed) == (7, 1e-3, 2)
    assert config.tokenizer == TokenizerConfig(train="bpe", vocab_size=300)
    for wrong in ("max_steps", "=3"):
        with pytest.raises(UserError, match="is not key=value"):
            load_config(path, [wrong])


@pytest.mark.parametrize(
    ("keys", "name", "said"),
    [
        ({"learning_rte": 1e-4}, "learning_rte", "nearest: learning_rate"),
        ({"datasets": [{"path": "a", "feild": "t"}]}, "datasets[0].feild", "nearest: field"),
        ({"tokenizer": {"train": "bpe", "vocab_size": 300, "kind": 1}}, "tokenizer.kind", "known: train"),
        ({"tokenizer": {"train": "bpe", "vocab_size": 100}}, "tokenizer.vocab_size", "at least 257"),
        ({"tensor_parallel_mesh": {"rows": 2}}, "tensor_parallel_mesh.rows", "is not a known key\n  nearest: row"),
        ({"tensor_parallel_mesh": {"row": 0}}, "tensor_parallel_mesh.row", "at least 1\n  Devices that split tokens"),
        ({"tensor_parallel_mesh": {"row": "2"}}, "tensor_parallel_mesh.row", "write 2, without quotes"),
        ({"tensor_parallel_mesh": {1: 2}}, "tensor_parallel_mesh[1]", "a known key"),
        ({"tensor_parallel_mesh": 4}, "tensor_parallel_mesh", "keys with values\n  Sizes of the tensor axes"),
        ({"tensor_parallel_mesh.row": 2}, "tensor_parallel_mesh.row", "write tensor_parallel_mesh: {row: 2}"),
        ({"fsdp_config": {"forward_prefech": True}}, "fsdp_config.forward_prefech", "nearest: forward_prefetch"),
        ({"fsdp_config": {"fsdp_auto_wrap_policy": "size"}}, "fsdp_config.auto_wrap_policy", "or 'NO_WRAP'\n  What"),
        ({"fsdp_config": {"offload_params": 1}}, "fsdp_config.offload_params", "true or false\n  Keep parameters"),
        ({"fsdp_config": True}, "fsdp_config", "keys with values\n  FSDP2 settings"),
        ({"fsdp_config.forward_prefetch": True}, "fsdp_config.forward_prefetch", "{forward_prefetch: true}"),
        ({"tensor_parallel.size": 2}, "tensor_parallel.size", "nearest: tensor_parallel_size"),
        ({"micro_batch_size": 0}, "micro_batch_size", "at least 1"),
        ({"micro_batch_size": "8"}, "micro_batch_size", "a whole number"),
        ({"sequence_len": True}, "sequence_len", "a whole number"),
        ({"max_steps": 1000.0}, "max_steps", "a whole number"),
        ({"learning_rate": "fast"}, "learning_rate", "a number"),
        ({"learning_rate": float("nan")}, "learning_rate", "finite"),
        ({"adam_beta2": 1.0}, "adam_beta2", "below 1"),
        ({"val_set_size": 1.5}, "val_set_size", "for rows, write 2"),
        ({"val_set_size": -1}, "val_set_size", "at least 0"),
        ({"bf16": "maybe"}, "bf16", "one of 'auto', 'full', true or false"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler", "nearest: cosine"),
        ({"excess_length_strategy": "cut"}, "excess_length_strategy", "'drop', 'truncate' or 'raise'"),
        ({"datasets": []}, "datasets", "at least 1"),
        ({"datasets": [3]}, "datasets[0]", "keys with values"),
        ({"datasets": 3}, "datasets", "must be a list\n  The sources of"),
        ({"datasets": 3}, "datasets", "in this order.\n  for example datasets: [{path: ./book.txt}]"),
        ({"datasets": None}, "datasets", "is required"),
        ({"tensor_parallel_mode": 2}, "tensor_parallel_mode", "write '2d'"),
        ({"tensor_parallel_mode": 2.5}, "tensor_parallel_mode", "write '2.5d'"),
        ({"output_dir": 12}, "output_dir", "write '12', with quotes"),
        ({"learning_rate": "2e-5"}, "learning_rate", "write 2e-5, without quotes"),
        ({"shuffle": "true"}, "shuffle", "write true, without quotes"),
        ({"bf16": "true"}, "bf16", "write true, without quotes"),
        ({"max_steps": "many"}, "max_steps", "for example max_steps: 100"),
        ({"zzz": 3}, "zzz", "zzz: 3\n  is not a known key"),
        ({"base_model": ""}, "base_model", "at least 1 character"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio", "one of the two"),
        ({"lr_scheduler": "constant", "warmup_steps": 3}, "lr_scheduler", "constant_with_warmup"),
        ({"save_strategy": "no", "save_steps": 3}, "save_steps", "save_strategy is no"),
        ({"save_strategy": "epoch", "save_steps": 3}, "save_steps", "save_strategy is epoch"),
        ({"save_strategy": "best"}, "save_strategy", "no rows are held out"),
        ({"eval_steps": 3}, "eval_steps", "val_set_size"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(keys, name, said):
    problem = problem_of(**keys)
    assert problem.key == name
    assert said in str(problem)


def test_missing_keys_are_named():
    with pytest.raises(UserError, match="base_model\n.*is required"):
        make_config({"datasets": [{"path": "a"}]})


def test_every_problem_is_told_at_once():
    problem = problem_of(learning_rte=1, micro_batch_size=0, fp16=True)
    assert isinstance(problem, ConfigError)
    assert {p.key for p in problem.problems} == {"learning_rte", "micro_batch_size", "fp16"}
    assert all(p.key in str(problem) for p in problem.problems)


def test_every_mistake_inside_a_section_is_told():
    problem = problem_of(tensor_parallel_mesh={"rows": 2, "row": 0, "col": 1.5})
    assert isinstance(problem, ConfigError)
    assert {p.key for p in problem.problems} == {f"tensor_parallel_mesh.{axis}" for axis in ("rows", "row", "col")}


def test_many_unknown_keys_make_one_short_problem():
    unknown = {f"word_{i}": i for i in range(30)}
    problem = problem_of(**unknown, seed="x", learning_rte=3)
    assert [p.key for p in problem.problems] == ["seed", "word_0, word_1, word_2, word_3, word_4 and 26 more"]
    assert len(str(problem)) < 400
    assert "learning_rate for learning_rte" in str(
        problem_of(learning_rte=3, zzz=1, **dict(list(unknown.items())[:3]), yyy=1)
    )


def test_a_key_of_any_name_that_is_empty_asks_for_nothing():
    keys = ["torchdistx", "x", "fsdp", "deepspeed", "lora_r", "plugins", "lr", "save_total_limit"]
    for nothing in (None, False, "", [], {}):
        assert make_config({**MINIMAL, **dict.fromkeys(keys, nothing)}) == make_config(MINIMAL)
        for section in ({"datasets": [{"path": "a.jsonl", "x": nothing}]}, {"fsdp_config": {"x": nothing}}):
            assert config_of(**section) == config_of()


@pytest.mark.parametrize("key", sorted({*TrainConfig.model_fields} - {"base_model", "datasets"}))
def test_a_key_of_ours_that_is_empty_is_unset_unless_that_means_something(key):
    for nothing in (None, "", [], {}):
        if key == "check_replicas_steps" and nothing is None:
            assert config_of(check_replicas_steps=None).check_replicas_steps is None  # never
        else:
            assert config_of(**{key: nothing}) == config_of()


def test_what_is_required_cannot_be_empty():
    for keys in ({"base_model": None}, {"base_model": ""}, {"datasets": []}, {"datasets": [{"path": None}]}):
        assert problem_of(**keys).key in ("base_model", "datasets", "datasets[0].path")


@pytest.mark.parametrize("form", ["a.jsonl", ["a.jsonl"], {"path": "a.jsonl"}])
def test_a_path_alone_is_a_data_set(form):
    assert config_of(datasets=form) == config_of()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": 8}', "a model's config.json"),
        ('{"zero_optimization": {"stage": 3}}', "a DeepSpeed config"),
        ("distributed_type: FSDP\ncompute_environment: LOCAL_MACHINE\n", "a config of accelerate"),
        ('{"tokenizer_class": "x"}', "a file of a tokenizer"),
        ('{"weight_map": {}}', "a list of a model's weight files"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, text, kind):
    with pytest.raises(UserError, match=f"is {kind}, not the config of a run") as caught:
        load_config(write(tmp_path, text))
    assert len(str(caught.value)) < 300


def test_a_limit_that_only_auto_has_is_told_elsewhere():
    """Not refused: the resolved config of a run with auto has the schedule chosen, and the limit."""
    limit = {"tensor_parallel_scratch_gib": 0.5}
    for schedule in ("gather", "summa"):
        config, (note,) = make_config({**MINIMAL, **limit, "tensor_parallel_schedule": schedule})
        assert config.tensor_parallel_scratch_gib == 0.5
        assert note.startswith("tensor_parallel_scratch_gib: 0.5 has no effect: ") and note.endswith(f" is {schedule}")
    assert make_config({**MINIMAL, **limit, "tensor_parallel_schedule": "auto"})[1] == []
    for same in (2.0, 2):
        assert make_config({**MINIMAL, "tensor_parallel_scratch_gib": same})[1] == []


def test_an_unquoted_no_is_the_strategy_no(tmp_path):
    config, _ = load_config(write(tmp_path, "base_model: m\ndatasets: [{path: a}]\nsave_strategy: no\n"))
    assert config.save_strategy == "no"


def test_home_is_expanded_and_other_paths_are_kept():
    config = config_of(output_dir="~/runs", base_model="./m")
    assert config.output_dir == str(Path("~/runs").expanduser())
    assert config.base_model == "./m"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"warmup_steps": 5, "val_set_size": 0.1, "eval_steps": 2},
        {"lr_scheduler": "constant", "tokenizer": {"train": "bpe", "vocab_size": 512}},
        {"save_strategy": "no", "resume_from_checkpoint": True, "learning_rate": 3e-7},
    ],
)
def test_a_dumped_config_loads_to_the_same(tmp_path, keys):
    config = config_of(**keys)
    assert load_config(write(tmp_path, dump_config(config)))[0] == config


@pytest.mark.parametrize("packs, padded, told", [(True, False, 1), (True, None, 0), (True, True, 0), (False, False, 0)])
def test_rows_of_packed_samples_that_are_not_to_be_padded_are_told_of(packs, padded, told):
    _, notes = make_config(MINIMAL | {"sample_packing": packs, "pad_to_sequence_len": padded})
    assert len(notes) == told and all(note.startswith("pad_to_sequence_len: false has no effect: ") for note in notes)


def test_betas_do_nothing_with_sgd_and_the_run_says_so():
    _, notes = make_config({**MINIMAL, "optimizer": "sgd", "adam_beta1": 0.8, "adam_epsilon": 1e-8})
    assert notes == ["adam_beta1: 0.8 has no effect: optimizer is sgd"]
    assert make_config({**MINIMAL, "adam_beta1": 0.8})[1] == []


def test_a_warm_up_of_zero_beside_another_is_no_contradiction():
    config, _ = make_config({**MINIMAL, "warmup_steps": 3, "warmup_ratio": 0.0})
    assert config.warmup_steps == 3


EVALUATED = {"val_set_size": 0.1}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"eval_sample_packing": True}, "no rows are held out for evaluation"),
        ({"eval_sample_packing": True} | EVALUATED, None),
        ({"eval_sample_packing": False}, None),
        ({"greater_is_better": True} | EVALUATED, "no key compares evaluations"),
        ({"greater_is_better": True, "early_stopping_patience": 2} | EVALUATED, None),
        ({"greater_is_better": True, "metric_for_best_model": "loss"} | EVALUATED, None),
        ({"greater_is_better": False} | EVALUATED, None),
    ],
    ids=str,
)
def test_keys_of_evaluation_that_change_nothing_say_so(keys, told):
    _, notes = make_config(MINIMAL | keys)
    assert [f"{next(iter(keys))}: true has no effect: {told}" in note for note in notes] == [True] * bool(told)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("optimizer", "AdamW", "nearest: adamw_torch_fused or adamw_torch"),
        ("optimizer", "SDG", "nearest: sgd"),
        ("lr_scheduler", "Cosine", "nearest: cosine or cosine_with_restarts"),
    ],
)
def test_a_choice_in_other_letters_names_the_nearest(key, value, hint):
    with pytest.raises(UserError) as caught:
        make_config(MINIMAL | {key: value})
    assert caught.value.hint.splitlines()[0] == hint
