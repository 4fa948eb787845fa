"""Runs whose files cannot be written, at each moment: what is told, what is kept, and that the run then goes on."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.disk import few_files as few_files
from support.disk import leave_free
from support.disk import small_disk as small_disk
from support.pool import pool
from tessera.checkpoint.folder import latest, verify
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.train.notes import Notes
from tessera.train.output import FILES, check_output
from tessera.train.run import resolve
from train.on_rank import said_on_rank
from train.runs import Workshop, exported, metrics, run
from train.writes_on_rank import (
    failing_end_on_rank,
    failing_export_on_rank,
    filling_on_rank,
    removing_on_rank,
    unloggable_on_rank,
)

FULL = "no space is left on the disk"


def hidden(output: Path) -> list[str]:
    """What a failed write may have left."""
    return [path.name for path in output.glob(".*")]


@pytest.fixture(scope="module")
def whole(workshop: Workshop, tmp_path_factory) -> dict[str, Any]:
    """A run of five steps that nothing has disturbed."""
    own = {"shuffle": True, "save_steps": 2, "logging_steps": 1}
    settings = workshop.settings("llama", tmp_path_factory.mktemp("whole") / "run", **own)
    run(settings)
    return settings


def goes_on(settings: dict[str, Any], whole: dict[str, Any]) -> None:
    """Started again with room, the run ends as one that nothing has disturbed."""
    found = run(settings | {"auto_resume_from_checkpoints": True})
    assert [m["loss"] for m in found] == [m["loss"] for m in metrics(whole)]
    assert all(torch.equal(tensor, exported(settings)[name]) for name, tensor in exported(whole).items())


@pytest.mark.parametrize(
    "free, where",
    [
        (4096, "prepare"),
        (24_576, "log"),
        (300_000, "save"),
        (800_000, "save"),
        (1_240_000, "export"),
    ],
)
def test_a_disk_that_is_full_at_any_moment(workshop: Workshop, whole, small_disk, free, where):
    settings = whole | {"output_dir": str(small_disk / "run")}
    leave_free(small_disk, free)
    (said,) = pool(1).run(said_on_rank, settings)
    print(said)
    assert "Error: " in said or "RunFailed: " in said
    assert FULL in said.replace("\n", " ") or where == "log"
    assert not hidden(small_disk / "run")
    if kept := latest(small_disk / "run"):
        verify(kept)
    (small_disk / "ballast").unlink()
    goes_on(settings, whole)


def test_no_inode_is_left(workshop: Workshop, whole, few_files):
    """Full of files, not of bytes."""
    settings = whole | {"output_dir": str(few_files / "run")}
    (said,) = pool(1).run(said_on_rank, settings)
    assert "no inode is left on the disk: it has too many files" in said
    assert not hidden(few_files / "run")


@pytest.mark.parametrize(
    ("size", "number", "reason"),
    [
        (1, errno.EDQUOT, "the quota of disk space is used up"),
        (1, errno.EIO, "the disk reports an error"),
        (2, errno.EACCES, "permission denied"),
    ],
)
def test_a_checkpoint_is_left_where_the_model_cannot_be_written(workshop: Workshop, tmp_path, size, number, reason):
    """Where no checkpoint was wanted, too; and the model is written by the next start, or elsewhere by convert."""
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=size, max_steps=2, save_strategy="no")
    said = pool(size).run(failing_export_on_rank, settings, OSError(number, os.strerror(number)))
    kept = tmp_path / "run/checkpoint-2"
    for text in said:
        assert f"RunFailed: the model was not written: {tmp_path}/run/.export/model.safetensors: {reason}" in text
        assert f"the trained weights are kept in {kept}: " in text and f"tessera convert {kept} FOLDER" in text
    verify(kept)
    assert not hidden(tmp_path / "run") and not (tmp_path / "run/model.safetensors").exists()
    run(settings | {"resume_from_checkpoint": True})
    model = exported(settings)
    shutil.rmtree(tmp_path / "run")
    run(settings)
    assert all(torch.equal(tensor, model[name]) for name, tensor in exported(settings).items())


def test_no_checkpoint_is_made_of_the_best_weights_and_the_last_step(workshop: Workshop, tmp_path):
    """The greater loss is the better here: an early step is the best, whose model cannot be written."""
    best = {"load_best_model_at_end": True, "greater_is_better": True, "val_set_size": 4, "eval_steps": 1}
    own = {"max_steps": 3, "save_strategy": "best", "learning_rate": 1e-2}
    settings = workshop.settings("llama", tmp_path / "run", **best | own)
    (said,) = pool(1).run(failing_end_on_rank, settings, OSError(errno.EIO, "x"))
    losses = [m["eval_loss"] for m in metrics(settings)]
    kept = tmp_path / f"run/checkpoint-{1 + losses.index(max(losses))}"
    assert kept.name != "checkpoint-3" and latest(tmp_path / "run") == kept
    assert f"its weights are kept in {kept}: " in said and "checkpoint-3 was not saved" in said
    assert not (tmp_path / "run/checkpoint-3").exists()


@pytest.mark.parametrize("size", [1, 2])
def test_a_folder_that_is_removed_while_the_run_goes(workshop: Workshop, tmp_path, size):
    """The run stops, leaves a checkpoint in a new folder and says what has happened."""
    own = {"tensor_parallel_size": size, "save_steps": 1, "val_set_size": 3, "eval_steps": 1}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    said, _ = pool(size).run(removing_on_rank, settings, 3)[0]
    gone = f"{tmp_path}/run was removed or renamed while the run was going"
    assert f"RunFailed: {gone}" in said
    step = int(said.partition("saved " + str(tmp_path / "run/checkpoint-"))[2].split()[0])
    assert 3 <= step < 5
    verify(tmp_path / f"run/checkpoint-{step}")
    found = run(settings | {"resume_from_checkpoint": True})
    assert found[-1]["step"] == 5 and exported(settings)


def test_numbers_that_cannot_be_logged_are_logged_later(whole, tmp_path, small_disk):
    """The disk is full during steps 2 and 3: nothing is lost, and that it was is told once."""
    settings = whole | {"output_dir": str(small_disk / "run"), "save_steps": None}
    said, err = pool(1).run(filling_on_rank, settings, small_disk, 2, 4)[0]
    assert "RunFailed" not in said
    assert err.count("training goes on") == 1 and err.count(FULL) == 1 and "is written now" in err
    assert [m["loss"] for m in metrics(settings)] == [m["loss"] for m in metrics(whole)]


def test_notes_are_whole_or_not_there(small_disk):
    told: list[str] = []
    notes = Notes(small_disk, told.append)
    notes.append("log", "a")
    leave_free(small_disk, 0)
    notes.append("log", "b" * 5000)
    notes.write("whole", "c")
    notes.append("log", "d")
    assert (small_disk / "log").read_text() == "a\n" and not (small_disk / "whole").exists()
    assert not hidden(small_disk)
    assert notes.missing().startswith(f"log and whole could not be written: {small_disk}")
    (small_disk / "ballast").unlink()
    assert notes.missing() == "" and len(told) == 2
    assert (small_disk / "log").read_text() == "a\n" + "b" * 5000 + "\nd\n" and (small_disk / "whole").exists()


def test_lines_that_are_never_written_end_the_run_with_1(workshop: Workshop, tmp_path):
    """The run goes on without its log; its model is written."""
    settings = workshop.settings("llama", tmp_path / "run", max_steps=2)
    said, err = pool(1).run(unloggable_on_rank, settings)[0]
    assert f"model written to {tmp_path}/run" in said and exported(settings)
    assert f"RunFailed: metrics.jsonl could not be written: {tmp_path}/run/metrics.jsonl: is a folder" in said
    assert err.count("training goes on") == 1


@pytest.mark.parametrize("left", ["file", "link", "folder"])
def test_what_lies_where_a_model_is_written_aside_is_no_obstacle(workshop: Workshop, tmp_path, left):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    aside = tmp_path / "run/.export"
    {"file": aside.touch, "link": lambda: aside.symlink_to(tmp_path / "elsewhere"), "folder": aside.mkdir}[left]()
    run(settings)
    assert exported(settings) and not hidden(tmp_path / "run") and (tmp_path / "elsewhere/kept").exists()


# ---- Before the run


def refusal(settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        resolve(TrainConfig.model_validate(settings))
    return str(refused.value)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_or_a_pipe_where_a_file_is_written_is_refused(workshop: Workshop, tmp_path, name):
    settings = workshop.settings("llama", tmp_path / "run")
    (tmp_path / "run" / name).mkdir(parents=True)
    assert refusal(settings).startswith(f"output_dir: {tmp_path}/run/{name}\n  is a folder, where a run writes a file")
    (tmp_path / "run" / name).rmdir()
    os.mkfifo(tmp_path / "run" / name)
    assert "is no regular file, where a run writes a file" in refusal(settings)


def test_an_output_dir_that_cannot_be_one_is_refused(workshop: Workshop, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    reasons = {
        "file": "is a file",
        "file/run": f"cannot be made: {tmp_path}/file is a file",
        "link": "is a link that leads nowhere",
    }
    for name, reason in reasons.items():
        told = refusal(workshop.settings("llama", tmp_path / name))
        assert told.splitlines()[1:] == [f"  {reason}", "  choose another output_dir"], told


def test_a_checkpoint_that_cannot_be_read_is_refused_and_no_reason_to_begin_anew(tmp_path, monkeypatch):
    output = tmp_path / "run"
    (output / "checkpoint-4").mkdir(parents=True)
    check_output(output)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, how: Path(path).name != "checkpoint-4" and allowed(path, how))
    with pytest.raises(UserError, match="checkpoint-4\n  permission denied"):
        check_output(output)


def test_a_byte_that_is_no_text_in_an_older_log_is_no_obstacle(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=2, save_steps=2)
    run(settings)
    log = tmp_path / "run/metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 2, "\xff": 0}\n')
    found = run(settings | {"max_steps": 3, "resume_from_checkpoint": True})
    assert [m["step"] for m in found] == [1, 2, 3]
