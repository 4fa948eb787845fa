"""A request to stop, by signal: Ctrl+C, kill, or a terminal that is closed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from tessera.core.errors import RunFailed


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop: SIGINT, SIGTERM and SIGHUP, but not the last where nohup has it ignored."""
    heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if heard else [])]


class StopRequest:
    """The signals to stop only raise a flag: the ranks agree on it at the end of a step, save, and exit."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        try:
            self._before = {s: signal.signal(s, self._ask) for s in stop_signals()}
        except ValueError:  # not the main thread: nobody signals us here
            self._before = {}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


class _Stopped(BaseException):
    """No Exception: what handles those must not go on."""


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Before training has begun: a signal to stop ends what runs here, its files removed. Raises RunFailed then."""

    def stop(number: int, frame: object) -> NoReturn:
        raise _Stopped(number)

    try:
        before = {s: signal.signal(s, stop) for s in stop_signals()}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    except _Stopped as stopped:
        number = stopped.args[0]
        told = f"stopped by {signal.Signals(number).name} before training had begun: no checkpoint was saved"
        raise RunFailed(told, 128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
