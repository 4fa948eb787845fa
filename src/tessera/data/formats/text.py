"""Rows that are one text: `type: completion` and `type: pretrain`."""

from typing import Any

from tessera.core.errors import UserError
from tessera.data.documents import Document, Segment
from tessera.data.formats.entry import Entry, Reading
from tessera.data.rows import check_keys
from tessera.data.samples import Origin


def completion(row: dict[str, Any], origin: Origin, entry: Entry, reading: Reading) -> Document:
    """The text under `field`, all of it learnt, in as many windows as it fills."""
    check_keys(row, origin, (entry.field,))
    return Document(origin, (Segment(string(row, entry.field, origin, "`field` names the key of the text")),), cut=True)


def string(row: dict[str, Any], key: str, origin: Origin, hint: str = "") -> str:
    """The text under `key`. UserError: there is none."""
    value = row.get(key)
    if not isinstance(value, str):
        found = f"the row has {', '.join(map(str, row)) or 'no key'}" if key not in row else f"it is {_kind(value)}"
        raise UserError("datasets", origin, f"`{key}` must be a string; {found}", hint)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which is no character
        raise UserError("datasets", origin, f"`{key}` is not valid Unicode: {error}") from error
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
