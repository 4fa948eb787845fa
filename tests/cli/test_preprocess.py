"""`tessera preprocess`: data prepared before a run, which then takes them; rows shown token by token."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tessera.cli.preprocess import preprocess
from tessera.config.load import make_config
from tessera.config.schema import TrainConfig
from tessera.core.errors import UserError
from tessera.data.samples import open_samples
from tessera.data.tokenizer import save_tokenizer, train_bpe
from tessera.train.run import prepared_run

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
}


@pytest.fixture
def config(tmp_path) -> Path:
    """A YAML of a model folder without weights and of two alpaca rows."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    save_tokenizer(train_bpe(["Add. 1 2\n3! Response Instruction"], 280), model)
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3!"}, {"instruction": "[bold]", "output": "\n\x1b[5m"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "base_model": str(model),
        "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}],
        "sequence_len": 512,
        "output_dir": str(tmp_path / "out"),
        "random_init": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "run.yaml"


def settings(config: Path, **changes) -> TrainConfig:
    return make_config(yaml.safe_load(config.read_text()) | changes)[0]


def test_what_is_prepared_is_what_a_run_takes(config, capsys):
    preprocess(config, [], 0)
    assert re.search(r"^data: 2 rows, .*\nthe rows are in .*/out/prepared$", capsys.readouterr().out, re.M)
    output = config.parent / "out"
    assert [place.name for place in output.iterdir()] == ["prepared"]
    made = prepared_run(settings(config), 1)
    assert made.prepared == output / "prepared" and "reused from" in capsys.readouterr().out


def test_a_run_takes_its_rows_from_dataset_prepared_path(config, capsys):
    shared = config.parent / "shared"
    preprocess(config, [f"dataset_prepared_path={shared}"], 0)
    (folder,) = shared.iterdir()
    assert f"the rows are in {folder}" in capsys.readouterr().out and not (config.parent / "out").exists()
    made = prepared_run(settings(config, dataset_prepared_path=str(shared)), 1)
    assert made.prepared == folder and not (config.parent / "out/prepared").exists()


@pytest.mark.parametrize("environment", ["pipe", "terminal", "terminal without colour"])
def test_debug_shows_each_token_with_its_label(config, capsys, monkeypatch, environment):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if environment != "pipe":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    if environment == "terminal without colour":
        monkeypatch.setenv("NO_COLOR", "1")
    preprocess(config, [], 5)
    shown = capsys.readouterr().out.split("the rows are in")[1]  # before it is the progress
    assert ("\x1b[32m" in shown, "\x1b[31m" in shown) == (environment == "terminal",) * 2
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    rows = open_samples(config.parent / "out/prepared", "train")
    for index, told in enumerate(re.split(r"^row \d of 2, ", plain, flags=re.M)[1:]):
        tokens, labels = rows[index]
        assert told.startswith(f"{len(tokens)} tokens: ")
        pairs = [(int(label), int(token)) for label, token in re.findall(r"\((-?\d+), (\d+)\)", told)]
        assert pairs == list(zip(labels.tolist(), tokens.tolist(), strict=True))
    assert "3(" in plain and "\\n(" in plain and "\\x1b(" in plain and "\x1b" not in plain


def test_as_many_rows_as_asked_are_shown(config, capsys):
    preprocess(config, [], 1)
    assert len(re.findall(r"^row", capsys.readouterr().out, re.M)) == 1


def test_mistakes_are_one_message(config, tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl, line 1"):
        preprocess(config, ["datasets=[{path: " + str(tmp_path / "rows.jsonl") + ", type: completion}]"], 0)
    assert not (tmp_path / "out").exists()


def test_a_stream_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(UserError, match="streaming: false prepares the same data") as caught:
        preprocess(config, ["streaming=true", "max_steps=2", "datasets.0.type=completion"], 0)
    assert caught.value.key == "streaming" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("dataset_processes", 0), ("dataset_prepared_path", 5)])
def test_keys_of_preparation_are_checked(config, key, value):
    with pytest.raises(UserError, match=f"^{key}: {value}"):
        settings(config, **{key: value})


def test_the_name_of_transformers_for_dataset_processes_is_taken(config):
    assert settings(config, dataset_num_proc=2).dataset_processes == 2
