"""Saves beside the training: what they leave, what damages are found, and how they fail."""

import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from support.disk import small_disk as small_disk
from support.forked import forkserver
from support.pool import pool
from tessera.checkpoint import folder as checkpoint_folder
from tessera.checkpoint.folder import latest, read_state, verify
from tessera.checkpoint.resumed import differences
from tessera.checkpoint.saver import HostCopies
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.train.run import checkpoint_to_resume
from train.on_rank import (
    failing_on_rank,
    limited_on_rank,
    said_on_rank,
    slow_save_on_rank,
    stopped_on_rank,
    train_on_rank,
)
from train.runs import Metrics, Workshop, forget_last, metrics, refusal_on_rank, run


@pytest.fixture(scope="module")
def done(workshop: Workshop, tmp_path_factory) -> dict[str, Any]:
    """A run of two ranks with checkpoints 2 and 4, killed before its last one."""
    output = tmp_path_factory.mktemp("done") / "run"
    settings = workshop.settings("gpt2 dropout", output, save_steps=2, shuffle=True, tensor_parallel_size=2)
    run(settings)
    forget_last(settings)
    return settings


@pytest.fixture
def copied(done, tmp_path) -> dict[str, Any]:
    shutil.copytree(done["output_dir"], tmp_path / "run")
    return done | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": True}


def losses(found: Metrics) -> list[tuple[float, float]]:
    return [(m["loss"], m["grad_norm"]) for m in found]


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*checkpoint*"))


# ---- What a save leaves


def test_what_a_checkpoint_holds(done):
    output = Path(done["output_dir"])
    assert (output / "LATEST").read_text() == "checkpoint-4\n"
    assert not list(output.glob(".*")), "nothing half-written stays"
    folder = output / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "state.json",
        "SHA256SUMS",
    }
    state = read_state(folder)
    tokens = metrics(done)[3]["tokens"]
    assert (state.step, state.tokens, state.samples, state.seed, state.skipped) == (4, tokens, 24, 42, 0)
    assert state.config == TrainConfig.model_validate(done).model_dump(mode="json")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_the_sums_are_those_of_sha256sum(done):
    folder = Path(done["output_dir"]) / "checkpoint-4"
    told = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) == 4


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_during_a_save_and_does_not_reach_it(workshop: Workshop, tmp_path, size):
    """The checkpoint of step 3 is copied slowly and written after step 4; it is that of a save that was waited for."""
    own = {"tensor_parallel_size": size, "save_steps": 1, "max_steps": 4, "shuffle": True}
    settings = workshop.settings("gpt2 dropout", tmp_path / "slow", **own)
    with_one = settings | {"save_steps": 3}  # a next save would wait for this one
    pool(size).run(slow_save_on_rank, with_one, 3, 4)
    assert names(tmp_path / "slow") == ["checkpoint-3", "checkpoint-4"]
    waiting = settings | {"save_async": False, "output_dir": str(tmp_path / "blocking")}
    run(waiting)
    assert names(tmp_path / "blocking") == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    one, other = (checkpoint_folder.read_sums(tmp_path / name / "checkpoint-3") for name in ("slow", "blocking"))
    tensors = [name for name in one if name.endswith(".distcp")]
    assert len(tensors) == size and all(one[name] == other[name] for name in tensors)
    assert losses(metrics(with_one)) == losses(metrics(waiting))


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_leaves_a_checkpoint_of_its_last_step(workshop: Workshop, tmp_path, size):
    """Without save_steps too; the run may be made longer, with the numbers of one that was so from the beginning."""
    own = {"tensor_parallel_size": size, "save_strategy": "steps", "lr_scheduler": "constant", "warmup_steps": 0}
    settings = workshop.settings("gpt2 dropout", tmp_path / "run", **own, max_steps=2)
    with patch.object(HostCopies, "stage") as staged:
        if size == 1:
            run(settings)
            staged.assert_not_called()  # nothing trains beside the last save
        else:
            pool(size).run(train_on_rank, settings)
    assert names(tmp_path / "run") == ["checkpoint-2"] and latest(tmp_path / "run") == tmp_path / "run/checkpoint-2"
    verify(tmp_path / "run/checkpoint-2")
    longer = {"max_steps": 4, "resume_from_checkpoint": True}
    found = run(settings | longer)
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    whole = run(settings | {"max_steps": 4, "output_dir": str(tmp_path / "whole"), "save_strategy": "no"})
    assert losses(found) == losses(whole) and names(tmp_path / "whole") == []


def test_a_finished_run_says_so_and_saves_nothing_again(workshop: Workshop, tmp_path):
    settings = workshop.settings("gpt2", tmp_path / "run", save_strategy="steps", max_steps=2)
    run(settings)
    made = (tmp_path / "run/checkpoint-2/state.json").stat().st_mtime_ns
    said = pool(1).run(said_on_rank, settings | {"resume_from_checkpoint": True})[0]
    assert "this run is finished" in said and len(metrics(settings)) == 2
    assert (tmp_path / "run/checkpoint-2/state.json").stat().st_mtime_ns == made
    assert names(tmp_path / "run") == ["checkpoint-2"]


def test_a_checkpoint_at_the_end_of_each_epoch(workshop: Workshop, tmp_path):
    """26 rows in steps of 6: the steps that see the last row of an epoch are the 5th and the 9th."""
    own = {"save_strategy": "epoch", "max_steps": None, "num_epochs": 2.5, "save_total_limit": 3}
    run(workshop.settings("gpt2", tmp_path / "run", **own))
    assert names(tmp_path / "run") == ["checkpoint-11", "checkpoint-5", "checkpoint-9"]


def test_latest_decides_where_a_run_goes_on(copied):
    output, config = Path(copied["output_dir"]), TrainConfig.model_validate(copied)
    (output / "LATEST").write_text("checkpoint-2\n")
    assert checkpoint_to_resume(config) == output / "checkpoint-2"
    (output / "checkpoint-2/state.json").unlink()
    assert checkpoint_to_resume(config) == output / "checkpoint-4"
    for nothing in (b"checkpoint-9\n", b"", b"\xff\xfe"):
        (output / "LATEST").write_bytes(nothing)
        assert checkpoint_to_resume(config) == output / "checkpoint-4"


def test_the_one_that_latest_names_is_never_rotated_away(done, tmp_path):
    for step in (2, 30, 40):
        shutil.copytree(Path(done["output_dir"]) / "checkpoint-2", tmp_path / f"checkpoint-{step}")
    assert checkpoint_folder.rotate(tmp_path, tmp_path / "checkpoint-2", keep=2) == []
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-40"]


def test_a_run_killed_while_it_removes_an_old_checkpoint_leaves_nothing_for_good(done, tmp_path, monkeypatch):
    """Half removed it is no checkpoint, and the next save takes the rest away."""
    for step in (2, 4):
        shutil.copytree(Path(done["output_dir"]) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")

    def killed(folder: Path) -> None:
        (folder / "__0_0.distcp").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        checkpoint_folder.rotate(tmp_path, tmp_path / "checkpoint-4", keep=1)
    assert names(tmp_path) == [".checkpoint-2.removed.part", "checkpoint-4"]
    assert latest(tmp_path) == tmp_path / "checkpoint-4"
    checkpoint_folder.discard_parts(tmp_path)
    assert names(tmp_path) == ["checkpoint-4"]


# ---- Damage


def flip(file: Path, position: int, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("name", [".metadata", "state.json", "SHA256SUMS", "__0_0.distcp", "__1_0.distcp"])
def test_a_flipped_bit_anywhere_is_found_and_the_file_named(done, tmp_path, name):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(Path(done["output_dir"]) / "checkpoint-4", folder)
    read_state(folder)
    verify(folder)
    size, dice = (folder / name).stat().st_size, random.Random(name)
    for position in [0, 1, size // 2, size - 2, size - 1, *(dice.randrange(size) for _ in range(15))]:
        bit = dice.randrange(8)
        flip(folder / name, position, bit)
        told = f"{name} is damaged|SHA256SUMS: " if name == "SHA256SUMS" else f"{name} does not match SHA256SUMS"
        with pytest.raises(UserError, match=told):
            read_state(folder)
            verify(folder)
        flip(folder / name, position, bit)
    verify(folder)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_every_rank_refuses_damage_that_one_of_them_finds(copied, name):
    folder = Path(copied["output_dir"]) / "checkpoint-4"
    flip(folder / name, (folder / name).stat().st_size // 2, 3)
    told = pool(2).run(refusal_on_rank, copied)
    assert len(set(told)) == 1
    assert told[0].startswith(f"resume_from_checkpoint: {folder}\n  checkpoint-4/{name} does not match SHA256SUMS")
    assert told[0].endswith("others there: checkpoint-2")


def test_damage_that_is_not_found_would_change_the_run(done, copied):
    """The tests above can fail: with sums that fit, the altered tensor is loaded and the numbers are others."""
    folder = Path(copied["output_dir"]) / "checkpoint-4"
    assert losses(run(copied))[4] == losses(metrics(done))[4]
    forget_last(copied)
    content = (folder / "__0_0.distcp").read_bytes()
    first = content.index(b"data/0") + 256  # within the bytes of a tensor
    for position in range(first - first % 4, first + 400, 4):
        flip(folder / "__0_0.distcp", position + 2, 6)  # a bit of the mantissa
    checkpoint_folder.write_sums(folder, checkpoint_folder.sums_of(folder, checkpoint_folder.read_sums(folder)))
    assert losses(run(copied))[4] != losses(metrics(done))[4]


# ---- Saves that fail


def test_a_failed_save_is_told_and_the_next_one_made(workshop: Workshop, tmp_path):
    own = {"tensor_parallel_size": 2, "save_steps": 1, "save_total_limit": 2}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    said = pool(2).run(failing_on_rank, settings, {2, 3}, 1)
    last = f"the last whole checkpoint is {tmp_path}/run/checkpoint-1"
    for step in (2, 3):
        line = f"checkpoint-{step} was not saved: rank 1: no space is left on the disk; {last}"
        assert line in said[0].splitlines()
    assert said[1] == ""
    assert names(tmp_path / "run") == ["checkpoint-4", "checkpoint-5"]
    assert not list((tmp_path / "run").glob(".*.part"))
    assert [m["step"] for m in metrics(settings)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_last_save_that_fails_fails_the_run(workshop: Workshop, tmp_path, asynchronous):
    own = {"tensor_parallel_size": 2, "save_steps": 2, "max_steps": 4, "save_async": asynchronous}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    said = pool(2).run(failing_on_rank, settings, {4}, 0)
    told = "checkpoint-4 was not saved: rank 0: no space is left on the disk; the last whole checkpoint is"
    assert all(f"RunFailed: {told} {tmp_path}/run/checkpoint-2" in text for text in said)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert (tmp_path / "run/LATEST").read_text() == "checkpoint-2\n"
    assert (tmp_path / "run/model.safetensors").exists(), "the trained model was not handed out"


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_asked_to_stop_waits_for_its_checkpoint(workshop: Workshop, tmp_path, fails):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2)
    said = pool(2).run(stopped_on_rank, settings, 3, fails)
    if fails:
        told = "RunFailed: stopped after step 3: checkpoint-3 was not saved: rank 1: no space is left on the disk"
        assert all(told in text and "there is no whole checkpoint" in text for text in said)
        assert not names(tmp_path / "run") and not (tmp_path / "run/model.safetensors").exists()
        assert all(f"the weights alone are in {tmp_path}/run/model-after-step-3" in text for text in said)
        assert load_file(tmp_path / "run/model-after-step-3/model.safetensors")
    else:
        assert f"stopped after step 3; saved {tmp_path}/run/checkpoint-3" in said[0]
        verify(tmp_path / "run/checkpoint-3")


def test_a_file_that_may_not_grow(workshop: Workshop, tmp_path):
    """A real error of write(2), in the middle of a tensor."""
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, save_steps=2)
    said = pool(2).run(limited_on_rank, settings, 2, 40_000)
    assert "checkpoint-2 was not saved: rank 1: " in said[0] and "there is no whole checkpoint" in said[0]
    assert names(tmp_path / "run") == ["checkpoint-4", "checkpoint-5"]


def test_a_full_disk(workshop: Workshop, small_disk):
    """The first checkpoint fits and stays whole; every later one is tried, told and removed."""
    settings = workshop.settings("llama", small_disk / "run", save_steps=1, max_steps=4)
    (said,) = pool(1).run(said_on_rank, settings | {"max_steps": 3, "save_steps": 3})
    one = sum(file.stat().st_size for file in (small_disk / "run/checkpoint-3").iterdir())
    shutil.rmtree(small_disk / "run/checkpoint-3")
    (small_disk / "run/model.safetensors").unlink()
    free = shutil.disk_usage(small_disk).free
    with (small_disk / "ballast").open("wb") as file:
        file.write(b"\0" * int(free - 1.7 * one))
    (said,) = pool(1).run(said_on_rank, settings)
    told = [line for line in said.splitlines() if "was not saved" in line and not line.startswith("RunFailed")]
    assert [line.partition(" ")[0] for line in told] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"], said
    assert all(f"the last whole checkpoint is {small_disk}/run/checkpoint-1" in line for line in told)
    assert "no space is left on the disk, " in told[0] and " are needed, " in told[0]
    assert "RunFailed: checkpoint-4 was not saved" in said
    assert names(small_disk / "run") == ["checkpoint-1"]
    verify(small_disk / "run/checkpoint-1")


# ---- Killed


@pytest.mark.parametrize("moment", range(5))
def test_a_run_killed_during_a_save_leaves_a_whole_checkpoint(workshop: Workshop, tmp_path, moment):
    """At any moment after the first commit LATEST's checkpoint is whole, to the last bit."""
    settings = workshop.settings("llama", tmp_path / "run", save_steps=1, save_total_limit=1, max_steps=100_000)
    process = forkserver().Process(target=train_on_rank, args=(settings,))
    process.start()
    end = time.monotonic() + 60
    while not (tmp_path / "run/LATEST").exists() and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(random.Random(moment).uniform(0, 0.08))
    process.kill()
    process.join()
    resume = latest(tmp_path / "run")
    assert resume is not None
    read_state(resume)
    verify(resume)
    step = int(resume.name.partition("-")[2])
    found = run(settings | {"resume_from_checkpoint": True, "max_steps": step + 1})
    assert [m["step"] for m in found] == list(range(1, step + 2))
    assert not list((tmp_path / "run").glob(".*.part")) and names(tmp_path / "run") == [f"checkpoint-{step + 1}"]


# ---- What a resumed run does differently


def test_a_resumed_run_says_what_is_not_as_it_was(copied):
    changes = {"learning_rate": 1e-4, "max_steps": 6, "save_steps": 3, "logging_steps": 2, "tensor_parallel_size": 1}
    changes |= {"seed": 7, "micro_batch_size": 4}
    (said,) = pool(1).run(said_on_rank, copied | changes)
    told = [line for line in said.splitlines() if line.startswith("resuming")]
    assert told == [
        "resuming with seed: 7, the checkpoint was made with 42",
        "resuming with micro_batch_size: 4, the checkpoint was made with 3",
        "resuming with max_steps: 6, the checkpoint was made with 5",
        "resuming with learning_rate: 0.0001, the checkpoint was made with 0.001",
        "resuming with samples_per_step: 8, the checkpoint was made with 6",
        "resuming with steps: 6, the checkpoint was made with 5",
    ]


def test_every_key_of_the_course_and_the_numbers_is_said_and_only_those(done):
    """All keys but those of layout, logging and saving; each to another value."""
    then = TrainConfig.model_validate(done).model_dump(mode="json")
    defaults = {key: field.get_default() for key, field in TrainConfig.model_fields.items()}
    said = {key for key in then if differences(then, then | {key: "another"}, defaults)}
    assert said >= {
        "base_model", "datasets", "sequence_len", "shuffle", "seed", "val_set_size",
        "micro_batch_size", "gradient_accumulation_steps", "num_epochs", "max_steps",
        "optimizer", "learning_rate", "lr_scheduler", "warmup_steps", "warmup_ratio", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor",
        "bf16", "tf32", "nonfinite_step",
    }  # fmt: skip
    assert not said & {
        "output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "save_async",
        "check_replicas_steps", "resume_from_checkpoint", "auto_resume_from_checkpoints",
        "dp_shard_size", "dp_replicate_size",
        "tensor_parallel_size", "tensor_parallel_mode", "sequence_parallel", "group_timeout_minutes",
    }  # fmt: skip


def test_differences_of_versions_that_know_other_keys():
    then = {"seed": 1, "from_the_future": [3], "max_steps": None, "save_strategy": "no", "fsdp_size": 4}
    now = {"seed": 2, "max_steps": 5, "save_strategy": "steps", "new": 7, "newer": 0, "tensor_parallel_size": 2}
    assert differences(then, now, {"new": 6, "newer": 0}) == [
        "resuming with seed: 2, the checkpoint was made with 1",
        "resuming with max_steps: 5, the checkpoint was made with unset",
        "resuming with new: 7, the checkpoint was made with 6",
        "resuming without from_the_future, the checkpoint was made with [3]",
    ]
    assert differences({}, now, {}) == []


def test_differences_are_shown_as_a_file_has_them():
    then, now = {"num_epochs": 1.5, "tf32": True, "a": 1e300}, {"num_epochs": 45.0, "tf32": False, "a": 0.1}
    assert differences(then, now, {}) == [
        "resuming with num_epochs: 45, the checkpoint was made with 1.5",
        "resuming with tf32: false, the checkpoint was made with true",
        "resuming with a: 0.1, the checkpoint was made with 1e+300",
    ]
