"""Files as people bring them from axolotl: each resolves to what it means, or is refused in one sentence."""

import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from tests.data.chats import chat_tokenizer

from config.brought import FILES, REFUSED, Brought
from tessera.config.load import load_config
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError

NEEDS = {"adamw_bnb_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}


@pytest.fixture(scope="module")
def base(workshop, tmp_path_factory) -> Path:
    """A small Llama, with the tokenizer of a model of chats."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(workshop.model("llama 64"), folder)
    return chat_tokenizer(folder)


def brought(text: str, base: Path, folder: Path) -> tuple[TrainConfig, list[str]]:
    """The config of a file in `folder`, with the notes on it."""
    path = folder / "config.yml"
    path.write_text(text.format(folder=base, rows=folder / "rows.jsonl", out=folder / "outputs"))
    return load_config(path)


def value_of(config: Any, key: str) -> Any:
    """The value of a key, inner ones with dots; of a list the first."""
    return reduce(lambda at, name: getattr(at[0] if isinstance(at, list) else at, name), key.split("."), config)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_a_file_resolves_to_what_it_means(file: Brought, base, tmp_path):
    from tessera.train.run import resolve

    config, notes = brought(file.text, base, tmp_path)
    assert {key: value_of(config, key) for key in file.means} == file.means
    for key in file.idle:
        (note,) = [line for line in notes if line.startswith(f"{key}: ")]
        assert " has no effect: " in note
    for package in filter(None, [NEEDS.get(config.optimizer), "wandb" if config.wandb_project else None]):
        pytest.importorskip(package)
    assert resolve(config).config.base_model == str(base)
    assert not (tmp_path / "outputs").exists()


PLAIN = "base_model: {folder}\ndatasets: [{{path: '{rows}'}}]\n"


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_not_supported_is_one_sentence_with_a_way_out(asked, base, tmp_path):
    with pytest.raises(UserError) as caught:
        brought(PLAIN + asked.replace("{", "{{").replace("}", "}}"), base, tmp_path)
    keys = [line.partition(":")[0] for line in asked.splitlines()]
    assert not hasattr(caught.value, "problems"), "one message"
    assert caught.value.key == ", ".join(keys) and " not supported" in caught.value.reason
    assert REFUSED[asked] in caught.value.hint


def test_a_stream_stands_in_place_of_datasets_and_needs_an_end(base, tmp_path):
    text = "base_model: {folder}\npretraining_dataset: [{{path: '{rows}', type: pretrain}}]\n"
    with pytest.raises(UserError) as caught:
        brought(text, base, tmp_path)
    assert caught.value.key == "max_steps"
    assert brought(text + "max_steps: 5\n", base, tmp_path)[0].streaming


STREAM = "base_model: {folder}\npretraining_dataset: [{{path: '{rows}', type: pretrain}}]\nmax_steps: 5\n"
IDLE_IN_STREAM = {
    "shuffle: true": "in the order of its files",
    "num_epochs: 3.0": "max_steps alone",
    "min_sample_len: 7": "cut from documents",
    "excess_length_strategy: truncate": "cut from documents",
    "dataset_prepared_path: ./there": "never written",
    "dataset_processes: 2": "dataloader_num_workers",
    "train_on_inputs: true": "every token",
    "shuffle_merged_datasets: true": "in the order of its files",
    "dataloader_pin_memory: true": "worker processes",
}
OF_PREPARED = ("min_sample_len", "excess_length_strategy", "dataset_prepared_path", "dataset_processes")


@pytest.mark.parametrize("asked", IDLE_IN_STREAM)
def test_keys_that_a_stream_does_not_ask_say_so_in_one_line(asked, base, tmp_path):
    def lines(text: str) -> list[str]:
        return [line for line in brought(text, base, tmp_path)[1] if line.startswith(f"{asked} has no effect: ")]

    (line,) = lines(f"{STREAM}{asked}\n")
    assert IDLE_IN_STREAM[asked] in line
    assert asked.startswith("shuffle_") or lines(f"{STREAM}") == []
    if asked.startswith(OF_PREPARED):
        held_out = "test_datasets: [{{path: '{rows}', type: completion}}]\n"
        assert lines(f"{STREAM}{held_out}{asked}\n") == [], "rows to evaluate on are prepared"


def test_documents_of_a_packed_stream_see_one_another_where_axolotl_lets_them(base, tmp_path):
    packed, open_ = f"{STREAM}sample_packing: true\n", "pretrain_multipack_attn: false\n"
    assert brought(packed, base, tmp_path)[0].sample_packing
    config, notes = brought(packed + open_, base, tmp_path)
    (line,) = [line for line in notes if line.startswith("pretrain_multipack_attn")]
    assert not config.sample_packing and "attend to one another" in line
    # axolotl heeds it in pretraining_dataset alone
    sets = packed.replace("pretraining_dataset", "streaming: true\ndatasets")
    config, notes = brought(sets + open_, base, tmp_path)
    assert config.sample_packing
    assert "pretrain_multipack_attn: false has no effect: it holds for pretraining_dataset alone" in notes
