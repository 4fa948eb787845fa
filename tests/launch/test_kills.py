"""A run of real processes that is killed again and again, and each time goes on by itself as if nothing had been.

Three kills always, about ten seconds each; `make test-all` has ten in each of three layouts. `-s` prints what each kill
left behind.
"""

import itertools
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from support.forked import Running, start
from tessera.checkpoint.folder import latest, read_state, verify
from train.runs import Workshop, command, environment, exported, metrics, run

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp 2": {"dp_shard_size": 2},
    "1d 2": {"tensor_parallel_size": 2},
    "2d row 2": {"tensor_parallel_mode": "2d", "tensor_parallel_mesh": {"row": 2, "col": 1}, "micro_batch_size": 2},
}
MOMENTS = ("in a step", "in a save", "at the start", "in a step", "in a save")
VICTIMS = ("the launcher", "rank 0", "rank 1", "everything")  # five and four: twenty kills have every pair
NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens", "skipped_steps")


@dataclass(frozen=True)
class Kill:
    """At `moment`, so many `steps` after the first one of the attempt and `wait` of its kind's span later."""

    moment: str
    victim: str
    steps: int
    wait: float


def kills(layout: str, count: int) -> list[Kill]:
    """So many, the last one in the export; every layout begins at another place of the two cycles."""
    dice, shift = random.Random(layout), list(LAYOUTS).index(layout) * count
    moments, victims = ([*itertools.islice(itertools.cycle(c), shift, shift + count)] for c in (MOMENTS, VICTIMS))
    moments[-1] = "in the export"
    return [Kill(*pair, dice.randrange(1, 4), dice.random()) for pair in zip(moments, victims, strict=True)]


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


def left_alive(temporary: Path) -> list[str]:
    """Processes, of whatever kind, that have this TMPDIR."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"TMPDIR={temporary}\0".encode() in (folder / "environ").read_bytes() and not gone(int(folder.name)):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(true: Callable[[], bool], process: Running | None, pause: float = 0.001) -> None:
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


def killed(settings: dict[str, Any], kill: Kill, variables: dict[str, str]) -> str:
    """What the terminal of an attempt shows that goes on where it can and is killed; none of its processes is left."""
    output, already = Path(settings["output_dir"]), latest(Path(settings["output_dir"]))
    done = int(already.name.partition("-")[2]) if already else 0
    process = start(*command(settings, "--num-processes", "2")[3:], variables=variables)
    if kill.moment == "at the start":
        time.sleep(0.5 + 3 * kill.wait)
        assert process.poll() is None, process.communicate()
        processes = family(process.pid)
    else:
        wait_for(lambda: "rank 1" in family(process.pid), process, 0.05)
        processes = family(process.pid)
        if kill.moment == "in the export":
            wait_for((output / ".export").is_dir, process, 0.0002)
        else:
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
    said = "".join(process.communicate(timeout=60))
    assert process.returncode != 0, said
    wait_for(lambda: all(gone(pid) for pid in processes.values()), None)
    return said


@pytest.mark.parametrize(
    ("layout", "count"), [("fsdp 2", 3), *(pytest.param(layout, 10, marks=pytest.mark.slow) for layout in LAYOUTS)]
)
def test_a_run_killed_again_and_again_is_the_run_that_never_was(workshop: Workshop, tmp_path, layout, count):
    """Its numbers at every step, bit for bit, and its weights: no row is trained on twice or left out."""
    output, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    variables = environment() | {"TMPDIR": str(temporary)}
    own = {"save_steps": 1, "save_total_limit": 2, "max_steps": 4 + 4 * count, "shuffle": True}
    own |= {"auto_resume_from_checkpoints": True, "gradient_accumulation_steps": 4, **LAYOUTS[layout]}
    settings = workshop.settings("gpt2 64 dropout", output, **own)
    for number, kill in enumerate(kills(layout, count)):
        before = latest(output)
        said = killed(settings, kill, variables)
        if "effective batch" in said:  # else it had not come to that
            assert f"from {before}" in said if before else "from the start" in said, said
        resume, parts = latest(output), sorted(path.name for path in output.glob(".*"))
        print(f"{number + 1}: {kill.victim} {kill.moment}; {resume and resume.name} is whole, left: {parts}")
        if resume:
            read_state(resume)
            verify(resume)
            assert lines(output) >= int(resume.name.partition("-")[2]), "a step is saved whose line is lost"
        assert resume or not before, "the checkpoint that there was is gone"
        assert len(list(temporary.glob("tessera-*"))) <= 2, "each start sweeps what dead ones have left"
        assert left_alive(temporary) == []
    done = start(*command(settings, "--num-processes", "2")[3:], variables=variables)
    told = done.communicate(timeout=300)
    assert done.returncode == 0, told
    assert list(temporary.glob("tessera-*")) == [] and left_alive(temporary) == []
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
