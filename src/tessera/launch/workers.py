"""Runs the ranks of this machine through torch's elastic agent, again if need be, and ends them well.

    SIGINT, SIGTERM,   forwarded once to every rank as SIGTERM (one that SIGSTOP holds is woken): the ranks save and
    SIGHUP             exit 0, and so do we
    a second one       kills the ranks
    a rank fails       the others get GRACE seconds to notice, then are killed; the cause is told, or all start again
    a rank hangs       the others fail at the group's timeout; it is asked for its stack, killed and named
    a machine is lost  the ranks here are killed; the machine is named (machines.py)
    kill -9 on us      every rank asked the kernel to die with its parent

The agent is used directly instead of `elastic_launch`: only so are the worker processes known, which the table above
needs. Each attempt has an agent, a store and a folder of logs of its own: nothing of an attempt that failed is left in
the next. Imports torch only when ranks are started.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tessera.core import terminal
from tessera.core.errors import RunFailed
from tessera.launch.interface import loopback_variables
from tessera.launch.machines import Machines, Meeting, Place
from tessera.launch.outcome import Outcome, cause
from tessera.launch.rank import ATTEMPT, KEY, LAUNCHER
from tessera.launch.scratch import scratch
from tessera.launch.watch import StopSignals, Watch

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent


@dataclass(frozen=True)
class Restarts:
    """How often the ranks may be started again after a failure, which checkpoint (a path) they then go on from, and
    what they are handed (JSON) to go on from that, or to begin; and what to tell where memory has run out."""

    most: int = 0
    resume: Callable[[], str | None] = lambda: None
    handed: Callable[[str | None], str] = lambda resume: "{}"
    less_memory: Callable[[], list[str]] = lambda: []


def run_workers(
    args: Sequence[str], processes: int, machines: Machines | None = None, restarts: Restarts | None = None
) -> None:
    """Run `python args...` in `processes` ranks on this machine, with the environment that torchrun gives.

    Rank 0's output and every rank's errors go to the terminal. Returns when every rank has exited with 0, on all
    `machines`; raises `RunFailed` with one message about the rank or machine that failed first.
    """
    machines, restarts = machines or Machines(Place(), processes), restarts or Restarts()
    attempt = 0
    with StopSignals(restarts.resume) as signals:
        while True:
            resume = restarts.resume if attempt else lambda: None
            meeting = machines.meet(attempt, resume, restarts.handed, signals.check)
            if attempt:
                begun = f"from {meeting.resume}" if meeting.resume else "as at first: this run has no whole checkpoint"
                terminal.say(f"starting again (restart {attempt} of {restarts.most}), {begun}", error=True)
            own = _attempt(args, machines, attempt, meeting, signals, restarts.less_memory)
            outcomes = machines.settle(attempt, own, lambda: signals.check(1))
            failed = cause(outcomes)
            if failed is None:
                return
            if not failed.again or attempt >= restarts.most or any(outcome.stopped for outcome in outcomes):
                raise failed.error()
            terminal.say(failed.text, error=True)
            attempt += 1


@contextmanager
def stopped_as(text: str) -> Iterator[None]:
    """A stop by a signal says this, where ranks train nothing and no checkpoint is lost."""
    try:
        yield
    except RunFailed as failure:
        if failure.exit_code > 128:  # by a signal
            raise RunFailed(text, failure.exit_code) from None
        raise


def _attempt(
    args: Sequence[str],
    machines: Machines,
    attempt: int,
    meeting: Meeting,
    signals: StopSignals,
    less_memory: Callable[[], list[str]],
) -> Outcome:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // machines.processes))),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # the others are ours
        LAUNCHER: str(os.getpid()),
        ATTEMPT: str(attempt),
        KEY: machines.seal.key.hex(),
    }
    if machines.place.machines == 1:
        variables |= loopback_variables()
    with scratch() as logs, environment(variables), _quiet_agent():
        agent = _agent(args, machines, meeting, logs)
        watch = Watch(agent, machines, attempt, signals, less_memory)
        try:
            with watch:
                result = agent.run()
        except SignalException as stop:
            raise RunFailed(f"killed by {stop.sigval.name}", 128 + stop.sigval) from None
        except DistError as error:  # of the store, before there were ranks
            return Outcome("follows", f"the machines could not begin together: {error}", 1)
        return watch.outcome(result.failures)


def _agent(args: Sequence[str], machines: Machines, meeting: Meeting, logs: str) -> "LocalElasticAgent":
    from torch.distributed.elastic.agent.server import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

    from tessera.launch.rendezvous import Rendezvous

    spec = WorkerSpec(
        role="rank",
        local_world_size=machines.processes,
        rdzv_handler=Rendezvous(machines.place, meeting),
        entrypoint=sys.executable,
        args=tuple(arg.replace("$", "$$") for arg in args),  # the agent fills in ${local_rank}
        max_restarts=0,  # an attempt is an agent; run_workers decides on the next with all machines
        local_addr=meeting.address,
    )
    speaking = 1 if machines.place.rank == 0 else 0
    silent = dict.fromkeys(range(speaking, machines.processes), Std.OUT)
    # How the others ended is `settle`'s to find out: the agent's own barrier would wait for a lost machine, and its
    # store warns of a time that is over.
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs, redirects=silent))
    agent._exit_barrier = lambda: None  # type: ignore[method-assign]
    return agent


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with these `values` too, for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent's own account of a failure stays unsaid: `RunFailed` tells it once."""
    agent, nothing = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    before, agent.propagate = agent.propagate, False
    agent.addHandler(nothing)
    try:
        yield
    finally:
        agent.removeHandler(nothing)
        agent.propagate = before
