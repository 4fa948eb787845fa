"""Options of a size or a place that cannot be: refused with code 2 before anything is read, counted or written."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.core.errors import UserError

MODEL = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 32, "num_hidden_layers": 1}


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({**MODEL, "intermediate_size": 32}))
    (tmp_path / "run.yaml").write_text("base_model: m\ndatasets: [{path: a}]\ntensor_parallel_size: 2\n")
    return "run.yaml"


@pytest.mark.parametrize(
    ("arguments", "key", "said"),
    [
        (["launch", "run.yaml", "--slurm", "--output", "no/job.sh"], "--output", "does not exist"),
        (["launch", "run.yaml", "--slurm", "--output", "m"], "--output", "is a folder"),
        (["launch", "run.yaml", "--slurm", "--output", "a" * 300], "--output", "too long"),
        (["launch", "run.yaml", "--slurm", "--output", "/proc/job.sh"], "--output", ""),
        (["launch", "/dev/fd/0", "--slurm"], "config file", ""),
        (["inspect", "run.yaml", "--picture", "run.yaml/a.svg"], "--picture", "does not exist"),
        (["inspect", "run.yaml", "--picture", "a" * 300 + ".svg"], "--picture", "too long"),
        (["verify", "run.yaml", "--json", "no/report"], "--json", "does not exist"),
        (["count", "--output", "run.yaml/x"], "--output", "is no folder"),
        (["count", "--output", "/proc/x/y", "--ranks", "2"], "--output", ""),
        (["count", "--ranks", "100000000000"], "--ranks", "each from 1 to 262144"),
        (["count", "--ranks", "9" * 5000], "--ranks", "each from 1 to 262144"),
        (["count", "--ranks", ",".join(map(str, range(1, 100)))], "--ranks", "at most 64"),
        (["count", "--memory", "nan"], "--memory", "is not the memory of a device"),
        (["count", "--memory", "inf"], "--memory", "is not the memory of a device"),
        (["count", "--model", "~nosuchuser"], "base_model", "no user nosuchuser"),
        (["convert", "a" * 300, "to"], "FROM", "too long"),
        (["convert", "m", "to", "--max-shard-size", "9" * 400 + "GB"], "--max-shard-size", "is not a size"),
        (["train", "run.yaml", "--max-steps", "9" * 30], "max_steps", "must be at most"),
        (["inspect", "run.yaml", "--set", "dp_replicate_size=4096"], "processes", "at most 4,096"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_the_option_is_named(arguments, key, said, config):
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.key == key and said in str(result.exception)
    assert len(str(result.exception)) < 1500
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml", "--num-processes"],
        ["train", "run.yaml", "--nproc-per-node"],
        ["train", "run.yaml", "--num-machines"],
        ["train", "run.yaml", "--machine-rank"],
        ["launch", "run.yaml", "--slurm", "--nodes"],
        ["launch", "run.yaml", "--slurm", "--gpus-per-node"],
        ["verify", "run.yaml", "--all-layouts"],
        ["count", "--layers"],
        ["count", "--batch"],
        ["count", "--sequence"],
    ],
    ids=" ".join,
)
def test_numbers_of_the_command_line_have_bounds(arguments, config):
    for number in ("10000000000000", "9" * 5000, "nan"):
        assert CliRunner().invoke(app, [*arguments, number]).exit_code == 2
