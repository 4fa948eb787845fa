"""The commands as a shell sees them. A stand-in for the trainer says what it was given, or fails as told."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tessera
from tessera.core.errors import UserError
from tessera.launch.launch import launch

CONFIG = "base_model: m\ndatasets: [{path: a.txt}]\n"
STAND_INS = """
import json, os, sys, types
class Run:
    def __init__(self, content):
        self.content, self.config, self.model = content, types.SimpleNamespace(output_dir="output"), None
    def going_on_from(self, checkpoint): return self
    def to_json(self): return json.dumps(self.content)
    @classmethod
    def from_json(cls, text): return cls(json.loads(text))
def prepared_run(config, processes, lock=None):
    print("checked", os.environ.get("RANK"), processes, flush=True)
    if os.environ["FAKE"] == "refused":
        raise UserError("base_model", config.base_model, "is not there")
    return Run({"base_model": config.base_model, "max_steps": config.max_steps})
def train(run, store=None):
    print("trained", os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), run.content["max_steps"], flush=True)
    if os.environ["FAKE"] == "user error":
        raise UserError("base_model", run.content["base_model"], "does not fit")
    if os.environ["FAKE"] == "run failed":
        from tessera.core.errors import RunFailed
        raise RunFailed("the loss is not a number")
class UserError(__import__("tessera.core.errors").core.errors.UserError): pass
run = {"Run": Run, "prepared_run": prepared_run, "check": prepared_run, "check_gpus": lambda processes: None}
for name, content in (("trainer", {"train": train}), ("run", run)):
    sys.modules[f"tessera.train.{name}"] = module = types.ModuleType(name)
    vars(module).update(content)
"""


def run(command: list[str], folder: Path, fake: str = "") -> "subprocess.CompletedProcess[str]":
    (folder / "sitecustomize.py").write_text(STAND_INS)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "COLUMNS")}
    env |= {"PYTHONPATH": f"{folder}:{Path(tessera.__file__).parents[1]}", "FAKE": fake, "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def write_config(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def called(monkeypatch) -> list[tuple[str, object]]:
    """What `launch` called in this process, instead of the real checks and trainer."""
    calls: list[tuple[str, object]] = []
    trainer, checks = types.ModuleType("trainer"), types.ModuleType("run")
    trainer.train = lambda config: calls.append(("train", config.seed))  # type: ignore[attr-defined]

    def prepared_run(config, processes, lock):
        calls.append(("prepared", processes))
        return config

    checks.prepared_run = prepared_run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tessera.train.trainer", trainer)
    monkeypatch.setitem(sys.modules, "tessera.train.run", checks)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_package_and_the_help_load_nothing_heavy():
    code = """
import sys, tessera
assert tessera.__version__ == "0.1.0"
sys.argv = ["tessera", sys.argv[1]]
from tessera.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "tokenizers", "matplotlib", "yaml", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""
    for option, said in (("--help", "demo-memory"), ("--version", "tessera 0.1.0")):
        result = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout


def test_public_names_are_found_and_others_are_not():
    assert tessera.TrainConfig.__module__ == "tessera.config.schema"
    assert tessera.UserError is UserError
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tessera.nothing


def test_the_schema_is_printed_as_json(tmp_path):
    result = run(["-m", "tessera", "config-schema"], tmp_path)
    assert json.loads(result.stdout)["properties"]["sequence_len"]["default"] == 2048


def test_a_mistake_ends_with_its_message_and_code_2(tmp_path):
    path = write_config(tmp_path, CONFIG + "micro_batch_sise: 2\n")
    result = run(["-m", "tessera", "train", str(path)], tmp_path)
    assert result.returncode == 2
    assert "micro_batch_sise: 2\n" in result.stderr and "nearest: micro_batch_size" in result.stderr
    assert "Traceback" not in result.stderr and "\x1b" not in result.stderr
    assert result.stdout == ""


def test_fsdp_keys_of_a_run_of_one_process_are_told_to_do_nothing(tmp_path, called, capsys):
    launch(write_config(tmp_path), ["fsdp_config.offload_params=true"])
    assert "fsdp_config.offload_params has no effect: there is one data-parallel process" in capsys.readouterr().out


def test_one_process_is_checked_and_trains_here(tmp_path, called, capsys):
    launch(write_config(tmp_path), ["seed=7", "xformers_attention=true"])
    assert called == [("prepared", 1), ("train", 7)]
    out = capsys.readouterr().out
    assert "xformers_attention: true has no effect" in out
    assert re.search(r"^defaults: \d+ keys \(tessera config show lists them\)$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) < 150


@pytest.mark.parametrize(
    ("processes", "sizes", "reason"),
    [
        (3, ["tensor_parallel_size=2"], "does not divide by .* = 2\n.*use 2 or 4 processes"),
        (2, ["dp_shard_size=1"], "make 1: no axis above 1\n.*use 1 processes, or leave dp_shard_size out"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_before_anything(tmp_path, called, processes, sizes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        launch(write_config(tmp_path), sizes, processes)
    assert caught.value.key == "--num-processes"
    assert called == []


def test_the_command_starts_its_own_ranks(tmp_path):
    path = write_config(tmp_path)
    command = ["-m", "tessera", "train", str(path), "--num-processes", "2", "--max-steps", "3"]
    result = run([*command, "--set", "tensor_parallel_size=2"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if "default" not in line] == [
        "checked None 2",
        "trained 0 2 3",
    ]


@pytest.mark.parametrize(
    ("fake", "code", "told"),
    [
        ("user error", 2, "base_model: m\n  does not fit\n"),
        pytest.param("run failed", 1, "the loss is not a number\n", marks=pytest.mark.slow),
    ],
)
def test_what_the_ranks_have_to_say_is_told_once(tmp_path, fake, code, told):
    path = write_config(tmp_path)
    result = run(["-m", "tessera", "train", str(path), "--set", "tensor_parallel_size=2"], tmp_path, fake)
    assert (result.returncode, result.stderr) == (code, told)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tessera"]


def test_under_torchrun_rank_0_makes_the_run_for_all(tmp_path):
    path = write_config(tmp_path, CONFIG + "tensor_parallel_size: 2\n")
    result = run([*TORCHRUN, "train", str(path)], tmp_path)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if "default" not in line]
    assert sorted(said) == ["checked 0 2", "trained 0 2 None", "trained 1 2 None"]
