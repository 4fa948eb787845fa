"""`tessera measure`: what ranks measure is a profile that reads again, and counts what training moves."""

from pathlib import Path

import pytest
import torch

from plan.measure_cases import profile_here, received_by_each_kind, what_slows_is_seen
from support.forked import python
from support.pool import pool
from tessera.core.errors import RunFailed, UserError
from tessera.core.mesh import Mesh
from tessera.measure.compute import Computed
from tessera.measure.links import KINDS, Linked
from tessera.measure.profile import Here, lines, profile_of
from tessera.measure.session import threads_asked
from tessera.measure.timing import Effort, Timed, Timer
from tessera.plan.cluster import kept_profiles
from tessera.plan.fitted import Fitted
from tessera.plan.machine import read_profile


def test_two_ranks_measure_one_profile(tmp_path):
    ((text, lines, threads), (other, *_)) = pool(2).run(profile_here)
    assert text == other and threads == 1, "ranks disagree, or the number of threads has changed"
    (tmp_path / "p.json").write_text(text)
    profile = read_profile(tmp_path / "p.json")
    assert profile.measured and profile.devices_per_machine == 2 and profile.name.endswith("2026-11-29")
    assert set(profile.inside) == {*KINDS, "any"} and profile.pairs[0][:2] == (0, 1)
    assert profile.devices == (), "ranks on a CPU have no links of their own"
    for what in ("product", "memory", "attention", "dispatch"):
        assert profile.shared[what][1] == 1 and set(profile.shared[what]) == {1, 2}
    assert profile.shared["links"] == {2: 1.0}
    assert set(profile.sources) >= {"product_flops", "inside", "overlap", "error", "pairs"}
    told = "\n".join(" ".join(line.split()) for line in lines)
    for words in (
        "matrix products",
        "32 16 16",
        "all_to_all 2 64 B",
        "an operator's dispatch",
        "1 2 16 8",
        "ns a pair",
        "GB/s of each pair",
    ):
        assert words in told, told


@pytest.mark.parametrize("here", [4, 2])
def test_the_bytes_of_a_measured_call_are_those_that_training_counts(here):
    for found in pool(4).run(received_by_each_kind, here):
        levels = [("inside", 2), ("inside", 4)] if here == 4 else [("inside", 2), ("between", 2)]
        assert [(level, size) for level, kind, size, *_ in found if kind == "shift"] == levels
        for level, kind, size, counted, received, complete in found:
            assert counted == received and complete, (level, kind, size)


def test_the_slowest_rank_counts():
    for every, last in pool(2).run(what_slows_is_seen):
        assert every >= 0.01 and last >= 0.01


def test_the_command_keeps_what_it_measured(tmp_path):
    script, words = tmp_path / "measure.py", ["tessera", "measure", "--quick", "--output", str(tmp_path / "here.json")]
    script.write_text(
        f"import os, sys\nos.environ['XDG_CACHE_HOME'] = {str(tmp_path / 'cache')!r}\n"
        f"sys.argv = {words}\nfrom tessera.cli.main import main\nmain()\n"
    )
    ended = python(script, ranks=1)
    assert ended.codes == [0], ended.err
    (kept,) = kept_profiles(tmp_path / "cache" / "tessera" / "profiles")
    assert kept == read_profile(tmp_path / "here.json") and kept.measured
    assert kept.sources["inside"].startswith("not measured with one rank")
    assert str(tmp_path / "here.json") in ended.out[0] and "matrix products" in ended.out[0]


def test_a_busy_machine_widens_the_band():
    timed = {spread: Timed(1e-3, spread) for spread in (0.1, 0.5)}
    for spread, error, told in ((0.1, 0.25, False), (0.5, 0.5, True)):
        fitted = Fitted((1e9, 1.0), 0.0, 0.0)
        spreads = dict.fromkeys(("long", "memory", "attention", "dispatch", "out", "back", "host"), spread)
        products = {(8, 8, 8): timed[spread]}
        attended = {(1, 2, 16, 8): timed[spread]}
        attention = Fitted((1e9, 0.0, 0.0), 0.0, 0.0)
        rates = (1e9, 0.5, attended, attention, 1e-5, 1e9, 1e9)
        computed = Computed(torch.float32, products, fitted, *rates, spreads)
        where = Here("CPU x", False, "torch", "2026-11-29", 1, 1, 2**30, 2**30)
        profile = profile_of(computed, Linked(), None, where)
        assert profile.error == error
        assert any("measure again" in line for line in lines(profile, computed, Linked(), None)) == told


def test_rounds_of_calls_take_turns():
    """What slows the machine for a moment is then not all that one of them has."""
    order = list[str]()
    timer = Timer(Mesh({}), Effort(0.0, 3))
    timed = timer.each([lambda: order.append("a"), None, lambda: order.append("b")])
    assert order == [*"aabb", *"ababab"] and len(timed) == 3


def test_a_place_that_takes_no_file_is_refused_before_anything_is_measured(tmp_path):
    from tessera.measure.session import Asked, measure

    with pytest.raises(UserError, match="--output"):
        measure(Asked(Path(tmp_path)), 2)


@pytest.mark.parametrize(("code", "told"), [(130, "stopped before everything was measured"), (1, "rank 1 failed")])
def test_a_stop_says_what_was_not_written(monkeypatch, code, told):
    from tessera.measure.session import Asked, measure

    def failing(*asked, **options):
        raise RunFailed("rank 1 failed", code)

    monkeypatch.setattr("tessera.measure.session.run_workers", failing)
    with pytest.raises(RunFailed, match=told) as ended:
        measure(Asked(quick=True), 2)
    assert ended.value.exit_code == code


@pytest.mark.parametrize(("text", "threads"), [("", None), ("3", 3)])
def test_threads_that_the_user_has_set_are_kept(monkeypatch, text, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads_asked() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UserError, match="OMP_NUM_THREADS"):
        threads_asked()
