"""Texts that are no config: one message each, soon, whatever PyYAML makes of them."""

import os
import threading
import time

import pytest

from tessera.config import reader
from tessera.config.load import load_config, make_config
from tessera.config.schema import SECTIONS, TrainConfig
from tessera.core import files
from tessera.core.errors import UserError
from tessera.sizes import bounds

MINIMAL = {"base_model": "./my-llama", "datasets": [{"path": "a.jsonl"}]}
TEXTS = {
    "no date": ("a: 2021-13-45", "is not of type timestamp"),
    "no number": ("a: !!int abc", "'abc' is not of type int"),
    "no digits": ("a: 0x_", "is not of type int"),
    "no truth": ("a: !!bool perhaps", "is not of type bool"),
    "no time": ("a: !!timestamp x", "is not of type timestamp"),
    "many digits": ("a: " + "9" * 5000, "a number of 5000 digits"),
    "many digits of a long word": ("a: 0x" + "f" * 5000, "a number of 5002 digits"),
    "brackets": ("a: " + "[" * 2000 + "]" * 2000, "nested deeper than 20 levels"),
    "a circle": ("a: &x [*x]", "an alias stands inside what it repeats"),
    "a circle of keys": ("a: &x {b: *x}", "an alias stands inside what it repeats"),
    "a bomb": (
        "a0: &a0 [1, 1]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
        "aliases make more than 20000 keys and values",
    ),
    "a bomb of merges": (
        "a0: &a0 {a: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)),
        "aliases make more than 20000 keys and values",
    ),
    "a tower": (
        "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 60)),
        "aliases make more than 20 levels",
    ),
    "keys": ("\n".join(f"k{i}: 1" for i in range(5000)), "5000 keys in one place, at most 500"),
    "values": (f"a: [{'1,' * 30000}]", "more than 20000 keys and values"),
    "half a character": ('a: "\\ud800"', "half of a surrogate pair"),
    "NUL": ("a: \0", "special characters are not allowed"),
    "a list as key": ("? [a]\n: 1", "unhashable key"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_one_message_with_its_line_also_through_set(name, tmp_path):
    text, reason = TEXTS[name]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    begun = time.monotonic()
    with pytest.raises(UserError, match="is not YAML") as caught:
        load_config(file)
    assert reason in str(caught.value) and len(str(caught.value)) < 1000
    assert "line " in str(caught.value) or name == "NUL"
    assert time.monotonic() - begun < 10
    file.write_text("base_model: m\ndatasets: [{path: a}]")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(file, [f"seed={text.removeprefix('a: ')}"])


def test_aliases_below_the_limits_are_read():
    assert reader.parse_yaml("a: &x [1, 2]\nb: [*x, *x]", "text") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_problems_are_listed_up_to_a_number():
    sources = [{"path": "a", f"key{i}": 1} for i in range(4)] + [{} for _ in range(30)]
    with pytest.raises(UserError, match="34 problems") as caught:
        make_config({**MINIMAL, "datasets": sources})
    assert "datasets[19].path" in str(caught.value) and "datasets[20].path" not in str(caught.value)
    assert str(caught.value).endswith("and 14 more")


def test_a_pipe_is_read_up_to_a_size_and_not_waited_for_without_end(tmp_path, monkeypatch):
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("base_model: m\ndatasets: [{path: a}]\nseed: 7"))
    writer.start()
    assert load_config(pipe)[0].seed == 7
    writer.join()
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="nothing was written for 0.1 seconds"):
        load_config(pipe)
    with pytest.raises(UserError, match="is too large"):
        load_config("/dev/zero")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~nosuchuser/model", "there is no user nosuchuser"),
        ("a\0b", "a NUL character"),
        ("a" * 300, "too long"),
        ("a/" * 3000, "too long"),
    ],
)
def test_names_that_no_file_has(path, reason):
    for keys in ({"base_model": path}, {"output_dir": path}, {"datasets": [{"path": path}]}, {"tokenizer": path}):
        with pytest.raises(UserError, match=reason) as caught:
            make_config({**MINIMAL, **keys})
        assert caught.value.key == next(iter(keys)).replace("datasets", "datasets[0].path")
        assert "\0" not in str(caught.value)
    with pytest.raises(UserError, match="config file"):
        load_config(path)


NUMBERS = [
    (section, key, {**field, **part})
    for section, model in {"": TrainConfig, **SECTIONS}.items()
    for key, field in model.model_json_schema()["properties"].items()
    for part in field.get("anyOf", [field])
    if part.get("type") in ("integer", "number") and "const" not in part
]


@pytest.mark.parametrize(("section", "key", "part"), NUMBERS, ids=[f"{s}.{k}" for s, k, _ in NUMBERS])
def test_every_number_of_the_config_has_both_bounds(section, key, part):
    assert {"minimum", "exclusiveMinimum", "ge"} & set(part) and {"maximum", "exclusiveMaximum", "le"} & set(part)
    no_limit = [] if key == "max_steps" else [-1]  # as transformers writes it
    for value in (10**101, 10**400, *no_limit, float("inf"), float("nan"), True, "1"):
        filled = {"train": "bpe", key: value} if section == "tokenizer" else {key: value}
        filled = {section: [{"path": "a"} | filled] if section.endswith("datasets") else filled} if section else filled
        with pytest.raises(UserError) as caught:
            make_config({**MINIMAL, **filled})
        assert caught.value.key.replace("[0]", "") == (f"{section}.{key}" if section else key)
        assert len(str(caught.value)) < 500


def test_axes_that_make_too_many_processes():
    with pytest.raises(UserError, match=f"at most {bounds.RANKS}"):
        make_config({**MINIMAL, "dp_replicate_size": bounds.RANKS, "tensor_parallel_size": 2})
    with pytest.raises(UserError, match=r"tensor_parallel_mesh.row × tensor_parallel_mesh.col"):
        make_config({**MINIMAL, "tensor_parallel_mesh": {"row": 2**10, "col": 2**10}})
