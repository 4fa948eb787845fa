"""The formats of rows by name, and how the format of rows is told from the keys of the first."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tessera.config.reader import nearest
from tessera.core.errors import UserError
from tessera.data.documents import Document
from tessera.data.formats.chat import COLUMNS, chat, chat_pair
from tessera.data.formats.entry import Entry, Reading, UserPrompt
from tessera.data.formats.pairs import input_output, prompt_completion
from tessera.data.formats.prompts import PROMPTED, STYLED, STYLES, prompted, written
from tessera.data.formats.template import Template
from tessera.data.formats.text import completion
from tessera.data.samples import Origin

Reader = Callable[[dict[str, Any], Origin, Entry, Reading], Document]

USER_WRITTEN, TOKENIZED = "user-written", "tokenized"
_CHATS = {"chat_template": chat, "chat_pair": chat_pair}
CHATS = tuple(_CHATS)
"""The formats that need a chat template."""
_NAMED: dict[str, Reader] = {
    "completion": completion,
    "pretrain": completion,
    "input_output": input_output,
    "prompt_completion": prompt_completion,
}
SHAREGPT = "type sharegpt is read as chat_template: the tokenizer's template, not a fixed one, writes the turns"
KNOWN = ("chat_template", "sharegpt", *_NAMED, *PROMPTED)
_OTHERS = {
    "reflection": "its answer has three parts: join them, and use alpaca",
    "context_qa": "its question has two parts: join them, and use alpaca_chat.load_qa",
    "creative_acr": "write the prompt with type: {field_instruction: …, format: …}",
    "llama2_chat": "use chat_template with the template of the model",
    "metharme": "use chat_template",
    "pygmalion": "use chat_template",
    "orcamini": "use alpaca_w_system.load_instruct, or write the prompt with type: {…}",
    "bradley_terry": "reward models are not trained here",
    "stepwise_supervised": "reward models are not trained here",
    "messages": "use chat_template",
    "_synthetic": "made-up rows are not done",
}
"""Formats of axolotl that are not read, and what to do instead."""


def format_of(entry: Entry, path: Any, row: dict[str, Any], notes: list[str]) -> str:
    """The name of the format of rows that `entry` says, or else the keys of the first `row` of `path`.

    UserError: an unknown name, or keys of no format.
    """
    kind = entry.type
    if isinstance(kind, UserPrompt):
        written(kind)
        return USER_WRITTEN
    if kind is None:
        return _recognised(row, path, entry)
    if kind == "prompt_completion":
        return _pair(row)
    if kind == "sharegpt" and SHAREGPT not in notes:  # a folder has many files
        notes.append(SHAREGPT)
    if kind in ("sharegpt", "chat_template"):
        return "chat_template"
    if kind in _NAMED or prompted(kind):
        return kind
    base = kind.replace(":", ".").split(".")[0]
    if base in _OTHERS:
        raise UserError("datasets.type", kind, "this format is not read", _OTHERS[base])
    styles = f"{', '.join(STYLED)} with :{', :'.join(STYLES)}"
    hint = nearest(kind, KNOWN) or f"known: {', '.join(KNOWN)}; {styles}; or no type at all"
    raise UserError("datasets.type", kind, "is not a known type of rows", hint)


def reader_of(entry: Entry, name: str, template: Template | None) -> Reader:
    """What makes a document of a row in the format that `format_of` named; CHATS need the `template`."""
    if isinstance(entry.type, UserPrompt):
        return written(entry.type)
    if name in _CHATS:
        assert template is not None
        return partial(_CHATS[name], template=template)
    return _NAMED.get(name) or prompted(name) or completion


def _pair(row: dict[str, Any]) -> str:
    texts = isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)
    return "prompt_completion" if texts or "prompt" not in row else "chat_pair"


def _recognised(row: dict[str, Any], path: Any, entry: Entry) -> str:
    if entry.field != Entry.field and entry.field in row:
        return "completion"
    if "input_ids" in row:
        return TOKENIZED
    if any(isinstance(row.get(name), list) for name in ((entry.field_messages,) if entry.field_messages else COLUMNS)):
        return "chat_template"
    if "prompt" in row and "completion" in row:
        return _pair(row)
    for name, keys in (
        ("alpaca", ("instruction", "output")),
        ("input_output", ("segments",)),
        ("completion", ("text",)),
    ):
        if all(key in row for key in keys):
            return name
    found = ", ".join(map(str, row)) or "none"
    hint = (
        f"a row has `input_ids`, `messages` or `conversations`, `instruction` and `output`, `prompt` and `completion`, "
        f"`segments`, or `{entry.field}` (see `field`); or say the `type`"
    )
    raise UserError("datasets", path, f"no known kind of row: the keys of the first are {found}", hint)
