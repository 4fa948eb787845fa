"""`tessera measure`: a profile of this machine, which `plan` and the predictions of a run use."""

from pathlib import Path

from tessera.launch.rank import is_rank
from tessera.measure.session import Asked, measure, threads_asked


def run(output: Path | None, ranks: int | None, quick: bool) -> None:
    """Measure, and print what was found. Under torchrun the ranks are those that it has started."""
    started = is_rank()
    measure(Asked(output, quick, None if started else threads_asked()), ranks)
