"""Runs of real processes on machines that lack something: open files, shared memory, a home, the right to read."""

import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.forked import tessera
from train.runs import Workshop, command, environment, metrics, run

pytestmark = pytest.mark.slow


def without_much() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_few_open_files_little_shared_memory_and_a_home_that_is_read_only(workshop: Workshop, tmp_path):
    if shutil.which("unshare") is None or os.geteuid():
        pytest.skip("mounting needs root and unshare")
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=3, save_steps=1)
    (tmp_path / "home").mkdir()
    mounts = f"mount -t tmpfs -o size=16k tmpfs /dev/shm && mount -t tmpfs -o ro tmpfs {tmp_path}/home"
    words = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command(settings)]
    around = environment() | {"HOME": str(tmp_path / "home")}
    done = subprocess.run(words, env=around, capture_output=True, text=True, preexec_fn=without_much)
    if "permission denied" in done.stderr and not (tmp_path / "run").exists():
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    whole = settings | {"output_dir": str(tmp_path / "whole")}
    assert [m["loss"] for m in metrics(settings)] == [m["loss"] for m in run(whole)]


def files_of(settings: dict[str, Any]) -> list[Path]:
    output, model = Path(settings["output_dir"]), Path(settings["base_model"])
    inside = [path for path in output.rglob("*") if path.is_file()]
    return sorted([*inside, *(path for path in model.iterdir() if path.is_file())])


def test_no_file_of_a_run_that_cannot_be_read_ends_in_a_traceback(workshop: Workshop, tmp_path):
    """Each in turn is another user's: refused by name, or not needed."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    model = tmp_path / "model"
    shutil.copytree(workshop.model("llama"), model)
    settings = workshop.settings("llama", tmp_path / "run", base_model=str(model), max_steps=2, save_steps=1)
    settings |= {"save_strategy": "steps", "auto_resume_from_checkpoints": True}
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(settings["datasets"][0]["path"], rows)
    settings["datasets"] = [settings["datasets"][0] | {"path": str(rows)}]
    run(settings)
    words = command(settings, "--set", "max_steps=3")[3:]
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "run", kept)
    for folder in (tmp_path, *tmp_path.parents):  # another user comes as far as here
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o011)
    codes = {}
    for file in [*files_of(settings), rows]:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(kept, tmp_path / "run")
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
        os.chown(file, 0, 0)
        mode = file.stat().st_mode
        file.chmod(0o600)
        done = tessera(*words, user=65534)
        file.chmod(mode)
        codes[str(file.relative_to(tmp_path))] = done.codes[0]
        assert done.codes[0] in (0, 1, 2) and "Traceback" not in done.err[0], (file, done.err[0])
        assert done.codes[0] == 0 or file.name in done.err[0], (file, done.err[0])
    assert set(codes.values()) >= {0, 2}, codes
