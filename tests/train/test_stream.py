"""Runs on a stream: they equal those on the same rows prepared, and go on at another data-parallel size; its keys."""

import json
from typing import Any

import pytest

from support.pool import pool
from tessera.config.load import make_config
from tessera.core.errors import UserError
from tessera.data.tokenizer import save_tokenizer, train_bpe
from train.packing_on_rank import stream_loader_on_rank
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


@pytest.mark.parametrize(
    ("keys", "key", "told"),
    [
        ({}, "max_steps", "a stream has no end"),
        ({"max_steps": 2, "val_set_size": 0.1}, "val_set_size", "test_datasets"),
        ({"max_steps": 2, "tokenizer": {"train": "bpe", "vocab_size": 300}}, "tokenizer", "no tokenizer is trained"),
    ],
)
def test_what_does_not_go_with_a_stream(keys, key, told):
    with pytest.raises(UserError, match=told) as caught:
        make_config(MINIMAL | {"streaming": True} | keys)
    assert caught.value.key == key


@pytest.mark.parametrize("form", ["a.txt", {"path": "a.txt"}, [{"path": "a.txt"}]])
def test_pretraining_dataset_is_datasets_that_are_streamed(form):
    config, _ = make_config({"base_model": "m", "pretraining_dataset": form, "max_steps": 2})
    assert config == make_config(MINIMAL | {"streaming": True, "max_steps": 2})[0]
    assert not make_config(MINIMAL)[0].streaming


def test_pretraining_dataset_beside_others_is_refused():
    with pytest.raises(UserError, match="keep one of the two"):
        make_config(MINIMAL | {"pretraining_dataset": "b.txt", "max_steps": 2})


def test_text_column_is_the_field_of_an_entry():
    entry = {"path": "a.jsonl", "text_column": "body", "skip": 3}
    config, _ = make_config({"base_model": "m", "pretraining_dataset": entry, "max_steps": 2})
    assert (config.datasets[0].field, config.datasets[0].skip) == ("body", 3)


@pytest.mark.parametrize("key", ["dataloader_num_workers", "dataloader_prefetch_factor"])
def test_keys_of_a_stream_say_that_they_do_nothing_without(key):
    assert any(key in note and "no effect" in note for note in make_config(MINIMAL | {key: 4})[1])
    assert not any(key in note for note in make_config(MINIMAL | {key: 4, "streaming": True, "max_steps": 2})[1])


def test_the_keys_reach_the_loader(workshop, data, tmp_path):
    keys = {"dataloader_num_workers": 0, "dataloader_prefetch_factor": 5, "sample_packing": True}
    settings = workshop.settings("llama 64", tmp_path / "run", **STREAM, **data, **keys)
    (found,) = pool(1).run(stream_loader_on_rank, settings)
    assert found == (0, 5, True)


def test_a_packed_run_evaluates_on_other_rows_and_hands_out_the_tokenizer(workshop, data, tmp_path):
    held_out = {"test_datasets": data["datasets"], "sample_packing": True, "save_steps": 3}
    settings = workshop.settings("llama 64", tmp_path / "run", **STREAM | {"max_steps": 3} | data | held_out)
    found = run(settings)
    assert found[-1]["eval_loss"] > 0 and len(found) == 3
    assert json.loads((tmp_path / "run/config.json").read_text())["eos_token_id"] in (0, [0])
    assert (tmp_path / "run/tokenizer.json").is_file()
    with pytest.raises(AssertionError, match="streaming is false"):
        run(settings | {"streaming": False, "resume_from_checkpoint": True, "max_steps": 5})
