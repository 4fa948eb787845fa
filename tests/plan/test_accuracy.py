"""Predicted against published step times: fitted on few rows, judged on the others."""

from collections import defaultdict
from functools import cache

import numpy as np
import pytest

from plan.validation import A100, rows, run_of
from tessera.plan.calibrate import Run, calibrated, corrected, stacked
from tessera.plan.machine import far_apart, read_profile, written_profile
from tessera.plan.time import step_time

TABLES = {"vtrain_single_a100.csv": 60, "vtrain_multi_a100.csv": 24}
"""The rows of each table that calibration may see."""


@cache
def runs(name: str) -> list[Run]:
    return [run_of(row) for row in rows(name)]


@cache
def judged(name: str, seed: int | None = None):
    """The rows held out, and the predicted time of all. Rows seen are far apart, or drawn at random with a seed."""
    every = runs(name)
    if seed is None:
        seen = far_apart([run.place for run in every], TABLES[name])
    else:
        seen = list(np.random.default_rng(seed).permutation(len(every))[: TABLES[name]])
    held = np.setdiff1d(np.arange(len(every)), seen)
    profile = calibrated(A100, [every[i] for i in seen], "A100 here")
    time = step_time(stacked([run.work for run in every]), profile, stacked([run.pipeline for run in every]))
    time = corrected(time, np.asarray([run.place for run in every]), profile)
    return held, time


@pytest.mark.parametrize("name", TABLES)
def test_step_times_that_calibration_has_not_seen(name):
    held, time = judged(name)
    seconds = np.asarray([run.seconds for run in runs(name)])
    error = np.abs(time.total / seconds - 1)[held]
    assert error.mean() <= 0.09
    inside = np.abs(np.log(time.total / seconds)) <= np.broadcast_to(time.error, seconds.shape)
    assert inside[held].mean() >= 0.9
    assert np.max(time.error) <= 0.25


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.slow
def test_whichever_rows_calibration_sees(name):
    every = runs(name)
    seconds = np.asarray([run.seconds for run in every])
    errors = []
    for seed in range(8):
        held, time = judged(name, seed)
        errors.append(np.abs(time.total / seconds - 1)[held].mean())
    assert np.mean(errors) <= 0.09, errors


def test_the_layout_that_is_picked_is_nearly_the_best_measured():
    name = "vtrain_single_a100.csv"
    _, time = judged(name)
    groups = defaultdict(list)
    for place, row in enumerate(rows(name)):
        groups[tuple(row[key] for key in ("gpus", "global_batch_seqs", "hidden", "heads", "layers"))].append(place)
    first, of_three = [], []
    for places in groups.values():
        if len(places) < 2:
            continue
        seconds = np.asarray([runs(name)[place].seconds for place in places])
        picked = np.argsort(time.total[places])
        first.append(seconds[picked[0]] / seconds.min() - 1)
        of_three.append(seconds[picked[:3]].min() / seconds.min() - 1)
    assert len(first) > 50
    assert np.mean(first) <= 0.05
    assert np.mean(of_three) <= 0.01


def test_the_terms_add_up_and_a_profile_is_read_back(tmp_path):
    held, time = judged("vtrain_multi_a100.csv")
    assert np.allclose(sum(time.terms.values()), time.total)
    profile = calibrated(A100, runs("vtrain_multi_a100.csv")[:8], "A100 here")
    (tmp_path / "a.json").write_text(written_profile(profile))
    assert read_profile(tmp_path / "a.json") == profile
