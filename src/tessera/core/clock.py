"""When something happened on a device: a moment is marked at once, and turned into seconds when a step is over.

On a GPU a mark is an event on its current stream: the host marks ahead of the device, and waits for nothing.
"""

import time
from typing import Any, Protocol

import torch

Mark = Any
"""A moment as its clock keeps it: seconds of the host, or an event of a GPU."""


class Clock(Protocol):
    """Marks moments. `blocks`: whether the host waits for a collective that it issues, as it does without a stream."""

    blocks: bool

    def mark(self) -> Mark:
        """This moment in the order of the device's work."""

    def start(self) -> None:
        """Say that the device has nothing left to do, as after a step's loss has been read."""

    def now(self) -> float:
        """This moment in seconds of the host's clock; of a device that has nothing left to do, its moment too."""

    def seconds(self, mark: Mark) -> float:
        """The moment in seconds of the host's clock, which processes of one machine share. The mark has passed."""


class HostClock:
    """Moments of this process."""

    blocks = True

    def mark(self) -> float:
        return time.perf_counter()

    def start(self) -> None:
        pass

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark


class CudaClock:
    """Moments of a GPU's current stream. `start` costs no wait: the stream is idle, so its event is passed by the next
    time that one is asked for."""

    blocks = False

    def __init__(self) -> None:
        self.start()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._host, self._zero = time.perf_counter(), self.mark()

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: torch.cuda.Event) -> float:
        """Milliseconds between two events are exact to a microsecond; both must have been marked since `start`."""
        return self._host + self._zero.elapsed_time(mark) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock of `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()
