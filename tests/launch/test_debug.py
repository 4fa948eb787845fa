"""What NCCL_DEBUG and its like make the ranks print is kept by rank; without them nothing is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.launch.debug import asked, output_kept
from train.runs import Workshop, command, environment

VARIABLES = (
    "NCCL_DEBUG NCCL_DEBUG_FILE TORCH_DISTRIBUTED_DEBUG TORCH_CPP_LOG_LEVEL GLOO_LOG_LEVEL TORCH_LOGS RANK "
    "TORCH_FR_BUFFER_SIZE TORCH_FR_DUMP_TEMP_FILE TORCH_NCCL_TRACE_BUFFER_SIZE TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
)


@pytest.fixture
def shell(monkeypatch) -> pytest.MonkeyPatch:
    """A shell without any of these variables, in which a test sets some."""
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_ranks_keep_what_they_print_where_a_variable_makes_them(workshop: Workshop, tmp_path):
    """Real processes: torch reads these variables when it is imported."""
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=1)
    variables = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TORCH_CPP_LOG_LEVEL": "INFO"}
    words = command(settings)
    run = subprocess.run(words, env=environment() | variables, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "run" / "debug"
    told = f"TORCH_DISTRIBUTED_DEBUG, TORCH_CPP_LOG_LEVEL: what each rank prints is kept in {folder}/rank-N.log"
    assert run.stdout.count(told) == 1
    assert {path.name for path in folder.iterdir()} == {"rank-0.log", "rank-1.log"}
    for rank in (0, 1):
        text = (folder / f"rank-{rank}.log").read_text()
        assert "ProcessGroupGloo" in text or "ProcessGroupWrapper" in text, text
        assert f"[rank{rank}]" in text or f"Rank {rank}" in text, "another rank's"


def test_what_c_and_python_write_is_kept_and_python_is_still_seen(shell, tmp_path, capfd):
    shell.setenv("NCCL_DEBUG", "INFO")
    shell.setenv("RANK", "3")
    for _ in range(2):  # a restart goes on with the file
        with output_kept(tmp_path):
            os.write(2, b"from C\n")
            print("from Python", file=sys.stderr)
            subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
    print("afterwards", file=sys.stderr)
    os.write(2, b"from C afterwards\n")
    own = f"---- process {os.getpid()}\nfrom C\nfrom Python\nfrom a child\n"
    assert (tmp_path / "debug/rank-3.log").read_text() == 2 * own
    out, err = capfd.readouterr()
    assert err == "from Python\nfrom Python\nafterwards\nfrom C afterwards\n"
    assert out == "", "rank 0 says where it goes"


def test_libraries_with_files_of_their_own_are_told_where(shell, tmp_path):
    output = tmp_path / "100%"
    shell.setenv("NCCL_DEBUG", "INFO")
    shell.setenv("TORCH_FR_BUFFER_SIZE", "2000")
    shell.setenv("TORCH_FR_DUMP_TEMP_FILE", "mine")
    with output_kept(output):
        assert os.environ["NCCL_DEBUG_FILE"] == f"{tmp_path}/100%%/debug/rank-0-nccl-%p.log"  # NCCL reads %% as %
        assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{output}/debug/collectives-rank-"
        assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "mine"
    assert "NCCL_DEBUG_FILE" not in os.environ
    shell.setenv("NCCL_DEBUG_FILE", "theirs")
    with output_kept(output):
        assert os.environ["NCCL_DEBUG_FILE"] == "theirs"


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, []),
        ({"NCCL_DEBUG": ""}, []),
        ({"NCCL_DEBUG_SUBSYS": "COLL"}, []),
        ({"TORCH_CPP_LOG_LEVEL": "ERROR"}, []),  # as our launcher sets it where there are several machines
        ({"TORCH_DISTRIBUTED_DEBUG": "off", "GLOO_LOG_LEVEL": "error"}, []),
        ({"TORCH_CPP_LOG_LEVEL": "info", "NCCL_DEBUG": "WARN"}, ["NCCL_DEBUG", "TORCH_CPP_LOG_LEVEL"]),
        ({"TORCH_LOGS": "+distributed"}, ["TORCH_LOGS"]),
    ],
)
def test_without_such_a_variable_nothing_is_made(shell, tmp_path, capfd, variables, names):
    assert asked(variables) == names
    for name, value in variables.items():
        shell.setenv(name, value)
    before = sys.stderr
    with output_kept(tmp_path / "run"):
        assert (sys.stderr is before) == (not names)
    assert (tmp_path / "run").exists() == bool(names)
    assert bool(capfd.readouterr().out) == bool(names)


def test_a_folder_that_cannot_be_made_is_told_of_and_changes_nothing(shell, tmp_path: Path, capfd):
    shell.setenv("NCCL_DEBUG", "INFO")
    (tmp_path / "debug").touch()
    with output_kept(tmp_path):
        assert "NCCL_DEBUG_FILE" not in os.environ
    assert f"what rank 0 prints is not kept in {tmp_path}/debug: " in capfd.readouterr().err
