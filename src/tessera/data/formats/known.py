"""The formats of rows by name, and how the format of rows is told from the keys of the first."""

from collections.abc import Callable
from typing import Any

from tessera.core.errors import UserError
from tessera.data.documents import Document
from tessera.data.formats.entry import Entry, Reading, UserPrompt
from tessera.data.formats.pairs import input_output, prompt_completion
from tessera.data.formats.prompts import PROMPTED, STYLED, STYLES, prompted, written
from tessera.data.formats.text import completion
from tessera.data.samples import Origin

Reader = Callable[[dict[str, Any], Origin, Entry, Reading], Document]

USER_WRITTEN, TOKENIZED = "user-written", "tokenized"
_NAMED: dict[str, Reader] = {
    "completion": completion,
    "pretrain": completion,
    "input_output": input_output,
    "prompt_completion": prompt_completion,
}
KNOWN = (*_NAMED, *PROMPTED)
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


def format_of(entry: Entry, path: Any, row: dict[str, Any] | None) -> str:
    """The name of the format of rows that `entry` says, or else the keys of the first `row` of `path`.

    UserError: an unknown name, or keys of no format.
    """
    kind = entry.type
    if isinstance(kind, UserPrompt):
        written(kind)
        return USER_WRITTEN
    if kind is None:
        return _recognised(row or {}, path, entry)
    if kind in _NAMED or prompted(kind):
        return kind
    base = kind.replace(":", ".").split(".")[0]
    if base in _OTHERS:
        raise UserError("datasets.type", kind, "this format is not read", _OTHERS[base])
    styles = f"{', '.join(STYLED)} with :{', :'.join(STYLES)}"
    raise UserError("datasets.type", kind, "unknown", f"known: {', '.join(KNOWN)}; {styles}; or no type at all")


def reader_of(entry: Entry, name: str) -> Reader:
    """What makes a document of a row in the format that `format_of` named."""
    if isinstance(entry.type, UserPrompt):
        return written(entry.type)
    return _NAMED.get(name) or PROMPTED.get(name) or prompted(name) or completion


def _recognised(row: dict[str, Any], path: Any, entry: Entry) -> str:
    for name, keys in (
        (TOKENIZED, ("input_ids",)),
        ("completion", (entry.field,)),
        ("alpaca", ("instruction", "output")),
        ("prompt_completion", ("prompt", "completion")),
        ("input_output", ("segments",)),
    ):
        if all(key in row for key in keys):
            return name
    keys_found = ", ".join(map(str, row)) or "none"
    hint = (
        f"a row has `input_ids`, `{entry.field}` (see `field`), `instruction` and `output`, `prompt` and `completion`, "
        "or `segments`; or say the `type`"
    )
    raise UserError("datasets", path, f"no known kind of row: the keys of the first are {keys_found}", hint)
