"""`tessera launch CONFIG --slurm`: a batch script that trains on several machines, ends well, and goes on by itself."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.config.load import load_config
from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.files import check_target, writing_target
from tessera.launch.options import PORT

SAVING_SECONDS = 120
"""How long before the time limit the ranks are asked to save: a step and a checkpoint must fit in."""


@dataclass(frozen=True)
class Job:
    """What the batch system is asked for; None leaves the option out."""

    nodes: int = 1
    gpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    name: str = "tessera"
    port: int = PORT
    max_restarts: int = 0


def launch(config: Path, job: Job, overrides: Sequence[str], slurm: bool, output: Path | None) -> None:
    """Write the script to `output`, or print it. Raises UserError for a config or sizes that do not fit."""
    if not slurm:
        raise UserError("--slurm", None, "is the one batch system known so far", "add --slurm")
    if output is not None:
        check_target(output, "--output")
    loaded = load_config(config, overrides)[0]
    if not config.is_file():
        raise UserError("config file", config, "is a pipe, which the script could not read again", "give a file")
    if job.gpus_per_node is not None:
        loaded = loaded.filled_in(job.gpus_per_node * job.nodes, "--gpus-per-node × --nodes")
    made = loaded.world_size
    if made % job.nodes:
        raise UserError("--nodes", job.nodes, f"{made} processes, which the sizes make, cannot be shared out equally")
    if job.gpus_per_node is not None and job.gpus_per_node * job.nodes != made:
        reason = f"the sizes make {made} processes, {made // job.nodes} on each of {job.nodes} nodes"
        raise UserError("--gpus-per-node", job.gpus_per_node, reason, f"use {made // job.nodes}")
    text = slurm_script(config.resolve(), job, overrides)
    if output is None:
        terminal.say(text.removesuffix("\n"))
    else:
        with writing_target(output, "--output"):
            output.write_text(text)


def slurm_script(config: Path, job: Job, overrides: Sequence[str]) -> str:
    """The batch script: one launcher on each node."""
    asked = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "signal": f"B:TERM@{SAVING_SECONDS}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
    # A job that is begun again goes on from its last checkpoint; given earlier, so that --set may say otherwise.
    settings = [word for value in ("auto_resume_from_checkpoints=true", *overrides) for word in ("--set", value)]
    here = [] if job.gpus_per_node is None else ["--nproc-per-node", str(job.gpus_per_node)]
    restarts = ["--max-restarts", str(job.max_restarts)]
    train = shlex.join(["tessera", "train", str(config), *settings, *here, *restarts])
    return _SCRIPT.format(asked="\n".join(lines), train=train.replace("'", "'\\''"), port=job.port)


_SCRIPT = """\
#!/bin/bash
{asked}
#SBATCH --requeue

set -u
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One launcher on each node. Slurm sets SLURM_NODEID there, so each node's own shell fills it in.
export TESSERA_MAIN="$main" PYTHONUNBUFFERED=1
srun --kill-on-bad-exit=0 bash -c '
exec {train} \\
    --num-machines "$SLURM_NNODES" --machine-rank "$SLURM_NODEID" \\
    --main-process-ip "$TESSERA_MAIN" --main-process-port {port} \\
    ${{SLURM_RESTART_COUNT:+--take-over}}
' &
step=$!

# Before the time limit this shell gets SIGTERM and hands it on: the ranks save and end, and the job queues again.
again=
on_term() {{
    again=1
    scancel --signal=TERM "$SLURM_JOB_ID.0"
}}
trap on_term TERM
wait "$step"
code=$?
if [ -n "$again" ]; then  # the signal ended that wait early
    wait "$step"
    code=$?
fi
if [ -n "$again" ] && [ "$code" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
