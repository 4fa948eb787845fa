"""Drivers of machines that are not here: what `nvidia-smi` prints there, as it prints it."""

from collections.abc import Sequence
from pathlib import Path

MACHINES = Path(__file__).with_name("machines")


def driver(name: str, *, old: bool = False):
    """Answers as the driver of the machine `name`; an `old` one refuses the newer name of a field."""

    def ask(words: Sequence[str]) -> str | None:
        if not words:
            return (MACHINES / "driver.txt").read_text()
        if words[0] == "topo":
            return (MACHINES / f"{name}.topo.txt").read_text()
        if old and "clocks_event_reasons.active" in words[0]:
            return None
        return (MACHINES / f"{name}.csv").read_text()

    return ask
