"""What newcomers stumbled over (S2, S8-S20): it works now, or one plain message says what to write instead.

S1 and S3 to S7, on data, are in tests/data/test_stumbles.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from support.forked import tessera
from tessera.cli.main import main
from tessera.config.schema import TrainConfig

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
}
LINE = "north wind and river stone lamp. The sea door reads slow; king seven maps.\n"
SETTINGS: dict[str, Any] = {
    "base_model": "model",
    "random_init": True,
    "tokenizer": {"train": "bpe", "vocab_size": 290},
    "datasets": [{"path": "book.txt"}],
    "output_dir": "out",
    "sequence_len": 16,
    "micro_batch_size": 2,
    "max_steps": 3,
}


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """`say(command, *options, **changes)`: exit code, stdout and stderr of a command in this process, which must write
    nothing. A change of None takes a key away."""

    def call(command: str, *options: str, text: str = "", **changes: Any) -> tuple[int, str, str]:
        write(tmp_path, changes, text)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["tessera", *command.split(), "run.yaml", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert sorted(tmp_path.rglob("*")) == before
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    return call


def write(folder: Path, changes: dict[str, Any], text: str = "") -> None:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(MODEL))
    (folder / "book.txt").write_text(LINE * 20)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS | changes) + text)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A folder in which a run of three steps, saved every second, has ended, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    write(folder, {name: str(folder / SETTINGS[name]) for name in ("base_model", "output_dir")} | {
        "datasets": [{"path": str(folder / "book.txt")}], "save_steps": 2, "eval_steps": 3, "val_set_size": 2,
        "save_dtype": "bfloat16",
    })  # fmt: skip
    done = tessera("train", str(folder / "run.yaml"))
    assert done.codes == [0], done.err
    return folder / "out", done.out[0] + done.err[0]


def test_s2_a_row_longer_than_the_positions_of_the_model_is_told(run):
    (line,) = (line for line in run[1].splitlines() if "max_position_embeddings" in line)
    assert line.startswith("warning: sequence_len 16 is more than the 8 positions ")


def test_s8_the_last_step_is_saved(run):
    assert {path.name for path in run[0].glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_s9_the_dtype_of_what_is_handed_out_can_be_said(run):
    with safe_open(run[0] / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 - no mapping
    assert json.loads((run[0] / "config.json").read_text())["dtype"] == "bfloat16"


def test_s11_a_step_says_of_how_many(run):
    assert re.search(r"^step 2 of 3\b", run[1], re.M)
    assert max(map(len, run[1].splitlines())) < 300


def test_s19_the_loss_of_rows_held_out_has_one_name(run):
    last = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()][-1]
    assert "eval_loss" in last and "eval_ppl" in last
    assert "eval_loss" in run[1] and "held-out loss" not in run[1]


def test_s10_memory_is_told_in_units(say):
    code, out, _ = say("inspect")
    assert code == 0 and re.search(r"\d (KiB|MiB|GiB)\b", out)
    assert not re.search(r"\d,\d{3},\d{3}", out), "no rows of raw bytes"


def test_s12_keys_are_options(say):
    for words in (
        ["--learning-rate", "1e-4"], ["learning_rate=1e-4"], ["--datasets.0.path", "book.txt"],
        ["--set", "datasets.0.path=book.txt"], ["--set", "fsdp_config.reshard_after_forward=false"],
    ):  # fmt: skip
        assert say("config show", *words)[0] == 0
    code, _, err = say("train", "--learning-rte", "1")
    assert code == 2 and "nearest: --learning-rate" in err


def test_s13_many_unknown_keys_make_a_short_message(say):
    code, _, err = say("train", **{f"{name}x": 1 for name in SETTINGS}, learning_rte=1)
    assert code == 2 and len(err) < 1500 and "learning_rate" in err


def test_s14_keys_that_are_empty_ask_for_nothing(say):
    empty = "fsdp_config:\ntorchdistx_path:\ndebug:\nuse_kernels: false\n"
    assert say("config show", text=empty)[0] == 0


def test_s15_what_was_a_contradiction_is_taken(say):
    code, out, _ = say("config show", "--fsdp-config.activation-checkpointing", "true")
    assert code == 0 and re.search(r"^gradient_checkpointing: true", out, re.M)


def test_s16_a_wrong_type_says_what_to_write(say):
    for datasets in ("book.txt", ["book.txt"]):
        assert say("config show", datasets=datasets)[0] == 0
    code, _, err = say("train", tensor_parallel_mode=2)
    assert code == 2 and "2d" in err


def test_s17_a_layout_that_does_not_fit_is_mended_before_it_is_given_up(say):
    code, _, err = say("train", tensor_parallel_mode="3d", tensor_parallel_size=4)
    assert code == 2 and "tensor_parallel_mesh: {inner: 1, row: 2, col: 2}" in err
    assert "tensor_parallel_size: 1 " not in err


@pytest.mark.parametrize(
    "changes", [{"max_steps": -1}, {"warmup_steps": 0.1}, {"eval_steps": 0.5, "val_set_size": 2}], ids=str
)
def test_s18_numbers_of_transformers_are_taken(say, changes):
    assert say("config show", **changes)[0] == 0


def test_s20_what_is_saved_without_save_steps_is_said():
    told = TrainConfig.model_fields["save_steps"].description
    assert told is not None and "Unset: only the last step is saved" in told
