"""Checkpoints: a run that goes on is the run that was never interrupted, and nothing half-written is one."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.pool import pool
from tessera.checkpoint import folder as checkpoint_folder
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.launch.rank import restarted
from tessera.train.run import checkpoint_to_resume
from train.faults_on_rank import train_with_fresh_moments
from train.runs import Metrics, Workshop, exported, forget_last, metrics, refusal_on_rank, run

LONG = {"max_steps": 7, "save_steps": 3, "shuffle": True}  # 42 of 26 rows: the order of a second epoch too
SAME_IN_ANOTHER_LAYOUT = 2e-5


@pytest.fixture(scope="session")
def whole_run(workshop: Workshop, tmp_path_factory):
    """The settings of a run with dropout, never interrupted, at a tensor size; made when first asked for."""
    made: dict[int, dict[str, Any]] = {}

    def of(size: int) -> dict[str, Any]:
        if size not in made:
            output = tmp_path_factory.mktemp("whole") / f"col{size}"
            made[size] = workshop.settings("gpt2 dropout", output, tensor_parallel_size=size, **LONG)
            run(made[size])
            forget_last(made[size])
        return made[size]

    return of


def copy_of(settings: dict[str, Any], output: Path, **changes: Any) -> dict[str, Any]:
    """A run like `settings` that stopped after its checkpoint-3, and is to go on."""
    shutil.copytree(settings["output_dir"], output)
    shutil.rmtree(output / "checkpoint-6")
    return settings | {"output_dir": str(output), "resume_from_checkpoint": True} | changes


def losses(found: Metrics) -> list[tuple[float, float]]:
    return [(m["loss"], m["grad_norm"]) for m in found]


def test_a_rank_that_torchrun_starts_again_takes_what_latest_names(whole_run, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(whole_run(1)["output_dir"], output)
    (output / "LATEST").write_text("checkpoint-3\n")
    config = TrainConfig.model_validate(whole_run(1) | {"output_dir": str(output)})
    assert (output / "checkpoint-6").exists() and restarted(config) == config
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted(config).resume_from_checkpoint == str(output / "checkpoint-3")


# ---- The same numbers


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_is_bit_for_bit_the_whole_one(whole_run, tmp_path, size):
    whole = whole_run(size)
    resumed = copy_of(whole, tmp_path / "run")
    found = run(resumed)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6, 7]
    assert len(set(losses(found))) == 7
    for key in ("loss", "grad_norm", "learning_rate", "epoch", "tokens"):
        assert [m[key] for m in found] == [m[key] for m in metrics(whole)], key
    want = exported(whole)
    assert all(torch.equal(tensor, want[name]) for name, tensor in exported(resumed).items())
    first = metrics(whole)[:3]
    assert found[:3] == first, "the lines up to the checkpoint stay as they were"
    assert found[3] != metrics(whole)[3], "the step was not done again"  # it took another time


def test_a_named_checkpoint_goes_on_in_another_folder(whole_run, tmp_path):
    whole = whole_run(2)
    named = f"{whole['output_dir']}/checkpoint-3"
    found = run(whole | {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": named})
    assert [m["step"] for m in found] == [4, 5, 6, 7]
    assert losses(found) == losses(metrics(whole))[3:]


def test_a_run_goes_on_by_itself_where_it_has_checkpoints(whole_run, tmp_path):
    own = {"resume_from_checkpoint": None, "auto_resume_from_checkpoints": True}
    resumed = copy_of(whole_run(1), tmp_path / "run", **own)
    assert losses(run(resumed)) == losses(metrics(whole_run(1)))


@pytest.mark.parametrize("size", [1, 4])
def test_a_checkpoint_goes_on_in_another_layout(whole_run, tmp_path, size):
    """Its vocabulary of 509 is cut unevenly, and another way, at every size."""
    found = run(copy_of(whole_run(2), tmp_path / "run", tensor_parallel_size=size))
    for got, want in zip(found, metrics(whole_run(2)), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=SAME_IN_ANOTHER_LAYOUT)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=SAME_IN_ANOTHER_LAYOUT)


def test_a_resumed_run_that_does_not_log_its_first_step(whole_run, tmp_path):
    found = run(copy_of(whole_run(1), tmp_path / "run", logging_steps=100))
    assert losses(found) == losses(metrics(whole_run(1)))
    assert all(m["memory_gib"] > 0 for m in found)


def test_an_optimizer_state_left_out_would_be_seen(whole_run, tmp_path):
    resumed = copy_of(whole_run(1), tmp_path / "run")
    pool(1).run(train_with_fresh_moments, resumed)
    found, want = losses(metrics(resumed)), losses(metrics(whole_run(1)))
    assert found[:4] == want[:4]
    assert all(abs(f[0] - w[0]) > 1e-4 * w[0] for f, w in zip(found[4:], want[4:], strict=True))


# ---- Which checkpoints there are


def names(settings: dict[str, Any]) -> list[str]:
    return sorted(path.name for path in Path(settings["output_dir"]).glob("*checkpoint*"))


def test_the_newest_checkpoints_are_kept(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", save_steps=1, save_total_limit=2)
    run(settings)
    assert names(settings) == ["checkpoint-4", "checkpoint-5"]


def test_a_run_that_goes_back_keeps_what_it_has_just_saved(whole_run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole_run(1)["output_dir"], output)
    named = {"resume_from_checkpoint": str(output / "checkpoint-3"), "save_steps": 5, "save_total_limit": 1}
    settings = whole_run(1) | named | {"output_dir": str(output)}
    run(settings)
    assert names(settings) == ["abandoned-checkpoint-6", "checkpoint-7"]
    assert resumed_from(settings | {"resume_from_checkpoint": True}) == output / "checkpoint-7"


def test_no_checkpoints_where_none_are_wanted(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=1, save_strategy="no")
    run(settings)
    assert names(settings) == []


def test_a_run_begun_again_sets_its_checkpoints_aside(whole_run, tmp_path):
    settings = copy_of(whole_run(1), tmp_path / "run", resume_from_checkpoint=None, max_steps=1)
    before = names(settings)
    assert before and resumed_from(settings) is None
    run(settings)
    assert names(settings) == [*(f"abandoned-{name}" for name in before), "checkpoint-1"]
    run(settings | {"save_steps": 1})
    run(settings)
    assert "abandoned-checkpoint-1" in names(settings)


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(whole_run, tmp_path):
    settings = copy_of(whole_run(1), tmp_path / "run", max_steps=1)
    with pytest.raises(UserError, match=r"max_steps: 1\n.*checkpoint-\d+ was made after step \d+"):
        resumed_from(settings)


# ---- Half-written, broken and malicious ones


def resumed_from(settings: dict[str, Any]) -> Path | None:
    return checkpoint_to_resume(TrainConfig.model_validate(settings))


@pytest.fixture
def stopped(whole_run, tmp_path) -> dict[str, Any]:
    return copy_of(whole_run(2), tmp_path / "run")


@pytest.mark.parametrize("lacking", ["state.json", ".metadata"])
def test_the_newest_whole_checkpoint_is_taken(stopped, lacking):
    output = Path(stopped["output_dir"])
    shutil.copytree(output / "checkpoint-3", output / "checkpoint-12")
    assert resumed_from(stopped) == output / "checkpoint-12"  # by number, not by name
    (output / "checkpoint-12" / lacking).unlink()
    assert resumed_from(stopped) == output / "checkpoint-3"
    with pytest.raises(UserError, match=f"is not a whole checkpoint: {lacking}.*\n.*checkpoint-3"):
        resumed_from(stopped | {"resume_from_checkpoint": str(output / "checkpoint-12")})


def test_a_part_that_a_killed_run_left_is_not_taken_and_goes(stopped):
    output = Path(stopped["output_dir"])
    shutil.copytree(output / "checkpoint-3", output / ".checkpoint-6.part")
    shutil.copytree(output / "checkpoint-3", output / ".checkpoint-9.part")
    assert resumed_from(stopped) == output / "checkpoint-3"
    assert losses(run(stopped))[3:] == losses(metrics(stopped))[3:]
    assert names(stopped) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]


def test_nothing_whole_to_resume_is_said(stopped):
    output = Path(stopped["output_dir"])
    (output / "checkpoint-3" / "state.json").unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        resumed_from(stopped)


NOT_WHOLE = "is not a whole checkpoint: "


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "__1_0.distcp").unlink(), NOT_WHOLE + "__1_0.distcp is missing"),
        (
            lambda folder: os.truncate(folder / "__0_0.distcp", 10_000),
            NOT_WHOLE + "__0_0.distcp is truncated, it has 10000 of",
        ),
        (lambda folder: os.truncate(folder / ".metadata", 1000), r"checkpoint-3/\.metadata does not match SHA256SUMS"),
        (lambda folder: os.truncate(folder / "state.json", 40), "checkpoint-3/state.json does not match SHA256SUMS"),
        (lambda folder: os.truncate(folder / "SHA256SUMS", 100), NOT_WHOLE + "SHA256SUMS is damaged"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), NOT_WHOLE + "SHA256SUMS is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_any_process_starts(stopped, damage, told):
    damage(Path(stopped["output_dir"]) / "checkpoint-3")
    with pytest.raises(UserError, match=f"checkpoint-3\n  {told}"):
        resumed_from(stopped)


def reseal(folder: Path) -> None:
    """As somebody would who changes a checkpoint on purpose: sums that fit what lies there."""
    names = [path.name for path in folder.iterdir() if path.name != "SHA256SUMS"]
    checkpoint_folder.write_sums(folder, checkpoint_folder.sums_of(folder, names))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps({}), r"\.metadata: it: is no Metadata"),
        (b"cmodule", r"\.metadata: "),
    ],
)
def test_metadata_that_is_none_is_refused_even_with_sums_that_fit(stopped, content, told):
    folder = Path(stopped["output_dir"]) / "checkpoint-3"
    (folder / ".metadata").write_bytes(content)
    reseal(folder)
    with pytest.raises(UserError, match=NOT_WHOLE + told):
        resumed_from(stopped)


def test_a_checkpoint_of_another_format_is_refused(stopped):
    folder = Path(stopped["output_dir"]) / "checkpoint-3"
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    reseal(folder)
    with pytest.raises(UserError, match="has format 99, this version reads 2 and 3$"):
        resumed_from(stopped)


def test_a_checkpoint_of_the_format_without_sums_is_refused(stopped):
    folder = Path(stopped["output_dir"]) / "checkpoint-3"
    file = folder / "state.json"
    file.write_text(json.dumps({"format": 1, "step": 3, "tokens": 1, "course": {}}))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="has format 1, this version reads 2 and 3\n  format 1 had no SHA256SUMS"):
        resumed_from(stopped)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_checkpoint_runs_nothing(stopped, tmp_path):
    mark = tmp_path / "ran"
    content = pickle.dumps(Malicious(mark))
    folder = Path(stopped["output_dir"]) / "checkpoint-3"
    (folder / ".metadata").write_bytes(content)
    reseal(folder)
    with pytest.raises(UserError, match=r"names posix\.system, which no checkpoint needs"):
        resumed_from(stopped)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists(), "the content was harmless"


@pytest.mark.parametrize("case", ["llama", "gpt2 one layer", "gpt2 wider"])
def test_a_checkpoint_of_another_model_is_refused(workshop: Workshop, stopped, case):
    if case.startswith("gpt2"):
        file = workshop.model("gpt2") / "config.json"
        odd = Path(stopped["output_dir"]).parent / "model"
        shutil.copytree(file.parent, odd)
        change = {"n_layer": 1} if case == "gpt2 one layer" else {"n_inner": 64}
        (odd / "config.json").write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        odd = workshop.model(case)
    told = pool(2).run(refusal_on_rank, stopped | {"base_model": str(odd)})
    assert all(re.search(r"^resume_from_checkpoint: .*\n  is of another model: model/", text) for text in told)


def test_fewer_epochs_than_were_seen_are_refused(whole_run, tmp_path):
    settings = copy_of(whole_run(1), tmp_path / "run", max_steps=None, num_epochs=0.5)
    (told,) = pool(1).run(refusal_on_rank, settings)
    assert "the run is 13 rows long, the checkpoint was made after 3 steps, 18 rows" in told
    assert not (tmp_path / "run" / "abandoned-checkpoint-3").exists()
