"""What took more than was predicted is told once, with the term that is to blame; what did not, is not."""

from typing import Any

import pytest
import torch

from tessera.core.mesh import Mesh
from tessera.layout.resolve import parallel_of
from tessera.layout.shape import StepShape
from tessera.models.shapes import shape_of
from tessera.monitor.beside import ENOUGH, FEW_BYTES, SETTLING, Beside
from tessera.monitor.predicted import Prediction
from tessera.plan.choice import Training
from tessera.plan.cluster import cluster_of
from tessera.plan.recommend import Judged, judge_step
from tessera.sizes.rules import TensorParallel

GIB = 2**30
SECONDS = {"compute": 0.007, "data": 0.0, "optimizer": 0.001, "idle": 0.0, "other": 0.0}
KINDS = {"states": 4 * GIB, "activations": 2 * GIB, "gathered": GIB, "other": 0}


def expected(**changes: Any) -> Prediction:
    """A step of 9 ms ± 15%, of which communication along col takes 1 ms."""
    own = {"seconds": SECONDS | {"communication": {"col": 0.001}}, "kinds": KINDS, "band": 0.15}
    rest = {"tokens_per_second": 1e4, "profile": "here", "measured_here": True, "planner": {}}
    return Prediction(**(own | rest | changes))


def line(
    col: float = 0.001, *, shown: bool = True, kinds: dict[str, float] | None = None, **terms: float
) -> dict[str, Any]:
    """A line of metrics.jsonl, of a step as long as predicted but for these terms; `shown`: of a logging step."""
    seconds: dict[str, Any] = SECONDS | terms | {"communication": {"col": col}, "evaluation": 5.0, "save": 5.0}
    step = col + sum((SECONDS | terms).values())
    held: dict[str, Any] = {"memory": {"peak_gib": 9.0} | ({"kinds_gib": kinds} if kinds else {})}
    return {"step_seconds": step} | (held | {"seconds": seconds} if shown else {})


def followed(lines: list[dict[str, Any]], prediction: Prediction | None = None, profiled: bool = False) -> Beside:
    beside = Beside(prediction or expected())
    for each in lines:
        beside.step(each, profiled)
    return beside


SLOW_START = [line(compute=9.0)] * SETTLING
"""The first steps take long and do not count."""


@pytest.mark.parametrize(
    "slow, told",
    [
        (
            line(col=0.0034),
            "slower than predicted: 11.4 ms a step against 9 ± 15%; most of it communication along col "
            "(3.4 against 1 ms); see docs/debugging/slow.md",
        ),
        (line(data=0.5, col=0.0034), "511 ms a step against 9 ± 15%; most of it data (500 against 0 ms)"),
        (line(compute=2.0), "2,002 ms a step against 9 ± 15%; most of it compute (2,000 against 7 ms)"),
    ],
)
def test_a_slow_run_says_which_term(slow, told):
    (only,) = followed(SLOW_START + [slow] * ENOUGH).more()
    assert told in only and only.startswith("slower than predicted: ")


def test_what_lies_within_the_band_is_not_told():
    within, beyond = 0.001 + 0.009 * 0.149, 0.001 + 0.009 * 0.151
    assert not followed(SLOW_START + [line(col=within)] * ENOUGH).more()
    assert followed(SLOW_START + [line(col=beyond)] * ENOUGH).more()


def test_few_steps_profiled_steps_and_profiles_from_elsewhere_say_nothing():
    slow = SLOW_START + [line(col=1.0)] * ENOUGH
    assert followed(slow).more()
    assert not followed(slow[:-1]).more()
    assert not followed(slow, profiled=True).more()
    assert not followed(slow, expected(measured_here=False)).more()


def test_a_few_slow_steps_are_no_slow_run():
    """The median counts: of seven steps three may take any time."""
    assert not followed(SLOW_START + [line()] * 4 + [line(compute=9.0)] * 3).more()


def test_a_line_that_has_one_of_the_first_steps_in_it_does_not_count():
    """Every fourth step is shown; the first line has the slow start in it."""
    between = [line(shown=False)] * 3
    beside = followed([*between, line(compute=9.0), *between, line(col=0.004)])
    assert beside.seconds == pytest.approx(SECONDS | {"communication along col": 0.004} | {"compute": 0.007})
    without = followed([*between, line(compute=9.0)] + [line(shown=False) | {"step_seconds": 1.0}] * ENOUGH)
    assert without.seconds == {}
    assert without.more() == ["slower than predicted: 1,000 ms a step against 9 ± 15%; see docs/debugging/slow.md"]


def test_an_axis_that_only_some_lines_have_counts_as_nothing_in_the_others():
    lines = SLOW_START + [line()] * 3
    lines[-1] = lines[-1] | {"seconds": SECONDS | {"communication": {"row": 0.5}}}
    assert followed(lines).seconds["communication along row"] == 0.0


@pytest.mark.parametrize("measured_here", [True, False])
def test_a_peak_above_the_prediction_names_the_kind(measured_here):
    """Whatever the profile: no rate of the machine is in it."""
    kinds = {"states": 4.1, "activations": 2.5, "gathered": 1.0, "other": 0.0}
    (only,) = followed([line(kinds=kinds)], expected(measured_here=measured_here)).more()
    assert only == (
        "larger than predicted: 7.6 GiB at the peak against 7 GiB; most of it activations and other "
        "(2.5 GiB against 2 GiB); see docs/debugging/out-of-memory.md"
    )
    at_the_edge = kinds | {"activations": 7 * 1.029 - 5.1}
    assert not followed([line(kinds=at_the_edge)]).more()
    few = dict.fromkeys(KINDS, 0) | {"states": FEW_BYTES}
    assert not followed([line(kinds={"states": 2 * FEW_BYTES / GIB})], expected(kinds=few)).more()


def test_the_summary_has_both():
    beside = followed(SLOW_START + [line(col=0.0034, kinds={"states": 1.0})] * ENOUGH)
    found = beside.record()
    assert found["predicted"]["step_seconds"] == pytest.approx(0.009) and found["predicted"]["band"] == 0.15
    assert found["measured"]["step_seconds"] == pytest.approx(0.0114) and found["measured"]["steps"] == ENOUGH
    assert found["measured"]["seconds"]["communication along col"] == 0.0034
    assert found["measured"]["kinds_gib"] == {"states": 1.0} and len(found["more_than_predicted"]) == 1


def judged(sequence: int) -> Judged:
    """The planner's view of one step of an 8B model on eight H100."""
    model, cluster = shape_of("8B"), cluster_of("8xH100")
    mesh = Mesh({"shard": 2, "row": 2, "col": 2}, device="meta", rank=0)
    tensor = TensorParallel("2d", mesh={"row": 2, "col": 2})
    parallel = parallel_of(tensor, mesh, 2, model.dimensions, compute=torch.bfloat16)
    training = Training(sequence, 4)
    return judge_step(model, StepShape(2, sequence, 1), parallel, cluster, training, "here")


@pytest.mark.parametrize("sequence", [256, 16384])
def test_every_term_and_kind_of_the_planner_is_in_the_monitor_s(sequence):
    """Rows are so short that most is held where gradients are summed, or so long that it is in the loss."""
    found = judged(sequence)
    prediction = Prediction.of(found, measured_here=False)
    assert prediction.step_seconds == pytest.approx(found.seconds, rel=1e-12)
    assert prediction.peak == found.peak.total
    communication = prediction.seconds["communication"]
    assert {"col", "row"} & {axis for axes in communication for axis in axes.split("·")} == {"col", "row"}
    assert 0 < prediction.seconds["optimizer"] < prediction.seconds["compute"]
    assert sum(prediction.planner.values()) == pytest.approx(found.seconds, rel=1e-12)
    peak, forward = found.peak, sequence == 16384
    assert (peak.moment == "loss") == forward and peak.working > 0
    assert prediction.kinds["other"] == (0 if forward else peak.working)
    assert "not measured here: run tessera measure" in str(prediction) and len(str(prediction)) < 150
