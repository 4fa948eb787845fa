"""A run on a stream that is killed and goes on at another data-parallel size: its rows are those without the kill."""

import itertools
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from launch.test_kills import family, gone, left_alive, lines, wait_for
from tessera.checkpoint.folder import latest
from tessera.data.tokenizer import save_tokenizer, train_bpe
from train.runs import Workshop, command, environment, metrics

LENGTH, ROWS, STEPS = 16, 4, 24
TEXTS = [f"{number} is {number * number} and then {number % 7}. " * (1 + number % 5) for number in range(40)]
SIZES: dict[int, dict[str, Any]] = {
    1: {"gradient_accumulation_steps": ROWS},
    2: {"gradient_accumulation_steps": ROWS // 2, "dp_shard_size": 2},
}
RECORDER = """
import os, sys

if not any("stream_worker" in word for word in sys.orig_argv):
    import json
    from tessera.data.stream_loader import StreamLoader

    step_batches = StreamLoader.step_batches

    def recorded(self, step):
        batches = step_batches(self, step)
        with open(f"{os.environ['RECORDED']}/{os.getpid()}", "a") as file:
            rows = [batch.input_ids.tolist() for batch in batches]
            file.write(json.dumps([step, self.data_rank, self.data_ranks, rows]) + "\\n")
        return batches

    StreamLoader.step_batches = recorded
"""
"""A sitecustomize.py: whoever trains writes down its rows; of one process that is the launcher."""


def reference(backend: Any, end: int) -> list[list[int]]:
    """The rows of STEPS steps: documents joined, again and again, an end behind each, and cut."""
    ids = [one for text in TEXTS for one in [*backend.encode(text).ids, end]]
    endless = itertools.cycle(ids)
    return [list(itertools.islice(endless, LENGTH)) for _ in range(STEPS * ROWS)]


def steps_of(folder: Path) -> dict[int, list[list[list[int]]]]:
    """For each step the rows that it had, in every attempt that came to it with all its ranks."""
    shares: dict[tuple[int, int], list[Any]] = {}
    for file in folder.iterdir():
        for step, rank, ranks, rows in map(json.loads, file.read_text().splitlines()):
            shares.setdefault((step, ranks), []).append((rank, rows))
        file.unlink()
    found: dict[int, list[list[list[int]]]] = {}
    for (step, ranks), own in sorted(shares.items()):
        if len(own) == ranks:
            turns = itertools.zip_longest(*(rows for _, rows in sorted(own)))
            found.setdefault(step, []).append([row for turn in turns for batch in turn for row in batch])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "before", "after"), [("rank 1", 2, 1), ("the launcher", 1, 2)])
def test_no_row_is_left_out_or_trained_on_twice(workshop: Workshop, tmp_path, victim, before, after):
    """By its token ids; and no process that tokenizes is left of a rank that was killed."""
    tokenizer, recorded, temporary = (tmp_path / name for name in ("tokenizer", "recorded", "tmp"))
    for folder in (tokenizer, recorded, temporary):
        folder.mkdir()
    trained = train_bpe(TEXTS, 300)
    save_tokenizer(trained, tokenizer)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    variables = environment() | {"TMPDIR": str(temporary), "RECORDED": str(recorded)}
    variables["PYTHONPATH"] = f"{tmp_path}:{variables.get('PYTHONPATH', '')}"
    own = {"pretraining_dataset": str(tmp_path / "a.jsonl"), "tokenizer": str(tokenizer), "save_steps": 1}
    own |= {"max_steps": STEPS, "micro_batch_size": 1, "auto_resume_from_checkpoints": True}
    settings = workshop.settings("llama 64", tmp_path / "run", **own)
    del settings["datasets"]

    words = command(settings | SIZES[before], "--num-processes", str(before))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, env=variables, **pipes)
    wait_for(lambda: lines(tmp_path / "run") >= 5, process)
    processes = family(process.pid)
    with suppress(ProcessLookupError):
        os.kill(processes[victim], SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0, said
    wait_for(lambda: all(gone(pid) for pid in processes.values()) and not left_alive(temporary), None)
    expected = reference(trained.backend, trained.eos_id)
    first, resumed = steps_of(recorded), latest(tmp_path / "run")
    assert resumed and len(first) >= 5
    for step, (rows,) in first.items():
        assert rows == expected[step * ROWS : (step + 1) * ROWS]

    words = command(settings | SIZES[after], "--num-processes", str(after))
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    begun, second = int(resumed.name.partition("-")[2]), steps_of(recorded)
    assert [*second] == [*range(begun, STEPS)] and begun < STEPS
    assert [row for (rows,) in second.values() for row in rows] == expected[begun * ROWS :]
    assert [m["step"] for m in metrics(settings)] == [*range(1, STEPS + 1)] and not left_alive(temporary)
