"""Keys of the file as options of the commands that read it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tessera.cli.keys import with_keys_as_settings
from tessera.cli.main import app
from tessera.core.errors import UserError

OPTIONS = {"--num-processes": True, "--take-over": False, "--set": True, "--help": False}
CONFIG = "base_model: m\ndatasets: [{path: a.txt}]\nlr: 1e-3\n"


@pytest.mark.parametrize(
    ("words", "settled"),
    [
        (["c.yaml", "--learning-rate", "1e-5"], ["c.yaml", "--set", "learning_rate=1e-5"]),
        (["--learning-rate=1e-5", "c.yaml"], ["--set", "learning_rate=1e-5", "c.yaml"]),
        (["--max-steps", "-1"], ["--set", "max_steps=-1"]),
        (["--learning_rate", "1"], ["--set", "learning_rate=1"]),
        (["--datasets.0.path", "x"], ["--set", 'datasets.0.path="x"']),
        (["--fsdp-config.reshard-after-forward", "false"], ["--set", "fsdp_config.reshard_after_forward=false"]),
        (["--tokenizer", "null"], ["--set", "tokenizer=null"]),
        (["--output-dir", "12"], ["--set", 'output_dir="12"']),
        (["--tensor-parallel-mode", "2d"], ["--set", 'tensor_parallel_mode="2d"']),
        (["--bf16", "auto"], ["--set", "bf16=auto"]),
        (["--gradient-checkpointing", "c.yaml"], ["--set", "gradient_checkpointing=true", "c.yaml"]),
        (["--gradient-checkpointing", "false"], ["--set", "gradient_checkpointing=false"]),
        (["--no-shuffle"], ["--set", "shuffle=false"]),
        (["--resume-from-checkpoint"], ["--set", "resume_from_checkpoint=true"]),
        (["--resume-from-checkpoint", "out"], ["--set", "resume_from_checkpoint=out"]),
        (["--flash-attention", "--seed", "3"], ["--set", "flash_attention=true", "--set", "seed=3"]),
        (["--num-train-epochs", "3"], ["--set", "num_train_epochs=3"]),
        (["c.yaml", "learning_rate=1e-5"], ["c.yaml", "--set", "learning_rate=1e-5"]),
        (["c=d.yaml"], ["c=d.yaml"]),
        (["seed=" + "9" * 5000], ["--set", "seed=" + "9" * 5000]),
        (["--config", "c.yaml"], ["c.yaml"]),
        (["--config=c.yaml"], ["c.yaml"]),
        (["--num-processes", "2", "--take-over", "c.yaml"], ["--num-processes", "2", "--take-over", "c.yaml"]),
        (["--set", "--seed"], ["--set", "--seed"]),
        (["--", "--seed"], ["--", "--seed"]),
    ],
)
def test_keys_become_settings(words, settled):
    assert with_keys_as_settings(words, OPTIONS) == settled


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rte", "1"], "nearest: --learning-rate"),
        (["--num-proceses=2"], "nearest: --num-processes"),
        (["--fsdp-confg.offload-params"], "is neither an option of this command nor a key of the file"),
        (["--learning-rate"], "write --learning-rate VALUE"),
        (["--learning-rate", "--seed", "3"], "write --learning-rate VALUE"),
        (["--no-learning-rate"], "is neither an option"),
    ],
)
def test_options_that_are_no_keys(words, said):
    with pytest.raises(UserError) as caught:
        with_keys_as_settings(words, OPTIONS)
    assert said in str(caught.value)


def test_every_command_that_reads_a_config_takes_keys(tmp_path):
    from typer.main import get_command

    group = get_command(app)
    reading = {
        name: command
        for name, command in [*group.commands.items(), *group.commands["config"].commands.items()]
        if any(param.name == "config" and param.param_type_name == "argument" for param in command.params)
    }
    assert {"train", "launch", "inspect", "verify", "show"} <= reading.keys()
    for name, command in reading.items():
        assert type(command).__name__ == "ReadsConfig", name
        assert any("--set" in param.opts for param in command.params), name


def test_a_config_is_shown_with_keys_of_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    words = ["config", "show", "--config", str(path), "--learning-rate", "1e-5", "--datasets.0.path", "b.txt", "seed=3"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    said = {line.partition("  # ")[0].rstrip(): line.rpartition("# ")[2] for line in run.stdout.splitlines()}
    assert said["learning_rate: 1.0e-05"] == said["seed: 3"] == "command line"
    assert any(line.startswith("datasets: [{path: b.txt") for line in said)


def test_show_explains_a_key_or_every_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    said = [CliRunner().invoke(app, ["config", "show", *words]) for words in (["lora_r"], ["run.yaml", "--all"])]
    assert [run.exit_code for run in said] == [0, 0]
    assert said[0].stdout == "lora_r\n  Not supported (LoRA adapters): remove it to train every weight.\n"
    assert "\n# The highest learning rate, reached after warm-up.\nlearning_rate: " in said[1].stdout
    Path("seed").write_text(CONFIG)  # a file of that name
    assert "learning_rate: " in CliRunner().invoke(app, ["config", "show", "seed"]).stdout


@pytest.mark.parametrize("old", ["keys", "schema"])
def test_the_old_names_of_two_commands_work(old):
    new, before = (CliRunner().invoke(app, words) for words in (["config", old], [f"config-{old}"]))
    assert new.exit_code == before.exit_code == 0 and new.stdout == before.stdout
    assert "config-keys" not in CliRunner().invoke(app, ["--help"]).stdout
