"""One run at a time in an output_dir: the kernel's lock, the heartbeat, taking over, and what a start sweeps away."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tessera.checkpoint import lock as locks
from tessera.checkpoint import lock_file
from tessera.checkpoint.lock import LOCK, InUse, RunLock, Share
from tessera.checkpoint.lock_file import read_owner
from tessera.checkpoint.saver import Saver, Writer
from tessera.checkpoint.state import RunState, Source
from tessera.checkpoint.sweep import sweep
from tessera.core.errors import RunFailed, UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("PATIENCE", 0.3), ("BEAT", 0.1), ("LETTING_GO", 1.0)):
        monkeypatch.setattr(locks, name, seconds)


STATE = RunState(0, 0, 0, 0, Source("model"))


def seen(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def elsewhere(output: Path, age: float = 0.0, **changes: object) -> None:
    """The lock file of a run on another machine, whose last beat was `age` seconds ago."""
    output.mkdir(parents=True, exist_ok=True)
    owner = {"id": "theirs", "host": "far", "boot": "another", "space": "s", "pid": 7, "since": "noon"}
    (output / LOCK).write_text(json.dumps(owner | {"released": False, "run": ""} | changes))
    os.utime(output / LOCK, (time.time() - age,) * 2)


def without_locks(number: int):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


# ---- One machine


def test_a_second_start_is_refused_in_one_line_and_nothing_changes(tmp_path):
    with RunLock() as first:
        first.take(tmp_path / "run")
        (tmp_path / "run" / ".checkpoint-3.part").touch()
        before = seen(tmp_path)
        with pytest.raises(InUse) as refused, RunLock() as second:
            second.take(tmp_path / "run")
        assert isinstance(refused.value, UserError) and "\n" not in str(refused.value)
        told = f"run is in use by process {os.getpid()} on {os.uname().nodename} since {first.owner.since}; "
        assert told in str(refused.value)
        assert seen(tmp_path) == before
        with pytest.raises(InUse):
            RunLock().glance(tmp_path / "run")
        (tmp_path / "run" / ".checkpoint-3.part").unlink()
    assert list(tmp_path.iterdir()) == [], "a run that ended well leaves no lock, nor folders made for it"


def starts_at_once(output: Path, count: int) -> tuple[list[RunLock], list[RunLock]]:
    """So many starts in one folder at one moment: those that have locked it, and those that were refused."""
    won: list[RunLock] = []
    refused: list[RunLock] = []
    go = threading.Barrier(count)

    def start() -> None:
        own = RunLock()
        go.wait()
        try:
            own.take(output)
            won.append(own)
        except InUse:
            refused.append(own)

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won, refused


def test_of_starts_at_once_one_wins(tmp_path):
    for attempt in range(5):
        output = tmp_path / f"run-{attempt}"
        won, refused = starts_at_once(output, 6)
        assert len(won) == 1 and len(refused) == 5
        owner = read_owner(output / LOCK)
        assert owner is not None and owner.id == won[0].id
        won[0].__exit__(None)


def test_a_run_that_fails_lets_go_and_says_so(tmp_path):
    with pytest.raises(RunFailed), RunLock(id="a") as own:
        own.take(tmp_path)
        own.remember("what the ranks got")
        raise RunFailed("the loss is not a number")
    owner = read_owner(tmp_path / LOCK)
    assert owner is not None and owner.released
    with RunLock(id="a") as again:
        again.take(tmp_path)
        assert again.before is not None and again.before.run == "what the ranks got"


HOLDER = r"""
import os, sys, time
from pathlib import Path
from tessera.checkpoint.lock import RunLock, Share
own = RunLock()
own.take(Path(sys.argv[1]))
rank = os.fork()
if rank == 0:
    os.close(own._descriptor)  # a rank starts without it
    with Share(Path(sys.argv[1]), own.id):
        os.write(1, b"shared\n")
        time.sleep(100)
os.write(1, b"%d\n" % rank)
time.sleep(100)
"""


@pytest.mark.parametrize("namespaces", [False, True])
def test_a_killed_holder_frees_the_folder_once_its_ranks_are_gone(tmp_path, namespaces):
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    host = os.uname().nodename
    if namespaces:  # another network, another name, as a container has
        unshared, host = ["unshare", "--uts", "--net", "sh", "-c", 'hostname far && exec "$@"', "sh"], "far"
        try:
            if subprocess.run([*unshared, "true"], capture_output=True).returncode:
                pytest.skip("namespaces are not to be had")
        except FileNotFoundError:
            pytest.skip("needs the command unshare")
        words = [*unshared, *words]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    said = {holder.stdout.readline().strip(), holder.stdout.readline().strip()}
    (rank,) = (int(word) for word in said - {"shared"})
    holder.kill()
    holder.wait()
    try:
        with pytest.raises(InUse, match=f"process {holder.pid} on {host} "), RunLock() as early:
            early.take(tmp_path / "run")
    finally:
        os.kill(rank, signal.SIGKILL)
    with RunLock() as own:
        own.take(tmp_path / "run")
        assert own.before is not None and own.before.pid == holder.pid
    holder.stdout.close()


@pytest.mark.parametrize("planted", ["link", "dangling link", "pipe", "folder"])
def test_what_is_planted_in_place_of_the_lock_is_refused_and_left(tmp_path, planted):
    other = tmp_path / "other"
    other.write_text("precious")
    output = tmp_path / "run"
    output.mkdir()
    if planted == "pipe":
        os.mkfifo(output / LOCK)
    elif planted == "folder":
        (output / LOCK).mkdir()
    else:
        (output / LOCK).symlink_to(other if planted == "link" else tmp_path / "nothing")
    with pytest.raises(UserError, match="^output_dir: "), RunLock() as own:
        own.take(output)
    assert other.read_text() == "precious" and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[1]", b'{"id": 3}', b"[" * 200_000])
def test_a_lock_file_with_something_else_in_it_counts_by_its_age(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    if content:
        with pytest.raises(InUse, match="--take-over"), RunLock() as own:
            own.take(tmp_path)
        os.utime(tmp_path / LOCK, (time.time() - 1000,) * 2)
    with RunLock() as own:
        own.take(tmp_path)


# ---- Other machines


def test_the_lock_of_another_machine_holds_by_its_beat(tmp_path, capsys):
    elsewhere(tmp_path, age=200)
    with pytest.raises(InUse) as refused, RunLock() as own:
        own.take(tmp_path)
    told = str(refused.value)
    assert "process 7 on far since noon; last sign 200 s ago" in told and "--take-over" in told and "\n" not in told
    elsewhere(tmp_path, age=-3600)
    with pytest.raises(InUse), RunLock() as own:  # a clock that jumps
        own.take(tmp_path)
    elsewhere(tmp_path, age=400)
    with RunLock() as own:
        own.take(tmp_path)
        assert "is taken over from process 7 on far since noon: no sign of it for 400 s" in capsys.readouterr().out
        first = (tmp_path / LOCK).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / LOCK).stat().st_mtime_ns > first, "its own beat"


def test_an_old_beat_that_goes_on_is_a_clock_that_jumped(tmp_path):
    elsewhere(tmp_path, age=3600)
    ended = threading.Event()

    def beat() -> None:
        for number in range(10_000):
            if ended.wait(0.05):
                return
            os.utime(tmp_path / LOCK, (time.time() - 3600 + number,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InUse), RunLock() as own:
            own.take(tmp_path)
    finally:
        ended.set()
        thread.join()


def test_a_released_lock_and_one_taken_over_are_free_at_once(tmp_path, capsys):
    elsewhere(tmp_path, released=True)
    with RunLock() as own:
        own.take(tmp_path)
    elsewhere(tmp_path)
    with RunLock(take_over=True) as own:
        own.take(tmp_path)
        assert "is taken over from process 7" in capsys.readouterr().out


def test_a_holder_that_finds_another_owner_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: None)  # what ends a holder that notices nothing: tested below
    with RunLock() as first, Share(tmp_path, "") as nobody:
        first.take(tmp_path)
        with Share(tmp_path, first.id) as rank, RunLock(take_over=True) as second:
            rank.check()
            first.check()
            second.take(tmp_path)  # the first does not let go: it is stopped
            rank._looked = 0.0
            for check in (rank.check, first.check):
                with pytest.raises(RunFailed, match="^stopped without writing: .* was taken over by process"):
                    check()
            with pytest.raises(RunFailed):
                rank.check()  # again, however soon
            nobody.check()
            with pytest.raises(RunFailed), Share(tmp_path, first.id):
                pass
            first.__exit__(None)
            owner = read_owner(tmp_path / LOCK)
            assert owner is not None and owner.id == second.id, "who has lost it removes nothing"
            second.check()
            with pytest.raises(InUse):
                RunLock().take(tmp_path)


def test_a_save_that_finds_another_owner_removes_nothing(tmp_path):
    """The other one may write a folder of the same name by then."""
    told: list[str] = []

    def taken() -> None:
        raise RunFailed("stopped without writing")

    part = tmp_path / ".checkpoint-3.part"
    part.mkdir()
    for check, stays in ((taken, True), (lambda: None, False)):
        how = {"asynchronous": False, "timeout": timedelta(seconds=1), "say": told.append, "check": check}
        saver = Saver(tmp_path, None, **how)
        saver._settle(Writer(tmp_path / "checkpoint-3", STATE, None, check=check), RunFailed("it did not go well"))
        assert part.exists() == stays
        saver.close()
    assert len(told) == 2


def test_a_holder_that_writes_nothing_is_ended(tmp_path):
    code = "from tessera.checkpoint import lock; import sys, time; lock.BEAT = 0.1; lock.LETTING_GO = 0.4\n"
    code += "from pathlib import Path\nwith lock.RunLock() as own:\n  own.take(Path(sys.argv[1]))\n"
    code += "  print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with RunLock(take_over=True) as own:
        own.take(tmp_path)
        _, err = holder.communicate(timeout=20)
        assert holder.returncode == 1
        assert "was taken over by process" in err and "Traceback" not in err
        own.check()


# ---- A file system without locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_the_beat_serves(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", without_locks(number))
    with RunLock() as first:
        first.take(tmp_path)
        said = capsys.readouterr().out
        assert "has no locks" in said and said.count("\n") == 1
        with Share(tmp_path, first.id) as rank:
            rank.check()
        with pytest.raises(InUse, match=f"process {os.getpid()} .*last sign [0-3] s ago"):
            RunLock().take(tmp_path)
        first.check()
    owner = lock_file.Owner("dead", "here", lock_file.boot_id(), lock_file.pid_space(), 2**22 + 1, "noon")
    (tmp_path / LOCK).write_text(json.dumps(vars(owner)))
    with RunLock() as own:
        own.take(tmp_path)  # no such process here
    elsewhere(tmp_path, age=400)
    with RunLock() as own:
        own.take(tmp_path)


def test_without_locks_one_of_two_starts_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks(errno.ENOLCK))
    won, refused = starts_at_once(tmp_path, 4)
    assert len(won) == 1 and len(refused) == 3
    won[0].__exit__(None)


# ---- What is swept


def test_what_dead_runs_left_goes_and_what_lives_stays(tmp_path):
    dead, kept = 2**22 + 1, tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "precious").touch()
    folders = [f".prepared.{dead}", f".prepared.{dead}.old", f".prepared.{os.getpid()}", ".export", "prepared"]
    folders += [".checkpoint-4.part", ".checkpoint-3.removed.part", "checkpoint-2", ".checkpoint-2.replaced.part"]
    for name in [*folders, ".checkpoint-1.replaced.part", "abandoned-checkpoint-9", ".exported"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".LATEST.part", ".metrics.jsonl.part", f".token.{dead}.ab", f".token.{os.getpid()}.cd", LOCK):
        (tmp_path / name).touch()
    (tmp_path / ".checkpoint-5.part").symlink_to(kept)
    (tmp_path / ".checkpoint-6.part").touch()
    assert sweep(tmp_path) == []
    left = {path.name for path in tmp_path.iterdir()}
    mine = {f".prepared.{os.getpid()}", f".token.{os.getpid()}.cd"}
    restored = "checkpoint-1"
    assert left == mine | {"prepared", "checkpoint-2", restored, "abandoned-checkpoint-9", ".exported", LOCK, kept.name}
    assert (kept / "precious").exists()


def test_what_cannot_be_swept_is_said_and_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / ".export").mkdir()
    monkeypatch.setattr("tessera.checkpoint.sweep.remove", lambda path: "permission denied")
    assert sweep(tmp_path) == [
        f"{tmp_path}/.export is left of a run that was killed, and cannot be removed: permission denied"
    ]
