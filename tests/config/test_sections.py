"""The sections of the YAML: joined in one table, each key once, and read without the heavy libraries."""

import subprocess
import sys

import pytest

from tessera.config.load import make_config
from tessera.config.schema import SECTIONS, TrainConfig
from tessera.config.sections.section import Section
from tessera.core.errors import UserError

MINIMAL = {"base_model": "./my-llama", "datasets": [{"path": "a.jsonl"}]}


def test_every_key_is_in_one_section_and_they_follow_one_another():
    """A name given twice, key or check, would replace the other one in silence."""
    sections = TrainConfig.__bases__[::-1]
    assert [key for section in sections for key in section.__annotations__] == list(TrainConfig.model_fields)
    own = [name for section in sections for name in vars(section) if not name.startswith(("__", "model_"))]
    own = [name for name in own if not name.startswith("_abc")]
    assert len(own) == len(set(own)), own
    assert {section.__module__.rpartition(".")[0] for section in sections} == {"tessera.config.sections"}


def test_keys_within_keys_are_listed():
    nested = {key for key, field in TrainConfig.model_fields.items() if "Config" in str(field.annotation)}
    assert nested == set(SECTIONS)
    assert all(issubclass(section, Section) for section in SECTIONS.values())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"val_set_size": 20.0}, "val_set_size"),  # of one section
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"lr_scheduler": "constant", "warmup_steps": 3}, "lr_scheduler"),
        ({"save_strategy": "no", "save_steps": 3}, "save_steps"),
        ({"eval_steps": 3}, "eval_steps"),  # of two
        ({"bf16": False, "fsdp_config": {"mixed_precision_policy": "bf16"}}, "fsdp_config.mixed_precision_policy"),
    ],
)
def test_checks_of_every_section_are_made(keys, named):
    with pytest.raises(UserError) as caught:
        make_config({**MINIMAL, **keys})
    assert caught.value.key == named


def test_reading_a_config_imports_nothing_heavy(tmp_path):
    """So a mistake in it is told at once, and a launcher that only starts others stays small."""
    (tmp_path / "run.yaml").write_text(
        "base_model: m\ndatasets: [{path: a}]\ntensor_parallel_mode: 2.5d\ntensor_parallel_size: 8\n"
    )
    code = """
import sys
from tessera.config.load import load_config
config, _ = load_config("run.yaml")
assert (config.world_size, config.schedule.name) == (8, "gather")
heavy = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
