"""What is written from the definitions of the keys: the page, the first file, the schema."""

import re
from typing import Any

import pytest

from tessera.config import compat, describe
from tessera.config.explain import explained
from tessera.config.load import load_config, make_config, resolve_config
from tessera.config.schema import SECTIONS, TrainConfig
from tessera.config.show import shown
from tessera.core.errors import UserError

MINIMAL = {"base_model": "./my-llama", "datasets": [{"path": "a.jsonl"}]}


def test_every_key_of_the_page_has_its_verdict():
    page = describe.keys_page()
    rows = {line.split(" | ")[0].strip("| `"): line for line in page.splitlines() if line.startswith("| `")}
    for key in (*TrainConfig.model_fields, *compat.TOP.ours, *compat.TOP.no_effect, *compat.TOP.refused):
        assert key in rows, key
    assert all(line.count(" | ") == rows[key].count(" | ") for key, line in rows.items())


def test_the_first_file_explains_every_line_and_loads(tmp_path):
    text = describe.starter()
    (tmp_path / "run.yaml").write_text(text)
    config, notes = load_config(tmp_path / "run.yaml")
    assert notes == [] and config.world_size == 1
    lines = text.splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        assert not re.match(r" *(- )?\w+:", line) or before.lstrip().startswith("# "), f"{line!r} has no comment"


# ---- The schema


def fits(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Whether `value` is valid, by the words of JSON Schema that ours uses."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]] | {k: v for k, v in schema.items() if k != "$ref"}
    kinds = {
        "object": dict, "array": list, "string": str, "null": type(None), "boolean": bool, "integer": int,
        "number": (int, float),
    }  # fmt: skip
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(isinstance(value, kinds[n]) and (n == "boolean" or type(value) is not bool) for n in names):
        return False
    for word in ("anyOf", "oneOf"):
        if word in schema and not any(fits(value, part, root) for part in schema[word]):
            return False
    if "enum" in schema and not compat.is_one_of(value, schema["enum"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(fits(v, schema.get("items", {}), root) for v in value)
    if isinstance(value, dict) and not set(schema.get("required", ())) <= value.keys():
        return False
    if isinstance(value, dict) and ("properties" in schema or "patternProperties" in schema):
        patterns, known = schema.get("patternProperties", {}), schema.get("properties", {})
        for key, inner in value.items():
            part = known.get(key) or next((p for name, p in patterns.items() if re.search(name, key)), None)
            if not fits(inner, schema.get("additionalProperties", {}) if part is None else part, root):
                return False
    return True


@pytest.mark.parametrize(
    ("keys", "valid"),
    [
        ({}, True),
        ({"seed": 3, "fsdp_config": None, "torchdistx": None, "debug": False}, True),
        ({"seed": "x"}, False),
        ({"micro_batch_size": 0}, False),
        ({"learning_rte": 1}, False),
        ({"lr": 1e-3, "num_train_epochs": 2, "optim": "adamw_torch"}, True),
        ({"lr": "fast"}, False),
        ({"optimizer": "lion"}, False),
        ({"adapter": "lora"}, False),
        ({"adapter": None, "lora_r": None}, True),
        ({"lora_r": 8}, False),
        ({"pipeline_parallel_size": 1}, True),
        ({"pipeline_parallel_size": 2}, False),
        ({"use_liger_kernel": True, "liger_rope": True, "torch_compile": True}, True),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, True),
        ({"plugins": ["mine"]}, False),
        ({"datasets": "./a.txt"}, True),
        ({"datasets": ["./a.txt", {"path": "b", "type": "alpaca"}]}, True),
        ({"datasets": [{"path": "b", "typ": "alpaca"}]}, False),
        ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}}, True),
        ({"fsdp_config": {"limit_all_gathers": True}}, True),
        ({"fsdp_config": {"activation_checkpointing": True, "version": 2}}, True),
        ({"fsdp_config": {"offload": True}}, False),
        ({"deepspeed": "zero3.json"}, True),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, True),
        ({"tokenizer": {"train": "bpe", "vocab_size": 300}}, True),
        ({"tensor_parallel_mesh": {"rows": 2}}, False),
    ],
)  # fmt: skip
def test_the_schema_lets_through_what_the_loader_does(keys, valid):
    schema = describe.json_schema()
    assert fits({**MINIMAL, **keys}, schema, schema) == valid
    if valid:
        make_config({**MINIMAL, **keys})
    else:
        with pytest.raises(UserError):
            make_config({**MINIMAL, **keys})


@pytest.mark.parametrize("form", ["a.txt", [{"path": "a.jsonl", "text_column": "body"}]])
def test_the_schema_takes_pretraining_dataset_in_the_place_of_datasets(form):
    schema, keys = describe.json_schema(), {"base_model": "m", "pretraining_dataset": form, "max_steps": 2}
    assert fits(keys, schema, schema)
    make_config(keys)


def test_the_schema_explains_every_key():
    schema = describe.json_schema()
    assert schema["required"] == ["base_model"]
    assert all(part.get("description") for part in schema["properties"].values())
    assert "compiled" in schema["properties"]["torch_compile"]["description"]
    assert not fits({"base_model": "m"}, schema, schema)


# ---- One key


def test_every_key_of_every_place_is_explained():
    places = {"": compat.TOP, "datasets.": compat.DATASETS, "fsdp_config.": compat.FSDP}
    ours = {"": TrainConfig, **{f"{key}.": section for key, section in SECTIONS.items()}}
    for prefix, section in ours.items():
        for key, field in section.model_fields.items():
            told = explained(prefix + key)
            assert told is not None and told.startswith(f"{prefix}{key}\n  {(field.description or '')[:20]}")
    for prefix, table in places.items():
        for key, row in table.others.items():
            told = " ".join((explained(prefix + key.replace("*", "x")) or "").split())
            assert (row if isinstance(row, str) else row.what) in told, key
        for key in table.ours:
            assert f"{key} is called " in (explained(prefix + key) or ""), key
    assert explained("no_such_key") is explained("datasets.no_such_key") is None


def test_a_key_is_explained_with_values_default_and_other_names():
    assert explained("--learning-rate".strip("-")) == (
        "learning_rate\n  The highest learning rate, reached after warm-up.\n  Default: 2.0e-05.\n  Other names: lr."
    )
    assert "\n  Values: true, false.\n  Default: false." in (explained("sample_packing") or "")
    assert explained("datasets[0].split") == explained("datasets.0.split") == explained("datasets.split")
    assert (explained("lr") or "").endswith(explained("learning_rate") or "?")


def test_a_config_with_every_key_explained_is_the_same_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\ndatasets: ./a.txt\nlr: 1e-4\nfsdp_config: {offload_params: true}\n")
    resolved = resolve_config(path)
    text = shown(resolved, explain=True)
    path.write_text(text)
    assert resolve_config(path).config == resolved.config
    lines = text.splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        assert not re.match(r" *\w+:", line) or before.lstrip().startswith("# "), f"{line!r} is not explained"
    assert shown(resolved).count("\n") < 0.5 * text.count("\n"), "unless it is asked for, no more than a line a key"
