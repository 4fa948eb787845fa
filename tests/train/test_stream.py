"""Runs on a stream: they equal those on the same rows prepared, and go on at another data-parallel size; its keys."""

import json
from typing import Any

import pytest

from tessera.data.tokenizer import save_tokenizer, train_bpe
from train.runs import forget_last, metrics, run

WORDS = [f"{number} is {number * number} and then {number % 7}. " for number in range(40)]
STREAM = {"streaming": True, "max_steps": 4, "gradient_accumulation_steps": 2, "micro_batch_size": 1, "warmup_steps": 1}
MINIMAL = {"base_model": "m", "datasets": [{"path": "a.txt"}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Any]:
    """The keys of a text, in one file of rows, and its tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    tokenizer = train_bpe(WORDS, 300)
    save_tokenizer(tokenizer, folder)
    path = folder / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": word * (1 + place % 4)}) + "\n" for place, word in enumerate(WORDS)))
    return {"datasets": [{"path": str(path)}], "tokenizer": str(folder)}


def losses(settings):
    return [line["loss"] for line in metrics(settings)]


def test_a_run_goes_on_at_another_data_parallel_size_as_if_it_had_not_stopped(workshop, data, tmp_path):
    whole = workshop.settings("llama 64", tmp_path / "whole", **STREAM, **data)
    run(whole)
    halves = workshop.settings("llama 64", tmp_path / "halves", **STREAM, **data, save_steps=2)
    run(halves)
    state = json.loads((tmp_path / "halves/checkpoint-2/state.json").read_text())
    assert state["samples"] == 4 and state["stream"]["document"] > 0
    forget_last(halves)
    two = {"dp_shard_size": 2, "gradient_accumulation_steps": 1, "resume_from_checkpoint": True}
    run(halves | two)
    assert losses(halves)[-4:] == pytest.approx(losses(whole), abs=2e-5)
    assert len({*losses(whole)}) == 4
