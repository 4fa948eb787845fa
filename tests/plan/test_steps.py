"""Whole small steps, and runs, that a profile is brought to."""

import json
from dataclasses import replace

import numpy as np
import pytest

from plan.measure_cases import tiny_steps
from support.pool import pool
from tessera.config.load import make_config
from tessera.core.errors import UserError
from tessera.measure.runs import LEAST, WARM, fit_runs, step_seconds
from tessera.measure.session import Asked, measure
from tessera.measure.steps import brought, small_steps
from tessera.measure.timing import powers_to
from tessera.models.shapes import shape_of
from tessera.plan.cluster import cluster_of, kept_profiles
from tessera.plan.machine import _NOISE, LIKE, Residuals, _alike, read_profile, shipped_profiles, written_profile
from tessera.plan.time import step_time
from tessera.train.foresee import run_of

SHARED = {what: {1: 1.0, 2: 1.8, 4: 3.0} for what in ("product", "memory", "attention", "dispatch")}
CPU = replace(shipped_profiles()["CPU"], devices_per_machine=4, shared=SHARED)


def test_ranks_time_the_same_steps():
    (first, names, here), (second, *_) = pool(2).run(tiny_steps)
    assert first == second and len(first) == len(names) == len(set(names))
    assert all(0 < seconds < 60 for seconds in first)
    assert sum("ring 2" in name for name in names) == sum("col 2" in name for name in names) == 1
    assert here == 2, "the group of all ranks"


@pytest.mark.parametrize(("ranks", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_steps_are_timed_with_powers_of_two_and_all_ranks(ranks, counts):
    assert powers_to(ranks) == counts
    for count in counts:
        for step in small_steps(count, gpu=False) + small_steps(count, gpu=True):
            assert step.layout.devices == count
            assert step.run(1.0, ranks).work.on_machine == min(count, ranks)


def test_a_profile_finds_the_rates_that_steps_were_made_with():
    """What several ranks at once are slower by is no rate of a part: whole steps say it."""
    slower = {what: {count: times * (1.5 if count == 4 else 1.0) for count, times in known.items()}
              for what, known in SHARED.items()}  # fmt: skip
    true = replace(CPU, shared=slower, dispatch_seconds=2 * CPU.dispatch_seconds)
    steps = [step for count in (1, 2, 4) for step in small_steps(count, gpu=False)]
    made = {str(step): step.run(1.0, 4) for step in steps}
    runs = {name: replace(run, seconds=float(step_time(run.work, true).total)) for name, run in made.items()}
    found, told = brought(CPU, runs, "made steps")
    assert found.shared["product"][4] / found.shared["product"][2] == pytest.approx(4.5 / 1.8, rel=0.08)
    before = [abs(np.log(float(step_time(run.work, CPU).total) / run.seconds)) for run in runs.values()]
    after = [abs(np.log(float(step_time(run.work, found).total) / run.seconds)) for run in runs.values()]
    assert max(after) < 0.03 < max(before)
    assert told[0] == "made steps" and len(told) == len(runs) + 3


def test_what_the_others_say_is_what_a_process_without_the_run_says():
    generator = np.random.default_rng(1)
    places, logs = generator.normal(size=(6, len(LIKE))), generator.normal(size=6) / 5
    every = Residuals(tuple(map(tuple, places)), tuple(logs))
    for place, missed in enumerate(every.left_out):
        rest = [other for other in range(6) if other != place]
        fewer = Residuals(tuple(every.places[i] for i in rest), tuple(every.logs[i] for i in rest))
        variance = np.mean(np.square(every.logs))
        assert logs[place] - missed == pytest.approx(_said(fewer, every.places[place], variance), abs=1e-9)


def test_what_was_learned_by_other_numbers_is_refused(tmp_path):
    """A file of a version that compared runs by fewer numbers."""
    learned = Residuals(((1.0,) * (len(LIKE) - 1),), (0.1,))
    (tmp_path / "old.json").write_text(written_profile(replace(CPU, residuals=learned)))
    with pytest.raises(UserError, match=f"{len(LIKE)} numbers"):
        read_profile(tmp_path / "old.json")
    assert kept_profiles(tmp_path) == []


def _said(known, place, variance):
    at = np.asarray(known.places)
    of_known = variance * _alike(at, at) + _NOISE**2 * np.eye(len(at))
    return float((variance * _alike(np.asarray([place]), at) @ np.linalg.solve(of_known, np.asarray(known.logs)))[0])


def made_run(folder, width, seconds, **keys):
    """The folder of a run whose steps took `seconds` each."""
    model = folder / "model"
    model.mkdir(parents=True)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
    config = {"model_type": "llama", "vocab_size": 128, "max_position_embeddings": 64, **sizes}
    (model / "config.json").write_text(json.dumps(config))
    asked = {"base_model": str(model), "random_init": True, "datasets": [{"path": "x.jsonl", "type": "completion"}],
             "tokenizer": "bytes", "sequence_len": 64, "micro_batch_size": 4, **keys}  # fmt: skip
    (folder / "resolved_config.yaml").write_text(json.dumps(asked | {"output_dir": str(folder)}))
    lines = [json.dumps({"step": at, "step_seconds": each}) for at, each in enumerate(seconds, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_profile_is_brought_to_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = [made_run(tmp_path / str(width), width, [9.0] * WARM + [0.5] * 8) for width in (64, 128)]
    fit_runs(folders, tmp_path / "here.json")
    told = capsys.readouterr().out
    assert str(folders[0]) in told and "500.0" in told and "mean error" in told
    (kept,) = kept_profiles()
    assert kept.measured and len(kept.residuals.logs) == 2 and kept.name.endswith("2-runs")
    assert "runs" in kept.sources["residuals"]


def test_a_run_is_taken_as_it_computed():
    """The optimizer's work and what travels to the host are in it; a slower dtype than the profile's is refused."""
    keys = {"base_model": "1B", "datasets": [{"path": "x"}], "sequence_len": 1024, "dp_shard_size": 2}
    model, cluster = shape_of("1B"), cluster_of("8xH100")

    def work(**more):
        config, _ = make_config(keys | more)
        assert run_of(config, model, cluster, 1.0).seconds == 1.0
        return run_of(config, model, cluster, 1.0).work

    usual = work()
    assert work(optimizer="sgd").optimizer < usual.optimizer and work(optimizer="muon").optimizer_flops > 0
    assert work(fsdp_config={"offload_params": True}).optimizer_on_host == usual.optimizer
    with pytest.raises(UserError, match="float32"):
        work(bf16=False)


def test_folders_that_are_no_runs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="holds no run"):
        fit_runs([tmp_path], None)
    short = made_run(tmp_path / "short", 64, [0.5] * (WARM + LEAST - 1))
    with pytest.raises(UserError, match=f"a run of {WARM + LEAST} steps"):
        fit_runs([short], None)
    (short / "metrics.jsonl").write_text('[]\n{"step_seconds": "1"}\n{"step_seconds": -1}\nnothing\n')
    assert step_seconds(short / "metrics.jsonl") == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_command_times_steps_with_fewer_ranks_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measure(Asked(None), 2)
    (kept,) = kept_profiles()
    assert len(kept.residuals.logs) == len(small_steps(1, gpu=False)) + len(small_steps(2, gpu=False))
