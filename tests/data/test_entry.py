"""The keys of a data set reach the code that reads it, each under its name."""

from pathlib import Path

from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.config.sections.data import DatasetConfig, PromptConfig
from tessera.data.formats.entry import Entry, Reading, UserPrompt


def test_every_key_of_a_data_set_is_one_of_an_entry():
    without_effect = {"preprocess_shards"}
    assert set(DatasetConfig.model_fields) - without_effect == set(Entry.__dataclass_fields__)
    assert set(PromptConfig.model_fields) == set(UserPrompt.__dataclass_fields__)
    assert set(Reading.__dataclass_fields__) <= set(TrainConfig.model_fields)


def test_values_arrive_as_they_were_given():
    keys = {"roles": {"user": ["ask"]}, "data_files": "x.json", "shards_idx": 1, "type": {"format": "{instruction}"}}
    given = {"base_model": "m", "datasets": [{"path": "a", **keys}], "eot_tokens": ["<e>"], "train_on_inputs": True}
    config, _ = make_config({**given, "chat_template_kwargs": {"x": [1]}, "tokenizer": "t"})
    entry, reading = Entry.of(config.datasets[0]), Reading.of(config)
    assert (entry.roles, entry.data_files, entry.shards_idx) == ((("user", ("ask",)),), ("x.json",), 1)
    assert entry.type == UserPrompt(format="{instruction}") and entry.split_name == "train"
    assert (reading.eot_tokens, reading.train_on_inputs, reading.tokenizer) == (("<e>",), True, Path("t"))
    assert hash(entry) and reading.chat_template_kwargs == (("x", (1,)),)
    trained = config.model_copy(
        update={"tokenizer": make_config({**given, "tokenizer": {"train": "bpe", "vocab_size": 300}})[0].tokenizer}
    )
    assert Reading.of(trained).tokenizer is None
    assert Reading.of(config.model_copy(update={"tokenizer": None})).tokenizer == Path("m")
