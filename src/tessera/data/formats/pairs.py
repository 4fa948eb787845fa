"""Rows of segments that say themselves whether they are learnt (`type: input_output`), and of prompt and completion."""

from typing import Any

from tessera.core.errors import UserError
from tessera.data.documents import Document, Segment
from tessera.data.formats.entry import Entry, Reading
from tessera.data.formats.text import string
from tessera.data.rows import check_keys
from tessera.data.samples import Origin


def input_output(row: dict[str, Any], origin: Origin, entry: Entry, reading: Reading) -> Document:
    """`segments`: [{label: true, text: …}, …], tokenized one by one, with nothing put before, between or behind."""
    check_keys(row, origin, ("segments",))
    given = row.get("segments")
    hint = "`segments` is a list of objects such as {label: true, text: …}"
    if not isinstance(given, list) or not given:
        raise UserError("datasets", origin, "`segments` must be a list that is not empty", hint)
    segments = []
    for item in given:
        if not isinstance(item, dict) or item.get("label") not in (True, False):
            raise UserError("datasets", origin, "a segment without `label`, which must be true or false", hint)
        segments.append(Segment(string(item, "text", origin, hint), bool(item["label"]) or reading.train_on_inputs))
    return Document(origin, tuple(segments), opened=False, ended=False)


def prompt_completion(row: dict[str, Any], origin: Origin, entry: Entry, reading: Reading) -> Document:
    """`prompt`, which is not learnt unless `train_on_inputs`, and `completion`, both text."""
    check_keys(row, origin, ("prompt", "completion"), prompted=True)
    prompt, answer = string(row, "prompt", origin), string(row, "completion", origin)
    return Document(origin, (Segment(prompt, reading.train_on_inputs), Segment(answer)))
