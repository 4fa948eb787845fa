"""Curves in bounded memory: nothing is lost while there is room, then spikes, means and the last value stay."""

import numpy as np
import pytest

from tessera.report.curves import MOST, Curves


def curves_of(values: np.ndarray, block: int = 700, **options) -> Curves:
    """Curves of steps 1 to n, added in blocks; `values` are [curves, n]."""
    made = Curves(map(str, range(len(values))), **options)
    for first in range(0, values.shape[1], block):
        part = values[:, first : first + block]
        made.add(list(range(first + 1, first + 1 + part.shape[1])), part)
    return made


def test_all_points_are_kept_while_there_is_room():
    values = np.random.default_rng(0).normal(size=(2, MOST))
    made = curves_of(values)
    assert made.points("1") == (list(range(1, MOST + 1)), values[1].tolist())
    assert made.means("0") == values[0].tolist()


@pytest.mark.parametrize("block", [11, 97, 4096])
def test_of_many_points_extremes_means_and_the_last_stay(block):
    values = np.random.default_rng(1).normal(size=(3, 9_999))
    values[0, 5_432], values[0, 7_000] = 50.0, -50.0  # spikes of one step
    values[1, :9_000] = np.nan  # a curve that comes late
    values[2, ::2] = np.nan
    made = curves_of(values, block, most=64)
    assert made.width == 256 and len(made.steps()) <= 64
    steps, shown = made.points("0")
    assert dict(zip(steps, shown, strict=True)) | {5_433: 50.0, 7_001: -50.0} == dict(zip(steps, shown, strict=True))
    assert len(steps) <= 2 * 64 + 1 and steps == sorted(steps)
    assert all(values[0, at - 1] == value for at, value in zip(steps, shown, strict=True))
    assert steps[-1] == 9_999 and made.last("0") == values[0, -1]
    # every bucket, by numpy alone
    for at, mean in zip(made.steps(), made.means("2"), strict=True):
        own = [values[2, s - 1] for s in range(1, 10_000) if s // 256 == at // 256]
        assert mean == pytest.approx(np.nanmean(own), abs=1e-12)
    assert made.mean("1") == pytest.approx(np.nanmean(values[1])) and made.greatest("0") == 50.0
    assert min(made.points("1")[0]) > 9_000


def test_a_mean_alone_would_lose_the_spike():
    values = np.zeros((1, 10_000))
    values[0, 5_000] = 1.0
    made = curves_of(values, most=64)
    assert max(mean or 0 for mean in made.means("0")) < 0.01 < max(made.points("0")[1]) == 1.0


def test_steps_that_are_done_again_take_the_place_of_those_before():
    made = curves_of(np.arange(10.0)[None])
    made.go_back_to(6)
    assert made.last("0") is None or made.points("0")[0][-1] == 5
    made.add([6, 7], np.array([[60.0, 70.0]]))
    assert made.points("0") == ([1, 2, 3, 4, 5, 6, 7], [0.0, 1.0, 2.0, 3.0, 4.0, 60.0, 70.0])


def test_curves_without_values_are_not_there():
    made = Curves(["a"])
    made.add([1], np.array([[np.nan]]))
    assert "a" not in made and "b" not in made
    assert made.points("a") == ([], []) and made.mean("a") is made.greatest("b") is made.last("a") is None
