"""Launchers on two machines, which are two network namespaces joined by a cable; and restarts after a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tessera.cli.main import main
from tessera.core.errors import UserError
from tessera.launch.interface import interface_of, own_address
from tessera.launch.machines import Machines, Place
from tessera.launch.options import LaunchOptions
from tessera.launch.watch import exit_status
from train.runs import command, environment, metrics, run, run_command

PORT = "29571"
NAMES = [f"tessera-{os.getpid()}-{rank}" for rank in (0, 1)]


def ip(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """Two namespaces, 10.99.0.1 and 10.99.0.2; skips where they cannot be made."""
    try:
        made = ip("netns", "add", NAMES[0])
    except FileNotFoundError:
        pytest.skip("two machines need the command ip")
    if made.returncode:
        pytest.skip(f"two machines need network namespaces: {made.stderr.strip()}")
    try:
        ip("netns", "add", NAMES[1])
        ends = ["tessera0", "netns", NAMES[0], "type", "veth", "peer", "name", "tessera1", "netns", NAMES[1]]
        cable = ip("link", "add", *ends)
        if cable.returncode:
            pytest.skip(f"two machines need a veth pair: {cable.stderr.strip()}")
        for rank, name in enumerate(NAMES):
            ip("-n", name, "addr", "add", f"10.99.0.{rank + 1}/24", "dev", f"tessera{rank}")
            ip("-n", name, "link", "set", f"tessera{rank}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name)


@pytest.fixture
def machines(network) -> Iterator[Callable[..., "list[subprocess.Popen[str]]"]]:
    """Starts the launcher on each machine; whatever still runs in the namespaces afterwards is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(
        settings: dict[str, Any], *options: str, last: dict[str, str] | None = None
    ) -> "list[subprocess.Popen[str]]":
        where = ["--num-machines", "2", "--main-process-ip", "10.99.0.1", "--main-process-port", PORT]
        for rank, name in enumerate(NAMES):
            words = ["ip", "netns", "exec", name, *command(settings, *where, "--machine-rank", str(rank), *options)]
            streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            own = last if last and rank == len(NAMES) - 1 else {}  # what the last machine has in its environment alone
            started.append(subprocess.Popen(words, env=environment() | own, **streams))  # ip becomes the command
        return started

    yield start
    for pid in left_over():
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait(30)


def left_over() -> list[int]:
    return [int(pid) for name in NAMES for pid in ip("netns", "pids", name).stdout.split()]


def wait_for_step(settings: dict[str, Any], step: int, processes: "list[subprocess.Popen[str]]") -> None:
    log = Path(settings["output_dir"]) / "metrics.jsonl"
    for _ in range(6000):
        if log.exists() and log.read_text().count("\n") >= step:
            return
        assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def child(process: "subprocess.Popen[str]") -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def losses(settings: dict[str, Any]) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(settings)]


@pytest.fixture(scope="module")
def expected(workshop, tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of a run in two processes that nothing happens to."""
    settings = workshop.settings("llama", tmp_path_factory.mktemp("calm") / "run", tensor_parallel_size=2, max_steps=18)
    run(settings)
    return losses(settings)


FORGER = """
import sys, time, torch.distributed as dist
store = dist.TCPStore("10.99.0.1", int(sys.argv[1]), is_master=False)
line, until = store.get("line/1"), time.monotonic() + 4
told = b'{"beat": 99999999, "outcomes": [], "left": {"text": "told to end", "exit_code": 9}}'
while time.monotonic() < until:  # each stays until the next beat of who it is about
    for name, text in (("line/1", told), ("line/0", line), ("line/1", line), ("line/1", b""), ("run", b"forged")):
        store.set(name, text)
        time.sleep(0.01)
time.sleep(2)
print(store.get("line/1") != line)
"""


def test_forged_messages_are_ignored_and_named(workshop, tmp_path, machines):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=100_000)
    processes = machines(settings)
    wait_for_step(settings, 1, processes)
    words = ["ip", "netns", "exec", NAMES[1], sys.executable, "-c", FORGER, PORT]
    forged = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert forged.stdout == "True\n", forged.stderr
    done = len(metrics(settings))
    wait_for_step(settings, done + 2, processes)
    assert [path.name for path in (tmp_path / "run").glob(".token.*")], "their secret lies there while they run"
    assert not any(path.stat().st_mode & 0o077 for path in (tmp_path / "run").glob(".token.*"))
    processes[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert texts[0].count("ignored a message in the name of machine 1 (") == 1, texts[0]
    assert texts[1].count("ignored a message in the name of machine 0 (") == 1, texts[1]
    assert "told to end" not in texts[0] + texts[1]
    assert not list((tmp_path / "run").glob(".token.*")) and not (tmp_path / "run" / ".lock").exists()


def test_two_machines_train_as_one_and_go_on_after_a_killed_rank(workshop, tmp_path, machines, expected):
    own = {"tensor_parallel_size": 2, "max_steps": 18, "save_steps": 3, "save_total_limit": 2}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    processes = machines(settings, "--max-restarts", "1")
    wait_for_step(settings, 7, processes)
    victim = child(processes[1])
    os.kill(victim, signal.SIGKILL)
    texts = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    for rank, text in enumerate(texts):
        assert f"talking to the other machines through tessera{rank} (10.99.0.{rank + 1})" in text
        assert f"rank 1 (process {victim} on machine 1" in text and "was killed by SIGKILL" in text
        _, again, rest = text.rpartition(f"starting again (restart 1 of 1), from {tmp_path}/run/checkpoint-")
        assert again and "[c10d]" not in rest, "nobody reads from a store that is gone"
    found = losses(settings)
    assert [step for step, _ in found] == list(range(1, 19))
    assert found == expected, "TCP between machines and a restart change nothing"
    assert left_over() == []


SLOW = """
import importlib.abc, importlib.machinery, sys, time

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "tessera.models.decoder":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            real = spec.loader.exec_module
            def execute(module):
                real(module)
                forward = module.Decoder.forward
                module.Decoder.forward = lambda *args, **how: (time.sleep(0.3), forward(*args, **how))[1]
            spec.loader.exec_module = execute
            return spec

sys.meta_path.insert(0, Slow())
"""
"""A sitecustomize.py: each forward takes 0.3 s longer."""


def test_a_machine_that_is_slower_than_the_other_is_named(workshop, tmp_path, machines):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW)
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=5)
    processes = machines(settings, last={"PYTHONPATH": str(tmp_path / "slow")})
    texts = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    lines = [json.loads(line) for line in (tmp_path / "run/monitor.jsonl").read_text().splitlines()]
    assert len(set(lines[0]["machines"])) == 2
    delay = 0.3 * settings["gradient_accumulation_steps"]
    steps = {line["step"]: line["seconds"] for line in lines[1:] if "seconds" in line}
    excess = []
    for found in [m for m in metrics(settings) if "slowest" in m][1:]:
        slowest = found["slowest"]
        assert (slowest["rank"], slowest["machine"]) == (1, lines[0]["machines"][1]) and slowest["whole_machine"]
        excess.append(slowest["excess_seconds"])
    # the machine on which both are may stand still in one of the steps
    assert any(seconds == pytest.approx(delay, rel=0.2) for seconds in excess), excess
    idle = [steps[step]["idle"] for step in (3, 4, 5)]
    assert any(first == pytest.approx(delay, rel=0.2) and second < 0.2 * delay for first, second in idle), idle
    assert f"machine {lines[0]['machines'][1]} slowest by 0." in texts[0]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_launcher_ends_the_other_machine_too(workshop, tmp_path, machines, lost):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=100_000)
    processes = machines(settings)
    wait_for_step(settings, 2, processes)
    began = time.monotonic()
    processes[lost].kill()
    text = processes[1 - lost].communicate(timeout=60)[0]
    seconds = time.monotonic() - began
    print(f"ended after {seconds:.1f} s:\n{text}")
    assert seconds < 30
    assert processes[1 - lost].returncode == 1
    assert f"machine {lost} (" in text and f"10.99.0.{lost + 1}) is lost" in text and "Traceback" not in text
    assert "frame #" not in text and "Exception raised" not in text, text
    assert text.count("is lost") == 1
    assert left_over() == []


REACHES = """
import socket, sys
for port in map(int, sys.argv[2:]):
    try:
        socket.create_connection((sys.argv[1], port), 2).close()
        print(port)
    except OSError:
        pass
"""


@pytest.mark.slow
def test_a_neighbour_reaches_no_port_of_a_run_on_one_machine(workshop, tmp_path, network):
    """From another namespace on its network nothing answers, so that it can list, write or stop nothing."""
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=100_000)
    words = ["ip", "netns", "exec", NAMES[0], *command(settings)]
    run_there = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_step(settings, 2, [run_there])
        rows = [line.split() for line in Path(f"/proc/{run_there.pid}/net/tcp").read_text().splitlines()[1:]]
        ports = sorted({str(int(row[1].partition(":")[2], 16)) for row in rows if row[3] == "0A"})  # those that listen
        assert ports

        def reached(name: str, address: str) -> list[str]:
            asked = ["ip", "netns", "exec", name, sys.executable, "-c", REACHES, address, *ports]
            return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()

        assert reached(NAMES[1], "10.99.0.1") == []
        assert set(reached(NAMES[0], "127.0.0.1")) & set(ports), "there was something to reach"
        assert run_there.poll() is None
    finally:
        run_there.terminate()
        run_there.communicate(timeout=60)


# ---- One machine


def test_a_killed_rank_of_a_run_read_from_a_pipe_is_started_again_and_goes_on(workshop, tmp_path, expected):
    own = {"tensor_parallel_size": 2, "max_steps": 18, "save_steps": 3, "save_total_limit": 2}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    words = command(settings, "--max-restarts", "1")
    file = Path(words[4])
    words[4] = "/dev/stdin"  # a pipe, which is empty when it has been read
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, env=environment(), text=True, **streams)
    assert process.stdin
    process.stdin.write(file.read_text())
    process.stdin.close()
    process.stdin = None
    wait_for_step(settings, 7, [process])
    os.kill(child(process), signal.SIGKILL)
    text = process.communicate(timeout=90)[0]
    assert process.returncode == 0, text
    assert f"starting again (restart 1 of 1), from {tmp_path}/run/checkpoint-" in text
    assert losses(settings) == expected


RANK = """
import os, pathlib, sys, time
from tessera.core.errors import RunFailed, UserError
from tessera.launch.rank import as_rank
rank, attempt, folder = int(os.environ["RANK"]), int(os.environ["TESSERA_ATTEMPT"]), pathlib.Path(sys.argv[1])
(folder / f"attempt-{attempt}-{rank}").touch()
def work(ours):
    WORK
as_rank(work)
"""
HANGS = """
    hangs = folder / f"hangs-{attempt}"
    if rank == 1:
        hangs.touch()
        time.sleep(1000)
    while not hangs.exists(): time.sleep(0.02)
    raise RuntimeError("Timed out waiting 1000ms for recv")  # as gloo says it
"""
HANGS_DEAF = "\n    import signal; signal.signal(signal.SIGTERM, lambda *_: None)" + HANGS  # as in training
ENDS = {
    "hung": HANGS,
    "hung in training": HANGS_DEAF,
    "mistake": "raise UserError('key', 1, 'does not fit')",
    "diverged": "raise RunFailed('the loss is not a number')",
    "always": "raise ArithmeticError('odd')",
}


def test_a_look_at_a_rank_that_ended_leaves_it_to_the_agent():
    worker = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    while exit_status(worker) is None:
        time.sleep(0.01)
    assert worker.returncode is None and exit_status(worker) == 3
    os.killpg(worker.pid, signal.SIGTERM)  # what the agent does when another rank has failed
    assert worker.wait() == exit_status(worker) == 3


@pytest.mark.parametrize(
    ("end", "told", "attempts"),
    [
        pytest.param("hung", r"^rank 1 \(process \d+\) hung: (?s:.*)line \d+ in work", 2, marks=pytest.mark.slow),
        ("hung in training", r"^rank 1 \(process \d+\) hung: (?s:.*)line \d+ in work", 2),
        ("mistake", "^key: 1\n  does not fit", 1),
        ("diverged", "^the loss is not a number$", 1),
        ("always", r"(?s)^rank \d .* failed\n.*ArithmeticError: odd$", 2),
    ],
)
def test_only_what_may_go_better_is_tried_again(tmp_path, end, told, attempts, capfd):
    from tessera.core.errors import RunFailed
    from tessera.launch.workers import Restarts, run_workers

    (tmp_path / "rank.py").write_text(RANK.replace("WORK", ENDS[end]))
    with pytest.raises(RunFailed, match=told):
        run_workers([str(tmp_path / "rank.py"), str(tmp_path)], 2, restarts=Restarts(1))
    assert len(list(tmp_path.glob("attempt-*-1"))) == attempts
    assert capfd.readouterr().err.count("starting again") == attempts - 1


@pytest.mark.slow
def test_torchrun_starts_the_same_run(workshop, tmp_path, expected):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2, max_steps=18)
    done = run_command(settings, "--launcher", "torchrun")
    assert done.returncode == 0, done.stderr
    assert "-m torch.distributed.run --nproc-per-node=2" in done.stdout
    assert losses(settings) == expected


# ---- Options

TWO = ["--num-machines", "2", "--main-process-ip", "127.0.0.1", "--machine-rank", "0"]
MISFITS = {
    "no address": (["--num-machines", "2", "--machine-rank", "0"], ["--num-machines: 2", "--main-process-ip"]),
    "no rank": (["--nnodes", "2", "--master-addr", "127.0.0.1"], ["--num-machines: 2", "--machine-rank, from 0 to 1"]),
    "a rank too high": ([*TWO[:-1], "2"], ["--machine-rank: 2", "there are 2 machines", "use 0 to 1"]),
    "a rank without machines": (["--machine-rank", "1"], ["--machine-rank: 1", "there is 1 machine"]),
    "processes not shared out": ([*TWO, "--num-processes", "3"], ["--num-processes: 3", "use 2 or 4"]),
    "another world": (
        [*TWO, "--num-processes", "6", "--set", "dp_shard_size=2"],
        ["--num-processes: 6", "the sizes given make 4"],
    ),
    "another local world": (["--nproc-per-node", "3"], ["--nproc-per-node: 3", "does not divide by"]),
    "two counts": (["--nproc-per-node", "2", "--num-processes", "3"], ["--nproc-per-node: 2", "one of the two"]),
    "too many machines": (
        ["--nnodes", "3", "--node-rank", "0", "--master-addr", "127.0.0.1"],
        ["--num-machines: 3", "1 or 2 machines can"],
    ),
    "an unknown name": ([*TWO[:3], "no-such-host.invalid", *TWO[4:]], ["--main-process-ip: no-such-host.invalid"]),
    "an unknown launcher": (["--launcher", "mpirun"], ["--launcher: mpirun", "tessera, torchrun, accelerate"]),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_options_that_do_not_fit_are_refused(workshop, tmp_path, monkeypatch, capsys, misfit):
    options, told = MISFITS[misfit]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    words = command(workshop.settings("llama", tmp_path / "run", tensor_parallel_size=2), *options)
    monkeypatch.setattr("sys.argv", ["tessera", *words[3:]])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    for text in told:
        assert text in error
    assert not (tmp_path / "run").exists()


def test_a_token_that_cannot_be_left_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("TESSERA_RUN_TOKEN", raising=False)
    (tmp_path / "file").touch()
    machines = Machines(Place(2, 0, "127.0.0.1", int(PORT) + 1), 1, tmp_path / "file" / "run")
    with pytest.raises(UserError, match="output_dir: .*\n  the run's token cannot be left there: a part of the path"):
        machines.__enter__()


def test_a_missing_accelerate_is_told(monkeypatch):
    from tessera.launch import foreign

    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="accelerate\n  is not installed"):
        foreign.run_foreign(LaunchOptions(launcher="accelerate"), 2, ["-m", "tessera"])


def test_the_interface_of_an_address_is_found():
    if sys.platform == "linux":
        assert interface_of(own_address("127.0.0.1")) == "lo"
    assert interface_of("203.0.113.7") is None


def test_options_count_as_the_other_launchers_do():
    options = LaunchOptions(per_machine=2, machines=3)
    assert options.asked_for(None)[0] == 6 and options.asked_for(6)[0] == 6
    assert options.processes_here(6) == 2
    assert json.dumps(LaunchOptions().asked_for(None)) == '[null, "--num-processes"]'
