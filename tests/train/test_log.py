"""metrics.jsonl and resolved_config.yaml, and what monitoring costs."""

import json
from pathlib import Path

import pytest

from support.pool import pool
from tessera.config.load import load_config
from tessera.config.schema import TrainConfig
from tessera.train.log import Log
from tessera.train.notes import Notes
from train.faults_on_rank import train_and_count
from train.runs import Workshop, metrics, run

ALL_REDUCE = "c10d.allreduce_.default"
KEYS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "memory_gib",
    "communicated_bytes",
    "skipped_steps",
}


@pytest.mark.parametrize("size", [1, 2])
def test_every_step_is_one_object_with_every_key(workshop: Workshop, tmp_path, size):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=size)
    found = run(settings)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5]
    assert all(m.keys() == KEYS for m in found)
    targets = [workshop.targets(range(6 * i, 6 * i + 6)) for i in range(5)]
    assert [m["tokens"] for m in found] == [sum(targets[: i + 1]) for i in range(5)]
    for m, count in zip(found, targets, strict=True):
        assert m["tokens_per_second"] == pytest.approx(count / m["step_seconds"])
        assert 0.01 < m["memory_gib"] < 100
        assert m["communicated_bytes"].keys() == ({"col"} if size > 1 else set())
        assert all(count > 0 for count in m["communicated_bytes"].values())


def test_the_resolved_config_gives_the_same_run_again(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=1)
    run(settings)
    config, notes = load_config(tmp_path / "run" / "resolved_config.yaml")
    assert config == TrainConfig.model_validate(settings) and not notes


def test_a_run_killed_before_its_first_line_keeps_those_of_the_run_it_goes_on_from(tmp_path, monkeypatch):
    """The lines beyond the checkpoint go in one move: at each moment the file holds those up to it."""
    file = tmp_path / "metrics.jsonl"
    before = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + '{"step": 4, "lo'
    file.write_text(before)

    def killed(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", killed)
        Log(Notes(tmp_path), 9, 2, 1)
    assert file.read_text() == before
    Log(Notes(tmp_path), 9, 2, 1).close()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_monitoring_adds_no_collective_outside_logging_steps(workshop: Workshop, tmp_path):
    """Logging costs one all-reduce of a number (memory) in a step; the first step always pays it."""
    calls, bytes_per_step = {}, {}
    for every in (1, 4, 100):
        own = {"logging_steps": every, "tensor_parallel_size": 2}
        settings = workshop.settings("llama", tmp_path / f"every-{every}", **own)
        calls[every] = pool(2, gloo=True).run(train_and_count, settings)[0]
        bytes_per_step[every] = [m["communicated_bytes"] for m in metrics(settings)]
    assert calls[1] - calls[100] == {ALL_REDUCE: 4} and not calls[100] - calls[1]
    assert calls[4] - calls[100] == {ALL_REDUCE: 1} and not calls[100] - calls[4]
    assert calls[100][ALL_REDUCE] >= 5  # one a step for the norm alone
    assert bytes_per_step[1] == bytes_per_step[4] == bytes_per_step[100]


# ---- The file of a run that goes on


def log_of(folder: Path, first_step: int) -> None:
    log = Log(Notes(folder), total_steps=9, first_step=first_step, every=1)
    log.close()


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_goes_on_with_the_lines_up_to_its_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    log_of(tmp_path, 5)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    log_of(tmp_path, 0)
    assert steps_in(tmp_path) == []


def test_a_line_that_a_killed_run_left_unfinished_is_no_obstacle(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    log_of(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2]
