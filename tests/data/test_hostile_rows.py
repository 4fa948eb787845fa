"""Rows with a value of another kind at any place: documents, or one message that names the row; nothing else."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.data.chats import MARKED, UNMARKED, chat_tokenizer

from tessera.core.errors import UserError
from tessera.data.formats.entry import Entry, Reading, UserPrompt
from tessera.data.formats.known import format_of, reader_of
from tessera.data.formats.template import template_of
from tessera.data.formats.tokenized import token_sample
from tessera.data.samples import Origin

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CHAT = [
    {"role": "user", "content": "hello", "train": True},
    {"role": "assistant", "content": [{"type": "text", "text": "x", "weight": 1}], "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "y", "parts": [{"begin_offset": 0, "end_offset": 1, "train": True}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}]
ROWS: dict[str, tuple[Entry, dict[str, Any]]] = {
    "completion": (Entry("a", "completion"), {"text": "x"}),
    "alpaca": (Entry("a", "alpaca"), {"instruction": "a", "input": "b", "output": "c"}),
    "system": (Entry("a", "alpaca_w_system"), {"instruction": "a", "input": "b", "output": "c", "system": "d"}),
    "choices": (Entry("a", "explainchoice"), {"question": "a", "choices": ["b"], "solution": "c"}),
    "written": (Entry("a", UserPrompt(format="{instruction}")), {"instruction": "a", "input": "b", "output": "c"}),
    "segments": (Entry("a", "input_output"), {"segments": [{"label": True, "text": "a"}]}),
    "pair": (Entry("a"), {"prompt": "a", "completion": "b"}),
    "chat pair": (Entry("a"), {"prompt": CHAT[:1], "completion": CHAT[3:]}),
    "chat": (
        Entry("a", "chat_template", split_thinking=True, message_field_training_detail="parts"),
        {"messages": CHAT, "tools": TOOLS, "system": "be"},
    ),
    "conversation": (Entry("a", "sharegpt"), {"conversations": [{"from": "human", "value": "a"}]}),
    "tokens": (Entry("a"), {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1], "position_ids": [0, 1]}),
}
VALUES: list[Any] = [None, True, -1, 2**70, 1.5, "", "x", "{", [], [None], [[1], 2], {}, {"role": 1}, [{}], ["x"]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(row: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    new: Any = copy.deepcopy(row)
    inside = new
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return new


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    own = UNMARKED.replace("message.content", "message.content + (message.tool_calls | string)")
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), own)


@pytest.mark.parametrize("template", ["of the tokenizer", MARKED + "{# tool_calls #}", "qwen3"])
@pytest.mark.parametrize("name", ROWS)
def test_a_value_of_another_kind(folder, name, template):
    entry, row = ROWS[name]
    chats = name in ("chat", "conversation", "pair", "chat pair")
    if not chats and template != "qwen3":
        return
    reading = Reading(tokenizer=folder, chat_template=None if template.startswith("of") else "jinja")
    given = {"qwen3": Reading(tokenizer=folder, chat_template="qwen3")}.get(template, reading)
    if given.chat_template == "jinja":
        given = Reading(tokenizer=folder, chat_template_jinja=template)
    made = template_of(entry, given, []) if chats else None
    origin = Origin(Path("a.jsonl"), 7)
    for path in places(row):
        for value in VALUES:
            hostile = changed(row, path, value)
            before = json.dumps(hostile)
            try:
                kind = format_of(entry, origin.path, hostile, [])
                if kind == "tokenized":
                    token_sample(hostile, origin)
                elif kind in ("chat_template", "chat_pair") or not chats:
                    document = reader_of(entry, kind, made)(hostile, origin, entry, given)
                    assert all(isinstance(segment.text, str) for segment in document.segments)
            except UserError as error:
                assert "a.jsonl" in str(error), (path, value, error)
            except Exception as error:
                raise AssertionError(f"{path} = {value!r}: {error!r}") from error
            assert json.dumps(hostile) == before, f"{path} = {value!r} changed the row that was given"
