"""Runs that were trained, as steps that a profile is brought to: what `tessera measure --fit` reads."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tessera.config.load import load_config
from tessera.core import terminal
from tessera.core.errors import UserError
from tessera.core.json_lines import Lines, number
from tessera.measure.session import today, written
from tessera.measure.steps import brought
from tessera.plan.calibrate import Run
from tessera.plan.cluster import cluster_of
from tessera.plan.machine import Cluster
from tessera.train.foresee import run_of
from tessera.train.notes import METRICS, RESOLVED
from tessera.train.run import model_of

KEY = "--fit"
WARM = 2
"""Steps at the beginning of a run that do not count: what is made once is made in them."""
LEAST = 5
"""Steps that a run has to have beside them."""


def trained_run(folder: Path, cluster: Cluster) -> Run:
    """The step of the run in `folder` on machines of `cluster`, and the median of its seconds.

    Raises UserError for a folder without a run, or with fewer than `LEAST` steps after the first.
    """
    if not (folder / RESOLVED).is_file():
        raise UserError(KEY, folder, f"holds no run: there is no {RESOLVED}", "the output_dir of a run")
    config, _ = load_config(folder / RESOLVED)
    seconds = step_seconds(folder / METRICS)
    if len(seconds) < LEAST:
        reason = f"has {len(seconds)} steps whose time counts, after the first {WARM}"
        raise UserError(KEY, folder, reason, f"a run of {WARM + LEAST} steps or more")
    return run_of(config, model_of(config), cluster, statistics.median(seconds))


def step_seconds(metrics: Path) -> list[float]:
    """Seconds of every step in a metrics.jsonl but the first `WARM`. Empty without such a file."""
    lines, found = Lines(metrics), list[float]()
    lines.began_anew()
    for block in lines.new():
        for record in block:
            took = number(record.get("step_seconds"))
            if took is not None and took > 0:
                found.append(took)
    return found[WARM:]


def fit_runs(folders: Sequence[Path], output: Path | None) -> None:
    """Bring the profile of this machine to the runs in `folders`, tell how near it comes, write it.

    The profile is the newest that was measured here, else the shipped one of the device.
    """
    cluster = cluster_of("this")
    runs = {str(folder): trained_run(folder, cluster) for folder in folders}
    profile, told = brought(cluster.profile, runs, "runs")
    profile = replace(profile, name=f"{re.sub('-[0-9]+-runs$', '', profile.name)}-{len(runs)}-runs", date=today())
    terminal.say(*told, "", *written(profile, output))
