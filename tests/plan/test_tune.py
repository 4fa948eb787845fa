"""Schedule auto: it takes what it measured to be fastest within the memory limit, and remembers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from plan.tune_cases import MODEL, UNSLICED, asked, cache_at, config_of, peaks, told, told_apart, trained, trial_traffic
from support.pool import pool
from tessera.core import device as devices
from tessera.core.mesh import Mesh
from tessera.models.hub import read_model_config
from tessera.plan.cluster import profiles_folder
from tessera.plan.machine import Curve, shipped_profiles, written_profile
from tessera.plan.remembered import Remembered
from tessera.plan.tune import ROUNDS, Tuning, _key, _measure, beside_fastest, candidates, surely_behind
from tessera.sizes.schedule import Schedule
from train.runs import Workshop, metrics, save_rows

ALL = ["gather", "slices 2", "slices 4", "slices 8", "summa", "cannon"]


def mesh_of(config):
    return Mesh(config.axes, rank=0)


def possible(model=MODEL, **changes):
    config = config_of(**changes)
    return candidates(*asked(config), model, mesh_of(config), torch.float32)


def names(model=MODEL, **changes):
    return [candidate.name for candidate in possible(model, **changes)]


def gib_without(model, kind, **changes):
    """A limit that `kind` is above by a byte."""
    return next(c.scratch - 1 for c in possible(model, **changes) if c.name == kind) / 2**30


# ---- What is chosen


def test_it_takes_the_fastest_and_remembers(tmp_path):
    model = replace(MODEL, hidden_size=24)
    first = pool(4).run(told, tmp_path, model, {})
    schedule, times, lines, collectives = first[0]
    assert list(times) == names(model)
    assert schedule == min(times, key=times.__getitem__)
    assert "measured" in lines[0] and "32 tokens" in lines[0]
    marked = [line.split("  ")[1] for line in lines if "chosen" in line]
    assert marked == [schedule]
    assert collectives > 500
    assert {(s, tuple(t.items())) for s, t, _, _ in first} == {(schedule, tuple(times.items()))}, "ranks disagree"

    for again in pool(4).run(told, tmp_path, model, {}):
        assert again[:2] == (schedule, times)
        assert again[3] == 1, "products were run again"
        assert str(tmp_path / "tessera" / "schedules.json") in again[2][0]

    for other in pool(4).run(told, tmp_path, model, {"tensor_parallel_keep_gathered": True}, True):
        assert other[3] > 100, "this was not measured before"


def test_a_slow_collective_changes_the_choice(tmp_path):
    """To several times what two layers take otherwise."""

    def choice(seconds, *slow):
        ranks = pool(4).run(told, tmp_path / slow[0], UNSLICED, {}, False, slow, seconds)
        (chosen,) = {schedule for schedule, *_ in ranks}
        return chosen

    assert choice(0.02, "all_gather") in ("summa", "cannon")
    assert choice(0.015, "broadcast", "shift") == "gather"


def test_one_row_whose_sequence_is_shared_is_measured_as_others_are(tmp_path):
    one = {"micro_batch_size": 1, "sequence_len": 32, "context_parallel_mode": "ring"}
    for _, times, lines, _ in pool(4).run(told, tmp_path, UNSLICED, one):
        assert list(times) == names(UNSLICED, **one) == ["gather", "summa", "cannon"]
        assert "measured" in lines[0] and "32 tokens" in lines[0]


def test_beside_sequence_axes_there_is_one():
    config = config_of(context_parallel_size=2)
    mesh, context = Mesh(config.mesh_sizes, rank=0), config.context_parallel
    (only,) = candidates(*asked(config), MODEL, mesh, torch.float32, context)
    assert (only.name, only.parallel.fsdp) == ("gather", ("shard", "ring", "ulysses", "row"))


def test_what_is_above_the_memory_limit_is_not_run(tmp_path):
    limit = {"tensor_parallel_scratch_gib": gib_without(UNSLICED, "gather")}
    ranks = pool(4).run(told, tmp_path, UNSLICED, limit)
    for schedule, times, lines, _ in ranks:
        assert schedule in ("summa", "cannon")
        assert list(times) == ["summa", "cannon"]
        (row,) = [line for line in lines if line.startswith("  gather")]
        assert "not run" in row and "above the limit" in row


def test_rank_0_remembers_for_all(tmp_path):
    measured = pool(4).run(told_apart, tmp_path, UNSLICED, {})
    assert [path.parent.parent.name for path in tmp_path.glob("*/tessera/schedules.json")] == ["0"]
    poisoned = {name: 9e9 - time for name, time in measured[0][1].items()}
    with cache_at(tmp_path / "1"):
        Remembered(key_of(UNSLICED)).write(poisoned)
    for again in pool(4).run(told_apart, tmp_path, UNSLICED, {}):
        assert again[:2] == measured[0][:2] and again[3] == 1


# ---- What a measured profile leaves out


def keep_profile(folder, slow, **changes):
    """A profile of this machine on which collectives of the `slow` kinds take a second."""
    curve, late = Curve(1e-5, 0.0, 0.0, 1e9), Curve(1.0, 0.0, 0.0, 1e9)
    made = replace(
        shipped_profiles()["CPU"],
        device=devices.hardware(torch.device("cpu")),
        stack=devices.stack(gpu=False),
        devices_per_machine=4,
        inside={"any": curve} | dict.fromkeys(slow, late),
        error=0.25,
        measured=True,
    )
    with cache_at(folder):
        profiles_folder().mkdir(parents=True)
        (profiles_folder() / "made.json").write_text(written_profile(replace(made, **changes)))


def test_what_the_profile_puts_surely_behind_is_not_run(tmp_path):
    keep_profile(tmp_path, ["broadcast", "reduce"])
    first = pool(4).run(told, tmp_path, UNSLICED, {})
    for _, times, lines, _ in first:
        assert list(times) == ["gather", "cannon"] and "measured" in lines[0]
        (row,) = [line for line in lines if line.startswith("  summa")]
        assert "not run" in row and "surely behind by the profile of this machine" in row
    for again in pool(4).run(told, tmp_path, UNSLICED, {}):
        assert again[:2] == first[0][:2] and again[3] == 1, "it is remembered"


def test_where_one_is_left_nothing_is_run(tmp_path):
    keep_profile(tmp_path, ["broadcast", "reduce", "shift"])
    for schedule, times, lines, collectives in pool(4).run(told, tmp_path, UNSLICED, {}):
        assert (schedule, times, collectives) == ("gather", {}, 1)
        assert lines[0].endswith("the others are surely behind by the profile of this machine")


@pytest.mark.parametrize(
    "changes",
    [{"error": 1.0}, {"stack": "torch 1.0"}, {"device": "another"}, {"devices_per_machine": 2}, {"measured": False}],
    ids=str,
)
def test_a_wide_band_or_another_machine_leaves_nothing_out(tmp_path, changes):
    keep_profile(tmp_path, ["broadcast", "reduce", "shift"], **changes)
    with cache_at(tmp_path):
        assert not any(surely_behind(possible(UNSLICED)))
    keep_profile(tmp_path / "own", ["broadcast", "reduce", "shift"])
    with cache_at(tmp_path / "own"):
        assert surely_behind(possible(UNSLICED)) == [False, True, True]


def test_the_profile_of_one_machine_says_nothing_of_several(tmp_path, monkeypatch):
    keep_profile(tmp_path, ["broadcast", "reduce", "shift"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with cache_at(tmp_path):
        assert not any(surely_behind(possible(UNSLICED)))


def test_where_all_are_above_the_limit_the_least_is_taken(tmp_path):
    least = min(possible(), key=lambda c: c.scratch).name
    assert least != "gather"
    for schedule, times, lines, collectives in pool(4).run(
        told, tmp_path, MODEL, {"tensor_parallel_scratch_gib": 1e-9}
    ):
        assert (schedule, times, collectives) == (least, {}, 0)
        assert "needs least" in lines[0]


def test_a_cache_that_cannot_be_written_is_said_and_nothing_more(tmp_path):
    (tmp_path / "tessera").write_text("a file where the folder should be")
    ranks = pool(4).run(told, tmp_path, UNSLICED, {})
    troubles = [[line for line in lines if "could not be kept" in line] for _, _, lines, _ in ranks]
    assert [len(found) for found in troubles] == [1, 0, 0, 0]
    assert len({schedule for schedule, *_ in ranks}) == 1


def test_contenders_are_compared_within_rounds():
    """A slow stretch of the machine counts for none of them, a single slow run for little."""
    steady = [[10.0, 11.0, math.inf]] * 8
    assert beside_fastest([[10.0, 11.0, 30.0], *steady]) == pytest.approx([1, 1.1, 3])
    slow = [[n * t for t in times] for times, n in zip(steady, (1, 1, 1, 5, 4, 3, 1, 1), strict=True)]
    assert beside_fastest([[10.0, 11.0, 30.0], *slow]) == pytest.approx([1, 1.1, 3])
    assert beside_fastest([[90.0, 11.0, math.inf], *slow, [10.0, 11.0, 30.0]])[:2] == pytest.approx([1, 1.1], rel=0.02)
    lucky = [[10.0, 5.5, math.inf], *slow, [10.0, 11.0, 30.0]]  # one run at half the time: the least of all
    assert beside_fastest(lucky)[0] < beside_fastest(lucky)[1]


class Timed:
    """A trial that takes so many seconds."""

    mesh = Mesh(rank=0)

    def __init__(self, seconds):
        self.seconds, self.runs = seconds, 0

    def run(self):
        self.runs += 1
        return self.seconds


def test_who_is_far_behind_is_not_run_to_the_end():
    trials = [Timed(seconds) for seconds in (1.0, 3.0, 1.2, 1.9)]
    assert _measure(trials) == pytest.approx([1000, 3000, 1200, 1900])
    assert [trial.runs for trial in trials] == [1 + ROUNDS, 2, 1 + ROUNDS, 3], "one to warm up among them"
    two = [Timed(1.0), Timed(3.0)]
    assert _measure(two) == pytest.approx([1000, 3000])
    assert [trial.runs for trial in two] == [2, 2], "one alone is not measured on"


def test_a_trial_is_a_step_of_two_whole_layers():
    for found in pool(4).run(trial_traffic):
        assert len(found) == len(ALL)
        for counted, form in found:
            assert counted == form


# ---- What there is to choose from


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ALL),
        ({"tensor_parallel_mesh": {"row": 1, "col": 4}}, ALL[:4]),
        ({"tensor_parallel_mode": "1d"}, ALL[:4]),
        ({"tensor_parallel_keep_gathered": True}, ALL[:4]),
        ({"sequence_parallel": False}, ALL[:4]),
        ({"tensor_parallel_prefetch": False}, ALL[:1]),
        ({"tensor_parallel_defer": False}, ALL[:1]),
        ({"tensor_parallel_overlap": False}, ALL[:1]),
        ({"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 8}, ALL),
        (
            {"tensor_parallel_mode": "2.5d", "tensor_parallel_size": 8, "tensor_parallel_depth_weights": "shard"},
            ALL[:4],
        ),
        ({"tensor_parallel_size": 1}, ALL[:1]),
    ],
    ids=str,
)
def test_the_candidates_fit_the_other_keys(changes, expected):
    assert names(**changes) == expected


def test_slices_divide_what_a_rank_has_of_hidden_size():
    assert names(replace(MODEL, hidden_size=24)) == [n for n in ALL if n != "slices 8"]
    assert names(UNSLICED) == ["gather", "summa", "cannon"]


def test_candidates_keep_the_switches_of_the_config():
    (gather,) = possible(tensor_parallel_prefetch=False, tensor_parallel_defer=False)
    schedule = gather.parallel.schedule
    assert (schedule.prefetch, schedule.defer, schedule.overlap) == (False, False, True)


def test_tokens_are_padded_as_in_training():
    padded = {c.name: c.tokens for c in possible(micro_batch_size=2, sequence_len=9)}
    assert padded["gather"] == 20, "over row · col"
    assert padded["summa"] == 18, "over row alone"


# ---- Scratch memory


@pytest.mark.parametrize("column", [True, False], ids=["column", "row"])
@pytest.mark.parametrize("sizes", [{"row": 2, "col": 2}, {"inner": 2, "col": 2}], ids=str)
def test_scratch_is_what_the_products_hold(sizes, column):
    """Each operand in turn is much larger than the others. The loops copy nothing more; gathers do."""
    loops = [Schedule("summa"), Schedule("cannon")] if "row" in sizes else []
    shapes = [(4096, 256, 16), (16, 256, 1024)] if "row" in sizes else [(4096, 256, 16), (4096, 16, 512)]
    for tokens, residual, hidden in shapes:
        for schedule in [*loops, *(Schedule(slices=s) for s in ((1, 2, 8) if loops else (1, 4)))]:
            found = pool(4, gloo=True).run(peaks, sizes, schedule, column, tokens, residual, hidden)
            held, form = max(held for held, *_ in found), found[0][1]
            case = f"{schedule}, {tokens} tokens, {residual} to {hidden}: holds {held}, {form} by the form"
            assert form <= 1.05 * held and held <= (1.1 if schedule in loops else 1.75) * form, case


@pytest.mark.parametrize("column", [True, False], ids=["column", "row"])
def test_kept_copies_are_those_of_every_layer(column):
    for slices in (1, 2):
        for sizes in ({"row": 2, "col": 2}, {"inner": 2, "col": 2}):
            for _, _, kept, form in pool(4, gloo=True).run(
                peaks, sizes, Schedule(slices=slices, keep=True), column, 64, 64, 128
            ):
                assert kept == form, (slices, sizes)
    gather = possible(tensor_parallel_keep_gathered=True)[0]
    layers = {n: replace(gather, model=replace(MODEL, num_layers=n)).scratch for n in (2, 3, 4)}
    kept = layers[3] - layers[2]
    assert kept > 0 and layers[4] == layers[2] + 2 * kept
    recomputed = replace(gather, recompute=True)
    assert recomputed.scratch == layers[2] - kept


def test_prefetch_and_defer_hold_a_weight_more():
    switches = ("tensor_parallel_prefetch", "tensor_parallel_defer")
    both, early, late, none = (
        possible(**dict(zip(switches, on, strict=True)))[0].scratch
        for on in ((True, True), (True, False), (False, True), (False, False))
    )
    assert both > early > none and both > late > none
    slices = possible()[1]
    neither = replace(slices.parallel, schedule=replace(slices.parallel.schedule, prefetch=False, defer=False))
    assert replace(slices, parallel=neither).scratch == slices.scratch, "panels have neither"


# ---- The cache


def key_of(model=MODEL, compute=torch.float32, **changes):
    config = config_of(**changes)
    scratch = config.tensor_parallel_scratch_gib
    return _key(*asked(config), model, mesh_of(config), compute, scratch, config.tf32, config.context_parallel)


@pytest.mark.parametrize(
    "other",
    [
        key_of(replace(MODEL, ffn_size=64)),
        key_of(replace(MODEL, mlp_bias=True)),
        key_of(compute=torch.bfloat16),
        key_of(micro_batch_size=8),
        key_of(sequence_len=16),
        key_of(tensor_parallel_mesh={"row": 1, "col": 4}),
        key_of(tensor_parallel_defer=False),
        key_of(gradient_checkpointing=True),
        key_of(sequence_parallel=False),
        key_of(tensor_parallel_scratch_gib=1.0),
        key_of(context_parallel_mode="ring"),
        key_of() | {"hardware": ["another"]},
        key_of() | {"torch": "0.1"},
    ],
    ids=lambda other: str([name for name, value in other.items() if value != key_of()[name]]),
)
def test_whatever_times_depend_on_is_part_of_the_key(tmp_path, other):
    with cache_at(tmp_path):
        ours, theirs = Remembered(key_of()), Remembered(other)
    assert ours.write({"gather": 1.5, "summa": 2.0}) is None
    assert ours.read(["summa", "gather"]) == [2.0, 1.5]
    assert theirs.read(["gather"]) is None
    theirs.write({"gather": 3.0})
    assert (ours.read(["gather"]), theirs.read(["gather"])) == ([1.5], [3.0])
    assert ours.read(["gather", "cannon"]) is None


def entry(value):
    with cache_at(Path("anywhere")):
        return json.dumps({"format": "tessera schedules, 2", "measured": {Remembered(key_of()).key: value}})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        "[" * 100_000,
        "\udcff",
        '{"format": "of others", "measured": {}}',
        '{"format": "tessera schedules, 2", "measured": 3}',
        entry("gather"),
        entry({"gather": "fast"}),
        entry({"gather": -1.0}),
        entry({"gather": 0.0}),
        entry({"gather": float("nan")}),
        entry({"gather": float("inf")}),
        entry({"gather": None}),
    ],
    ids=lambda content: ascii(content[-24:]),
)
def test_a_cache_that_is_not_ours_or_broken_counts_as_empty(tmp_path, content):
    with cache_at(tmp_path):
        remembered = Remembered(key_of())
    remembered.path.parent.mkdir()
    remembered.path.write_bytes(content.encode(errors="surrogateescape"))
    assert remembered.read(["gather"]) is None
    assert remembered.write({"gather": 1.0}) is None
    assert remembered.read(["gather"]) == [1.0]
    assert [path.name for path in remembered.path.parent.iterdir()] == ["schedules.json"]


def test_a_cache_where_a_folder_lies_leaves_nothing_behind(tmp_path):
    with cache_at(tmp_path):
        remembered = Remembered(key_of())
    remembered.path.mkdir(parents=True)
    assert remembered.read(["gather"]) is None
    assert "could not be kept" in (remembered.write({"gather": 1.0}) or "")
    assert list(remembered.path.parent.iterdir()) == [remembered.path]


# ---- A run


def test_a_run_with_auto_equals_gather_and_says_what_it_chose(tmp_path):
    workshop = Workshop(tmp_path)
    save_rows(workshop.rows)
    grid = {"tensor_parallel_mode": "2d", "tensor_parallel_size": 4, "micro_batch_size": 4, "max_steps": 3}
    plain = workshop.settings("llama", tmp_path / "gather", **grid)
    auto = workshop.settings("llama", tmp_path / "auto", **grid, tensor_parallel_schedule="auto")
    model = read_model_config(workshop.model("llama"))
    auto["tensor_parallel_scratch_gib"] = gib_without(model, "gather", **grid, sequence_len=auto["sequence_len"])
    pool(4).run(trained, tmp_path, plain)
    said = pool(4).run(trained, tmp_path, auto)

    chosen = yaml.safe_load((tmp_path / "auto" / "resolved_config.yaml").read_text())
    name, slices = chosen["tensor_parallel_schedule"], chosen["tensor_parallel_slices"]
    schedule = str(Schedule(name, slices))
    assert schedule != "gather", "it is above the limit"
    assert said[0].startswith(f"schedule auto: {schedule}, measured") and f", schedule {schedule}, " in said[0]
    assert said[1:] == ["", "", ""]
    kinds = {row["kind"] for row in json.loads((tmp_path / "auto" / "summary.json").read_text())["collectives"]}
    assert ("broadcast" in kinds, "shift" in kinds) == (name == "summa", name == "cannon")
    for ours, theirs in zip(metrics(auto), metrics(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)


def test_a_table_of_one_is_a_line():
    (only,) = possible(tensor_parallel_size=1)
    assert Tuning(Schedule(), [only], {}, 2**31, "the only one here").lines() == [
        "schedule auto: gather, the only one here"
    ]
