"""A command in a process of its own, forked from this one, which has imported everything: how it ended, what it said.

Nothing in it is real but the command: ranks are not started (`RANKS` says that they would have been), no network is
there, memory is limited, and `Fault` can end, stop or starve it at any of its operations on files.
"""

import ctypes
import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fuzz.reach import reached

HANG = 20.0
"""Seconds after which a command counts as hanging."""
LONGEST = 120
"""Seconds of CPU after which the kernel ends a command, whatever becomes of who watches it."""
SPARE = 3 * 2**30
"""Bytes of address space that a command may take beyond what this process has."""
RANKS = "the ranks would have been started: "
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link", "shutil.copyfile")

Terminal = Literal["file", "closed", "head", "full", "ascii"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong: from the `after`-th operation on files on, or in optimizer step `step`.

    kill, stop: the process gets SIGKILL, SIGSTOP. An errno: writing fails so from then on, or only for paths that
    hold `path`. `signal` is sent by the process to itself.
    """

    after: int = 0
    step: int = 0
    signal: int = 0
    errno: int = 0
    path: str = ""
    file_size: int = 0


@dataclass
class Seen:
    """How a command ended: exit code, or minus a signal; None: it hung, or (`stopped`) waits for `pid` to go on."""

    code: int | None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    operations: int = 0
    reached: list[str] = field(default_factory=list)
    pid: int = 0

    @property
    def said(self) -> str:
        return f"{self.err}\n{self.out}"


def run(
    target: Callable[[], object],
    here: Path,
    *,
    variables: Mapping[str, str | None] | None = None,
    stdin: bytes | None = None,
    terminal: tuple[Terminal, Terminal] = ("file", "file"),
    fault: Fault | None = None,
    limit: float = HANG,
) -> Seen:
    """Do `target` in folder `here`. With a fault whose signal is SIGSTOP it is left stopped, and `pid` is set."""
    said = [here.parent / f"{here.name}.{stream}" for stream in ("out", "err", "notes")]
    for file in said:
        file.write_bytes(b"")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            _die_with_parent()
            _stage(here, said, variables or {}, stdin, terminal)
            code = _do(target, said[2], fault or Fault(), here)
        finally:
            os._exit(code)
    began = time.monotonic()
    code, stopped = _wait(pid, limit)
    notes = said[2].read_text().split("\n")
    seen = Seen(code, *(file.read_bytes()[:2_000_000].decode(errors="replace") for file in said[:2]))
    seen.seconds, seen.reached = time.monotonic() - began, notes[1:]
    seen.operations = int(notes[0] or 0)
    if stopped:
        seen.pid = pid
    return seen


def end(seen: Seen) -> None:
    """Kill a command that was left stopped."""
    os.killpg(seen.pid, signal.SIGKILL)
    os.waitpid(seen.pid, 0)


def _wait(pid: int, limit: float) -> tuple[int | None, bool]:
    """The exit code (None: killed as it hung), and whether it has stopped itself."""
    began, pause = time.monotonic(), 0.001
    while True:
        done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if done and os.WIFSTOPPED(status):
            return None, True
        if done:
            _kill_group(pid)
            return os.waitstatus_to_exitcode(status), False
        if time.monotonic() > began + limit + _waited_for_a_core(pid):
            _kill_group(pid)
            os.waitpid(pid, 0)
            return None, False
        time.sleep(pause)
        pause = min(0.02, pause * 1.3)


def _waited_for_a_core(pid: int) -> float:
    """Seconds in which a process could have run, but others did: a busy machine makes nothing hang."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


# ---- In the child


def _stage(
    here: Path,
    said: Sequence[Path],
    variables: Mapping[str, str | None],
    stdin: bytes | None,
    terminal: tuple[Terminal, Terminal],
) -> None:
    os.chdir(here)
    own = {"TMPDIR": str(here / "tmp"), "HOME": str(here / "home"), "NO_COLOR": "1", "COLUMNS": "120"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(own)
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _feed(stdin)
    for number, (kind, file) in enumerate(zip(terminal, said[:2], strict=True), 1):
        _connect(number, kind, file)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (space + SPARE, space + SPARE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, LONGEST))


def _die_with_parent() -> None:
    """A case that hangs must not outlive tests that are interrupted."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _feed(stdin: bytes | None) -> None:
    """A pipe with these bytes (at most what a pipe holds), or nothing."""
    if stdin is None:
        source = os.open(os.devnull, os.O_RDONLY)
    else:
        source, sink = os.pipe()
        os.write(sink, stdin[:60_000])
        os.close(sink)
    os.dup2(source, 0)
    os.close(source)


def _connect(number: int, kind: Terminal, file: Path) -> None:
    name = ("stdout", "stderr")[number - 1]
    if kind == "closed":
        os.close(number)
        setattr(sys, name, None)
        return
    if kind == "head":
        reader, target = os.pipe()
        os.close(reader)
    else:
        target = os.open("/dev/full" if kind == "full" else file, os.O_WRONLY | os.O_APPEND)
    os.dup2(target, number)
    if target != number:
        os.close(target)
    encoding = "ascii" if kind == "ascii" else "utf-8"
    errors = "strict" if number == 1 else "backslashreplace"
    setattr(sys, name, open(number, "w", encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115
    setattr(sys, f"__{name}__", getattr(sys, name))


def _do(target: Callable[[], object], notes: Path, fault: Fault, here: Path) -> int:
    """The exit code of a Python process that does `target`."""
    descriptor = os.open(notes, os.O_WRONLY)
    operations = [0]
    reached.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.addaudithook(_operations(operations, fault, str(here)))
    if fault.step:
        _at_step(fault)
    if fault.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_size, fault.file_size))
    try:
        target()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if sys.stderr is not None:
            _quietly(traceback.print_exc)
    finally:
        os.write(descriptor, "\n".join([str(operations[0]), *sorted(reached)]).encode())
    for stream in (sys.stdout, sys.stderr):  # as the interpreter does at its end
        if stream is not None and not _quietly(stream.flush):
            code = code or 120
    return code


def _quietly(write: Callable[[], object]) -> bool:
    try:
        write()
    except (OSError, ValueError):
        return False
    return True


def _operations(count: list[int], fault: Fault, here: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that counts operations which change files in `here`, and has `fault` strike at one of them."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in WRITES:
            return
        if isinstance(arguments[0], int):  # a descriptor: its opening was counted
            return
        path = os.path.join(os.getcwd(), os.fsdecode(arguments[0]))
        if not path.startswith(here) or "/home" in path:
            return
        count[0] += 1
        if not fault.after or count[0] < fault.after:
            return
        if fault.signal and count[0] == fault.after:
            os.kill(os.getpid(), fault.signal)
        if fault.errno and fault.path in path and event not in ("os.remove", "os.rmdir"):
            raise OSError(fault.errno, os.strerror(fault.errno), path)

    return hook


def _at_step(fault: Fault) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = [0]

    def hook(*arguments: object) -> None:
        steps[0] += 1
        if steps[0] == fault.step:
            os.kill(os.getpid(), fault.signal)

    register_optimizer_step_post_hook(hook)


NO_SPACE, NO_PERMISSION, BROKEN = errno.ENOSPC, errno.EACCES, errno.EIO
