"""`tessera measure`: a profile of this machine, which `plan` and the predictions of a run use."""

from collections.abc import Sequence
from pathlib import Path

from tessera.core.errors import UserError
from tessera.launch.rank import is_rank
from tessera.measure.runs import fit_runs
from tessera.measure.session import Asked, measure, threads_asked


def run(output: Path | None, ranks: int | None, quick: bool, fit: Sequence[Path]) -> None:
    """Measure, and print what was found; or bring the profile to runs. Under torchrun the ranks are those it started.

    Raises UserError for options that do not go together.
    """
    started = is_rank()
    if fit:
        if quick or ranks is not None:
            other = "--quick" if quick else "--ranks"
            raise UserError("--fit", fit[0], f"measures nothing, so that {other} has no meaning", f"leave out {other}")
        if started:
            raise UserError("--fit", fit[0], "reads runs, and starts no ranks", "without torchrun")
        fit_runs(fit, output)
        return
    measure(Asked(output, quick, None if started else threads_asked()), ranks)
