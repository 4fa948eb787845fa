"""Scaling studies and quoted tables: what they compare, against what, and what they mark."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tessera.cli.main import app
from tessera.core.errors import UserError
from tessera.models.shapes import shape_of
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of
from tessera.plan.on_mesh import fastest_found, fastest_on, without_limit
from tessera.plan.quoted import Searches, smallest_on
from tessera.plan.quoted_layouts import CLAIMS
from tessera.plan.quoted_rates import LLAMA_70B, llama_70b
from tessera.plan.recommend import judge
from tessera.plan.scaling import BEST, CURVES, QUOTED, nearest_meshes, scaling_study
from tessera.plan.scaling_report import NEAREST, UNLIMITED, draw, markdown, marks
from tessera.plan.search import search

MODEL = replace(shape_of("124M"), num_layers=2)
CLUSTER = cluster_of("Nx8xA100-80")
TRAINING = Training(sequence_len=256, global_batch=16)


@pytest.fixture(scope="module")
def study():
    return scaling_study("small", MODEL, CLUSTER, TRAINING, [1, 8])


def at(points, curve, devices):
    (point,) = [point for point in points if (point.curve, point.devices) == (curve, devices)]
    return point


def test_one_device_is_the_baseline_and_weak_meets_strong_at_the_most_devices(study):
    assert all(at(study.strong, curve, 1).speed_up == 1 for curve in CURVES)
    assert {point.rows for point in study.strong} == {16}
    assert [at(study.weak, "1D", devices).rows for devices in (1, 8)] == [2, 16]
    assert all(at(study.weak, curve, 8) == at(study.strong, curve, 8) for curve in CURVES)
    assert at(study.weak, "1D", 1).speed_up < 1  # two rows keep one device less busy than sixteen


def test_a_geometry_takes_its_own_shape_or_the_nearest_which_is_marked(study):
    points = {curve: at(study.strong, curve, 8) for curve in CURVES}
    assert points["1D"].mesh == "shard 2 × col 4"  # twelve heads are not cut eight ways
    assert sorted(points["2D"].mesh.split(" × ")) in (["col 2", "row 4"], ["col 4", "row 2"])
    assert points["2.5D"].mesh == "depth 2 × row 2 × col 2"
    assert points["3D"].mesh == "inner 2 × row 2 × col 2"
    assert {curve: marks(point) for curve, point in points.items()} == {
        "1D": NEAREST, "2D": NEAREST, "2.5D": "", "3D": "", BEST: "",
    }  # fmt: skip
    assert all(point.speed_up <= points[BEST].speed_up for point in points.values())


@pytest.mark.parametrize(
    "geometry, tensor, first",
    [
        ("2D", 64, {"row": 8, "col": 8}),
        ("2.5D", 64, {"depth": 4, "row": 4, "col": 4}),
        ("2.5D", 32, {"depth": 2, "row": 4, "col": 4}),
        ("3D", 27, {"inner": 3, "row": 3, "col": 3}),
    ],
)
def test_the_nearest_mesh_of_a_size_that_has_the_shape_is_the_shape(geometry, tensor, first):
    distance, meshes = nearest_meshes(geometry, tensor)[0]
    above_one = [{axis: n for axis, n in mesh.items() if n > 1} for mesh in meshes]
    assert not any(distance) and above_one == [first]


def test_what_does_not_fit_is_predicted_with_unlimited_memory_and_marked():
    tight = replace(CLUSTER, profile=replace(CLUSTER.profile, memory_bytes=2**20))
    found = scaling_study("small", MODEL, tight, TRAINING, [4])
    point = at(found.strong, "1D", 4)
    assert not point.fits and UNLIMITED in marks(point) and point.judged.layout.recompute == "false"
    assert any(BEST in reason for reason in found.missing)
    free = fastest_on(MODEL, {"col": 4}, without_limit(CLUSTER.of(4)), TRAINING)
    assert point.judged.seconds == free.seconds
    assert found.baseline.seconds == fastest_on(MODEL, {}, CLUSTER.of(1), TRAINING).seconds


def test_one_mesh_alone_is_judged_as_the_search_judges_it():
    sizes = {"shard": 2, "col": 2}
    _, layout = fastest_found(search(MODEL, CLUSTER.of(4), TRAINING), sizes)
    own = fastest_on(MODEL, sizes, CLUSTER.of(4), TRAINING)
    assert own.seconds == judge(MODEL, layout, CLUSTER.of(4), TRAINING).seconds
    assert fastest_on(MODEL, {"col": 8}, CLUSTER.of(8), TRAINING) is None


def test_stages_by_formula_divide_the_layers_and_wait():
    sizes, cluster = {"col": 2}, without_limit(CLUSTER.of(8))
    whole, staged = fastest_on(MODEL, sizes, cluster, TRAINING), fastest_on(MODEL, sizes, cluster, TRAINING, 2)
    assert whole.time.bubble == 0 < staged.time.bubble and staged.devices == 4
    assert staged.peak.states < whole.peak.states and staged.flops == whole.flops
    assert fastest_on(MODEL, sizes, cluster, TRAINING, 3) is None  # of two layers


def test_what_is_quoted_is_what_people_quote(study):
    said = (
        "1D 7.2/13.8/24.1/35.2/42.1/45.8, 2D 7.5/14.9/28.3/52.1/89.4/142.7, 2.5D 7.8/15.2/29.1/56.8/102.3/178.9, "
        "3D 7.6/15.0/29.7/58.4/108.2/201.3"
    )
    devices = (8, 16, 32, 64, 128, 256)
    words = dict(part.split(" ") for part in said.split(", "))
    assert {
        name: dict(zip(devices, map(float, numbers.split("/")), strict=True)) for name, numbers in words.items()
    } == QUOTED
    point = at(study.strong, "2D", 8)
    assert point.quoted == 7.5 and point.quoted_mfu == pytest.approx(7.5 / 8 * study.baseline.mfu)


def test_a_study_is_written_with_its_baseline(study, tmp_path):
    text = markdown(study, "tessera plan")
    assert "one such device with unlimited memory" in text and "| 8 | 3D | 7.6 |" in text
    draw(study, tmp_path / "scaling.svg")
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.parametrize(
    "words, key",
    [
        (["--cluster", "8xA100-80", "--scaling", "8"], "--cluster"),
        (["--cluster", "Nx8xA100-80", "--scaling", "12"], "--scaling"),
        (["--cluster", "Nx8xA100-80", "--scaling", "many"], "--scaling"),
        (["--cluster", "Nx8xA100-80", "--scaling", "8", "--global-batch", "9"], "--global-batch"),
        (["--scaling", "8"], "MODEL"),
    ],
)
def test_what_cannot_be_studied_is_refused(words, key):
    subject = [] if key == "MODEL" else ["124M"]
    result = CliRunner().invoke(app, ["plan", *subject, *words])
    assert isinstance(result.exception, UserError) and result.exception.key == key


def test_the_quoted_layouts_of_large_models_need_more_devices_than_quoted():
    makes = {claim.layout: claim.makes for claim in CLAIMS if claim.stages > 1}
    assert makes == {"2D 4 × 4 × PP 2–4 × DP 2": [128], "2.5D / 3D TP 64+ × PP 8+ × DP 2–4": [1024, 2048]}


def test_the_quoted_rates_of_llama_70b_exceed_a_device():
    table = llama_70b(Searches(CLUSTER))
    column = table.headings.index("takes TFLOP/s a device")
    assert LLAMA_70B == {1: (65, 1800), 2: (45, 1600), 4: (30, 1400)}
    assert all(float(row[column]) > 312 for row in table.rows)


def test_a_layout_of_one_row_at_a_time_is_the_least_that_a_mesh_holds():
    least = smallest_on(MODEL, {"shard": 4}, CLUSTER.of(4), TRAINING)
    every = [Layout({"shard": 4}, 1, 4, recompute) for recompute in ("false", "selective", "true")]
    assert least.peak.total == min(judge(MODEL, each, CLUSTER.of(4), TRAINING).peak.total for each in every)
