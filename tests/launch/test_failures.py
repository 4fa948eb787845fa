"""How runs end that do not end well: mistakes of the user, signals, a killed rank, a loss that is not a number."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.hub_models import rewritten
from support.forked import Running, start, tessera
from support.pool import pool
from tessera.checkpoint.folder import latest
from tessera.cli.main import main
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.launch import launch
from tessera.train.run import resolve
from train.runs import Workshop, command, environment, exported, metrics, refusal_on_rank, run

# ---- Mistakes of the user: exit code 2, one message, nothing written, no process started


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`tessera train` in this process with ranks that must not be started; its exit code and complaint."""

    def start(args, processes, *how):
        raise AssertionError("a process was started")

    def call(settings: dict[str, Any], *options: str) -> tuple[int, str]:
        words = command(settings, *options)
        monkeypatch.setattr("sys.argv", ["tessera", *words[3:]])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    monkeypatch.setattr(launch, "run_workers", start)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return call


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5000)


def garble_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"x" * 40)


def drop_tensor(folder: Path) -> None:
    with rewritten(folder / "model.safetensors") as tensors:
        del tensors["model.layers.1.mlp.up_proj.weight"]


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def nothing(folder: Path) -> None:
    pass


MISTAKES: dict[str, tuple[Callable[[Path], None], dict[str, Any], list[str]]] = {
    "an unknown key": (nothing, {"gradient_acumulation_steps": 2}, ["nearest: gradient_accumulation_steps"]),
    "a wrong type": (nothing, {"max_steps": "many"}, ["max_steps: many", "a whole number"]),
    "heads that do not divide": (
        nothing,
        {"tensor_parallel_size": 3},
        ["tensor_parallel_size: 3", "num_attention_heads = 8", "2 or 4 fits", "num_attention_heads 6 or 9"],
    ),
    "an ffn that does not divide": (
        edit_config(intermediate_size=44),
        {"tensor_parallel_size": 8},
        ["tensor_parallel_size: 8", "intermediate_size = 44", "4", "intermediate_size 40 or 48"],
    ),
    "hidden that heads do not divide": (
        edit_config(hidden_size=36, head_dim=None),
        {},
        ["config.json", "hidden_size", "36", "32 or 40"],
    ),
    "no safetensors": (remove_weights, {}, ["has no weights: neither model.safetensors", "random_init: true"]),
    "truncated safetensors": (
        cut_weights,
        {},
        ["model.safetensors", "is truncated: tensor model.", "ends at byte"],
    ),
    "corrupt safetensors": (garble_weights, {}, ["model.safetensors", "header cannot be parsed"]),
    "a missing tensor": (drop_tensor, {}, ["the weights lack the tensor model.layers.1.mlp.up_proj.weight"]),
    "a wrong shape": (
        edit_config(intermediate_size=40),
        {},
        ["model.safetensors", "model.layers.0.mlp.gate_proj.weight", "[48, 32]", "[40, 32]"],
    ),
    "an empty data set": (nothing, {"datasets": [{"path": "/dev/null"}]}, ["datasets", "/dev/null"]),
    "a missing data set": (nothing, {"datasets": [{"path": "nowhere.jsonl"}]}, ["datasets", "nowhere.jsonl"]),
    "a token outside the vocabulary": (
        edit_config(vocab_size=100),
        {"random_init": True},
        ["datasets", "line", "is outside the model's vocabulary of 100"],
    ),
    "too many positions": (nothing, {"case": "gpt2", "sequence_len": 64}, ["sequence_len: 64", "at most 32"]),
    "a world that is not the product": (
        nothing,
        {"tensor_parallel_size": 2, "--num-processes": "3"},
        ["--num-processes: 3", "does not divide by dp_replicate_size × tensor axes = 2", "use 2 or 4 processes"],
    ),
    "nothing to resume": (nothing, {"resume_from_checkpoint": True}, ["holds no whole checkpoint"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_happens(workshop: Workshop, tmp_path, cli, mistake):
    damage, changes, told = MISTAKES[mistake]
    changes = {"tensor_parallel_size": 2} | changes
    folder = tmp_path / "model"
    shutil.copytree(workshop.model(changes.pop("case", "llama")), folder)
    damage(folder)
    options = [w for key in list(changes) if key.startswith("--") for w in (key, changes.pop(key))]
    settings = workshop.settings("llama", tmp_path / "run", base_model=str(folder)) | changes
    code, err = cli(settings, *options)
    assert code == 2, err
    for text in told:
        assert text in err
    assert "Traceback" not in err and len(err.splitlines()) <= 5, err
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("model", "run.yaml")] == []


def test_a_mistake_in_a_shell(workshop: Workshop, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(workshop.model("llama"), folder)
    cut_weights(folder)
    settings = workshop.settings("llama", tmp_path / "run", base_model=str(folder), tensor_parallel_size=2)
    done = tessera(*command(settings)[3:])
    assert done.codes == [2]
    assert "is truncated: tensor" in done.err[0] and "Traceback" not in done.err[0]
    assert not (tmp_path / "run").exists()


# ---- Signals


def wait_for(true: Callable[[], object], process: "Running | subprocess.Popen[str]") -> None:
    """Up to two minutes; a machine may be busy."""
    for _ in range(12_000):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def wait_for_a_step(settings: dict[str, Any], run: "Running | subprocess.Popen[str]") -> None:
    """Until it has done a step, when it is far from its last."""
    log = Path(settings["output_dir"]) / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, run)


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank that `launcher` started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


@pytest.fixture(scope="module")
def long_settings(workshop: Workshop, tmp_path_factory) -> dict[str, Any]:
    """A run whose steps take a while."""
    long = {"max_steps": 8, "gradient_accumulation_steps": 12, "shuffle": True, "tensor_parallel_size": 2}
    return workshop.settings("gpt2 dropout", tmp_path_factory.mktemp("long") / "run", **long)


def test_a_stopped_run_saves_and_goes_on_as_if_it_had_not_stopped(long_settings, tmp_path):
    settings = long_settings | {"output_dir": str(tmp_path / "run")}
    process = start(*command(settings)[3:], variables=environment())
    wait_for_a_step(settings, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    done = metrics(settings)[-1]["step"]
    assert 1 <= done < settings["max_steps"]
    assert f"stopped after step {done}; saved {tmp_path}/run/checkpoint-{done}" in out
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == [f"checkpoint-{done}"]
    assert not (tmp_path / "run" / "model.safetensors").exists()

    found = run(settings | {"resume_from_checkpoint": True})
    want = run(long_settings)
    assert [m["step"] for m in found] == [m["step"] for m in want]
    assert [(m["loss"], m["grad_norm"]) for m in found] == [(m["loss"], m["grad_norm"]) for m in want]
    left, right = exported(settings), exported(long_settings)
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_a_run_whose_terminal_is_closed_saves_though_a_rank_was_held(long_settings, tmp_path):
    """Nobody reads what it prints; SIGSTOP holds rank 0; then SIGHUP: the rank is woken, and saves."""
    settings = long_settings | {"output_dir": str(tmp_path / "run"), "max_steps": 10_000}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(settings), env=environment(), **pipes)
    wait_for_a_step(settings, process)
    assert process.stdout is not None
    process.stdout.close()
    before = len(metrics(settings))
    wait_for(lambda: len(metrics(settings)) > before + 1, process)
    os.kill(rank_process(process.pid, 0), signal.SIGSTOP)
    process.send_signal(signal.SIGHUP)
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == "stopping: the ranks save and exit; a second signal kills them\n"
    assert latest(tmp_path / "run") == tmp_path / f"run/checkpoint-{metrics(settings)[-1]['step']}"


def test_a_killed_rank_ends_the_run_and_is_named(long_settings, tmp_path):
    settings = long_settings | {"output_dir": str(tmp_path / "run"), "max_steps": 10_000}
    process = start(*command(settings)[3:], variables=environment())
    wait_for_a_step(settings, process)
    victim = rank_process(process.pid, 1)
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    print(f"ended after {time.monotonic() - began:.2f} s")
    assert process.returncode == 1
    assert re.match(rf"rank 1 \(process {victim}\) in step \d+, [a-z]+, was killed by SIGKILL\n", err), err
    assert "  the kernel does that when memory runs out\n  what lowers the peak of a rank most" in err
    assert "Traceback" not in err


# ---- A loss that is not a number


def test_weights_that_are_not_finite_stop_the_command_at_its_first_step(workshop: Workshop, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(workshop.model("llama"), folder)
    with rewritten(folder / "model.safetensors") as tensors:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("inf")
    settings = workshop.settings("llama", tmp_path / "run", base_model=str(folder), tensor_parallel_size=2)
    done = tessera(*command(settings)[3:], ranks=2)
    assert done.codes == [1, 1] and done.err[0] == done.err[1]
    told = done.err[0]
    assert told.startswith("step 1: loss nan, gradient norm nan; the weights were not updated")
    for cause in ("learning_rate: 0.001", "warm-up (2 steps)", "max_grad_norm: 1.0", "bf16: False"):
        assert cause in told
    assert "none was saved (save_steps)" in told and "Traceback" not in told
    assert metrics(settings) == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_diverged_run_keeps_its_last_checkpoint(workshop: Workshop, tmp_path, size):
    own = {"tensor_parallel_size": size, "max_steps": 3, "save_steps": 3, "lr_scheduler": "constant"}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    del settings["warmup_steps"]
    before = run(settings)
    diverging = settings | {"resume_from_checkpoint": True, "max_steps": 9, "learning_rate": 1e30}
    told = pool(size).run(refusal_on_rank, diverging)
    assert len(set(told)) == 1, "every rank says the same"
    assert told[0].startswith("step 5: loss ") and "learning_rate: 1e+30" in told[0]
    assert told[0].endswith(f"last good checkpoint: {tmp_path}/run/checkpoint-3")
    found = metrics(settings)
    assert found[:3] == before and [m["step"] for m in found] == [1, 2, 3, 4]
    assert run(settings | {"resume_from_checkpoint": True, "max_steps": 4})[3]["loss"] == found[3]["loss"]


@pytest.mark.parametrize("size", [1, 2])
def test_spoilt_weights_are_neither_saved_nor_handed_out(workshop: Workshop, tmp_path, size):
    """A finite step whose update is not: the checkpoint before it stays the last good one."""
    own = {"tensor_parallel_size": size, "max_steps": 1, "save_steps": 1, "lr_scheduler": "constant"}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    del settings["warmup_steps"]
    run(settings)
    spoiling = settings | {"resume_from_checkpoint": True, "learning_rate": 1e39}
    told = pool(size).run(refusal_on_rank, spoiling | {"max_steps": 5, "save_total_limit": 1})[0]
    assert told.startswith("step 2: the update made weights that are not finite")
    assert told.endswith("/run/checkpoint-1")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert (
        pool(size).run(refusal_on_rank, spoiling | {"max_steps": 2, "save_steps": None})[0].startswith("step 2: the up")
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_source_of_the_weights_is_not_overwritten(workshop: Workshop):
    settings = workshop.settings("llama", workshop.model("llama"))
    with pytest.raises(UserError, match=r"output_dir: .*\n.*base_model"):
        resolve(TrainConfig.model_validate(settings))


def test_a_step_without_a_target_leaves_the_weights_alone(workshop: Workshop, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}\n{"input_ids": [1, 2], "labels": [-100, -100]}\n'
    )
    own = {"datasets": [{"path": str(rows)}], "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 2}
    settings = workshop.settings("llama", tmp_path / "run", lr_scheduler="constant", **own)
    del settings["warmup_steps"]
    both = run(settings)
    after_two = exported(settings)
    run(settings | {"max_steps": 1})
    assert both[1]["tokens"] == both[0]["tokens"] == 1 and both[1]["grad_norm"] == 0
    assert all(torch.equal(tensor, exported(settings)[name]) for name, tensor in after_two.items())


def test_a_held_out_loss_that_is_not_finite_stops_the_run(workshop: Workshop, tmp_path):
    """The last update has ruined the weights, and no loss of a later step would tell."""
    own = {"max_steps": 1, "val_set_size": 3, "lr_scheduler": "constant", "learning_rate": 1e39}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    del settings["warmup_steps"]
    (told,) = pool(1).run(refusal_on_rank, settings)
    assert told.startswith("step 1: eval_loss nan\n") and "learning_rate: 1e+39" in told
    assert not (tmp_path / "run" / "model.safetensors").exists()
