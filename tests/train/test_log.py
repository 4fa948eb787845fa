"""metrics.jsonl and resolved_config.yaml, and what monitoring costs."""

import json
import math
import random
import re
from pathlib import Path

import pytest

from support.pool import pool
from tessera.config.load import load_config
from tessera.config.schema import TrainConfig
from tessera.plan.flops import step_flops
from tessera.train.events import perplexity
from tessera.train.files import Files, _lines_before
from tessera.train.notes import Notes
from tessera.train.progress import Pace, shares
from tessera.train.run import model_of
from train.faults_on_rank import train_and_count
from train.on_rank import said_on_rank
from train.runs import Workshop, metrics, run

ALL_REDUCE, ALL_GATHER = "c10d.allreduce_.default", "c10d._allgather_base_.default"
KEYS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "memory_gib",
    "communicated_bytes",
    "skipped_steps",
}


@pytest.mark.parametrize("size", [1, 2])
def test_every_step_is_one_object_with_every_key(workshop: Workshop, tmp_path, size):
    settings = workshop.settings("llama", tmp_path / "run", tensor_parallel_size=size)
    found = run(settings)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5]
    measured = {"memory", "seconds", "slowest"}
    assert [m.keys() - KEYS for m in found] == [measured, {"memory"}, *[measured] * 3]
    assert all(m.keys() >= KEYS for m in found)
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
    assert config == TrainConfig.model_validate(settings | {"save_dtype": "float32"}) and not notes


def test_a_run_killed_before_its_first_line_keeps_those_of_the_run_it_goes_on_from(tmp_path, monkeypatch):
    """The lines beyond the checkpoint go in one move: at each moment the file holds those up to it."""
    file = tmp_path / "metrics.jsonl"
    before = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + '{"step": 4, "lo'
    file.write_text(before)
    (tmp_path / "copy.jsonl").hardlink_to(file)  # so it is written anew: to cut it is one call of the system

    def killed(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", killed)
        Files(Notes(tmp_path), 2)
    assert file.read_text() == before
    Files(Notes(tmp_path), 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.jsonl", "metrics.jsonl"]
    assert (tmp_path / "copy.jsonl").read_text() == before


EVERY_STEP_COSTS = {False: {ALL_REDUCE: 4}, True: {ALL_REDUCE: 4 + 4, ALL_GATHER: 10}}
"""Of five steps: memory in all but the first, which always pays it; two gathers a report, and a reduction for each set
of axes of the step's collectives, here col alone, but in the second step, whose time does not count."""
ONE_COSTS = {False: {ALL_REDUCE: 1}, True: {ALL_REDUCE: 2, ALL_GATHER: 2}}


@pytest.mark.parametrize("monitor", [False, True])
def test_monitoring_adds_no_collective_outside_logging_steps(workshop: Workshop, tmp_path, monitor):
    calls, bytes_per_step = {}, {}
    for every in (1, 4, 100):
        own = {"logging_steps": every, "tensor_parallel_size": 2, "monitor": monitor}
        settings = workshop.settings("llama", tmp_path / f"every-{every}", **own)
        calls[every] = pool(2, gloo=True).run(train_and_count, settings)[0]
        bytes_per_step[every] = [m["communicated_bytes"] for m in metrics(settings)]
    assert calls[1] - calls[100] == EVERY_STEP_COSTS[monitor] and not calls[100] - calls[1]
    assert calls[4] - calls[100] == ONE_COSTS[monitor] and not calls[100] - calls[4]
    assert calls[100][ALL_REDUCE] >= 5  # one a step for the norm alone
    assert bytes_per_step[1] == bytes_per_step[4] == bytes_per_step[100]


# ---- What the terminal shows


def test_the_line_of_a_step_shows_its_record_and_how_many_there_are(workshop: Workshop, tmp_path):
    own = {"val_set_size": 5, "eval_steps": 3, "device_peak_tflops": 0.01, "logging_steps": 2, "warmup_steps": 1}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    said = pool(1).run(said_on_rank, settings)[0].splitlines()
    found = {m["step"]: m for m in metrics(settings)}
    shown = [line for line in said if line.startswith("step ")]
    for step, left in ((2, r" · \d+ s left"), (4, r" · \d+ s left")):
        m = found[step]
        start = f"step {step} of 5 · loss {m['loss']:.4f} · lr {m['learning_rate']:.2e} · norm {m['grad_norm']:.3f} · "
        speed = f"{m['tokens_per_second']:,.0f} tokens/s · MFU {m['mfu']:.1%} · {m['memory_gib']:.3g} GiB"
        (line,) = [line for line in shown if line.startswith(start)]
        where = "".join(re.escape(f" · {share}") for share in shares(m))
        assert re.fullmatch(re.escape(start + speed) + where + left, line), line
    evaluated = [f"step {s} of 5 · eval_loss {found[s]['eval_loss']:.4f}" for s in (3, 5)]
    assert [line.partition(" · eval_ppl")[0] for line in shown if "eval_loss" in line] == evaluated
    assert len(shown) == 4, "steps 1, 3 and 5 are no logging steps"
    assert any(line.startswith("run: 5 steps of 6 rows, from the start; 1 step of warm-up") for line in said)
    assert max(map(len, said)) < 150
    for step in (3, 5):
        assert found[step]["eval_ppl"] == pytest.approx(math.exp(found[step]["eval_loss"]), rel=1e-12)
    assert all("eval_ppl" not in found[step] for step in (1, 2, 4))


def test_a_step_and_a_row_are_one(workshop: Workshop, tmp_path):
    one = {"max_steps": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    said = pool(1).run(said_on_rank, workshop.settings("llama", tmp_path / "run", **one))[0]
    assert "run: 1 step of 1 row, from the start; 0 steps of warm-up" in said and " = 1 row\n" in said


def test_mfu_is_the_model_s_arithmetic_over_the_peak_that_is_given(workshop: Workshop, tmp_path):
    own = {"tensor_parallel_size": 2, "dp_shard_size": 2, "device_peak_tflops": 0.5, "max_steps": 2}
    settings = workshop.settings("llama", tmp_path / "run", **own)
    found = run(settings)
    # rows of steps 0 and 1: the longest of a micro-batch of all data ranks, of which every third row has 13 tokens
    flops = step_flops(model_of(TrainConfig.model_validate(settings)), [14] * 6) * 2
    for m in found:
        assert m["mfu"] * 4 * 0.5e12 * m["step_seconds"] == pytest.approx(flops, rel=1e-9)


def test_without_a_known_peak_there_is_no_mfu_and_it_is_said_why(workshop: Workshop, tmp_path):
    settings = workshop.settings("llama", tmp_path / "run", max_steps=1)
    said = pool(1).run(said_on_rank, settings)[0]
    assert "no MFU: the peak of cpu" in said and "device_peak_tflops" in said and "MFU 0" not in said
    assert [m["mfu"] for m in metrics(settings)] == [None]


def test_the_pace_leaves_the_slow_first_step_out(monkeypatch):
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pace = Pace(10)
    assert [pace.left(step) for step in (4, 5, 6)] == [[], ["10 s left"], ["8 s left"]]


def test_a_perplexity_beyond_all_numbers_is_none():
    assert perplexity(2.0) == pytest.approx(7.38905609893065) and perplexity(1e4) is None


# ---- The file of a run that goes on


def log_of(folder: Path, first_step: int) -> None:
    Files(Notes(folder), first_step)


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


def test_of_a_long_file_the_tail_is_read_alone(tmp_path, monkeypatch):
    """200,000 lines, of which those of 7 steps are to be done again; a copy under another name stays as it is."""
    path, lines = tmp_path / "metrics.jsonl", [f'{{"step": {step}}}\n' for step in range(1, 200_001)]
    path.write_text("".join(lines))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", None)
        log_of(tmp_path, 199_993)
    assert path.read_text() == "".join(lines[:199_993])
    copy = tmp_path / "copy"
    copy.hardlink_to(path)
    log_of(tmp_path, 10)
    assert path.read_text() == "".join(lines[:10]) and copy.read_text() == "".join(lines[:199_993])


@pytest.mark.parametrize("seed", range(20))
def test_what_is_cut_off_is_what_is_left_out_line_by_line(tmp_path, monkeypatch, seed):
    """Lines of several runs one after another, lines about a whole run among them, the last one cut anywhere."""
    generator = random.Random(seed)
    monkeypatch.setattr("tessera.train.files.TAIL", 16)
    lines = ["{}\n"]
    for step in range(1, generator.randrange(2, 40)):
        lines += [
            f'{{"step": {step}, "x": "{"y" * generator.randrange(60)}"}}\n',
            *["{}\n"] * (generator.random() < 0.1),
        ]
    first = generator.randrange(1, 50)
    text = "".join(lines)
    (tmp_path / "monitor.jsonl").write_text(text[: len(text) - generator.randrange(30)])
    (tmp_path / "whole.jsonl").write_bytes(_lines_before((tmp_path / "monitor.jsonl").read_bytes(), first))
    log_of(tmp_path, first)
    kept, right = ((tmp_path / name).read_text().splitlines() for name in ("monitor.jsonl", "whole.jsonl"))
    with_steps = [[line for line in of if "step" in line] for of in (kept, right)]
    assert with_steps[0] == with_steps[1]
