"""A file as people bring it, alpaca rows to be packed: its losses are those of transformers on the same samples."""

import json
import shutil
from typing import Any

import pytest
from tests.data.chats import chat_tokenizer
from tests.data.helpers import all_rows

from config.brought import FILES
from tessera.config.load import load_config, written_values
from tessera.data.epochs import Packed
from tessera.data.samples import open_samples
from train.runs import SETTINGS, Workshop, plain_loop, run
from train.test_parity import SAME

SMALL: dict[str, Any] = {"sequence_len": 400, "max_steps": 3, "learning_rate": 1e-3, "bf16": False, "shuffle": False}
PER_STEP = 2
"""Packed rows of a step: one for each of the ranks that share the data."""


@pytest.mark.slow
def test_a_brought_file_trains_as_transformers_does(workshop: Workshop, tmp_path):
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(workshop.model("llama 64"), base)
    chat_tokenizer(base)
    given = [
        {"instruction": f"Add {n}.", "input": "to 7" * (n % 2), "output": f"It is {n * n}." * (n % 3 + 1)}
        for n in range(12)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    path = tmp_path / "config.yml"
    text = FILES["replicas, shards and tensor parallelism"].text
    path.write_text(text.format(folder=base, rows=rows, out=tmp_path))
    config, _ = load_config(path)
    layout = {"dp_replicate_size": 1, "dp_shard_size": 2, "tensor_parallel_size": 2}
    ours = [m["loss"] for m in run(written_values(config) | SMALL | layout)]

    (prepared,) = (tmp_path / "last_run_prepared").glob("*/manifest.json")
    tokenized = tmp_path / "tokenized.jsonl"
    made = [{"input_ids": tokens, "labels": labels} for tokens, labels in all_rows(prepared.parent)]
    tokenized.write_text("".join(json.dumps(row) + "\n" for row in made))
    samples = open_samples(prepared.parent, "train")
    packed = Packed(samples, SMALL["sequence_len"], config.seed, shuffle=False)
    assert 2 * packed.rows_in(0) <= len(made)
    steps = [[s for row in range(PER_STEP) for s in packed.samples(step * PER_STEP + row)] for step in range(3)]
    theirs = SETTINGS | SMALL | {"base_model": str(base), "datasets": [{"path": str(tokenized)}]}
    # the third loss follows the one update that has a rate: after it the two schedules part
    plain = plain_loop(theirs | {"warmup_steps": 1, "adam_beta2": 0.999, "weight_decay": 0.0}, steps=steps)
    assert ours == pytest.approx(plain.losses, rel=SAME)
    assert plain.losses[2] != pytest.approx(plain.losses[0], rel=100 * SAME)
