"""A contender's processes: started once, asleep on a pipe between turns, killed when one of them fails."""

import datetime
import importlib
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contenders import Contender
from benchmarks.measure import Inspection, StepTime, inspect, reset_max_rss, timed
from benchmarks.workload import Shape, batch

START_SECONDS = 180.0
STEP_SECONDS = 60.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.workers", "torch.distributed.tensor.parallel", "transformers"])


class ContenderFailed(Exception):
    """A worker raised, died or did not answer; the text is the reason of the first that did."""


class Group:
    """The ranks of one contender. Starting gives an answer of each rank too: ask without a message for it."""

    def __init__(self, contender: Contender, shape: Shape, folder: Path):
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(contender.ranks):
            ours, theirs = CONTEXT.Pipe()
            args = (contender, shape, folder, rank, theirs)
            process = CONTEXT.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def ask(self, seconds: float, *message: str | int) -> list[Any]:
        """Call the method `message` names (then its arguments) on every rank; the answers, by rank.

        Raises:
            ContenderFailed: a rank failed, or did not answer within `seconds`; then all of them are killed.
        """
        if message:
            for connection in self.connections:
                connection.send(message)
        deadline = time.monotonic() + seconds
        answers: dict[Connection, Any] = {}
        while len(answers) < len(self.connections):
            silent: list[Any] = [c for c in self.connections if c not in answers]
            ready: list[Any] = wait(silent, timeout=max(0.0, deadline - time.monotonic()))
            error = "" if ready else f"no answer within {seconds:.0f} s"
            for connection in ready:
                try:
                    failed, answers[connection] = connection.recv()
                except EOFError:
                    failed, answers[connection] = "a rank died", None
                error = error or failed
            if error:
                for process in self.processes:
                    process.kill()
                raise ContenderFailed(error)
        return [answers[connection] for connection in self.connections]

    def close(self) -> None:
        """End every rank: those that listen see the pipe close, the others are killed."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(3)
            process.kill()
            process.join()


class Rank:
    """Inside a worker: the contender as `build` made it, and the number of its next step."""

    def __init__(self, contender: Contender, shape: Shape, folder: Path, rank: int):
        world = contender.ranks
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # as torchrun does
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / f"store-{contender.name}"), world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=STEP_SECONDS),
        )
        module = importlib.import_module(f"benchmarks.contenders.{contender.module}")
        self.training = module.build(shape, folder, rank, world, **contender.options)
        self.shape = shape
        self.next = 0

    def step(self) -> tuple[float, float]:
        tokens = batch(self.shape, self.next)
        self.next += 1
        return self.training.step(tokens)

    def run(self, count: int) -> list[StepTime]:
        return [timed(self.step) for _ in range(count)]

    def warm_up(self, count: int) -> list[StepTime]:
        times = self.run(count)
        reset_max_rss()
        return times

    def inspect(self) -> Inspection:
        return inspect(self.step)


def _serve(contender: Contender, shape: Shape, folder: Path, rank: int, connection: Connection) -> None:
    try:
        worker = Rank(contender, shape, folder, rank)
        connection.send(("", None))
        while True:
            method, *arguments = connection.recv()
            connection.send(("", getattr(worker, method)(*arguments)))
    except EOFError:  # the run is over
        return
    except Exception as error:
        text = "".join(traceback.format_exception_only(error)).strip()
        connection.send((f"rank {rank}: {text}", None))
        raise
