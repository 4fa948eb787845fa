"""`tessera plan` as a shell sees it."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import tessera
from tessera.cli.main import app
from tessera.cli.plan import number_of_tokens
from tessera.config.load import load_config
from tessera.core.errors import UserError
from tessera.core.mesh import Mesh
from tessera.models.shapes import shape_of
from tessera.plan.choice import Layout
from tessera.plan.cluster import cluster_of
from tessera.plan.communication import estimate_communication_time
from tessera.plan.machine import shipped_profiles, written_profile
from tessera.plan.one_product import cuts_of, received_elements
from tessera.plan.recommend import judge, traced
from tessera.plan.work import machines_of
from train.runs import save_model

SHAPE = ("--sequence-len", "512", "--global-batch", "8", "--trace", "0")


def said(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", *words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model("llama 64", tmp_path_factory.mktemp("model")))


def test_a_plan_names_the_layouts_their_terms_and_a_config(folder, tmp_path):
    out = said(
        folder, "--cluster", "4xH100", *SHAPE, "--tokens", "1B", "--price", "2", "--output", str(tmp_path / "w.yaml")
    )
    for words in ("layouts of 4 devices", "time of a step", "memory at the peak", "device hours", "published figures"):
        assert words in out
    keys = yaml.safe_load((tmp_path / "w.yaml").read_text())
    assert keys["base_model"] == folder and keys["sequence_len"] == 512
    parts = ("dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size")
    product = 1
    for part in parts:
        product *= keys.get(part, 1)
    assert product == 4


def test_json_has_terms_that_add_up(folder):
    found = json.loads(said(folder, "--cluster", "4xH100", *SHAPE, "--json", "--top", "3"))
    assert 1 <= len(found["choices"]) <= 3 and found["considered"] > 10
    for choice in found["choices"]:
        assert sum(choice["terms"].values()) == pytest.approx(choice["seconds"])
        memory = choice["memory"]
        kinds = sum(memory[kind] for kind in ("states", "activations", "gathered", "working"))
        assert kinds == memory["total"]
    seconds = [choice["seconds"] for choice in found["choices"]]
    assert min(seconds) >= seconds[0] * 0.99


def test_the_best_is_traced(folder):
    out = said(folder, "--cluster", "2xH100", "--sequence-len", "64", "--global-batch", "4", "--trace", "1")
    assert "traced" in out


def test_a_config_is_judged_and_what_does_not_fit_is_told_what_to_turn(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base_model": "meta-llama/Llama-3.1-70B",
                "datasets": [{"path": "none.jsonl", "type": "alpaca"}],
                "dp_shard_size": 4,
                "tensor_parallel_size": 2,
                "sequence_len": 2048,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 4,
            }
        )
    )
    out = said(str(path), "--cluster", "8xA100-80")
    assert "does not fit, " in out and "GiB too much to fit surely; to lower the peak" in out
    assert "gradient_checkpointing: true saves" in out and "micro_batch_size: 1" in out
    assert "NCCL, beside the peak" in out and "by published figures" in out and "judged on" not in out
    small = said(str(path), "--cluster", "4xA100-80")
    four, eight = (str(cluster_of(text)) for text in ("4xA100-80", "2x4xA100-80"))
    told = f"the file's sizes make 8 ranks, and {four} has 4 devices: judged on as many machines as they need, {eight}"
    assert told in small
    found = json.loads(said(str(path), "--cluster", "4xA100-80", "--json"))
    assert (found["cluster"], found["devices"]) == (eight, 8) and told in found["notes"]
    assert found["library_buffers"] > 2**30


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("8B", "--cluster", "8xH1000", *SHAPE), "--cluster"),
        (("9B", "--cluster", "8xH100", *SHAPE), None),
        (("8B", "--cluster", "8x8xH100", "--sequence-len", "1", "--global-batch", "1"), "--cluster"),
        (("405B", "--cluster", "1xL40S", *SHAPE), "--cluster"),
        (("8B", "--cluster", "8xH100", *SHAPE, "--tokens", "many"), "--tokens"),
        *((("8B", *SHAPE, "--tokens", "1T", "--price", price), "--price") for price in ("-1", "nan", "inf")),
        (("8B", "--cluster", "8xH100", *SHAPE, "--dtype", "int8"), "--dtype"),
        (("8B", "--cluster", "Nx8xH100", *SHAPE), "--cluster"),
        (("8B", "--cluster", "8xH100", *SHAPE, "--target-tokens-per-second", "-5"), "--target-tokens-per-second"),
        (("nosuchmodel", "--cluster", "8xH100", *SHAPE, "--target-tokens-per-second", "5"), None),
        (("--matmul", "8,8"), "--matmul"),
        (("--matmul", "7,7,7", "--devices", "8"), "--devices"),
        ((), "MODEL"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_can(words, key):
    with pytest.raises(UserError) as error:
        said(*words)
    assert key is None or error.value.key == key
    assert error.value.hint


def test_one_product_is_cut_in_the_way_that_moves_least():
    cuts = cuts_of(4096, 8192, 2048, 16)
    assert cuts[0].received == min(cut.received for cut in cuts)
    for cut in cuts:
        if cut.depth == 1:
            moved = received_elements(4096, 8192, 2048, cut.row, cut.col, cut.inner)
            assert (cut.w, cut.x, cut.y, cut.replicas) == (moved["tokens"], moved["outputs"], moved["inputs"], 0)
        assert cut.inner * cut.depth * cut.row * cut.col == 16
    assert {cut.depth for cut in cuts} == {1, 2, 4, 8, 16}
    assert "copies W" in said("--matmul", "4096,8192,2048", "--devices", "16")


def test_the_classic_estimate_is_one_row_of_the_general_one():
    operand = 4 * 2048 * 8192 * 2
    classic = estimate_communication_time("all_reduce", operand, 8, collectives_per_block=4, bytes_per_second=300e9)
    assert classic.received_bytes == 2 * 7 * operand // 8
    assert classic.seconds_per_block == pytest.approx(4 * classic.received_bytes / 300e9)
    profile = shipped_profiles()["A100-80"]
    by_curve = estimate_communication_time("all_reduce", operand, 8, profile=profile)
    assert by_curve.seconds_per_collective > classic.received_bytes / 300e9
    apart = estimate_communication_time("all_reduce", operand, 8, machines=8, profile=profile)
    assert apart.seconds_per_collective > 5 * by_curve.seconds_per_collective
    assert estimate_communication_time("all_gather", operand, 1, profile=profile).seconds_per_block == 0


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "bytes_per_second"),
        ({"kind": "foo"}, "kind"),
        ({"ranks": 0}, "ranks"),
        ({"machines": 16}, "machines"),
        ({"operand_bytes": -1}, "operand_bytes"),
        ({"operand_bytes": 1.5}, "operand_bytes"),
        ({"collectives_per_block": -4}, "collectives_per_block"),
        ({"bytes_per_second": float("nan")}, "bytes_per_second"),
        ({"bytes_per_second": 0}, "bytes_per_second"),
        ({"bytes_per_second": "fast"}, "bytes_per_second"),
        ({"bytes_per_second": None, "profile": "H100"}, "profile"),
        ({"operand_bytes": 10**400}, "operand_bytes"),
    ],
    ids=str,
)
def test_an_estimate_of_no_collective_is_refused(values, key):
    usual = {"kind": "all_reduce", "operand_bytes": 2**20, "ranks": 8, "bytes_per_second": 300e9 if values else None}
    with pytest.raises(UserError) as error:
        estimate_communication_time(**usual | values)
    assert error.value.key == key and error.value.hint


@pytest.mark.parametrize(("key", "value"), [("model", None), ("cluster", 8), ("training", {}), ("config", "x")])
def test_what_is_no_model_cluster_or_training_is_refused(key, value):
    asked = {"model": "1B", "cluster": "1xA100-80", "training": tessera.Training(512, 8)} | {key: value}
    with pytest.raises(UserError) as error:
        tessera.plan(**asked)
    assert error.value.key == key and error.value.hint


def test_a_folder_may_be_a_path_and_sizes_numpy_s(folder):
    made = tessera.plan(Path(folder), "1xA100-80", tessera.Training(np.int64(64), np.int32(4)))
    assert yaml.safe_load(made.to_yaml())["sequence_len"] == 64


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sequence_len": 0}, "sequence_len"),
        ({"sequence_len": 4096.5}, "sequence_len"),
        ({"sequence_len": 2**40}, "sequence_len"),
        ({"global_batch": -1}, "global_batch"),
        ({"global_batch": True}, "global_batch"),
        ({"global_batch": 2**21}, "global_batch"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"stored": "int8"}, "stored"),
        ({"stored": "float16"}, "stored"),
        ({"dtype": "float32", "stored": "bfloat16"}, "stored"),
        ({"dtype": ["bfloat16"]}, "dtype"),
        ({"optim_args": {"foo": 1}}, "optim_args"),
        ({"optim_args": "none"}, "optim_args"),
        ({"optimizer": "muon", "optim_args": {"ns_steps": "five"}}, "optim_args"),
        ({"optimizer": "nope"}, "optimizer"),
        ({"top": 0}, "top"),
        ({"trace": -1}, "trace"),
    ],
    ids=str,
)
def test_from_python_what_cannot_be_planned_is_refused_too(values, key):
    asked = {"sequence_len": 4096, "global_batch": 8} | values
    options = {name: asked.pop(name) for name in ("top", "trace") if name in asked}
    with pytest.raises(UserError) as error:
        tessera.plan("1B", "1xA100-80", tessera.Training(**asked), **options)
    assert error.value.key == key and error.value.hint


def test_a_file_s_other_keys_are_kept_and_what_was_planned_stands(folder, tmp_path):
    given = tmp_path / "given.yaml"
    given.write_text("base_model: gpt2\nsequence_len: 64\nbf16: false\nlearning_rate: 1.0e-4\ndp_shard_size: 16\n")
    out = str(tmp_path / "w.yaml")
    asked = (folder, "--cluster", "2xH100", *SHAPE, "--config", str(given), "--output", out)
    said(*asked)
    assert yaml.safe_load((tmp_path / "w.yaml").read_text())["bf16"] is False, "the option was not given"
    said(*asked, "--dtype", "bfloat16")
    keys = yaml.safe_load((tmp_path / "w.yaml").read_text())
    assert (keys["base_model"], keys["sequence_len"], keys["bf16"], keys["learning_rate"]) == (folder, 512, True, 1e-4)
    assert keys.get("dp_shard_size", 1) <= 2


def test_a_step_of_the_file_is_planned(folder, tmp_path):
    """Its rows on all its data ranks, the dtype of its states, and what it asks of FSDP2 beside a layout."""
    given, out = tmp_path / "given.yaml", tmp_path / "w.yaml"
    keys = {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "dp_shard_size": 2, "bf16": "full"}
    keys |= {"sequence_len": 256, "fsdp_config": {"forward_prefetch": True, "reshard_after_forward": False}}
    given.write_text(yaml.safe_dump(keys))
    said(folder, "--cluster", "4xH100", "--config", str(given), "--output", str(out), "--trace", "0")
    made = yaml.safe_load(out.read_text())
    ranks = made.get("dp_shard_size", 1) * made.get("dp_replicate_size", 1)
    assert made["micro_batch_size"] * made["gradient_accumulation_steps"] * ranks == 16
    assert made["bf16"] == "full" and made["fsdp_config"]["forward_prefetch"] is True
    assert load_config(out)[0].full_bf16


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [\n", "is not YAML"),
        ("sequence_len: 4k\n", "sequence_len"),
        ("sequence_len: 0\n", "at least 1"),
        ("micro_batch_size: 3.5\n", "micro_batch_size"),
        ("full_bf16: true\n", "not a known key"),
        ("optimizer: muon\noptim_args: {ns_steps: abc}\n", "ns_steps"),
        ("- 1\n", "no mapping"),
    ],
)
def test_a_file_that_train_refuses_is_refused(folder, tmp_path, text, told):
    (tmp_path / "given.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        said(folder, "--cluster", "2xH100", "--config", str(tmp_path / "given.yaml"), "--trace", "0")


def test_what_the_host_has_no_room_for_does_not_fit(tmp_path):
    """405B's states on the hosts of eight GPUs: 756 GiB of the 256 that a GPU's part of its host is."""
    config = {"base_model": "405B", "datasets": [{"path": "x"}], "sequence_len": 512, "dp_shard_size": 8}
    config |= {"micro_batch_size": 1, "gradient_checkpointing": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"fsdp_config": {"offload_params": True}}))
    out = said(str(tmp_path / "c.yaml"), "--cluster", "8xH100")
    assert "does not fit" in out and "four fifths" in out
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    out = said(str(tmp_path / "c.yaml"), "--cluster", "8xH100")
    assert "offload_params: true cannot be: 756.0 GiB in host memory" in out
    assert "no change of these keys is enough" in out


def test_json_has_the_advice_too_and_a_full_host_is_said(tmp_path):
    config = {"base_model": "8B", "datasets": [{"path": "x"}], "sequence_len": 8192, "dp_shard_size": 8}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    found = json.loads(said(str(tmp_path / "c.yaml"), "--cluster", "8xRTX4090", "--json"))
    advice = found["advice"]
    assert advice["device_bytes_too_many"] > 0 and advice["host_bytes_too_many"] == 0
    assert any(each["saved"] > 0 and each["keys"] for each in advice["remedies"])
    assert "advice" not in json.loads(said(str(tmp_path / "c.yaml"), "--cluster", "8xB200", "--json"))
    small = replace(shipped_profiles()["H200"], host_memory_bytes=2**30)
    (tmp_path / "small.json").write_text(written_profile(small))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"fsdp_config": {"offload_params": True}}))
    out = said(str(tmp_path / "c.yaml"), "--cluster", "8xH200", "--profile", str(tmp_path / "small.json"))
    assert "GiB too much for the host" in out and "too much to fit surely" not in out


def test_float32_is_slower_by_the_peaks(folder):
    fast, slow = (
        tessera.plan(folder, "1xA100-80", tessera.Training(4096, 8, dtype)).best for dtype in ("bfloat16", "float32")
    )
    assert slow.time.products == pytest.approx(16 * fast.time.products, rel=0.05)
    assert slow.mfu < 1 and slow.band > fast.band


def test_the_smallest_cluster_that_reaches_a_rate_is_found(folder):
    training = ("--sequence-len", "512", "--global-batch", "48", "--trace", "0", "--json")
    one = json.loads(said(folder, "--cluster", "1xH100", *training))["choices"][0]["tokens_per_second"]
    found = json.loads(said(folder, "--cluster", "4xH100", *training, "--target-tokens-per-second", str(one * 0.9)))
    assert found["cluster"].startswith("1 × 1")
    with pytest.raises(UserError, match="tokens/s"):
        said(folder, "--cluster", "4xH100", *training, "--target-tokens-per-second", "1e14")


def test_scores_of_dropped_probabilities_are_counted():
    cluster, training = cluster_of("2xA100-80"), tessera.Training(1024, 8)
    layout = Layout({"shard": 2}, 4, 1)
    model = replace(shape_of("124M"), num_layers=4)
    assert model.attention_dropout > 0
    judged = traced(model, judge(model, layout, cluster, training))
    assert judged.peak.total == pytest.approx(judged.traced.peak.total, rel=0.03)
    without = judge(replace(model, attention_dropout=0.0), layout, cluster, training)
    assert judged.peak.total > 1.5 * without.peak.total
    assert judged.seconds > without.seconds


def test_a_group_that_begins_in_one_machine_and_ends_in_the_next_lies_on_both():
    for sizes, axes, per_machine, machines in (
        ({"shard": 2, "col": 8}, ("col",), 8, 1),
        ({"shard": 2, "col": 12}, ("col",), 8, 2),
        ({"col": 6, "shard": 4}, ("col",), 8, 2),
        ({"shard": 4, "col": 4}, ("shard",), 8, 2),
        ({"replicate": 3, "shard": 8}, ("replicate",), 8, 3),
    ):
        mesh = Mesh(sizes, rank=0)
        assert machines_of(axes, mesh, per_machine) == machines
        groups = ({rank // per_machine for rank in mesh.at(rank).members(axes)} for rank in range(mesh.world))
        assert max(map(len, groups)) == machines


def test_numbers_of_tokens():
    assert [number_of_tokens(text) for text in ("1T", "300B", "5e9", "2m")] == [1e12, 3e11, 5e9, 2e6]


def test_the_function_has_the_name_of_the_folder(folder):
    made = tessera.plan(folder, "2xH100", tessera.Training(64, 4))
    assert isinstance(made, tessera.Plan) and made.best.devices == 2
    from tessera.plan import traffic

    assert traffic.step_transfers and callable(tessera.plan)
    assert list(inspect.signature(tessera.plan).parameters) == [
        *("model", "cluster", "training", "top", "trace", "config")
    ]
