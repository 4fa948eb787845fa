"""A process that tokenizes its share of a stream: `python -m tessera.data.stream_worker FD`.

Over the socket FD it is told the stream, the place to begin at, and its share; then it sends batches of tokens until
the other end closes, or a UserError as its four parts. The socket holds what it is ahead.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread

from tessera.core.errors import RunFailed, UserError
from tessera.data.place import Place
from tessera.data.stream import Stream, Tokens, token_batches


class Worker:
    """The worker of one share, seen from the process that started it."""

    def __init__(self, stream: Stream, place: Place, share: int, shares: int, size: int) -> None:
        self._socket, other = Pipe()
        command = [sys.executable, "-m", "tessera.data.stream_worker", str(other.fileno())]
        with other:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()])
        with suppress(OSError):  # it has ended: told when it is read from
            self._socket.send((stream, place, share, shares, size))

    def batch(self) -> list[Tokens]:
        """The next batch. UserError: the worker could not make it. RunFailed: it has ended."""
        try:
            told = self._socket.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise RunFailed(f"the process that tokenizes the stream has ended (exit code {code})") from None
        if isinstance(told, tuple):
            raise UserError(*told)
        found: list[Tokens] = told
        return found

    def kill(self) -> None:
        """End the process; who waits for a batch learns it."""
        self._process.kill()

    def close(self) -> None:
        """The same, when nobody waits for a batch any more."""
        self.kill()
        self._process.wait()
        self._socket.close()


def tokens_of_workers(workers: list[Worker]) -> Iterator[list[Tokens]]:
    """The batches of all shares, in their turn."""
    while True:
        for worker in workers:
            yield worker.batch()


def _end_with(socket: Connection) -> None:
    """The process that started this one sends nothing more; when it is gone, so is what it would have read."""
    with suppress(EOFError, OSError):
        socket.recv()
    os._exit(0)


def _work(socket: Connection) -> None:
    work = socket.recv()
    Thread(target=_end_with, args=[socket], daemon=True).start()
    try:
        for batch in token_batches(*work):
            socket.send(batch)
    except UserError as error:
        socket.send(error.parts)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a run that is asked to stop does one step more
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, pickle.UnpicklingError):
        _work(Connection(int(sys.argv[1])))
