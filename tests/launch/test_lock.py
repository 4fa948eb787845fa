"""Runs that meet in one output_dir, as commands; who may reach a run; what a launcher leaves when it is killed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from support.forked import python, start, tessera
from tessera.checkpoint import lock as locks
from tessera.checkpoint.lock import RunLock
from tessera.core.errors import UserError
from tessera.launch import scratch as scratches
from tessera.launch.rank import HERE, OF_A_RANK, is_rank
from tessera.launch.scratch import scratch
from tessera.launch.token import GIVEN, Seal, host_seal, joined_seal
from train.runs import Workshop, command, environment


def seen(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [None, 1])
def test_a_second_run_is_refused_in_one_line(workshop: Workshop, tmp_path, ranks):
    """The command alone, and as the only rank of another launcher."""
    settings = workshop.settings("llama", tmp_path / "run", max_steps=1)
    words = command(settings)[3:]
    with RunLock() as other:
        other.take(tmp_path / "run")
        (tmp_path / "run" / "checkpoint-7").mkdir()
        (tmp_path / "run" / "checkpoint-7" / "state.json").touch()
        before = seen(tmp_path)
        second = tessera(*words, ranks=ranks)
        told = f"output_dir: {tmp_path}/run is in use by process {os.getpid()} on "
        if ranks is None:
            assert second.codes == [2]
            assert second.err[0].startswith(told) and second.err[0].count("\n") == 1
        assert told in second.err[0]
        assert seen(tmp_path) == before


def test_a_stopped_holder_wakes_and_stops_without_writing(workshop: Workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    monkeypatch.setattr(locks, "LETTING_GO", 0.5)
    settings = workshop.settings("llama", tmp_path / "run", max_steps=1_000_000, save_steps=50)
    first = start(*command(settings)[3:], variables=environment())
    log = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 100
    while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=f"in use by process {first.pid} "), RunLock() as early:
        early.take(tmp_path / "run")
    with RunLock(take_over=True) as second:
        second.take(tmp_path / "run")
        before = seen(tmp_path / "run")
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=60)
        assert first.returncode == 1
        assert "stopped without writing" in err and f"process {os.getpid()} on" in err and "Traceback" not in err
        assert seen(tmp_path / "run") == before


# ---- Who may reach a run

LISTENS = """
import os, pathlib, re, socket, sys
import torch, torch.distributed as dist
from tessera.launch.rank import as_rank
def listening(pid):
    found = []
    inodes = set()
    for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes |= set(re.findall(r"socket:\\[(\\d+)\\]", os.readlink(fd)))
        except OSError:
            pass
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.append(words[1].partition(":")[0])
    return found
def work(ours):
    assert ours and "TESSERA_RUN_KEY" in os.environ
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo", "the name of this machine may stand for another address"
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    folder = pathlib.Path(sys.argv[1])
    (folder / f"rank-{os.environ['RANK']}").write_text("\\n".join(listening(os.getpid())))
    (folder / f"launcher-{os.environ['RANK']}").write_text("\\n".join(listening(os.getppid())))
    dist.barrier()
as_rank(work)
"""


def test_a_run_on_one_machine_listens_on_loopback_alone(tmp_path, monkeypatch):
    from tessera.launch.workers import run_workers

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "rank.py").write_text(LISTENS)
    run_workers([str(tmp_path / "rank.py"), str(tmp_path)], 2)
    for name in ("launcher-0", "rank-0", "rank-1"):
        addresses = (tmp_path / name).read_text().split()
        assert addresses and set(addresses) == {"0100007F"}, (name, addresses)


def test_what_has_not_the_code_of_the_run_is_not_opened():
    seal, other = Seal(b"a" * 32), Seal(b"b" * 32)
    text = '{"beat": 1}'
    assert seal.opened("line/1", seal.sealed("line/1", text).encode()) == text
    for forged in (other.sealed("line/1", text), seal.sealed("line/0", text), text, "", "\xff" * 9):
        assert seal.opened("line/1", forged.encode("latin-1")) is None
    longer = seal.sealed("line/1", text) + " "
    assert seal.opened("line/1", longer.encode()) is None


class Store(dict):
    def set(self, name: str, text: str) -> None:
        self[name] = text.encode()

    def get(self, name: str) -> bytes:
        return self[name]


def test_machines_share_a_token_by_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.launch.token.SEEN", 0.3)
    monkeypatch.delenv(GIVEN, raising=False)
    store = Store()
    seal, file = host_seal(store, tmp_path)
    assert file is not None and file.stat().st_mode & 0o777 == 0o600
    assert joined_seal(store, tmp_path).key == seal.key
    assert seal.key.hex() not in str(store) and file.read_text() not in str(store)
    with pytest.raises(UserError, match="a disk that every machine sees, or set TESSERA_RUN_TOKEN"):
        joined_seal(store, tmp_path / "elsewhere")
    monkeypatch.setenv(GIVEN, "a secret")
    with pytest.raises(UserError, match="is set on this machine, but not on machine 0"):
        joined_seal(store, tmp_path)
    given, nothing = host_seal(store, tmp_path / "elsewhere")
    assert nothing is None and joined_seal(store, tmp_path).key == given.key != seal.key
    again, _ = host_seal(store, tmp_path)
    assert again.key != given.key, "what was said in another run does not count in this one"
    monkeypatch.delenv(GIVEN)
    with pytest.raises(UserError, match="is set on machine 0, but not on this machine"):
        joined_seal(store, tmp_path)
    store.set("run", "0" * 32 + " ../../etc")
    with pytest.raises(UserError, match="no launcher of this version"):
        joined_seal(store, tmp_path)


# ---- What a launcher leaves


def test_temporary_folders_of_dead_launchers_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
    code += (
        "from tessera.launch.scratch import scratch\nwith scratch() as s: print(s, flush=True); os.kill(os.getpid(), 9)"
    )
    left = Path(
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True).stdout.strip()
    )
    assert left.parent == tmp_path and left.is_dir() and left.stat().st_mode & 0o777 == 0o700
    target = tmp_path / "precious"
    target.mkdir()
    (target / "owner").touch()
    (tmp_path / f"{scratches.PREFIX}link").symlink_to(target)
    young = tmp_path / f"{scratches.PREFIX}young"
    young.mkdir()
    with scratch() as first:
        assert not left.exists() and (target / "owner").exists() and young.exists()
        with scratch() as second:
            assert Path(first).exists() and Path(second).exists() and first != second
    assert not Path(first).exists()
    os.utime(young, (0, 0))
    with scratch():
        assert not young.exists()


# ---- What makes a rank

WHOLE = dict(zip(OF_A_RANK, ("1", "1", "2", "127.0.0.1", "29500"), strict=True))


@pytest.fixture
def variables(monkeypatch) -> Any:
    for name in (*OF_A_RANK, "LOCAL_WORLD_SIZE", "TESSERA_LAUNCHER_PID"):
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(name, text) for name, text in values.items()]


def test_all_of_a_launchers_variables_make_a_rank(variables):
    assert not is_rank()
    variables(WHOLE)
    assert is_rank()


@pytest.mark.parametrize("missing", OF_A_RANK)
@pytest.mark.parametrize("empty", [False, True])
def test_what_is_missing_of_a_rank_is_named(variables, missing, empty):
    variables({name: text for name, text in WHOLE.items() if name != missing} | ({missing: ""} if empty else {}))
    with pytest.raises(UserError, match=f"\n  {missing} is not set: ") as refused:
        is_rank()
    assert refused.value.key != missing


@pytest.mark.parametrize("values", [dict.fromkeys(OF_A_RANK, ""), {"RANK": ""}, {HERE: "abc"}, {HERE: ""}])
def test_what_is_empty_or_left_over_makes_no_rank_and_is_taken_out(variables, values):
    """torch and the run look at these variables themselves, later."""
    variables(values)
    assert not is_rank() and not os.environ.keys() & {*OF_A_RANK, HERE}


def test_an_empty_number_of_ranks_here_is_none(variables):
    variables(WHOLE | {HERE: ""})
    assert is_rank() and HERE not in os.environ


@pytest.mark.parametrize("alone", OF_A_RANK)
def test_one_variable_makes_no_rank(variables, alone):
    variables({alone: WHOLE[alone]})
    with pytest.raises(UserError) as refused:
        is_rank()
    assert refused.value.key == alone
    assert all(name in refused.value.reason for name in OF_A_RANK) and f"unset {alone}," in refused.value.hint


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[(name, text) for name in OF_A_RANK if name != "MASTER_ADDR" for text in ("x", "-1", "1.5", "9" * 5000, "²")],
        ("RANK", "2"),
        ("LOCAL_RANK", "2"),
        ("WORLD_SIZE", "0"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("LOCAL_WORLD_SIZE", "3"),
        ("TESSERA_LAUNCHER_PID", "x"),
    ],
)
def test_numbers_of_a_rank_are_numbers_that_fit(variables, name, text):
    variables(WHOLE | {name: text})
    with pytest.raises(UserError) as refused:
        is_rank()
    assert (refused.value.key, refused.value.value) == (name, text)


def test_a_half_set_environment_in_the_command(workshop: Workshop, tmp_path, monkeypatch):
    script = tmp_path / "half.py"
    words = command(workshop.settings("llama", tmp_path / "run"))[2:]
    script.write_text(f"""
import os, sys
os.environ["RANK"] = "0"
sys.argv = {words!r}
from tessera.cli.main import main
main()
""")
    done = python(script)
    assert done.codes == [2] and done.err[0].startswith("RANK: 0\n  LOCAL_RANK and WORLD_SIZE and MASTER_ADDR and")
    assert not (tmp_path / "run").exists()


# ---- The run that is resolved once

AGAIN = """
import os, sys
from unittest.mock import patch
from tessera.core.errors import RunFailed
from tessera.launch.launch import launch
os.environ |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "RESTARTS"}
def train(run, store):
    print("trained", run.config.seed, run.config.max_steps, run.lock, flush=True)
    if "RESTARTS" == "0":
        raise RunFailed("the rank failed")
with patch("tessera.train.trainer.train", train), patch("os.getppid", lambda: 4711):
    launch("CONFIG")
"""


def test_ranks_that_torchrun_starts_again_have_the_run_of_the_first(workshop: Workshop, tmp_path):
    settings, script = workshop.settings("llama", tmp_path / "run", seed=5, max_steps=9), tmp_path / "rank.py"

    def attempt(restarts: int, **changes: Any) -> str:
        config = command(settings | changes)[4]
        script.write_text(AGAIN.replace("CONFIG", config).replace("RESTARTS", str(restarts)))
        out = python(script, ranks=1).out[0]
        return out[out.index("trained") :].strip()

    first = attempt(0)
    assert first.startswith("trained 5 9 ")
    assert attempt(1, seed=6, max_steps=3) == first, "the file was edited meanwhile"
    assert attempt(0, seed=6, max_steps=3).startswith("trained 6 3 "), "another run"
