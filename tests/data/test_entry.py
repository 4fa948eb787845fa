"""The keys of a data set reach the code that reads it, each under its name."""

from pathlib import Path

from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.config.sections.data import DatasetConfig, PromptConfig
from tessera.data.added_tokens import AddedTokens
from tessera.data.formats.entry import Entry, Reading, UserPrompt


def test_every_key_of_a_data_set_is_one_of_an_entry():
    without_effect = {"preprocess_shards"}
    assert set(DatasetConfig.model_fields) - without_effect == set(Entry.__dataclass_fields__)
    assert set(PromptConfig.model_fields) == set(UserPrompt.__dataclass_fields__)
    assert set(Reading.__dataclass_fields__) - {"added"} <= set(TrainConfig.model_fields)


def test_values_of_an_entry_arrive_as_they_were_given():
    keys = {"roles": {"user": ["ask"]}, "data_files": "x.json", "shards_idx": 1, "type": {"format": "{instruction}"}}
    config, _ = make_config({"base_model": "m", "datasets": [{"path": "a", **keys}]})
    entry = Entry.of(config.datasets[0])
    assert entry == Entry(
        "a", UserPrompt(format="{instruction}"), roles=(("user", ("ask",)),), data_files=("x.json",), shards_idx=1
    )
    assert hash(entry) and entry.split_name == "train"


def test_values_that_all_entries_share_arrive_as_they_were_given():
    keys = {"chat_template": "jinja", "chat_template_jinja": "{{ x }}", "eot_tokens": ["<e>"], "train_on_inputs": True}
    given = {"base_model": "m", "datasets": [{"path": "a"}], "chat_template_kwargs": {"x": [1]}, **keys}
    added = AddedTokens(template=("jinja", "{{ x }}"))
    expected = Reading(True, "jinja", "{{ x }}", (("x", (1,)),), ("<e>",), Path("m"), added)
    assert Reading.of(make_config(given)[0]) == expected
    assert Reading.of(make_config({**given, "tokenizer": "t"})[0]).tokenizer == Path("t")
    trained = {"train": "bpe", "vocab_size": 300}
    assert Reading.of(make_config({**given, "tokenizer": trained})[0]).tokenizer is None
