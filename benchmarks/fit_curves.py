"""The curves of collectives in src/tessera/plan/profiles, fitted to published times: `python benchmarks/fit_curves.py`.

Reads nccl_allreduce_intranode.csv and nccl_busbw_measured.csv in the folder of the validation data: that which the
variable TESSERA_VALIDATION_DATA names, else ../shared/data beside the checkout.

An all-reduce of S bytes over n ranks receives 2 S (n − 1) / n bytes a rank, a gather or a scatter S (n − 1) / n; the
bus bandwidth of nccl-tests is these bytes a second. Where all runs had the same number of ranks, hops are to alpha as
A100's are, whose runs had 2 to 8.
"""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tessera.plan.fitted import Fitted, Moved, fitted_curve
from tessera.plan.machine import Curve

Row = Mapping[str, str]
LEAST = 0.1
"""GB/s: the table has two digits after the point, so a smaller figure has one digit or none."""


def data_folder() -> Path:
    """Where the validation data lie."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("TESSERA_VALIDATION_DATA") or beside)


def read(name: str) -> list[Row]:
    """The rows of a table of the validation data."""
    with (data_folder() / name).open(newline="") as file:
        return list(csv.DictReader(file))


def moved(row: Row, steps: int | None = None) -> Moved:
    """A row of nccl_busbw_measured.csv, or of nccl_allreduce_intranode.csv; `steps` instead of its ranks."""
    ranks = int(row["ngpus"])
    passes = 2 if row.get("collective", "all_reduce") == "all_reduce" else 1
    received = passes * int(row["bytes"]) * (ranks - 1) / ranks
    seconds = float(row["time_us"]) / 1e6 if "time_us" in row else received / (float(row["busbw_GBps"]) * 1e9)
    return Moved(received, steps or ranks, seconds)


def curves() -> dict[str, Fitted[Curve]]:
    """Each curve by the profile and level that it is for; between machines the bandwidth is that of a device."""
    rows = [row for row in read("nccl_busbw_measured.csv") if row["bytes"] and float(row["busbw_GBps"]) >= LEAST]

    def chosen(gpu: str, algorithms: str, machines: int) -> list[Moved]:
        wanted: Callable[[Row], bool] = lambda row: (  # noqa: E731
            row["gpu"].startswith(gpu) and row["algo"].startswith(algorithms) and row["nodes"] == str(machines)
        )
        steps = machines if machines > 1 else None
        return [moved(row, steps) for row in rows if wanted(row) and row["collective"] == "all_reduce"]

    intranode = [moved(row) for row in read("nccl_allreduce_intranode.csv") if row["gpu"] == "a100"]
    found = {"A100 inside": fitted_curve([*intranode, *chosen("A100-80GB", "nccl-tests", 1)])}
    share = found["A100 inside"].value.hop_seconds / found["A100 inside"].value.alpha_seconds
    found["H200 inside all_reduce"] = fitted_curve(chosen("H200", "auto", 1), share)
    found["B200 inside all_reduce"] = fitted_curve(chosen("B200", "auto (EFA tuner)", 1), share)
    found["B200 between"] = _of_a_device(fitted_curve(chosen("B200", "auto, 8x50GBps", 4), share))
    found["unstated hardware between"] = _of_a_device(fitted_curve(chosen("4-node example", "", 4), share))
    return found


def _of_a_device(fitted: Fitted[Curve], beside: int = 8) -> Fitted[Curve]:
    """Of a group with `beside` ranks on each machine, whose links add up: the bandwidth of one."""
    curve = fitted.value
    one = Curve(curve.alpha_seconds, curve.hop_seconds, curve.root_seconds, curve.bytes_per_second / beside)
    return fitted._replace(value=one)


def lines(found: Mapping[str, Fitted[Curve]]) -> Sequence[str]:
    """A table, a line for each curve."""
    told = [f"{'':28}{'alpha µs':>10}{'hop µs':>8}{'root ns/√B':>12}{'GB/s':>8}{'mean error':>12}{'largest':>9}"]
    for name, (curve, mean, largest) in found.items():
        numbers = f"{1e6 * curve.alpha_seconds:10.2f}{1e6 * curve.hop_seconds:8.2f}{1e9 * curve.root_seconds:12.2f}"
        told.append(f"{name:28}{numbers}{curve.bytes_per_second / 1e9:8.1f}{mean:12.1%}{largest:9.1%}")
    return told


if __name__ == "__main__":
    print("\n".join(lines(curves())))
