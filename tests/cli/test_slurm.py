"""`tessera launch --slurm`: the script is run with stand-ins for Slurm's commands and for tessera."""

import os
import signal
import subprocess
import time

import pytest

from tessera.cli.launch import Job, launch
from tessera.core.errors import UserError

CONFIG = "base_model: m\ndatasets: [{path: a.txt}]\ntensor_parallel_size: 4\n"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "scontrol $*" >> "$LOG"; fi',
    "scancel": 'echo "scancel $*" >> "$LOG"; touch "$LOG.stop"',
    "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@" & done; wait -n; a=$?; wait -n; exit $((a + $?))',
    "tessera": """printf '%s|' "$@" >> "$LOG.$SLURM_NODEID"
if [ -n "$UNTIL_STOPPED" ]; then until [ -e "$LOG.stop" ]; do sleep 0.02; done; fi; exit "${CODE:-0}" """,
}


@pytest.fixture
def job(tmp_path):
    """Starts the script for two nodes; gives the process."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    config, script = tmp_path / "run.yaml", tmp_path / "job.sh"
    config.write_text(CONFIG)
    wanted = Job(nodes=2, gpus_per_node=2, time="1:00:00", account="them", max_restarts=3)
    launch(config, wanted, ["output_dir=it's $HOME"], True, script)

    def start(**variables: str) -> "subprocess.Popen[bytes]":
        own = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": f"{tmp_path}/log", "UNTIL_STOPPED": ""}
        own |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first,second"}
        return subprocess.Popen(["bash", str(script)], env=os.environ | own | variables)

    return start


def test_the_script_starts_one_launcher_on_each_node(job, tmp_path):
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0
    text = (tmp_path / "job.sh").read_text()
    for asked in ("nodes=2", "gpus-per-node=2", "time=1:00:00", "account=them", "signal=B:TERM@120", "requeue"):
        assert f"#SBATCH --{asked}\n" in text
    assert "partition" not in text
    assert job().wait(60) == 0
    for node in "01":
        words = (tmp_path / f"log.{node}").read_text().split("|")[:-1]
        assert words == (
            f"train|{tmp_path}/run.yaml|--set|auto_resume_from_checkpoints=true|--set|output_dir=it's $HOME"
            f"|--nproc-per-node|2|--max-restarts|3|--num-machines|2|--machine-rank|{node}|--main-process-ip|first|--main-process-port|29500"
        ).split("|")
    assert not (tmp_path / "log").exists(), "a run that is done is not begun again"


def test_before_the_time_limit_the_ranks_save_and_the_job_queues_again(job, tmp_path):
    process = job(UNTIL_STOPPED="1")
    while not (tmp_path / "log.1").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert (tmp_path / "log").read_text().splitlines() == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]


def test_a_failed_run_fails_the_job(job, tmp_path):
    assert job(CODE="1").wait(60) != 0
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("wanted", "told"),
    [(Job(nodes=3), "--nodes: 3"), (Job(nodes=2, gpus_per_node=3), "--gpus-per-node × --nodes: 6(?s:.*)use 4 or 8")],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, wanted, told):
    (tmp_path / "run.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match=told):
        launch(tmp_path / "run.yaml", wanted, [], True, None)
