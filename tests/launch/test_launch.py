"""The launcher with real processes: small scripts stand in for the ranks, most of them without torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.core.errors import RunFailed
from tessera.launch.workers import run_workers

RANK = """
import os, pathlib, signal, sys, time
from tessera.launch.rank import die_with_parent
assert die_with_parent(), "started by the launcher"
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
def say(name, text=""):
    (folder / f"new-{name}-{rank}").write_text(str(text))
    (folder / f"new-{name}-{rank}").rename(folder / f"{name}-{rank}")
say("ready", os.getpid())
"""
UNTIL_STOPPED = """
while not stop: time.sleep(0.02)
say("saved")
"""
FOREVER = "\nwhile True: time.sleep(0.02)\n"

LAUNCHER = """
import sys
from tessera.core.errors import RunFailed
from tessera.launch.workers import run_workers
try:
    run_workers(sys.argv[1:], 2)
except RunFailed as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


def script(folder: Path, body: str) -> list[str]:
    path = folder / "rank.py"
    path.write_text(RANK + body)
    return [str(path), str(folder)]


def wait_for(true: Callable[[], bool]) -> None:
    """Up to a minute; a machine may be busy."""
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def wait_for_ranks(folder: Path) -> list[int]:
    """The process ids of the two ranks, once both have installed their handlers."""
    files = [folder / f"ready-{rank}" for rank in (0, 1)]
    wait_for(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def start_launcher(folder: Path, body: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LAUNCHER, *script(folder, body)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---- Runs that end by themselves, launched from this process


def test_ranks_get_their_environment_and_only_rank_0_prints(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, handlers = dict(os.environ), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    body = """
env = os.environ
print("out", rank, env["WORLD_SIZE"], env["LOCAL_RANK"], "TESSERA_LAUNCHER_PID" in env, sys.argv[2])
print("err", rank, file=sys.stderr)
say("threads", env["OMP_NUM_THREADS"])
"""
    run_workers([*script(tmp_path, body), "$5 ${local_rank}"], 2)
    out, err = capfd.readouterr()
    assert out.splitlines() == ["out 0 2 0 False $5 ${local_rank}"]
    assert sorted(err.splitlines()) == ["err 0", "err 1"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "threads-1").read_text() == str(threads)
    assert dict(os.environ) == before
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_rank_that_ends_without_a_word_is_named(tmp_path, capfd):
    args = script(tmp_path, f"if rank == 1: sys.exit(5){UNTIL_STOPPED}")
    with pytest.raises(RunFailed, match=r"^rank 1 \(process \d+\) ended with exit code 5") as caught:
        run_workers(args, 2)
    assert caught.value.exit_code == 1
    assert capfd.readouterr().err == ""  # nothing from the agent


def test_a_killed_rank_is_named_and_takes_a_deaf_one_with_it(tmp_path):
    # rank 0 neither notices nor obeys SIGTERM: without the launcher's own kill the agent waits 30 seconds
    body = """
while not (folder / "ready-0").exists(): time.sleep(0.02)
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
for turn in range(1_000_000):
    say("turn", turn)
    time.sleep(0.02)
"""
    args = script(tmp_path, body)
    with pytest.raises(RunFailed, match=r"^rank 1 \(process \d+\) was killed by SIGKILL") as caught:
        run_workers(args, 2)
    pids = wait_for_ranks(tmp_path)
    assert str(pids[1]) in str(caught.value)
    assert gone(pids[0])
    assert int((tmp_path / "turn-0").read_text()) < 1000  # of 0.02 seconds or more each


GLOO = """
import torch, torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
@record
def main():
    dist.init_process_group("gloo")
    x = torch.ones(4)
    for step in range(1_000_000):
        dist.all_reduce(x)
        if step == 3 and rank == 1:
            {end}
try:
    main()
except Exception:
    os._exit(1)
"""


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"^rank 1 .* was killed by SIGKILL"),
        ("raise ArithmeticError('odd')", r"(?s)^rank 1 .* failed\nTraceback.*ArithmeticError: odd$"),
    ],
)
def test_the_rank_that_fell_first_is_told_and_not_those_that_lost_it(tmp_path, end, told):
    with pytest.raises(RunFailed, match=told):
        run_workers(script(tmp_path, GLOO.format(end=end)), 2)


# ---- Signals, sent to a launcher of its own


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_every_rank_save(tmp_path, number):
    launcher = start_launcher(tmp_path, UNTIL_STOPPED)
    wait_for_ranks(tmp_path)
    launcher.send_signal(number)
    launcher.send_signal(signal.SIGINT)  # right behind it, as make passes one Ctrl+C on
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, out
    assert out.count("stopping") == 1
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_a_second_signal_kills(tmp_path):
    launcher = start_launcher(tmp_path, FOREVER)
    pids = wait_for_ranks(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.stdout and any("stopping" in line for line in iter(launcher.stdout.readline, ""))
    time.sleep(1.2)  # later than what counts as the same signal
    assert launcher.poll() is None, "one signal alone does not end ranks that are busy"
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "stopped at the second signal" in out
    assert all(gone(pid) for pid in pids)


def test_ranks_die_with_a_killed_launcher(tmp_path):
    launcher = start_launcher(tmp_path, FOREVER)
    pids = wait_for_ranks(tmp_path)
    assert not any(gone(pid) for pid in pids)
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_for(lambda: all(gone(pid) for pid in pids))
