"""A run of real processes that is killed again and again, and each time goes on by itself as if nothing had been.

Two kills by default, about ten seconds each; `TESSERA_KILLS=20 pytest tests/launch/test_kills.py -s` makes twenty,
every victim at every kind of moment, and prints what each left behind.
"""

import itertools
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import torch

from tessera.checkpoint.folder import latest, read_state, verify
from train.runs import Workshop, command, environment, exported, metrics, run

KILLS = int(os.environ.get("TESSERA_KILLS", "2"))
MOMENTS = ("in a step", "in a save", "in a step", "in a save", "at the start")
VICTIMS = ("rank 0", "rank 1", "the launcher", "everything")  # five and four: twenty kills have every pair
NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens", "skipped_steps")


@dataclass(frozen=True)
class Kill:
    """At `moment`, so many `steps` after the first one of the attempt and `wait` of its kind's span later."""

    moment: str
    victim: str
    steps: int
    wait: float


def kills(count: int) -> list[Kill]:
    dice = random.Random(17)
    moments, victims = itertools.cycle(MOMENTS), itertools.cycle(VICTIMS)
    return [Kill(next(moments), next(victims), dice.randrange(1, 4), dice.random()) for _ in range(count)]


def family(launcher: int) -> dict[str, int]:
    """The processes that `launcher` has started, by what they are; itself too."""
    found = {"the launcher": launcher}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            rank = re.search(rb"\0RANK=(\d)\0", (folder / "environ").read_bytes()) if parent == launcher else None
        except OSError:  # it has ended
            continue
        if rank:
            found[f"rank {rank[1].decode()}"] = int(folder.name)
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(true: Callable[[], bool], process: "subprocess.Popen[str] | None", pause: float = 0.001) -> None:
    """Up to two minutes; a machine may be busy."""
    end = time.monotonic() + 120
    while not true():
        assert process is None or process.poll() is None, f"the run ended by itself: {process.communicate()}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def lines(output: Path) -> int:
    with suppress(FileNotFoundError):
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def killed(settings: dict[str, Any], kill: Kill) -> str:
    """What the terminal of an attempt shows that goes on where it can and is killed; none of its processes is left."""
    output, already = Path(settings["output_dir"]), latest(Path(settings["output_dir"]))
    done = int(already.name.partition("-")[2]) if already else 0
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command(settings, "--num-processes", "2"), env=environment(), **pipes)
    if kill.moment == "at the start":
        time.sleep(0.5 + 3 * kill.wait)
        assert process.poll() is None, process.communicate()
        processes = family(process.pid)
    else:
        wait_for(lambda: "rank 1" in family(process.pid), process, 0.05)
        processes = family(process.pid)
        # the lines beyond `done`, of steps that will be done again, go before training begins
        wait_for(lambda: lines(output) <= done, process)
        wait_for(lambda: lines(output) >= done + kill.steps, process)
        if kill.moment == "in a save":
            wait_for(lambda: bool(list(output.glob(".checkpoint-*.part"))), process, 0.0002)
        time.sleep(kill.wait * (0.1 if kill.moment == "in a step" else 0.02))
    victims = processes.values() if kill.victim == "everything" else [processes.get(kill.victim, process.pid)]
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0, said
    wait_for(lambda: all(gone(pid) for pid in processes.values()), None)
    return said


def test_a_run_killed_again_and_again_is_the_run_that_never_was(workshop: Workshop, tmp_path):
    """Its numbers at every step, bit for bit, and its weights: no row is trained on twice or left out."""
    output = tmp_path / "run"
    own = {"save_steps": 1, "save_total_limit": 2, "max_steps": 12 + 6 * KILLS, "shuffle": True, "dp_shard_size": 2}
    own |= {"auto_resume_from_checkpoints": True, "gradient_accumulation_steps": 4}
    settings = workshop.settings("gpt2 64 dropout", output, **own)
    for number, kill in enumerate(kills(KILLS)):
        before = latest(output)
        said = killed(settings, kill)
        if "steps of 24 rows" in said:  # else it had not come to that
            assert f"from {before}" in said if before else "from the start" in said, said
        resume, parts = latest(output), sorted(path.name for path in output.glob(".*part"))
        print(f"{number + 1}: {kill.victim} {kill.moment}; {resume and resume.name} is whole, left: {parts}")
        if resume:
            read_state(resume)
            verify(resume)
            assert lines(output) >= int(resume.name.partition("-")[2]), "a step is saved whose line is lost"
        assert resume or not before, "the checkpoint that there was is gone"
    done = subprocess.run(command(settings, "--num-processes", "2"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(settings, tmp_path / "whole")


def check(settings: dict[str, Any], elsewhere: Path) -> None:
    """What a finished run left is what one leaves that nobody killed."""
    whole = settings | {"output_dir": str(elsewhere), "save_steps": None}
    want, found = run(whole), metrics(settings)
    assert [[m[key] for key in NUMBERS] for m in found] == [[m[key] for key in NUMBERS] for m in want]
    left, right = exported(settings), exported(whole)
    assert all(torch.equal(left[name], right[name]) for name in right)
    output, last = Path(settings["output_dir"]), settings["max_steps"]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{last - 1}", f"checkpoint-{last}"]
    assert not list(output.glob(".checkpoint-*")) and not (output / ".LATEST.part").exists()
    shutil.rmtree(elsewhere)
