"""Clusters as people write them, the shipped profiles, the time of a collective on a profile, and what was fitted."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.fit_curves import curves, data_folder

from tessera.core.errors import UserError
from tessera.models.config import ModelConfig
from tessera.nn.rope import RopeConfig
from tessera.plan.choice import Layout, Training
from tessera.plan.cluster import cluster_of, kept_profiles, profile_for
from tessera.plan.fitted import Attended, Moved, Multiplied, fitted_attention, fitted_curve, fitted_product
from tessera.plan.machine import Curve, Profile, read_profile, shipped_profiles, written_profile
from tessera.plan.time import step_time
from tessera.plan.work import step_work

SHIPPED = shipped_profiles()


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


NAMED = {
    "8xH100": (1, 8, "H100"),
    "16xH100": (2, 8, "H100"),
    "2x8xH100": (2, 8, "H100"),
    "2 x 4 × h100 sxm": (2, 4, "H100"),
    "4x8xA100-80": (4, 8, "A100-80"),
    "a100": (1, 1, "A100-80"),
    "A100-80GB": (1, 1, "A100-80"),
    "NVIDIA A100-SXM4-80GB": (1, 1, "A100-80"),
    "8xNVIDIA A100-SXM4-40GB": (1, 8, "A100-40"),
    "NVIDIA H100 80GB HBM3": (1, 1, "H100"),
    "RTX 4090": (1, 1, "RTX4090"),
    "2x4090": (1, 2, "RTX4090"),
    "NVIDIA GeForce RTX 4090": (1, 1, "RTX4090"),
    "144xGB200 NVL72": (2, 72, "GB200"),
    "8xAMD Instinct MI300X": (1, 8, "MI300X"),
    "Nx8xA100-80": (0, 8, "A100-80"),
    "NxH100": (0, 8, "H100"),
}


@pytest.mark.parametrize("text", NAMED)
def test_a_cluster_is_what_its_text_says(text: str) -> None:
    cluster = cluster_of(text)
    assert (cluster.machines, cluster.per_machine, cluster.profile.name) == NAMED[text]


REFUSED = {
    "12xH100": "8xH100, 16xH100, or machines that are not full, such as 2x4xH100",
    "2x16xH100": "write 8 for each",
    "8xH101": "nearest: H100",
    "H100 PCIe": "nearest: H100",
    "A100-60": "nearest: A100-80",
    "8xV100": "there are A100-40",
    "0xH100": "for example 8xH100",
    "8xNxH100": "write Nx8xH100",
    "99999999x8xH100": "for example",
    "9" * 5000 + "xH100": "for example",
    "": "for example",
    "8x": "for example",
    "nowhere.yaml": "for example",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_names_no_cluster_is_refused_with_what_would(text: str) -> None:
    with pytest.raises(UserError) as refused:
        cluster_of(text)
    assert REFUSED[text] in refused.value.hint


def test_an_open_cluster_becomes_one_of_any_size() -> None:
    cluster = cluster_of("Nx8xA100-80")
    assert str(cluster).startswith("N × 8") and [cluster.of(devices).machines for devices in (1, 8, 16)] == [1, 1, 2]


def test_a_file_names_a_cluster(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("machines: 3\ndevices_per_machine: 4\nprofile: a100-40\n")
    assert str(cluster_of(str(file))).startswith("3 × 4 × NVIDIA A100 40GB")
    own = replace(SHIPPED["H100"], name="ours", devices_per_machine=6)
    (tmp_path / "ours.json").write_text(written_profile(own))
    file.write_text("machines: 2\nprofile: ours.json\n")
    assert cluster_of(str(file)).profile == own and cluster_of(str(file)).devices == 12
    assert cluster_of(str(tmp_path / "ours.json")).devices == 6
    assert cluster_of("2x3xH100", own).profile == own


@pytest.mark.parametrize(
    "text",
    ["machine: 3\nprofile: H100", "machines: 0\nprofile: H100", "machines: yes\nprofile: H100", "profile: [H100]",
     "machines: 2", "devices_per_machine: 9\nprofile: H100", "profile: none.json", "- 8", "profile: H10O"],
)  # fmt: skip
def test_a_file_that_names_no_cluster_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        cluster_of(str(file))
    assert refused.value.hint


def test_the_newest_profile_that_was_measured_of_a_device_counts(tmp_path: Path) -> None:
    here = cluster_of("this")
    assert here.machines == 1 and not here.profile.measured and here.profile.error > 0.5
    folder = tmp_path / "cache" / "tessera" / "profiles"
    folder.mkdir(parents=True)
    for age, (name, device) in enumerate(
        [("new", here.profile.device), ("old", here.profile.device), ("h100", "NVIDIA H100 80GB HBM3")]
    ):
        made = replace(here.profile, name=name, device=device, devices_per_machine=2, measured=True)
        (folder / f"{name}.json").write_text(written_profile(made))
        os.utime(folder / f"{name}.json", (10**9 - age, 10**9 - age))
    (folder / "broken.json").write_text("{")
    assert [profile.name for profile in kept_profiles()] == ["new", "old", "h100"]
    assert cluster_of("this").profile.name == "new" and cluster_of("this").per_machine == 2
    assert cluster_of("2x1xold").profile.name == "old" and cluster_of("4xH100").profile.name == "h100"
    several = [replace(here.profile, name=str(ranks), devices_per_machine=ranks) for ranks in (1, 4)]
    assert profile_for(here.profile.device, several, ranks=2) == several[1]
    assert profile_for("else", several) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_every_figure_that_ships_has_a_source(name: str) -> None:
    profile = SHIPPED[name]
    assert profile.name == name and not profile.measured and {"any", "all_reduce"} <= set(profile.inside)
    unset = {"pair_bandwidth": None, "residuals": None, "shared": {}, "pairs": (), "peak_flops": {}}
    about = {"name", "device", "devices", "stack", "date", "measured", "sources", "asynchronous"}
    figures = {each.name for each in fields(Profile)} - about
    wanted = {figure for figure in figures if getattr(profile, figure) != unset.get(figure, 0)} | {"step_seconds"}
    assert {key for key, source in profile.sources.items() if source} == wanted
    assert profile.product_flops <= profile.peak_flops.get("bfloat16", np.inf)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_profile_reads_as_it_was_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(written_profile(SHIPPED[name]))
    assert read_profile(tmp_path / "p.json") == SHIPPED[name]


@pytest.mark.parametrize(
    ("key", "value"),
    [("product_flops", 0), ("memory_bandwidth", 1e300), ("overlap", 2), ("contention", 0.5), ("inside", {}),
     ("memory_bytes", -1), ("devices_per_machine", 10**9), ("error", "NaN"), ("shared", {"links": {"2": 0}}),
     ("name", None)],
)  # fmt: skip
def test_absurd_figures_are_refused(key: str, value: object, tmp_path: Path) -> None:
    content = json.loads(written_profile(SHIPPED["H100"]))
    (tmp_path / "p.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(UserError, match=key):
        read_profile(tmp_path / "p.json")


def test_the_curves_that_ship_are_those_of_the_published_times() -> None:
    if not (data_folder() / "nccl_busbw_measured.csv").is_file():
        pytest.skip("the validation data are not here: TESSERA_VALIDATION_DATA names their folder")
    found = curves()
    for name, (_, mean, largest) in found.items():
        assert mean < 0.1 and largest < 0.35, name
    for profile, name in (("A100-80", "A100 inside"), ("H200", "H200 inside all_reduce")):
        shipped, fitted = SHIPPED[profile].inside["all_reduce"], found[name].value
        assert vars(shipped) == pytest.approx(vars(fitted), rel=1e-3), profile
    assert vars(SHIPPED["B200"].between["all_reduce"]) == pytest.approx(vars(found["B200 between"].value), rel=1e-3)


CURVE = Curve(2e-5, 3e-6, 5e-9, 2e11)


def test_a_curve_is_found_again_from_its_times() -> None:
    moved = [Moved(b, n, CURVE.seconds(b, n)) for n in (2, 4, 8) for b in (1e3, 1e5, 1e6, 1e7, 1e9)]
    curve, mean, _ = fitted_curve(moved)
    assert vars(curve) == pytest.approx(vars(CURVE), rel=1e-6) and mean < 1e-9
    one, _, _ = fitted_curve([each for each in moved if each.steps == 8], hop_share=CURVE.hop_seconds / 2e-5)
    assert vars(one) == pytest.approx(vars(CURVE), rel=1e-6)
    with pytest.raises(ValueError, match="no bandwidth"):
        fitted_curve([Moved(0, 2, 1e-5)])


def test_no_number_of_a_curve_is_negative() -> None:
    curve, _, largest = fitted_curve([Moved(1e6, 2, 1e-4), Moved(2e6, 2, 1e-4), Moved(4e6, 2, 9e-4)])
    assert min(vars(curve).values()) >= 0 and curve.bytes_per_second > 0 and largest > 0.1


def test_the_rate_of_products_is_found_again_from_their_times() -> None:
    sizes = [(64, 512, 512), (128, 1024, 512), (512, 512, 512), (2048, 1024, 4096)]
    times = [2 * m * n * k * (min(m, n, k) + 100) / min(m, n, k) / 5e10 for m, n, k in sizes]
    (flops, half), mean, _ = fitted_product([Multiplied(s, t) for s, t in zip(sizes, times, strict=True)])
    assert (flops, half) == pytest.approx((5e10, 100)) and mean < 1e-9


def test_the_rates_of_attention_are_found_again_from_what_the_planner_says_of_it() -> None:
    """A layer's attention, forward and backward, in the units in which the planner counts it."""
    profile = replace(
        SHIPPED["CPU"], attention_flops=5e10, attention_half=150.0, score_seconds=2e-9, asynchronous=False
    )
    attended = []
    for batch, heads, tokens, features in [(8, 8, 128, 16), (8, 8, 256, 64), (1, 8, 1024, 32), (2, 8, 512, 128)]:
        model = ModelConfig("llama", 64, heads * features, 1, heads, heads, features, 64, tokens, rope=RopeConfig())
        layout, training = Layout({}, batch, 1), Training(tokens, batch, "float32")
        parallel = layout.parallel(model, training)
        work = step_work(model, layout.shape(training, parallel), parallel, 1)
        attended.append(Attended((batch, heads, tokens, features), float(step_time(work, profile).attention)))
    found, mean, _ = fitted_attention(attended)
    assert found == pytest.approx((5e10, 150.0, 2e-9)) and mean < 1e-9


def test_where_devices_are_joined_in_pairs_few_have_few_links() -> None:
    mesh, received = SHIPPED["MI300X"], 2**30
    two, eight = (mesh.collective_seconds("all_gather", received, ranks) for ranks in (2, 8))
    assert two == pytest.approx(received / 48e9, rel=0.02) and 6 < two / eight < 7.1
    switched = replace(mesh, pair_bandwidth=None)
    assert switched.collective_seconds("all_gather", received, 2) < two / 6
    ranks = np.array([2, 8])
    assert mesh.collective_seconds("all_gather", received, ranks) == pytest.approx([two, eight])


def test_what_ranks_share_slows_them_by_what_was_measured() -> None:
    shared = {"product": {1: 1.0, 2: 1.5, 4: 3.5}, "links": {2: 0.5, 4: 1.0}}
    profile = replace(SHIPPED["CPU"], shared=shared)
    assert [profile.slowdown("product", ranks) for ranks in (1, 2, 3, 4, 8)] == [1, 1.5, 2.5, 3.5, 7]
    assert profile.slowdown("product", np.array([1, 3, 8])).tolist() == [1, 2.5, 7]
    assert profile.slowdown("links", 2) == 0.5 and profile.slowdown("memory", 4) == 1
    assert SHIPPED["H100"].slowdown("product", 8) == 1
