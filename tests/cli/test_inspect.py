"""`tessera inspect` as a shell sees it, and in this process: one config.json and a YAML file are all it needs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tessera.cli.inspect import inspect
from tessera.core.errors import UserError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 509,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
CONFIG = """\
base_model: {folder}
datasets: [{{path: does-not-exist.txt}}]
sequence_len: 12
micro_batch_size: 8
bf16: false
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=model))
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return path


def layout(mode: str, size: int, **more: object) -> list[str]:
    settings = {"tensor_parallel_mode": mode, "tensor_parallel_size": size, **more}
    return [f"{key}={value}" for key, value in settings.items()]


def reported(
    config: Path, capsys: Any, *overrides: str, weight: str | None = None, activation: str | None = None
) -> dict[str, Any]:
    inspect(config, overrides, weight, activation, None, True)
    return json.loads(capsys.readouterr().out)


def test_the_command_fits_a_hundred_columns_and_writes_nothing(config):
    command = [sys.executable, "-m", "tessera", "inspect", str(config)]
    for setting in layout("3d", 8):
        command += ["--set", setting]
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in result.stdout
    assert lines[:2] == [
        "3d: inner 2 × row 2 × col 2 = 8 ranks, schedule gather",
        "rank = (inner · 2 + row) · 2 + col",
    ]
    for said in ("layers.0–2.mlp.up.weight", "[out: col][in: inner, row]", "S(1) S(1) S(0)", "1/8 of the matrices"):
        assert said in result.stdout
    assert "on average: embedding.weight, head.weight do not divide evenly" in " ".join(result.stdout.split())
    assert list(Path().iterdir()) == []  # the current folder


def test_the_memory_table_ends_with_the_peak_in_words(config, capsys, monkeypatch):
    def said(*overrides: str) -> str:
        inspect(config, overrides, None, None, None, False)
        return " ".join(capsys.readouterr().out.split())

    line = r"the peak of a rank is about ([\d.]+) (\w+), by formula: states [\d.]+ \w+ \+ activations [\d.]+ \w+"
    units = {"KiB": 2**10, "MiB": 2**20}
    ((alone, of_alone),) = re.findall(line, said())
    ((tensors, of_tensors),) = re.findall(line, said("tensor_parallel_size=4"))
    assert 2.5 < float(alone) * units[of_alone] / (float(tensors) * units[of_tensors]) < 4.5
    assert re.search(r"all 1[\d,]+ 1[\d,]+( [\d.]+ [KM]iB){4}", said()), "the last column too is for people"
    sharded = said("dp_shard_size=4")
    assert re.search(r"\+ gathered weights [\d.]+ KiB \+ work in progress", sharded) and "fit" not in sharded
    offloaded = reported(config, capsys, "dp_shard_size=4", "fsdp_config.offload_params=true")["peak"]
    kinds = ("states", "activations", "gathered", "working")
    assert offloaded["states"] == 0 and offloaded["total"] == sum(offloaded[kind] for kind in kinds)
    for gib, told in ((80, "; it fits in this device's 80 GiB"), (1, "; it may fit in this device's 1 GiB")):
        monkeypatch.setattr("tessera.core.device.memory_bytes", lambda device, gib=gib: gib * 2**30)
        assert told in said()


def test_json_has_every_parameter_total_block_and_collective(config, capsys):
    report = reported(config, capsys, *layout("2.5d", 8), weight="layers.1.attention.q.weight")
    assert report["ranks"] == 8 and report["mesh"] == {
        "replicate": 1,
        "shard": 1,
        "ring": 1,
        "ulysses": 1,
        "inner": 1,
        "depth": 2,
        "row": 2,
        "col": 2,
    }
    by_name = {parameter["name"]: parameter for parameter in report["parameters"]}
    assert len(by_name) == 3 * 9 + 3
    assert by_name["layers.2.mlp.down.weight"] == {
        "name": "layers.2.mlp.down.weight",
        "shape": [64, 96],
        "cut": "[out: row][in: col]",
        "placements": {"depth": "R", "row": "S(0)", "col": "S(1)"},
        "least_local_shape": [32, 48],
        "most_local_shape": [32, 48],
        "local_shapes_by_rank": [[32, 48]] * 8,
        "bytes_by_rank": [32 * 48 * 4] * 8,
        "copies": 2,
        "gradient_summed_over": ["depth"],
    }
    embedding = by_name["embedding.weight"]
    assert embedding["least_local_shape"] == [254, 32]
    assert embedding["local_shapes_by_rank"] == [[255, 32], [254, 32]] * 4  # 509 rows over col, the innermost axis
    assert embedding["bytes_by_rank"] == [255 * 32 * 4, 254 * 32 * 4] * 4
    totals = report["totals"]
    matrices = totals["matrices, embeddings"]
    assert report["matrices_are_one_of"] == 4
    assert sum(matrices["elements_by_rank"]) * 4 == matrices["elements"] * 8
    assert totals["all"]["parameter_bytes_by_rank"] == [4 * n for n in totals["all"]["elements_by_rank"]]
    assert report["blocks"][0]["of"] == "layers.1.attention.q.weight"
    assert report["blocks"][0]["ranks"] == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]
    assert [block["of"] for block in report["blocks"][1:]] == ["residual stream", "hidden stream"]
    rows = report["collectives"]
    weights = [row for row in rows if row["what"] == "W" and row["site"] == "down" and row["pass"] == "forward"]
    [row] = weights
    one_rank = 32 * 48 * 4  # bytes: what the other rank of `row` sends
    assert (row["kind"], row["axes"], row["received_bytes"]) == (
        "all_gather",
        ["row"],
        {"least": one_rank, "most": one_rank},
    )
    assert {row["axes"][0] for row in rows if row["site"] == "gradients"} == {"depth"}


def test_shared_sequences_are_said_drawn_and_refused(config, capsys, tmp_path):
    overrides = ["context_parallel_size=4", "ulysses_size=2", "tensor_parallel_size=2", "micro_batch_size=1"]
    inspect(config, overrides, None, None, tmp_path / "a.svg", False, "7,3")
    said = capsys.readouterr().out
    for words in (
        "context: 4 ranks = ulysses 2 × exchange 2, as ulysses_size says",
        "who has which tokens of a stream (16 tokens, 3 documents, 1 row), and computes which tiles",
        "attention: queries ↓, keys →",
        "all-to-all",
    ):
        assert words in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 100
    assert 'id="panel4-rank7"' in (tmp_path / "a.svg").read_text()
    inspect(config, overrides, None, None, None, True, "7,3")
    found = json.loads(capsys.readouterr().out)["sequences"]
    assert found["document_bounds"] == [0, 7, 10, 16] and found["streams"] == 1
    assert [share["ranks"] for share in found["shares"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sum(share["pairs_a_head"] for share in found["shares"]) == 2 * 3 * (28 + 6 + 21)  # two a place, three layers
    for documents in ("7,x", "0", "7,6", ""):
        with pytest.raises(UserError, match="--documents"):
            inspect(config, overrides, None, None, None, True, documents)
    with pytest.raises(UserError, match="in this layout none do"):
        inspect(config, ["tensor_parallel_size=2"], None, None, None, True, "7,3")
    assert reported(config, capsys, "tensor_parallel_size=2")["sequences"] is None


def test_switches_of_the_config_change_what_is_said(config, capsys):
    kinds = {}
    for schedule in ("gather", "summa", "cannon"):
        report = reported(config, capsys, *layout("2d", 4, tensor_parallel_schedule=schedule))
        kinds[schedule] = {row["kind"] for row in report["collectives"] if row["site"] == "q·k·v"}
        norm = next(p for p in report["parameters"] if p["name"] == "norm.weight")
        assert norm["cut"] == ("[h]" if schedule == "gather" else "[h: col]")
    assert kinds == {"gather": {"all_gather", "reduce_scatter"}, "summa": {"broadcast", "reduce"}, "cannon": {"shift"}}
    shard = reported(config, capsys, *layout("2.5d", 8, tensor_parallel_depth_weights="shard"))
    assert shard["matrices_are_one_of"] == 8


def test_attention_by_heads_is_a_stream_of_its_own(config, capsys):
    by_heads = ["tensor_parallel_mesh={inner: 2, row: 1, col: 1}", "tensor_parallel_mode=3d", "micro_batch_size=1"]
    report = reported(config, capsys, *by_heads)
    cuts = {stream["name"]: stream["cut"] for stream in report["streams"]}
    assert cuts["hidden stream in attention"] == "[T][heads: inner]" != cuts["hidden stream"] == "[T: inner][ffn]"


def test_streams_are_counted_in_the_dtype_of_products(config, capsys):
    report = reported(config, capsys, *layout("1d", 2), "bf16=true")
    norm = next(p for p in report["parameters"] if p["name"] == "norm.weight")
    [residual] = [stream for stream in report["streams"] if stream["name"] == "residual stream"]
    assert norm["bytes_by_rank"] == [64 * 4] * 2  # held in float32
    assert residual["bytes_by_rank"] == [8 * 12 // 2 * 64 * 2] * 2


# name → what it is called, its rows and columns as [first, last + 1], and who holds each block, in 2d 2 × 2
ACTIVATIONS = {
    "residual": ("residual stream", 24, 64, [[[0]], [[1]], [[2]], [[3]]]),
    "q": ("q", 48, 32, [[[0], [1]], [[2], [3]]]),
    "k": ("k", 48, 8, [[[0], [1]], [[2], [3]]]),
    "v": ("v", 48, 8, [[[0], [1]], [[2], [3]]]),
    "attention": ("hidden stream in attention", 48, 32, [[[0], [1]], [[2], [3]]]),
    "gate": ("gate", 48, 48, [[[0], [1]], [[2], [3]]]),
    "up": ("up", 48, 48, [[[0], [1]], [[2], [3]]]),
    "hidden": ("hidden stream", 48, 48, [[[0], [1]], [[2], [3]]]),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_activation_is_pictured_by_name(config, tmp_path, capsys, activation):
    title, rows, columns, ranks = ACTIVATIONS[activation]
    report = reported(config, capsys, *layout("2d", 4), activation=activation)
    weight, block = report["blocks"]
    assert weight["of"] == "layers.0.mlp.up.weight"
    assert block == {
        "of": title,
        "rows": [[first * rows, (first + 1) * rows] for first in range(len(ranks))],
        "columns": [[first * columns, (first + 1) * columns] for first in range(len(ranks[0]))],
        "ranks": ranks,
    }
    names = [stream["name"] for stream in report["streams"]]
    assert names == list(dict.fromkeys(["residual stream", "hidden stream", title]))
    inspect(config, layout("2d", 4), None, activation, tmp_path / "a.svg", False)
    _, _, pictures = capsys.readouterr().out.partition("who holds which block")
    titles = pictures.splitlines()[2]
    assert re.split(" {3,}", titles.strip()) == ["the mesh", "layers.0.mlp.up.weight", title]
    drawing = (tmp_path / "a.svg").read_text()
    assert f">{title}<" in drawing
    assert 'id="panel2-rank' in drawing and 'id="panel3-rank' not in drawing  # the mesh, the weight, the activation


def test_bytes_that_differ_from_rank_to_rank_are_a_range(config, capsys):
    inspect(config, layout("2d", 4), None, None, None, False)
    lines = capsys.readouterr().out.splitlines()
    bytes_of = {}
    for name in ("embedding.weight", "layers.0–2.mlp.up.weight"):
        place = next(i for i, line in enumerate(lines) if line.startswith(name))
        bytes_of[name] = [re.findall(r"[\d.]+ (?:to|KiB)", line) for line in lines[place : place + 2]]
    assert bytes_of == {
        "embedding.weight": [["31.8 to", "31.8 to", "63.5 to"], ["31.9 KiB", "31.9 KiB", "63.8 KiB"]],
        "layers.0–2.mlp.up.weight": [["6 KiB", "6 KiB", "12 KiB"], []],
    }


def test_the_picture_is_drawn_and_one_process_is_shown_too(config, tmp_path, capsys):
    inspect(config, layout("2d", 4), "norm.weight", None, tmp_path / "norm.svg", False)
    assert f"drawn into {tmp_path / 'norm.svg'}" in capsys.readouterr().out.replace("\n", "")
    assert "norm.weight" in (tmp_path / "norm.svg").read_text()
    inspect(config, [], None, None, None, False)
    alone = capsys.readouterr().out
    assert alone.startswith("1d: one process") and "collectives" not in alone


@pytest.mark.parametrize(
    ("options", "overrides", "key", "said"),
    [
        ({"weight": "layers.0.mlp.upp.weight"}, [], "--weight", "layers.0.mlp.up.weight"),
        ({"weight": "wte"}, [], "--weight", "nearest: "),
        ({"activation": "mlp"}, [], "--activation", "there are: residual, q, k, v, attention, gate, up, hidden"),
        ({"picture": Path("a.pdf")}, [], "--picture", ".svg, .png"),
        ({"picture": Path("nowhere/a.svg")}, [], "--picture", "does not exist"),
        ({}, layout("3d", 6), "tensor_parallel_size", "cube"),
        ({}, layout("1d", 5), "tensor_parallel_size", "heads"),
        ({}, ["base_model=nowhere/at/all"], "base_model", "no such folder"),
    ],
)
def test_mistakes_are_named_and_nothing_is_drawn(config, options, overrides, key, said):
    asked = {"weight": None, "activation": None, "picture": Path("a.svg")} | options
    with pytest.raises(UserError) as caught:
        inspect(config, overrides, **asked, as_json=False)
    assert caught.value.key == key and said in str(caught.value)
    assert list(Path().iterdir()) == []


HSDP = """\
base_model: meta-llama/Llama-3.1-70B
dp_shard_size: 4
dp_replicate_size: 2
tensor_parallel_size: 2
fsdp_version: 2
datasets: [{path: ./alpaca.jsonl, type: alpaca}]
sequence_len: 4096
"""
"""What ../shared/configs/two_nodes_16gpu.yaml says of model and layout."""


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("tessera.models.hub.download", lambda *_: pytest.fail("the hub was asked"))


def test_a_public_model_needs_no_files_and_no_network(tmp_path, monkeypatch, capsys, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(HSDP)
    report = reported(tmp_path / "run.yaml", capsys)
    assert report["ranks"] == 16 and report["totals"]["all"]["elements"] == 70_553_706_496
    assert report["matrices_are_one_of"] == 8
    tokens = reported(tmp_path / "run.yaml", capsys, "tokens=[a, b, c]", "tensor_parallel_size=1")
    assert tokens["totals"]["all"]["elements"] == 70_553_706_496 + 3 * 2 * 8192  # each may be a new row of both tables


def test_a_model_is_inspected_by_name_size_or_folder(config, capsys, no_network):
    for name in ("135M", "huggingfacetb/smollm2-135m"):
        report = reported(name, capsys, "tensor_parallel_size=3")
        assert report["ranks"] == 3 and report["totals"]["all"]["elements"] == 134_515_008
    assert reported("gpt2", capsys)["streams"][0]["shape"][0] == 1024, "rows no longer than its positions"
    folder = config.parent / "model"
    assert (
        reported(folder, capsys, *layout("2d", 4))["parameters"]
        == reported(config, capsys, *layout("2d", 4), "micro_batch_size=1")["parameters"]
    )
    for wrong, key in (("9B", "model"), ("no/such.yaml", "config file"), ("run", "config file")):
        with pytest.raises(UserError) as caught:
            inspect(wrong, [], None, None, None, True)
        assert caught.value.key == key


CONFIGS = Path(__file__).parents[3] / "shared" / "configs"


@pytest.mark.slow
@pytest.mark.skipif(not CONFIGS.is_dir(), reason=f"{CONFIGS} is not there")
def test_the_neighbours_configs_are_inspected_by_the_names_they_give(tmp_path, monkeypatch, capsys, no_network):
    monkeypatch.chdir(tmp_path)
    seen = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        if "base_model: ./" not in path.read_text():
            seen[path.stem] = reported(path, capsys)["ranks"]
    assert seen == {"four_d_32gpu": 32, "llama70b_8gpu": 8, "long_context_8gpu": 8, "two_nodes_16gpu": 16}
